"""Describe the moments found in a video: times, scores, pictures and agreement with the truth."""

from __future__ import annotations

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
            "intervals": [{k: round(v, 4) for k, v in asdict(i).items()} for i in self.intervals],
            "snippet_seconds": self.snippet_seconds,
            **{k: [round(float(v), 4) for v in getattr(self, k)] for k in ("score", "audio", "visual")},
            "average_precision": None if precision is None else round(precision[0], 4),
            "chance": None if precision is None else round(precision[1], 4),
            "notes": self.notes,
            "speed": round(self.speed, 2),
        }


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
