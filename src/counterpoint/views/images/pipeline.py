"""Draw the parameters of views for whole batches of images, and make the views."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from counterpoint.errors import CounterpointError
from counterpoint.views.images.colours import (
    MEAN,
    STD,
    Images,
    colour_jitter,
    grey,
    normalise,
    per_image,
    solarise,
    zero_to_one,
)
from counterpoint.views.images.recipes import RECIPES, Recipe, check_recipe
from counterpoint.views.images.resampling import gaussian_blur, random_boxes, resized_crop

GROUP = 64  # images per pass on a CPU, so that their tensors stay in a core's cache
_ORDERS = list(itertools.permutations(range(4)))


@dataclass
class ViewParameters:
    """The random parameters of one view of each of B images."""

    size: int
    boxes: Int[Tensor, "batch 4"]  # top, left, height, width in pixels of the source
    flip: Bool[Tensor, " batch"]
    jitter: Float[Tensor, "batch 4"]  # brightness, contrast, saturation factors, hue shift; 1, 1, 1, 0 changes nothing
    order: tuple[int, ...]  # order of the colour operations
    grey: Bool[Tensor, " batch"]
    sigma: Float[Tensor, " batch"]  # standard deviation of the blur in pixels of the view; 0: no blur
    solarise: Bool[Tensor, " batch"]
    gain: Float[Tensor, " batch"] | None = None
    noise: Float[Tensor, "batch 1 size size"] | None = None
    other_noise: Float[Tensor, "batch 1 size size"] | None = None
    channels: int = 3
    cut: Int[Tensor, "batch 3"] | None = None  # top, left, side in pixels of the view

    def coordinates(self, height: int, width: int) -> Float[Tensor, "batch 4"]:
        """Return the places of the crops: left, top, right, bottom, in shares of the image; a flip exchanges left and right.

        0 is the first pixel and 1 the last one, as in the authors' code of PixPro (arXiv 2011.10043).

        Args:
            height, width: of the source images in pixels.
        """
        top, left, tall, broad = self.boxes.float().unbind(1)
        left, right = left / max(width - 1, 1), (left + broad - 1) / max(width - 1, 1)
        flipped = torch.where(self.flip, right, left), torch.where(self.flip, left, right)
        down = max(height - 1, 1)
        return torch.stack([flipped[0], top / down, flipped[1], (top + tall - 1) / down], 1)

    def take(self, rows: slice | Tensor) -> ViewParameters:
        """Select the parameters of some images, such as one process's share of a batch that is drawn as a whole."""
        per_image = ("boxes", "flip", "jitter", "grey", "sigma", "solarise", "gain", "noise", "other_noise", "cut")
        found = {name: getattr(self, name) for name in per_image}
        return replace(self, **{name: value[rows] for name, value in found.items() if value is not None})


class ViewPipeline:
    """A pipeline that makes views of a batch of images.

    Args:
        size: height and width of a view in pixels.
        crops: number of views; by default 2.
        recipe: a name of RECIPES, or Recipes for the views in turn.
        local_crops: number of small views after those (multi-crop); by default 0.
        local_size: height and width of small views in pixels; None: 3/7 of `size`, as 96 is of 224.
        local_recipe: Recipe of small views; None: that of the named recipe, or crops of 0.05 to 0.14 of the area.
        mean, std: of the normalisation, channel by channel; None for both leaves views in [0, 1].
        kernel: number of taps of the blur; None: a tenth of the view's size, odd, at least 3.
        antialias: antialias crops larger than the view. Off by default, as in torchvision's fast path; large sources need it.

    Raises CounterpointError for an unknown recipe and for sizes or numbers that do not fit.
    """

    def __init__(
        self,
        size: int,
        crops: int = 2,
        recipe: str | Recipe | Sequence[Recipe] = "simclr-cifar",
        local_crops: int = 0,
        local_size: int | None = None,
        local_recipe: Recipe | None = None,
        *,
        mean: Sequence[float] | None = MEAN,
        std: Sequence[float] | None = STD,
        kernel: int | None = None,
        antialias: bool = False,
    ) -> None:
        if size < 1 or crops < 0 or local_crops < 0 or crops + local_crops < 1:
            raise CounterpointError(
                f"views need a size and a number of at least 1, got size={size}, crops={crops}, {local_crops=}"
            )
        if isinstance(recipe, str):
            check_recipe(recipe)
            views, local = RECIPES[recipe]
        else:
            views = (recipe,) if isinstance(recipe, Recipe) else tuple(recipe)
            if not views:
                raise CounterpointError("a recipe of views needs at least one Recipe")
            local = replace(views[0], scale=(0.05, 0.14))
        if (mean is None) != (std is None):
            raise CounterpointError("mean and std belong together; give both or neither")
        self.size, self.crops, self.local_crops = size, crops, local_crops
        self.local_size = local_size or max(1, round(size * 3 / 7))
        self.recipes = [views[n % len(views)] for n in range(crops)] + [local_recipe or local] * local_crops
        self.sizes = [size] * crops + [self.local_size] * local_crops
        self.mean, self.std, self.kernel, self.antialias = mean, std, kernel, antialias

    def __call__(
        self, images: UInt8[Tensor, "batch 3 height width"] | Images, generator: torch.Generator
    ) -> list[Images]:
        """Make the views: one normalised float tensor [B, 3, size, size] per view.

        The same images and generator state give the same views on every run.

        Args:
            images: [B, 3, H, W], uint8 or floating point in [0, 1].
            generator: a generator of the CPU.

        Raises CounterpointError for an empty batch or tensors of another shape.
        """
        return self.apply(images, self.draw(images.shape, generator))

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> list[ViewParameters]:
        """Draw the parameters of every view.

        Args:
            shape: of the images, [B, 3, H, W].
            generator: a generator of the CPU.

        Raises CounterpointError for another shape and for an empty batch.
        """
        if len(shape) != 4 or shape[1] != 3 or shape[0] < 1:
            raise CounterpointError(f"views need images [batch, 3, height, width], got {list(shape)}")
        if shape[2] < 1 or shape[3] < 1:
            raise CounterpointError(f"images have no pixels: {list(shape)}")
        batch, _, height, width = shape
        return [
            _draw(recipe, size, batch, height, width, generator)
            for recipe, size in zip(self.recipes, self.sizes, strict=True)
        ]

    def apply(
        self, images: UInt8[Tensor, "batch 3 height width"] | Images, parameters: Sequence[ViewParameters]
    ) -> list[Images]:
        """Make the views with these parameters. Raises CounterpointError if they are for another number of images."""
        source = zero_to_one(images)
        return [
            self._in_groups(source, view, lambda x, part: self._coloured(self._moved(x, part), part, x))
            for view in parameters
        ]

    def moved(self, images: Images, view: ViewParameters) -> Images:
        """Crop, scale and flip: the first half of a view. Values stay in [0, 1].

        Args:
            images: floating point in [0, 1].
            view: parameters for as many images.
        """
        return self._in_groups(images, view, self._moved)

    def coloured(self, images: Images, view: ViewParameters) -> Images:
        """Change colours, blur, cut and normalise: the second half of a view, after `moved`.

        Args:
            images: floating point, of the view's size.
            view: parameters for as many images. Those for fewer than three channels need `apply`.
        """
        return self._in_groups(images, view, self._coloured)

    def _in_groups(
        self, source: Images, view: ViewParameters, change: Callable[[Images, ViewParameters], Images]
    ) -> Images:
        """Apply a change to some images at a time."""
        if len(view.boxes) != len(source):
            raise CounterpointError(f"parameters of {len(view.boxes)} images were drawn, got {len(source)} images")
        done = source.new_empty(len(source), 3, view.size, view.size)
        group = max(1, len(source)) if source.is_cuda else GROUP
        for start in range(0, len(source), group):
            part = slice(start, start + group)
            done[part] = change(source[part], view.take(part))
        return done

    def _moved(self, x: Images, view: ViewParameters) -> Images:
        boxes, flip = view.boxes, view.flip
        whole = torch.tensor([0, 0, *x.shape[2:]])
        if view.size != x.shape[2] or view.size != x.shape[3] or (boxes != whole).any():
            return resized_crop(x, boxes, view.size, flip, self.antialias)
        if flip.any():
            return torch.where(per_image(flip.to(x.device)), x.flip(3), x)
        return x

    def _coloured(self, x: Images, view: ViewParameters, source: Images | None = None) -> Images:
        """Change the values of moved images; `source` has the channels that the view does not change."""
        device, dtype = x.device, x.dtype
        jitter = view.jitter
        if (jitter != _IDENTITY).any():
            brightness, contrast, saturation, hue = view.jitter.to(device, dtype).unbind(1)
            x = colour_jitter(x, brightness, contrast, saturation, hue, view.order)
        chosen = view.grey
        if chosen.any():
            x = torch.where(per_image(chosen.to(device)), grey(x), x)
        sigma = view.sigma
        if (chosen := sigma > 0).any():
            rows = chosen.nonzero()[:, 0].to(device)
            kernel = self.kernel or max(3, round(view.size / 10) // 2 * 2 + 1)
            x = x.index_copy(0, rows, gaussian_blur(x[rows], view.sigma[chosen].to(device, dtype), kernel))
        chosen = view.solarise
        if chosen.any():
            x = torch.where(per_image(chosen.to(device)), solarise(x), x)
        if view.gain is not None:
            x = x * per_image(view.gain.to(device, dtype))
        if view.noise is not None:
            x = x + view.noise.to(device, dtype)
        if view.cut is not None:
            x = x.masked_fill(_square(view.cut, view.size).to(device), 0.0)
        if source is not None and view.channels < 3:
            kept = source[:, view.channels :]
            if kept.shape[2:] != x.shape[2:]:
                kept = F.interpolate(kept, size=x.shape[2:], mode="bilinear", align_corners=False)
            kept = kept if view.other_noise is None else kept + view.other_noise.to(device, dtype)
            x = torch.cat([x[:, : view.channels], kept], 1)
        return normalise(x, self.mean, self.std) if self.mean is not None and self.std is not None else x


_IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])


def _draw(recipe: Recipe, size: int, batch: int, height: int, width: int, generator: torch.Generator) -> ViewParameters:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(batch, generator=generator) < probability

    if recipe.scale is not None:
        boxes = random_boxes(batch, height, width, recipe.scale, recipe.ratio, generator)
    else:
        reach = torch.tensor([round(recipe.shift * height), round(recipe.shift * width)])
        moved = torch.floor(uniform(0, 1, batch, 2) * (2 * reach + 1)).long() - reach
        boxes = torch.cat([moved, torch.tensor([[height, width]]).expand(batch, 2)], dim=1)
    flip = chance(recipe.flip)
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation)
    jitter = torch.stack(
        [*(uniform(max(0.0, 1 - s), 1 + s, batch) for s in strengths), uniform(-recipe.hue, recipe.hue, batch)], dim=1
    )
    jitter = torch.where(chance(recipe.jitter)[:, None], jitter, _IDENTITY)
    order = _ORDERS[int(torch.randint(len(_ORDERS), (), generator=generator))]
    grey_ones = chance(recipe.grey)
    sigma = torch.where(chance(recipe.blur), uniform(*recipe.sigma, batch), 0.0)
    view = ViewParameters(size, boxes, flip, jitter, order, grey_ones, sigma, chance(recipe.solarise))
    # Draw these only for recipes that use them, so that other recipes keep their sequence of draws.
    if recipe.gain:
        view = replace(view, gain=uniform(1 - recipe.gain, 1 + recipe.gain, batch))
    if recipe.noise:
        view = replace(view, noise=recipe.noise * torch.randn(batch, 1, size, size, generator=generator))
    if recipe.channels < 3:
        view = replace(view, channels=recipe.channels)
        if recipe.other_noise:
            other = recipe.other_noise * torch.randn(batch, 1, size, size, generator=generator)
            view = replace(view, other_noise=other)
    if recipe.cut:
        side = min(recipe.cut, size)
        corner = torch.floor(uniform(0, 1, batch, 2) * (size - side + 1)).long()
        sides = torch.where(chance(recipe.cut_chance), side, 0)
        view = replace(view, cut=torch.cat([corner, sides[:, None]], 1))
    return view


def _square(cut: Int[Tensor, "batch 3"], size: int) -> Bool[Tensor, "batch 1 size size"]:
    """Build the mask of each image's square from its top, left and side."""
    at = torch.arange(size)
    top, left, side = cut[:, :, None].unbind(1)
    rows, columns = ((at >= start) & (at < start + side) for start in (top, left))
    return (rows[:, :, None] & columns[:, None, :])[:, None]
