"""Compute log-frequency spectrograms of snippets of sound."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.precision import wide

RATE, FFT, HOP = 22050, 2048, 1103  # samples a second; 20 frames a second
BANDS, LOWEST, HIGHEST, PER_OCTAVE = 92, 30.0, 6000.0, 16
GROUP = 32  # sounds per pass, so that their frames stay in a core's cache


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
