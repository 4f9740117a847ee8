"""Make varied snippets of sheet music: move and bend them, and add stains, noise and blur."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.precision import wide
from counterpoint.errors import CounterpointError
from counterpoint.views.images import gaussian_blur
from counterpoint.views.music.drawn import Parameters, check, some, sometimes, uniform

SHEET = (80, 100)  # pixels of a snippet, height and width
WINDOW = 120  # pixels of the side of the square that contains it
CELL = 20  # pixels between the gradients of the Perlin noise


@dataclass(frozen=True)
class SheetRecipe:
    """The variations of a snippet of a score: probabilities per image, lengths in pixels of the snippet."""

    rescale: float = 0.45
    scale: tuple[float, float] = (0.90, 1.10)
    shift: float = 0.65  # probability of a horizontal distance between two views
    apart: float = 20.0  # greatest distance; a fifth of the snippet's width
    vertical: float = 0.65
    up_down: float = 10.0  # at most, chosen: half of the margin, which keeps the outer staff lines in the picture
    rotate: float = 0.35
    degrees: float = 4.0
    perlin: float = 0.2
    stain: float = 0.4  # greatest darkening by Perlin noise, chosen
    small: float = 0.2
    large: float = 0.2
    # Elastic deformation, chosen: (greatest move of a point in pixels, pixels between points that move independently).
    small_field: tuple[float, int] = (1.0, 8)
    large_field: tuple[float, int] = (3.0, 25)
    noise: float = 0.25
    noise_mean: float = 0.5  # at most
    noise_deviation: float = 0.4  # at most, at twice the size
    blur: float = 0.25
    sigma: float = 0.6  # at most

    def __post_init__(self) -> None:
        shares = ("rescale", "shift", "vertical", "rotate", "perlin", "stain", "small", "large", "noise", "blur")
        check(self, shares, ("scale",))
        for name in ("apart", "up_down", "degrees", "noise_mean", "noise_deviation", "sigma"):
            if getattr(self, name) < 0:
                raise CounterpointError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.scale[0] > 0:
            raise CounterpointError(f"scale must be positive, got {self.scale}")
        if any(move < 0 or step < 1 for move, step in (self.small_field, self.large_field)):
            raise CounterpointError("an elastic field must be (pixels >= 0, step >= 1 pixel)")


# Variations of an aligned pair: a scale of 0.95 to 1.05, and 5 pixels up or down before the halving to 80 x 100.
SHEET_PAIRED = SheetRecipe(
    rescale=1.0,
    scale=(0.95, 1.05),
    shift=0.0,
    vertical=1.0,
    up_down=2.5,
    rotate=0.0,
    perlin=0.0,
    small=0.0,
    large=0.0,
    noise=0.0,
    blur=0.0,
)


@dataclass
class SheetParameters(Parameters):
    """The random parameters of one view of each of B snippets."""

    scale: Float[Tensor, " batch"]
    across: Float[Tensor, " batch"]  # pixels that the window moves to the right
    down: Float[Tensor, " batch"]
    angle: Float[Tensor, " batch"]  # radians
    stain: Float[Tensor, " batch"]
    gradients: Float[Tensor, "batch 2 rows columns"]  # of the Perlin noise, unit vectors
    small: Float[Tensor, "batch 2 rows columns"]  # pixels
    large: Float[Tensor, "batch 2 rows columns"]
    mean: Float[Tensor, " batch"]
    deviation: Float[Tensor, " batch"]
    grain: Int[Tensor, " batch"]  # number of the snippet's noise in `grains`; -1: none
    sigma: Float[Tensor, " batch"]
    grains: Float[Tensor, "noisy height width"]
    shared = ("grains",)


class SheetViews:
    """A pipeline that makes varied snippets from windows of a score.

    Args:
        recipe: the variations; None: those of the paper's pre-training.

    Order: rescale, horizontal and vertical shift, rotation (together one bilinear resampling), Perlin noise, elastic
    deformation, Gaussian noise, blur. Pixels are 0 for ink to 1 for paper and stay in that range.
    """

    def __init__(self, recipe: SheetRecipe | None = None) -> None:
        self.recipe = recipe or SheetRecipe()

    def pair(self, batch: int, generator: torch.Generator) -> tuple[SheetParameters, SheetParameters]:
        """Draw the parameters of two views of each of `batch` windows, with the recipe's horizontal distance between them.

        The generator is one of the CPU. Raises CounterpointError for an empty batch.
        """
        recipe = self.recipe
        apart = sometimes(uniform(0, recipe.apart, batch, generator), recipe.shift, generator) / 2
        one, two = self.draw(batch, generator), self.draw(batch, generator)
        return replace(one, across=-apart), replace(two, across=apart)

    def draw(self, batch: int, generator: torch.Generator) -> SheetParameters:
        """Draw the parameters of one view of each of `batch` windows, without a horizontal shift.

        The generator is one of the CPU. Raises CounterpointError for an empty batch.
        """
        r = self.recipe
        if batch < 1:
            raise CounterpointError("views need at least one snippet, got an empty batch")
        fields = []
        for share, (most, step) in ((r.small, r.small_field), (r.large, r.large_field)):
            grid = [-(-extent // step) + 3 for extent in SHEET]
            fields.append(sometimes(uniform(-most, most, (batch, 2, *grid), generator), share, generator))
        turn = uniform(0, 2 * math.pi, (batch, *(extent // CELL + 2 for extent in SHEET)), generator)
        noisy = torch.rand(batch, generator=generator) < r.noise
        return SheetParameters(
            scale=sometimes(uniform(*r.scale, batch, generator), r.rescale, generator, 1.0),
            across=torch.zeros(batch),
            down=sometimes(uniform(-r.up_down, r.up_down, batch, generator), r.vertical, generator),
            angle=sometimes(uniform(-r.degrees, r.degrees, batch, generator), r.rotate, generator) * math.pi / 180,
            stain=sometimes(uniform(0, r.stain, batch, generator), r.perlin, generator),
            gradients=torch.stack([turn.cos(), turn.sin()], 1),
            small=fields[0],
            large=fields[1],
            mean=uniform(0, r.noise_mean, batch, generator) * noisy,
            deviation=uniform(0, r.noise_deviation, batch, generator) * noisy,
            grain=torch.where(noisy, noisy.cumsum(0) - 1, -1),
            sigma=sometimes(uniform(0.1 * r.sigma, r.sigma, batch, generator), r.blur, generator),
            grains=torch.randn(int(noisy.sum()), *SHEET, generator=generator),
        )

    def apply(
        self, windows: Float[Tensor, "batch 1 height width"], view: SheetParameters
    ) -> Float[Tensor, "batch 1 80 100"]:
        """Make the views with these parameters, in float32 at least.

        Args:
            windows: [B, 1, 120, 120], floating point, 0 for ink to 1 for paper.
            view: parameters of B windows.

        Raises CounterpointError for other windows and for parameters of another number of windows.
        """
        if windows.shape[1:] != (1, WINDOW, WINDOW) or not windows.is_floating_point():
            raise CounterpointError(
                f"views need windows [batch, 1, {WINDOW}, {WINDOW}] of floating point, got {list(windows.shape)} "
                f"{windows.dtype}"
            )
        if len(view.scale) != len(windows):
            raise CounterpointError(f"parameters of {len(view.scale)} windows were drawn, got {len(windows)} windows")
        view = view.moved(windows.device)
        x = _placed(wide(windows), view)
        for rows in some(view.stain > 0):
            x[rows] = x[rows] * (1 - view.stain[rows, None, None, None] * perlin(view.gradients[rows])[:, None])
        for rows in some((view.small.flatten(1) != 0).any(1) | (view.large.flatten(1) != 0).any(1)):
            x[rows] = _bent(x[rows], view.small[rows], view.large[rows], self.recipe)
        for rows in some(view.grain >= 0):
            # Halving the picture averages 2 x 2 independent numbers, which halves the deviation.
            grain = view.grains[view.grain[rows]] * (view.deviation[rows] / 2)[:, None, None]
            x[rows] = (x[rows] + (grain + view.mean[rows, None, None])[:, None]).clamp(0, 1)
        for rows in some(view.sigma > 0):
            # The paper's kernels have 7 to 15 taps. The smallest spans five deviations of the widest blur.
            x[rows] = gaussian_blur(x[rows], view.sigma[rows], 7)
        return x


def snippet(windows: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 80 100"]:
    """Cut out the centre of each window, unchanged."""
    top, left = ((extent - own) // 2 for extent, own in zip(windows.shape[2:], SHEET, strict=True))
    return windows[:, :, top : top + SHEET[0], left : left + SHEET[1]]


def perlin(
    gradients: Float[Tensor, "batch 2 rows columns"], cell: int = CELL, size: tuple[int, int] = SHEET
) -> Float[Tensor, "batch height width"]:
    """Compute Perlin's gradient noise, rescaled to 0..1.

    Each pixel blends its dot products with the gradients at the four corners of its cell by 6t^5 - 15t^4 + 10t^3.

    Args:
        gradients: unit vectors at the corners of cells, (across, down), at least ceil(extent / cell) + 1 along each axis.
        cell: side of a cell in pixels.
        size: height and width of the picture in pixels.

    Raises ValueError for too few gradients. Source: Perlin, "Improving Noise", SIGGRAPH 2002.
    """
    if any(have < -(-extent // cell) + 1 for have, extent in zip(gradients.shape[2:], size, strict=True)):
        raise ValueError(f"gradients {list(gradients.shape)} are too few for {size} pixels in cells of {cell}")
    down, across = ((torch.arange(extent, device=gradients.device) + 0.5) / cell for extent in size)
    y, x = down.floor().long(), across.floor().long()
    v, u = (down - y)[:, None], (across - x)[None, :]
    corners = []
    for dy in (0, 1):
        for dx in (0, 1):
            g = gradients[:, :, y + dy][:, :, :, x + dx]
            corners.append(g[:, 0] * (u - dx) + g[:, 1] * (v - dy))
    fade_u, fade_v = (t**3 * (t * (6 * t - 15) + 10) for t in (u, v))
    top = corners[0].lerp(corners[1], fade_u)
    found = top.lerp(corners[2].lerp(corners[3], fade_u), fade_v)
    return (found / math.sqrt(2) + 0.5).clamp(0, 1)  # `found` lies within +-1/sqrt(2)


def _placed(windows: Tensor, view: SheetParameters) -> Tensor:
    """Cut out the snippet, scaled, shifted and turned about its centre."""
    height, width = SHEET
    y = torch.arange(height, device=windows.device, dtype=windows.dtype) - (height - 1) / 2
    x = torch.arange(width, device=windows.device, dtype=windows.dtype) - (width - 1) / 2
    cos, sin = (part(view.angle) / view.scale for part in (torch.cos, torch.sin))
    column, row = x[None, None, :], y[None, :, None]
    at_x = cos[:, None, None] * column - sin[:, None, None] * row + view.across[:, None, None]
    at_y = sin[:, None, None] * column + cos[:, None, None] * row + view.down[:, None, None]
    # In the coordinates of grid_sample, -1 and 1 are the outer edges of the window.
    grid = torch.stack([at_x * (2 / windows.shape[3]), at_y * (2 / windows.shape[2])], 3)
    # Sample the ink, 1 - x, so that zeros beyond the edge are paper.
    return 1 - F.grid_sample(1 - windows, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@lru_cache
def _cubic(step: int, extent: int) -> Float[Tensor, "extent points"]:
    """Compute bicubic weights of points `step` pixels apart for each pixel; the first point lies before the first pixel."""
    points = -(-extent // step) + 3
    spread = F.interpolate(torch.eye(points)[None, :, :, None], scale_factor=(step, 1), mode="bicubic")
    return spread[0, :, step : step + extent, 0].T.contiguous()


def _bent(x: Tensor, small: Tensor, large: Tensor, recipe: SheetRecipe) -> Tensor:
    """Move every pixel of the pictures a little (elastic deformation)."""
    height, width = SHEET
    moves = x.new_zeros(len(x), 2, height, width)
    for field, (_, step) in ((small, recipe.small_field), (large, recipe.large_field)):
        # On a CPU, products of matrices are ten times as fast as torch's own interpolation.
        down, across = (_cubic(step, extent).to(x) for extent in SHEET)
        moves += down @ field.to(x) @ across.T
    base = F.affine_grid(torch.eye(2, 3, device=x.device, dtype=x.dtype)[None], [1, 1, height, width], False)
    grid = base + moves.permute(0, 2, 3, 1) * x.new_tensor([2 / width, 2 / height])
    return 1 - F.grid_sample(1 - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
