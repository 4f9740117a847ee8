"""Read detections that `counterpoint detect --json` printed, and keep a reviewer's decisions beside them.

`detect VIDEO ... --json > film.json` makes a file for all videos. A file for one video is read, too, with its pictures. In a
folder of results, it is videos/NAME/detection.json.

The decisions on film.json are in film.review.json: for each video and each moment "accept" or "reject". A moment is named by its
start and end in seconds with two decimals. So decisions stay right when the detection is written again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import replacing
from counterpoint.serve.places import OutsideError, Places
from counterpoint.serve.walking import Walk
from counterpoint.tasks.moments import Detection, Interval, Thumbnail

SUFFIX = ".review.json"
DECISIONS = ("accept", "reject")
BEGINNING = 65_536  # bytes in which the file must name its videos
PICTURE = 2**20  # maximum bytes of a picture at a peak
COLUMNS = ("video", "start", "end", "peak", "score", "decision")
TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm", ".ogv": "video/ogg"}


@dataclass(frozen=True)
class Found:
    """A file of detections."""

    key: str
    path: Path
    run: str
    warnings: list[str]
    videos: list[Detection]
    pictures: list[tuple[float, str]] = field(
        default_factory=list
    )  # time, and file relative to its folder; of a single video
    single: bool = False  # whether it is the file of one video

    @property
    def group(self) -> Path | None:
        """The folder of results that holds this file as videos/NAME/detection.json; None for another place."""
        above = self.path.parent.parent
        return above.parent if self.single and above.name == "videos" else None

    @property
    def moments(self) -> int:
        """The number of moments in all videos."""
        return sum(len(video.intervals) for video in self.videos)


def rank(found: Found, number: int) -> tuple[float, str, int]:
    """Return what the list sorts a video by: the highest score first."""
    return -found.videos[number].highest, found.key, number


def moment(interval: Interval) -> str:
    """Return the name of a moment: its start and end."""
    return f"{interval.start:.2f}-{interval.end:.2f}"


class Reviews:
    """Detections under the folders, and the decisions on their moments."""

    def __init__(self, places: Places, walk: Walk) -> None:
        self.places, self.walk = places, walk
        self._read: dict[str, tuple[int, Found | None]] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Found]:
        """List the files of detections, the newest first."""
        found = []
        for file in self.walk().ending(".json"):
            if not file.endswith(SUFFIX):
                stamp = Path(file).stat().st_mtime_ns
                if file not in self._read or self._read[file][0] != stamp:
                    self._read[file] = stamp, self._opened(file)
                if (one := self._read[file][1]) is not None:
                    found.append((stamp, one))
        return [one for _, one in sorted(found, key=lambda pair: -pair[0])]

    def get(self, key: str) -> Found:
        """Return a file of detections by its key. OutsideError when there is none."""
        for found in self.all():
            if found.key == key:
                return found
        raise OutsideError(f"'{key}' is no detection; make one: counterpoint detect VIDEO --json > FILE.json")

    def below(self, key: str) -> list[Found]:
        """Return the file of detections with this key, or all files below the folder with this key. OutsideError for none."""
        found = [one for one in self.all() if one.key == key or one.key.startswith(f"{key}/")]
        return sorted(found, key=lambda one: one.key) if key and found else [self.get(key)]

    def _opened(self, file: str) -> Found | None:
        try:
            beginning = self.places.read(file, BEGINNING)
            if '"videos"' not in beginning and '"intervals"' not in beginning:
                return None
            made = json.loads(self.places.read(file))
            rows = made.get("videos", [made])
            videos = [detection(row, str(made.get("run", ""))) for row in rows]
            pictures = [(float(row["time"]), str(row["file"])) for row in made.get("pictures", ())]
            warnings = [str(line) for line in made.get("warnings", ())]
        # OSError: removed meanwhile, or not readable. RecursionError: JSON of many levels.
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, CounterpointError):
            return None
        single = "videos" not in made
        return Found(self.places.key(file), Path(file), str(made.get("run", "")), warnings, videos, pictures, single)

    def pictures(self, found: Found, number: int) -> list[Thumbnail]:
        """Read the pictures at the peaks of a video, where its file has them in its own folder."""
        kept = []
        for time, name in found.pictures if number == 0 else ():
            file = found.path.parent / name
            if file.suffix == ".jpg" and self.places.holds(file):
                real = self.places.inside(file)
                if real.is_relative_to(found.path.parent) and real.stat().st_size <= PICTURE:
                    kept.append(Thumbnail(time, real.read_bytes()))
        return kept

    def video(self, found: Found, number: int) -> tuple[Path, str] | None:
        """Return the file of a video and its media type; None where it is not in the folders, or no browser plays it."""
        kind = TYPES.get(found.videos[number].video.suffix.lower())
        path = self.place(found, number)
        return (path, kind) if kind and path else None

    def place(self, found: Found, number: int) -> Path | None:
        """Return the file of a video; None where it is not in the folders."""
        name = found.videos[number].video
        for path in (name, found.path.parent / name, *(folder / name for folder in self.places.folders)):
            if path.is_absolute() and self.places.holds(path) and path.is_file():
                return self.places.inside(path)
        return None

    def following(self, found: Found, number: int) -> tuple[Found, int] | None:
        """Return the video after this one, in the order of the list; None after the last."""
        group = [one for one in self.all() if found.group and one.group == found.group] or [found]
        videos = sorted(((one, n) for one in group for n in range(len(one.videos))), key=lambda pair: rank(*pair))
        at = next(i for i, (one, n) in enumerate(videos) if (one.key, n) == (found.key, number))
        return videos[at + 1] if at + 1 < len(videos) else None

    def accepted(self, found: Found, number: int) -> Detection:
        """Return a video's detection with the accepted moments alone, and with its place where that is known."""
        made = found.videos[number]
        mine = self.decisions(found).get(str(made.video), {})
        kept = [interval for interval in made.intervals if mine.get(moment(interval)) == "accept"]
        return replace(made, video=self.place(found, number) or made.video, intervals=kept)

    # --------------------------------------------------------------------------------------------------------- decisions

    def decisions(self, found: Found) -> dict[str, dict[str, str]]:
        """Return the decisions by video and moment. DataError when their file is damaged."""
        file = review_file(found.path)
        if not file.is_file():
            return {}
        try:
            made = json.loads(self.places.read(file))
            rows = {
                str(video): {str(k): str(v) for k, v in moments.items()} for video, moments in made["videos"].items()
            }
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{file.name} is damaged ({error}); restore it from a copy, or remove it") from error
        return rows

    def decide(self, found: Found, number: int, name: str, decision: str) -> dict[str, str]:
        """Keep a decision on a moment; "" takes it back. Return the video's decisions. OutsideError for an unknown moment."""
        if not 0 <= number < len(found.videos):
            raise OutsideError(f"{found.path.name} has no video {number}")
        video = found.videos[number]
        if name not in {moment(interval) for interval in video.intervals} or decision not in (*DECISIONS, ""):
            raise OutsideError(f"{found.path.name} has no moment {name}, or '{decision}' is no decision")
        with self._lock:
            every = self.decisions(found)
            mine = every.setdefault(str(video.video), {})
            mine.pop(name, None)
            if decision:
                mine[name] = decision
            with replacing(review_file(found.path)) as file:
                text = json.dumps({"detection": found.path.name, "videos": every}, indent=1, ensure_ascii=False)
                file.write(text.encode("utf-8", "surrogateescape"))
        return mine

    def rows(self, found: Found) -> Iterator[dict[str, Any]]:
        """Yield each moment of each video with its decision, for an export."""
        every = self.decisions(found)
        for video in found.videos:
            mine = every.get(str(video.video), {})
            for interval in video.intervals:
                times = {n: round(getattr(interval, n), 4) for n in ("start", "end", "peak", "score")}
                yield {"video": str(video.video), **times, "decision": mine.get(moment(interval), "undecided")}


def review_file(path: Path) -> Path:
    """Return the file of the decisions on a file of detections."""
    return path.with_name(path.name.removesuffix(".json") + SUFFIX)


def detection(row: Mapping[str, Any], run: str) -> Detection:
    """Restore a detection from its JSON. The pictures at the peaks are not part of it."""
    curves: dict[str, Any] = {
        name: np.array([np.nan if v is None else v for v in row[name]], np.float32)
        for name in ("score", "audio", "visual")
    }
    intervals = [Interval(*(float(i[name]) for name in ("start", "end", "peak", "score"))) for i in row["intervals"]]
    return Detection(
        video=Path(str(row["video"])),
        duration=float(row["duration"]),
        snippet_seconds=float(row["snippet_seconds"]),
        **curves,
        threshold=float(row["threshold"]),
        intervals=intervals,
        thumbnails=[],
        truth=None,
        has_audio=bool(row["has_audio"]),
        width=int(row["width"]),
        height=int(row["height"]),
        notes=[str(note) for note in row.get("notes", ())],
        speed=float(row.get("speed", 0.0)),
        run=run,
        fps=float(row.get("fps", 0.0)),
    )
