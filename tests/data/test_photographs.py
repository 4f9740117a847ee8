"""The source `photographs`: squares that share no pixel, drawn anew by the seed."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data.photographs import LARGEST, inventory, tiles
from counterpoint.errors import CounterpointError


@pytest.mark.parametrize("size", [40, 96, 128, 150, LARGEST])
def test_no_two_squares_share_a_pixel_and_every_split_has_both_photographs(size: int) -> None:
    for seed in range(3):
        seen = np.zeros(inventory().shape[:3], int)
        places = tiles(size, seed)
        for n, top, left, _ in places:
            assert seen[n, top : top + size, left : left + size].shape == (size, size)
            seen[n, top : top + size, left : left + size] += 1
        assert seen.max() == 1
        assert {(tile.split, tile.photograph) for tile in places} == {
            (split, n) for split in ("train", "valid", "test") for n in (0, 1)
        }


def test_a_seed_gives_its_squares_and_another_one_others() -> None:
    one, again, other = (data.load("photographs?size=96", seed=seed) for seed in (1, 1, 2))
    assert [len(split) for split in (one.train, one.valid, one.test)] == [24, 8, 8]
    pixels = [found.train.images(np.arange(24)) for found in (one, again, other)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])

    assert len({tile.left % 128 for seed in range(9) for tile in tiles(96, seed)}) > 3
    assert one.test.labels is not None
    assert one.test.labels.tolist() == [0] * 4 + [1] * 4
    first = next(tile for tile in tiles(96, 1) if tile.split == "train")
    assert np.array_equal(pixels[0][0], inventory()[first.photograph, first.top : first.top + 96, first.left :][:, :96])


@pytest.mark.skipif(find_spec("arcade") is None, reason="draws with the package arcade: pip install --no-deps arcade")
def test_sprites_double_every_split() -> None:
    found = data.load("photographs?size=213&sprites=1")
    assert found.classes == ("china", "flower", "sprites")
    assert [len(split) for split in (found.train, found.valid, found.test)] == [8, 8, 8]
    assert found.test.labels is not None
    assert found.test.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("options", ["size=7", "size=214", "sprites=2", "seed=-1"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(CounterpointError, match=options.partition("=")[0]):
        data.load(f"photographs?{options}")
