"""The user's own clips in the layout of YouTube-VIS: crops, identities, and all their faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from counterpoint import cli
from counterpoint.data.frames import ClipSplit
from counterpoint.data.ytvis import load
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError

SIDE = 12


def scene(root: Path, videos: int = 6, frames: int = 4) -> tuple[Path, dict[str, Any]]:
    """Write videos with a red and a green square that move over grey ground; return the file and its content."""
    found: dict[str, Any] = {"videos": [], "annotations": [], "categories": [{"id": 7, "name": "square"}]}
    for v in range(videos):
        names = []
        boxes: dict[str, list[Any]] = {"red": [], "green": []}
        for t in range(frames):
            pixels = np.full((48, 64, 3), 120, np.uint8)
            for colour, (x, y) in {"red": (2 + 3 * t, 4), "green": (40 - 2 * t, 30)}.items():
                if colour == "green" and t == 1:
                    boxes[colour].append(None)
                    continue
                pixels[y : y + SIDE, x : x + SIDE] = (200, 30, 30) if colour == "red" else (30, 200, 30)
                boxes[colour].append([x, y, SIDE, SIDE])
            name = f"{v}/{t:05d}.png"
            path = root / "JPEGImages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            names.append(name)
        found["videos"].append({"id": v + 1, "file_names": names, "width": 64, "height": 48, "length": frames})
        for colour, part in boxes.items():
            found["annotations"].append(
                {"id": 2 * v + (colour == "green"), "video_id": v + 1, "category_id": 7, "bboxes": part}
            )
    return written(root, found), found


def written(root: Path, content: dict[str, Any]) -> Path:
    (root / "instances.json").write_text(json.dumps(content))
    return root / "instances.json"


def test_crops_show_their_instance_and_identities_last(tmp_path):
    file, _ = scene(tmp_path)
    found = load(str(file), size=16, others=2)
    assert found.classes == ("square",)
    assert [len(split) for split in (found.train, found.valid, found.test)] == [3, 2, 1]
    assert isinstance(found.train, ClipSplit)
    clip = found.train.clip(0)
    for t in range(4):
        red, green = (np.flatnonzero(clip.identities[t] == n) for n in (0, 1))
        assert len(red) == 1
        assert len(green) == (t != 1)
        assert clip.crops[t, red[0], 4:12, 4:12].reshape(-1, 3).mean(0)[0] > 190
        for place in green:
            assert clip.crops[t, place, 4:12, 4:12].reshape(-1, 3).mean(0)[1] > 190
        for place in np.flatnonzero(clip.identities[t] == -1):
            assert np.ptp(clip.crops[t, place].astype(int).mean((0, 1))) < 60  # mostly ground
    assert (clip.scores[clip.identities >= 0] == 1).all()


def test_boxes_come_from_run_lengths_where_there_are_none(tmp_path):
    file, content = scene(tmp_path)
    wanted = load(str(file), size=16, others=0).train.clip(0)
    for annotation in content["annotations"]:
        codes = []
        for box in annotation.pop("bboxes"):
            if box is None:
                codes.append(None)
                continue
            mask = np.zeros((48, 64), np.uint8)
            mask[box[1] : box[1] + SIDE, box[0] : box[0] + SIDE] = 1
            flat = mask.flatten("F")
            edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
            counts = np.diff(np.concatenate([[0], edges])).tolist()
            rest = 48 * 64 - sum(counts)
            codes.append({"size": [48, 64], "counts": [*counts, rest] if rest else counts})
        annotation["segmentations"] = codes
    found = load(str(written(tmp_path, content)), size=16, others=0).train.clip(0)
    assert (found.crops == wanted.crops).all()
    assert (found.identities == wanted.identities).all()


def test_faults_are_left_out_and_listed(tmp_path):
    _, content = scene(tmp_path)
    content["annotations"][0]["bboxes"][0] = [100, 100, 10, 10]  # outside
    content["annotations"][0]["bboxes"][1] = [5, 5, 0, 10]  # empty
    content["annotations"][2]["bboxes"] = content["annotations"][2]["bboxes"][:2]  # too few
    content["annotations"].append({"id": 99, "video_id": 77, "bboxes": [None]})
    (tmp_path / "JPEGImages" / "3" / "00002.png").write_bytes(b"x")
    (tmp_path / "JPEGImages" / "4" / "00001.png").unlink()
    found = load(str(written(tmp_path, content)), size=16)
    assert found.accounts.missing() == {}
    assert {line.reason for line in found.accounts.left("boxes")} == {
        "a box that is empty or outside its frame", "its frame cannot be read"
    }  # fmt: skip
    assert len(found.accounts.left("boxes")) == 2 + 2 + 1
    assert sorted(line.reason for line in found.accounts.left("frames")) == ["cannot be read", "no such file"]
    assert [line.reason for line in found.accounts.left("instances")] == [
        "has 2 boxes for 4 frames", "names no video of the file"
    ]  # fmt: skip


def test_faulty_annotations_and_videos_without_instances_are_left_out_and_listed(tmp_path):
    _, content = scene(tmp_path)
    first = content["annotations"]
    first[0]["bboxes"][0] = [1, 2, 3]
    first[1]["bboxes"] = [None] * 4
    first[2]["bboxes"][1] = [1, None, 3, 4]
    del first[3]["bboxes"]
    first[3]["segmentations"] = ["no code"] * 4
    first.append("text")
    found = load(str(written(tmp_path, content)), size=16)
    assert found.accounts.missing() == {}
    assert [(line.row, line.reason) for line in found.accounts.left("instances")] == [
        (1, "has a box that is no list of four finite numbers ([1, 2, 3])"),
        (2, "is in no frame"),
        (3, "has a box that is no list of four finite numbers ([1, None, 3, 4])"),
        (4, "has a mask that is no run length"),
        (13, "names no video of the file"),
    ]
    assert [line.file for line in found.accounts.left("videos")] == ["video 1", "video 2"]


def test_instances_that_never_reappear_are_counted(tmp_path):
    file, content = scene(tmp_path)
    assert any(
        "6 of 12 instances are never seen again after an absence" in note for note in load(str(file), size=16).notes
    )
    for annotation in content["annotations"]:
        annotation["bboxes"][1:] = [None] * 3
    found = load(str(written(tmp_path, content)), size=16)
    assert any("12 of 12 instances are never" in n and "back_accuracy is not measured" in n for n in found.notes)


def test_instances_of_one_frame_are_named(tmp_path):
    _, content = scene(tmp_path)
    content["annotations"][0]["bboxes"][1:] = [None, None, None]
    found = load(str(written(tmp_path, content)), size=16)
    assert any("1 instance is in one frame only" in note for note in found.notes)


def test_large_sets_are_read_on_demand(tmp_path, monkeypatch):
    file, _ = scene(tmp_path)
    whole = load(str(file), size=16)
    monkeypatch.setattr("counterpoint.data.ytvis.KEEP", 0)
    found = load(str(file), size=16)
    assert (found.train.clip(1).crops == whole.train.clip(1).crops).all()
    name = found.train.row_names(np.array([1]))[0].removeprefix("video ")
    for path in (tmp_path / "JPEGImages" / str(int(name) - 1)).iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no such file; it was valid"):
        found.train.clip(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no list 'videos'"),
        ("{", "is no JSON"),
        ('{"videos": [], "annotations": []}', "has no annotations"),
        ('{"videos": [{"id": 1}], "annotations": [{}]}', "video 1 has no id or no list"),
        ('{"videos": [{"id": 1, "file_names": []}], "annotations": [{"video_id": 2}]}', "no instance can be used"),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load(str(tmp_path / "a.json"))


def test_missing_folder_and_bad_options_are_named(tmp_path):
    file, _ = scene(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        load(str(file), images=str(tmp_path / "none"))
    with pytest.raises(CounterpointError, match="others"):
        load(str(file), others=-1)
    with pytest.raises(CounterpointError, match="fraction"):
        load(str(file), test="2")


def test_ctvis_trains_on_it_from_the_command_line(tmp_path):
    file, _ = scene(tmp_path)
    words = ["train", "ctvis", "--data", f"ytvis:{file}?size=16", "--epochs", "2", "--frames", "4", "--window", "4"]
    words += ["--batch-size", "3", "--hidden", "8", "--projection", "4", "--encoder", "conv-s"]
    assert cli.main([*words, "--out", str(tmp_path), "--name", "run"]) == 0
    assert "test/id_accuracy" in Run.open(tmp_path / "run").metrics()[-1]
