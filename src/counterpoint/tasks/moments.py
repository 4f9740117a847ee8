"""Describe the moments found in a video: times, scores, pictures and agreement with the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.tasks.bags import frame_ap


@dataclass
class Interval:
    """A stretch of video above the threshold; times in seconds."""

    start: float
    end: float
    peak: float  # middle of the highest-scoring snippet
    score: float  # its score


@dataclass
class Thumbnail:
    """A small picture of the video at a time in seconds."""

    time: float
    jpeg: bytes


@dataclass
class Detection:
    """The result of the detection in one video file."""

    video: Path
    duration: float  # seconds
    snippet_seconds: float
    score: NDArray[np.float32]  # [T] fused probability of each snippet
    audio: NDArray[np.float32]  # [T] probability by the audio stream alone
    visual: NDArray[np.float32]  # [T] probability by the visual stream alone
    threshold: float
    intervals: list[Interval]
    thumbnails: list[Thumbnail]
    truth: list[tuple[float, float]] | None
    has_audio: bool
    width: int
    height: int
    notes: list[str]
    speed: float  # times real time
    run: str
    fps: float = 0.0  # average pictures per second, 0 where unknown
    steady: bool = False  # the file's clock never jumped, so seeks by time are reliable
    raw: NDArray[np.float32] | None = None  # [T] fused score before calibration; None where there is no calibration

    @property
    def highest(self) -> float:
        """The highest fused score; 0 where no score is a number."""
        return float(np.nanmax(self.score)) if np.isfinite(self.score).any() else 0.0

    @property
    def peak(self) -> float:
        """The time of the highest fused score, in seconds: the middle of its snippet."""
        best = int(np.nanargmax(self.score)) if np.isfinite(self.score).any() else 0
        return min(self.duration, (best + 0.5) * self.snippet_seconds)

    def precision(self) -> tuple[float, float] | None:
        """Return frame-level average precision and its chance level (the true share), both 0..1.

        Return None if the truth is unknown or has no moment in the video.
        """
        frames = 16
        middle = (np.arange(len(self.score) * frames) + 0.5) * self.snippet_seconds / frames
        true = np.zeros(len(middle), np.int8)
        for start, end in self.truth or []:
            true[(middle >= start) & (middle < end)] = 1
        if not true.any() or not np.isfinite(self.score).all():
            return None
        logits = np.log(np.clip(self.score, 1e-12, 1.0).astype(np.float64)) - np.log(
            np.clip(1.0 - self.score.astype(np.float64), 1e-12, 1.0)
        )
        return frame_ap(logits[None], [len(self.score)], true, frames), float(true.mean())

    def as_dict(self) -> dict[str, Any]:
        """Return all fields except the pictures, for JSON."""
        precision = self.precision()
        return {
            "video": str(self.video),
            "duration": round(self.duration, 3),
            "width": self.width,
            "height": self.height,
            "has_audio": self.has_audio,
            "threshold": self.threshold,
            "fps": round(self.fps, 4),
            "steady": self.steady,
            "calibrated": self.raw is not None,
            "highest": round(self.highest, 4),
            "peak": round(self.peak, 3),
            "intervals": [{k: round(v, 4) for k, v in asdict(i).items()} for i in self.intervals],
            "snippet_seconds": self.snippet_seconds,
            "score": [round(float(v), 6) for v in self.score],
            **{k: [round(float(v), 4) for v in getattr(self, k)] for k in ("audio", "visual")},
            "raw": None if self.raw is None else [round(float(v), 6) for v in self.raw],
            "average_precision": None if precision is None else round(precision[0], 4),
            "chance": None if precision is None else round(precision[1], 4),
            "notes": self.notes,
            "speed": round(self.speed, 2),
            "run": self.run,
        }

    @classmethod
    def of_dict(cls, kept: Mapping[str, Any], thumbnails: list[Thumbnail]) -> Detection:
        """Make a detection from the fields that `as_dict` wrote, and its pictures. KeyError or TypeError when one is missing."""
        curves: dict[str, Any] = {k: np.asarray(kept[k], np.float32) for k in ("score", "audio", "visual")}
        return cls(
            video=Path(kept["video"]),
            intervals=[Interval(**i) for i in kept["intervals"]],
            thumbnails=thumbnails,
            truth=None,
            raw=None if kept["raw"] is None else np.asarray(kept["raw"], np.float32),
            **curves,
            **{k: kept[k] for k in _PLAIN},
        )


_PLAIN = (
    *("duration", "snippet_seconds", "threshold", "has_audio", "width", "height", "notes", "speed", "run", "fps"),
    "steady",
)


def ranked(detections: Sequence[Detection]) -> list[Detection]:
    """Return detections with the highest score first; equal scores keep their order."""
    return sorted(detections, key=lambda detection: -detection.highest)


class Alarms:
    """Find moments in a stream of scores, one by one, with the joining rule of `intervals`. It holds one moment.

    Args:
        threshold: Strict lower bound of the scores in a moment, 0 to 1.
        snippet_seconds: Length of a snippet in seconds.
    """

    def __init__(self, threshold: float, snippet_seconds: float) -> None:
        self.threshold, self.seconds = threshold, snippet_seconds
        self.open: Interval | None = None
        self._quiet = 0  # snippets below the threshold since the last one above

    def feed(self, number: int, score: float) -> tuple[str, Interval] | None:
        """Take the score of snippet `number`. Return ("start", moment) or ("end", moment) where one begins or ends."""
        start = number * self.seconds
        if score > self.threshold:
            self._quiet = 0
            peak = start + self.seconds / 2
            if self.open is None:
                self.open = Interval(start, start + self.seconds, peak, score)
                return "start", self.open
            self.open.end = start + self.seconds
            if score > self.open.score:
                self.open.peak, self.open.score = peak, score
        elif self.open is not None:
            self._quiet += 1
            if self._quiet > 1:
                return self.finish()
        return None

    def finish(self) -> tuple[str, Interval] | None:
        """Return the end of the moment that is still open, at the end of a stream; None without one."""
        ended, self.open, self._quiet = self.open, None, 0
        return None if ended is None else ("end", ended)


def intervals(score: NDArray[np.float32], threshold: float, snippet_seconds: float, duration: float) -> list[Interval]:
    """Return the stretches of snippets above the threshold. Join stretches with a single snippet between them.

    Args:
        score: [T] probabilities.
        threshold: strict lower bound of the scores in a stretch, 0 to 1.
        snippet_seconds: length of a snippet in seconds.
        duration: length of the video in seconds; beginnings, ends and peaks are clipped to it.
    """
    above = np.flatnonzero(score > threshold)
    if len(above) == 0:
        return []
    found = []
    for stretch in np.split(above, np.flatnonzero(np.diff(above) > 2) + 1):
        first, last = int(stretch[0]), int(stretch[-1])
        best = first + int(score[first : last + 1].argmax())
        start, end, peak = (min(at * snippet_seconds, duration) for at in (float(first), float(last + 1), best + 0.5))
        found.append(Interval(start, end, peak, float(score[best])))
    return found
