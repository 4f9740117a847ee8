"""The user's own volumes: slices, masks, spacing, orientation, and all their faults."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from counterpoint import cli
from counterpoint.data.dense import IGNORE, labelled_rows
from counterpoint.data.volumes import load
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError


def save(path: Path, values: np.ndarray, spacing: tuple[float, float, float] = (1, 1, 1), flip: bool = False) -> None:
    """Write a volume; `flip` stores its first axis from right to left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    if flip:
        values, affine[0, 0] = values[::-1], -spacing[0]
        affine[0, 3] = spacing[0] * (len(values) - 1)
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_zooms(spacing[: values.ndim] if values.ndim == 3 else (*spacing, 1))
    nibabel.save(image, path)


def scan(seed: int, shape: tuple[int, int, int] = (16, 16, 6)) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume with a bright corner (left, back, feet) of class 1, and its mask."""
    mask = np.zeros(shape, np.int16)
    mask[: shape[0] // 2, : shape[1] // 2, : shape[2] // 2] = 1
    noise = np.random.default_rng(seed).normal(0, 2, shape)
    return (mask * 100 + 50 + noise).astype(np.float32), mask


def folder(root: Path, count: int = 8, names: tuple[str, str] = ("images", "masks")) -> Path:
    for n in range(count):
        volume, mask = scan(n)
        save(root / names[0] / f"{n}.nii.gz", volume)
        save(root / names[1] / f"{n}.nii.gz", mask)
    return root


@pytest.mark.parametrize("names", [("images", "masks"), ("imagesTr", "labelsTr")])
def test_slices_follow_each_other_with_their_masks(tmp_path, names):
    found = load(str(folder(tmp_path, names=names)), size=8)
    assert [len(split) for split in (found.train, found.valid, found.test)] == [4 * 6, 2 * 6, 2 * 6]
    assert found.test.groups.tolist() == [0] * 6 + [1] * 6
    assert found.regions == ("0", "1")
    masks = found.test.masks(np.arange(12))
    assert (masks.reshape(2, 6, -1).max(2) == [1, 1, 1, 0, 0, 0]).all()  # feet first
    # Left is left, and the front is up: the corner at the back is at the bottom.
    assert masks[0, 6, 1] == 1
    assert masks[0, 1, 1] == masks[0, 6, 6] == 0
    pixels = found.test.images(np.arange(3))
    assert pixels[0][masks[0] == 1].mean() > pixels[0][masks[0] == 0].mean() + 100


def test_orientation_of_the_file_does_not_matter(tmp_path):
    plain = load(str(folder(tmp_path / "a")), size=8)
    for n in range(8):
        volume, mask = scan(n)
        save(tmp_path / "b" / "images" / f"{n}.nii.gz", volume, flip=True)
        save(tmp_path / "b" / "masks" / f"{n}.nii.gz", mask, flip=True)
    turned = load(str(tmp_path / "b"), size=8)
    rows = np.arange(12)
    assert (turned.test.images(rows) == plain.test.images(rows)).all()
    assert (turned.test.masks(rows) == plain.test.masks(rows)).all()


def test_uneven_spacing_is_resampled_and_missing_spacing_is_named(tmp_path):
    for n in range(8):
        volume, mask = scan(n, (32, 16, 6))  # twice as many voxels across, half as wide
        save(tmp_path / "images" / f"{n}.nii.gz", volume, (0.5, 1, 4))
        save(tmp_path / "masks" / f"{n}.nii.gz", mask, (0.5, 1, 4))
    found = load(str(tmp_path), size=16)
    assert any("8 volumes have slices of uneven spacing" in note for note in found.notes)
    mask = found.test.masks(np.array([0]))[0]
    assert mask.sum() == pytest.approx(64, abs=8)  # a quarter of the square
    assert found.test.spacings.tolist() == [[4, 1, 1]] * 2  # 16 mm in 16 pixels


def edited(path: Path, values: tuple[float, float, float], form: int = 0) -> None:
    """Write spacings into a header as they are, and the code of both transforms."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[80:92] = struct.pack("<3f", *values)
    raw[252:256] = struct.pack("<2h", 0, form)
    path.write_bytes(gzip.compress(bytes(raw)))


def test_headers_without_a_spacing_are_named_and_taken_as_1_mm(tmp_path, capfd):
    for n in range(8):
        volume, mask = scan(n)
        save(tmp_path / "images" / f"{n}.nii.gz", volume, (2, 2, 2))
        save(tmp_path / "masks" / f"{n}.nii.gz", mask, (2, 2, 2))
    edited(tmp_path / "images" / "0.nii.gz", (0, 0, 0))
    edited(tmp_path / "images" / "1.nii.gz", (0, 0, 0), form=1)  # the transform has the spacing
    edited(tmp_path / "images" / "2.nii.gz", (float("nan"), 2, 2))
    found = load(str(tmp_path), size=16)
    (note,) = [note for note in found.notes if "no spacing" in note]
    assert "0.nii.gz" in note
    assert [Path(line.file).name for line in found.accounts.lines if line.what == "changed"] == ["0.nii.gz"]
    left = {Path(line.file).parent.name: line.reason for line in found.accounts.left("files")}
    assert left["images"].startswith("has a spacing in its header that is not a number")
    spacings = np.concatenate([split.spacings for split in (found.train, found.valid, found.test)])
    assert sorted(spacings[:, 0].tolist()) == [1, 2, 2, 2, 2, 2, 2]
    assert capfd.readouterr().err == ""


def test_masks_with_numbers_without_a_name_are_listed(tmp_path):
    folder(tmp_path)
    _, mask = scan(3)
    save(tmp_path / "masks" / "3.nii.gz", mask * 5)
    found = load(str(tmp_path), size=8, classes="ground,corner")
    assert any(
        "numbers 5 have no name" in note and "in 1 mask, " in note and "3.nii.gz" in note for note in found.notes
    )


def test_a_single_volume_is_refused_by_the_name_of_its_set(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path.name}: 1 item cannot be split"):
        load(str(folder(tmp_path, count=1)), size=8)


@pytest.mark.parametrize("axis", [0, 1])
def test_other_axes_give_other_slices(tmp_path, axis):
    found = load(str(folder(tmp_path)), size=8, axis=axis)
    assert len(found.test) == 2 * 16


def test_few_labels_hide_the_masks_of_other_training_volumes(tmp_path):
    folder(tmp_path)
    volume, _ = scan(50)
    save(tmp_path / "images" / "bare.nii.gz", volume)
    found = load(str(tmp_path), size=8, labelled=1)
    assert len(found.train) == 5 * 6
    assert len(labelled_rows(found.train)) == 6
    assert any("1 volume has no mask" in note for note in found.notes)


def test_faulty_files_are_left_out_and_listed(tmp_path):
    folder(tmp_path)
    volume, mask = scan(60)
    save(tmp_path / "images" / "shape.nii.gz", volume)
    save(tmp_path / "masks" / "shape.nii.gz", mask[:8])
    save(tmp_path / "images" / "four.nii.gz", np.zeros((4, 4, 4, 3), np.float32))
    save(tmp_path / "images" / "part.nii.gz", volume)
    save(tmp_path / "masks" / "part.nii.gz", mask.astype(np.float32) * 0.5)
    save(tmp_path / "images" / "nan.nii.gz", volume * np.nan)
    (tmp_path / "images" / "broken.nii.gz").write_bytes(b"x")
    save(tmp_path / "masks" / "broken.nii.gz", mask)
    save(tmp_path / "masks" / "orphan.nii.gz", mask)
    (tmp_path / "readme.txt").write_text("x")
    found = load(str(tmp_path), size=8)
    assert found.accounts.missing() == {}
    listed = {
        Path(line.file).parent.name + "/" + Path(line.file).name: line.reason for line in found.accounts.left("files")
    }
    assert listed["masks/shape.nii.gz"] == "has 8 x 16 x 6 voxels, its image 16 x 16 x 6"
    assert "has 4 axes" in listed["images/four.nii.gz"]
    assert "fractions" in listed["masks/part.nii.gz"]
    assert "not numbers" in listed["images/nan.nii.gz"]
    assert "cannot be read" in listed["images/broken.nii.gz"] or "can be read" in listed["images/broken.nii.gz"]
    assert listed["masks/broken.nii.gz"] == "its image cannot be read"
    assert listed["masks/orphan.nii.gz"] == "a mask without an image"
    # The volumes of faulty masks are kept without labels.
    assert len(found.train) == (4 + 2) * 6


def test_numbers_without_a_name_count_as_unknown(tmp_path):
    folder(tmp_path)
    for n in range(8):
        _, mask = scan(n)
        save(tmp_path / "masks" / f"{n}.nii.gz", mask * 5)
    found = load(str(tmp_path), size=8, classes="ground,organ")
    assert set(np.unique(found.test.masks(np.arange(12)))) == {0, IGNORE}
    assert any("numbers 5 have no name" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"axis": 3}, "axis is 0, 1 or 2"), ({"labelled": 0}, "labelled"), ({"masks": "x"}, "no volume has a mask")],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(CounterpointError, match=message):
        load(str(folder(tmp_path)), size=8, **options)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        load(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no volume can be read"):
        load(str(tmp_path / "empty"))


def test_global_local_trains_on_it_from_the_command_line(tmp_path):
    folder(tmp_path)
    words = ["train", "global-local-seg", "--data", f"volumes:{tmp_path}?size=16&labelled=1", "--encoder", "unet-s"]
    words += ["--epochs", "1", "--global-epochs", "1", "--local-epochs", "1", "--steps", "2", "--blocks", "1"]
    words += ["--pretrain-batch", "8", "--hidden", "8", "--out", str(tmp_path / "runs"), "--name", "run"]
    assert cli.main(words) == 0
    assert "test/dice" in Run.open(tmp_path / "runs" / "run").metrics()[-1]
