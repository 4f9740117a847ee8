"""Convert images and sounds of any size and rate to the windows that the views of snippets take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.errors import CounterpointError
from counterpoint.views.images import grey, zero_to_one
from counterpoint.views.music.sheet import SHEET, WINDOW, snippet
from counterpoint.views.music.spectrogram import BANDS, HOP, RATE, LogSpectrogram

LEAST = 16  # frames of a snippet of sound; networks halve them four times


class SheetItems:
    """Images as windows of sheet music.

    Args:
        margins: whether an image has margins around its snippet: it is 3/2 as high and 6/5 as wide as the snippet. False:
            an image is a snippet, and beyond it is white.
    """

    size = SHEET  # of a snippet

    def __init__(self, margins: bool) -> None:
        self.margins = margins

    def windows(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 1 120 120"]:
        """Convert images, uint8 or in [0, 1], to grey windows with margins."""
        x = grey(zero_to_one(images))
        if self.margins:
            return x if x.shape[2:] == (WINDOW, WINDOW) else resized(x, (WINDOW, WINDOW))
        top, left = ((WINDOW - extent) // 2 for extent in SHEET)
        return F.pad(resized(x, SHEET), (left, left, top, top), value=1.0)

    def snippets(self, windows: Float[Tensor, "n 1 120 120"]) -> Float[Tensor, "n 1 80 100"]:
        """Cut out the centre of each window, unchanged."""
        return snippet(windows)


class SoundItems:
    """Sounds as waves at 22,050 Hz.

    Args:
        rate: samples of a sound per second.
        samples: samples of a sound.
        margins: whether a sound is twice as long as its snippet. False: a sound is a snippet, and beyond it is silence.

    `frames` is the number of frames of a snippet: 42 for 2.1 seconds. Raises CounterpointError for fewer than 16.
    """

    def __init__(self, rate: int, samples: int, margins: bool) -> None:
        self.rate = rate
        seconds = samples / rate / (2 if margins else 1)
        self.frames = round(seconds * RATE / HOP)
        if self.frames < LEAST:
            raise CounterpointError(
                f"snippets of sound need {LEAST} frames, 0.8 seconds, at least; these have {seconds:.2f} seconds"
                + (" without their margins; --no-margins takes whole items for snippets" if margins else "")
            )
        self.size = BANDS, self.frames  # of a snippet
        self.spectrogram = LogSpectrogram(self.frames)

    def windows(self, sounds: Float[Tensor, "n samples"]) -> Float[Tensor, "n resampled"]:
        """Convert sounds to waves at 22,050 Hz."""
        return sounds.float() if self.rate == RATE else resampled(sounds.float(), self.rate)

    def snippets(self, waves: Float[Tensor, "n samples"]) -> Float[Tensor, "n 1 92 frames"]:
        """Compute the spectrogram of the centre of each wave."""
        return self.spectrogram.to(waves.device)(waves)


def resized(x: Float[Tensor, "n 1 height width"], size: tuple[int, int]) -> Float[Tensor, "n 1 high wide"]:
    """Resize images in [0, 1] to (height, width) in pixels, bilinear with antialiasing."""
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def resampled(wave: Float[Tensor, "n samples"], rate: int) -> Float[Tensor, "n resampled"]:
    """Convert waves of this rate, in samples per second, to 22,050 Hz.

    A Fourier transform does so, as if the waves were periodic.
    """
    from scipy.signal import resample

    found = resample(wave.cpu().numpy(), max(1, round(wave.shape[1] * RATE / rate)), axis=1)
    return torch.from_numpy(found).to(wave)
