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

Its files:
    drawn.py         the random parameters of a batch: draw, select and check them
    sheet.py         `SheetViews` and its recipes
    spectrogram.py   `LogSpectrogram` and its filter bank
    sound.py         `AudioViews` and its recipes
    items.py         `SheetItems` and `SoundItems`: images and sounds of any size and rate to windows
"""

from counterpoint.views.music.items import SheetItems, SoundItems, resampled
from counterpoint.views.music.sheet import (
    SHEET,
    SHEET_PAIRED,
    WINDOW,
    SheetParameters,
    SheetRecipe,
    SheetViews,
    perlin,
    snippet,
)
from counterpoint.views.music.sound import AUDIO_PAIRED, AudioParameters, AudioRecipe, AudioViews
from counterpoint.views.music.spectrogram import BANDS, FFT, HOP, RATE, LogSpectrogram, log_filterbank

__all__ = [
    "AUDIO_PAIRED",
    "BANDS",
    "FFT",
    "HOP",
    "RATE",
    "SHEET",
    "SHEET_PAIRED",
    "WINDOW",
    "AudioParameters",
    "AudioRecipe",
    "AudioViews",
    "LogSpectrogram",
    "SheetItems",
    "SheetParameters",
    "SheetRecipe",
    "SheetViews",
    "SoundItems",
    "log_filterbank",
    "perlin",
    "resampled",
    "snippet",
]
