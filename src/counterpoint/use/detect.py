"""Detect moments in video files with a trained run of the task `bags`, streamed, in bounded memory.

The backbones that the run was trained on compute the snippet features. Scores are computed in windows of the run's training
length that overlap by half. Each snippet's score is from the window in which it is most central. A file that fits in one
window is scored in one pass. Therefore a two-hour film needs no more memory than a two-minute one, and no attention map
grows with its length.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterpoint.engine.options import Loop
from counterpoint.engine.run import CALIBRATION, Run, trained
from counterpoint.errors import DataError, RunError
from counterpoint.experiment import load_learner
from counterpoint.tasks.calibration import Calibration
from counterpoint.tasks.moments import Detection, Interval, Thumbnail, intervals
from counterpoint.use.built_in import TOLD, WARNING, is_built_in
from counterpoint.words import counted

MAX_THUMBNAILS = 24
Scores = dict[str, NDArray[np.float32]]  # "score", "audio", "visual": probabilities [T]


class Windows:
    """A stream of snippet features, scored window by window. It holds at most one and a half windows.

    Args:
        score: Maps visual rows [T, Dv] and audio rows [T, Da] to scores by name, [T] each.
        length: Number of snippets of a window; at least 4 are taken.
    """

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
        """Return the rows `emitted`..stop of scores whose first row is snippet `first`."""
        part = {name: values[self.emitted - first : stop - first] for name, values in scores.items()}
        self.emitted = stop
        return part

    def feed(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> Iterator[Scores]:
        """Take the rows of n new snippets, [n, Dv] and [n, Da]. Yield the scores that are final, in the order of time."""
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
        """Yield the scores of the last snippets, at the end of the stream."""
        if self.held == 0:
            return
        v, a = self._window()
        end = self.base + self.held
        if self.held > self.length:
            stop = self.base + self.length - self.length // 4
            yield self._emit(self.score(v[: self.length], a[: self.length]), self.base, stop)
            v, a = v[-self.length :], a[-self.length :]
        yield self._emit(self.score(v, a), end - len(v), end)


# --- runs -------------------------------------------------------------------------------------------------------------


def cannot_detect(run: Run) -> str | None:
    """Return the reason in a run's settings or facts why it cannot detect; None where there is no such reason."""
    if run.config.get("task") != "bags":
        return f"is a run of {run.slug}; detection needs one of the task bags (macil-sd)"
    if not run.facts().get("backbones"):
        return (
            f"was trained on features made elsewhere ({run.config['data']}), which Counterpoint cannot compute from a "
            "video. Train on arcade, or on your own videos: counterpoint train macil-sd --data videos:DIR"
        )
    return None


def choose_run(root: Path) -> tuple[Run, list[tuple[Path, str]]]:
    """Choose the newest trained run in `root`, or one folder below, that can detect.

    Returns the run, and the newer runs that were skipped, each with the reason. Raises RunError when there is none.
    """
    skipped: list[tuple[Path, str]] = []
    for path in trained(root):
        try:
            run = Run.open(path)
            reason = cannot_detect(run)
        except (RunError, KeyError) as error:
            reason = f"is damaged ({error})"
        if reason is None:
            return run, skipped
        skipped.append((path, reason))
    others = (
        f" ({counted(len(skipped), 'other run')} cannot detect: {skipped[0][0]} {skipped[0][1].partition(';')[0]})"
        if skipped
        else ""
    )
    raise RunError(f"no trained run of macil-sd under {root}/{others}; train one: counterpoint train macil-sd")


UNTRAINED = ("light", "logmel")


def warnings(backbones: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the warnings about the scores of a run with these backbones."""
    untrained = [str(spec.get("name")) for spec in backbones.values() if spec.get("name") in UNTRAINED]
    found = []
    if untrained:
        names = " and ".join(untrained)
        found.append(
            f"the features ({names}) are fixed statistics for drawn clips, not those of trained networks. For real footage use "
            "trained networks: --data 'videos:DIR?visual=r3d_18&audio=vggish@FILE'"
        )
    return found


UNCALIBRATED = (
    "scores are not calibrated: they only rank moments. Choose a threshold on videos with known moments: "
    "counterpoint calibrate RUN --data videos:DIR"
)


def calibration_of(run: Run) -> tuple[Calibration | None, str | None]:
    """Return a run's calibration, or None and the warning why its scores are not calibrated."""
    fields = run.calibration()
    if not fields:
        return None, UNCALIBRATED
    try:
        found = Calibration.of_dict(fields)
    except RunError as error:
        raise RunError(f"{run.path / CALIBRATION} {error}") from error
    if found.weights != run.digest():
        return None, f"{run.path / CALIBRATION} belongs to other weights and is not used. {UNCALIBRATED}"
    return found, None


class Detector:
    """A trained run, loaded to detect moments in videos.

    Attributes:
        name: What outputs call the model: the path of its run, or what the built-in model is.
        warnings: Warnings about its scores, for the user.
        calibration: Its map from scores to probabilities, or None.
        threshold: The calibration's threshold, else 0.5.
        snippet_seconds: Length of a snippet, in seconds.
        window: Number of snippets that are scored together.
    """

    def __init__(self, run: Run, device: str = "cpu") -> None:
        """Load the run onto a device: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.

        Raises RunError when the run has no weights, or needs features that this machine cannot compute.
        """
        from counterpoint import encoders
        from counterpoint.encoders.on_device import move

        self.run = run
        reason = cannot_detect(run)
        if reason is not None:
            raise RunError(f"{run.path} {reason}")
        place = Loop(device=device).on()
        self.learner = load_learner(run).to(place)
        facts = run.facts()
        backbones = facts["backbones"]
        self.weights = run.digest()
        self.calibration, uncalibrated = calibration_of(run)
        self.name = str(run.path)  # what outputs say of the model
        self.warnings = warnings(backbones) + ([uncalibrated] if uncalibrated else [])
        if is_built_in(run):
            self.name, self.warnings = TOLD, [WARNING]
        self.visual = encoders.build_visual(backbones["visual"])
        self.audio = encoders.build_audio(backbones["audio"])
        move(self.visual, place)
        move(self.audio, place)
        if (self.visual.dim, self.audio.dim) != (facts["visual_dim"], facts["audio_dim"]):
            raise RunError(
                f"{run.path}: its backbones give features of widths {self.visual.dim} and {self.audio.dim}, but its network "
                f"takes {facts['visual_dim']} and {facts['audio_dim']}; train it again"
            )
        self.snippet_seconds = float(facts["snippet_seconds"])
        self.window = int(run.config["config"]["max_length"])
        self.threshold = self.calibration.threshold if self.calibration else 0.5

    def describe(self) -> dict[str, Any]:
        """Return what determines the raw scores of a file: weights, backbones, length of snippets and of windows."""
        backbones = {"visual": self.visual.describe(), "audio": self.audio.describe()}
        return {
            "weights": self.weights,
            "backbones": backbones,
            "snippet_seconds": self.snippet_seconds,
            "window": self.window,
        }

    @torch.no_grad()
    def score_rows(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> Scores:
        """Return the raw scores [T] of feature rows [T, Dv] and [T, Da] by name: "score", "audio", "visual"."""
        learner: Any = self.learner
        sound, sight = (torch.from_numpy(rows)[None].to(learner.device) for rows in (audio, visual))
        scores = learner.timeline(sound, sight)
        return {name: value[0].float().cpu().numpy() for name, value in scores.items()}

    def detect(
        self,
        path: Path,
        *,
        threshold: float | None = None,
        truth: list[tuple[float, float]] | None = None,
        progress: Callable[[float, float, float], None] | None = None,
    ) -> Detection:
        """Detect the moments in one video.

        Args:
            path: The video file.
            threshold: Probability above which a snippet belongs to a moment, in 0..1. Default: the calibration's, else 0.5.
            truth: True moments (start, end), in seconds, where they are known. Default: unknown.
            progress: Called repeatedly with the seconds done, the seconds in total, and the speed as a multiple of real time.
                The seconds done never exceed the total; in the last call both equal the length that was read.

        Raises DataError when the file cannot be read. A damaged file is read up to the damage, and a note reports it.
        """
        from counterpoint.data.media import SnippetReader

        started = time.perf_counter()
        with SnippetReader(path, self.visual, self.audio, snippet_seconds=self.snippet_seconds) as reader:
            windows = Windows(self.score_rows, self.window)
            parts: list[Scores] = []
            done = 0
            for visual, audio in reader.features():
                parts += windows.feed(visual, audio)
                done += len(visual)
                if progress:
                    seconds = done * self.snippet_seconds
                    whole = max(reader.info.duration, seconds)
                    progress(seconds, whole, seconds / max(1e-9, time.perf_counter() - started))
            parts += windows.finish()
        if not parts:
            raise DataError(f"{path}: not a single snippet could be decoded")
        scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        watched = time.perf_counter() - started
        length = reader.info.duration
        if progress:
            progress(length, length, length / max(1e-9, watched))
        found = Detection(
            video=path,
            duration=length,
            snippet_seconds=self.snippet_seconds,
            threshold=0.5,
            intervals=[],
            thumbnails=[],
            truth=truth,
            has_audio=reader.info.has_audio,
            width=reader.info.width,
            height=reader.info.height,
            notes=reader.notes,
            speed=length / max(1e-9, watched),
            run=self.name,
            fps=reader.info.fps,
            steady=reader.steady,
            **scores,
        )
        self.judge(found, threshold)
        return found

    def judge(self, found: Detection, threshold: float | None = None) -> None:
        """Calibrate a detection's scores and find its moments and their pictures again, from its raw scores.

        Args:
            found: The detection; it is changed.
            threshold: As in `detect`.
        """
        raw = found.score if found.raw is None else found.raw
        found.raw = raw if self.calibration else None
        found.score = self.calibration(raw) if self.calibration else raw
        found.threshold = self.threshold if threshold is None else threshold
        found.intervals = intervals(found.score, found.threshold, found.snippet_seconds, found.duration)
        found.thumbnails = pictures_of(found.video, found.intervals, steady=found.steady)


def pictures_of(path: Path, moments: list[Interval], *, steady: bool) -> list[Thumbnail]:
    """Return the pictures at the peaks of a video's highest moments, at most 24, in order of time."""
    from counterpoint.data.media import frames_at

    highest = sorted(moments, key=lambda i: -i.score)[:MAX_THUMBNAILS]
    peaks = sorted(interval.peak for interval in highest)
    pictures = frames_at(path, peaks, width=480, steady=steady) if peaks else []
    return [
        Thumbnail(peak, jpeg(picture)) for peak, picture in zip(peaks, pictures, strict=True) if picture is not None
    ]


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """Encode an RGB image [H, W, 3] as a JPEG file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=80)
    return out.getvalue()
