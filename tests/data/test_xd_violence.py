"""Test the XD-Violence layout: the items read, their order, and the message for each kind of damage."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data import xd_violence as source
from counterpoint.data.xd_violence import make_gt
from counterpoint.errors import CounterpointError, DataError


def opened(tree):
    return data.load(f"xd-violence:{tree.root}")


@pytest.fixture
def undivided(monkeypatch):
    """Leave all training videos but the last in the training split."""
    monkeypatch.setattr(source, "carve", lambda name, rows, *others: (rows[:-1], rows[-1:]))


def message(tree) -> str:
    with pytest.raises(DataError) as caught:
        opened(tree)
    return str(caught.value)


def test_items_pair_every_crop_with_its_video_s_sound(xd_tree, undivided):
    found = opened(xd_tree)
    assert (len(found.train), len(found.test), found.visual_dim, found.audio_dim) == (20, 3, 1024, 128)
    (note,) = found.notes
    assert "the valid split is made here, 1 of 5 training videos" in note
    names = list(xd_tree.videos["train"])
    for i, bag in enumerate(found.train):
        name = names[i // 5]
        assert bag.name == f"{name}__{i % 5}"
        np.testing.assert_array_equal(bag.visual, np.load(xd_tree.visual("train", name, i % 5)))
        np.testing.assert_array_equal(bag.audio, np.load(xd_tree.audio("train", name)))
        assert bag.label == (0 if "_label_A" in name else 1)
    assert [v.visual.shape for v in found.test] == [(5, 10, 1024), (5, 6, 1024), (5, 8, 1024)]
    np.testing.assert_array_equal(np.concatenate([v.truth for v in found.test]), np.load(xd_tree.root / "gt.npy"))
    assert found.train[-1].name == found.train[19].name
    assert [b.name for b in found.train[3:5]] == [found.train[3].name, found.train[4].name]
    with pytest.raises(IndexError):
        found.train[20]
    (watched,) = found.valid
    assert (watched.name, watched.visual.shape, watched.label) == (names[4], (5, 14, 1024), 0)
    assert not watched.truth.any()


def test_rows_are_read_when_asked_for(xd_tree, undivided):
    found = opened(xd_tree)
    name = next(iter(xd_tree.videos["train"]))
    np.save(xd_tree.visual("train", name, 0), np.full((12, 1024), 7, np.float32))
    assert (found.train[0].visual == 7).all()
    np.save(xd_tree.visual("train", name, 0), np.zeros((3, 1024), np.float32))
    with pytest.raises(DataError, match="changed on disk"):
        found.train[0]


def test_lists_may_lie_in_a_folder_and_name_relative_paths(xd_tree):
    (xd_tree.root / "list").mkdir()
    for file in [*xd_tree.root.glob("*.list"), xd_tree.root / "gt.npy"]:
        file.rename(xd_tree.root / "list" / file.name)
    text = (xd_tree.root / "list/rgb.list").read_text().replace("/home/someone/xd/", "")
    (xd_tree.root / "list/rgb.list").write_text(text.replace("/", "\\"))
    found = opened(xd_tree)
    assert len(found.train) + 5 * len(found.valid) == 25


def test_unequal_lengths_are_cut_to_the_shortest_and_said(xd_tree):
    name = "v=def__#1_label_G-0-0"
    np.save(xd_tree.audio("test", name), np.ones((9, 128), np.float32))
    found = opened(xd_tree)
    assert found.test[0].visual.shape == (5, 9, 1024)
    assert found.test[0].audio.shape == (9, 128)
    # The truth of the videos that follow must not move.
    gt = np.load(xd_tree.root / "gt.npy")
    np.testing.assert_array_equal(found.test[0].truth, gt[: 16 * 9])
    np.testing.assert_array_equal(found.test[1].truth, gt[160 : 160 + 96])
    assert name in found.notes[0]
    assert "cut to the shortest" in found.notes[0]


@pytest.mark.parametrize("which", ["rgb.list", "audio.list", "rgb_test.list", "audio_test.list"])
def test_missing_or_empty_lists_raise_an_error(xd_tree, which):
    (xd_tree.root / which).write_text("\n \n")
    assert which in message(xd_tree)
    assert "empty" in message(xd_tree)
    (xd_tree.root / which).unlink()
    assert f"has no {which}" in message(xd_tree)


def test_a_missing_directory_raises_an_error(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        data.load(f"xd-violence:{tmp_path / 'nowhere'}")
    with pytest.raises(CounterpointError, match="needs a path"):
        data.load("xd-violence")


def test_listed_but_not_on_disk_names_every_file(xd_tree):
    names = list(xd_tree.videos["train"])
    xd_tree.visual("train", names[1], 3).unlink()
    xd_tree.audio("train", names[4]).unlink()
    said = message(xd_tree)
    assert f"{names[1]}__3.npy" in said
    assert f"{names[4]}__vggish.npy" in said


def test_crops_out_of_order_raise_an_error(xd_tree):
    file = xd_tree.root / "rgb.list"
    lines = file.read_text().splitlines()
    lines[6], lines[7] = lines[7], lines[6]
    file.write_text("\n".join(lines))
    assert "wrong at line 6" in message(xd_tree)
    file.write_text("\n".join(lines[:-1]))
    assert "24 lines" in message(xd_tree)


def test_sound_in_another_order_is_found_though_one_name_begins_another(xd_tree):
    file = xd_tree.root / "audio.list"
    lines = file.read_text().splitlines()
    lines[0], lines[1] = lines[1], lines[0]
    file.write_text("\n".join(lines))
    assert "order of rgb.list" in message(xd_tree)
    file.write_text("\n".join(lines[:3]))
    assert "3 lines for the 5 videos" in message(xd_tree)


class _Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (np.zeros((12, 1000), np.float32), "expected [snippets, 1024]"),
        (np.zeros((1024,), np.float32), "expected [snippets, 1024]"),
        (np.zeros((0, 1024), np.float32), "no snippet"),
        (np.zeros((12, 1024), "S3"), "not numbers"),
        (np.zeros((12, 1024), complex), "not numbers"),
        (b"nonsense", "not a readable .npy"),
        (b"", "not a readable .npy"),
        ("truncated", "not a readable .npy"),
        ("pickle", "not a readable .npy"),
        ("archive", "an archive"),
    ],
)
def test_bad_feature_files_are_named(xd_tree, capsys, content, expected):
    path = xd_tree.visual("train", "v=quiet__#1_label_A", 2)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "pickle":
        np.save(path, np.array([_Evil()], object), allow_pickle=True)
    elif content == "archive":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    else:
        path.write_bytes(content)
    said = message(xd_tree)
    assert str(path) in said
    assert expected in said
    assert "must not run" not in capsys.readouterr().out
    assert pickle.dumps(_Evil())  # it would have run


def test_every_bad_file_is_listed_at_once(xd_tree):
    for crop in range(3):
        xd_tree.visual("train", "v=quiet__#1_label_A", crop).write_bytes(b"x")
    said = message(xd_tree)
    assert said.startswith("3 feature files")
    assert said.count("v=quiet") == 3


def test_truth_of_another_length_says_how_much_and_where(xd_tree):
    gt = np.load(xd_tree.root / "gt.npy")
    np.save(xd_tree.root / "gt.npy", gt[16:])
    said = message(xd_tree)
    assert "16 too few" in said
    assert "16 x 24 = 384" in said
    lines = [f"{name} {' '.join(f'{a} {b}' for a, b in pairs)}" for name, pairs in xd_tree.annotations.items()]
    (xd_tree.root / "annotations.txt").write_text("\n".join(lines))
    assert "first disagrees with the list at v=def__#1_label_G-0-0 (" in message(xd_tree)


def test_truth_that_does_not_fit_raises_an_error(xd_tree):
    gt = np.load(xd_tree.root / "gt.npy")
    np.save(xd_tree.root / "gt.npy", gt[::-1])
    assert "v=calm__#1_label_A (a normal video with" in message(xd_tree)
    np.save(xd_tree.root / "gt.npy", gt * 0.5)
    assert "other than 0 and 1" in message(xd_tree)
    np.save(xd_tree.root / "gt.npy", gt[None])
    assert "one row" in message(xd_tree)
    (xd_tree.root / "gt.npy").unlink()
    assert "neither gt.npy nor annotations.txt" in message(xd_tree)


def test_truth_is_made_from_the_annotations(xd_tree):
    gt = np.load(xd_tree.root / "gt.npy")
    (xd_tree.root / "gt.npy").unlink()
    lines = [f"{name}.mp4  {' '.join(f'{a} {b}' for a, b in pairs)}" for name, pairs in xd_tree.annotations.items()]
    (xd_tree.root / "annotations.txt").write_text("\n".join(lines[::-1]) + "\n\n")
    found = opened(xd_tree)
    np.testing.assert_array_equal(np.concatenate([v.truth for v in found.test]), gt)
    assert "made from" in found.notes[0]
    (xd_tree.root / "annotations.txt").write_text(lines[0])
    assert "no line for the violent videos v=def__#1_label_G-0-0-2" in message(xd_tree)
    (xd_tree.root / "annotations.txt").write_text("a 1 2 3\nb\n\nc 5 4\nd 1 2")
    assert "line 1; line 2; line 4" in message(xd_tree)


def test_make_gt_drops_the_last_frame_and_the_rest(tmp_path):
    file = tmp_path / "annotations.txt"
    file.write_text("v_label_B1 2 5\nv_label_B1-G 30 90 0 1\n")
    gt = make_gt(file, {"v_label_B1-G": 50, "w_label_A": 17, "v_label_B1": 16})
    assert len(gt) == 48 + 16 + 0  # 16 floor((F - 1) / 16)
    expected = np.zeros(64)
    expected[30:48] = expected[0] = 1
    np.testing.assert_array_equal(gt, expected)


def test_values_are_refused_when_read_and_the_item_is_named(xd_tree):
    from counterpoint.systems.alignment.macil_sd import MacilSDConfig
    from counterpoint.tasks.bags import BagsTask

    name = next(iter(xd_tree.videos["train"]))
    found = opened(xd_tree)
    for values, expected in ((np.nan, "NaN"), (0.0, "all visual features are zero")):
        np.save(xd_tree.visual("train", name, 4), np.full((12, 1024), values, np.float32))
        task = BagsTask(found, MacilSDConfig())
        with pytest.raises(DataError, match=expected) as caught:
            task.train_loader(0, _start()).dataset[4]
        assert f"{name}__4" in str(caught.value)


def _start():
    from counterpoint.engine.loading import Position

    return Position()
