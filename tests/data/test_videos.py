"""The user's own videos: folders, truth, cache, and files that are no videos."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from counterpoint import data
from counterpoint.data import videos as source
from counterpoint.data.media import write_video
from counterpoint.errors import CounterpointError, DataError

SECONDS = 3


def clip(path, colour, tone=True):
    frames = (np.full((48, 64, 3), colour, np.uint8) for _ in range(24 * SECONDS))
    t = np.arange(16000 * SECONDS) / 16000
    write_video(path, frames, (0.3 * np.sin(700 * t)).astype(np.float32) if tone else None)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "mine"
    for split in ("train", "test"):
        clip(root / split / "violent" / "a b.mp4", (200, 30, 30))
        clip(root / split / "normal" / "c.mov", (30, 30, 200), tone=False)
    clip(root / "train" / "violent" / "deep" / "d.mkv", (220, 60, 30))
    (root / "truth.csv").write_text("video,start,end\na b.mp4,1.0,2.0\n")
    return root


def test_folders_give_labels_features_and_truth(folders):
    found = data.load(f"videos:{folders}")
    assert sorted((b.name, b.label) for b in [*found.train, *found.valid]) == [
        ("train/normal/c.mov", 0),
        ("train/violent/a b.mp4", 1),
        ("train/violent/deep/d.mkv", 1),
    ]
    assert (len(found.valid), found.valid[0].label, found.valid[0].truth.all()) == (1, 1, True)
    assert [(v.name, v.label) for v in found.test] == [("test/violent/a b.mp4", 1), ("test/normal/c.mov", 0)]
    violent, normal = found.test
    # 3 s are 4.5 snippets of 2/3 s; the half-full last one counts.
    assert violent.visual.shape == (1, 5, found.visual_dim)
    assert violent.audio.shape == (5, found.audio_dim)
    assert violent.truth.sum() == 24
    assert violent.truth[24:48].all()
    assert not normal.truth.any()
    assert any("c.mov: no audio track" in note for note in found.notes)
    assert found.backbones["visual"]["name"] == "light"


def test_files_are_watched_once(folders, monkeypatch):
    first = data.load(f"videos:{folders}")
    monkeypatch.setattr(source, "_watch", lambda *a: pytest.fail("watched again"))
    again = data.load(f"videos:{folders}")
    np.testing.assert_array_equal(first.train[0].visual, again.train[0].visual)
    assert first.notes == again.notes
    with pytest.raises(pytest.fail.Exception):  # other snippets, other features
        data.load(f"videos:{folders}?snippet_seconds=0.5")


def test_a_damaged_cache_is_filled_again(folders, tmp_path):
    first = data.load(f"videos:{folders}").train[0].visual.copy()
    for file in (tmp_path / "cache" / "videos").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:50])
    np.testing.assert_array_equal(data.load(f"videos:{folders}").train[0].visual, first)


def test_files_that_are_no_videos_are_named_and_left_out(folders):
    (folders / "train" / "normal" / "notes.txt").write_text("not a video")
    (folders / "test" / "violent" / "cut.mp4").write_bytes((folders / "test/violent/a b.mp4").read_bytes()[:400])
    (folders / "train" / "normal" / ".hidden").write_text("nor this")
    for _ in range(2):  # from the files, then from the cache
        found = data.load(f"videos:{folders}")
        assert (len(found.train), len(found.valid), len(found.test)) == (2, 1, 2)
        said = "\n".join(found.notes)
        assert "notes.txt: " in said
        assert "cut.mp4: " in said
        assert ".hidden: hidden" in said
        assert "5 of 8 files read, 3 left out" in said
        table = next(Path(word) for word in said.split() if word.endswith(".csv"))
        assert len(table.read_text().splitlines()) == 1 + 3


def test_what_lies_beside_the_folders_is_counted_and_left_out(folders):
    before = data.load(f"videos:{folders}")
    assert not any("files read" in note for note in before.notes)
    (folders / "stray.mp4").write_bytes(b"?")
    (folders / "train" / "other").mkdir()
    (folders / "train" / "other" / "a.mp4").write_bytes(b"?")
    found = len(list(folders.glob("*/*/*"))) + 1
    said = " ".join(data.load(f"videos:{folders}").notes)
    assert f"{found - 2} of {found} files read, 2 left out: stray.mp4: lies in none of the folders" in said
    with pytest.raises(DataError, match=r"^https://x\.org/a is on the net"):
        data.load("videos:https://x.org/a")


def test_a_folder_without_readable_videos_raises_an_error(folders):
    (folders / "train" / "normal" / "c.mov").write_bytes(b"")
    with pytest.raises(DataError, match=r"train/normal: no file in it can be read.*c\.mov: the file is empty"):
        data.load(f"videos:{folders}")


def test_missing_or_empty_folders_raise_an_error(folders, tmp_path):
    with pytest.raises(DataError, match="has no folder train/violent; sort your videos"):
        data.load(f"videos:{tmp_path / 'nowhere'}")
    (folders / "test" / "normal" / "c.mov").unlink()
    with pytest.raises(DataError, match="is empty; it should hold normal videos"):
        data.load(f"videos:{folders}")


def test_without_truth_every_moment_counts_and_it_is_said(folders):
    (folders / "truth.csv").unlink()
    found = data.load(f"videos:{folders}")
    assert found.test[0].truth.all()
    assert not found.test[1].truth.any()
    assert "every moment of a violent test video counts" in found.notes[-2]
    assert "the valid split is made here, 1 of 3 training videos" in found.notes[-1]


def test_truth_that_does_not_fit_the_folders_raises_an_error(folders):
    table = folders / "truth.csv"
    clip(folders / "test" / "violent" / "e.mp4", (90, 30, 30))
    table.write_text("video,start,end\na b.mp4,1,2\nstranger.mp4,0,1\n")
    found = data.load(f"videos:{folders}")
    said = "\n".join(found.notes)
    assert "truth.csv has no row for a violent video: test/violent/e.mp4" in said
    assert "not in test/ or cannot be read: stranger.mp4" in said
    assert len(found.test) == 2
    table.write_text("video,start,end\nc.mov,1,2\n")
    with pytest.raises(DataError, match=r"violent moments of videos in normal/: test/normal/c\.mov"):
        data.load(f"videos:{folders}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,from,to\n", "first line must be video,start,end"),
        ("", "first line must be"),
        ("video,start,end\na b.mp4,2,1\na b.mp4,x,1\na b.mp4,nan,1\na b.mp4,1\n", "line 2, line 3, line 4, line 5"),
    ],
)
def test_invalid_truth_raises_an_error(folders, text, expected):
    (folders / "truth.csv").write_text(text)
    with pytest.raises(DataError, match=expected):
        data.load(f"videos:{folders}")


def test_truth_that_is_not_text_raises_an_error(folders):
    (folders / "truth.csv").write_bytes(b"\xff\xfe\x00\xd8video")
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        data.load(f"videos:{folders}")


def test_options_after_the_question_mark_are_applied_and_checked(folders):
    found = data.load(f"videos:{folders}?snippet_seconds=0.5&audio=logmel")
    assert found.snippet_seconds == 0.5
    assert found.test[0].visual.shape[1] == 6
    with pytest.raises(CounterpointError, match="did you mean snippet_seconds"):
        data.load(f"videos:{folders}?snippet_second=0.5")
    with pytest.raises(CounterpointError, match="is not a float"):
        data.load(f"videos:{folders}?snippet_seconds=short")
    with pytest.raises(CounterpointError, match="must be > 0"):
        data.load(f"videos:{folders}?snippet_seconds=0")
    with pytest.raises(CounterpointError, match="takes no argument"):
        data.load("arcade:here")


def test_links_are_followed_and_contents_decide(folders):
    for label in ("violent", "normal"):  # a folder of valid videos, so that none is taken from training
        (folders / "dev" / label).mkdir(parents=True)
        (folders / "dev" / label / "v.mp4").write_bytes((folders / "test" / "violent" / "a b.mp4").read_bytes())
    outside = folders.parent / "elsewhere"
    clip(outside / "far.mp4", (10, 200, 10))
    (folders / "train" / "normal" / "linked").symlink_to(outside)
    (folders / "train" / "normal" / "loop").symlink_to(folders / "train" / "normal")
    first = data.load(f"videos:{folders}")
    assert [b.name for b in first.train][2:] == ["train/normal/c.mov", "train/normal/linked/far.mp4"]
    before = first.train[3].visual.copy()
    # Other contents under the same name, size and time.
    file, stamp = outside / "far.mp4", (outside / "far.mp4").stat()
    clip(outside / "other.mp4", (200, 10, 10))
    raw = (outside / "other.mp4").read_bytes()
    file.write_bytes(raw + file.read_bytes()[len(raw) :])
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (outside / "other.mp4").unlink()
    assert not np.array_equal(data.load(f"videos:{folders}").train[3].visual, before)


def test_few_training_videos_draw_a_warning(folders):
    assert any("only 3 training videos" in note for note in data.load(f"videos:{folders}").notes)
