"""Detection on real files: windows, intervals, output, and files and runs that are no good."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from counterpoint import cli, training
from counterpoint.data.media import write_video
from counterpoint.engine.run import Run
from counterpoint.errors import DataError, RunError
from counterpoint.tasks.moments import intervals
from counterpoint.use.detect import Detector, Windows
from counterpoint.use.detections import detect_files
from counterpoint.use.video_files import find_videos

SNIPPET = 16 / 24


# --- windows ----------------------------------------------------------------------------------------------------------


def marks(visual, audio):
    """Return scores that encode the number of the snippet and the distance to its window's nearer edge."""
    n = len(visual)
    edge = np.minimum(np.arange(n), np.arange(n)[::-1])
    return {"score": visual[:, 0], "edge": edge.astype(np.float32), "length": np.full(n, n, np.float32)}


@pytest.mark.parametrize("total", [1, 3, 7, 8, 9, 12, 13, 16, 24, 61, 200])
@pytest.mark.parametrize("piece", [1, 5, 16, 1000])
def test_every_snippet_is_scored_once_in_order_and_in_context(total, piece):
    length = 8
    rows = np.arange(total, dtype=np.float32)[:, None]
    windows = Windows(marks, length)
    parts = []
    for start in range(0, total, piece):
        parts += windows.feed(rows[start : start + piece], rows[start : start + piece])
    parts += windows.finish()
    scores = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    np.testing.assert_array_equal(scores["score"], rows[:, 0])
    assert (scores["length"] == min(total, length)).all() or total <= length * 3 // 2
    inner = slice(length, total - length) if total > 3 * length else slice(0, 0)
    assert (scores["edge"][inner] >= length // 4 - 1).all()


def test_windows_hold_no_more_than_they_need():
    windows = Windows(marks, 8)
    most = 0
    for n in range(5000):
        list(windows.feed(np.full((1, 1), n, np.float32), np.zeros((1, 1), np.float32)))
        most = max(most, windows.held)
    assert most <= 12


def test_intervals_join_over_one_snippet_and_end_with_the_video():
    score = np.array([0.1, 0.9, 0.2, 0.8, 0.1, 0.1, 0.6, 0.5], np.float32)
    first, second = intervals(score, 0.5, 1.0, 7.6)
    assert (first.start, first.end, first.peak, first.score) == (1.0, 4.0, 1.5, pytest.approx(0.9))
    assert (second.start, second.end) == (6.0, 7.0)
    assert intervals(score, 0.95, 1.0, 7.6) == []
    (everything,) = intervals(np.ones(8, np.float32), 0.5, 1.0, 7.6)
    assert (everything.start, everything.end) == (0.0, 7.6)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(run_of_clips):
    return Detector(Run.open(run_of_clips))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from counterpoint.data import arcade

    script = next(c for c in (arcade.script("test", i) for i in range(100)) if c.label and c.snippets < 30)
    path = tmp_path_factory.mktemp("clip") / "a clip.mp4"
    arcade.write_clip(script, path)
    return path, script


def test_a_file_is_watched_from_end_to_end(detector, clip):
    path, script = clip
    told = []
    found = detector.detect(path, threshold=0.3, progress=lambda *p: told.append(p))
    assert found.duration == pytest.approx(script.duration, abs=0.1)
    assert found.score.shape == found.audio.shape == found.visual.shape == (script.snippets,)
    assert ((found.score >= 0) & (found.score <= 1)).all()
    assert found.has_audio
    assert found.speed > 1
    assert [p[0] for p in told] == sorted(p[0] for p in told)
    assert told[-1][0] == pytest.approx(script.duration, abs=0.1)
    assert len(found.thumbnails) == len(found.intervals)
    json.dumps(found.as_dict())


def test_scores_are_those_of_the_features_it_was_trained_on(detector, clip, run_of_clips):
    """What training sees of a clip (drawn) and what detection sees of its file (decoded) score alike."""
    import torch

    from counterpoint.data import arcade

    path, script = clip
    index = int(script.name.rpartition("-")[2])
    _, _, visual, audio, _ = arcade.features("test", index, 0, {"name": "light"}, {"name": "logmel"})
    learner = training.load_learner(Run.open(run_of_clips))
    with torch.no_grad():
        drawn = learner.timeline(torch.from_numpy(audio)[None], torch.from_numpy(visual)[None])["score"][0].numpy()
    found = detector.detect(path)
    assert np.abs(found.score - drawn).mean() < 0.08
    assert np.corrcoef(found.score, drawn)[0, 1] > 0.8


def test_long_files_are_scored_in_windows_as_in_one_piece(detector, clip, tmp_path, monkeypatch):
    path, script = clip
    monkeypatch.setattr(detector, "window", 1000)
    whole = detector.detect(path).score
    monkeypatch.setattr(detector, "window", 12)
    assert script.snippets > 18
    windowed = detector.detect(path).score
    assert len(windowed) == len(whole)
    assert np.corrcoef(whole, windowed)[0, 1] > 0.7


def test_no_sound_is_noted_and_scored_all_the_same(detector, tmp_path):
    write_video(tmp_path / "mute.mp4", [np.full((64, 96, 3), n, np.uint8) for n in range(48)], None)
    found = detector.detect(tmp_path / "mute.mp4")
    assert not found.has_audio
    assert len(found.score) == 3
    assert "no audio track" in found.notes[0]


def test_bad_files_are_reported_and_the_others_done(detector, clip, tmp_path, capsys):
    path, _ = clip
    (tmp_path / "text.mp4").write_text("nothing")
    found, failures = detect_files(detector, [tmp_path / "gone.mp4", path, tmp_path / "text.mp4", tmp_path])
    assert [d.video for d in found] == [path]
    assert [f[0] for f in failures] == [tmp_path / "gone.mp4", tmp_path / "text.mp4", tmp_path]
    reasons = [reason for _, reason in failures]
    assert reasons[0] == "no such file"
    assert "not a media file" in reasons[1]
    assert "is a directory" in reasons[2]
    with pytest.raises(DataError, match=r"gone\.mp4: no such file"):
        detector.detect(tmp_path / "gone.mp4")


@pytest.mark.usefixtures("drawn")
def test_the_command_prints_and_writes(run_of_clips, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, script = clip
    words = ["detect", str(path), "--run", str(run_of_clips), "--threshold", "0.05"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert str(path) in out
    assert "x real time" in out
    assert "Page: detection.html" in out
    assert (tmp_path / "detection.html").read_text().count("<video") == 1
    assert cli.main([*words, "--json", "--html", "other.html"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["videos"][0]["video"] == str(path)
    assert len(told["videos"][0]["score"]) == script.snippets
    assert told["failed"] == []


def test_the_command_with_bad_files_exits_with_2(run_of_clips, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.mp4").write_bytes(b"")
    code = cli.main(["detect", "gone.mp4", str(clip[0]), "empty.mp4", "--run", str(run_of_clips)])
    captured = capsys.readouterr()
    assert code == 2
    assert "gone.mp4: no such file" in captured.err
    assert "empty.mp4: the file is empty" in captured.err
    assert str(clip[0]) in captured.out
    page = (tmp_path / "detection.html").read_text()
    assert "the file is empty" in page
    (tmp_path / "detection.html").unlink()
    assert cli.main(["detect", "gone.mp4", "--run", str(run_of_clips)]) == 2
    assert not (tmp_path / "detection.html").exists()


def test_the_newest_run_is_taken_when_none_is_named(run_of_clips, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["detect", str(clip[0])]) == 0
    assert "Run: the built-in model arcade-small" in capsys.readouterr().out
    shutil.copytree(run_of_clips, tmp_path / "runs" / "demo" / "mine")
    assert cli.main(["detect", str(clip[0])]) == 0


def test_a_moment_never_ends_before_it_begins():
    score = np.zeros(18, np.float32)
    score[13:15] = 0.9
    (moment,) = intervals(score, 0.5, SNIPPET, 4.0)  # a length that is too short
    assert moment.start <= moment.peak <= moment.end == 4.0


def test_progress_ends_at_the_length_that_was_read(detector, tmp_path):
    """The header of joined recordings gives the length of one."""
    parts = [np.full((48, 64, 3), n * 4, np.uint8) for n in range(48)]
    write_video(tmp_path / "one.ts", parts, None)
    path = tmp_path / "three.ts"
    path.write_bytes((tmp_path / "one.ts").read_bytes() * 3)
    told = []
    found = detector.detect(path, threshold=1e-6, progress=lambda *p: told.append(p))
    assert found.duration == pytest.approx(6.0, abs=0.1)
    assert all(done <= whole for done, whole, _ in told)
    assert told[-1][:2] == (found.duration, found.duration)
    assert found.intervals
    assert all(0 <= i.start <= i.peak <= i.end <= found.duration for i in found.intervals)
    assert len(found.thumbnails) == len(found.intervals)


def test_one_unreadable_file_does_not_end_the_batch(detector, clip, tmp_path, monkeypatch):
    path, _ = clip
    locked, broken = tmp_path / "locked.mkv", tmp_path / "broken.mkv"
    locked.write_bytes(b"x" * 100)
    broken.write_bytes(b"x" * 100)
    opened = Path.open

    def refuse(self, *args, **options):
        if self == locked:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    watch = detector.detect

    def fail(path, **options):
        if path == broken:
            raise OSError(5, "Input/output error")
        return watch(path, **options)

    monkeypatch.setattr(detector, "detect", fail)
    found, failures = detect_files(detector, [locked, path, broken])
    assert [d.video for d in found] == [path]
    assert failures == [
        (locked, "cannot be opened (Permission denied)"),
        (broken, "[Errno 5] Input/output error"),
    ]


def test_a_folder_is_walked_and_every_entry_accounted_for(clip, tmp_path):
    path, _ = clip
    (tmp_path / "a").mkdir()
    shutil.copy(path, tmp_path / "a" / "one.mp4")
    shutil.copy(path, tmp_path / "a" / "without an ending")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "linked").symlink_to(path.parent)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "notes.txt").write_text("no video")
    (tmp_path / "broken.mp4").write_text("no video either")
    listed = find_videos([tmp_path, "https://example.org/a.mp4", tmp_path / "gone.mp4"])
    assert [p.relative_to(tmp_path).as_posix() for p in listed.videos] == [
        "a/one.mp4",
        "a/without an ending",
        f"b/linked/{path.name}",
        "broken.mp4",
    ]
    assert [p.relative_to(tmp_path).as_posix() for p, _ in listed.left_out] == ["b/loop", "notes.txt"]
    ((name, reason), missing) = listed.failures
    assert missing == (tmp_path / "gone.mp4", "no such file or folder")
    assert name == "https://example.org/a.mp4"
    assert "is a web address, which is not supported; download the file" in reason


def test_a_web_address_is_named_whole(detector):
    _, ((_, reason),) = detect_files(detector, [Path("https://example.org/a.mp4")])
    assert reason == "https://example.org/a.mp4: is a web address; download the file and name it"


def test_the_command_tries_the_page_before_the_work(run_of_clips, clip, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Detector, "detect", lambda *a, **b: pytest.fail("watched"))
    words = ["detect", str(clip[0]), "--run", str(run_of_clips), "--html", str(tmp_path / "file" / "page.html")]
    assert cli.main(words) == 2
    assert "page.html cannot be written" in capsys.readouterr().err


def test_the_command_names_its_run_skips_others_and_warns(run_of_clips, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_of_clips, tmp_path / "runs" / "good")
    for name, changes in (("views", {"task": "views"}), ("features", {"backbones": None})):
        (tmp_path / name).mkdir()
        shutil.copytree(changed(run_of_clips, tmp_path / name, **changes), tmp_path / "runs" / name)
    for age, name in enumerate(("views", "features", "good")):
        weights = next((tmp_path / "runs" / name).glob("*.safetensors"))
        os.utime(weights, (10**9 - age, 10**9 - age))
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "config.yaml").write_text("[")
    (tmp_path / "runs" / "damaged" / "model.safetensors").write_bytes(b"")
    assert cli.main(["detect", str(clip[0])]) == 0
    out, err = capsys.readouterr()
    assert "Run: runs/good (the newest that can detect)" in out
    assert "skipped the newer run runs/views: it is a run of" in err
    assert "skipped the newer run runs/features: it was trained on features made elsewhere" in err
    assert "skipped the newer run runs/damaged: it is damaged" in err
    assert "warning: the features (light and logmel) are fixed statistics" in err
    assert "warning: scores are not calibrated" in err
    assert "scores are not calibrated" in (tmp_path / "detection.html").read_text()


def test_average_precision_stands_beside_chance_where_truth_is_known(detector, clip, tmp_path):
    from counterpoint.report.detection import write_detection_report

    path, script = clip
    found = detector.detect(path, truth=[(0.0, 2.0)])
    precision, chance = found.precision()
    assert chance == pytest.approx(2.0 / (script.snippets * SNIPPET), abs=0.01)
    assert 0 < precision <= 1
    assert found.as_dict()["chance"] == pytest.approx(chance, abs=1e-4)
    page = write_detection_report([found], tmp_path / "page.html").read_text()
    assert f"average precision {precision:.2f}, by chance {chance:.2f}" in page
    assert detector.detect(path).precision() is None


# --- runs -------------------------------------------------------------------------------------------------------------


def changed(run_of_clips, tmp_path, **changes) -> Path:
    shutil.copytree(run_of_clips, tmp_path / "run")
    # JSON is YAML too. Entries that are no settings are facts.
    for name in ("config.yaml", "facts.json"):
        file = tmp_path / "run" / name
        content = yaml.safe_load(file.read_text())
        file.write_text(json.dumps(content | {k: v for k, v in changes.items() if k in content}))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"backbones": None}, "trained on features made elsewhere"),
        ({"task": "views"}, "detection needs one of the task bags"),
        ({"backbones": {"visual": {"name": "lite"}, "audio": {"name": "logmel"}}}, "did you mean light"),
        (
            {"backbones": {"visual": {"name": "light"}, "audio": {"name": "vggish", "weights": "/gone.pth"}}},
            "/gone.pth: no such weights file",
        ),
    ],
)
def test_runs_that_cannot_detect_raise_an_error(run_of_clips, tmp_path, changes, expected):
    from counterpoint.errors import CounterpointError

    with pytest.raises(CounterpointError, match=expected):
        Detector(Run.open(changed(run_of_clips, tmp_path, **changes)))


def test_a_run_without_weights_raises_an_error(run_of_clips, tmp_path):
    folder = changed(run_of_clips, tmp_path)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(RunError, match="train it first"):
        Detector(Run.open(folder))
