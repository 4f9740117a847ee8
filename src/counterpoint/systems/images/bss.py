"""BSS: give all images of a view the style of one of them, so that style separates no negatives.

Scalbert, Vakalopoulou, Couzinie-Devy: "Towards domain-invariant Self-Supervised Learning with Batch Styles Standardization",
ICLR 2024, arXiv 2303.06088.

    A, Phi           amplitude and phase of an image's Fourier transform, channel by channel
    k, r             the donor of the style, and the share of the area of A that is replaced, the lowest frequencies
    b                half window: the frequencies |fx| <= b and |fy| <= b are replaced, a window of 2b + 1 by 2b + 1
    i, v             content and view. A batch is a grid: rows are contents, columns are views, each of one style

    style transfer   A(x_i) becomes A(x_k) inside the window; Phi stays                      `transfer_style`
    BSS              one k and one r for the batch, drawn anew for each view
    FA (baseline)    a k_i and an r_i for each image
    loss, SimCLR     positives are other columns of the row, negatives other rows of the column      `column_infonce`
    loss, SwAV       codes of each column alone: what `swav` computes for each crop
    loss, MSN        entropy of each column's mean prediction: `msn(by_view=True)`

This is an addition. `bss` alone is SimCLR with it; `swav+bss` and `msn+bss` are the paper's other two hosts. The host's file
stays what it is: BSS changes its views, and arranges its terms over the batch by column. BSS does not go over MoCo, whose queue
holds other styles, nor over DINO, whose centre is over all views. It does not go over BYOL, SimSiam, VICReg and Barlow Twins.
They pass each view through the network alone, where batch normalisation removes a shared style.

Order of a view: crop and flip each image, transfer the style, then change colours. Changes of colour, blur and solarisation are
style, too; by default all images of a view share them. The result of a transfer may leave 0..1 and is not clipped.

The authors' code could not be obtained. The square window and its rounding are those of FDA (arXiv 2004.05498). The default
range of r is our choice. The three losses follow the paper's description of rows and columns.

Speed (results/bench/bss.json): a batch's transfer is 6 to 12 times as fast as one image at a time. With a window of 81 in 224
pixels it is 4.8 times as fast: most of the transform is needed then. The loss is 1.2 times as fast with 64 contents, and 4.9
times with 4,096.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_within, shapes, whole_numbers
from counterpoint.core.compared import Compared, by_view, views
from counterpoint.core.distributed import batch_logsumexp_apart, batch_order, gather_rows, global_mean, world
from counterpoint.core.operands import scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.spectra import low_columns, with_columns_added
from counterpoint.core.world import over_group
from counterpoint.engine.learner import Learner
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.parts import Losses, Part, Step
from counterpoint.systems.settings import PartConfig, claim_settings
from counterpoint.tasks.view_figures import columns_figure, some_images
from counterpoint.views.images import ViewParameters, ViewPipeline, denormalise, zero_to_one

Images = Float[Tensor, "n channels height width"]
SHOWN = 6  # contents in the figure

# --- the style transfer -----------------------------------------------------------------------------------------------


def half_window(ratio: float, height: int, width: int) -> int:
    """Compute b for a share of the area: round((sqrt(ratio height width) - 1) / 2), at least 0; -1 for the share 0.

    Args:
        ratio: share of the amplitude's area, 0 to 1.
        height, width: of the images in pixels, at least 1.

    Raises ValueError for numbers out of range.

    >>> [half_window(ratio, 16, 16) for ratio in (0, 0.01, 0.03, 1)]
    [-1, 0, 1, 8]
    """
    need_within(0, 1, ratio=ratio)
    need_positive(height=height, width=width)
    return max(0, round((math.sqrt(ratio * height * width) - 1) / 2)) if ratio else -1


@full_precision
def low_amplitudes(images: Images, reach: int) -> Float[Tensor, "n channels height columns"]:
    """Compute the amplitudes of the frequencies fx = 0..reach and all fy: the styles that images can donate.

    Args:
        images: floating point, before the normalisation by mean and deviation.
        reach: the largest half window of the transfer, at least 0.

    Raises ValueError for another shape.

    >>> low_amplitudes(torch.ones(1, 1, 2, 2), 0).flatten()
    tensor([4., 0.])
    """
    _check_images(images)
    return low_columns(images, max(0, reach)).abs()


@full_precision
def transfer_style(
    images: Images,
    donors: int | Int[Tensor, " n"],
    half_window: int | Int[Tensor, " n"],
    *,
    amplitudes: Float[Tensor, "bank channels height columns"] | None = None,
) -> Images:
    """Replace the amplitudes of each image's lowest frequencies by its donor's, and keep the phases.

    The frequencies are |fx| <= b and |fy| <= b. This window is symmetric, so the result is real. It is not clipped.

    Args:
        images: floating point, before the normalisation by mean and deviation; half precision becomes float32.
        donors: number of the image that gives its style to all (BSS), or one number for each image (FA).
        half_window: b, one number for all images or for each. 0 replaces the channels' means alone, -1 nothing. From half
            the longer side on, it is the whole plane.
        amplitudes: `low_amplitudes` of other images to choose donors from; None (default): of these images.

    An image that is its own donor does not change. A black donor leaves images whose mean is 0. A frequency of amplitude 0
    has phase 0. Raises ValueError for shapes or numbers that do not fit. Source: FDA (arXiv 2004.05498), per batch.

    >>> dark, light = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    >>> transfer_style(torch.stack([dark, light]), 1, 0)[0]
    tensor([[[1., 1.],
             [1., 1.]]])
    """
    _check_images(images)
    n, (height, width), device = len(images), images.shape[2:], images.device
    chosen, b = whole_numbers(donors, n, "donors"), whole_numbers(half_window, n, "half_window")
    bank = n if amplitudes is None else len(amplitudes)
    least, most = (int(x) for x in chosen.aminmax())
    if least < 0 or most >= bank:
        raise ValueError(f"donors must be numbers of {bank} images, 0 to {bank - 1}; got {least} to {most}")
    reach = min(int(b.max()), width // 2)
    if int(b.min()) < -1:
        raise ValueError(f"half_window must be at least -1, got {int(b.min())}")
    if reach < 0:
        return images
    spectrum = low_columns(images, reach)
    own = spectrum.abs()
    given = own if amplitudes is None else amplitudes[..., : reach + 1]
    if given.shape[1:] != own.shape[1:]:
        raise ValueError(f"amplitudes are too few or of other images: {shapes(amplitudes=given, needed=own)}")
    chosen, b = chosen.to(device), b.to(device)  # after the checks: on a GPU nothing has to wait
    fy = torch.fft.fftfreq(height, 1 / height, device=device).abs().round()
    fx = torch.arange(reach + 1, device=device)
    inside = torch.maximum(fy[:, None], fx) <= b[:, None, None, None]
    phase = spectrum.sgn().where(own != 0, 1)
    # What changes has few columns, so only these are transformed back.
    changed = (given[chosen] - own).where(inside, 0) * phase
    return with_columns_added(images, changed)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point [n, channels, height, width] and not empty, got {images.dtype} "
            f"{list(images.shape)}"
        )


# --- the loss by column -----------------------------------------------------------------------------------------------


@over_group
@full_precision
def column_infonce(
    z: Float[Tensor, "n views dim"], temperature: float | Tensor = 0.5, normalize: bool = True
) -> Float[Tensor, ""]:
    r"""Contrast rows of the grid within their column: the mean over i and v != u of

        -log( exp s(z_i^v, z_i^u) / ( exp s(z_i^v, z_i^u) + sum_{j != i} exp s(z_i^v, z_j^v) ) )

    Args:
        z: the grid of projections: n contents (rows) in at least two views (columns).
        temperature: > 0, by default 0.5; s is the dot product divided by it.
        normalize: normalise the projections (default); False: use them unchanged.

    Across processes the columns are those of the whole batch. One content alone has no negatives, and its loss is 0. Raises
    ValueError for another shape, an empty batch, one view, and a temperature that is not positive and finite.

    >>> column_infonce(torch.eye(4)[:, None].expand(4, 2, 4))
    tensor(0.3408)
    """
    if z.ndim != 3 or not len(z) or z.shape[1] < 2:
        raise ValueError(
            f"z must be [n, views, dim] with at least one row and two views, whose pairs are positives; got {list(z.shape)}"
        )
    need_positive(temperature=temperature)
    columns = z.transpose(0, 1).contiguous()
    if normalize and not isinstance(temperature, Tensor):
        columns = unit(columns, temperature**-0.5)
    else:
        columns = scaled(unit(columns) if normalize else columns, temperature**0.5)
    negative = batch_logsumexp_apart(columns)
    # Every view v meets every other view u = v + step.
    terms = [
        F.softplus(negative - (columns * columns.roll(-step, 0)).sum(2)).mean(0) for step in range(1, len(columns))
    ]
    return global_mean(terms[0] if len(terms) == 1 else torch.stack(terms).mean(0))


# --- the views --------------------------------------------------------------------------------------------------------


@dataclass
class StyledParameters:
    """The random parameters of one view: those of the pipeline, and each image's donor and half window."""

    view: ViewParameters
    donors: Int[Tensor, " batch"]  # numbers of images of the whole batch
    half_window: Int[Tensor, " batch"]

    def take(self, rows: slice | Tensor) -> StyledParameters:
        """Select the parameters of some images; their donors are still numbers of the whole batch."""
        return StyledParameters(self.view.take(rows), self.donors[rows], self.half_window[rows])


class StyledViews:
    """A pipeline of views with a style transfer between the crops and the changes of colour.

    Args:
        pipeline: the views of the host.
        config: settings of BSS.
    """

    def __init__(self, pipeline: ViewPipeline, config: BSSConfig) -> None:
        self.pipeline, self.config = pipeline, config

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> list[StyledParameters]:
        """Draw the parameters of every view for images [B, 3, H, W] of the whole batch."""
        return [self._styled(view, shape[0], generator) for view in self.pipeline.draw(shape, generator)]

    def _styled(self, view: ViewParameters, batch: int, generator: torch.Generator) -> StyledParameters:
        config, low = self.config, self.config.r_min
        many = batch if config.transfer == "image" else 1
        donors = torch.randint(batch, (many,), generator=generator)
        ratio = low + (config.r_max - low) * torch.rand(many, generator=generator)
        window = torch.tensor([half_window(float(r), view.size, view.size) for r in ratio])
        if config.transfer == "none":
            window = window.fill_(-1)
        if config.shared_colours:
            one = {n: getattr(view, n)[:1].expand_as(getattr(view, n)) for n in ("jitter", "grey", "sigma", "solarise")}
            gain = None if view.gain is None else view.gain[:1].expand_as(view.gain)
            view = replace(view, **one, gain=gain)
        return StyledParameters(view, donors.expand(batch), window.expand(batch))

    def apply(self, images: Tensor, parameters: Sequence[StyledParameters], *, alone: bool = False) -> list[Tensor]:
        """Make the views, one normalised float tensor [B, 3, size, size] each.

        Args:
            images: this process's images.
            parameters: those of these images.
            alone: whether they are the whole batch; by default the other processes have the rest of it.
        """
        source = zero_to_one(images)
        found = []
        for drawn in parameters:
            x = self.pipeline.moved(source, drawn.view)
            bank = None
            if world()[1] > 1 and not alone:  # a donor may be an image of another process
                reach = max(0, half_window(self.config.r_max, drawn.view.size, drawn.view.size))
                gathered = gather_rows(low_amplitudes(x, reach))
                bank = torch.empty_like(gathered).index_copy_(0, batch_order(len(gathered)).to(x.device), gathered)
            x = transfer_style(x, drawn.donors, drawn.half_window, amplitudes=bank)
            found.append(self.pipeline.coloured(x, drawn.view))
        return found


# --- the addition -----------------------------------------------------------------------------------------------------


@dataclass
class BSSConfig(PartConfig):
    """Settings of BSS."""

    transfer: Literal["batch", "image", "none"] = "batch"
    """Donor of the style: batch, one for all images of a view (BSS); image, one for each image (FA); none, no transfer."""
    by_column: bool = True
    """Take negatives and mean entropies within a view; False: keep the host's own loss, the control of a claim."""
    shared_colours: bool = True
    """Draw changes of colour, blur and solarisation once for all images of a view; False: for each image."""
    r_min: float = 0.02
    """Smallest share of the amplitudes' area that is replaced, 0 to r_max; 0 replaces none."""
    r_max: float = 0.25
    """Largest share of the area, r_min to 1. Choose smaller shares for small images, whose strokes have low frequencies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.r_min <= self.r_max <= 1:
            raise CounterpointError(
                f"bss.r_min and bss.r_max must satisfy 0 <= r_min <= r_max <= 1, got {self.r_min} and {self.r_max}"
            )


class Standardised(Part):
    """The host's views in one style each, and its loss by column."""

    config: BSSConfig

    def __init__(self, config: BSSConfig, learner: Learner, data: Any, ways: Callable[..., Any] | None) -> None:
        super().__init__(config, learner, data, ways)
        pipeline: Any = getattr(learner, "views", None)
        if not isinstance(pipeline, ViewPipeline):
            raise CounterpointError(
                "bss changes a ViewPipeline of whole images or crops; this system makes other views"
            )
        if len(pipeline.recipes) < 2:
            raise CounterpointError("bss needs at least two views of an image: the columns of its grid")
        if any(recipe.channels < 3 for recipe in pipeline.recipes):
            raise CounterpointError("bss needs a recipe of views that changes all three channels; set --recipe")
        self.styled = StyledViews(pipeline, config)
        changed: Any = learner
        changed.views = self.styled
        if hasattr(learner, "by_view"):
            changed.by_view = config.by_column

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        if not self.config.by_column:
            return below(compared)
        z = torch.stack([compared.query, compared.key], 1)
        return {"loss": column_infonce(z, compared.temperature)}

    def figures(self, survey: Survey) -> dict[str, Any]:
        images = some_images(survey, SHOWN)
        drawn = self.styled.draw(images.shape, torch.Generator().manual_seed(0))
        drawn = [one for one in drawn if one.view.size == drawn[0].view.size]
        source = zero_to_one(images)
        columns = {"picture": source}
        columns |= {f"view {n}, cropped": self.styled.pipeline.moved(source, v.view) for n, v in enumerate(drawn, 1)}
        views = enumerate(self.styled.apply(images, drawn, alone=True), 1)
        columns |= {f"view {n}, as the network sees it": denormalise(view) for n, view in views}
        said = {"batch": "one image's, for the whole view", "image": "another for each image", "none": "unchanged"}
        caption = f"Rows: contents. Columns: views. The style of a view is {said[self.config.transfer]}."
        return {"Contents and styles": columns_figure(columns, caption)}


SYSTEM = Addition(
    slug="bss",
    over="simclr",
    config=BSSConfig,
    part=Standardised,
    fits=(views, by_view),
    loss="own",
    defaults={"temperature": 0.5},
    # Without the temperature, which is the host's.
    recipes={"digit-styles": {k: v for k, v in claim_settings("bss").items() if k != "temperature"}},
    # Windows of 3 to 7 frequencies in pictures of 32 pixels.
    recipe={"bss.r_min": 0.01, "bss.r_max": 0.05},
)
