"""Give a file in COCO's layout as dense data: pictures with boxes, and with masks where the objects have outlines.

Class 0 is the background, and the file's categories follow in the order of their ids. Outlines are polygons or run lengths. They
are painted from the largest to the smallest, so that small objects lie on top. Unknown are the pixels of crowds, and those beside
the picture in its square. A picture with an object without an outline has no mask. A picture without objects shows none.

With `?test=FILE` a second file of this layout has the test pictures, as in COCO's own two files. `?test_images=DIR` names their
folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts
from counterpoint.data.coco_files import Picture, Square, annotated, boxes_of, square, squares
from counterpoint.data.dense import IGNORE, MOST, Boxes, DenseData
from counterpoint.data.images import KEEP, Indices, Pixels, some
from counterpoint.data.own.item_splits import item_splits
from counterpoint.data.valid import by_content
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted


class _Item(NamedTuple):
    """A picture that can be read, and its objects in pixels of its square."""

    picture: Picture
    held: bool  # whether it is of the file of test pictures
    boxes: Boxes
    outlines: list[Any] | None  # of the boxes; None where the picture has no mask


def load_scenes(
    place: str, images: str, size: int, test: str, test_images: str, valid: str, keep: int = KEEP
) -> DenseData:
    """Open a file as dense data (see the module); arguments and errors are those of `data.coco.load`.

    Args:
        keep: bytes of pictures and masks that stay in memory at most; beyond it they are read again for each batch.
    """
    accounts = Accounts(place, f"coco:{images}:{test}:{test_images}")
    of_file = test.lower().endswith(".json")
    if test_images and not of_file:
        raise CounterpointError("test_images is the folder of a file of test pictures; name it, too: ?test=FILE.json")
    try:
        own, classes = annotated(Path(place), images, accounts)
        held, names_of_test = annotated(Path(test), test_images, accounts, classes) if of_file else ([], ())
        if len(classes) >= MOST:
            many = counted(len(classes), "category", "categories")
            raise DataError(f"{place}: the file has {many}, more than {MOST - 1}")
        reader = _Reader(place, own, held, classes, size, accounts, keep)
        accounts.check()
    finally:
        accounts.write()
    items = reader.items
    if not any(len(item.boxes.labels) for item in items):
        raise DataError(f"{place}: no box can be used; {accounts.examples()}")
    names = [("test" if item.held else "train") if of_file else "" for item in items]
    own_names = [str(item.picture.path.resolve()) for item in items]
    alike = by_content(np.stack(reader.pixels)) if reader.kept else np.unique(own_names, return_inverse=True)[1]
    *rows, more = item_splits(place, names, np.ones(len(items), bool), alike, "" if of_file else test, valid)
    train, watched, tested = (_Scenes(reader, part) for part in rows)
    notes = [*accounts.notes(), *more]
    of_test = np.array([item.held for item in items])
    if twice := int(np.isin(alike[of_test], alike[~of_test]).sum()):
        notes.append(f"{test}: {counted(twice, 'test picture')} equal to one of {place}; the measures are too high")
    if strange := [name for name in names_of_test if name not in classes]:
        notes.append(f"{test}: objects of {some(strange, ', ')} are left out, because {place} has no such category")
    sides = [item.boxes.corners[:, 2:] - item.boxes.corners[:, :2] for item in items]
    if thin := sum(int((side.min(1, initial=1) < 1).sum()) for side in sides):
        notes.append(
            f"{place}: {counted(thin, 'box', 'boxes')} thinner than a pixel at this size, and not learnt; use ?size={2 * size}"
        )
    without = sum(item.outlines is None for item in items)
    if not reader.outlined:
        notes.append(f"{place}: there are boxes and no masks, because no object has an outline ('segmentation')")
    elif without:
        notes.append(
            f"{place}: the boxes of {counted(without, 'picture')} are used without a mask, because an outline is missing or "
            f"faulty (faults are listed in {accounts.file})"
        )
    return DenseData(
        f"coco:{place}",
        train,
        watched,
        tested,
        (),
        size,
        notes=notes,
        accounts=accounts,
        regions=("background", *classes),
    )


class _Reader:
    """Pictures as squares, with their boxes and masks; kept in memory where all fit.

    Args:
        place: the file, for messages.
        own, held: pictures of the file and of the file of test pictures. Those that cannot be read are left out and listed.
        classes: names of the categories.
        size: height and width of the squares in pixels.
        accounts: counts pictures and boxes.
        keep: bytes to keep at most.
    """

    def __init__(
        self,
        place: str,
        own: list[Picture],
        held: list[Picture],
        classes: tuple[str, ...],
        size: int,
        accounts: Accounts,
        keep: int,
    ) -> None:
        pictures = [*own, *held]
        self.size, self.kept = size, len(pictures) * size**2 * 4 <= keep
        self.items: list[_Item] = []
        self.pixels: list[Pixels] = []
        self.painted: list[Pixels] = []
        self.outlined = any(outline is not None for picture in pictures for outline in picture.outlines)
        for number, picture, found in squares(pictures, size, accounts):
            boxes, outlines = boxes_of(picture, classes, found, accounts)
            boxes = boxes._replace(labels=boxes.labels + 1)  # class 0 is the background
            item = _Item(picture, number >= len(own), boxes, outlines)
            if not self.outlined or any(outline is None for outline in outlines):
                item = item._replace(outlines=None)
            try:
                mask = self.mask(item, found)
            except DataError as error:
                accounts.change(picture.path, f"{error}; its boxes are used without a mask")
                item = item._replace(outlines=None)
                mask = self.mask(item, found)
            self.items.append(item)
            if self.kept:
                self.pixels.append(found.pixels)
                self.painted.append(mask)
        if not self.items:
            absent = all(line.reason == "no such file" for line in accounts.left("pictures"))
            folder = " (?images=DIR names the folder of the pictures)" if absent else ""
            raise DataError(f"{place}: no picture can be used{folder}; {accounts.examples()}")

    def square(self, row: int) -> Square:
        """Read a picture again. Raises DataError where it has changed since it was first read."""
        path, told = self.items[row].picture.path, self.items[row].picture.size
        try:
            return square(path, self.size, told)
        except DataError as error:
            raise DataError(f"{path} {error} now; it could be read when the data were opened") from error

    def mask(self, item: _Item, found: Square) -> Pixels:
        """Paint the outlines of a picture's objects. Raises DataError for one that is no outline in COCO's form."""
        mask = np.full((self.size, self.size), IGNORE, np.uint8)
        if item.outlines is None:
            return mask
        wide, high = found.shown
        inside = mask[:high, :wide]
        inside[:] = 0
        covers = [outlined(outline, found) for outline in item.outlines]
        for n in sorted(range(len(covers)), key=lambda n: -int(covers[n].sum())):
            inside[covers[n]] = item.boxes.labels[n]
        for crowd in item.picture.crowds:
            if crowd:
                inside[outlined(crowd, found) & (inside == 0)] = IGNORE
        return mask


def outlined(outline: Any, found: Square) -> NDArray[np.bool_]:
    """Return which pixels of a picture in its square an outline covers: [height, width] of the shown picture.

    Args:
        outline: polygons, each a list of x and y in turn, or run lengths {"size": [height, width], "counts": ...}.
        found: the picture.

    Raises DataError for anything else.
    """
    wide, high = found.shown
    if isinstance(outline, dict):
        whole = _runs(outline, found.own)
        rows, columns = (
            ((np.arange(count) + 0.5) * side / count).astype(np.int64)
            for count, side in zip((high, wide), whole.shape, strict=True)
        )
        return whole[rows[:, None], columns]
    from pycocotools import mask

    factor = np.array([wide / found.own[0], high / found.own[1]])
    try:
        corners = [np.array(polygon, np.float64).reshape(-1, 2) * factor for polygon in outline]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError("has an outline that is no list of polygons") from error
    if not corners or any(len(corner) < 3 or not np.isfinite(corner).all() for corner in corners):
        raise DataError("has a polygon without three finite corners")
    edge = np.array([wide, high])  # corners are kept near the picture: pycocotools steps along each edge
    polygons = [np.clip(corner, -edge, 2 * edge).flatten().tolist() for corner in corners]
    return np.asarray(mask.decode(mask.merge(mask.frPyObjects(polygons, high, wide)))).astype(bool)


def _runs(outline: dict[str, Any], own: tuple[int, int]) -> NDArray[np.bool_]:
    """Decode run lengths, down the columns, of a picture [height, width]. Wrong lengths raise DataError before anything is made."""
    wide, high = own
    counts = outline.get("counts")
    if isinstance(counts, str):
        counts = _numbers(counts)
    if outline.get("size") != [high, wide]:
        raise DataError(f"has run lengths of the size {outline.get('size')}, the picture has {high} x {wide} pixels")
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise DataError("has run lengths that are no whole numbers")
    if sum(counts) != wide * high:
        raise DataError(f"has run lengths of {sum(counts)} pixels, the picture has {wide * high}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(wide, high).T


def _numbers(text: str) -> list[int]:
    """Decode compressed run lengths.

    A number is written in digits of 5 bits, the lowest first, as characters from "0" on; bit 5 tells that more digits follow. From
    the fourth number on, the difference to the number before the last is written.
    """
    found: list[int] = []
    value = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        if not 0 <= digit < 64:
            raise DataError("has compressed run lengths with an unknown character")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:  # negative
            value -= 1 << shift
        found.append(value + found[-2] if len(found) > 2 else value)
        value = shift = 0
    return found


class _Scenes:
    """One split of a reader's pictures (a `DenseSplit`)."""

    labels = None
    groups = None
    captions = None

    def __init__(self, reader: _Reader, rows: Indices) -> None:
        self.reader, self.rows = reader, rows

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Pixels:
        reader, size = self.reader, self.reader.size
        out = np.zeros((len(indices), size, size, 3), np.uint8)
        for n, row in enumerate(self.rows[indices].tolist()):
            out[n] = reader.pixels[row] if reader.kept else reader.square(row).pixels
        return out

    def masks(self, indices: Indices) -> Pixels:
        reader, size = self.reader, self.reader.size
        out = np.full((len(indices), size, size), IGNORE, np.uint8)
        for n, row in enumerate(self.rows[indices].tolist()):
            if reader.kept:
                out[n] = reader.painted[row]
            elif (item := reader.items[row]).outlines is not None:
                out[n] = reader.mask(item, reader.square(row))
        return out

    def boxes(self, indices: Indices) -> list[Boxes]:
        return [self.reader.items[row].boxes for row in self.rows[indices].tolist()]

    def modality(self, name: str, indices: Indices) -> Pixels:
        return self.images(indices)

    def present(self, name: str) -> NDArray[np.bool_]:
        return np.ones(len(self), bool)

    def row_names(self, positions: Indices) -> list[str]:
        """Name items for a reader (see `counterpoint.data.images.Listed`)."""
        return [str(self.reader.items[row].picture.path) for row in self.rows[positions].tolist()]

    def files(self, positions: Indices, modality: str = "image") -> list[str | None]:
        return list(self.row_names(positions))
