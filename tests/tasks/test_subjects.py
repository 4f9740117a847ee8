"""Measures of subjects' codes, and frames that are drawn of a subject."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.tasks.branches import Partners
from counterpoint.tasks.measures.subjects import picture_error, subject_measures

SUBJECTS, SCENES = torch.arange(12).repeat_interleave(4), torch.arange(4).repeat(12)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_of_the_subject_are_pure_and_codes_of_the_scene_are_not():
    identity, scene = draw(0, 12, 16)[SUBJECTS], draw(1, 4, 16)[SCENES]
    pure = subject_measures(identity + 0.01 * draw(2, 48, 16), identity, SUBJECTS, SCENES)
    mixed = subject_measures(scene + 0.01 * draw(2, 48, 16), identity, SUBJECTS, SCENES)
    assert pure["identity_purity"] == 1.0
    assert pure["nuisance_probe"] < 0.6
    assert pure["similarity_rank"] > 0.99
    assert mixed["identity_purity"] < 0.3
    assert mixed["nuisance_probe"] == 1.0
    assert abs(mixed["similarity_rank"]) < 0.2


def test_measures_that_the_data_do_not_allow_are_left_out():
    x = draw(0, 4, 3)
    alone = subject_measures(x, x, torch.zeros(4, dtype=torch.int64), torch.full((4,), -1))
    assert alone == {"identity_purity": 1.0}


def test_the_error_of_pictures_is_a_share_of_full_intensity():
    real = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    fake = real.clone()
    fake[0] = 255
    assert picture_error(fake, real) == pytest.approx(0.5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=20), st.integers(0, 50))
def test_two_frames_of_an_item_are_as_different_as_its_subject_allows(kinds, seed):
    rows = torch.arange(len(kinds))
    drawn = torch.rand(len(kinds), 2, generator=torch.Generator().manual_seed(seed))
    first, second = Partners(torch.tensor(kinds)).two_of(rows, drawn)
    for row, a, b in zip(rows.tolist(), first.tolist(), second.tolist(), strict=True):
        assert kinds[a] == kinds[b] == kinds[row]
        many = kinds.count(kinds[row]) if kinds[row] >= 0 else 1
        assert len({row, a, b}) == min(many, 3)
        assert (a != b) == (many > 1)
