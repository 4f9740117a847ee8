"""Detection: a trained run of the task `bags` on real video files, streamed, in bounded memory.

Snippet features come from the backbones the run was trained on. Scores are computed in windows of the run's training
length that overlap by half, each snippet taken from the window it stands most central in; a file no longer than one
window is scored in one pass. So a two-hour film needs no more memory than a two-minute one, and no attention map grows
with its length.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.training import load_learner

MAX_THUMBNAILS = 24
Scores = dict[str, NDArray[np.float32]]  # "score", "audio", "visual": probabilities [T]


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
    """What was found in one video file."""

    video: Path
    duration: float  # seconds
    snippet_seconds: float
    score: NDArray[np.float32]  # [T] fused probability of each snippet
    audio: NDArray[np.float32]  # [T] the audio stream's own
    visual: NDArray[np.float32]  # [T] the visual stream's own
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

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the pictures."""
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
            "notes": self.notes,
            "speed": round(self.speed, 2),
        }


class Windows:
    """Scores a stream of snippet features window by window; holds one and a half windows at most."""

    def __init__(self, score: Callable[[NDArray[np.float32], NDArray[np.float32]], Scores], length: int) -> None:
        self.score = score
        self.length = max(4, length)
        self.visual: list[NDArray[np.float32]] = []
        self.audio: list[NDArray[np.float32]] = []
        self.held = 0
        self.base = 0  # index of the first held snippet
        self.emitted = 0

    def _window(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        visual, audio = np.concatenate(self.visual), np.concatenate(self.audio)
        self.visual, self.audio = [visual], [audio]
        return visual, audio

    def _emit(self, scores: Scores, first: int, stop: int) -> Scores:
        """Rows emitted..stop of scores whose first row is snippet `first`."""
        part = {name: values[self.emitted - first : stop - first] for name, values in scores.items()}
        self.emitted = stop
        return part

    def feed(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> Iterator[Scores]:
        self.visual.append(visual)
        self.audio.append(audio)
        self.held += len(visual)
        half = self.length // 2
        while self.held >= self.length + half:
            v, a = self._window()
            yield self._emit(
                self.score(v[: self.length], a[: self.length]), self.base, self.base + self.length - half // 2
            )
            self.visual, self.audio = [v[half:]], [a[half:]]
            self.held -= half
            self.base += half

    def finish(self) -> Iterator[Scores]:
        if self.held == 0:
            return
        v, a = self._window()
        end = self.base + self.held
        if self.held > self.length:
            stop = self.base + self.length - self.length // 4
            yield self._emit(self.score(v[: self.length], a[: self.length]), self.base, stop)
            v, a = v[-self.length :], a[-self.length :]
        yield self._emit(self.score(v, a), end - len(v), end)


def intervals(score: NDArray[np.float32], threshold: float, snippet_seconds: float, duration: float) -> list[Interval]:
    """Stretches of snippets above the threshold, those with a single snippet between them joined.

    Args:
        score: [T] probabilities.
        threshold: strict lower bound.
        snippet_seconds: length of a snippet; ends are clipped to `duration` (seconds).
    """
    above = np.flatnonzero(score > threshold)
    if len(above) == 0:
        return []
    found = []
    for stretch in np.split(above, np.flatnonzero(np.diff(above) > 2) + 1):
        first, last = int(stretch[0]), int(stretch[-1])
        best = first + int(score[first : last + 1].argmax())
        end = min((last + 1) * snippet_seconds, duration)
        found.append(
            Interval(first * snippet_seconds, end, min((best + 0.5) * snippet_seconds, duration), float(score[best]))
        )
    return found


class Detector:
    """A trained run, ready to watch videos."""

    def __init__(self, run: Run) -> None:
        """Raises RunError when the run cannot be used: no weights, or features this machine cannot compute."""
        from counterpoint import encoders

        self.run = run
        if run.config.get("task") != "bags":
            raise RunError(f"{run.path} is a run of {run.slug}; detection needs one of the task bags (macil-sd)")
        self.learner = load_learner(run)
        facts = run.facts()
        backbones = facts.get("backbones")
        if not backbones:
            raise RunError(
                f"{run.path} was trained on features made elsewhere ({run.config['data']}), which cannot be computed from "
                "a video here. Train on arcade, or on your own videos: counterpoint train macil-sd --data videos:DIR"
            )
        self.visual = encoders.build_visual(backbones["visual"])
        self.audio = encoders.build_audio(backbones["audio"])
        if (self.visual.dim, self.audio.dim) != (facts["visual_dim"], facts["audio_dim"]):
            raise RunError(
                f"{run.path}: its backbones give features {self.visual.dim} and {self.audio.dim} wide, its network takes "
                f"{facts['visual_dim']} and {facts['audio_dim']}"
            )
        self.snippet_seconds = float(facts["snippet_seconds"])
        self.window = int(run.config["config"]["max_length"])

    @torch.no_grad()
    def _score(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> Scores:
        scores = self.learner.timeline(torch.from_numpy(audio)[None], torch.from_numpy(visual)[None])  # type: ignore[operator]
        return {name: value[0].float().numpy() for name, value in scores.items()}

    def detect(
        self,
        path: Path,
        *,
        threshold: float = 0.5,
        truth: list[tuple[float, float]] | None = None,
        progress: Callable[[float, float, float], None] | None = None,
    ) -> Detection:
        """Watch one video. `progress(seconds done, seconds in all, x real time)` is called as it goes.

        Raises DataError when the file cannot be read; what is only damaged is read as far as it goes, and noted.
        """
        from counterpoint.data.media import SnippetReader, frame_at

        started = time.perf_counter()
        with SnippetReader(path, self.visual, self.audio, snippet_seconds=self.snippet_seconds) as reader:
            windows = Windows(self._score, self.window)
            parts: list[Scores] = []
            done = 0
            for visual, audio in reader.features():
                parts += windows.feed(visual, audio)
                done += len(visual)
                if progress:
                    seconds = done * self.snippet_seconds
                    progress(seconds, reader.info.duration, seconds / max(1e-9, time.perf_counter() - started))
            parts += windows.finish()
        if not parts:
            raise DataError(f"{path}: not a single snippet could be decoded")
        scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        watched = time.perf_counter() - started
        length = reader.info.duration or len(scores["score"]) * self.snippet_seconds
        found = intervals(scores["score"], threshold, self.snippet_seconds, length)
        highest = sorted(found, key=lambda i: -i.score)[:MAX_THUMBNAILS]
        thumbnails = []
        for interval in sorted(highest, key=lambda i: i.peak):
            picture = frame_at(path, interval.peak, width=480)
            if picture is not None:
                thumbnails.append(Thumbnail(interval.peak, jpeg(picture)))
        return Detection(
            video=path,
            duration=length,
            snippet_seconds=self.snippet_seconds,
            threshold=threshold,
            intervals=found,
            thumbnails=thumbnails,
            truth=truth,
            has_audio=reader.info.has_audio,
            width=reader.info.width,
            height=reader.info.height,
            notes=reader.notes,
            speed=length / max(1e-9, watched),
            run=str(self.run.path),
            **scores,
        )


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """A JPEG file of an RGB picture [H, W, 3]."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=80)
    return out.getvalue()


def detect_files(
    detector: Detector,
    paths: Sequence[Path],
    *,
    threshold: float = 0.5,
    truths: Mapping[Path, list[tuple[float, float]]] | None = None,
    console: Console | None = None,
) -> tuple[list[Detection], list[tuple[Path, str]]]:
    """Watch several files with a progress bar; those that cannot be read are returned with the reason.

    `truths` gives the true moments (start, end; seconds) of files where they are known, for the page.
    """
    found: list[Detection] = []
    failures: list[tuple[Path, str]] = []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
    with bar:
        for path in paths:
            row = bar.add_task(path.name, total=None, speed="")

            def progress(done: float, total: float, speed: float, row: Any = row) -> None:
                bar.update(row, completed=done, total=total or None, speed=f"{speed:.1f} x real time")

            try:
                found.append(
                    detector.detect(path, threshold=threshold, truth=(truths or {}).get(path), progress=progress)
                )
                bar.update(row, total=1, completed=1)
            except CounterpointError as error:
                failures.append((path, str(error).removeprefix(f"{path}: ")))
                bar.update(row, speed="failed")
    return found, failures
