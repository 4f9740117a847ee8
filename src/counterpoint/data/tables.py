"""The user's own images, labels and captions: one picture and at most one text a row.

    imagefolder:DIR      DIR/CLASS/*.jpg, or DIR/train/CLASS/* and DIR/test/CLASS/*; a metadata.csv (or .jsonl) with a
                         column file_name brings captions and other columns (own/folders.py)
    parquet:PATH         a file, a folder of them or a pattern ('data/*.parquet')
    csv:PATH             likewise; the image column holds paths, absolute or from the file's folder
    webdataset:PATTERN   tar files ('shards/*.tar')

For the task `views` an image and, if there is one, a label; for the task `aligned` an image and a text. Columns are
found by their usual names, which a note repeats, or named with `?image=`, `?label=`, `?text=` (`json.caption` reaches into a
column of records; of archives also by the ending: `?image=jpg`). A cell with several captions counts with its first.

Files are read as `manifest:` reads them (data/manifest.py says how): cells are what they are, rows that share a picture or
a text stay together in splits that are made here, and what is left out is counted and listed with its reason. A row without
a label is kept without one. The test split is the one called "test", else "validation", else one made here: the same fifth
of the items every time, each class in proportion. `?test=0.1` makes another, `?test=NAME` takes the split of that name. The
valid split is the one called "validation" (valid, val, dev) where there is a test split too, else a tenth of the training
items made here; `?valid=` is as `?test=`.
"""

from __future__ import annotations

from counterpoint.data.accounts import Accounts
from counterpoint.data.images import ImageData, checked_size
from counterpoint.data.own.archives import member_column
from counterpoint.data.own.contracts import aligned_data, image_data
from counterpoint.data.own.folders import read_folder
from counterpoint.data.own.opening import open_table
from counterpoint.data.own.places import is_folder
from counterpoint.data.own.reader import Reader
from counterpoint.data.own.roles import IMAGE, LABEL, TEXT, image_roles, known_by_name
from counterpoint.data.own.sources import Wanted
from counterpoint.data.pairs import AlignedData
from counterpoint.errors import CounterpointError, DataError


def load_imagefolder(
    place: str,
    *,
    task: str = "views",
    size: int = 64,
    image: str = "",
    label: str = "",
    text: str = "",
    test: str = "",
    valid: str = "",
) -> ImageData | AlignedData:
    """Open a folder of images (see the module).

    Args:
        place: the folder.
        task: views, for images and classes, or aligned, for images and captions.
        size: pixels of images, height and width, 8 to 4096.
        image, label, text: columns of metadata files; default: by their usual names, and the folders' names as classes.
        test: the fraction to test on, or the name of the split; default: the split "test", else "validation", else a fifth.
        valid: the fraction of the training items to watch training on, or the name of the split; default: the split
            "validation" where it is not tested on, else a tenth.

    Raises DataError for what is on disk, CounterpointError for an option that makes no sense.
    """
    return _load("imagefolder", place, task, size, image, label, text, test, valid)


def load_parquet(
    place: str,
    *,
    task: str = "views",
    size: int = 64,
    image: str = "",
    label: str = "",
    text: str = "",
    test: str = "",
    valid: str = "",
) -> ImageData | AlignedData:
    """Open Parquet files (see the module; arguments as of `load_imagefolder`, place: a file, folder or pattern)."""
    return _load("parquet", place, task, size, image, label, text, test, valid)


def load_csv(
    place: str,
    *,
    task: str = "views",
    size: int = 64,
    image: str = "",
    label: str = "",
    text: str = "",
    test: str = "",
    valid: str = "",
) -> ImageData | AlignedData:
    """Open CSV files (see the module; arguments as of `load_imagefolder`, place: a file, folder or pattern)."""
    return _load("csv", place, task, size, image, label, text, test, valid)


def load_webdataset(
    place: str,
    *,
    task: str = "views",
    size: int = 64,
    image: str = "",
    label: str = "",
    text: str = "",
    test: str = "",
    valid: str = "",
) -> ImageData | AlignedData:
    """Open WebDataset archives (see the module; arguments as of `load_imagefolder`, place: a file, folder or pattern)."""
    return _load("webdataset", place, task, size, image, label, text, test, valid)


def _load(
    kind: str, place: str, task: str, size: int, image: str, label: str, text: str, test: str, valid: str
) -> ImageData | AlignedData:
    checked_size(size)
    pairs = task == "aligned"
    prefer = ""
    if kind == "webdataset":
        (image, ending), (label, _), (text, _) = _member(image), _member(label), _member(text)
        prefer = ending
    named = {name.partition(".")[0] for name in (image, label, text) if name} | {image, label, text}
    usual = {*IMAGE, *LABEL, *(TEXT if pairs else ())}

    def wanted(name: str) -> bool:
        return name in named or name.lower() in usual or known_by_name(name, {}) in ("split", "id")

    accounts = Accounts(place, f"{kind}:{image},{label},{text}")
    try:
        if kind == "imagefolder":
            if not is_folder(place):
                if "://" in place:
                    raise DataError(f"{place} is on the net; download it and name the folder")
                raise DataError(f"{place}: no such directory; it should hold a folder of images for every class")
            table, notes = read_folder(place, wanted, accounts)
        else:
            table, notes = open_table(place, "tar" if kind == "webdataset" else kind, wanted, accounts, prefer)
        known = table.usual | ({"image": "image", "label": "label"} if kind == "imagefolder" else {})
        roles = image_roles(place, table.columns, known, image, label, text, pairs=pairs)
        reader = Reader(table, roles, Wanted(size, 16000, 1), accounts)
        reader.judge(None)
        if pairs:
            return aligned_data(reader, f"{kind}:{place}", test, valid, notes)
        return image_data(reader, f"{kind}:{place}", test, valid, notes)
    except CounterpointError:
        accounts.write()
        raise


def _member(named: str) -> tuple[str, str]:
    """The column that the ending of a member stands for, and the ending; a name that is none stays."""
    column, kind = member_column(named) if named and not named.startswith("json.") else (named, "")
    return column, named.lower() if kind else ""
