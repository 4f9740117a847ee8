"""The user's own pictures with boxes in COCO's layout: two domains, their proposals, and all their faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from counterpoint import cli
from counterpoint.data.coco import load
from counterpoint.data.coco_scenes import load_scenes
from counterpoint.data.dense import IGNORE
from counterpoint.data.regions import SOURCE, TARGET, UNKNOWN, RegionSplit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment


def scene(root: Path, count: int = 8, grey: int = 120) -> tuple[Path, dict[str, Any]]:
    """Write pictures with a red and a green square; return the file and its content."""
    root.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7, "name": "red"}, {"id": 3, "name": "green"}],
    }
    for n in range(count):
        pixels = np.full((40, 80, 3), grey, np.uint8)
        pixels[4:20, 4 + n : 20 + n] = (200, 30, 30)
        pixels[20:36, 50:66] = (30, 200, 30)
        Image.fromarray(pixels).save(root / f"{n}.png")
        found["images"].append({"id": n + 1, "file_name": f"{n}.png", "width": 80, "height": 40})
        for kind, box in ((7, [4 + n, 4, 16, 16]), (3, [50, 20, 16, 16])):
            found["annotations"].append(
                {"id": len(found["annotations"]) + 1, "image_id": n + 1, "category_id": kind, "bbox": box}
            )
    return written(root, found), found


def written(root: Path, content: dict[str, Any]) -> Path:
    (root / "boxes.json").write_text(json.dumps(content))
    return root / "boxes.json"


def test_pictures_are_scaled_with_their_boxes_and_domains_are_apart(tmp_path):
    source, _ = scene(tmp_path / "a")
    target, _ = scene(tmp_path / "b", 10, grey=40)
    found = load(str(source), target=str(target), size=40, proposals=20)
    assert found.classes == ("green", "red")  # in the order of their ids
    assert isinstance(found.train, RegionSplit)
    assert (found.train.domains == SOURCE).sum() == 8
    assert (found.train.domains == TARGET).sum() + len(found.valid) + len(found.test) == 10
    pixels = found.train.images(np.array([0]))[0]
    assert (pixels[22:] == 128).all()  # the longer side is 40; the rest of the square is grey
    assert (found.test.images(np.array([0]))[0][10, 39] == 40).all()
    for row in range(len(found.train)):
        one, shown = found.train.proposals(row), found.train.images(np.array([row]))[0]
        assert len(one.corners) == 20
        for (left, top, right, bottom), label in zip(one.corners, one.labels, strict=True):
            assert right - left >= 0.99
            assert bottom <= 20.01
            red, green, _ = shown[int((top + bottom) / 2), int((left + right) / 2)].astype(int)
            if label != 2:
                assert (green > red) == (label == 0)


def test_folder_of_pictures_is_a_target_with_squares_on_a_grid(tmp_path):
    source, _ = scene(tmp_path / "a")
    scene(tmp_path / "b", 3)
    found = load(str(source), target=str(tmp_path / "b"), size=32, proposals=12)
    rows = np.flatnonzero(found.train.domains == TARGET)
    assert len(rows) == 3
    assert (found.train.proposals(int(rows[0])).labels == UNKNOWN).all()
    assert any("measure the source" in note for note in found.notes)
    assert (found.test.domains == SOURCE).all()


def test_bad_boxes_and_pictures_are_listed_and_nothing_is_lost(tmp_path):
    _, content = scene(tmp_path)
    boxes = {
        "is of an unknown category": {"category_id": 99, "bbox": [1, 1, 5, 5]},
        "names no picture of the file": {"image_id": 99, "bbox": [1, 1, 5, 5]},
        "has no bbox": {"bbox": [1, 1, None, 5]},
        "a box that is empty or outside its picture": {"bbox": [100, 100, 5, 5]},
        "is a crowd": {"bbox": [1, 1, 5, 5], "iscrowd": 1},
    }
    for number, change in enumerate([*boxes.values(), {"bbox": [3, 3, 0, 5]}, {"bbox": [3, 3, 5]}]):
        content["annotations"].append({"id": 100 + number, "image_id": 1, "category_id": 7, **change})
    (tmp_path / "7.png").write_bytes(b"no picture")
    (tmp_path / "6.png").unlink()
    found = load(str(written(tmp_path, content)), size=32, proposals=8)
    assert found.accounts is not None
    assert found.accounts.counts("boxes") == (16 + 7, 12, 11)
    assert found.accounts.counts("pictures") == (8, 6, 2)
    reasons = " ".join(line.reason for line in found.accounts.lines)
    for reason in boxes:
        assert reason in reasons
    assert len(found.train) + len(found.valid) + len(found.test) == 6


def outlined(content: dict[str, Any]) -> dict[str, Any]:
    """Add outlines to the boxes of `scene`: polygons of the red squares, run lengths of the green ones."""
    for annotation in content["annotations"]:
        left, top, wide, high = annotation["bbox"]
        if annotation["category_id"] == 7:
            right, bottom = left + wide, top + high
            annotation["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
            continue
        mask = np.zeros((40, 80), bool)
        mask[top : top + high, left : left + wide] = True
        if annotation["image_id"] % 2:
            found = coco_mask.encode(np.asfortranarray(mask))
            annotation["segmentation"] = {"size": [40, 80], "counts": found["counts"].decode()}
        else:
            flat = mask.flatten("F")
            ends = np.flatnonzero(np.diff(flat)) + 1
            counts = np.diff([0, *ends, flat.size]).tolist()
            annotation["segmentation"] = {"size": [40, 80], "counts": counts}
    return content


def test_dense_form_has_boxes_and_masks_of_the_outlines(tmp_path):
    file, content = scene(tmp_path, 10)
    written(tmp_path, outlined(content))
    found = load(str(file), task="dense", size=40)
    assert found.regions == ("background", "green", "red")
    assert len(found.train) + len(found.valid) + len(found.test) == 10
    for split in (found.train, found.valid, found.test):
        rows = np.arange(len(split))
        for pixels, mask, boxes in zip(split.images(rows), split.masks(rows), split.boxes(rows) or [], strict=True):
            assert boxes.labels.tolist() == [2, 1]
            assert (mask[20:] == IGNORE).all()  # beside the picture
            assert mask[:20].max() == 2
            for number, corners in zip(boxes.labels, boxes.corners, strict=True):
                at = np.argwhere(mask == number)
                inside = [*at.min(0)[::-1], *(at.max(0)[::-1] + 1)]
                assert np.abs(corners - inside).max() <= 1
            red = (pixels[..., 0] > 170) & (pixels[..., 1] < 60)
            assert (mask[red] == 2).all()
            assert (mask == 2).sum() >= 0.8 * 64


def test_pictures_beyond_the_memory_are_read_again(tmp_path):
    file, content = scene(tmp_path, 10)
    written(tmp_path, outlined(content))
    kept, read = (load_scenes(str(file), "", 40, "", "", "", keep) for keep in (1 << 20, 0))
    rows = np.arange(len(kept.train))
    assert np.array_equal(kept.train.images(rows), read.train.images(rows))
    assert np.array_equal(kept.train.masks(rows), read.train.masks(rows))
    name = read.train.row_names(rows[:1])[0]
    Path(name).unlink()
    with pytest.raises(DataError, match=f"{name} no such file now"):
        read.train.images(rows[:1])


def test_small_objects_lie_on_top_and_crowds_are_unknown(tmp_path):
    file, content = scene(tmp_path, 4)
    outlined(content)
    large = [[0, 0, 40, 0, 40, 40, 0, 40]]
    crowd = [[60, 0, 80, 0, 80, 40, 60, 40]]
    more = [
        {"id": 98, "image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 40], "segmentation": large},
        {"id": 99, "image_id": 1, "category_id": 7, "bbox": [60, 0, 20, 40], "segmentation": crowd, "iscrowd": 1},
    ]
    content["annotations"] += more
    written(tmp_path, content)
    found = load_scenes(str(file), "", 40, "", "", "")
    splits = [(split, row) for split in (found.train, found.valid, found.test) for row in range(len(split))]
    ((split, row),) = [(s, r) for s, r in splits if s.row_names(np.array([r]))[0].endswith("0.png")]
    (mask,), (boxes,) = split.masks(np.array([row])), split.boxes(np.array([row]))
    assert boxes.labels.tolist() == [2, 1, 1]
    assert mask[5, 5] == 2  # red in the large green object
    assert mask[1, 1] == 1
    assert mask[3, 38] == IGNORE
    assert mask[12, 31] == 1  # a named object within the crowd


def test_missing_and_faulty_outlines_leave_boxes_without_a_mask(tmp_path):
    faults = {
        0: None,
        1: [[1, 2, 3, 4]],
        2: [["a", 1, 2, 3, 4, 5]],
        3: {"size": [4, 80], "counts": [320]},
        4: {"size": [40, 80], "counts": [1, 2]},
        5: {"size": [40, 80], "counts": "é"},
        6: {"size": [40, 80], "counts": [3200.5]},
        7: [[1, 2, float("inf"), 4, 5, 6]],
        8: 5,
    }
    file, content = scene(tmp_path, 12)
    outlined(content)
    for number, outline in faults.items():
        content["annotations"][2 * number]["segmentation"] = outline
    written(tmp_path, content)
    found = load(str(file), task="dense", size=40)
    for split in (found.train, found.valid, found.test):
        rows = np.arange(len(split))
        for name, mask, boxes in zip(split.row_names(rows), split.masks(rows), split.boxes(rows), strict=True):
            assert len(boxes.labels) == 2
            assert (mask == IGNORE).all() == (int(Path(name).stem) in faults), name
    assert any("9 pictures are used without a mask" in note for note in found.notes)
    assert found.accounts is not None
    changed = [line for line in found.accounts.lines if "its boxes are used without a mask" in line.reason]
    assert len(changed) == 8


def test_file_of_test_pictures_is_the_test_split(tmp_path):
    mine, _ = scene(tmp_path / "a", 10)
    held, _ = scene(tmp_path / "b", 3, grey=40)
    (tmp_path / "c").mkdir()
    held = held.rename(tmp_path / "c" / "held.json")
    found = load(str(mine), task="dense", size=32, test=str(held), test_images=str(tmp_path / "b"))
    assert len(found.test) == 3
    assert len(found.train) + len(found.valid) == 10
    assert (found.test.images(np.arange(3))[:, 1, 31] == 40).all()
    assert (found.test.masks(np.arange(3)) == IGNORE).all()  # boxes alone
    for options, message in (
        ({"target": str(held)}, "are for the task regions"),
        ({"test_images": "b"}, "name it, too"),
    ):
        with pytest.raises(CounterpointError, match=message):
            load(str(mine), task="dense", **options)
    with pytest.raises(CounterpointError, match="test_images is for pictures with boxes"):
        load(str(mine), test_images="b")


def test_systems_of_views_and_segmentation_learn_from_it(tmp_path):
    file, content = scene(tmp_path, 16)
    written(tmp_path, outlined(content))
    spec = f"coco:{file}?size=32"
    small = {"encoder": "conv-s", "epochs": 1, "batch_size": 4, "evaluate_every": 1}
    rows = Experiment.resolve("simclr", spec, overrides=small | {"hidden": 8, "projection": 4}).run(0)
    assert "test/cell_miou" in rows[-1]
    rows = Experiment.resolve("finetune-seg", spec, overrides=small | {"head": "linear"}).run(0)
    assert "test/miou" in rows[-1]
    scene(tmp_path / "boxes", 16)
    with pytest.raises(DataError, match="no training picture has a pixel of known class"):
        Experiment.resolve("finetune-seg", f"coco:{tmp_path / 'boxes' / 'boxes.json'}?size=32", overrides=small).run(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "not in COCO's layout"),
        ('{"images": [], "annotations": []}', "not in COCO's layout"),
        ('{"images": [{"file_name": "a.png"}], "annotations": [], "categories": []}', "ids"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "no 'file_name'"),
        ('{"images": [], "annotations": [], "categories": []}', "no picture can be used"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "x.json"))


def test_missing_places_and_options_out_of_range_are_refused(tmp_path):
    file, _ = scene(tmp_path / "a", 3)
    (tmp_path / "empty").mkdir()
    for options in ({"images": str(tmp_path / "none")}, {"target": str(tmp_path / "none")}):
        with pytest.raises(DataError, match="none"):
            load(str(file), **options)
    with pytest.raises(DataError, match="no pictures"):
        load(str(file), target=str(tmp_path / "empty"))
    for options in ({"size": 9}, {"proposals": 1}):
        with pytest.raises(CounterpointError):
            load(str(file), **options)


def test_own_boxes_train_adapt_and_export_from_the_command_line(tmp_path):
    source, _ = scene(tmp_path / "a")
    target, _ = scene(tmp_path / "b", 10, grey=40)
    settings = {
        "encoder": "conv-s",
        "layer": "",
        "crop": 16,
        "source-epochs": 1,
        "epochs": 1,
        "hidden": 8,
        "projection": 4,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    spec = f"coco:{source}?target={target}&size=40&proposals=8"
    assert cli.main(["train", "wscol", "--data", spec, "--out", str(tmp_path), "--name", "run", *words]) == 0
    run = Run.open(tmp_path / "run")
    assert 0 <= run.metrics()[-1]["test/accuracy"] <= 1
    assert (run.path / "model.safetensors").exists()


def test_adaptation_without_a_target_is_refused(tmp_path, capsys):
    source, _ = scene(tmp_path / "a")
    words = ["train", "wscol", "--data", f"coco:{source}?size=32&proposals=8", "--out", str(tmp_path)]
    assert cli.main([*words, "--encoder", "conv-s", "--layer", "", "--crop", "16"]) == 2
    assert "?target=PLACE" in capsys.readouterr().err
