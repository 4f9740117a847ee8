"""Augment batches of snippets of sheet music and of sound, and compute the sound's log-frequency spectrogram.

    sheets, audio = SheetViews(), AudioViews(frames=42)
    one, two = sheets.pair(len(images), torch.Generator().manual_seed(0))      # parameters of each image in each view
    first, second = sheets.apply(images, one), sheets.apply(images, two)      # [B, 1, 120, 120] -> [B, 1, 80, 100]

`pair` and `draw` draw the random parameters of a whole batch from a generator, and `apply` applies them. Processes can
therefore share a batch (`take`). Probabilities and ranges come from this paper and its published code: Carvalho, Washüttl, Widmer,
"Self-Supervised Contrastive Learning for Robust Audio-Sheet Music Retrieval Systems", MMSys 2023, arXiv 2309.12134. Values
that neither states are marked "chosen".

Items are windows with margins around a snippet: 20 pixels above and below, 10 left and right, and sound on both sides.
Beyond an item's ends are white paper and silence. The paper moves the second of two views. Here each view moves half as far,
in opposite directions. The distance between them is the same, and half the margin is enough.

Differences from the published code, with the same result:
    time stretch    frames of the stretched sound are computed at steps of rate x hop. A phase vocoder interpolates
                    magnitudes between frames one hop apart, then finds their phases; only magnitudes are needed here
    equaliser       the gain of its seven filters at each frequency multiplies the magnitudes of each frame. Filtering the
                    waveform does the same, except at the ends of frames
    noise           a batch shares one tape of noise, which each sound plays from a different place
    image noise     the published code draws it at twice the size and halves it, which equals noise of half the deviation
A room's impulse response, off in the paper, is not built, because it needs recordings of rooms.

kornia 0.9 has some of this. Milliseconds for 48, 96, 128 and 256 snippets on one core, the least of 25 rounds (elastic: 7):
    rescale, shift, turn    7.4, 5.6, 7.8, 29 here. warp_affine: 11, 11, 16, 73 with white beyond the edge; 7.7, 8.2, 12,
                            44 where, as here, the ink is sampled, so that zeros are white. The pictures are the same
    elastic deformation     3.5, 6.9, 9.8, 27 here. elastic_transform2d, one call for the small and one for the large:
                            100, 360, 490, 980. It smooths noise at every pixel; here a curve goes through few points
    blur                    for 12, 24, 32 and 64 of them, a quarter as the recipe draws: 1.1, 1.8, 2.9, 6.0 here and
                            1.1, 2.7, 2.8, 5.1 by gaussian_blur2d, twice as fast for whole batches. The result is the same
In large batches kornia would save a millisecond of blur, out of a view's 12 to 53. This package does not install it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.precision import wide
from counterpoint.errors import CounterpointError
from counterpoint.views.images import gaussian_blur

SHEET = (80, 100)  # pixels of a snippet, height and width
WINDOW = 120  # pixels of the side of the square that contains it
RATE, FFT, HOP = 22050, 2048, 1103  # samples a second; 20 frames a second
BANDS, LOWEST, HIGHEST, PER_OCTAVE = 92, 30.0, 6000.0, 16
GROUP = 32  # sounds per pass, so that their frames stay in a core's cache
TAPE = 2**18  # samples of noise that a batch shares


# --- what is common to both -------------------------------------------------------------------------------------------


class _Parameters:
    """The random parameters of a batch: tensors with one row per item, except those named in `shared`."""

    shared: tuple[str, ...] = ()

    def take(self, rows: slice | Tensor) -> Self:
        """Select the parameters of some items, such as one process's share of a batch that is drawn as a whole."""
        chosen = {name: value[rows] for name, value in self._tensors() if name not in self.shared}
        return replace(self, **chosen)  # type: ignore[type-var]

    def moved(self, device: torch.device) -> Self:
        """Move the parameters to a device, that of the items."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})  # type: ignore[type-var]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]


def _uniform(low: float, high: float, size: int | Sequence[int], generator: torch.Generator) -> Tensor:
    shape = (size,) if isinstance(size, int) else tuple(size)
    return low + (high - low) * torch.rand(shape, generator=generator)


def _sometimes(value: Tensor, share: float, generator: torch.Generator, otherwise: float = 0.0) -> Tensor:
    """Select each item's value with the probability `share`, else the value `otherwise`."""
    chosen = torch.rand(len(value), generator=generator) < share
    return torch.where(chosen.view(-1, *[1] * (value.ndim - 1)), value, value.new_tensor(otherwise))


def _check(what: Any, shares: Sequence[str], ranges: Sequence[str]) -> None:
    for name in shares:
        if not 0 <= getattr(what, name) <= 1:
            raise CounterpointError(f"{name} must be a probability or share, 0 to 1, got {getattr(what, name)}")
    for name in ranges:
        low, high = getattr(what, name)
        if not low <= high:
            raise CounterpointError(f"{name} must be a range (low, high), got {(low, high)}")


# --- sheet music ------------------------------------------------------------------------------------------------------


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
        _check(self, shares, ("scale",))
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
class SheetParameters(_Parameters):
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
        apart = _sometimes(_uniform(0, recipe.apart, batch, generator), recipe.shift, generator) / 2
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
            fields.append(_sometimes(_uniform(-most, most, (batch, 2, *grid), generator), share, generator))
        turn = _uniform(0, 2 * math.pi, (batch, *(extent // CELL + 2 for extent in SHEET)), generator)
        noisy = torch.rand(batch, generator=generator) < r.noise
        return SheetParameters(
            scale=_sometimes(_uniform(*r.scale, batch, generator), r.rescale, generator, 1.0),
            across=torch.zeros(batch),
            down=_sometimes(_uniform(-r.up_down, r.up_down, batch, generator), r.vertical, generator),
            angle=_sometimes(_uniform(-r.degrees, r.degrees, batch, generator), r.rotate, generator) * math.pi / 180,
            stain=_sometimes(_uniform(0, r.stain, batch, generator), r.perlin, generator),
            gradients=torch.stack([turn.cos(), turn.sin()], 1),
            small=fields[0],
            large=fields[1],
            mean=_uniform(0, r.noise_mean, batch, generator) * noisy,
            deviation=_uniform(0, r.noise_deviation, batch, generator) * noisy,
            grain=torch.where(noisy, noisy.cumsum(0) - 1, -1),
            sigma=_sometimes(_uniform(0.1 * r.sigma, r.sigma, batch, generator), r.blur, generator),
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
        for rows in _some(view.stain > 0):
            x[rows] = x[rows] * (1 - view.stain[rows, None, None, None] * perlin(view.gradients[rows])[:, None])
        for rows in _some((view.small.flatten(1) != 0).any(1) | (view.large.flatten(1) != 0).any(1)):
            x[rows] = _bent(x[rows], view.small[rows], view.large[rows], self.recipe)
        for rows in _some(view.grain >= 0):
            # Halving the picture averages 2 x 2 independent numbers, which halves the deviation.
            grain = view.grains[view.grain[rows]] * (view.deviation[rows] / 2)[:, None, None]
            x[rows] = (x[rows] + (grain + view.mean[rows, None, None])[:, None]).clamp(0, 1)
        for rows in _some(view.sigma > 0):
            # The paper's kernels have 7 to 15 taps. The smallest spans five deviations of the widest blur.
            x[rows] = gaussian_blur(x[rows], view.sigma[rows], 7)
        return x


def snippet(windows: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 80 100"]:
    """Cut out the centre of each window, unchanged."""
    top, left = ((extent - own) // 2 for extent, own in zip(windows.shape[2:], SHEET, strict=True))
    return windows[:, :, top : top + SHEET[0], left : left + SHEET[1]]


def _some(mask: Tensor) -> list[Tensor]:
    """Return a list with the positions of True, empty if there is none."""
    rows = mask.nonzero().flatten()
    return [rows] if len(rows) else []


CELL = 20  # pixels between the gradients of the Perlin noise


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


# --- sound ------------------------------------------------------------------------------------------------------------


@lru_cache
def log_filterbank(
    rate: int = RATE,
    fft: int = FFT,
    per_octave: int = PER_OCTAVE,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
) -> Float[Tensor, "bins bands"]:
    """Compute overlapping triangular filters on the bins of a Fourier transform, centred on notes.

    A band reaches from its lower neighbour's centre to its upper neighbour's centre; all of them are whole bins. Where
    several notes fall into one bin, as the lowest do, they form one band. Each band's weights sum to 1. The defaults give
    92 bands.

    Args:
        rate: samples per second.
        fft: samples of a Fourier transform; the filters cover bins 0 to fft/2 - 1.
        per_octave: notes in an octave, counted from 440 Hz.
        lowest, highest: range of the notes in hertz.

    Raises ValueError if no band lies between the frequencies. Source: the filter bank of madmom (Böck et al. 2016), which
    the paper's front end uses.

    >>> log_filterbank().shape
    torch.Size([1024, 92])
    """
    low, high = (math.log2(hertz / 440) * per_octave for hertz in (lowest, highest))
    notes = 440 * 2 ** (torch.arange(math.floor(low), math.ceil(high) + 1, dtype=torch.float64) / per_octave)
    notes = notes[(notes >= lowest) & (notes <= highest)]
    bins = (notes * (fft / rate)).round().long().clamp(max=fft // 2 - 1).unique()
    if len(bins) < 3:
        raise ValueError(f"no band lies between {lowest:g} and {highest:g} Hz with {fft} samples at {rate} Hz")
    start, centre, stop = (bins[n : len(bins) - 2 + n].double() for n in range(3))
    at = torch.arange(fft // 2, dtype=torch.float64)[:, None]
    bank = torch.minimum((at - start) / (centre - start), (stop - at) / (stop - centre)).clamp(min=0)
    return (bank / bank.sum(0)).float()


class LogSpectrogram(nn.Module):
    """Map waves at 22,050 Hz to log10(1 + magnitude in 92 bands): frames of 2,048 samples (Hann), 20 per second.

    Args:
        frames: T, the number of frames of a snippet, at least 1.

    Frame t of a snippet is centred (t - (T - 1) / 2) hops from the snippet's centre. Beyond the wave's ends is silence.
    """

    bank: Tensor
    window: Tensor

    def __init__(self, frames: int) -> None:
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        self.frames = frames
        bank = log_filterbank()
        assert bank.shape[1] == BANDS  # the number of bands that the encoders expect
        self.bins = int(bank.any(1).nonzero().max()) + 1  # bins above the highest band are not needed
        self.register_buffer("bank", bank[: self.bins].clone(), persistent=False)
        self.register_buffer("window", torch.hann_window(FFT), persistent=False)

    def forward(
        self,
        wave: Float[Tensor, "batch samples"],
        shift: Float[Tensor, " batch"] | None = None,
        rate: Float[Tensor, " batch"] | None = None,
        gain: Float[Tensor, "batch bins"] | None = None,
    ) -> Float[Tensor, "batch 1 92 frames"]:
        """Compute the spectrogram of the centre of each wave.

        Args:
            wave: in [-1, 1]; half precisions are computed and returned in float32.
            shift: samples from the centre to the later snippet; None: 0.
            rate: factor of speed, which keeps pitches; None: 1.
            gain: factor of the magnitudes for each bin below `self.bins`; None: 1.

        Raises ValueError for another shape or type of `wave`.
        """
        if wave.ndim != 2 or wave.shape[1] < 1 or not wave.is_floating_point():
            raise ValueError(f"wave must be [batch, samples] of floating point, got {list(wave.shape)} {wave.dtype}")
        wave = wide(wave)
        bank, window = self.bank.to(wave), self.window.to(wave)
        batch, samples = wave.shape
        still = wave.new_zeros(batch)
        shift, rate = (still if shift is None else shift), (still + 1 if rate is None else rate)
        hops = torch.arange(self.frames, device=wave.device, dtype=torch.float64) - (self.frames - 1) / 2
        at = samples / 2 + shift[:, None].double() + hops * rate[:, None].double() * HOP
        start = at.round().long() - FFT // 2
        # Pad with silence, as far as any frame reaches.
        before = max(0, -int(start.min())) if batch else 0
        after = max(0, int(start.max()) + FFT - samples) if batch else 0
        out = wave.new_empty(batch, self.frames, bank.shape[1])
        for first in range(0, batch, GROUP):
            part = slice(first, min(first + GROUP, batch))
            frames = F.pad(wave[part], (before, after)).unfold(1, FFT, 1)
            rows = torch.arange(part.stop - first, device=wave.device)[:, None]
            spectrum = torch.fft.rfft(frames[rows, start[part] + before] * window)[..., : self.bins].abs()
            if gain is not None:
                spectrum = spectrum * gain[part, None, :]
            out[part] = spectrum @ bank
        return out.add_(1).log10_().transpose(1, 2)[:, None]


@dataclass(frozen=True)
class AudioRecipe:
    """The variations of a snippet of sound: probabilities per sound. Comments mark defaults of the paper's library."""

    shift: float = 0.5  # probability of a distance in time between two views
    apart: float = 0.3  # greatest distance as a share of the snippet's length: the views share at least 70 %
    polarity: float = 0.5
    gain: float = 0.5
    decibels: tuple[float, float] = (-12.0, 12.0)  # the library's default
    noise: float = 0.4
    snr: tuple[float, float] = (5.0, 40.0)  # decibels, the library's default
    mask: float = 0.5
    masked: tuple[float, float] = (0.01, 0.2)  # of the snippet
    equalise: float = 0.3
    bands: tuple[float, float] = (-12.0, 12.0)  # decibels of each of seven filters, the library's default
    stretch: float = 0.4
    rates: tuple[float, float] = (0.5, 1.8)
    frequency_mask: float = 0.35  # probability for the batch as a whole
    frequencies: float = 0.2  # of the bands, at most
    jitter: float = 0.0  # of the onset, frames to either side

    def __post_init__(self) -> None:
        shares = ("shift", "apart", "polarity", "gain", "noise", "mask", "equalise", "stretch", "frequency_mask")
        _check(self, (*shares, "frequencies"), ("decibels", "snr", "masked", "bands", "rates"))
        if self.masked[0] < 0 or self.masked[1] > 1:
            raise CounterpointError(f"masked must be a range of shares of the snippet, 0 to 1, got {self.masked}")
        if not self.rates[0] > 0 or self.jitter < 0:
            raise CounterpointError(
                f"rates must be positive and jitter not negative, got {self.rates} and {self.jitter}"
            )


# Variations of an aligned pair: move the onset by up to a frame. Tempi of 0.9 to 1.1 come from the paper's renderings.
AUDIO_PAIRED = AudioRecipe(
    shift=0.0,
    polarity=0.0,
    gain=0.0,
    noise=0.0,
    mask=0.0,
    equalise=0.0,
    stretch=0.0,
    frequency_mask=0.0,
    jitter=1.0,
)


@dataclass
class AudioParameters(_Parameters):
    """The random parameters of one view of each of B sounds."""

    shift: Float[Tensor, " batch"]  # samples
    amplitude: Float[Tensor, " batch"]  # polarity and gain
    snr: Float[Tensor, " batch"]  # noise's amplitude over the sound's; 0: no noise
    place: Int[Tensor, " batch"]  # sample of the tape at which its noise begins
    mask: Float[Tensor, "batch 2"]  # start and length, as shares of the snippet
    response: Float[Tensor, "batch bins"]  # of the equaliser
    rate: Float[Tensor, " batch"]
    bands: Int[Tensor, "batch 2"]  # of the frequency mask: first band, number of bands
    tape: Float[Tensor, " samples"]
    shared = ("tape",)


class AudioViews:
    """A pipeline that makes spectrograms of varied sounds.

    Args:
        frames: T, the number of frames of a snippet. The snippet is the centre of its wave.
        recipe: the variations; None: those of the paper's pre-training.

    Order on the sound: time shift, polarity, gain, noise, time mask, equaliser. Then on the spectrogram: stretching, filter
    bank, logarithm, frequency mask.
    """

    def __init__(self, frames: int, recipe: AudioRecipe | None = None) -> None:
        self.spectrogram = LogSpectrogram(frames)
        self.recipe = recipe or AudioRecipe()
        self.length = frames * HOP

    def pair(self, batch: int, generator: torch.Generator) -> tuple[AudioParameters, AudioParameters]:
        """Draw the parameters of two views of each of `batch` sounds, with the recipe's distance in time between them.

        The generator is one of the CPU. Raises CounterpointError for an empty batch.
        """
        r = self.recipe
        apart = _sometimes(_uniform(0, r.apart, batch, generator), r.shift, generator) * (self.length / 2)
        one, two = self.draw(batch, generator), self.draw(batch, generator)
        return replace(one, shift=one.shift - apart), replace(two, shift=two.shift + apart)

    def draw(self, batch: int, generator: torch.Generator) -> AudioParameters:
        """Draw the parameters of one view of each of `batch` sounds with a generator of the CPU.

        Raises CounterpointError for an empty batch.
        """
        r = self.recipe
        if batch < 1:
            raise CounterpointError("views need at least one sound, got an empty batch")
        sign = 1 - 2 * (torch.rand(batch, generator=generator) < r.polarity).float()
        gain = 10 ** (_sometimes(_uniform(*r.decibels, batch, generator), r.gain, generator) / 20)
        ratio = 10 ** (-_uniform(*r.snr, batch, generator) / 20)
        length = _sometimes(_uniform(*r.masked, batch, generator), r.mask, generator)
        start = _uniform(0, 1, batch, generator) * (1 - length)
        widest = math.floor(r.frequencies * BANDS)
        width = torch.randint(widest + 1, (batch,), generator=generator)
        first = (_uniform(0, 1, batch, generator) * (BANDS + 1 - width)).long().clamp(max=BANDS)
        # One draw decides for the whole batch, as in the paper's code.
        width = width * int(torch.rand((), generator=generator) < r.frequency_mask)
        response = torch.ones(batch, self.spectrogram.bins)
        chosen = (torch.rand(batch, generator=generator) < r.equalise).nonzero().flatten()
        response[chosen] = _equaliser(_uniform(*r.bands, (len(chosen), 7), generator), generator, response.shape[1])
        return AudioParameters(
            shift=_uniform(-r.jitter, r.jitter, batch, generator) * HOP,
            amplitude=sign * gain,
            snr=_sometimes(ratio, r.noise, generator),
            place=torch.randint(TAPE, (batch,), generator=generator),
            mask=torch.stack([start, length], 1),
            response=response,
            rate=_sometimes(_uniform(*r.rates, batch, generator), r.stretch, generator, 1.0),
            bands=torch.stack([first, width], 1),
            tape=torch.randn(TAPE if r.noise else 0, generator=generator),
        )

    def apply(self, wave: Float[Tensor, "batch samples"], view: AudioParameters) -> Float[Tensor, "batch 1 92 frames"]:
        """Make the spectrograms of the views with these parameters.

        Args:
            wave: [B, samples], floating point, at 22,050 Hz.
            view: parameters of B sounds.

        Raises CounterpointError for another shape or type of `wave` and for parameters of another number of sounds.
        """
        if wave.ndim != 2 or not wave.is_floating_point():
            raise CounterpointError(
                f"views need waves [batch, samples] of floating point, got {list(wave.shape)} {wave.dtype}"
            )
        if len(view.shift) != len(wave):
            raise CounterpointError(f"parameters of {len(view.shift)} sounds were drawn, got {len(wave)} sounds")
        view = view.moved(wave.device)
        self.spectrogram.to(wave.device)
        x = wide(wave) * view.amplitude[:, None]
        for rows in _some(view.snr > 0):
            level = x[rows].square().mean(1).sqrt() * view.snr[rows]
            # Repeat the tape, so that a sound may begin anywhere on it.
            tape = view.tape.repeat(1 + -(-x.shape[1] // TAPE))
            x[rows] = x[rows].addcmul(tape.unfold(0, x.shape[1], 1)[view.place[rows]], level[:, None])
        at = torch.arange(x.shape[1], device=x.device)
        for rows in _some(view.mask[:, 1] > 0):
            # The shares refer to the shifted snippet before stretching.
            start = (x.shape[1] - self.length) / 2 + view.shift[rows] + view.mask[rows, 0] * self.length
            inside = (at >= start[:, None]) & (at < (start + view.mask[rows, 1] * self.length)[:, None])
            x[rows] = x[rows].masked_fill(inside, 0)
        response = view.response if bool((view.response != 1).any()) else None
        found = self.spectrogram(x, view.shift, view.rate, response)
        if bool((view.bands[:, 1] > 0).any()):
            band = torch.arange(BANDS, device=x.device)
            first, count = view.bands.unbind(1)
            hidden = (band >= first[:, None]) & (band < (first + count)[:, None])
            found = found.masked_fill(hidden[:, None, :, None], 0)
        return found


# Centres in hertz of the equaliser's filters: a low shelf, five peaks, a high shelf. Chosen, within the library's ranges.
CENTRES = (
    (42.0, 95.0),
    (91.0, 204.0),
    (196.0, 441.0),
    (421.0, 948.0),
    (909.0, 2045.0),
    (1957.0, 4404.0),
    (4216.0, 9486.0),
)


def _equaliser(decibels: Tensor, generator: torch.Generator, bins: int) -> Tensor:
    """Compute the gains [n, bins] of seven filters in a row: second-order shelves and peaks.

    Draw their quality from 0.3 to 1, chosen.
    """
    n = len(decibels)
    if not n:
        return torch.ones(0, bins)
    low, high = (torch.tensor(side) for side in zip(*CENTRES, strict=True))
    centre = low + (high - low) * torch.rand(n, 7, generator=generator)
    quality = _uniform(0.3, 1.0, (n, 7), generator)
    frequency = 2 * math.pi * torch.arange(bins) / FFT
    w, a = 2 * math.pi * centre / RATE, 10 ** (decibels / 40)
    cos, alpha, root = w.cos(), w.sin() / (2 * quality), a.sqrt()
    # Bilinear transforms of the analogue shelves and peak, as coefficients of z^0, z^-1, z^-2.
    peak = ((1 + alpha * a, -2 * cos, 1 - alpha * a), (1 + alpha / a, -2 * cos, 1 - alpha / a))
    more, less = a + 1, a - 1
    side = 2 * root * alpha

    def shelf(c: Tensor, sign: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Compute the low shelf for sign 1, the high shelf for -1."""
        c = sign * c
        over = (a * (more - less * c + side), sign * 2 * a * (less - more * c), a * (more - less * c - side))
        under = (more + less * c + side, -sign * 2 * (less + more * c), more + less * c - side)
        return over, under

    z = torch.exp(-1j * frequency)
    total = torch.ones(n, bins)
    for number in range(7):
        over, under = shelf(cos, 1) if number == 0 else shelf(cos, -1) if number == 6 else peak
        value = [(p[:, number, None] + q[:, number, None] * z + r[:, number, None] * z**2) for p, q, r in (over, under)]
        total = total * (value[0] / value[1]).abs()
    return total


# --------------------------------------------------------------------------------------------- other sizes and other rates


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images [n, 1, height, width] in [0, 1] to (height, width), bilinear with antialiasing."""
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def resampled(wave: Tensor, rate: int) -> Tensor:
    """Convert waves [n, samples] of this rate to 22,050 Hz with a Fourier transform, as if the waves were periodic."""
    from scipy.signal import resample

    found = resample(wave.cpu().numpy(), max(1, round(wave.shape[1] * RATE / rate)), axis=1)
    return torch.from_numpy(found).to(wave)
