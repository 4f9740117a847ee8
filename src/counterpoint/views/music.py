"""Snippets of sheet music and of its sound, augmented as whole batches, and the log-frequency spectrogram of the sound.

    sheets, audio = SheetViews(), AudioViews(frames=42)
    one, two = sheets.pair(len(images), torch.Generator().manual_seed(0))      # what is done to each image in each view
    first, second = sheets.apply(images, one), sheets.apply(images, two)      # [B, 1, 120, 120] -> [B, 1, 80, 100]

What is random is drawn for the whole batch from a generator (`pair`, `draw`) and then applied, so that processes can
share a batch (`take`). Probabilities and ranges are those of Carvalho, Washüttl, Widmer: "Self-Supervised Contrastive
Learning for Robust Audio-Sheet Music Retrieval Systems", MMSys 2023, arXiv 2309.12134, and its published code; what
neither states is marked "chosen".

Items come as windows with margins around the snippet that is cut from them: 20 pixels above and below, 10 left and
right, and sound on both sides. Beyond an item's ends are white paper and silence. Where the paper moves the second of
two views, the two are moved half as far in opposite directions: the same distance between them, and half the margin is
enough.

What is done otherwise than by the published code, to the same end:
    time stretch    frames of the stretched sound are taken at steps of rate x hop. A phase vocoder interpolates
                    magnitudes between frames a hop apart and then finds phases for them; only magnitudes are used here,
                    and a frame can be computed where it is wanted
    equaliser       the gain of its seven filters at each frequency multiplies the magnitudes of each frame: what
                    filtering the waveform does, but for the ends of frames
    noise           a batch shares one tape of noise, which each sound plays from a place of its own
    image noise     the published code draws it at twice the size and halves it: the same as noise of half the deviation
A room's impulse response, off in the paper, is not here: it needs recordings of rooms.

kornia 0.9 has some of this. Milliseconds for 48, 96, 128 and 256 snippets on one core, the least of 25 rounds (elastic: 7):
    rescale, shift, turn    7.4, 5.6, 7.8, 29 here. warp_affine: 11, 11, 16, 73 with white beyond the edge; 7.7, 8.2, 12,
                            44 where, as here, the ink is sampled, so that zeros are white. The same pictures
    elastic deformation     3.5, 6.9, 9.8, 27 here. elastic_transform2d, one call for the small and one for the large:
                            100, 360, 490, 980. It smooths noise at every pixel; here a curve goes through few points
    blur                    for 12, 24, 32 and 64 of them, a quarter as the recipe draws: 1.1, 1.8, 2.9, 6.0 here and
                            1.1, 2.7, 2.8, 5.1 by gaussian_blur2d, which is twice as fast for whole batches. The same
kornia would save the blur's millisecond in large batches, of a view's 12 to 53, and is not what this package installs.
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
WINDOW = 120  # pixels of the square that it is cut from
RATE, FFT, HOP = 22050, 2048, 1103  # samples a second; 20 frames a second
BANDS, LOWEST, HIGHEST, PER_OCTAVE = 92, 30.0, 6000.0, 16
GROUP = 32  # sounds worked on at a time: their frames stay in a core's cache
TAPE = 2**18  # samples of noise that a batch shares


# --- what is common to both -------------------------------------------------------------------------------------------


class _Parameters:
    """What is done to each of a batch: tensors with a row for each item, fields in `shared` aside."""

    shared: tuple[str, ...] = ()

    def take(self, rows: slice | Tensor) -> Self:
        """Those of some of the items: one process's share of a batch drawn as a whole."""
        chosen = {name: value[rows] for name, value in self._tensors() if name not in self.shared}
        return replace(self, **chosen)  # type: ignore[type-var]

    def moved(self, device: torch.device) -> Self:
        """On the device of what they are applied to."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})  # type: ignore[type-var]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]


def _uniform(low: float, high: float, size: int | Sequence[int], generator: torch.Generator) -> Tensor:
    shape = (size,) if isinstance(size, int) else tuple(size)
    return low + (high - low) * torch.rand(shape, generator=generator)


def _sometimes(value: Tensor, share: float, generator: torch.Generator, otherwise: float = 0.0) -> Tensor:
    """Each item's value with this probability, else the other one."""
    chosen = torch.rand(len(value), generator=generator) < share
    return torch.where(chosen.view(-1, *[1] * (value.ndim - 1)), value, value.new_tensor(otherwise))


def _check(what: Any, shares: Sequence[str], ranges: Sequence[str]) -> None:
    for name in shares:
        if not 0 <= getattr(what, name) <= 1:
            raise CounterpointError(f"{name} is a probability or share, 0 to 1, got {getattr(what, name)}")
    for name in ranges:
        low, high = getattr(what, name)
        if not low <= high:
            raise CounterpointError(f"{name} is a range (low, high), got {(low, high)}")


# --- sheet music ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SheetRecipe:
    """How a snippet of a score is varied: probabilities per image, lengths in pixels of the snippet."""

    rescale: float = 0.45
    scale: tuple[float, float] = (0.90, 1.10)
    shift: float = 0.65  # probability that two views are apart horizontally
    apart: float = 20.0  # at most; a fifth of the snippet's width
    vertical: float = 0.65
    up_down: float = 10.0  # at most, chosen: half of the margin, which leaves the outer staff lines in the picture
    rotate: float = 0.35
    degrees: float = 4.0
    perlin: float = 0.2
    stain: float = 0.4  # how far Perlin noise darkens at most, chosen
    small: float = 0.2
    large: float = 0.2
    # Elastic deformation, chosen: (pixels a point moves at most, pixels between points that move independently).
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
            raise CounterpointError("an elastic field is (pixels >= 0, step >= 1 pixel)")


# What an aligned pair is varied by: the scale by a twentieth, 5 pixels up or down before the halving to 80 x 100.
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
    """What is done to each of B snippets for one view; all that is random is in here."""

    scale: Float[Tensor, " batch"]
    across: Float[Tensor, " batch"]  # pixels by which the window moves to the right
    down: Float[Tensor, " batch"]
    angle: Float[Tensor, " batch"]  # radians
    stain: Float[Tensor, " batch"]
    gradients: Float[Tensor, "batch 2 rows columns"]  # of the Perlin noise, unit vectors
    small: Float[Tensor, "batch 2 rows columns"]  # pixels
    large: Float[Tensor, "batch 2 rows columns"]
    mean: Float[Tensor, " batch"]
    deviation: Float[Tensor, " batch"]
    grain: Int[Tensor, " batch"]  # which of `grains` is its noise, -1 for none
    sigma: Float[Tensor, " batch"]
    grains: Float[Tensor, "noisy height width"]
    shared = ("grains",)


class SheetViews:
    """Makes varied snippets of windows of a score.

    Args:
        recipe: how; None for the paper's pre-training.

    Order: rescale, horizontal and vertical shift, rotation (together one resampling, bilinear), Perlin noise, elastic
    deformation, Gaussian noise, blur. Pixels are 0 for ink to 1 for paper and stay in that range.
    """

    def __init__(self, recipe: SheetRecipe | None = None) -> None:
        self.recipe = recipe or SheetRecipe()

    def pair(self, batch: int, generator: torch.Generator) -> tuple[SheetParameters, SheetParameters]:
        """Parameters of two views of each of `batch` windows; they are apart horizontally by what the recipe says."""
        recipe = self.recipe
        apart = _sometimes(_uniform(0, recipe.apart, batch, generator), recipe.shift, generator) / 2
        one, two = self.draw(batch, generator), self.draw(batch, generator)
        return replace(one, across=-apart), replace(two, across=apart)

    def draw(self, batch: int, generator: torch.Generator) -> SheetParameters:
        """Parameters of one view of each of `batch` windows, not moved horizontally; a generator of the CPU."""
        r = self.recipe
        if batch < 1:
            raise CounterpointError("views are made of at least one snippet")
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
        """The views these parameters describe, of windows [B, 1, 120, 120] with 0 for ink to 1 for paper, in float32 at
        least.

        Raises CounterpointError for other windows and for parameters of another number of them.
        """
        if windows.shape[1:] != (1, WINDOW, WINDOW) or not windows.is_floating_point():
            raise CounterpointError(
                f"views are made of windows [batch, 1, {WINDOW}, {WINDOW}] of floating point, got {list(windows.shape)} "
                f"{windows.dtype}"
            )
        if len(view.scale) != len(windows):
            raise CounterpointError(f"views of {len(view.scale)} windows were drawn, {len(windows)} are given")
        view = view.moved(windows.device)
        x = _placed(wide(windows), view)
        for rows in _some(view.stain > 0):
            x[rows] = x[rows] * (1 - view.stain[rows, None, None, None] * perlin(view.gradients[rows])[:, None])
        for rows in _some((view.small.flatten(1) != 0).any(1) | (view.large.flatten(1) != 0).any(1)):
            x[rows] = _bent(x[rows], view.small[rows], view.large[rows], self.recipe)
        for rows in _some(view.grain >= 0):
            # Halving the picture averages 2 x 2 independent numbers: half of the deviation is left.
            grain = view.grains[view.grain[rows]] * (view.deviation[rows] / 2)[:, None, None]
            x[rows] = (x[rows] + (grain + view.mean[rows, None, None])[:, None]).clamp(0, 1)
        for rows in _some(view.sigma > 0):
            # Of the paper's kernels, 7 to 15 taps, the smallest holds five deviations of the widest blur.
            x[rows] = gaussian_blur(x[rows], view.sigma[rows], 7)
        return x


def snippet(windows: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 80 100"]:
    """The centre of a window, as it is."""
    top, left = ((extent - own) // 2 for extent, own in zip(windows.shape[2:], SHEET, strict=True))
    return windows[:, :, top : top + SHEET[0], left : left + SHEET[1]]


def _some(mask: Tensor) -> list[Tensor]:
    """The positions, if there are any."""
    rows = mask.nonzero().flatten()
    return [rows] if len(rows) else []


CELL = 20  # pixels between the gradients of the Perlin noise


def perlin(
    gradients: Float[Tensor, "batch 2 rows columns"], cell: int = CELL, size: tuple[int, int] = SHEET
) -> Float[Tensor, "batch height width"]:
    """Perlin's gradient noise, brought to 0..1: each pixel's dot products with the gradients at the four corners of its
    cell, blended by 6t^5 - 15t^4 + 10t^3.

    Args:
        gradients: unit vectors at the corners of cells, (across, down); enough of them for `size`.
        cell: pixels of a cell's side.
        size: height and width of the picture.

    Raises ValueError when there are too few gradients. Source: Perlin, "Improving Noise", SIGGRAPH 2002.
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
    return (found / math.sqrt(2) + 0.5).clamp(0, 1)  # it lies within +-1/sqrt(2)


def _placed(windows: Tensor, view: SheetParameters) -> Tensor:
    """The snippet, scaled, shifted and turned about its centre."""
    height, width = SHEET
    y = torch.arange(height, device=windows.device, dtype=windows.dtype) - (height - 1) / 2
    x = torch.arange(width, device=windows.device, dtype=windows.dtype) - (width - 1) / 2
    cos, sin = (part(view.angle) / view.scale for part in (torch.cos, torch.sin))
    column, row = x[None, None, :], y[None, :, None]
    at_x = cos[:, None, None] * column - sin[:, None, None] * row + view.across[:, None, None]
    at_y = sin[:, None, None] * column + cos[:, None, None] * row + view.down[:, None, None]
    # As grid_sample counts: -1 and 1 are the outer edges of the window.
    grid = torch.stack([at_x * (2 / windows.shape[3]), at_y * (2 / windows.shape[2])], 3)
    # Zeros beyond the edge are paper when what is sampled is the ink.
    return 1 - F.grid_sample(1 - windows, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@lru_cache
def _cubic(step: int, extent: int) -> Float[Tensor, "extent points"]:
    """Weights of points `step` pixels apart in the smooth curve through them, bicubic, one point before the first pixel."""
    points = -(-extent // step) + 3
    spread = F.interpolate(torch.eye(points)[None, :, :, None], scale_factor=(step, 1), mode="bicubic")
    return spread[0, :, step : step + extent, 0].T.contiguous()


def _bent(x: Tensor, small: Tensor, large: Tensor, recipe: SheetRecipe) -> Tensor:
    """Every pixel taken from a little beside its place."""
    height, width = SHEET
    moves = x.new_zeros(len(x), 2, height, width)
    for field, (_, step) in ((small, recipe.small_field), (large, recipe.large_field)):
        # As products of matrices: ten times as fast as torch's own interpolation on a CPU.
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
    """Overlapping triangles on the bins of a Fourier transform, centred on notes: `per_octave` of them from 440 Hz.

    A band goes from its lower neighbour's centre to its upper one's, all of them whole bins; where several notes fall
    into one bin, as the lowest do, it is one. Each band's weights sum to 1. Frequencies in hertz, `fft` samples, bins 0
    to fft/2 - 1. With the defaults 92 bands.

    Raises ValueError when fewer than one band lies between the frequencies. Source: the filter bank of madmom (Böck et
    al. 2016), which the paper's front end is made with.

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
    """Waves at 22,050 Hz to log10(1 + magnitude in 92 bands): frames of 2,048 samples (Hann), 20 a second.

    Args:
        frames: T, how many frames a snippet has.

    Frame t of a snippet is centred (t - (T - 1) / 2) hops from the snippet's centre; beyond a wave is silence.
    """

    bank: Tensor
    window: Tensor

    def __init__(self, frames: int) -> None:
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        self.frames = frames
        bank = log_filterbank()
        assert bank.shape[1] == BANDS  # what the encoders' widths are made for
        self.bins = int(bank.any(1).nonzero().max()) + 1  # those above the highest band are never needed
        self.register_buffer("bank", bank[: self.bins].clone(), persistent=False)
        self.register_buffer("window", torch.hann_window(FFT), persistent=False)

    def forward(
        self,
        wave: Float[Tensor, "batch samples"],
        shift: Float[Tensor, " batch"] | None = None,
        rate: Float[Tensor, " batch"] | None = None,
        gain: Float[Tensor, "batch bins"] | None = None,
    ) -> Float[Tensor, "batch 1 92 frames"]:
        """The spectrogram of the centre of each wave.

        Args:
            wave: [-1, 1]; half precisions are computed and returned in float32.
            shift: samples by which the snippet lies later than the centre.
            rate: how much faster than it is the sound is to be; pitches stay.
            gain: what magnitudes are multiplied with, for each bin below `self.bins`.

        Raises ValueError for what are no waves.
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
        # Silence before and after, as far as any frame reaches.
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
    """How a snippet of sound is varied: probabilities per sound. What is its library's default is named."""

    shift: float = 0.5  # probability that two views are apart in time
    apart: float = 0.3  # at most, of the snippet's length: the views have 70 % in common at least
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
            raise CounterpointError(f"masked is a range of shares of the snippet, 0 to 1, got {self.masked}")
        if not self.rates[0] > 0 or self.jitter < 0:
            raise CounterpointError(f"rates must be positive and jitter not negative: {self.rates}, {self.jitter}")


# What an aligned pair is varied by: the onset by a frame; tempi of 0.9 to 1.1 are the paper's renderings.
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
    """What is done to each of B sounds for one view; all that is random is in here."""

    shift: Float[Tensor, " batch"]  # samples
    amplitude: Float[Tensor, " batch"]  # polarity and gain
    snr: Float[Tensor, " batch"]  # noise's amplitude over the sound's; 0 for none
    place: Int[Tensor, " batch"]  # where on the tape its noise begins
    mask: Float[Tensor, "batch 2"]  # from, length; as shares of the snippet
    response: Float[Tensor, "batch bins"]  # of the equaliser
    rate: Float[Tensor, " batch"]
    bands: Int[Tensor, "batch 2"]  # of the frequency mask: first, how many
    tape: Float[Tensor, " samples"]
    shared = ("tape",)


class AudioViews:
    """Makes spectrograms of varied sounds.

    Args:
        frames: T of a snippet, which is the centre of what is given.
        recipe: how; None for the paper's pre-training.

    Order: time shift, polarity, gain, noise, time mask, equaliser on the sound; then stretching, the
    filter bank, logarithm and frequency mask on the spectrogram.
    """

    def __init__(self, frames: int, recipe: AudioRecipe | None = None) -> None:
        self.spectrogram = LogSpectrogram(frames)
        self.recipe = recipe or AudioRecipe()
        self.length = frames * HOP

    def pair(self, batch: int, generator: torch.Generator) -> tuple[AudioParameters, AudioParameters]:
        """Parameters of two views of each of `batch` sounds, apart in time by what the recipe says."""
        r = self.recipe
        apart = _sometimes(_uniform(0, r.apart, batch, generator), r.shift, generator) * (self.length / 2)
        one, two = self.draw(batch, generator), self.draw(batch, generator)
        return replace(one, shift=one.shift - apart), replace(two, shift=two.shift + apart)

    def draw(self, batch: int, generator: torch.Generator) -> AudioParameters:
        """Parameters of one view of each of `batch` sounds; the generator is one of the CPU."""
        r = self.recipe
        if batch < 1:
            raise CounterpointError("views are made of at least one sound")
        sign = 1 - 2 * (torch.rand(batch, generator=generator) < r.polarity).float()
        gain = 10 ** (_sometimes(_uniform(*r.decibels, batch, generator), r.gain, generator) / 20)
        ratio = 10 ** (-_uniform(*r.snr, batch, generator) / 20)
        length = _sometimes(_uniform(*r.masked, batch, generator), r.mask, generator)
        start = _uniform(0, 1, batch, generator) * (1 - length)
        widest = math.floor(r.frequencies * BANDS)
        width = torch.randint(widest + 1, (batch,), generator=generator)
        first = (_uniform(0, 1, batch, generator) * (BANDS + 1 - width)).long().clamp(max=BANDS)
        # One draw decides for the whole batch, as the paper's code does.
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
        """Spectrograms of the views these parameters describe, of waves [B, samples] at 22,050 Hz.

        Raises CounterpointError for what are no waves and for parameters of another number of them.
        """
        if wave.ndim != 2 or not wave.is_floating_point():
            raise CounterpointError(f"views are made of waves [batch, samples], got {list(wave.shape)} {wave.dtype}")
        if len(view.shift) != len(wave):
            raise CounterpointError(f"views of {len(view.shift)} sounds were drawn, {len(wave)} are given")
        view = view.moved(wave.device)
        self.spectrogram.to(wave.device)
        x = wide(wave) * view.amplitude[:, None]
        for rows in _some(view.snr > 0):
            level = x[rows].square().mean(1).sqrt() * view.snr[rows]
            # The tape as long as a sound from anywhere on it needs.
            tape = view.tape.repeat(1 + -(-x.shape[1] // TAPE))
            x[rows] = x[rows].addcmul(tape.unfold(0, x.shape[1], 1)[view.place[rows]], level[:, None])
        at = torch.arange(x.shape[1], device=x.device)
        for rows in _some(view.mask[:, 1] > 0):
            # Shares of the snippet as it is before stretching, wherever it was shifted to.
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


# Centres in hertz of the equaliser's filters: a low shelf, five peaks, a high shelf. Chosen, within its library's.
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
    """[n, bins] gains of seven filters in a row: second-order shelves and peaks with a quality of 0.3 to 1, chosen."""
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
        """The low shelf for sign 1, the high shelf for -1."""
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
    """Resample waves [n, samples] of this rate to 22,050 Hz by the frequencies that both have; the ends are taken to meet."""
    from scipy.signal import resample

    found = resample(wave.cpu().numpy(), max(1, round(wave.shape[1] * RATE / rate)), axis=1)
    return torch.from_numpy(found).to(wave)
