"""Images and sounds of any size and rate as windows."""

from __future__ import annotations

import math

import pytest
import torch
from made_music import tones

from counterpoint.errors import CounterpointError
from counterpoint.views.music import HOP, RATE, LogSpectrogram, SheetItems, SoundItems, resampled


def test_an_image_without_margins_is_a_snippet_on_white():
    pictures = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    pictures[:, :, 16:32] = 0
    items = SheetItems(margins=False)
    windows = items.windows(pictures)
    assert windows.shape == (1, 1, 120, 120)
    assert bool((windows[:, :, :20] == 1).all())
    assert bool((windows[:, :, :, 110:] == 1).all())
    assert float(items.snippets(windows)[0, 0, 30].max()) < 1e-3


def test_an_image_with_margins_is_resized_to_a_window():
    whole = torch.rand(2, 3, 120, 120, generator=torch.Generator().manual_seed(0))
    items = SheetItems(margins=True)
    grey = 0.2989 * whole[:, :1] + 0.587 * whole[:, 1:2] + 0.114 * whole[:, 2:]
    torch.testing.assert_close(items.windows(whole), grey)
    assert items.windows(torch.zeros(2, 3, 60, 60, dtype=torch.uint8)).shape == (2, 1, 120, 120)


@pytest.mark.parametrize(("margins", "frames"), [(True, 20), (False, 40)])
def test_a_sound_has_the_frames_of_its_snippet(margins, frames):
    items = SoundItems(RATE, 40 * HOP, margins)
    assert items.frames == frames
    assert items.size == (92, frames)
    wave = tones([440.0])
    assert torch.equal(items.windows(wave), wave)
    torch.testing.assert_close(items.snippets(wave), LogSpectrogram(frames)(wave))


def test_a_sound_of_another_rate_is_resampled():
    at = torch.arange(16000, dtype=torch.float64) / 16000
    tone = torch.sin(2 * math.pi * 440 * at)[None]
    found = SoundItems(16000, 16000, margins=False).windows(tone)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, resampled(tone.float(), 16000))


def test_short_sounds_raise_an_error():
    with pytest.raises(CounterpointError, match=r"16 frames, 0\.8 seconds, at least; these have 0\.40 seconds without"):
        SoundItems(RATE, round(0.8 * RATE), margins=True)
    with pytest.raises(CounterpointError, match=r"these have 0\.40 seconds$"):
        SoundItems(RATE, round(0.4 * RATE), margins=False)


def test_resampling_keeps_a_tone():
    at = torch.arange(16000, dtype=torch.float64) / 16000
    tone = torch.sin(2 * math.pi * 440 * at)[None]
    found = resampled(tone, 16000)
    expected = torch.sin(2 * math.pi * 440 * torch.arange(RATE, dtype=torch.float64) / RATE)[None]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    high = torch.sin(2 * math.pi * 15000 * torch.arange(44100, dtype=torch.float64) / 44100)[None]
    assert float(resampled(high, 44100).abs().max()) < 1e-3
