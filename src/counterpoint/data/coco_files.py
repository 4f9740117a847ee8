"""Read a file in COCO's JSON layout through pycocotools: its pictures, their boxes and the names of the classes."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.dense import Boxes
from counterpoint.data.images import decode_whole
from counterpoint.data.own.places import read_json
from counterpoint.errors import DataError, needs_extra
from counterpoint.waiting import patient_track

GREY = 128  # of the rest of a square
LISTS = {"images": ("id",), "annotations": ("id", "image_id", "category_id"), "categories": ("id",)}  # and their ids


class Picture(NamedTuple):
    """A picture of a file, and its objects in the file's order."""

    path: Path
    corners: list[tuple[float, float, float, float]]  # left, top, right, bottom in the picture's own pixels
    labels: list[str]
    outlines: list[Any]  # the segmentation of each object in COCO's form; None without one
    crowds: list[Any]  # the segmentations of crowds, which are no objects
    size: tuple[int, int] | None = None  # width and height that the file names; None where it names none


def annotated(
    file: Path, images: str, accounts: Accounts, classes: tuple[str, ...] = ()
) -> tuple[list[Picture], tuple[str, ...]]:
    """Read a file: its pictures with their objects, and the names of its categories. With `classes`, leave out other objects."""
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise needs_extra("coco:", "dense") from error
    found = read_json(file)
    if not isinstance(found, dict) or not all(isinstance(found.get(name), list) for name in LISTS):
        raise DataError(f"{file} is not in COCO's layout: it needs the lists images, annotations and categories")
    for part in LISTS:
        _check_entries(file, part, found[part])
    for part in LISTS:
        if not found[part] and (part == "images" or not classes):  # a file of test pictures may lack the others
            raise DataError(f"{file}: the list {part} is empty")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco = COCO()
        coco.dataset = found
        coco.createIndex()
    root = Path(images) if images else file.parent
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; name the folder of the pictures (?images=DIR)")
    ordered = sorted(coco.cats.items(), key=lambda item: (isinstance(item[0], str), item[0]))  # numbers, then texts
    names = {key: str(value.get("name", key)) for key, value in ordered}
    known = classes or tuple(dict.fromkeys(names.values()))
    pictures: dict[Any, Picture] = {}
    for key, value in coco.imgs.items():
        size = value.get("width"), value.get("height")
        known_size = all(isinstance(side, int) and side > 0 for side in size)
        pictures[key] = Picture(root / value["file_name"], [], [], [], [], size if known_size else None)
    for number, annotation in enumerate(found["annotations"], start=1):
        accounts.find("boxes")
        name = names.get(annotation.get("category_id"))
        box = _box(annotation.get("bbox"))
        picture = pictures.get(annotation.get("image_id"))
        reason = ""
        if picture is None:
            reason = "names no picture of the file"
        elif name is None or name not in known:
            reason = f"is of an unknown category ({annotation.get('category_id') if name is None else name})"
        elif annotation.get("iscrowd"):
            reason = "is a crowd"
            picture.crowds.append(annotation.get("segmentation"))
        elif box is None:
            reason = "has no bbox of four finite numbers"
        if reason or picture is None or box is None or name is None:
            accounts.leave(Line(str(file), number, reason, unit="boxes"))
            continue
        picture.corners.append(box)
        picture.labels.append(name)
        picture.outlines.append(annotation.get("segmentation") or None)
    return list(pictures.values()), tuple(dict.fromkeys(names.values()))


def _check_entries(file: Path, name: str, entries: list[Any]) -> None:
    """Raise DataError for an entry without its ids, and for an id that two pictures or categories share."""
    seen: dict[Any, Any] = {}
    for number, entry in enumerate(entries, start=1):
        place = f"{file}: entry {number} of {name}"
        if not isinstance(entry, dict):
            raise DataError(f"{place} is no JSON object")
        for key in LISTS[name]:
            if key not in entry or isinstance(entry[key], list | dict):
                raise DataError(f"{place} has no '{key}'; give it a number")
        if name == "images" and not isinstance(entry.get("file_name"), str):
            raise DataError(f"{place} has no 'file_name'; give it a text")
        own = entry["id"]
        if name == "annotations":
            continue
        if own is None or own != own:  # NaN
            raise DataError(f"{place} has no 'id'; give it a number")
        if own in seen and (name == "images" or seen[own] != entry.get("name")):
            what = "pictures" if name == "images" else "categories"
            raise DataError(f"{place} has the id {own} of an entry before it; ids of {what} must differ")
        seen[own] = entry.get("name")


def _box(value: Any) -> tuple[float, float, float, float] | None:
    """Return left, top, right, bottom; None for anything but four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(isinstance(number, int | float) for number in value):
        return None
    try:
        left, top, wide, high = map(float, value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    if not all(map(math.isfinite, (left, top, wide, high))):
        return None
    return left, top, left + wide, top + high


class Square(NamedTuple):
    """A picture as a square whose longer side it fills; the rest is grey on the right or below."""

    pixels: NDArray[np.uint8]  # [size, size, 3]
    shown: tuple[int, int]  # width and height of the picture within the square
    own: tuple[int, int]  # width and height of the picture itself


def square(path: Path, size: int, told: tuple[int, int] | None = None) -> Square:
    """Read a picture as a square.

    Args:
        path: its file.
        size: height and width of the square.
        told: width and height of the picture that the file of boxes names (see `decode_whole`).

    Raises DataError, with a reason that fits a list of files.
    """
    shown = decode_whole(path, told)
    factor = size / max(shown.size)
    wide, high = (max(1, round(side * factor)) for side in shown.size)
    pixels = np.full((size, size, 3), GREY, np.uint8)
    pixels[:high, :wide] = np.asarray(shown.resize((wide, high), Image.Resampling.BILINEAR))
    return Square(pixels, (wide, high), shown.size)


def boxes_of(picture: Picture, classes: tuple[str, ...], found: Square, accounts: Accounts) -> tuple[Boxes, list[Any]]:
    """Return the boxes of a picture in pixels of its square, and the outlines of these objects.

    Boxes are cut at the picture's edges. Those that are thinner than a pixel then are left out and listed.
    """
    factor = len(found.pixels) / max(found.own)
    corners, labels, outlines = [], [], []
    for box, label, outline in zip(picture.corners, picture.labels, picture.outlines, strict=True):
        cut = np.clip(np.array(box), 0, [*found.own, *found.own])
        if cut[2] - cut[0] < 1 or cut[3] - cut[1] < 1:
            reason = "a box that is empty or outside its picture"
            accounts.leave(Line(str(picture.path), None, reason, unit="boxes"))
            continue
        corners.append(cut * factor)
        labels.append(classes.index(label))
        outlines.append(outline)
    accounts.read("boxes", len(corners))
    numbers = np.array(labels, np.int64)
    return Boxes(np.array(corners, np.float32).reshape(-1, 4), numbers, np.arange(len(labels))), outlines


def squares(pictures: Sequence[Picture], size: int, accounts: Accounts) -> Iterator[tuple[int, Picture, Square]]:
    """Read pictures as squares, each with its number. Those that cannot be used are left out and listed, with their boxes."""
    for number, picture in enumerate(patient_track(pictures, "reading pictures")):
        accounts.find("pictures")
        try:
            found = square(picture.path, size, picture.size)
        except DataError as error:
            accounts.leave(Line(str(picture.path), None, str(error), unit="pictures"))
            for _ in picture.corners:
                accounts.leave(Line(str(picture.path), None, "its picture is left out", unit="boxes"))
            continue
        accounts.read("pictures")
        yield number, picture, found
