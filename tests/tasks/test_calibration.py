"""Calibration: the map, the threshold for a goal, intervals, and videos that do not suffice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from counterpoint import cli
from counterpoint.engine.run import Run
from counterpoint.errors import DataError, RunError
from counterpoint.tasks import calibration as room
from counterpoint.tasks.calibration import Calibration, Watched
from counterpoint.tasks.moments import Alarms, intervals


def videos(count=40, length=60, seed=0, sharpness=3.0):
    """Make videos whose raw score s is overconfident: the true probability of violence has the logit of s / `sharpness`."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(count):
        level = rng.normal(-2.0 if n % 2 else 0.0, 1.5, length)
        truth = (rng.random(length) < 1 / (1 + np.exp(-level))) & (n % 2 == 0)
        score = 1 / (1 + np.exp(-sharpness * level))
        found.append(Watched(f"v{n}", score, truth, 0.5))
    return found


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_probabilities_become_shares(method):
    made = videos(60)
    truth = np.concatenate([v.truth for v in made])
    _, before = room.reliability(np.concatenate([v.score for v in made]), truth)
    _, after = room.reliability(np.concatenate(room.crossed(made, method)), truth)
    assert after["ece"] < 0.06 < before["ece"]
    assert after["brier"] < before["brier"]


def test_platt_finds_the_slope_that_was_planted():
    made = [Watched("v", v.score, v.truth, 0.5) for v in videos(400, seed=1) if int(v.name[1:]) % 2 == 0]
    (slope, intercept), _ = room.fitted(made, "platt")
    assert slope == pytest.approx(1 / 3, abs=0.03)
    assert intercept == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_the_map_never_decreases_and_survives_its_file(method):
    x, y = room.fitted(videos(), method)
    made = Calibration(method, x, y, 0.3, "abc", {"said": "so"})
    raw = np.linspace(0, 1, 500)
    mapped = made(raw)
    assert (np.diff(mapped) >= 0).all()
    assert mapped[0] < mapped[-1]
    assert ((mapped >= 0) & (mapped <= 1)).all()
    again = Calibration.of_dict(json.loads(json.dumps(made.as_dict())))
    np.testing.assert_array_equal(again(raw), mapped)
    assert np.isnan(made(np.array([np.nan]))).all()


def test_each_video_s_probabilities_come_from_the_others():
    """A video of reversed truth changes the others' maps, but its own probabilities only by their folds."""
    made = videos(20)
    changed = [v._replace(truth=~v.truth) if v.name == "v0" else v for v in made]
    mine, others = room.crossed(made, "platt")[0], room.crossed(changed, "platt")[0]
    np.testing.assert_array_equal(mine, others)
    assert any((a != b).any() for a, b in zip(room.crossed(made, "platt"), room.crossed(changed, "platt"), strict=True))


@pytest.mark.parametrize("goal", [0.5, 0.8, 1.0])
def test_the_threshold_is_the_highest_that_reaches_the_recall(goal):
    made = videos()
    counts = room.counts(made, [v.score for v in made])
    every = np.ones(len(made))
    chosen = int(counts.reaching(every, recall=goal, alarms=None))
    assert counts.recall(every)[chosen] >= goal
    assert (counts.recall(every)[chosen + 1 :] < goal).all()
    # The counts are those of the rule that detection uses.
    hit = total = 0
    for video in made:
        spans = intervals(video.score.astype(np.float32), counts.grid[chosen], 1.0, len(video.score))
        for a, b in video.moments:
            total += 1
            hit += any(
                span.start < b and span.end > a and (video.score[a:b] > counts.grid[chosen]).any() for span in spans
            )
    assert counts.recall(every)[chosen] == pytest.approx(hit / total)
    for row, video in enumerate(made[:8]):
        spans = intervals(video.score.astype(np.float32), counts.grid[chosen], 1.0, len(video.score))
        false = sum(not video.truth[int(span.start) : int(span.end)].any() for span in spans)
        assert counts.alarms[row, chosen] == false


def test_false_alarms_stay_below_the_goal_from_the_threshold_on():
    made = videos()
    counts = room.counts(made, [v.score for v in made])
    every = np.ones(len(made))
    chosen = int(counts.reaching(every, recall=None, alarms=30.0))
    rates = counts.false_alarms(every)
    assert (rates[chosen:] <= 30).all()
    assert rates[chosen - 1] > 30
    assert counts.false_alarms(every)[int(counts.reaching(every, recall=None, alarms=0.0))] == 0
    weight = room.resampled(made, 50)
    assert weight.sum(1).tolist() == [len(made)] * 50
    assert counts.grid[counts.reaching(weight, recall=None, alarms=30.0)].std() > 0


def test_the_method_follows_the_number_of_videos():
    assert room.chosen_method(videos(40)) == "platt"
    assert room.chosen_method(videos(200)) == "isotonic"


def test_videos_that_do_not_suffice_are_an_error():
    made = videos(20)
    with pytest.raises(DataError, match="none of the 10 validation videos has a violent moment"):
        room.check_videos([v for v in made if not v.truth.any()])
    with pytest.raises(DataError, match="too few: 10 with a violent moment and 3 without, at least 4"):
        room.check_videos([v for v in made if v.truth.any()] + made[1:6:2])
    with pytest.raises(DataError, match="not more often violent"):
        room.fitted([v._replace(score=1 - v.score) for v in made], "platt")
    with pytest.raises(DataError, match="not more often violent"):
        room.fitted([v._replace(score=1 - v.score) for v in made], "isotonic")
    with pytest.raises(RunError, match="holds no calibration"):
        Calibration.of_dict(
            {"method": "isotonic", "x": [0, 0], "y": [1, 0], "threshold": 2, "weights": "", "facts": {}}
        )


@pytest.mark.parametrize("seed", range(5))
def test_alarms_of_a_stream_are_the_intervals_of_the_whole(seed):
    score = np.random.default_rng(seed).random(300).astype(np.float32)
    stream, found = Alarms(0.7, 0.5), []
    for number, value in enumerate(score):
        event = stream.feed(number, float(value))
        if event and event[0] == "end":
            found.append(event[1])
    last = stream.finish()
    found += [last[1]] if last else []
    assert found == intervals(score, 0.7, 0.5, 150.0)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_run(run_of_clips, tmp_path_factory):
    import shutil

    path = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(run_of_clips, path)
    return path


DATA = "arcade?train=4&test=2&valid=16"


@pytest.mark.slow
def test_the_command_keeps_a_calibration_that_detect_uses(own_run, run_of_clips, tmp_path, monkeypatch, capsys):
    from counterpoint.data.media import write_video
    from counterpoint.use.detect import Detector

    monkeypatch.setenv("COUNTERPOINT_CACHE", str(run_of_clips.parent.parent / "cache"))
    before = Detector(Run.open(own_run))
    assert cli.main(["calibrate", str(own_run), "--data", DATA, "--recall", "0.8"]) == 0
    out = capsys.readouterr().out
    assert "Calibrated: platt, on 16 videos of arcade" in out
    assert "for a recall of 0.8" in out
    page = (own_run / "calibration.html").read_text()
    assert "Recall against false alarms" in page
    kept = json.loads((own_run / "calibration.json").read_text())
    assert kept["facts"]["recall"]["value"] >= 0.8
    low, high = kept["facts"]["threshold"]
    assert low <= kept["threshold"] <= high
    film = tmp_path / "grey.mp4"
    write_video(film, [np.full((64, 96, 3), 5 * n, np.uint8) for n in range(48)], None)
    after = Detector(Run.open(own_run))
    found, raw = after.detect(film), before.detect(film)
    assert found.threshold == kept["threshold"]
    np.testing.assert_array_equal(found.raw, raw.score)
    np.testing.assert_allclose(found.score, after.calibration(raw.score))
    assert not any("not calibrated" in warning for warning in after.warnings)
    capsys.readouterr()
    assert cli.main(["detect", str(film), "--run", str(own_run), "--html", str(tmp_path / "p.html")]) == 0
    assert "Calibrated: platt, on 16 videos" in capsys.readouterr().out
    # Other weights make it void.
    (own_run / "calibration.json").write_text(json.dumps(kept | {"weights": "others"}))
    void = Detector(Run.open(own_run))
    assert void.calibration is None
    assert any("belongs to other weights" in warning for warning in void.warnings)
    (own_run / "calibration.json").write_text("{}x")
    with pytest.raises(RunError, match=r"calibration\.json"):
        Detector(Run.open(own_run))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recall", "0.9", "--alarms-per-hour", "2"], "two goals"),
        (["--recall", "1.2"], "--recall must be above 0 and at most 1"),
        (["--alarms-per-hour", "-1"], "--alarms-per-hour must be 0 or more"),
        (["--method", "beta"], "--method must be one of auto, isotonic, platt"),
    ],
)
def test_goals_out_of_range(run_of_clips, words, expected, capsys):
    assert cli.main(["calibrate", str(run_of_clips), "--data", DATA, *words]) == 2
    assert expected in capsys.readouterr().err


def test_features_of_other_backbones_are_an_error(run_of_clips, monkeypatch, capsys):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(run_of_clips.parent.parent / "cache"))
    assert cli.main(["calibrate", str(run_of_clips), "--data", "async-bags"]) == 2
    assert "async-bags has features of other backbones" in capsys.readouterr().err
