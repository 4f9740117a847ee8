"""`ytvis:FILE`: the user's own video frames with tracked instances, in the JSON layout of YouTube-VIS.

    {"videos": [{"id": 1, "file_names": ["a/00000.jpg", "a/00005.jpg"], "width": 640, "height": 360}],
     "annotations": [{"id": 1, "video_id": 1, "category_id": 3, "bboxes": [[10, 20, 30, 40], null]}],
     "categories": [{"id": 3, "name": "fish"}]}

An annotation is an instance: a box (left, top, width, height in pixels) for each frame, null where it is absent. Without boxes
they are computed from `segmentations` (run lengths), which needs the package pycocotools. File names are relative to
`?images=DIR`, by default the folder JPEGImages beside the file, or else the file's own folder.

A detection is the square around a box, enlarged by a tenth and scaled to `size`. Each frame also gets `others` boxes of the ground
that meet no instance. These are left out and listed: frames that cannot be read, boxes that are empty or outside the frame,
annotations of unknown videos. Videos are divided into splits as a whole.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.frames import OTHER, PADDING, Clip, ClipData
from counterpoint.data.images import KEEP, Indices, Pixels, checked_size
from counterpoint.data.own.item_splits import item_splits
from counterpoint.data.own.places import read_json
from counterpoint.errors import CounterpointError, DataError, needs_extra
from counterpoint.waiting import patient_track
from counterpoint.words import counted

MARGIN = 0.1  # by which a box is enlarged
TRIES = 20  # random boxes that are drawn for one of the ground
MEETS = 0.1  # share of a box of the ground that an instance may cover


class _Video:
    """A video: the paths of its frames, and for each frame its boxes [k, 4] and identities [k]."""

    def __init__(self, name: str, paths: list[Path]) -> None:
        self.name, self.paths = name, paths
        self.boxes: list[list[tuple[float, float, float, float]]] = [[] for _ in paths]
        self.identities: list[list[int]] = [[] for _ in paths]
        self.instances = 0


def load(
    place: str,
    *,
    images: str = "",
    size: int = 48,
    others: int = 4,
    seed: int = 0,
    test: str = "",
    valid: str = "",
) -> ClipData:
    """Open a file in the layout of YouTube-VIS (see the module).

    Args:
        place: the JSON file.
        images: folder of the frames.
        size: height and width of a crop in pixels, 8 to 4096.
        others: boxes of the ground in each frame, at least 0.
        seed: seed of these boxes.
        test: fraction of the videos in the test split, by default a fifth.
        valid: fraction of the other videos in the valid split, by default a tenth.

    Raises DataError for a file that cannot be read or has no instance, CounterpointError for an invalid option.
    """
    checked_size(size)
    if others < 0:
        raise CounterpointError(f"others must be at least 0, got {others}")
    file = Path(place)
    accounts = Accounts(place, f"ytvis:{images}")
    try:
        videos, classes = _videos(file, images, accounts)
        reader = _Reader(videos, size, others, seed, accounts)
        names = [""] * len(videos)
        parts = item_splits(place, names, np.ones(len(videos), bool), np.arange(len(videos)), test, valid)
        notes = _appearances(place, videos)
        accounts.check()
        accounts.write()
    except CounterpointError:
        accounts.write()
        raise
    train, watched, held = (_OwnClips(reader, rows) for rows in parts[:3])
    notes = [*accounts.notes(), *notes, *parts[3]]
    return ClipData(f"ytvis:{place}", train, watched, held, size, classes, notes, accounts)


def _appearances(place: str, videos: list[_Video]) -> list[str]:
    """Return notes about instances that serve less than others: those in one frame, and those without an absence."""
    once = back = 0
    for video in videos:
        for instance in range(video.instances):
            frames = [t for t, ids in enumerate(video.identities) if instance in ids]
            once += len(frames) == 1
            back += frames[-1] - frames[0] >= len(frames)
    every = sum(video.instances for video in videos)
    notes = []
    if once:
        notes.append(
            f"{place}: {counted(once, 'instance is', 'instances are')} in one frame only; they have no positive in training"
        )
    if back < every:
        notes.append(
            f"{place}: {every - back} of {counted(every, 'instance is', 'instances are')} never seen again after an absence; "
            + (f"back_accuracy measures the other {back}" if back else "back_accuracy is not measured")
        )
    return notes


def _videos(file: Path, images: str, accounts: Accounts) -> tuple[list[_Video], tuple[str, ...]]:
    """Read the file: videos with their boxes, and the names of the categories."""
    found = read_json(file)
    if not isinstance(found, dict) or not isinstance(found.get("videos"), list):
        raise DataError(f"{file} is not in the layout of YouTube-VIS: it has no list 'videos'")
    if not found.get("annotations"):
        raise DataError(f"{file} has no annotations, such as the published test sets; identities are needed")
    beside = file.parent / "JPEGImages"
    root = Path(images) if images else beside if beside.is_dir() else file.parent
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; name the folder of the frames (?images=DIR)")
    videos: dict[Any, _Video] = {}
    for number, video in enumerate(found["videos"]):
        names = video.get("file_names") if isinstance(video, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or "id" not in video:
            raise DataError(f"{file}: video {number + 1} has no id or no list 'file_names'")
        videos[video["id"]] = _Video(str(video["id"]), [root / name for name in names])
    for number, annotation in enumerate(found["annotations"], start=1):
        accounts.find("instances")
        named = annotation.get("video_id") if isinstance(annotation, dict) else None
        video = videos.get(named) if isinstance(named, str | int | float) else None
        boxes: list[tuple[float, float, float, float] | None] = []
        reason = "names no video of the file"
        if video is not None:
            try:
                boxes = _boxes(annotation, file)
                reason = "is in no frame" if boxes and not any(boxes) else ""
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                reason = str(error) if isinstance(error, _BoxError) else "has a mask that is no run length"
            if not reason and len(boxes) != len(video.paths):
                reason = f"has {counted(len(boxes), 'box')} for {counted(len(video.paths), 'frame')}"
        if reason or video is None:
            accounts.leave(Line(str(file), number, reason, unit="instances"))
            continue
        accounts.read("instances")
        for t, box in enumerate(boxes):
            if box is not None:
                video.boxes[t].append(box)
                video.identities[t].append(video.instances)
        video.instances += 1
    for video in videos.values():
        accounts.find("videos")
        if video.instances:
            accounts.read("videos")
        else:
            accounts.leave(Line(f"video {video.name}", None, "has no instance", unit="videos"))
    kept = [video for video in videos.values() if video.instances]
    if not kept:
        raise DataError(f"{file}: no instance can be used; {accounts.examples()}")
    classes = tuple(str(c.get("name", c.get("id"))) for c in found.get("categories", []) if isinstance(c, dict))
    return kept, classes


def _boxes(annotation: dict[str, Any], file: Path) -> list[tuple[float, float, float, float] | None]:
    """Return the box of each frame of an instance (left, top, right, bottom), None where it is absent."""
    given = annotation.get("bboxes")
    if isinstance(given, list):
        return [_corners(box) for box in given]
    codes = annotation.get("segmentations")
    if not isinstance(codes, list):
        return []
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise needs_extra(f"{file} has a run length without a box, which", "dense") from error
    found: list[tuple[float, float, float, float] | None] = []
    for code in codes:
        if not code:
            found.append(None)
            continue
        packed = coco.frPyObjects(code, *code["size"]) if isinstance(code.get("counts"), list) else code
        left, top, wide, high = (float(value) for value in coco.toBbox(packed))
        found.append((left, top, left + wide, top + high) if wide and high else None)
    return found


class _BoxError(ValueError):
    """A box is no list of four numbers."""


def _corners(box: Any) -> tuple[float, float, float, float] | None:
    """Return a box of the file (left, top, width, height) as left, top, right, bottom; None for none."""
    if not box:
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) and math.isfinite(x) for x in box):
        raise _BoxError(f"has a box that is no list of four finite numbers ({str(box)[:60]})")
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


class _Reader:
    """Cut the crops of videos; keep them in memory where all fit."""

    def __init__(self, videos: list[_Video], size: int, others: int, seed: int, accounts: Accounts) -> None:
        self.videos, self.size, self.others, self.seed = videos, size, others, seed
        count = sum(len(boxes) + others for video in videos for boxes in video.boxes)
        self.kept: list[Clip] | None = None
        clips = []
        for number in patient_track(range(len(videos)), "reading frames"):
            clip = self.read(number, accounts)
            if 3 * count * size**2 <= KEEP:
                clips.append(clip)
        if clips:
            self.kept = clips

    def read(self, number: int, accounts: Accounts | None = None) -> Clip:
        """Return the detections of a video. With accounts, count its frames and boxes; else DataError for a damaged frame."""
        video, size = self.videos[number], self.size
        most = max(len(boxes) for boxes in video.boxes) + self.others
        crops = np.zeros((len(video.paths), most, size, size, 3), np.uint8)
        identities = np.full((len(video.paths), most), PADDING, np.int64)
        scores = np.zeros((len(video.paths), most), np.float32)
        rng = np.random.default_rng([self.seed, number])
        for t, path in enumerate(video.paths):
            if accounts is not None:
                accounts.find("frames")
                accounts.find("boxes", len(video.boxes[t]))
            try:
                with Image.open(path) as image:
                    picture = image.convert("RGB")
            except Exception as error:  # codecs raise OSError, SyntaxError, ValueError, struct.error, zlib.error
                reason = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read"
                if accounts is None:
                    raise DataError(f"{path}: {reason}; it was valid when the set was opened") from error
                accounts.leave(Line(str(path), None, reason, unit="frames"))
                for _ in video.boxes[t]:
                    accounts.leave(Line(str(path), None, "its frame cannot be read", unit="boxes"))
                continue
            wide, high = picture.size
            place = 0
            for box, identity in zip(video.boxes[t], video.identities[t], strict=True):
                left, top, right, bottom = max(0.0, box[0]), max(0.0, box[1]), min(wide, box[2]), min(high, box[3])
                if not (right - left >= 1 and bottom - top >= 1):
                    if accounts is not None:
                        accounts.leave(Line(str(path), None, "a box that is empty or outside its frame", unit="boxes"))
                    continue
                crops[t, place] = _cut(picture, (left, top, right, bottom), size)
                identities[t, place], scores[t, place] = identity, 1.0
                place += 1
            if accounts is not None:
                accounts.read("frames")
                accounts.read("boxes", place)
            for box in _ground(rng, self.others, video.boxes[t], wide, high):
                crops[t, place] = _cut(picture, box, size)
                identities[t, place], scores[t, place] = OTHER, 0.2
                place += 1
        return Clip(crops, identities, scores)


def _cut(picture: Image.Image, box: tuple[float, float, float, float], size: int) -> Pixels:
    """Cut the square around a box, as far as it lies in the picture, and scale it."""
    left, top, right, bottom = box
    side = min(max(right - left, bottom - top) * (1 + MARGIN), *picture.size)
    x = min(max(0.0, (left + right - side) / 2), picture.width - side)
    y = min(max(0.0, (top + bottom - side) / 2), picture.height - side)
    square = picture.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return np.asarray(square)


def _ground(
    rng: np.random.Generator, number: int, boxes: list[tuple[float, float, float, float]], wide: int, high: int
) -> list[tuple[float, float, float, float]]:
    """Draw boxes of the size of the instances that hardly meet any; fewer where the frame has no room."""
    found: list[tuple[float, float, float, float]] = []
    there = np.array(boxes, float).reshape(-1, 4)
    sides = np.maximum(there[:, 2] - there[:, 0], there[:, 3] - there[:, 1])
    side = float(np.clip(np.median(sides), 4, min(wide, high))) if len(sides) else min(wide, high) / 4
    for _ in range(number * TRIES):
        if len(found) == number:
            break
        left, top = rng.random() * (wide - side), rng.random() * (high - side)
        across = np.minimum(there[:, 2], left + side) - np.maximum(there[:, 0], left)
        down = np.minimum(there[:, 3], top + side) - np.maximum(there[:, 1], top)
        if (np.maximum(across, 0) * np.maximum(down, 0) <= MEETS * side**2).all():
            found.append((left, top, left + side, top + side))
    return found


class _OwnClips:
    """One split of a reader's videos (a `ClipSplit`)."""

    def __init__(self, reader: _Reader, rows: Indices) -> None:
        self.reader, self.rows = reader, rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def frames(self) -> Indices:
        return np.array([len(self.reader.videos[int(row)].paths) for row in self.rows], np.int64)

    def clip(self, index: int) -> Clip:
        row = int(self.rows[index])
        return self.reader.kept[row] if self.reader.kept is not None else self.reader.read(row)

    def row_names(self, positions: NDArray[np.int64]) -> list[str]:
        """Name items for a reader (see `counterpoint.data.images.Listed`)."""
        return [f"video {self.reader.videos[int(row)].name}" for row in self.rows[positions]]
