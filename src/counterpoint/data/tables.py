"""The user's own images, labels and captions: one picture and at most one text for each row.

    imagefolder:DIR      DIR/CLASS/*.jpg, or DIR/train/CLASS/* and DIR/test/CLASS/*; a metadata.csv (or .jsonl) with a
                         column file_name adds captions and other columns (own/folders.py)
    parquet:PATH         a file, a folder of them or a pattern ('data/*.parquet')
    csv:PATH             the same for CSV; the image column holds paths, absolute or relative to the file's folder
    webdataset:PATTERN   tar files ('shards/*.tar')

The task `views` takes an image and, where there is one, a label. The task `aligned` takes an image and a text. The source finds
columns by their usual names, and a note lists them. `?image=`, `?label=` and `?text=` name other columns: `json.caption` is a
field in a column of records, and in archives an ending is possible too, `?image=jpg`. Of several captions in a cell the first
one counts.

The task `targets` takes a number to predict (`?target=age`), and one of three inputs: an image, a list of numbers
(`?series=wave`), or columns of numbers (`?columns=chord,angle,speed`). A row whose target is empty, NaN or text is left out.

The source reads files as `manifest:` does (see data/manifest.py). Cells keep their values as written. Rows that share a picture
or a text stay together in splits that are cut here. A list names all that is left out, with the reason. A row without a label is
kept without one.

`?domain=COLUMN` names a column of domains, such as styles or scanners; `imagefolder:DIR?domain=folder` takes them from
DIR/DOMAIN/CLASS/. `?unseen=sketch,scan` leaves these domains out of the splits, and measures them apart.

The test split is the split named "test", else "validation". Otherwise a fifth of the items is cut, the same every time, each
class in proportion. `?test=0.1` cuts another fraction; `?test=NAME` takes the split of that name. The valid split is the
split named "validation" (valid, val, dev) where there is a test split too. Otherwise a tenth of the training items is cut.
`?valid=` works as `?test=` does.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from counterpoint.data.accounts import Accounts
from counterpoint.data.images import ImageData, checked_size
from counterpoint.data.own.archives import member_column
from counterpoint.data.own.contracts import aligned_data, image_data, target_data
from counterpoint.data.own.folders import DOMAIN, read_folder
from counterpoint.data.own.opening import open_table
from counterpoint.data.own.places import is_folder
from counterpoint.data.own.reader import Reader
from counterpoint.data.own.roles import IMAGE, LABEL, TEXT, image_roles, known_by_name, target_roles
from counterpoint.data.own.sources import Wanted
from counterpoint.data.pairs import AlignedData
from counterpoint.data.targets import TargetData
from counterpoint.errors import CounterpointError, DataError


class Inputs(NamedTuple):
    """Options of the task `targets` (see `load_table`)."""

    target: str = ""
    series: str = ""
    columns: str = ""
    channels: int = 1


def load_table(
    kind: str,
    place: str,
    *,
    task: str = "views",
    size: int = 64,
    image: str = "",
    label: str = "",
    text: str = "",
    domain: str = "",
    unseen: str = "",
    target: str = "",
    series: str = "",
    columns: str = "",
    channels: int = 1,
    test: str = "",
    valid: str = "",
) -> ImageData | AlignedData | TargetData:
    """Open the user's own images, labels and captions (see the module).

    Args:
        kind: imagefolder, parquet, csv or webdataset.
        place: the folder of an imagefolder; else a file, folder or pattern.
        task: views, for images and classes; aligned, for images and captions; targets, for a number to predict.
        size: height and width of images in pixels, 8 to 4096.
        image, label, text: columns of metadata files. Default: columns with the usual names, and the folders' names as
            classes.
        domain: column with the domain of each picture, such as a style or a scanner. "folder": the folders are
            DIR/DOMAIN/CLASS/ (or DIR/train/DOMAIN/CLASS/). Default: no domains. For the task views.
        unseen: domains to leave out of all splits and to measure apart, joined by commas. Default: none.
        target: column of numbers to predict, for the task targets. Default: a column with a usual name (target, age, score).
        series: column of lists of numbers to predict from, in place of pictures. Default: a column named as vectors are.
        columns: columns of one number each to predict from, joined by commas. Default: all others, if there is no picture
            and no series.
        channels: numbers of each step of a series; all channels of the first step come first. Default: 1.
        test: fraction of the items in the test split, or the name of a split. Default: the split "test", else
            "validation", else a fifth.
        valid: fraction of the training items in the valid split, or the name of a split. Default: the split
            "validation" where it is not the test split, else a tenth.

    Raises DataError for missing or damaged files, CounterpointError for an invalid option.
    """
    inputs = Inputs(target, series, columns, channels)
    return load_rows(kind, place, task, size, image, label, text, test, valid, domain, unseen, inputs)


def load_rows(
    kind: str,
    place: str,
    task: str,
    size: int,
    image: str,
    label: str,
    text: str,
    test: str,
    valid: str,
    domain: str,
    unseen: str,
    inputs: Inputs,
    max_bad: float | None = None,
) -> ImageData | AlignedData | TargetData:
    """Open a source of one picture and at most one text a row; arguments as of `load_table`.

    Args:
        kind: imagefolder, parquet, csv, webdataset, lance or litdata.
        inputs: the options of the task targets.
        max_bad: maximum number of bad rows, or their maximum fraction if below 1. None: any number.
    """
    checked_size(size)
    pairs, numbers = task == "aligned", task == "targets"
    if not numbers and inputs != Inputs():
        raise CounterpointError(
            f"{kind}: target, series, columns and channels are options of the task targets, not of {task}"
        )
    if (pairs or numbers) and (domain or unseen):
        raise CounterpointError(f"{kind}: domain and unseen are options of the task views, not of {task}")
    by_folder = kind == "imagefolder" and domain == "folder"
    if by_folder:
        domain = DOMAIN
    prefer = ""
    if kind == "webdataset":
        (image, ending), (label, _), (text, _) = _member(image), _member(label), _member(text)
        prefer = ending
    options = (image, label, text, domain)
    named = {name.partition(".")[0] for name in options if name} | {*options}
    usual = {*IMAGE, *LABEL, *(TEXT if pairs else ())}

    def wanted(name: str) -> bool:
        if numbers:
            return True
        return name in named or name.lower() in usual or known_by_name(name, {}) in ("split", "id")

    accounts = Accounts(place, f"{kind}:{image},{label},{text}{inputs if numbers else ''}")
    try:
        if kind == "imagefolder":
            if not is_folder(place):
                if "://" in place:
                    raise DataError(f"{place} is on the net; download it and name the folder")
                raise DataError(f"{place}: no such directory; it should hold a folder of images for every class")
            table, notes = read_folder(place, wanted, accounts, by_folder=by_folder)
        else:
            table, notes = open_table(place, "tar" if kind == "webdataset" else kind, wanted, accounts, prefer)
        known = table.usual | ({"image": "image", "label": "label"} if kind == "imagefolder" else {})
        if numbers:
            if kind == "imagefolder":
                known = {name: role for name, role in known.items() if role != "label"}
            roles = target_roles(place, table.columns, known, image, inputs.series, inputs.columns, inputs.target)
            reader = Reader(table, roles, Wanted(size, 16000, 1), accounts)
            reader.judge(max_bad)
            return target_data(reader, f"{kind}:{place}", test, valid, notes, inputs.channels)
        roles = image_roles(place, table.columns, known, image, label, text, domain, pairs=pairs)
        reader = Reader(table, roles, Wanted(size, 16000, 1), accounts)
        reader.judge(max_bad)
        if pairs:
            return aligned_data(reader, f"{kind}:{place}", test, valid, notes)
        return image_data(reader, f"{kind}:{place}", test, valid, notes, unseen)
    except CounterpointError:
        accounts.write()
        raise


load_imagefolder, load_parquet, load_csv, load_webdataset = (
    partial(load_table, kind) for kind in ("imagefolder", "parquet", "csv", "webdataset")
)


def _member(named: str) -> tuple[str, str]:
    """Return the column that a member's ending stands for, and the ending. A name without such an ending is returned unchanged."""
    column, kind = member_column(named) if named and not named.startswith("json.") else (named, "")
    return column, named.lower() if kind else ""
