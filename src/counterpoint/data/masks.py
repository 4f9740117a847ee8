"""`masks:DIR`: the user's own pictures with a class for each pixel, as folders of pictures and masks with the same names.

    DIR/images/a.jpg           DIR/masks/a.png               splits are cut here
    DIR/train/images/a.jpg     DIR/train/masks/a.png         splits above the two folders
    DIR/images/train/a.jpg     DIR/masks/train/a.png         or below them

The folder of masks may also be named `labels`, `annotations` or `SegmentationClass`. That of pictures may be `image` or
`JPEGImages`. `?images=` and `?masks=` name others. Further modalities are folders beside the pictures:
`?modalities=rgb,depth,event` takes the folders `rgb`, `depth` and `event`. The first one is the picture that systems of one
modality use. An item may lack a modality; its picture is then black.

`?domain=folder` takes the first folder below the two as a picture's domain, such as its kind of imaging. Pictures without one
have no domain:

    DIR/images/xray/a.jpg      DIR/masks/xray/a.png          of the domain xray
    DIR/images/b.jpg                                         of none, such as natural pictures

A mask is a PNG or TIFF of class numbers: grey of 8 or 16 bits, palette or 1 bit. `?ignore=` is the number of pixels of unknown
class, 255 by default. Masks of 0 and 255 alone are masks of one class, 255. Names of classes stand in DIR/classes.txt, one a
line in the order of their numbers, or in `?classes=road,car`.

A picture becomes a square as in every source of pictures (data/images.py). Its mask is cut alike and scaled by the nearest pixel,
never by interpolation. A picture without a mask is kept for training, without labels. These files are left out and listed: masks
without a picture, masks of another size than their picture, and damaged files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from counterpoint.data.accounts import Accounts, Line, first_of
from counterpoint.data.dense import IGNORE, MOST, DenseData, aligned_scenes
from counterpoint.data.images import KEEP, Indices, Pixels, checked_size, decode
from counterpoint.data.own.item_splits import item_splits
from counterpoint.data.own.places import SPLITS, is_folder
from counterpoint.data.pairs import AlignedData
from counterpoint.data.valid import by_content
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.files import walk
from counterpoint.waiting import patient_track
from counterpoint.words import counted

IMAGES = ("images", "image", "img", "imgs", "jpegimages", "leftimg8bit", "rgb")
FAR = 9  # unused class numbers in a row from which a note asks whether the next number is a fault
MASKS = ("masks", "mask", "labels", "label", "annotations", "segmentationclass", "gt", "gtfine")


@dataclass
class Item:
    """A picture with its other modalities and its mask."""

    key: str  # path below the folder of a kind, without its ending
    split: str  # "", "train", "test" or "validation"
    pictures: dict[str, Path]  # by modality
    mask: Path | None


def load(
    place: str,
    *,
    task: str = "dense",
    size: int = 64,
    images: str = "",
    masks: str = "",
    modalities: str = "",
    classes: str = "",
    ignore: int = 255,
    background: int = 1,
    test: str = "",
    valid: str = "",
    domain: str = "",
) -> DenseData | AlignedData:
    """Open a folder of pictures and masks (see the module).

    Args:
        place: the folder.
        task: "dense", or "views" to learn from the pictures; the result is the same. "aligned": the modalities, and
            sentences that name the classes of each picture.
        size: height and width of pictures and masks in pixels, 8 to 4096.
        images, masks: names of the two folders. Default: those with the usual names.
        modalities: names of the folders of several modalities, between commas; `images` is then not used.
        classes: names of the classes between commas, in the order of their numbers. Default: those of classes.txt, else numbers.
        ignore: number of pixels whose class is unknown; -1 if there is none.
        background: 1 if class 0 is the background, which the mean Dice leaves out; 0 if it is a class like others.
        test: fraction of the items in the test split, or the name of a split. Default: the split "test", else "validation",
            else a fifth.
        valid: fraction of the training items in the valid split, or the name of a split. Default: the split "validation"
            where it is not the test split, else a tenth.
        domain: "folder": the first folder below that of pictures is the domain. Default: no domains.

    Raises DataError for missing or damaged files, CounterpointError for an invalid option.
    """
    checked_size(size)
    if background not in (0, 1):
        raise CounterpointError(f"background is 0 or 1, got {background}")
    if domain not in ("", "folder"):
        raise unknown("domain", domain, ["folder"])
    if not is_folder(place):
        raise DataError(f"{place}: no such directory; it should hold a folder of images and a folder of masks")
    accounts = Accounts(place, f"masks:{images},{masks},{modalities}")
    names = [name.strip() for name in modalities.split(",") if name.strip()]
    if len(set(names)) < len(names):
        raise CounterpointError(f"modalities names a folder twice: {modalities}")
    try:
        kinds, items = _items(Path(place), images, masks, names, accounts)
        reader = _Reader(place, kinds, items, size, ignore, accounts)
        found = _data(reader, place, classes, bool(background), test, valid, bool(domain))
        return aligned_scenes(found) if task == "aligned" else found
    except CounterpointError:
        accounts.write()
        raise


def _items(
    root: Path, images: str, masks: str, names: list[str], accounts: Accounts
) -> tuple[tuple[str, ...], list[Item]]:
    """Find the items by the paths of their files. Return the names of the modalities, and the items in order."""
    found = walk(root)
    for path, reason in found.left_out:
        accounts.find("files")
        accounts.leave(Line(str(path), None, reason, unit="files"))
    readable = Image.registered_extensions()
    first_names = [name.lower() for name in names] or [images.lower()] if names or images else list(IMAGES)
    mask_names = [masks.lower()] if masks else list(MASKS)
    kinds: dict[str, str] = {}  # modality by its folder's lower-case name, as written
    files: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)  # (split, key) -> kind -> path
    of_masks: dict[tuple[str, str], Path] = {}
    for path in found.files:
        accounts.find("files")
        parts = path.relative_to(root).parts
        if path.name == "classes.txt" and len(parts) == 1:
            accounts.read("files")
            continue
        at = next((n for n, part in enumerate(parts[:-1]) if part.lower() in (*first_names, *mask_names)), None)
        if at is None:
            reason = "not below a folder of images or masks"
            accounts.leave(Line(str(path), None, reason, unit="files"))
            continue
        if path.suffix.lower() not in readable:
            accounts.leave(Line(str(path), None, "not a picture by its ending", unit="files"))
            continue
        kind, rest = parts[at], [*parts[:at], *parts[at + 1 :]]
        split = ""
        if len(rest) > 1 and rest[0].lower() in SPLITS:
            split, rest = SPLITS[rest[0].lower()], rest[1:]
        key = split, "/".join([*rest[:-1], Path(rest[-1]).stem])
        where = of_masks if kind.lower() in mask_names else None
        taken = key in of_masks if where is not None else kind.lower() in files[key]
        if taken:
            accounts.leave(Line(str(path), None, "another file of the same name is taken", unit="files"))
        elif where is not None:
            where[key] = path
        else:
            kinds.setdefault(kind.lower(), kind)
            files[key][kind.lower()] = path
    if not any(files.values()):
        wanted = ", ".join(names) or images or "images"
        raise DataError(
            f"{root}: no pictures below a folder {wanted}; name the folders: ?images=FOLDER&masks=FOLDER, or "
            "?modalities=FOLDER,FOLDER"
        )
    order = [name for name in first_names if name in kinds]
    if not names and len(order) > 1:
        raise DataError(
            f"{root}: several folders of pictures ({', '.join(kinds[name] for name in order)}); name one (?images=FOLDER), or "
            f"all as modalities (?modalities={','.join(kinds[name] for name in order)})"
        )
    if missing := [name for name in names if name.lower() not in kinds]:
        raise DataError(f"{root}: no pictures of the modality {missing[0]}; there are {', '.join(kinds.values())}")
    for key, path in of_masks.items():
        if not files.get(key):
            accounts.leave(Line(str(path), None, "a mask without a picture", unit="files"))
    items = [
        Item(key, split, {kinds[kind]: paths[kind] for kind in order if kind in paths}, of_masks.get((split, key)))
        for (split, key), paths in sorted(files.items())
        if paths
    ]
    return tuple(kinds[name] for name in order), items


class _Reader:
    """Read pictures and masks as squares; keep them in memory where all fit.

    Args:
        place: the folder, for messages.
        modalities: names of the modalities.
        items: the items. Those that cannot be read are removed and listed.
        size: height and width of the squares in pixels.
        ignore: number in the files of pixels of unknown class.
        accounts: counts the files.
    """

    def __init__(
        self, place: str, modalities: tuple[str, ...], items: list[Item], size: int, ignore: int, accounts: Accounts
    ) -> None:

        self.place, self.modalities, self.size, self.ignore, self.accounts = place, modalities, size, ignore, accounts
        keep = len(items) * size**2 * (3 * len(modalities) + 2) <= KEEP
        self.pixels: dict[str, list[Pixels]] = {name: [] for name in modalities}
        self.raw: list[NDArray[np.int64]] = []
        self.items: list[Item] = []
        self.turned = 0  # masks of pictures that are turned by metadata but keep their size
        self.seen: dict[int, list[Path]] = {}  # number in the files -> the masks that have it
        black = np.zeros((size, size, 3), np.uint8)
        for item in patient_track(items, "reading masks"):
            good = True
            pictures: dict[str, Pixels] = {}
            for name, path in item.pictures.items():
                try:
                    pictures[name] = decode(path, size)
                    accounts.read("files")
                except DataError as error:
                    accounts.leave(Line(str(path), None, str(error), unit="files"))
                    good = False
            numbers = None
            if item.mask is not None:
                try:
                    if not item.pictures or not good:
                        raise DataError("its picture cannot be read")
                    numbers = self.mask(item)
                    accounts.read("files")
                except DataError as error:
                    accounts.leave(Line(str(item.mask), None, str(error), unit="files"))
                    good = False
            if not good or not pictures:
                continue
            self.items.append(item)
            if numbers is not None:
                assert item.mask is not None
                for number in np.unique(numbers).tolist():
                    self.seen.setdefault(number, []).append(item.mask)
            if keep:
                for name in modalities:
                    self.pixels[name].append(pictures.get(name, black))
                self.raw.append(np.full((size, size), -1) if numbers is None else numbers)
        self.kept = keep
        if not self.items:
            raise DataError(f"{place}: no picture can be read; {accounts.examples()}")
        self.binary = {0, 255} == set(self.seen) and ignore == 255
        self.table: dict[int, int] = {}

    def mask(self, item: Item) -> NDArray[np.int64]:
        """Read a mask as a square of the file's numbers, scaled by the nearest pixel. DataError names the fault."""
        assert item.mask is not None
        picture = next(iter(item.pictures.values()))
        try:
            with Image.open(item.mask) as image, Image.open(picture) as other:
                image.load()
                if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
                    raise DataError(
                        f"has colours (mode {image.mode}), not class numbers; convert it to a grey or palette picture"
                    )
                upright = ImageOps.exif_transpose(other) or other
                if image.size != upright.size:
                    if image.size != other.size:
                        raise DataError(
                            f"has {image.width} x {image.height} pixels, its picture {upright.width} x {upright.height}"
                        )
                    exif = Image.Exif()
                    exif[0x0112] = other.getexif().get(0x0112, 1)
                    image.info["exif"] = exif.tobytes()
                    turned = ImageOps.exif_transpose(image) or image
                elif other.getexif().get(0x0112, 1) != 1:
                    self.turned += 1
                    turned = image
                else:
                    turned = image
                numbers = np.asarray(turned).astype(np.int64)
        except DataError:
            raise
        except Exception as error:  # codecs raise OSError, SyntaxError, ValueError, struct.error, zlib.error
            raise DataError(f"not a mask that can be read ({type(error).__name__})") from error
        high, wide = numbers.shape
        side = min(high, wide)
        at = (np.arange(self.size) + 0.5) * side / self.size
        rows, columns = ((at + (extent - side) / 2).astype(np.int64) for extent in (high, wide))
        return numbers[rows[:, None], columns[None, :]]

    def numbered(self, raw: NDArray[np.int64]) -> Pixels:
        """Convert the files' numbers to class numbers, IGNORE where unknown."""
        found = np.full(raw.shape, IGNORE, np.uint8)
        for number, label in self.table.items():
            found[raw == number] = label
        return found


class _OwnScenes:
    """One split of a reader's items (a `DenseSplit`)."""

    labels = None
    groups = None
    captions = None

    def __init__(self, reader: _Reader, rows: Indices, domains: Indices | None = None) -> None:
        self.reader, self.rows = reader, rows
        self.domains = None if domains is None else domains[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Pixels:
        return self.modality(self.reader.modalities[0], indices)

    def modality(self, name: str, indices: Indices) -> Pixels:
        reader, size = self.reader, self.reader.size
        rows = self.rows[indices]
        if reader.kept:
            return np.stack([reader.pixels[name][int(row)] for row in rows]) if len(rows) else _none(size, 3)
        out = np.zeros((len(rows), size, size, 3), np.uint8)
        for n, row in enumerate(rows):
            path = reader.items[int(row)].pictures.get(name)
            if path is not None:
                out[n] = _again(partial(decode, path, size), path)
        return out

    def masks(self, indices: Indices) -> Pixels:
        reader, size = self.reader, self.reader.size
        out = np.full((len(indices), size, size), IGNORE, np.uint8)
        for n, row in enumerate(self.rows[indices]):
            item = reader.items[int(row)]
            if item.mask is not None:
                raw = reader.raw[int(row)] if reader.kept else _again(partial(reader.mask, item), item.mask)
                out[n] = reader.numbered(raw)
        return out

    def boxes(self, indices: Indices) -> None:
        return None

    def present(self, name: str) -> NDArray[np.bool_]:
        return np.array([name in self.reader.items[int(row)].pictures for row in self.rows], bool)

    def row_names(self, positions: Indices) -> list[str]:
        """Name items for a reader (see `counterpoint.data.images.Listed`)."""
        found = [next(iter(self.reader.items[int(row)].pictures.values())) for row in self.rows[positions]]
        return [str(path) for path in found]

    def files(self, positions: Indices, modality: str = "image") -> list[str | None]:
        """Return the path of each item's picture (see `counterpoint.data.images.Listed`)."""
        name = modality if modality in self.reader.modalities else self.reader.modalities[0]
        found = [self.reader.items[int(row)].pictures.get(name) for row in self.rows[positions]]
        return [None if path is None else str(path) for path in found]


def _none(size: int, channels: int) -> Pixels:
    return np.zeros((0, size, size, channels), np.uint8)


def _again(read: Callable[[], NDArray[Any]], path: Path) -> NDArray[Any]:
    """Read a file during training; DataError names it where it has become unreadable."""
    try:
        return read()
    except DataError as error:
        raise DataError(
            f"{path}: {error}. It was valid when the set was opened; repair it and continue with --resume"
        ) from error


def _regions(reader: _Reader, classes: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the names of the classes, and notes. Fill the reader's table from numbers to classes."""
    notes: list[str] = []
    listed = Path(reader.place) / "classes.txt"
    names = [name.strip() for name in classes.split(",") if name.strip()]
    if not names and listed.is_file():
        names = [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
    numbers = sorted(set(reader.seen) - {-1, reader.ignore})
    if reader.binary:
        numbers = [0, 255]
        names = names or ["background", "foreground"]
        reader.table = {0: 0, 255: 1}
        notes.append(
            f"{reader.place}: the masks hold 0 and 255 alone, so 255 is class 1; if it is unknown, set ?ignore=-1"
        )
    elif names:
        reader.table = {number: number for number in range(len(names)) if number != reader.ignore}
        odd = [number for number in numbers if number >= len(names)]
        if odd:
            odd_masks: dict[Path, list[str]] = {}
            for number in odd:
                for path in reader.seen[number]:
                    odd_masks.setdefault(path, []).append(str(number))
            for path, mine in odd_masks.items():
                reader.accounts.change(
                    path, f"pixels of the numbers {', '.join(mine)} have no name and count as unknown"
                )
            said = ", ".join(map(str, odd[:10]))
            notes.append(
                f"{reader.place}: pixels of the numbers {said} have no name among {counted(len(names), 'class')}; they count as "
                f"unknown in {first_of(list(odd_masks), 'mask')} (all listed in {reader.accounts.file})"
            )
    elif numbers and numbers[-1] < MOST:
        names = [str(number) for number in range(numbers[-1] + 1)]
        reader.table = {number: number for number in numbers}
        gaps = np.diff([-1, *numbers])
        at = int(gaps.argmax())
        if gaps[at] > FAR:
            high = numbers[at]
            notes.append(
                f"{reader.place}: no mask has a number from {high - gaps[at] + 1} to {high - 1}, but {high} is in "
                f"{first_of(reader.seen[high], 'mask')}. All numbers up to {numbers[-1]} are classes. If {high} is a fault, name "
                f"the classes in classes.txt; if it marks unknown pixels, set ?ignore={high}"
            )
    else:  # numbers of 16 bits
        names = [str(number) for number in numbers]
        reader.table = {number: label for label, number in enumerate(numbers)}
    if len(names) > MOST:
        raise DataError(f"{reader.place}: the masks have {counted(len(names), 'class')}, more than {MOST}")
    if len(names) < 2:
        raise DataError(
            f"{reader.place}: the masks have {counted(len(names), 'class')}; segmentation needs at least two. "
            "Check ?ignore=, the number of pixels of unknown class"
        )
    return tuple(names), notes


def _domain(item: Item) -> str:
    """Return the first folder of an item, "" for a file without one."""
    return item.key.rpartition("/")[0].partition("/")[0]


def _data(
    reader: _Reader, place: str, classes: str, background: bool, test: str, valid: str, by_folder: bool
) -> DenseData:
    regions, notes = _regions(reader, classes)
    everything = _OwnScenes(reader, np.arange(len(reader.items)))
    known: list[bool] = []
    empty: list[Path] = []  # masks without a pixel of known class
    for row in range(len(reader.items)):
        mask = reader.items[row].mask
        some = mask is not None and bool((everything.masks(np.array([row])) != IGNORE).any())
        if mask is not None and not some:
            empty.append(mask)
            reader.accounts.change(mask, "no pixel of known class; its picture is used without labels")
        known.append(some)
    labelled = np.array(known, bool)
    if not labelled.any():
        raise DataError(f"{place}: no mask has a pixel of known class; check ?ignore= and the names of the files")
    if empty:
        used = "its picture is" if len(empty) == 1 else "their pictures are"
        notes.append(
            f"{place}: no pixel of known class in {first_of(empty, 'mask')}; {used} used without labels (all listed in "
            f"{reader.accounts.file})"
        )
    without = int((~labelled).sum()) - len(empty)
    if without:
        used = "it is" if without == 1 else "they are"
        notes.append(
            f"{place}: {counted(without, 'picture has', 'pictures have')} no mask; {used} used for training, without labels"
        )
    if reader.turned:
        notes.append(
            f"{place}: {counted(reader.turned, 'picture is', 'pictures are')} turned by their metadata; their masks are taken to "
            "show the turned picture"
        )
    alike = by_content(np.stack(reader.pixels[reader.modalities[0]])) if reader.kept else np.arange(len(labelled))
    train, watched, held, more = item_splits(place, [item.split for item in reader.items], labelled, alike, test, valid)
    for name in reader.modalities:
        lacking = [item for item in reader.items if name not in item.pictures]
        for item in lacking:
            reader.accounts.change(next(iter(item.pictures.values())), f"its item lacks the modality {name}")
        if lacking:
            notes.append(
                f"{place}: {len(lacking)} of {counted(len(everything), 'item lacks', 'items lack')} the modality {name} (listed in "
                f"{reader.accounts.file})"
            )
    reader.accounts.check()
    reader.accounts.write()
    domains: tuple[str, ...] = ()
    numbers = None
    if by_folder:
        of = [_domain(item) for item in reader.items]
        domains = tuple(sorted({name for name in of if name}))
        if not domains:
            raise DataError(f"{place}: domain=folder needs folders below that of pictures, one for each domain")
        numbers = np.array([domains.index(name) if name else -1 for name in of], np.int64)
    splits = [_OwnScenes(reader, rows, numbers) for rows in (train, watched, held)]
    return DenseData(
        f"masks:{place}",
        splits[0],
        splits[1],
        splits[2],
        (),
        reader.size,
        notes=[*reader.accounts.notes(), *notes, *more],
        accounts=reader.accounts,
        regions=regions,
        modalities=reader.modalities,
        background=background,
        domains=domains,
    )
