"""`coco:FILE`: the user's own pictures with boxes, in COCO's JSON layout, read through pycocotools.

    {"images": [{"id": 1, "file_name": "a.jpg", "width": 640, "height": 480}],
     "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 20, 30, 40]}],
     "categories": [{"id": 3, "name": "fish"}]}

A box is left, top, width, height in pixels. File names are relative to `?images=DIR`, by default the file's own folder. Pictures
are turned upright by their EXIF orientation, unless the file names the width and height of the stored picture. They are scaled so
that their longer side is `size`; the rest of the square is grey. Left out and listed are:

- pictures that cannot be read, and those of another size than "width" and "height" in the file;
- boxes that are empty, outside their picture, or no four numbers;
- annotations of unknown pictures or categories, and crowds.

For the tasks `dense` and `views` the source gives pictures with boxes and masks (data/coco_scenes.py).

For the task `regions` it gives proposals of two domains. The second domain is `?target=PLACE`: another file of this layout with
the same category names, or a folder of pictures without boxes. By default proposals are drawn around the boxes, of both domains,
and pictures without boxes have squares on a grid. With `?detector=torchvision:NAME` a detector of torchvision proposes them from
the picture alone (`encoders/detectors.py`), and squares fill up its list. The classes of the target serve measures alone.

A target file is divided into training, valid and test. With a target folder nothing measures the target: valid and test are of
the source, and a note reports it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import cached
from counterpoint.data.accounts import Accounts
from counterpoint.data.coco_files import Picture, annotated, boxes_of, squares
from counterpoint.data.coco_scenes import load_scenes
from counterpoint.data.dense import Boxes, DenseData
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
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

PROPOSALS = 100  # of a picture, by default
LOWEST = -10.0  # logit of squares that fill up a detector's proposals
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def load(
    place: str,
    *,
    task: str = "regions",
    images: str = "",
    target: str = "",
    target_images: str = "",
    size: int = 256,
    proposals: int = PROPOSALS,
    detector: str = "",
    seed: int = 0,
    test: str = "",
    test_images: str = "",
    valid: str = "",
) -> RegionData | DenseData:
    """Open a file in COCO's layout (see the module).

    Args:
        place: the JSON file of the source.
        task: "regions": proposals of two domains, kept in memory. "dense" or "views": pictures with boxes and masks of one domain.
        images: folder of its pictures.
        target: JSON file of the target, or a folder of pictures. "" (default): no target; the source is measured.
        target_images: folder of the pictures of a target file.
        size: height and width of a picture in pixels, 16 to 4096.
        proposals: boxes of a picture, 4 to 2000.
        detector: detector that proposes boxes, torchvision:NAME or torchvision:NAME/FILE. "" (default): they are drawn.
        seed: seed of the drawn proposals.
        test: fraction of the measured domain's pictures in the test split, by default a fifth. For "dense" and "views" also
            the JSON file of the test pictures.
        test_images: folder of the pictures of that file.
        valid: fraction of the others in the valid split, by default a tenth.

    Raises DataError for a file that cannot be read or has no box, CounterpointError for an invalid option.
    """
    checked_size(size)
    if task != "regions":
        if target or target_images or detector or seed or proposals != PROPOSALS:
            raise CounterpointError(
                "target, target_images, detector, proposals and seed are for the task regions; name a file of test pictures by "
                "?test=FILE"
            )
        return load_scenes(place, images, size, test, test_images, valid)
    if test_images:
        raise CounterpointError(
            "test_images is for pictures with boxes (dense, views); for regions name ?target_images="
        )
    if size < 16 or not 4 <= proposals <= 2000:
        raise CounterpointError(f"size must be at least 16 and proposals lie in 4..2000, got {size} and {proposals}")
    accounts = Accounts(place, f"coco:{images}:{target}:{target_images}")
    notes: list[str] = []
    try:
        own, classes = annotated(Path(place), images, accounts)
        other: list[Picture] = []
        measured = bool(target) and not Path(target).is_dir()
        if measured:
            other, _ = annotated(Path(target), target_images, accounts, classes)
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
    known = np.array(held.kept, bool)
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


def _folder(place: Path) -> list[Picture]:
    """Return the pictures of a folder and its folders, in the order of their names."""
    files = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{place}: no pictures ({', '.join(SUFFIXES)})")
    return [Picture(path, [], [], [], []) for path in files]


class _Read:
    """Pictures of a domain in memory, scaled, with their proposals."""

    def __init__(
        self, pictures: list[Picture], classes: tuple[str, ...], size: int, count: int, seed: int, accounts: Accounts
    ) -> None:
        pixels, self.found, self.kept = [], [], []
        self.boxes: list[Boxes] = []
        self.shown: list[tuple[int, int]] = []  # width and height of each picture within its square
        for number, picture, read in squares(pictures, size, accounts):
            boxes, _ = boxes_of(picture, classes, read, accounts)
            some = bool(len(boxes.labels))
            pixels.append(read.pixels)
            self.boxes.append(boxes)
            self.shown.append(read.shown)
            rng = np.random.default_rng([seed, number])
            drawn = drawn_proposals(rng, boxes, count, read.shown, len(classes)) if some else None
            self.found.append(drawn or grid_proposals(count, read.shown))
            self.kept.append(some)
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
