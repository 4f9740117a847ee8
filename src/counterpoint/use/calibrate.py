"""Calibrate a detector on labelled validation videos: probabilities, a threshold for a goal, and both with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint import data as sources
from counterpoint.data.bags import BagData, TestVideo
from counterpoint.data.devices import computing_on
from counterpoint.engine.options import Loop
from counterpoint.engine.run import CALIBRATED, Run
from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import check_there
from counterpoint.tasks import calibration as room
from counterpoint.tasks.calibration import Calibration, Counts, Watched
from counterpoint.use.detect import Detector, Windows
from counterpoint.words import counted

RECALL = 0.9  # the goal where none is given
CURVE = 100  # points of the kept curve
LEVEL = (2.5, 97.5)  # percentiles of the intervals


def calibrate(
    run: Run,
    data: str,
    *,
    recall: float | None = None,
    alarms_per_hour: float | None = None,
    method: str = "auto",
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> tuple[Calibration, Path]:
    """Calibrate a run on the valid split of a source, and keep the calibration in the run. Return it and its page.

    Args:
        run: A trained run that can detect.
        data: A source of labelled videos, such as "videos:mine". The run's backbones compute its features.
        recall: Wanted share of true moments found, above 0 and up to 1. Default: 0.9, unless `alarms_per_hour` is given.
        alarms_per_hour: Wanted number of false alarms in an hour without violence, 0 or more.
        method: "isotonic", "platt", or "auto": isotonic from 100 videos on.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        say: Called with lines for the user.

    Raises CounterpointError for a goal out of range, RunError for a run that cannot detect. Raises DataError for too few videos,
    for videos without a violent moment, and for features of other backbones.
    """
    from counterpoint.report.calibration import write_calibration_report

    if recall is not None and alarms_per_hour is not None:
        raise CounterpointError(
            "--recall and --alarms-per-hour are two goals; a threshold meets one, so give one of them"
        )
    if recall is not None and not 0 < recall <= 1:
        raise CounterpointError(f"--recall must be above 0 and at most 1, got {recall}")
    if alarms_per_hour is not None and not alarms_per_hour >= 0:
        raise CounterpointError(f"--alarms-per-hour must be 0 or more, got {alarms_per_hour}")
    if method not in room.METHODS:
        raise CounterpointError(f"--method must be one of {', '.join(room.METHODS)}, got {method}")
    if recall is None and alarms_per_hour is None:
        recall = RECALL
    if data.startswith("videos:"):
        check_there([data.removeprefix("videos:").partition("?")[0]])
    detector = Detector(run, device)
    with computing_on(Loop(device=device).on()):
        source = _source(detector, data)
    for note in source.notes:
        say(f"note: {note}")
    videos = [score_video(detector, source, video) for video in source.valid]
    room.check_videos(videos)
    method = room.chosen_method(videos) if method == "auto" else method
    made = make_calibration(detector, videos, data, method, recall, alarms_per_hour)
    run.save_calibration(made.as_dict())
    return made, write_calibration_report(run.path / CALIBRATED, str(run.path), made)


def _source(detector: Detector, data: str) -> BagData:
    """Load a source with the backbones of the run. DataError where it has other features."""
    wanted = {kind: getattr(detector, kind).describe() for kind in ("visual", "audio")}
    options: dict[str, Any] = {kind: _spelled(spec) for kind, spec in wanted.items()}
    name = data.partition(":")[0].partition("?")[0]
    if name == "videos":
        options["snippet_seconds"] = detector.snippet_seconds
    known = name in sources.SOURCES and sources.SOURCES[name].module.endswith((".videos", ".arcade", ".ucf_crime"))
    found: BagData = sources.load(data, task="bags", **(options if known else {}))
    if found.backbones != wanted or found.snippet_seconds != detector.snippet_seconds:
        raise DataError(
            f"{data} has features of other backbones than the run {detector.run.path}; calibrate on videos: "
            "--data videos:DIR"
        )
    return found


def _spelled(spec: Mapping[str, Any]) -> str:
    """Return a backbone's description in the form of the command line, NAME or NAME@FILE."""
    weights = spec.get("weights")
    return f"{spec['name']}@{weights}" if weights and weights != "DEFAULT" else str(spec["name"])


def score_video(detector: Detector, source: BagData, video: TestVideo) -> Watched:
    """Score a labelled video in windows, as detection does. A snippet is violent where its middle is.

    Args:
        detector: A trained run.
        source: The data of the video, for the length of a snippet.
        video: The video; of several crops, the mean of their scores is taken.
    """
    curves = []
    for crop in video.visual:
        windows = Windows(detector.score_rows, detector.window)
        parts = [*windows.feed(crop, video.audio), *windows.finish()]
        curves.append(np.concatenate([part["score"] for part in parts]))
    middle = video.truth.reshape(-1, source.frames_per_snippet)[:, source.frames_per_snippet // 2]
    return Watched(video.name, np.mean(curves, 0, np.float64), middle.astype(bool), source.snippet_seconds)


def make_calibration(
    detector: Detector, videos: list[Watched], data: str, method: str, recall: float | None, alarms: float | None
) -> Calibration:
    """Fit the map, choose the threshold, and measure both with intervals.

    Args:
        detector: The run.
        videos: Labelled videos; see `check_videos`.
        data: Name of the data, for the record.
        method: "isotonic" or "platt".
        recall, alarms: The goal: a recall, or false alarms an hour; the other is None.
    """
    x, y = room.fitted(videos, method)
    mapped = Calibration(method, x, y, 0.5, detector.weights)
    counts = room.counts(videos, [mapped(video.score) for video in videos])
    every = np.ones(len(videos))
    chosen = int(counts.reaching(every, recall=recall, alarms=alarms))
    threshold = float(counts.grid[chosen])
    weight = room.resampled(videos)
    redrawn = counts.grid[counts.reaching(weight, recall=recall, alarms=alarms)]
    honest = _crossed_figures(videos, counts, recall, alarms)
    truth = np.concatenate([video.truth for video in videos])
    before = room.reliability(np.concatenate([video.score for video in videos]), truth)
    after = room.reliability(np.concatenate(room.crossed(videos, method)), truth)
    positive = sum(bool(video.truth.any()) for video in videos)
    goal = f"a recall of {recall:g}" if recall is not None else f"{alarms:g} false alarms an hour"
    low, high = np.percentile(redrawn, LEVEL)
    said = (
        f"{method}, on {counted(len(videos), 'video')} of {data} ({positive} with violence); threshold {threshold:.3f} "
        f"({low:.3f} to {high:.3f}) for {goal}"
    )
    step = max(1, len(counts.grid) // CURVE)
    facts = {
        "said": said,
        "data": data,
        "videos": len(videos),
        "positive": positive,
        "whole": sum(bool(video.truth.all()) for video in videos),
        "moments": int(counts.moments.sum()),
        "hours": float(sum(len(video.score) * video.seconds for video in videos) / 3600),
        "goal": {"recall": recall, "alarms_per_hour": alarms},
        "threshold": [float(low), float(high)],
        "recall": _with_interval(counts.recall(every)[chosen], counts.recall(weight)[:, chosen], honest[0]),
        "false_alarms_per_hour": _with_interval(
            counts.false_alarms(every)[chosen], counts.false_alarms(weight)[:, chosen], honest[1]
        ),
        "raw": {**before[1], "bins": before[0]},
        "calibrated": {**after[1], "bins": after[0]},
        "curve": {
            "threshold": _short(counts.grid[::step]),
            "recall": _short(counts.recall(every)[::step]),
            "false_alarms_per_hour": _short(counts.false_alarms(every)[::step]),
        },
    }
    return Calibration(method, x, y, threshold, detector.weights, facts)


def _with_interval(value: float, drawn: NDArray[Any], crossed: float) -> dict[str, float]:
    low, high = np.percentile(drawn, LEVEL)
    return {"value": float(value), "low": float(low), "high": float(high), "crossed": crossed}


def _short(values: NDArray[Any]) -> list[float]:
    return [round(float(value), 6) for value in values]


def _crossed_figures(
    videos: list[Watched], counts: Counts, recall: float | None, alarms: float | None
) -> tuple[float, float]:
    """Return recall and false alarms an hour where each video is judged by a threshold that the others chose."""
    found = moments = false = 0
    hours = 0.0
    for row in range(len(videos)):
        others = np.ones(len(videos))
        others[row] = 0
        chosen = int(counts.reaching(others, recall=recall, alarms=alarms))
        found += int(counts.found[row, chosen])
        moments += int(counts.moments[row])
        false += int(counts.alarms[row, chosen])
        hours += float(counts.hours[row])
    return found / max(1, moments), false / max(1e-9, hours)
