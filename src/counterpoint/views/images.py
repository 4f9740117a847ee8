"""Augment whole batches of images, with separate parameters for every image.

    pipeline = ViewPipeline(32, crops=2, recipe="simclr-cifar")
    one, two = pipeline(images, torch.Generator().manual_seed(0))       # images: uint8 [B, 3, H, W]

Every operation equals torchvision's with the same parameters (`torchvision.transforms.v2.functional`). Antialiasing is off by
default. Draws have the distributions of torchvision's random transforms, with one difference: each view of a batch draws the
order of the four colour operations once, not for every image. Images therefore run as one tensor.

A crop is one `grid_sample`. A blur is two small matrix products per image (rows, then columns). A group is small enough to
stay in a core's cache.

These operations are faster than those of libraries. On 2 CPU threads, the same views take 2.5 to 3.1 times as long with
kornia 0.9. With torchvision's v2 transforms, image by image, they take 6 to 21 times as long. The benchmark is
benchmarks/views.py; its record is results/bench/views.json, with 256 images of 32 and 64 pixels, with and without blur.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from counterpoint.errors import CounterpointError, unknown

Images = Float[Tensor, "batch 3 height width"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as pretrained encoders expect
GREY = (0.2989, 0.587, 0.114)
GROUP = 64  # images per pass, so that their tensors stay in a core's cache
_ORDERS = list(itertools.permutations(range(4)))


# --- operations -------------------------------------------------------------------------------------------------------


def zero_to_one(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 0..1. Return floating-point images, which must lie in 0..1, unchanged.

    Raises CounterpointError for other types.
    """
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise CounterpointError(f"images must be uint8 or floating point, got {images.dtype}")
    return images


def normalise(
    images: UInt8[Tensor, "batch 3 height width"] | Images,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Images:
    """Normalise images for an encoder: (x - mean) / std of x in [0, 1], channel by channel.

    Args:
        images: uint8 0..255 or floating point in [0, 1].
        mean, std: of each channel; by default those of ImageNet.
    """
    x = zero_to_one(images)
    scale = torch.tensor(std, dtype=x.dtype, device=x.device).view(3, 1, 1)
    shift = torch.tensor(mean, dtype=x.dtype, device=x.device).view(3, 1, 1)
    return (x - shift) / scale


def _per_image(value: Float[Tensor, " batch"]) -> Tensor:
    return value[:, None, None, None]


def grey(images: Images) -> Float[Tensor, "batch 1 height width"]:
    """Compute ITU-R 601 luma: 0.2989 R + 0.587 G + 0.114 B."""
    r, g, b = images.unbind(1)
    return (r * GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2]).unsqueeze(1)


def adjust_brightness(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Scale the values: clamp(factor x, 0, 1)."""
    return (images * _per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend with the image's mean grey m: clamp(factor x + (1 - factor) m, 0, 1)."""
    mean = grey(images).mean((1, 2, 3))
    return (images * _per_image(factor)).add_(_per_image((1 - factor) * mean)).clamp_(0, 1)


def adjust_saturation(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Blend with each pixel's grey y: clamp(factor x + (1 - factor) y, 0, 1)."""
    return (images * _per_image(factor)).add_(grey(images).mul_(_per_image(1 - factor))).clamp_(0, 1)


def adjust_hue(images: Images, shift: Float[Tensor, " batch"]) -> Images:
    """Turn the hue of every pixel by `shift` of the colour circle, in [-0.5, 0.5]. Keep value and saturation."""
    r, g, b = images.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    safe = torch.where(chroma == 0, 1.0, chroma)
    # Hue in sixths of the circle, from the largest channel and the difference of the other two.
    of_r = (g - b).div_(safe)
    of_g = (b - r).div_(safe).add_(2)
    of_b = (r - g).div_(safe).add_(4)
    hue = torch.where(value == r, of_r, torch.where(value == g, of_g, of_b))
    turn = hue.div_(6).add_(shift[:, None, None])  # in turns of the circle, not wrapped
    out = torch.empty_like(images)
    for channel, centre in enumerate((1 / 2, 5 / 6, 1 / 6)):
        # The hexcone in one formula: a channel is v - c clamp(2 - 6 d, 0, 1), d in turns from the hue opposite to it.
        away = turn - centre
        share = away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
        torch.addcmul(value, share, chroma, value=-1, out=out[:, channel])
    return out


def colour_jitter(
    images: Images,
    brightness: Float[Tensor, " batch"],
    contrast: Float[Tensor, " batch"],
    saturation: Float[Tensor, " batch"],
    hue: Float[Tensor, " batch"],
    order: Sequence[int] = (0, 1, 2, 3),
) -> Images:
    """Apply the four colour operations in this order, with factors per image.

    Args:
        images: floating point in [0, 1].
        brightness, contrast, saturation: factors, 1 for no change.
        hue: shift in [-0.5, 0.5] of the colour circle, 0 for no change.
        order: operations to apply: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """
    steps = (
        (adjust_brightness, brightness),
        (adjust_contrast, contrast),
        (adjust_saturation, saturation),
        (adjust_hue, hue),
    )
    for step in order:
        operation, amount = steps[step]
        images = operation(images, amount)
    return images


def solarise(images: Images, threshold: float = 0.5) -> Images:
    """Invert values at or above the threshold, by default 0.5."""
    return torch.where(images >= threshold, 1 - images, images)


def gaussian_blur(images: Images, sigma: Float[Tensor, " batch"], kernel: int) -> Images:
    """Blur each image with a Gaussian; pixels are mirrored at the edges.

    Args:
        images: floating point.
        sigma: standard deviation for each image, in pixels, positive.
        kernel: number of taps of the window, odd and below twice the shorter side.

    Raises CounterpointError for an even kernel and for one that is too large.
    """
    height, width = images.shape[-2:]
    if kernel % 2 == 0 or kernel < 1:
        raise CounterpointError(f"a blur's kernel must be an odd number of pixels, got {kernel}")
    if kernel // 2 >= min(height, width):
        raise CounterpointError(f"a blur of {kernel} taps needs images larger than {height} x {width}")
    taps = torch.arange(kernel, dtype=images.dtype, device=images.device) - kernel // 2
    weights = torch.softmax(-0.5 * (taps / sigma[:, None]) ** 2, dim=1)
    return _separable(images, _band(weights, height), _band(weights, width))


def _band(weights: Float[Tensor, "batch taps"], size: int) -> Float[Tensor, "batch size size"]:
    """Build the matrix of each image's blur along one axis."""
    taps = weights.shape[1]
    at = torch.arange(size)[:, None] + torch.arange(taps) - taps // 2
    at = at.abs()
    at = torch.where(at >= size, 2 * (size - 1) - at, at).to(weights.device)
    rows = weights[:, None, :].expand(-1, size, -1)
    return weights.new_zeros(len(weights), size, size).scatter_add_(2, at.expand(len(weights), -1, -1), rows)


def _separable(images: Tensor, rows: Float[Tensor, "batch h H"], columns: Float[Tensor, "batch w W"]) -> Tensor:
    """Compute rows X columns^T for every channel X of every image."""
    batch, channels, height, width = images.shape
    wide = torch.bmm(images.reshape(batch, channels * height, width), columns.transpose(1, 2))
    wide = wide.view(batch, channels, height, -1)
    return torch.matmul(rows[:, None], wide)


def resized_crop(
    images: Images,
    boxes: Int[Tensor, "batch 4"],
    size: int,
    flip: Bool[Tensor, " batch"] | None = None,
    antialias: bool = False,
) -> Float[Tensor, "batch 3 size size"]:
    """Cut a box out of every image and scale it to size x size, bilinearly.

    Args:
        images: floating point.
        boxes: top, left, height, width in whole pixels. A box's part outside the image is black.
        size: height and width of the result in pixels.
        flip: True for images whose left and right are exchanged; None: no image.
        antialias: if a box is larger than `size`, widen the filter as Pillow does; by default off.
    """
    top, left, height, width = boxes.to(images.device).unbind(1)
    if antialias:
        columns = _scaling(left, width, images.shape[3], size, images.dtype)
        if flip is not None:
            columns = torch.where(flip.to(images.device)[:, None, None], columns.flip(1), columns)
        return _separable(images, _scaling(top, height, images.shape[2], size, images.dtype), columns)
    across = _centres(left, width, images.shape[3], size, images.dtype)
    down = _centres(top, height, images.shape[2], size, images.dtype)
    if flip is not None:
        across = torch.where(flip.to(images.device)[:, None], across.flip(1), across)
    shape = (len(images), size, size)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _centres(
    start: Int[Tensor, " batch"], length: Int[Tensor, " batch"], extent: int, size: int, dtype: torch.dtype
) -> Float[Tensor, "batch size"]:
    """Compute the place of each output pixel's centre along one axis of the source, in `grid_sample`'s range -1 to 1."""
    at = (torch.arange(size, device=start.device, dtype=dtype) + 0.5) * (length.to(dtype)[:, None] / size) - 0.5
    # Beyond the outermost centres of the box, repeat its edge pixels.
    at = torch.minimum(at.clamp_(min=0), (length - 1).to(dtype)[:, None]) + start.to(dtype)[:, None]
    return (2 * at + 1) / extent - 1


def _scaling(
    start: Int[Tensor, " batch"], length: Int[Tensor, " batch"], extent: int, size: int, dtype: torch.dtype
) -> Float[Tensor, "batch size extent"]:
    """Build the matrix M of each image's antialiased scaling along one axis: out = M x. Pixel centres are at halves."""
    scale = length.to(dtype)[:, None] / size
    at = (torch.arange(size, device=start.device, dtype=dtype) + 0.5) * scale - 0.5 + start.to(dtype)[:, None]
    pixel = torch.arange(extent, device=start.device)
    weights = (1 - (pixel - at[:, :, None]).abs() / scale.clamp(min=1)[:, :, None]).clamp_(min=0)
    weights = weights * ((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))[:, None, :]
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-12)


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The settings of one view. Strengths have the meaning of torchvision's ColorJitter; probabilities are per image."""

    scale: tuple[float, float] | None = (0.08, 1.0)  # range of the share of the area in a crop; None: no random crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of a crop
    shift: float = 0.0  # if scale is None: move by up to this share of the side, black beyond the edge
    flip: float = 0.5
    jitter: float = 0.0  # probability of colour jitter
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0
    gain: float = 0.0  # multiply values by a factor from 1 - gain to 1 + gain
    cut: int = 0  # side of a black square, in pixels of the view; 0: none
    cut_chance: float = 1.0
    noise: float = 0.0  # standard deviation of grey noise added to values in 0..1, which may leave that range
    channels: int = (
        3  # number of channels to change, from the first; scale the others to the view's size and add `other_noise`
    )
    other_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.gain < 0 or self.cut < 0 or self.noise < 0 or self.other_noise < 0:
            raise CounterpointError("a view's gain, cut and noise must not be negative")
        if not 1 <= self.channels <= 3:
            raise CounterpointError(f"a view's channels must lie between 1 and 3, got {self.channels}")
        for name in ("flip", "jitter", "grey", "blur", "solarise", "shift", "cut_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise CounterpointError(f"a view's {name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise CounterpointError(f"a crop's scale must be a range 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise CounterpointError(f"a crop's ratio must be a range 0 < low <= high, got {self.ratio}")
        if not 0 <= self.hue <= 0.5:
            raise CounterpointError(f"hue must lie between 0 and 0.5, half the colour circle, got {self.hue}")
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise CounterpointError(f"a blur's sigma must be a range 0 < low <= high, got {self.sigma}")


_SIMCLR = Recipe(jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5)
_MOCO = Recipe(scale=(0.2, 1.0), jitter=0.8, grey=0.2, blur=0.5)
_SUPCON = replace(_MOCO, blur=0.0)
_BYOL = Recipe(jitter=0.8, saturation=0.2, grey=0.2)
_ADAINF = Recipe(scale=(0.2, 1.0), jitter=0.4, grey=0.2, blur=0.5)
_DIGITS = Recipe(scale=None, flip=0.0)
_PATTERNS = replace(_DIGITS, noise=0.15, cut=3, cut_chance=0.8, gain=0.4, shift=1 / 8, channels=1, other_noise=0.05)
# Each recipe: the settings of its views, taken in turn (first, second, first again), and the settings of local crops.
RECIPES: dict[str, tuple[tuple[Recipe, ...], Recipe]] = {
    name: (tuple(views), local)
    for name, views, local in (
        # Chen et al. 2020, strength 1, and 0.5 without blur for CIFAR.
        ("simclr", [_SIMCLR], replace(_SIMCLR, scale=(0.05, 0.14))),
        (
            "simclr-cifar",
            [Recipe(jitter=0.8, grey=0.2)],
            Recipe(scale=(0.05, 0.14), jitter=0.8, grey=0.2),
        ),
        # Khosla et al. 2020, its published code for CIFAR.
        ("supcon", [_SUPCON], replace(_SUPCON, scale=(0.05, 0.2))),
        # He et al. 2020; Chen et al. 2020, also SimSiam's.
        ("moco-v1", [Recipe(scale=(0.2, 1.0), jitter=1.0, hue=0.4, grey=0.2)], Recipe(scale=(0.05, 0.2), jitter=1.0)),
        ("moco-v2", [_MOCO], replace(_MOCO, scale=(0.05, 0.2))),
        # Grill et al. 2020, also Barlow Twins' and VICReg's: the two views differ in blur and solarisation.
        (
            "byol",
            [replace(_BYOL, blur=1.0), replace(_BYOL, blur=0.1, solarise=0.2)],
            replace(_BYOL, scale=(0.05, 0.14), blur=0.5),
        ),
        # Caron et al. 2020 and 2021: large crops and many small ones.
        ("swav", [replace(_SIMCLR, scale=(0.14, 1.0))], replace(_SIMCLR, scale=(0.05, 0.14))),
        (
            "dino",
            [
                replace(_BYOL, scale=(0.4, 1.0), blur=1.0),
                replace(_BYOL, scale=(0.4, 1.0), blur=0.1, solarise=0.2),
            ],
            replace(_BYOL, scale=(0.05, 0.4), blur=0.5),
        ),
        # Grey 8 x 8 digits, as in the pilots of several papers' claims: from hardly changed to hardly recognisable.
        ("digits-easy", [replace(_DIGITS, noise=0.05, cut=2, cut_chance=0.7, gain=0.2)], _DIGITS),
        ("digits-plain", [replace(_DIGITS, noise=0.1, cut=2, cut_chance=0.5, gain=0.2)], _DIGITS),
        ("digits-shifted", [replace(_DIGITS, noise=0.1, cut=2, cut_chance=0.5, gain=0.3, shift=1 / 8)], _DIGITS),
        ("digits-hard", [replace(_DIGITS, noise=0.15, cut=3, cut_chance=0.8, gain=0.4, shift=1 / 8)], _DIGITS),
        # The hardest, applied to the digit's channel alone: for MCL's claim.
        ("digit-patterns", [_PATTERNS], replace(_DIGITS, channels=1)),
        # Changes of the same kinds, from very weak to very strong: for AdaInf's claim.
        ("digits-s0", [replace(_DIGITS, noise=0.05, gain=0.1)], _DIGITS),
        ("digits-s25", [replace(_DIGITS, shift=1 / 8, noise=0.1, cut=1, cut_chance=0.9, gain=0.225)], _DIGITS),
        ("digits-s50", [replace(_DIGITS, shift=1 / 8, noise=0.15, cut=2, cut_chance=0.9, gain=0.35)], _DIGITS),
        ("digits-s100", [replace(_DIGITS, shift=1 / 4, noise=0.25, cut=4, cut_chance=0.9, gain=0.6)], _DIGITS),
        # Wang et al. 2024: weaker than SimCLR's, for sets inflated with generated images. Small pictures have no blur.
        ("adainf", [_ADAINF], replace(_ADAINF, scale=(0.05, 0.2))),
        ("adainf-cifar", [replace(_ADAINF, blur=0.0)], replace(_ADAINF, scale=(0.05, 0.2), blur=0.0)),
        # Noise alone, of the source `clusters`.
        ("clusters", [replace(_DIGITS, noise=0.4 * 0.12)], _DIGITS),
        # DINO's for small pictures: colours as in simclr-cifar, no blur.
        (
            "dino-cifar",
            [
                Recipe(scale=(0.4, 1.0), jitter=0.8, grey=0.2),
                Recipe(scale=(0.4, 1.0), jitter=0.8, grey=0.2, solarise=0.2),
            ],
            Recipe(scale=(0.05, 0.4), jitter=0.8, grey=0.2),
        ),
        # He et al. 2022.
        ("mae", [Recipe(scale=(0.2, 1.0))], Recipe(scale=(0.05, 0.2))),
        # Crop and flip, as ImageNet classifiers are trained.
        ("supervised", [Recipe()], Recipe(scale=(0.05, 0.14))),
        # Flip and a shift of up to an eighth, as CIFAR classifiers and mean teachers are trained.
        ("weak", [Recipe(scale=None, shift=1 / 8)], Recipe(scale=(0.05, 0.14))),
        # No change.
        ("none", [Recipe(scale=None, flip=0.0)], Recipe(scale=None, flip=0.0)),
    )
}


def check_recipe(name: str) -> None:
    """Raise CounterpointError, with near matches, for a name that is not in RECIPES."""
    if name not in RECIPES:
        raise unknown("recipe of views", name, RECIPES)


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
        out = []
        for view in parameters:
            if len(view.boxes) != len(source):
                raise CounterpointError(f"parameters of {len(view.boxes)} images were drawn, got {len(source)} images")
            done = source.new_empty(len(source), 3, view.size, view.size)
            for start in range(0, len(source), GROUP):
                part = slice(start, start + GROUP)
                done[part] = self._view(source[part], view.take(part))
            out.append(done)
        return out

    def _view(self, x: Images, view: ViewParameters) -> Images:
        boxes, flip, kept = view.boxes, view.flip, x[:, view.channels :]
        whole = torch.tensor([0, 0, *x.shape[2:]])
        if view.size != x.shape[2] or view.size != x.shape[3] or (boxes != whole).any():
            x = resized_crop(x, boxes, view.size, flip, self.antialias)
        elif flip.any():
            x = torch.where(_per_image(flip.to(x.device)), x.flip(3), x)
        device, dtype = x.device, x.dtype
        jitter = view.jitter
        if (jitter != _IDENTITY).any():
            brightness, contrast, saturation, hue = view.jitter.to(device, dtype).unbind(1)
            x = colour_jitter(x, brightness, contrast, saturation, hue, view.order)
        chosen = view.grey
        if chosen.any():
            x = torch.where(_per_image(chosen.to(device)), grey(x), x)
        sigma = view.sigma
        if (chosen := sigma > 0).any():
            rows = chosen.nonzero()[:, 0].to(device)
            kernel = self.kernel or max(3, round(view.size / 10) // 2 * 2 + 1)
            x = x.index_copy(0, rows, gaussian_blur(x[rows], view.sigma[chosen].to(device, dtype), kernel))
        chosen = view.solarise
        if chosen.any():
            x = torch.where(_per_image(chosen.to(device)), solarise(x), x)
        if view.gain is not None:
            x = x * _per_image(view.gain.to(device, dtype))
        if view.noise is not None:
            x = x + view.noise.to(device, dtype)
        if view.cut is not None:
            x = x.masked_fill(_square(view.cut, view.size).to(device), 0.0)
        if view.channels < 3:
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


def random_boxes(
    batch: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Int[Tensor, "batch 4"]:
    """Draw boxes (top, left, height, width) as torchvision's RandomResizedCrop does, in whole pixels.

    The area and the logarithm of the ratio are uniform. Take the first of ten draws that fits in the image. If none fits,
    take the largest centred box within the ratios.

    Args:
        batch: number of boxes.
        height, width: of the images in pixels.
        scale: range of the box's share of the area, within 0 to 1.
        ratio: range of width over height.
        generator: a generator of the CPU.
    """
    tries = 10
    area = height * width * (scale[0] + (scale[1] - scale[0]) * torch.rand(batch, tries, generator=generator))
    low, high = torch.log(torch.tensor(ratio)).tolist()
    aspect = torch.exp(low + (high - low) * torch.rand(batch, tries, generator=generator))
    w = torch.round(torch.sqrt(area * aspect)).long()
    h = torch.round(torch.sqrt(area / aspect)).long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    fallback_w, fallback_h = width, height
    if width / height < min(ratio):
        fallback_h = max(1, round(width / min(ratio)))
    elif width / height > max(ratio):
        fallback_w = max(1, round(height * max(ratio)))
    any_fits = fits.any(1)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], fallback_w)
    h = torch.where(any_fits, h.gather(1, first)[:, 0], fallback_h)
    place = torch.rand(batch, 2, generator=generator)
    top = torch.where(any_fits, (place[:, 0] * (height - h + 1)).long(), (height - h) // 2)
    left = torch.where(any_fits, (place[:, 1] * (width - w + 1)).long(), (width - w) // 2)
    return torch.stack([top.minimum(height - h), left.minimum(width - w), h, w], dim=1)


class Handled:
    """Strong views of tiny pictures: small rotations, zooms, shifts, changes of brightness and noise."""

    DEGREES, ZOOM, SHIFT, LIGHT, NOISE = 15.0, 0.1, 0.125, 0.2, 0.1

    def draw(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the parameters of `count` pictures: [count, 5] in -1 to 1 and noise [count, 1, size, size].

        The five are rotation, zoom, two shifts and brightness.
        """
        return (
            2 * torch.rand(count, 5, generator=generator) - 1,
            self.NOISE * torch.randn(count, 1, size, size, generator=generator),
        )

    def apply(self, images: Tensor, drawn: tuple[Tensor, Tensor]) -> Tensor:
        amount, noise = (part.to(images.device) for part in drawn)
        angle = math.radians(self.DEGREES) * amount[:, 0]
        zoom = 1 / (1 + self.ZOOM * amount[:, 1])
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        shift = 2 * self.SHIFT * amount[:, 2:4]
        theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        moved = F.grid_sample(zero_to_one(images), grid, align_corners=False)
        return normalise((moved * (1 + self.LIGHT * amount[:, 4])[:, None, None, None] + noise).clamp_(0, 1))
