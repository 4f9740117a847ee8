"""The world of digits: its truth and styles, and the sources made from it, whose contents claims and runs rely on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data.worlds import digits as world
from counterpoint.errors import DataError

ALL = np.arange(1797)


# --- the world


def test_parts_divide_all_digits_and_keep_the_test_split_whatever_is_valid():
    few, many = world.parts("digits", 0.2, 0.1), world.parts("digits", 0.2, 0.5)
    for parts in (few, many):
        assert np.array_equal(np.sort(np.concatenate(parts)), ALL)
        assert all(np.array_equal(part, np.sort(part)) for part in parts)
        labels = world.inventory()[1]
        shares = np.bincount(labels[parts.test]) / np.bincount(labels)
        assert np.abs(shares - 0.2).max() < 0.01
    assert np.array_equal(few.test, many.test)
    assert len(few.valid) < len(many.valid)


def test_a_scene_knows_its_digits_from_left_to_right():
    shades, labels = world.inventory()
    truth = world.scene(np.array([[3, 14], [15, 92]]))
    assert np.array_equal(truth.labels, labels[[[3, 14], [15, 92]]])
    pixels = world.intensity(truth)
    assert pixels.shape == (2, 8, 16)
    np.testing.assert_array_equal(pixels[1, :, :8], (shades[15] / 16).astype(np.float32))
    np.testing.assert_array_equal(pixels[1, :, 8:], (shades[92] / 16).astype(np.float32))
    assert world.words(np.array([[3, 7], [0, 9]])) == ["three seven", "zero nine"]


def test_styles_render_one_truth():
    truth = world.scene(np.arange(5))
    grey, flat = world.grey(truth), world.intensity(truth)
    assert (grey.dtype, grey.min(), grey.max()) == (np.uint8, 0, 255)
    np.testing.assert_allclose(grey / 255, flat, atol=0.5 / 255)
    np.testing.assert_array_equal(world.enlarged(truth, 8), grey)
    assert world.enlarged(truth, 32).shape == (5, 32, 32)
    np.testing.assert_array_equal(np.concatenate(world.halves(truth), 1), flat.reshape(5, 64))
    patterns = np.random.default_rng(0).integers(0, 256, (5, 8, 8)).astype(np.uint8)
    coloured = world.over_patterns(truth, patterns)
    np.testing.assert_array_equal(coloured[..., 0], grey)
    np.testing.assert_array_equal(coloured[..., 1], patterns)
    assert not coloured[..., 2].any()
    noise = world.noisy(world.scene(ALL), 0.15, np.random.default_rng(0)) - world.intensity(world.scene(ALL))
    assert noise.std() == pytest.approx(0.15, rel=0.01)
    assert abs(noise.mean()) < 0.002


def test_the_inventory_cannot_be_changed_by_who_reads_it():
    with pytest.raises(ValueError, match="read-only"):
        world.inventory()[0][0] = 0


def test_captions_name_the_digit_among_six_other_words():
    truth = world.scene(np.arange(50))
    for caption, label in zip(world.wordy(truth, np.random.default_rng(0)), truth.labels[:, 0], strict=True):
        words = caption.split()
        assert len(words) == len(set(words)) == 7
        assert [word for word in words if word in world.NAMES] == [world.NAMES[label]]
        assert sum(word in world.STOP for word in words) == sum(word in world.DISTRACTORS for word in words) == 3


# --- contents that are recorded in claims and runs


def contents(found):
    """Compute the SHA-256 of all that the three splits hold."""
    digest = hashlib.sha256()
    for split in (found.train, found.valid, found.test):
        rows = np.arange(len(split))
        columns = (
            [split.column(name, rows) for name in found.modalities]
            if hasattr(found, "modalities")
            else [split.images(rows)]
        )
        for column in [*columns, np.zeros(0) if split.labels is None else split.labels]:
            digest.update(
                "\n".join(column).encode() if isinstance(column, list) else np.ascontiguousarray(column).tobytes()
            )
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("spec", "task", "expected"),
    [
        ("digits", "views", "b3313e42d181f489"),
        ("digits?size=8&imbalance=10&seed=3", "views", "526a902df881ec6f"),
        ("digit-patterns?seed=4", "views", "f5f45e16dd4169b8"),
        ("digit-canvases?train=50&test=20", "views", "5e05911b8ca43ec9"),
        ("tile-canvases?train=50&test=20", "views", "1cf032334b020d7e"),
        ("digit-colours?train=50&test=20", "views", "71da308fdf538275"),
        ("digit-captions", "aligned", "1d272a0320a774a8"),
        ("digit-captions?train=100&seed=3&valid=0.2", "aligned", "25388a2d2b37b911"),
        ("digit-pairs", "aligned", "0a35e40db30dee9c"),
        ("digit-pairs?seed=5&swapped=0.4&train=300", "aligned", "88c2b5445e916643"),
        ("digit-pairs?vectors=1&seed=2", "aligned", "3613256f2a98b165"),
        ("digit-halves", "aligned", "d34353a216ae2d88"),
        ("digit-halves?whole=1&seed=1&train=500", "aligned", "63df39e007f2898c"),
    ],
)
def test_contents_are_those_that_records_were_made_with(spec, task, expected):
    assert contents(data.load(spec, task=task)) == expected


def test_styles_of_the_test_are_not_those_of_training_and_the_seed_draws_them_anew():
    found = data.load("digit-styles?size=8&noise=0")
    assert set(found.train.domains.tolist()) == set(found.test.domains.tolist()) == {0, 1, 2}
    assert set(found.shifts["unseen"].domains.tolist()) == {3, 4, 5, 6, 7}
    assert np.array_equal(found.shifts["unseen"].labels, found.test.labels)
    one = data.load("digit-styles?size=8&unseen=0-4&train=100")
    assert len(one.train) == 100
    assert set(one.train.domains.tolist()) == {1, 2, 3, 5, 6, 7}
    assert set(one.shifts["unseen"].domains.tolist()) == {0, 4}
    # A style is two colours times a smooth light: the corners of most digits are paper.
    first = np.flatnonzero(found.train.domains == 0)[:40]
    corner = found.train.images(first)[:, 0, 0].astype(int)
    assert (np.abs(corner - np.median(corner, 0)).max(1) <= 1).mean() > 0.9
    other = data.load("digit-styles?size=8&noise=0&seed=1")
    assert not np.array_equal(found.train.images(np.arange(9)), other.train.images(np.arange(9)))
    for options in ("sources=8", "styles=1", "unseen=8", "unseen=a", "unseen=0-1-2-3-4-5-6-7", "noise=-1", "train=1"):
        with pytest.raises(DataError, match="digit-styles"):
            data.load(f"digit-styles?{options}")


def test_canvases_hold_the_digits_of_their_tags_in_different_cells():
    found = data.load("digit-canvases?train=60&test=20&grid=2&least=1&most=3&noise=0")
    pixels = found.train.images(np.arange(60))[..., 0]
    assert pixels.shape == (60, 16, 16)
    cells = pixels.reshape(60, 2, 8, 2, 8).swapaxes(2, 3).reshape(60, 4, 64)
    filled = cells.any(2).sum(1)
    assert set(filled) == {1, 2, 3}
    assert bool((found.tags.train.sum(1) <= filled).all())
    assert bool((found.tags.train.sum(1) >= 1).all())
    alone = filled == 1
    known = {image.tobytes(): label for image, label in zip(*known_digits(), strict=True)}
    for own, tags in zip(cells[alone], found.tags.train[alone], strict=True):
        assert tags.tolist() == np.eye(10)[known[own.sum(0).astype(np.uint8).tobytes()]].tolist()
    other = data.load("digit-canvases?train=60&test=20", seed=1)
    assert not np.array_equal(
        other.train.images(np.arange(60)), data.load("digit-canvases?train=60").train.images(np.arange(60))
    )
    with pytest.raises(DataError, match="least <= most <= cells"):
        data.load("digit-canvases?grid=1&most=2")


def test_tiles_are_a_digit_in_its_cell_and_textures_elsewhere_each_in_a_colour():
    rng = np.random.default_rng(0)
    truth, pool, cells = world.scene(np.arange(12)), world.textures(3, rng), rng.integers(0, 4, 12)
    shades = np.sort(world.inventory()[0].reshape(-1, 64), 1)
    assert all(bool((np.sort(texture.ravel()) == shades).all(1).any()) for texture in pool)  # the shades of a digit
    pixels = world.tiles(truth, pool, cells, 2, 0.0, rng).astype(float)
    tiles = pixels.reshape(12, 2, 8, 2, 8, 3).swapaxes(2, 3).reshape(12, 4, 64, 3)

    def cosine(tile, pattern):
        return float(tile @ pattern.ravel() / np.linalg.norm(tile) / np.linalg.norm(pattern))

    for picture, number, cell in zip(tiles, truth.numbers[:, 0], cells, strict=True):
        for at, tile in enumerate(picture):
            wanted = [world.inventory()[0][number]] if at == cell else list(pool)
            for channel in tile.T:
                assert max(cosine(channel, pattern) for pattern in wanted) > 0.999
    colours = tiles.max(2)
    assert 0.3 * 255 * 15 / 16 - 1 < colours.min() < 120 < colours.max() <= 255


def test_tile_canvases_have_the_classes_that_they_name_and_change_with_the_seed():
    found = data.load("tile-canvases?train=40&test=20&kinds=3&grid=2")
    assert found.classes == ("zero", "one", "two")
    assert set(found.train.labels) == {0, 1, 2}
    assert found.train.images(np.arange(40)).shape == (40, 16, 16, 3)
    other = data.load("tile-canvases?train=40&test=20&kinds=3&grid=2", seed=1)
    assert not np.array_equal(other.train.images(np.arange(40)), found.train.images(np.arange(40)))
    with pytest.raises(DataError, match="kinds 2 to 10"):
        data.load("tile-canvases?kinds=11")


def known_digits():
    shades, labels = world.inventory()
    return np.rint(shades * (255 / world.SHADES)).astype(np.uint8).reshape(-1, 64), labels


def test_colours_are_three_digits_of_which_two_are_the_class():
    found = data.load("digit-colours?train=60&test=20&size=8&seed=1")
    assert len(found.classes) == 100
    assert found.classes[37] == "three seven"
    assert (len(found.train), len(found.valid), len(found.test)) == (60, 20, 20)
    labels = world.inventory()[1]
    all_digits = world.enlarged(world.scene(np.arange(len(labels))), 8)
    numbers = {one.tobytes(): int(label) for one, label in zip(all_digits, labels, strict=True)}
    pictures = found.train.images(np.arange(60))
    for picture, label in zip(pictures, found.train.labels, strict=True):
        red, green, blue = (numbers[np.ascontiguousarray(picture[..., channel]).tobytes()] for channel in range(3))
        assert label == 10 * red + green
        assert 0 <= blue < 10
    assert not np.array_equal(pictures, data.load("digit-colours?train=60&test=20&size=8").train.images(np.arange(60)))
    for options in ("train=1", "held_out=1"):
        with pytest.raises(DataError, match="digit-colours"):
            data.load(f"digit-colours?{options}")
