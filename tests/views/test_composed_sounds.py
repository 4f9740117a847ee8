"""Clips of two sounds: silence, order, length, level; partners of another kind."""

from __future__ import annotations

import pytest
import torch

from counterpoint.views.sounds import at_once, in_a_row, other_kind, sounding


def sound(value: float, start: int, length: int, samples: int = 12) -> torch.Tensor:
    wave = torch.zeros(1, samples)
    wave[:, start : start + length] = value
    return wave


def test_sounds_of_unequal_length_follow_each_other_without_a_gap():
    clip = in_a_row(sounding(sound(0.3, 2, 3)), sounding(sound(0.6, 5, 4)))
    assert clip[0].tolist() == pytest.approx([0.3] * 3 + [0.6] * 4 + [0.0] * 5)
    swapped = in_a_row(sounding(sound(0.6, 5, 4)), sounding(sound(0.3, 2, 3)))
    assert swapped[0].tolist() == pytest.approx([0.6] * 4 + [0.3] * 3 + [0.0] * 5)


def test_both_sounds_are_heard_where_each_fills_the_clip():
    clip = in_a_row(sounding(sound(0.3, 0, 12)), sounding(sound(0.6, 0, 12)))
    assert clip[0].tolist() == pytest.approx([0.3] * 6 + [0.6] * 6)


def test_sums_are_scaled_down_only_where_they_exceed_1():
    loud = at_once(sounding(sound(0.9, 0, 4)), sounding(sound(0.9, 6, 2)))
    assert loud[0].tolist() == pytest.approx([1.0, 1.0, 0.5, 0.5] + [0.0] * 8)
    soft = at_once(sounding(sound(0.2, 0, 4)), sounding(sound(0.3, 6, 2)))
    assert soft[0].tolist() == pytest.approx([0.5, 0.5, 0.2, 0.2] + [0.0] * 8)


def test_a_silent_sound_lasts_nothing_and_leaves_the_other():
    silent, other = sounding(torch.zeros(1, 12)), sounding(sound(0.6, 5, 4))
    assert (int(silent.start), int(silent.length)) == (0, 0)
    assert in_a_row(silent, other)[0].tolist() == pytest.approx([0.6] * 4 + [0.0] * 8)
    assert at_once(silent, other).isfinite().all()


def test_partners_are_of_another_kind_and_every_such_item_is_drawn_alike():
    kinds, generator = torch.tensor([0, 0, 0, 1, 2]), torch.Generator().manual_seed(0)
    drawn = torch.stack([other_kind(kinds, generator) for _ in range(3000)])
    assert (kinds[drawn] != kinds).all()
    assert (drawn[:, 0] == 3).double().mean().item() == pytest.approx(0.5, abs=0.04)
    for item in (0, 1, 2, 4):
        assert (drawn[:, 3] == item).double().mean().item() == pytest.approx(0.25, abs=0.04)


def test_items_of_one_kind_have_no_partner():
    with pytest.raises(ValueError, match="kinds: all 3 items are of one kind"):
        other_kind(torch.tensor([4, 4, 4]), torch.Generator())
