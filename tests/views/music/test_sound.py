"""Each change of a sound against a known result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_music import generator, sounds, tones

from counterpoint.views.music import FFT, HOP, RATE, LogSpectrogram, sound


def test_shifts_are_in_samples():
    wave = torch.randn(2, 40 * HOP, generator=generator())
    spectrogram = LogSpectrogram(11)
    torch.testing.assert_close(
        spectrogram(wave, shift=torch.tensor([2.0 * HOP, -3.0 * HOP]))[0, ..., :-2], spectrogram(wave)[0, ..., 2:]
    )
    one, two = sounds(shift=1.0).pair(2000, generator())
    apart = two.shift - one.shift
    assert apart.min() >= 0
    assert 0.29 * 20 * HOP < apart.max() <= 0.3 * 20 * HOP


def test_polarity_gain_and_noise_change_the_wave():
    wave = tones([500.0] * 64)
    plain = LogSpectrogram(20)(wave)
    turned = sounds(polarity=1.0)
    torch.testing.assert_close(turned.apply(wave, turned.draw(64, generator())), plain, atol=1e-5, rtol=0)
    louder = sounds(gain=1.0, decibels=(20.0, 20.0))
    found = louder.apply(wave, louder.draw(64, generator()))
    torch.testing.assert_close(10**found - 1, 10 * (10**plain - 1), atol=1e-2, rtol=1e-3)
    # White noise at a known ratio to the sound: what stands in the bands that the tone leaves empty.
    noisy = sounds(noise=1.0, snr=(10.0, 10.0))
    view = noisy.draw(64, generator())
    assert bool((view.snr - 10**-0.5).abs().max() < 1e-6)
    level = float(wave[0].square().mean().sqrt()) * 10**-0.5
    expected = LogSpectrogram(20)(level * torch.randn(64, 40 * HOP, generator=generator(1)))
    found = noisy.apply(wave, view)
    torch.testing.assert_close(found[:, :, 80:].mean(), expected[:, :, 80:].mean(), rtol=0.02, atol=0)
    silent = noisy.apply(torch.zeros(64, 40 * HOP), view)
    assert bool((silent == 0).all())


def test_masks_hide_time_and_frequency():
    wave = torch.randn(32, 40 * HOP, generator=generator())
    masked = sounds(mask=1.0, masked=(0.5, 0.5))
    view = masked.draw(32, generator())
    found = masked.apply(wave, view)
    quiet = (found[:, 0].amax(1) == 0).sum(1)
    assert quiet.min() >= 7
    assert quiet.max() <= 10
    bands = sounds(frequency_mask=1.0, frequencies=0.2)
    view = bands.draw(32, generator())
    empty = (bands.apply(wave, view)[:, 0] == 0).all(2)
    torch.testing.assert_close(empty.sum(1), view.bands[:, 1])
    assert view.bands[:, 1].max() <= 18
    assert len(set(view.bands[:, 0].tolist())) > 10
    assert bool((empty.int().diff(dim=1).abs().sum(1) <= 2).all())


def test_the_equaliser_is_that_of_its_filters_in_time():
    from scipy.signal import freqz

    decibels = torch.tensor([[6.0, -12, 3, 0, 9, -5, -8]])
    found = sound._equaliser(decibels, generator(4), 300)[0]
    # The same filters as a textbook writes them, one at a time.
    g = generator(4)
    low, high = (torch.tensor(side) for side in zip(*sound.CENTRES, strict=True))
    centre = (low + (high - low) * torch.rand(1, 7, generator=g))[0].double().numpy()
    quality = (0.3 + 0.7 * torch.rand(1, 7, generator=g))[0].double().numpy()
    w = 2 * np.pi * np.arange(300) / FFT
    total = np.ones(300)
    for n, gain in enumerate(decibels[0].double().numpy()):
        a, w0 = 10 ** (gain / 40), 2 * np.pi * centre[n] / RATE
        alpha, c, r = np.sin(w0) / (2 * quality[n]), np.cos(w0), np.sqrt(10 ** (gain / 40))
        if n == 0:
            b = [a * (a + 1 - (a - 1) * c + 2 * r * alpha), 2 * a * (a - 1 - (a + 1) * c)]
            b += [a * (a + 1 - (a - 1) * c - 2 * r * alpha)]
            d = [a + 1 + (a - 1) * c + 2 * r * alpha, -2 * (a - 1 + (a + 1) * c), a + 1 + (a - 1) * c - 2 * r * alpha]
        elif n == 6:
            b = [a * (a + 1 + (a - 1) * c + 2 * r * alpha), -2 * a * (a - 1 + (a + 1) * c)]
            b += [a * (a + 1 + (a - 1) * c - 2 * r * alpha)]
            d = [a + 1 - (a - 1) * c + 2 * r * alpha, 2 * (a - 1 - (a + 1) * c), a + 1 - (a - 1) * c - 2 * r * alpha]
        else:
            b, d = [1 + alpha * a, -2 * c, 1 - alpha * a], [1 + alpha / a, -2 * c, 1 - alpha / a]
        total *= np.abs(freqz(b, d, w)[1])
    np.testing.assert_allclose(found.numpy(), total, rtol=1e-3)
    # No gain anywhere is no filter; a low shelf lifts what lies below it and nothing above.
    torch.testing.assert_close(sound._equaliser(torch.zeros(2, 7), generator(), 300), torch.ones(2, 300))
    shelf = sound._equaliser(torch.tensor([[12.0, 0, 0, 0, 0, 0, 0]]), generator(), 1024)[0]
    assert float(shelf[0]) == pytest.approx(10**0.6, rel=1e-2)
    assert float(shelf[-1]) == pytest.approx(1, abs=1e-2)
