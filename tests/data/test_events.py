"""Synthetic sound events: the same world at the same seed, scenes in time, errors."""

from __future__ import annotations

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data.worlds import events as world
from counterpoint.errors import CounterpointError

SMALL = "events?kinds=3&train=2&test=1"


def waves(split) -> np.ndarray:
    return split.column("audio", np.arange(len(split)))


def test_every_kind_has_its_sounds_and_its_name_as_caption():
    found = data.load(SMALL, task="aligned")
    assert found.classes == ("bang", "beep", "bick")
    assert [len(part) for part in (found.train, found.valid, found.test)] == [6, 3, 3]
    assert found.train.column("text", np.arange(6)) == [found.classes[n] for n in found.train.labels]
    sounds = waves(found.train)
    assert np.abs(sounds).max() <= 1
    for wave in sounds:
        last = np.flatnonzero(wave)[-1]
        assert 0.25 * len(wave) < last <= 0.5 * len(wave)


def test_a_seed_gives_one_world_and_another_seed_another():
    one, again, other = (waves(data.load(f"{SMALL}&seed={seed}").train) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len(np.unique(np.concatenate([waves(data.load(SMALL).train), waves(data.load(SMALL).test)]), axis=0)) == 9


def test_events_of_a_scene_follow_each_other_and_are_rendered_where_they_are():
    rng = np.random.default_rng(0)
    motifs = world.motifs(rng, 2)
    scene = world.scene(rng, [1, 0], (0.1, 0.2))
    assert [one.kind for one in scene] == [1, 0]
    assert scene[1].onset == scene[0].seconds
    alone = world.render(np.random.default_rng(1), scene[1:], motifs, 8000, 4000)
    assert not alone[: round(scene[1].onset * 8000)].any()
    assert np.abs(alone).max() > 0.05
    late = world.render(rng, (world.Event(0, 9.0, 0.1, 1.0, 0.5),), motifs, 8000, 4000)
    assert not late.any()


def test_names_differ():
    assert len(set(world.NAMES)) == len(world.NAMES) == 60


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("kinds=1", r"kinds must lie in 2..60, got 1"),
        ("kinds=61", r"kinds must lie in 2..60, got 61"),
        ("train=0", "train and test of at least 1"),
        ("noise=-1", "noise and seed of at least 0"),
        ("rate=4000", "a rate of 7000 to 48000"),
        ("seconds=0.01", "seconds of 0.1 to 10"),
        ("valid=0", "valid=0 leaves a valid split that is empty"),
    ],
)
def test_options_out_of_range_are_named(options, said):
    with pytest.raises(CounterpointError, match=said):
        data.load(f"events?{options}")
