"""The filter bank and the spectrogram against known results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_music import generator, tones

from counterpoint.views.music import FFT, HOP, RATE, LogSpectrogram, log_filterbank


def test_the_filter_bank_has_92_bands_of_unit_area():
    bank = log_filterbank()
    assert bank.shape == (1024, 92)
    torch.testing.assert_close(bank.sum(0), torch.ones(92))
    hertz = torch.arange(1024) * RATE / FFT
    assert hertz[bank.any(1)].min() >= 30
    assert hertz[bank.any(1)].max() <= 6000
    centres = hertz[bank.argmax(0)]
    assert bool((centres.diff() > 0).all())
    # At high frequencies every note has a separate bin. Neighbouring bands differ by a sixteenth of an octave.
    assert centres[-17] * 2 == pytest.approx(float(centres[-1]), rel=0.01)
    # Each band's weights rise to its centre and fall after it.
    for band in (0, 40, 91):
        rises = bank[:, band].diff()
        top = int(bank[:, band].argmax())
        assert bool((rises[:top] >= 0).all() and (rises[top:] <= 0).all())
    with pytest.raises(ValueError, match="no band"):
        log_filterbank(lowest=440.0, highest=441.0)


def test_a_spectrogram_is_that_of_torch_s_own_transform():
    wave = torch.randn(2, 30 * HOP, generator=generator())
    found = LogSpectrogram(9)(wave)
    assert found.shape == (2, 1, 92, 9)
    # Frames centred on multiples of a hop from the middle; an odd number has one in the middle itself.
    middle = 15 * HOP
    start = middle - 4 * HOP - FFT // 2
    spectrum = torch.stft(
        wave[:, start : start + 8 * HOP + FFT],
        FFT,
        HOP,
        window=torch.hann_window(FFT),
        center=False,
        return_complex=True,
    )
    expected = torch.log10(1 + spectrum.abs()[:, :1024].transpose(1, 2) @ log_filterbank()).transpose(1, 2)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_a_tone_lights_its_band_and_silence_none():
    spectrogram = LogSpectrogram(12)
    found = spectrogram(tones([440.0, 880.0, 1760.0]))
    bands = found.mean(3)[:, 0].argmax(1)
    assert bands.diff().tolist() == [16, 16]
    assert bool((spectrogram(torch.zeros(1, 20 * HOP)) == 0).all())
    # Shorter sounds than a snippet have silence around them.
    short = spectrogram(tones([440.0], 4 * HOP))
    assert bool((short[..., :2] == 0).all() and (short[..., -2:] == 0).all())
    assert short[..., 5].max() > 1
    with pytest.raises(ValueError, match=r"wave must be \[batch, samples\]"):
        spectrogram(torch.zeros(3))
    with pytest.raises(ValueError, match=r"of floating point, got \[1, 9999\] torch.int16"):
        spectrogram(torch.zeros(1, 9999, dtype=torch.int16))
    with pytest.raises(ValueError, match="frames must be at least 1"):
        LogSpectrogram(0)


def test_stretching_changes_time_and_not_pitch():
    at = torch.arange(60 * HOP)
    click = tones([660.0], 60 * HOP) * ((at // HOP) % 8 == 0)  # a click every eight frames
    spectrogram = LogSpectrogram(17)
    band = int(spectrogram(tones([660.0], 60 * HOP))[0, 0].mean(1).argmax())

    def peaks(rate: float) -> list[int]:
        loud = spectrogram(click, rate=torch.tensor([rate]))[0, 0, band]
        return [n for n in range(1, 16) if loud[n] > loud[n - 1] and loud[n] >= loud[n + 1] and loud[n] > 1]

    assert set(np.diff(peaks(1.0))) == {8}
    assert set(np.diff(peaks(2.0))) == {4}
    assert len(peaks(0.5)) <= 1
    # What neither rises nor falls stays as it is.
    steady = tones([330.0], 60 * HOP)
    torch.testing.assert_close(spectrogram(steady, rate=torch.tensor([1.7])), spectrogram(steady), atol=2e-2, rtol=2e-2)
