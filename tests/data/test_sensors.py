"""The source `sensors`: four views of the same scenes, their sentences, the same as aligned data."""

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data.dense import ArrayScenes, DenseData, aligned_scenes, sentences
from counterpoint.errors import CounterpointError, DataError

SMALL = "sensors?train=30&test=10&size=24"


@pytest.fixture(scope="module")
def drawn():
    return data.load(SMALL)


def test_every_sensor_sees_the_scene_and_masks_name_its_classes(drawn):
    rows = np.arange(30)
    masks = drawn.train.masks(rows)
    assert drawn.regions[0] == "road"
    assert set(np.unique(masks)) == set(range(6))
    assert drawn.modalities == ("rgb", "depth", "event", "lidar")
    depth, lidar = (drawn.train.modality(name, rows)[..., 0].astype(float) for name in ("depth", "lidar"))
    assert 0.03 < (lidar > 0).mean() < 0.07
    assert np.abs(lidar - depth)[lidar > 0].max() <= 1  # points of the same depth
    # Trees and walls are higher than balls.
    assert depth[np.isin(masks, (1, 4))].mean() > depth[masks == 5].mean() + 40


def test_a_share_of_the_scenes_is_at_night(drawn):
    def nights(spec):
        light = data.load(spec).train.images(np.arange(30)).mean((1, 2, 3))
        return (light < 20).mean()

    assert nights(f"{SMALL}&night=0") == 0
    assert nights(f"{SMALL}&night=1") == 1
    assert 0 < nights(SMALL) < 0.6


def test_seed_decides_the_scenes(drawn):
    rows = np.arange(5)
    again, other = data.load(SMALL), data.load(f"{SMALL}&seed=1")
    for name in drawn.modalities:
        assert np.array_equal(again.train.modality(name, rows), drawn.train.modality(name, rows))
    assert not np.array_equal(other.train.masks(rows), drawn.train.masks(rows))


def test_captions_name_the_visible_classes(drawn):
    for row, caption in enumerate(drawn.train.captions):
        seen = set(np.unique(drawn.train.masks(np.array([row])))) - {0}
        said = {
            n
            for n, name in enumerate(drawn.regions)
            if n and (name in caption or (name == "person" and "people" in caption))
        }
        assert said == seen
        assert caption.startswith("a road")


def test_aligned_form_has_the_sensors_and_the_captions():
    drawn, aligned = data.load(SMALL), data.load(SMALL, task="aligned")
    rows = np.arange(4)
    assert list(aligned.modalities) == ["rgb", "depth", "event", "lidar", "text"]
    assert np.array_equal(aligned.test.column("event", rows), drawn.test.modality("event", rows))
    assert aligned.test.column("text", rows) == drawn.test.captions[:4]


def test_scenes_without_captions_get_sentences_from_their_masks():
    masks = np.zeros((3, 8, 8), np.uint8)
    masks[0, 0] = 2
    masks[1] = 255
    split = ArrayScenes(np.zeros((3, 8, 8, 3), np.uint8), masks)
    assert sentences(split, ("road", "tree", "car")) == ["a scene with road and car", "a scene", "a scene with road"]


def test_items_that_lack_a_modality_lack_it_in_the_aligned_form():
    there = np.array([True, False, True])
    pixels = {name: np.zeros((3, 8, 8, 3), np.uint8) for name in ("a", "b")}
    split = ArrayScenes(pixels, np.zeros((3, 8, 8), np.uint8), present={"b": there})
    found = aligned_scenes(DenseData("mine", split, split, split, (), 8, regions=("x", "y"), modalities=("a", "b")))
    assert np.array_equal(found.train.present("b", np.arange(3)), there)
    text = DenseData("mine", split, split, split, (), 8, regions=("x", "y"), modalities=("a", "text"))
    with pytest.raises(DataError, match="has the name text"):
        aligned_scenes(text)


@pytest.mark.parametrize("option", ["train=1", "night=1.5", "points=0", "labelled=0", "seed=-1"])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(CounterpointError, match="sensors: train and test"):
        data.load(f"sensors?{option}")
