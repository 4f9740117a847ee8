"""Detect moments in many files, keep each file's result in a folder, and resume where the work stopped.

    OUT/
      detections.json        all videos, highest score first, with failures and files left out
      detection.html         the page
      videos.csv             a row for each video
      moments.csv            a row for each moment
      videos/NAME-KEY/
        detection.json       the result of one video; written last, so its presence means that the result is complete
        peaks/SECONDS.jpg    pictures at the peaks of its moments
        moments.vtt          the moments as WebVTT
        moments.edl          as an edit decision list (CMX3600)
        moments.otio         as an OpenTimelineIO time line
        contact-sheet.png    pictures of each moment

KEY comes from the file's place. A result counts as finished while the file's size, time and ends are the same. The run's weights,
backbones and windows must be the same, too. With another threshold or calibration the scores are kept, and only the moments are
found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from counterpoint.errors import CounterpointError
from counterpoint.files import replacing
from counterpoint.tasks.moments import Detection, Thumbnail
from counterpoint.use.detect import Detector

FORMAT = 1  # of detection.json and detections.json; increase it with every change that a reader would notice
ENDS = 2**16  # bytes at either end of a file that its identity includes
MAX_PICTURED = 50  # detections whose pictures stay in memory: those that a page shows in full
RESULT, INDEX, PEAKS = "detection.json", "detections.json", "peaks"


def identity(path: Path) -> dict[str, Any]:
    """Return what tells a video file from its later versions: place, size, time of change, and its first and last bytes.

    Raises OSError when the file cannot be read.
    """
    place = path.resolve()
    found = place.stat()
    with place.open("rb") as file:
        digest = hashlib.blake2b(file.read(ENDS), digest_size=16)
        file.seek(max(0, found.st_size - ENDS))
        digest.update(file.read(ENDS))
    return {
        "path": os.fsencode(place).decode("utf-8", "replace"),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ends": digest.hexdigest(),
    }


class Kept:
    """A folder of detections.

    Args:
        root: The folder; it is made when the first result is written.
        detector: The detector, whose weights and settings the results must have.
        threshold: Threshold of the moments. None: the detector's.
    """

    def __init__(self, root: Path, detector: Detector, threshold: float | None = None) -> None:
        self.root, self.detector = root, detector
        self.threshold = detector.threshold if threshold is None else threshold
        self.settings = json.loads(json.dumps(detector.describe()))
        made = detector.calibration
        self.calibration = made and hashlib.sha256(json.dumps(made.as_dict()).encode()).hexdigest()

    def folder(self, path: Path) -> Path:
        """Return the folder of a video's result."""
        return self.root / "videos" / self.name(path)

    @staticmethod
    def name(path: Path) -> str:
        """Return a name for a video's files: the name of its file, and a key of its place."""
        place = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=5).hexdigest()
        stem = re.sub(r"[^\w.-]+", "_", path.stem, flags=re.ASCII).strip("._")[:60] or "video"
        return f"{stem}-{place}"

    def load(self, path: Path) -> tuple[Detection, bool] | None:
        """Return the result of a file that is finished, and whether its moments are still to be found again.

        Return None when the file must be read: there is no result, it is damaged, or the file or the run changed.
        """
        folder = self.folder(path)
        try:
            kept = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            if kept["format"] != FORMAT or kept["settings"] != self.settings or kept["identity"] != identity(path):
                return None
            stale = kept["threshold"] != self.threshold or kept["calibration"] != self.calibration
            pictures = [] if stale else [_picture(folder, entry) for entry in kept["pictures"]]
            found = Detection.of_dict(kept, pictures)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found.video, found.run = path, self.detector.name
        return found, stale

    def save(
        self,
        found: Detection,
        beside: Callable[[Detection, Path], Mapping[str, Any]] | None = None,
        *,
        seen: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the result of a video, its JSON last. Return its folder.

        Args:
            found: The detection.
            beside: Writes further files into the folder, and returns fields for the JSON.
            seen: The `identity` of the file before it was read, since it may grow meanwhile. Default: that of now.
        """
        folder = self.folder(found.video)
        (folder / RESULT).unlink(missing_ok=True)
        shutil.rmtree(folder / PEAKS, ignore_errors=True)
        pictures = []
        for thumbnail in found.thumbnails:
            name = f"{PEAKS}/{thumbnail.time:09.2f}.jpg"
            with replacing(folder / name) as file:
                file.write(thumbnail.jpeg)
            pictures.append({"time": thumbnail.time, "file": name})
        fields = {
            "format": FORMAT,
            **found.as_dict(),
            "pictures": pictures,
            "identity": identity(found.video) if seen is None else seen,
            "settings": self.settings,
            "calibration": self.calibration,
            **(beside(found, folder) if beside else {}),
        }
        _write(folder / RESULT, fields)
        return folder

    def row(self, found: Detection) -> dict[str, Any]:
        """Return what the index holds of a video."""
        return {
            "video": str(found.video),
            "folder": self.folder(found.video).relative_to(self.root).as_posix(),
            "highest": round(found.highest, 4),
            "peak": round(found.peak, 3),
            "moments": len(found.intervals),
            "duration": round(found.duration, 3),
            "has_audio": found.has_audio,
        }

    def index(self, rows: Sequence[Mapping[str, Any]], told: Mapping[str, Any]) -> Path:
        """Write detections.json: `told`, and the row of each video, highest score first. Return the file."""
        ranking = sorted(rows, key=lambda row: -row["highest"])
        about = {"format": FORMAT, "run": self.detector.name, "weights": self.detector.weights}
        about |= {"threshold": self.threshold, "calibrated": self.calibration is not None, **told}
        return _write(self.root / INDEX, about | {"videos": [{"rank": n, **row} for n, row in enumerate(ranking, 1)]})


def _picture(folder: Path, entry: Mapping[str, Any]) -> Thumbnail:
    return Thumbnail(float(entry["time"]), (folder / PEAKS / Path(entry["file"]).name).read_bytes())


def _write(path: Path, fields: Mapping[str, Any]) -> Path:
    with replacing(path) as file:
        file.write(json.dumps(fields, indent=1, ensure_ascii=False).encode("utf-8", "replace"))
    return path


def detect_files(
    detector: Detector,
    paths: Sequence[Path],
    *,
    threshold: float | None = None,
    truths: Mapping[Path, list[tuple[float, float]]] | None = None,
    kept: Kept | None = None,
    finished: Callable[[Detection, Path], Mapping[str, Any]] | None = None,
    console: Console | None = None,
) -> tuple[list[Detection], list[tuple[Path, str]]]:
    """Detect moments in several files, with a progress bar. Return the detections, and (file, reason) of unreadable files.

    Beyond the 50 detections with the highest scores, the pictures are dropped from memory.

    Args:
        detector: A trained run.
        paths: Video files.
        threshold: Probability above which a snippet belongs to a moment, in 0..1. Default: the calibration's, else 0.5.
        truths: True moments (start, end), in seconds, of files where they are known, for the page. Default: unknown.
        kept: Folder of results. Finished files are not read again. Default: nothing is kept.
        finished: Called with each new detection and its folder, to write files beside the result; see `Kept.save`.
        console: Console of the bar. Default: standard error.
    """
    found: list[Detection] = []
    failures: list[tuple[Path, str]] = []
    with _bar(console) as bar:
        every = bar.add_task("files", total=len(paths), what="", visible=len(paths) > 1)
        row = bar.add_task("", total=None, what="")
        reused = 0
        for number, path in enumerate(paths):
            bar.reset(row, description=escape(path.name), total=None, what="")

            def progress(done: float, total: float, speed: float) -> None:
                bar.update(row, completed=done, total=total or None, what=f"{speed:.1f} x real time")

            try:
                old = kept.load(path) if kept else None
                seen = identity(path) if kept and old is None and path.is_file() else None
                if old is None:
                    result = detector.detect(
                        path, threshold=threshold, truth=(truths or {}).get(path), progress=progress
                    )
                else:
                    result, stale = old
                    reused += 1
                    if stale:
                        detector.judge(result, threshold)
                if kept and (old is None or stale):
                    kept.save(result, finished, seen=seen)
                found.append(result)
                _forget(found)
            except (CounterpointError, OSError, MemoryError) as error:
                failures.append((path, str(error).removeprefix(f"{path}: ") or type(error).__name__))
            before = f", {reused} finished before" if reused else ""
            bar.update(every, completed=number + 1, what=f"{number + 1} of {len(paths)}{before}")
        bar.update(row, visible=len(paths) == 1)
    return found, failures


def _forget(found: list[Detection]) -> None:
    """Drop the pictures of the last detection, or of the lowest, once more than `MAX_PICTURED` have some."""
    pictured = [detection for detection in found if detection.thumbnails]
    if len(pictured) > MAX_PICTURED:
        min(pictured, key=lambda detection: detection.highest).thumbnails = []


def _bar(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[what]}"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
