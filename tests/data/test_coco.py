"""The user's own pictures with boxes in COCO's layout: two domains, their proposals, and all their faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import counterpoint as cp
from counterpoint import cli
from counterpoint.data.coco import load
from counterpoint.data.coco_scenes import load_scenes
from counterpoint.data.dense import IGNORE
from counterpoint.data.regions import SOURCE, TARGET, UNKNOWN, RegionSplit
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.experiment import Experiment, load_learner
from counterpoint.use.export import opened
from counterpoint.views.images import normalise


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
        ('{"images": [{"file_name": "a.png"}], "annotations": [], "categories": []}', "no 'id'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "no 'file_name'"),
        ('{"images": [], "annotations": [], "categories": []}', "the list images is empty"),
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


def test_own_boxes_train_adapt_and_export_from_the_command_line(tmp_path, capsys):
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
    # The encoder of regions is exported, and embeds crops of the size of the settings.
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / "regions.pt2")]) == 0
    program = opened(tmp_path / "regions.pt2", "torch")
    crops = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    rows = cp.load(run.path).encode(images=list(crops))
    assert rows.shape == (3, 128)
    found = program(torch.from_numpy(crops).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found.detach().numpy(), rows, rtol=1e-4, atol=1e-5)
    learner = load_learner(run)
    with torch.no_grad():  # of the teacher, which is the network to use after the adaptation
        for parameter in learner.student.parameters():
            parameter.zero_()
        x = normalise(torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous())
        torch.testing.assert_close(learner.embed(x), learner.taught.pooled(learner.taught.encoder(x)))
    assert learner.embed(x).any()
    assert cli.main(["embed", str(run.path), "--out", str(tmp_path / "rows.parquet")]) == 2
    assert "encode(images=" in capsys.readouterr().err


def test_adaptation_without_a_target_is_refused(tmp_path, capsys):
    source, _ = scene(tmp_path / "a")
    words = ["train", "wscol", "--data", f"coco:{source}?size=32&proposals=8", "--out", str(tmp_path)]
    assert cli.main([*words, "--encoder", "conv-s", "--layer", "", "--crop", "16"]) == 2
    assert "?target=PLACE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["annotations"].__setitem__(0, "box"), "entry 1 of annotations is no JSON object"),
        (lambda found: found["annotations"][1].pop("category_id"), "entry 2 of annotations has no 'category_id'"),
        (lambda found: found["annotations"][0].update(image_id=[1]), "entry 1 of annotations has no 'image_id'"),
        (lambda found: found["images"][2].update(id=None), "entry 3 of images has no 'id'"),
        (lambda found: found["images"][1].update(id=1), "entry 2 of images has the id 1 of an entry before it"),
        (lambda found: found["categories"][1].update(id=7), "entry 2 of categories has the id 7"),
        (lambda found: found["annotations"].clear(), "the list annotations is empty"),
        (lambda found: found["images"].clear(), "the list images is empty"),
    ],
)
def test_entries_that_would_be_mixed_up_are_refused_with_their_place(tmp_path, change, message):
    _, content = scene(tmp_path)
    change(content)
    file = written(tmp_path, content)
    with pytest.raises(DataError, match=f"{file}: {message}"):
        load(str(file), task="dense", size=32)


def test_ids_are_numbers_or_texts_and_numbers_come_first(tmp_path):
    _, content = scene(tmp_path)
    content["categories"] += [
        {"id": "a", "name": "blue"},
        {"id": 3, "name": "green"},
    ]  # twice the same is no contradiction
    content["annotations"][0]["category_id"] = "a"
    found = load(str(written(tmp_path, content)), task="dense", size=32)
    assert found.regions == ("background", "green", "red", "blue")
    assert found.accounts.counts("boxes") == (16, 16, 0)


def test_numbers_beyond_floating_point_are_faults_of_their_entry(tmp_path):
    _, content = scene(tmp_path)
    content = outlined(content)
    content["annotations"][0]["bbox"] = [10**400, 1, 2, 3]
    content["annotations"][2]["segmentation"] = [[10**400, 1, 2, 3, 4, 5]]
    content["annotations"][4]["segmentation"] = {"size": 40, "counts": [3200]}
    found = load(str(written(tmp_path, content)), task="dense", size=32)
    assert found.accounts.counts("boxes") == (16, 15, 1)
    reasons = " ".join(line.reason for line in found.accounts.lines)
    for reason in ("no bbox of four finite numbers", "no list of polygons", "run lengths of the size 40"):
        assert reason in reasons


def test_pictures_of_any_mode_keep_their_colours(tmp_path):
    _, content = scene(tmp_path)
    clear = np.zeros((40, 80, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "0.png")
    Image.fromarray(np.full((40, 80), 60000, np.uint16)).save(tmp_path / "1.png")
    Image.fromarray(np.full((40, 80), 90, np.uint8)).save(tmp_path / "2.png")
    Image.fromarray(np.full((40, 80, 3), 70, np.uint8)).quantize(4).save(tmp_path / "3.png")
    Image.fromarray(np.full((40, 80, 4), (0, 0, 0, 100), np.uint8), "CMYK").save(tmp_path / "4.png", "JPEG")
    found = load(str(written(tmp_path, content)), task="dense", size=80)
    shown = {}
    for split in (found.train, found.valid, found.test):
        rows = np.arange(len(split))
        for name, picture in zip(split.row_names(rows), split.images(rows), strict=True):
            shown[Path(name).stem] = int(picture[10, 75, 0])
    assert [shown[str(n)] for n in range(4)] == [255, 233, 90, 70]  # transparent is white, 16 bits are scaled to 8
    assert abs(shown["4"] - 155) <= 3


def turned(root: Path, stored: tuple[int, int]) -> tuple[Path, dict[str, Any]]:
    """Write pictures, the first of which is to be turned by a quarter; `stored` are the width and height that the file names."""
    _, content = scene(root)
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 60:] = (0, 200, 0)  # on the right as stored, below when turned
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    Image.fromarray(pixels).save(root / "0.png", exif=exif)
    content["images"][0].update(width=stored[0], height=stored[1])
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 1]
    upright = stored[0] < stored[1]
    box = [0, 60, 40, 20] if upright else [60, 0, 20, 40]
    content["annotations"].append({"id": 999, "image_id": 1, "category_id": 3, "bbox": box})
    return written(root, content), content


@pytest.mark.parametrize("stored", [(40, 80), (80, 40)])
def test_turned_pictures_fit_their_boxes(tmp_path, stored):
    file, _ = turned(tmp_path, stored)
    found = load(str(file), task="dense", size=80)
    for split in (found.train, found.valid, found.test):
        rows = np.arange(len(split))
        for name, picture, boxes in zip(split.row_names(rows), split.images(rows), split.boxes(rows), strict=True):
            if Path(name).stem == "0":
                ((left, top, right, bottom),) = boxes.corners.astype(int)
                inside = picture[top + 1 : bottom - 1, left + 1 : right - 1]
                assert (inside == (0, 200, 0)).all()


def test_pictures_of_another_size_than_the_file_says_are_left_out_with_their_boxes(tmp_path):
    _, content = scene(tmp_path)
    content["images"][0].update(width=160, height=80)
    content["images"][1].update(width=0, height=0)  # unknown
    found = load(str(written(tmp_path, content)), task="dense", size=32)
    assert found.accounts.counts("pictures") == (8, 7, 1)
    assert found.accounts.counts("boxes") == (16, 14, 2)
    assert any("has 80 x 40 pixels, the list says 160 x 80" in note for note in found.notes)


def test_pictures_in_both_files_are_counted(tmp_path):
    file, _ = scene(tmp_path / "a")
    held, _ = scene(tmp_path / "b", 10)
    for keep in (1 << 30, 0):
        found = load_scenes(str(file), "", 32, str(held), str(tmp_path / "a"), "", keep)
        assert any("8 test pictures equal to one of" in note for note in found.notes)


def test_categories_of_the_test_file_alone_are_named(tmp_path):
    file, _ = scene(tmp_path / "a")
    _, content = scene(tmp_path / "b", 10)
    content["categories"][0]["name"] = "blue"
    found = load(str(file), task="dense", size=32, test=str(written(tmp_path / "b", content)))
    assert any("objects of blue are left out" in note for note in found.notes)
    assert found.accounts.counts("boxes") == (36, 26, 10)


def test_boxes_and_outlines_that_the_size_or_a_fault_lose_are_told(tmp_path):
    _, content = scene(tmp_path)
    found = load(str(written(tmp_path, content)), task="dense", size=32)
    assert any("no object has an outline" in note for note in found.notes)
    assert not any("thinner" in note for note in found.notes)
    content["annotations"][0]["bbox"][2] = 2
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 2]]
    found = load(str(written(tmp_path, content)), task="dense", size=32)
    assert any("1 box thinner than a pixel at this size" in note for note in found.notes)
    assert any("8 pictures are used without a mask" in note for note in found.notes)
    with pytest.raises(CounterpointError, match="proposals and seed are for the task regions"):
        load(str(tmp_path / "boxes.json"), task="dense", proposals=5)


def test_folder_without_the_pictures_is_explained(tmp_path):
    file, _ = scene(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"no picture can be used \(\?images=DIR names"):
        load(str(file), task="dense", images=str(tmp_path / "b"))
