"""Brains of nilearn's template: subjects, classes by the largest probability, faults."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data import brains
from counterpoint.data.dense import IGNORE
from counterpoint.errors import CounterpointError, DataError

needs_nilearn = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None,
    reason="nilearn is not installed: pip install --no-deps nilearn==0.14.1",
)


@needs_nilearn
def test_subjects_differ_and_their_classes_follow_the_picture():
    found = data.load("brains?train=2&valid=1&test=2&slices=5&size=32&labelled=1&seed=3")
    assert [len(split) for split in (found.train, found.valid, found.test)] == [10, 5, 10]
    assert found.test.groups.tolist() == [0] * 5 + [1] * 5
    assert found.test.spacings.tolist() == [[30, 233 / 32, 233 / 32]] * 2
    masks, pixels = found.test.masks(np.arange(10)), found.test.images(np.arange(10))[..., 0]
    assert sorted(np.unique(masks)) == [0, 1, 2]
    first, second = masks.reshape(2, 5, 32, 32)
    assert 0 < (first != second).mean() < 0.2
    middle = pixels[2].astype(float)
    means = [middle[masks[2] == number].mean() for number in range(3)]
    assert means[2] > means[1] + 20 > means[0] + 40  # white matter is brightest
    assert (found.train.masks(np.arange(5, 10)) == IGNORE).all()
    again = data.load("brains?train=2&valid=1&test=2&slices=5&size=32&labelled=1&seed=3")
    assert (again.test.images(np.arange(10))[..., 0] == pixels).all()


@needs_nilearn
def test_without_bending_the_classes_are_the_argmax_of_the_maps(monkeypatch):
    maps = brains.template()
    grey, white = maps["gm"], maps["wm"]
    either = np.stack([1 - grey - white, grey, white]).argmax(0)
    assert ((grey > 0.5) <= (either == 1)).mean() > 0.999
    assert 0.05 < (either == 1).mean() < 0.2


@pytest.mark.parametrize("options", ["train=0", "labelled=0", "labelled=13", "slices=1", "bend=-1", "seed=-1"])
def test_options_out_of_range_are_named(options):
    with pytest.raises(CounterpointError, match="brains: train and test are at least 1"):
        data.load(f"brains?{options}")


def test_a_missing_package_is_named(monkeypatch):
    brains.template.cache_clear()
    monkeypatch.setattr(brains, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps nilearn"):
        data.load("brains?train=1&test=1")
