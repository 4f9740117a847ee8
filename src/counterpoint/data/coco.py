"""`coco:FILE`: the user's own pictures with boxes, in COCO's JSON layout, read through pycocotools.

    {"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
     "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 20, 30, 40]}],
     "categories": [{"id": 3, "name": "fish"}]}

A box is left, top, width, height in pixels. File names are relative to `?images=DIR`, by default the file's own folder. The
second domain is `?target=PLACE`: another file of this layout with the same category names, or a folder of pictures without
boxes. Pictures are scaled so that their longer side is `size`; the rest of the square is grey.

By default proposals are drawn around the boxes, of both domains, and pictures without boxes have squares on a grid. With
`?detector=torchvision:NAME` a detector of torchvision proposes them from the picture alone (`encoders/detectors.py`), and squares
fill up its list. The classes of the target serve measures alone. Left out and listed are:

- pictures that cannot be read;
- boxes that are empty, outside their picture, or no four numbers;
- annotations of unknown pictures or categories, and crowds.

A target file is divided into training, valid and test. With a target folder nothing measures the target: valid and test are of
the source, and a note reports it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data import cached
from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.dense import Boxes
from counterpoint.data.images import checked_size
from counterpoint.data.own.item_splits import item_splits
from counterpoint.data.regions import (
    MATCH,
    SOURCE,
    TARGET,
    UNKNOWN,
    ArrayRegions,
    Proposals,
    RegionData,
    drawn_proposals,
    grid_proposals,
    iou,
    matched_labels,
)
from counterpoint.errors import CounterpointError, DataError, needs_extra
from counterpoint.words import counted

GREY = 128
LOWEST = -10.0  # logit of squares that fill up a detector's proposals
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class _Picture(NamedTuple):
    path: Path
    corners: list[tuple[float, float, float, float]]
    labels: list[str]


def load(
    place: str,
    *,
    images: str = "",
    target: str = "",
    target_images: str = "",
    size: int = 256,
    proposals: int = 100,
    detector: str = "",
    seed: int = 0,
    test: str = "",
    valid: str = "",
) -> RegionData:
    """Open a file in COCO's layout (see the module). Pictures are kept in memory.

    Args:
        place: the JSON file of the source.
        images: folder of its pictures.
        target: JSON file of the target, or a folder of pictures. "" (default): no target; the source is measured.
        target_images: folder of the pictures of a target file.
        size: height and width of a picture in pixels, 16 to 4096.
        proposals: boxes of a picture, 4 to 2000.
        detector: detector that proposes boxes, torchvision:NAME or torchvision:NAME/FILE. "" (default): they are drawn.
        seed: seed of the drawn proposals.
        test: fraction of the measured domain's pictures in the test split, by default a fifth.
        valid: fraction of the others in the valid split, by default a tenth.

    Raises DataError for a file that cannot be read or has no box, CounterpointError for an invalid option.
    """
    checked_size(size)
    if size < 16 or not 4 <= proposals <= 2000:
        raise CounterpointError(f"size must be at least 16 and proposals lie in 4..2000, got {size} and {proposals}")
    accounts = Accounts(place, f"coco:{images}:{target}:{target_images}")
    notes: list[str] = []
    try:
        own, classes = _annotated(Path(place), images, accounts)
        other: list[_Picture] = []
        measured = bool(target) and not Path(target).is_dir()
        if measured:
            other, _ = _annotated(Path(target), target_images, accounts, classes)
        elif target:
            other = _folder(Path(target))
            notes.append(f"{target}: pictures without boxes; valid and test measure the source, not the target")
        first, second = (_Read(part, classes, size, proposals, seed, accounts) for part in (own, other))
        if detector:
            for read in (first, second):
                notes += read.propose(detector, len(classes))
        accounts.check()
        accounts.write()
    except CounterpointError:
        accounts.write()
        raise
    if not len(first.pixels) or (target and not len(second.pixels)):
        raise DataError(f"{target if len(first.pixels) else place}: no picture can be used; {accounts.examples()}")
    held = second if measured else first
    known = np.array([bool(boxes) for boxes in held.kept], bool)
    numbers = np.arange(len(held.pixels))
    train, watched, tested, more = item_splits(place, [""] * len(numbers), known, numbers, test, valid)
    parts = [(first, train if held is first else np.arange(len(first.pixels))), (second, np.arange(len(second.pixels)))]
    if held is second:
        parts[1] = (second, train)
    domain = TARGET if held is second else SOURCE
    return RegionData(
        f"coco:{place}",
        _joined(parts),
        held.split(watched, domain),
        held.split(tested, domain),
        size,
        proposals,
        classes,
        [*accounts.notes(), *notes, *more],
        accounts,
    )


def _annotated(
    file: Path, images: str, accounts: Accounts, classes: tuple[str, ...] = ()
) -> tuple[list[_Picture], tuple[str, ...]]:
    """Read a file: its pictures with their boxes, and the names of its categories. With `classes`, others are unknown."""
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise needs_extra("coco:", "dense") from error
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({str(error)[:120]})") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in lists):
        raise DataError(f"{file} is not in COCO's layout: it needs the lists images, annotations and categories")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            coco = COCO()
            coco.dataset = found
            coco.createIndex()
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: an entry has no {error}; pictures, annotations and categories need ids") from error
    root = Path(images) if images else file.parent
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; name the folder of the pictures (?images=DIR)")
    names = {key: str(value.get("name", key)) for key, value in sorted(coco.cats.items())}
    known = classes or tuple(dict.fromkeys(names.values()))
    pictures: dict[Any, _Picture] = {}
    for key, value in coco.imgs.items():
        if not isinstance(value.get("file_name"), str):
            raise DataError(f"{file}: picture {key} has no 'file_name'")
        pictures[key] = _Picture(root / value["file_name"], [], [])
    for number, annotation in enumerate(found["annotations"], start=1):
        accounts.find("boxes")
        name = names.get(annotation.get("category_id"))
        box = _box(annotation.get("bbox"))
        reason = ""
        if annotation.get("image_id") not in pictures:
            reason = "names no picture of the file"
        elif name is None or name not in known:
            reason = f"is of an unknown category ({annotation.get('category_id') if name is None else name})"
        elif annotation.get("iscrowd"):
            reason = "is a crowd"
        elif box is None:
            reason = "has no bbox of four finite numbers"
        if reason or box is None or name is None:
            accounts.leave(Line(str(file), number, reason, unit="boxes"))
            continue
        picture = pictures[annotation["image_id"]]
        picture.corners.append(box)
        picture.labels.append(name)
    return list(pictures.values()), known


def _box(value: Any) -> tuple[float, float, float, float] | None:
    """Return left, top, right, bottom; None for anything but four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in value):
        return None
    left, top, wide, high = map(float, value)
    return left, top, left + wide, top + high


def _folder(place: Path) -> list[_Picture]:
    """Return the pictures of a folder and its folders, in the order of their names."""
    files = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{place}: no pictures ({', '.join(SUFFIXES)})")
    return [_Picture(path, [], []) for path in files]


class _Read:
    """Pictures of a domain in memory, scaled, with their proposals."""

    def __init__(
        self, pictures: list[_Picture], classes: tuple[str, ...], size: int, count: int, seed: int, accounts: Accounts
    ) -> None:
        pixels, self.found, self.kept = [], [], []
        self.boxes: list[Boxes] = []
        self.shown: list[tuple[int, int]] = []  # width and height of each picture within its square
        for number, picture in enumerate(pictures):
            accounts.find("pictures")
            try:
                with Image.open(picture.path) as image:
                    shown = image.convert("RGB")
            except Exception as error:  # codecs raise OSError, SyntaxError, ValueError, struct.error, zlib.error
                reason = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read"
                accounts.leave(Line(str(picture.path), None, reason, unit="pictures"))
                for _ in picture.corners:
                    accounts.leave(Line(str(picture.path), None, "its picture cannot be read", unit="boxes"))
                continue
            accounts.read("pictures")
            factor = size / max(shown.size)
            wide, high = (max(1, round(side * factor)) for side in shown.size)
            corners, labels = [], []
            for box, label in zip(picture.corners, picture.labels, strict=True):
                cut = np.clip(np.array(box), 0, [*shown.size, *shown.size])
                if cut[2] - cut[0] < 1 or cut[3] - cut[1] < 1:
                    reason = "a box that is empty or outside its picture"
                    accounts.leave(Line(str(picture.path), None, reason, unit="boxes"))
                    continue
                corners.append(cut * factor)
                labels.append(classes.index(label))
            accounts.read("boxes", len(corners))
            square = np.full((size, size, 3), GREY, np.uint8)
            square[:high, :wide] = np.asarray(shown.resize((wide, high), Image.Resampling.BILINEAR))
            pixels.append(square)
            boxes = Boxes(
                np.array(corners, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.arange(len(labels))
            )
            self.boxes.append(boxes)
            self.shown.append((wide, high))
            rng = np.random.default_rng([seed, number])
            drawn = drawn_proposals(rng, boxes, count, (wide, high), len(classes)) if labels else None
            self.found.append(drawn or grid_proposals(count, (wide, high)))
            self.kept.append(len(labels))
        self.pixels: NDArray[np.uint8] = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)

    def propose(self, detector: str, background: int) -> list[str]:
        """Replace the proposals by those of a detector, kept in the cache; return notes on them."""
        from counterpoint.encoders import detectors

        if not len(self.pixels):
            return []
        count, sizes = len(self.found[0].labels), self.shown
        network = detectors.build_detector(detector)
        key = ("detector", detectors.digest(network), count, self.pixels, [list(size) for size in sizes])

        def build() -> cached.Arrays:
            pictures = [square[:high, :wide] for square, (wide, high) in zip(self.pixels, sizes, strict=True)]
            made = detectors.propose(network, pictures, count)
            return {
                "corners": np.concatenate([one.corners for one in made]).astype(np.float32),
                "scores": np.concatenate([one.scores for one in made]).astype(np.float32),
                "counts": np.array([len(one.scores) for one in made]),
            }

        arrays = cached.build_once("proposals", key, build, lambda arrays: arrays)
        ends = np.cumsum(arrays["counts"])
        matched = objects = 0
        for number, (end, size) in enumerate(zip(ends.tolist(), sizes, strict=True)):
            own = slice(end - int(arrays["counts"][number]), end)
            corners, scores = arrays["corners"][own], arrays["scores"][own]
            fill = grid_proposals(count, size).corners[: count - len(scores)]
            corners = np.concatenate([corners, fill])
            scores = np.concatenate([scores, np.full(len(fill), LOWEST, np.float32)])
            boxes = self.boxes[number]
            labels = matched_labels(corners, boxes, background)[0]
            if len(boxes.corners):
                matched += int((iou(corners, boxes.corners).max(0) >= MATCH).sum())
                objects += len(boxes.corners)
            else:
                labels[:] = UNKNOWN
            self.found[number] = Proposals(corners, labels, scores)
        return [f"{detector} proposes {matched} of {counted(objects, 'object')} with an IoU of {MATCH} or more"]

    def split(self, rows: NDArray[np.int64], domain: int) -> ArrayRegions:
        found: list[Proposals] = [self.found[int(row)] for row in rows]
        return ArrayRegions(self.pixels[rows], found, np.full(len(rows), domain, np.int64))


def _joined(parts: list[tuple[_Read, NDArray[np.int64]]]) -> ArrayRegions:
    """Join the training pictures of both domains; a picture of the source without boxes has no known class."""
    splits = [read.split(rows, domain) for (read, rows), domain in zip(parts, (SOURCE, TARGET), strict=True)]
    pixels = np.concatenate([split.pixels for split in splits])
    found = [one for split in splits for one in split.found]
    return ArrayRegions(pixels, found, np.concatenate([split.domains for split in splits]))
