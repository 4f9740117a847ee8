"""Properties of the views of sheet music and of sound: draws, shares of a batch, types, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from made_music import QUIET, STILL, generator, sheets, sounds, windows

from counterpoint.errors import CounterpointError
from counterpoint.views.music import AUDIO_PAIRED, HOP, SHEET_PAIRED, AudioRecipe, AudioViews, SheetRecipe, SheetViews


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
