"""Make spectrograms of varied sounds: shift, distort, mask and stretch them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.precision import wide
from counterpoint.errors import CounterpointError
from counterpoint.views.music.drawn import Parameters, check, some, sometimes, uniform
from counterpoint.views.music.spectrogram import BANDS, FFT, HOP, RATE, LogSpectrogram

TAPE = 2**18  # samples of noise that a batch shares


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
        check(self, (*shares, "frequencies"), ("decibels", "snr", "masked", "bands", "rates"))
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
class AudioParameters(Parameters):
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
        apart = sometimes(uniform(0, r.apart, batch, generator), r.shift, generator) * (self.length / 2)
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
        gain = 10 ** (sometimes(uniform(*r.decibels, batch, generator), r.gain, generator) / 20)
        ratio = 10 ** (-uniform(*r.snr, batch, generator) / 20)
        length = sometimes(uniform(*r.masked, batch, generator), r.mask, generator)
        start = uniform(0, 1, batch, generator) * (1 - length)
        widest = math.floor(r.frequencies * BANDS)
        width = torch.randint(widest + 1, (batch,), generator=generator)
        first = (uniform(0, 1, batch, generator) * (BANDS + 1 - width)).long().clamp(max=BANDS)
        # One draw decides for the whole batch, as in the paper's code.
        width = width * int(torch.rand((), generator=generator) < r.frequency_mask)
        response = torch.ones(batch, self.spectrogram.bins)
        chosen = (torch.rand(batch, generator=generator) < r.equalise).nonzero().flatten()
        response[chosen] = _equaliser(uniform(*r.bands, (len(chosen), 7), generator), generator, response.shape[1])
        return AudioParameters(
            shift=uniform(-r.jitter, r.jitter, batch, generator) * HOP,
            amplitude=sign * gain,
            snr=sometimes(ratio, r.noise, generator),
            place=torch.randint(TAPE, (batch,), generator=generator),
            mask=torch.stack([start, length], 1),
            response=response,
            rate=sometimes(uniform(*r.rates, batch, generator), r.stretch, generator, 1.0),
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
        for rows in some(view.snr > 0):
            level = x[rows].square().mean(1).sqrt() * view.snr[rows]
            # Repeat the tape, so that a sound may begin anywhere on it.
            tape = view.tape.repeat(1 + -(-x.shape[1] // TAPE))
            x[rows] = x[rows].addcmul(tape.unfold(0, x.shape[1], 1)[view.place[rows]], level[:, None])
        at = torch.arange(x.shape[1], device=x.device)
        for rows in some(view.mask[:, 1] > 0):
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
    quality = uniform(0.3, 1.0, (n, 7), generator)
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
