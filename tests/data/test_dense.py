"""Pictures with masks: the world of shapes, and the user's own folders with all their faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterpoint import data
from counterpoint.data.dense import IGNORE, ArrayScenes, DenseSplit, labelled_rows
from counterpoint.data.masks import load
from counterpoint.data.worlds import shapes as world
from counterpoint.errors import CounterpointError, DataError

# ---------------------------------------------------------------------------------------------------- the world of shapes


def test_masks_and_boxes_are_those_of_the_rendered_objects():
    rng = np.random.default_rng(0)
    for _ in range(10):
        truth = world.scene(rng)
        pixels, owner = world.render(truth, 48, rng)
        assert (pixels[owner == 0] == np.rint(truth.background)).all()
        mask = world.mask(truth, owner, "shape")
        found = world.boxes(truth, owner, "shape")
        for corners, label, number in zip(*found, strict=True):
            left, top, right, bottom = corners.astype(int)
            own = owner == number
            assert own[top:bottom, left:right].sum() == own.sum()
            assert own[top, left:right].any()
            assert own[bottom - 1, left:right].any()
            assert own[top:bottom, left].any()
            assert own[top:bottom, right - 1].any()
            assert (mask[own] == label).all()


def test_same_seed_gives_the_same_set_and_another_seed_another():
    one, same, other = (data.load("shapes?train=6&test=4", seed=seed) for seed in (0, 0, 1))
    rows = np.arange(6)
    assert (one.train.images(rows) == same.train.images(rows)).all()
    assert (one.train.images(rows) != other.train.images(rows)).any()
    assert isinstance(one.train, DenseSplit)
    assert one.regions == ("background", "stripes", "checks", "dots", "noise")


def test_pictures_beyond_the_labelled_ones_have_no_known_pixel():
    found = data.load("shapes?train=8&test=4&labelled=3")
    assert labelled_rows(found.train).tolist() == [0, 1, 2]
    assert (found.train.masks(np.array([3, 7])) == IGNORE).all()


def test_captions_name_each_object():
    found = data.load("shapes?train=6&test=4&least=3&most=3", task="aligned")
    texts = found.train.column("text", np.arange(6))
    assert all(text.count(",") == 1 and " and " in text for text in texts)


@pytest.mark.parametrize("options", ["by=colour", "least=0", "least=5", "labelled=0", "train=1", "size=4", "seed=-1"])
def test_options_of_shapes_out_of_range_are_refused(options):
    with pytest.raises(CounterpointError):
        data.load(f"shapes?train=4&test=2&{options}" if "train" not in options else f"shapes?{options}")


@pytest.mark.parametrize(
    ("masks", "message"),
    [(np.zeros((2, 8, 8), np.int64), "masks must be uint8"), (np.zeros((2, 8, 7), np.uint8), "masks must be uint8")],
)
def test_arrays_of_another_shape_are_refused(masks, message):
    with pytest.raises(DataError, match=message):
        ArrayScenes(np.zeros((2, 8, 8, 3), np.uint8), masks)


# --------------------------------------------------------------------------------------------------------- the user's own


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> None:
    """Write a picture of this width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def mask(path: Path, values: np.ndarray, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "P":
        image = Image.fromarray(values.astype(np.uint8), "L").convert("P")
        image = Image.frombytes("P", image.size, values.astype(np.uint8).tobytes())
        image.putpalette([value % 256 for value in range(30, 798)])
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    else:
        image = Image.fromarray(values.astype(np.uint8), "L").convert(mode)
    image.save(path)


def halves(number: int = 1) -> np.ndarray:
    """Return a mask of 16 rows and 20 columns whose right half has a class."""
    found = np.zeros((16, 20), int)
    found[:, 10:] = number
    return found


def folder(root: Path, count: int = 10, number: int = 1, mode: str = "L") -> Path:
    for n in range(count):
        picture(root / "images" / f"{n}.png", n)
        mask(root / "masks" / f"{n}.png", halves(number), mode)
    return root


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_masks_are_read_as_numbers_whatever_their_mode(tmp_path, mode):
    found = load(str(folder(tmp_path, mode=mode)), size=8)
    assert found.regions == ("0", "1")
    assert [len(split) for split in (found.train, found.valid, found.test)] == [6, 2, 2]
    seen = found.test.masks(np.arange(2))
    assert (seen[:, :, :4] == 0).all()
    assert (seen[:, :, 4:] == 1).all()


def test_numbers_of_sixteen_bits_become_classes_in_their_order(tmp_path):
    folder(tmp_path, number=1000, mode="I;16")
    found = load(str(tmp_path), size=8)
    assert found.regions == ("0", "1000")
    assert set(np.unique(found.train.masks(np.arange(6)))) == {0, 1}


def test_masks_are_cut_as_their_pictures_and_never_interpolated(tmp_path):
    """A picture that shows its mask's classes as shades still shows them after both became squares."""
    rng = np.random.default_rng(0)
    for n in range(10):
        blocks = rng.integers(0, 4, (4, 5)).repeat(8, 0).repeat(8, 1)  # 32 rows, 40 columns
        mask(tmp_path / "masks" / f"{n}.png", blocks)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray((blocks * 60).astype(np.uint8)).convert("RGB").save(tmp_path / "images" / f"{n}.png")
    found = load(str(tmp_path), size=16)
    rows = np.arange(len(found.train))
    assert set(np.unique(found.train.masks(rows))) <= {0, 1, 2, 3}
    shades = found.train.images(rows)[..., 0] / 60
    assert np.abs(shades - found.train.masks(rows)).max() < 1  # bilinear at edges
    assert (np.rint(shades) == found.train.masks(rows)).mean() > 0.95


def test_named_splits_and_classes_are_used(tmp_path):
    for split, start in (("train", 0), ("val", 10), ("test", 20)):
        for n in range(start, start + 4):
            picture(tmp_path / split / "images" / f"{n}.jpg", n)
            mask(tmp_path / split / "masks" / f"{n}.png", halves())
    (tmp_path / "classes.txt").write_text("ground\nroad\ntree\n")
    found = load(str(tmp_path), size=8)
    assert found.regions == ("ground", "road", "tree")
    assert [len(split) for split in (found.train, found.valid, found.test)] == [4, 4, 4]
    assert all("test" in name for name in found.test.row_names(np.arange(4)))


def test_splits_below_the_folders_of_kinds_are_found(tmp_path):
    for split, start in (("train", 0), ("test", 20)):
        for n in range(start, start + 8):
            picture(tmp_path / "JPEGImages" / split / f"{n}.jpg", n)
            mask(tmp_path / "SegmentationClass" / split / f"{n}.png", halves())
    found = load(str(tmp_path), size=8)
    assert len(found.test) == 8
    assert len(found.train) + len(found.valid) == 8


def test_binary_masks_of_0_and_255_have_a_foreground(tmp_path):
    folder(tmp_path, number=255)
    found = load(str(tmp_path), size=8)
    assert found.regions == ("background", "foreground")
    assert (found.test.masks(np.arange(2))[:, :, 4:] == 1).all()
    assert any("255 is class 1" in note for note in found.notes)


def test_ignored_pixels_are_unknown(tmp_path):
    folder(tmp_path, number=7)
    found = load(str(tmp_path), size=8, ignore=7, classes="a,b")
    seen = found.test.masks(np.arange(2))
    assert (seen[:, :, 4:] == IGNORE).all()
    assert (seen[:, :, :4] == 0).all()


def test_numbers_without_a_name_count_as_unknown_and_are_listed(tmp_path):
    folder(tmp_path, number=5)
    found = load(str(tmp_path), size=8, classes="ground,road")
    assert (found.test.masks(np.arange(2))[:, :, 4:] == IGNORE).all()
    (note,) = [note for note in found.notes if "numbers 5 have no name" in note]
    assert "in 10 masks, first" in note
    assert "0.png" in note
    assert {line.what for line in found.accounts.lines} == {"changed"}
    assert found.accounts.left("files") == []


def test_a_number_far_above_all_others_is_named_with_its_file(tmp_path):
    folder(tmp_path)
    mask(tmp_path / "masks" / "3.png", halves(200))
    found = load(str(tmp_path), size=8)
    (note,) = [note for note in found.notes if "but 200 is in" in note]
    assert "no mask has a number from 2 to 199" in note
    assert "3.png" in note
    assert not any("no mask has a number" in note for note in load(str(folder(tmp_path / "b")), size=8).notes)


def test_faulty_files_are_left_out_and_listed(tmp_path):
    folder(tmp_path)
    picture(tmp_path / "images" / "other.png", 50)
    mask(tmp_path / "masks" / "other.png", np.zeros((8, 8)))
    mask(tmp_path / "masks" / "orphan.png", halves())
    picture(tmp_path / "images" / "coloured.png", 51)
    Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(tmp_path / "masks" / "coloured.png")
    picture(tmp_path / "images" / "broken.png", 52)
    (tmp_path / "masks" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "images" / "notes.txt").write_text("x")
    found = load(str(tmp_path), size=8)
    assert sum(len(split) for split in (found.train, found.valid, found.test)) == 10
    listed = {Path(line.file).name: line.reason for line in found.accounts.left("files")}
    assert listed["other.png"].startswith("has 8 x 8 pixels, its picture 20 x 16")
    assert listed["orphan.png"] == "a mask without a picture"
    assert "colours" in listed["coloured.png"]
    assert "not a mask that can be read" in listed["broken.png"]
    assert listed["notes.txt"] == "not a picture by its ending"
    assert found.accounts.missing() == {}


def test_pictures_without_a_mask_or_with_unknown_pixels_alone_are_for_training(tmp_path):
    folder(tmp_path)
    for n in range(20, 24):
        picture(tmp_path / "images" / f"{n}.png", n)
    picture(tmp_path / "images" / "empty.png", 60)
    mask(tmp_path / "masks" / "empty.png", np.full((16, 20), 255))
    found = load(str(tmp_path), size=8)
    assert len(found.train) == 6 + 5
    assert len(labelled_rows(found.train)) == 6
    assert any("4 pictures have no mask" in note for note in found.notes)
    assert any("no pixel of known class in 1 mask" in note and "empty.png" in note for note in found.notes)


def test_masks_follow_pictures_that_metadata_turn(tmp_path):
    folder(tmp_path)
    upright = np.zeros((20, 16, 3), np.uint8)  # as seen: 20 rows, 16 columns, the lower half bright
    upright[10:] = 255
    stored = np.rot90(upright, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "images" / "turned.png", exif=exif)
    seen = (upright[..., 0] > 0).astype(int)
    mask(tmp_path / "masks" / "turned.png", np.ascontiguousarray(np.rot90(seen, 1)))
    found = load(str(tmp_path), size=8)
    for split in (found.train, found.valid, found.test):
        for n, name in enumerate(split.row_names(np.arange(len(split)))):
            if name.endswith("turned.png"):
                pixels, classes = split.images(np.array([n]))[0, ..., 0], split.masks(np.array([n]))[0]
                assert ((pixels > 128) == (classes == 1)).all()
                return
    raise AssertionError("the turned picture was left out")


def test_modalities_lie_side_by_side_and_may_be_missing(tmp_path):
    for n in range(10):
        picture(tmp_path / "rgb" / f"{n}.png", n)
        if n != 3:
            picture(tmp_path / "depth" / f"{n}.png", 100 + n)
        mask(tmp_path / "labels" / f"{n}.png", halves())
    found = load(str(tmp_path), size=8, modalities="depth,rgb")
    assert found.modalities == ("depth", "rgb")
    everything = [(split, n) for split in (found.train, found.valid, found.test) for n in range(len(split))]
    assert sum(bool(split.present("depth")[n]) for split, n in everything) == 9
    lacking = [split.modality("depth", np.array([n])) for split, n in everything if not split.present("depth")[n]]
    assert (lacking[0] == 0).all()
    assert any("1 of 10 items lack the modality depth" in note for note in found.notes)
    assert [line.reason for line in found.accounts.lines] == ["its item lacks the modality depth"]
    first = found.train.images(np.array([0]))
    assert (first == found.train.modality("depth", np.array([0]))).all()


def test_equal_pictures_stay_in_one_split(tmp_path):
    folder(tmp_path, count=12)
    for n in range(12, 16):
        picture(tmp_path / "images" / f"{n}.png", 0)  # copies of the first picture
        mask(tmp_path / "masks" / f"{n}.png", halves())
    found = load(str(tmp_path), size=8)
    first = found.train.images(np.arange(len(found.train)))
    for split in (found.valid, found.test):
        for held in split.images(np.arange(len(split))):
            assert not (first == held).all((1, 2, 3)).any()


def test_large_sets_are_read_on_demand_and_name_a_file_that_breaks(tmp_path, monkeypatch):
    whole = load(str(folder(tmp_path)), size=8)
    monkeypatch.setattr("counterpoint.data.masks.KEEP", 0)
    found = load(str(tmp_path), size=8)
    rows = np.arange(len(found.test))
    for name, pixels in zip(found.test.row_names(rows), found.test.images(rows), strict=True):
        at = whole.test.row_names(rows).index(name) if name in whole.test.row_names(rows) else None
        assert at is None or (pixels == whole.test.images(np.array([at]))[0]).all()
    path = Path(found.test.row_names(np.array([0]))[0])
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"{path.name}: is empty .* repair it"):
        found.test.images(np.array([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": "images,depth"}, "no pictures of the modality depth"),
        ({"modalities": "images,images"}, "names a folder twice"),
        ({"images": "photos"}, "no pictures below a folder photos"),
        ({"test": "holdout"}, "has no split 'holdout'"),
        ({"test": "1.5"}, "must be a fraction"),
        ({"background": 2}, "background is 0 or 1"),
        ({"ignore": 0, "classes": "a"}, "at least two"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(CounterpointError, match=message):
        load(str(folder(tmp_path)), size=8, **options)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        load(str(tmp_path / "none"))
