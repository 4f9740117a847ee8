"""Snippets of music: the filter bank and the spectrogram against what is known, each augmentation, the draws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from counterpoint.errors import CounterpointError
from counterpoint.views import music
from counterpoint.views.music import (
    AUDIO_PAIRED,
    FFT,
    HOP,
    RATE,
    SHEET_PAIRED,
    AudioRecipe,
    AudioViews,
    LogSpectrogram,
    SheetRecipe,
    SheetViews,
    log_filterbank,
    perlin,
    snippet,
)

STILL = {"rescale": 0.0, "shift": 0.0, "vertical": 0.0, "rotate": 0.0, "perlin": 0.0}
STILL |= {"small": 0.0, "large": 0.0, "noise": 0.0, "blur": 0.0}
QUIET = {"shift": 0.0, "polarity": 0.0, "gain": 0.0, "noise": 0.0, "mask": 0.0, "equalise": 0.0}
QUIET |= {"stretch": 0.0, "frequency_mask": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def windows(n: int = 6) -> torch.Tensor:
    """Draw a dark cross off the centre, and dots, on white."""
    x = (torch.rand(n, 1, 120, 120, generator=generator(9)) > 0.05).float()
    x[:, :, 50:53] = 0
    x[:, :, :, 70:72] = 0
    return x


def sheets(**changes) -> SheetViews:
    return SheetViews(SheetRecipe(**(STILL | changes)))


def sounds(frames: int = 20, **changes) -> AudioViews:
    return AudioViews(frames, AudioRecipe(**(QUIET | changes)))


def tones(hertz: list[float], samples: int = 40 * HOP) -> torch.Tensor:
    at = torch.arange(samples, dtype=torch.float64) / RATE
    return torch.stack([0.5 * torch.sin(2 * math.pi * f * at) for f in hertz]).float()


# --------------------------------------------------------------------------------------------------------------- sheets


def test_without_anything_a_view_is_the_snippet():
    x = windows()
    one, two = sheets().pair(6, generator())
    for view in (one, two):
        torch.testing.assert_close(sheets().apply(x, view), x[:, :, 20:100, 10:110], atol=2e-4, rtol=0)
    torch.testing.assert_close(snippet(x), x[:, :, 20:100, 10:110])


def test_views_are_the_same_for_the_same_generator_and_leave_their_input_alone():
    x, views = windows(), SheetViews()
    before = x.clone()
    one, two = ([views.apply(x, view) for view in views.pair(6, generator(3))] for _ in range(2))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(x, before)
    assert all(view.shape == (6, 1, 80, 100) and view.min() >= 0 and view.max() <= 1 for view in one)
    assert not torch.allclose(one[0], one[1])


@pytest.mark.parametrize("kind", ["sheet", "audio"])
def test_a_share_of_a_batch_is_that_share_of_its_views(kind):
    made = SheetViews() if kind == "sheet" else AudioViews(20)
    x = windows(7) if kind == "sheet" else torch.randn(7, 40 * HOP, generator=generator(5))
    drawn = made.pair(7, generator(1))
    for view in drawn:
        whole = made.apply(x, view)
        for share in (slice(0, None, 2), slice(1, None, 2)):
            torch.testing.assert_close(made.apply(x[share], view.take(share)), whole[share], atol=1e-6, rtol=0)


def test_views_are_apart_as_the_recipe_says():
    views = sheets(shift=1.0)
    one, two = views.pair(4000, generator())
    apart = two.across - one.across
    torch.testing.assert_close(one.across, -two.across)
    assert apart.min() >= 0
    assert 19.5 < apart.max() <= 20
    assert abs(float(apart.mean()) - 10) < 0.3
    # Whole pixels move the picture by whole pixels.
    x = windows()
    moved = views.apply(
        x, replace(views.draw(6, generator()), across=torch.full((6,), 7.0), down=torch.full((6,), -4.0))
    )
    torch.testing.assert_close(moved, x[:, :, 16:96, 17:117], atol=2e-4, rtol=0)


def test_beyond_the_window_is_paper():
    x = torch.zeros(1, 1, 120, 120)  # all ink
    view = replace(sheets().draw(1, generator()), down=torch.tensor([30.0]))
    out = sheets().apply(x, view)
    torch.testing.assert_close(out[0, 0, :, 0], (torch.arange(80) >= 70).float(), atol=1e-4, rtol=0)


def test_scale_and_rotation_turn_about_the_centre():
    y, x = torch.meshgrid(torch.arange(120.0) - 59.5, torch.arange(120.0) - 59.5, indexing="ij")
    picture = (0.5 + 0.004 * x + 0.002 * y)[None, None]  # linear, which bilinear sampling reproduces
    angle, scale = 0.06, 1.1
    plain = sheets().draw(1, generator())
    out = sheets().apply(picture, replace(plain, angle=torch.tensor([angle]), scale=torch.tensor([scale])))
    v, u = torch.meshgrid(torch.arange(80.0) - 39.5, torch.arange(100.0) - 49.5, indexing="ij")
    at_x = (math.cos(angle) * u - math.sin(angle) * v) / scale
    at_y = (math.sin(angle) * u + math.cos(angle) * v) / scale
    torch.testing.assert_close(out[0, 0], 0.5 + 0.004 * at_x + 0.002 * at_y, atol=1e-5, rtol=0)


def test_ranges_and_probabilities_are_the_paper_s():
    views = SheetViews()
    view = views.draw(6000, generator())
    for values, still, share in (
        (view.scale, 1, 0.45),
        (view.down, 0, 0.65),
        (view.angle, 0, 0.35),
        (view.stain, 0, 0.2),
        (view.small.flatten(1).abs().amax(1), 0, 0.2),
        (view.large.flatten(1).abs().amax(1), 0, 0.2),
        (view.grain + 1, 0, 0.25),
        (view.sigma, 0, 0.25),
    ):
        assert abs(float((values != still).float().mean()) - share) < 0.03
    assert 0.9 <= view.scale.min() < 0.91
    assert 1.09 < view.scale.max() <= 1.1
    assert math.radians(3.9) < view.angle.abs().max() <= math.radians(4)
    assert view.mean.max() <= 0.5
    assert view.deviation.max() <= 0.4
    assert view.sigma.max() <= 0.6
    audio = AudioViews(20).draw(6000, generator())
    for chosen, share in (
        (audio.amplitude < 0, 0.5),
        (audio.amplitude.abs() != 1, 0.5),
        (audio.snr > 0, 0.4),
        (audio.mask[:, 1] > 0, 0.5),
        ((audio.response != 1).any(1), 0.3),
        (audio.rate != 1, 0.4),
    ):
        assert abs(float(chosen.float().mean()) - share) < 0.03
    assert audio.rate.min() >= 0.5
    assert audio.rate.max() <= 1.8
    assert bool((audio.mask.sum(1) <= 1).all())
    assert audio.mask[:, 1].max() <= 0.2
    masked = [bool((AudioViews(20).draw(4, generator(seed)).bands[:, 1] > 0).any()) for seed in range(400)]
    assert abs(float(np.mean(masked)) - 0.35) < 0.08


def test_perlin_noise_is_smooth_and_zero_at_the_corners_of_cells():
    turn = 2 * math.pi * torch.rand(3, 6, 7, generator=generator())
    gradients = torch.stack([turn.cos(), turn.sin()], 1)
    fine = perlin(gradients, cell=40, size=(200, 240))
    assert 0 <= fine.min() < 0.3
    assert 0.7 < fine.max() <= 1
    assert fine.diff(dim=1).abs().max() < 0.08
    assert fine.diff(dim=2).abs().max() < 0.08
    # At a corner, half a pixel away from the nearest ones, nothing is left but the middle value.
    for row, column in ((40, 80), (120, 40)):
        corner = fine[:, row - 1 : row + 1, column - 1 : column + 1].mean((1, 2))
        torch.testing.assert_close(corner, torch.full((3,), 0.5), atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="too few"):
        perlin(gradients, cell=40, size=(300, 240))


def test_stains_darken_noise_brightens_and_blur_keeps_the_sum():
    x = torch.full((8, 1, 120, 120), 0.6)
    stained = sheets(perlin=1.0).apply(x, sheets(perlin=1.0).draw(8, generator()))
    assert bool((stained <= 0.6 + 1e-6).all())
    assert bool((stained.mean((1, 2, 3)) < 0.6).all())
    recipe = {"noise": 1.0, "noise_mean": 0.2, "noise_deviation": 0.1}
    view = sheets(**recipe).draw(8, generator())
    noisy = sheets(**recipe).apply(x, view)
    torch.testing.assert_close(noisy.mean((1, 2, 3)) - 0.6, view.mean, atol=2e-3, rtol=0)
    torch.testing.assert_close(noisy.std((1, 2, 3)), view.deviation / 2, atol=2e-3, rtol=0.03)
    blurred = sheets(blur=1.0).apply(windows(8), sheets(blur=1.0).draw(8, generator()))
    assert float((blurred.mean() - snippet(windows(8)).mean()).abs()) < 2e-3
    assert blurred.var() < snippet(windows(8)).var()


def test_elastic_deformation_moves_points_a_little():
    _y, x = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    ramp = (x / 150)[None, None].expand(5, 1, 120, 120)
    out = sheets(large=1.0).apply(ramp, sheets(large=1.0).draw(5, generator()))
    moved = (out - snippet(ramp))[:, :, 8:72, 8:92] * 150  # pixels; the edges see paper
    assert 0.5 < moved.abs().max() < 4
    assert moved.diff(dim=3).abs().max() < 0.7


@pytest.mark.parametrize("step", [1, 8, 25, 100])
def test_the_curve_through_the_points_of_a_field_is_torch_s(step):
    rows, columns = (-(-extent // step) + 3 for extent in music.SHEET)
    field = torch.randn(2, 2, rows, columns, generator=generator())
    expected = F.interpolate(field, scale_factor=step, mode="bicubic")[:, :, step : step + 80, step : step + 100]
    down, across = (music._cubic(step, extent) for extent in music.SHEET)
    torch.testing.assert_close(down @ field @ across.T, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_views_of_other_types_are_those_of_float32(dtype):
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    pictures, waves = windows().to(dtype), torch.randn(6, 40 * HOP, generator=generator(5)).to(dtype)
    recipes = SheetRecipe(**dict.fromkeys(STILL, 1.0)), AudioRecipe(**dict.fromkeys(QUIET, 1.0))
    for views, x in ((SheetViews(recipes[0]), pictures), (AudioViews(20, recipes[1]), waves)):
        view = views.draw(6, generator(1))
        found = views.apply(x, view)
        assert found.dtype == wide
        torch.testing.assert_close(found.float(), views.apply(x.float(), view), atol=2e-4, rtol=0)


def test_paired_views_are_mild():
    views = SheetViews(SHEET_PAIRED)
    view = views.draw(500, generator())
    assert view.down.abs().max() <= 2.5
    assert view.scale.min() >= 0.95
    assert view.scale.max() <= 1.05
    assert bool((view.across == 0).all() and (view.sigma == 0).all() and (view.grain == -1).all())
    audio = AudioViews(20, AUDIO_PAIRED).draw(500, generator())
    assert HOP * 0.9 < audio.shift.abs().max() <= HOP
    assert bool((audio.rate == 1).all() and (audio.amplitude == 1).all() and (audio.bands[:, 1] == 0).all())


# ---------------------------------------------------------------------------------------------------------------- sound


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
    found = music._equaliser(decibels, generator(4), 300)[0]
    # The same filters as a textbook writes them, one at a time.
    g = generator(4)
    low, high = (torch.tensor(side) for side in zip(*music.CENTRES, strict=True))
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
    torch.testing.assert_close(music._equaliser(torch.zeros(2, 7), generator(), 300), torch.ones(2, 300))
    shelf = music._equaliser(torch.tensor([[12.0, 0, 0, 0, 0, 0, 0]]), generator(), 1024)[0]
    assert float(shelf[0]) == pytest.approx(10**0.6, rel=1e-2)
    assert float(shelf[-1]) == pytest.approx(1, abs=1e-2)


def test_all_at_once_is_finite_and_repeatable():
    wave = 0.1 * torch.randn(40, 40 * HOP, generator=generator())
    everything = sounds(**dict.fromkeys(QUIET, 1.0))
    for view in everything.pair(40, generator(2)):
        one, two = everything.apply(wave, view), everything.apply(wave, view)
        assert one.shape == (40, 1, 92, 20)
        assert bool(one.isfinite().all())
        assert bool((one >= 0).all())
        torch.testing.assert_close(one, two)
    everything = sheets(**dict.fromkeys(STILL, 1.0))
    out = everything.apply(windows(), everything.draw(6, generator()))
    assert bool(out.isfinite().all())
    assert out.min() >= 0
    assert out.max() <= 1


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SheetRecipe(rotate=1.5), "rotate must be a probability or share, 0 to 1, got 1.5"),
        (lambda: SheetRecipe(scale=(1.1, 0.9)), "scale must be a range"),
        (lambda: SheetRecipe(scale=(0.0, 0.9)), "scale must be positive"),
        (lambda: SheetRecipe(sigma=-1), "sigma must not be negative"),
        (lambda: SheetRecipe(large_field=(3.0, 0)), "an elastic field"),
        (lambda: AudioRecipe(stretch=-0.1), "stretch must be a probability"),
        (lambda: AudioRecipe(rates=(0.0, 1.0)), "rates must be positive"),
        (lambda: AudioRecipe(snr=(9.0, 5.0)), "snr must be a range"),
        (
            lambda: AudioRecipe(masked=(0.5, 1.5)),
            r"masked must be a range of shares of the snippet, 0 to 1, got \(0.5, 1.5\)",
        ),
        (lambda: sheets().draw(0, generator()), "at least one snippet"),
        (lambda: sounds().draw(0, generator()), "at least one sound"),
        (lambda: sheets().apply(torch.zeros(2, 3, 120, 120), sheets().draw(2, generator())), "windows"),
        (
            lambda: sheets().apply(windows(2).to(torch.uint8), sheets().draw(2, generator())),
            r"of floating point, got \[2, 1, 120, 120\] torch.uint8",
        ),
        (lambda: sheets().apply(windows(3), sheets().draw(2, generator())), "of 2 windows were drawn, got 3 windows"),
        (lambda: sounds().apply(torch.zeros(3), sounds().draw(3, generator())), "waves"),
        (
            lambda: sounds().apply(torch.zeros(3, 9), sounds().draw(2, generator())),
            "of 2 sounds were drawn, got 3 sounds",
        ),
    ],
)
def test_recipes_and_inputs_out_of_range_raise_an_error(make, message):
    with pytest.raises(CounterpointError, match=message):
        make()


def test_sheet_views_are_linear_interpolation_where_they_only_move():
    # A shift by half a pixel averages neighbours.
    x = windows(2)
    out = sheets().apply(x, replace(sheets().draw(2, generator()), across=torch.full((2,), 0.5)))
    expected = F.avg_pool2d(x[:, :, 20:100, 10:111], (1, 2), 1)
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=0)
