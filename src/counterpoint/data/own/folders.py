"""Read folders of pictures: a class for every folder, splits above them, and a metadata file for further columns.

    DIR/CLASS/...                  the class is the first folder, at any depth of the picture
    DIR/train/CLASS/...            the same below the folders of splits
    DIR/test/CLASS/...
    DIR/DOMAIN/CLASS/...           if asked for; also below the folders of splits
    DIR/3.png                      a picture beside the folders has no class; it is kept for training
    metadata.csv, metadata.jsonl   in any folder: file_name names a picture, relative to that folder

The folders of splits are splits only where no other folder holds pictures. Beside other classes, "train" is a class. "test"
and "val" without "train" are classes, too. The other columns of a metadata file describe the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.own.delimited import read_delimited
from counterpoint.data.own.parquet import read_parquet
from counterpoint.data.own.places import SPLITS
from counterpoint.data.own.records import read_jsonl
from counterpoint.data.own.table import ListCells, Segment, Spool, Table
from counterpoint.errors import DataError
from counterpoint.files import walk
from counterpoint.words import counted

PICTURE, CLASS = "image", "label"  # columns of the table that a folder makes
DOMAIN = "domain folder"  # one more, where the first folders are domains
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
NAMES = ("file_name", "filename", "file_path", "image", "path")  # names of the column that names pictures


def picture_files(folder: Path, accounts: Accounts, metadata: Sequence[str] = METADATA) -> list[Path]:
    """List the pictures and metadata files below a folder, through links. Other files are left out with a reason."""
    found = walk(folder)
    known = Image.registered_extensions()
    for path, reason in found.left_out:
        accounts.find("files")
        accounts.leave(Line(str(path), None, reason, unit="files"))
    pictures = []
    for path in found.files:
        accounts.find("files")
        if path.suffix.lower() in known or path.name.lower() in metadata:
            pictures.append(path)
        else:
            accounts.leave(Line(str(path), None, "not a picture by its ending", unit="files"))
    return pictures


def plain_folder(folder: Path, count: int, accounts: Accounts) -> Table:
    """Return the first `count` pictures below a folder, in the order of their paths, without classes. 0: all.

    Raises DataError when there are none, or fewer than `count`.
    """
    files = picture_files(folder, accounts, ())
    if not files:
        raise DataError(f"{folder}: no images there, in any format that Pillow reads")
    if count > len(files):
        raise DataError(
            f"{folder}: has {counted(len(files), 'image')}, but {counted(count, 'generated image is', 'generated images are')} "
            "wanted; ask for fewer"
        )
    taken = files[: count or None]
    accounts.read("files", len(taken))
    for path in files[len(taken) :]:
        accounts.leave(Line(str(path), None, "beyond the number that is wanted", unit="files"))
    cells = {PICTURE: ListCells([str(path) for path in taken])}
    return Table(str(folder), [Segment(folder, len(taken), dict(cells), folder="")], Spool(), own_files=PICTURE)


def read_folder(
    place: str, wanted: Callable[[str], bool], accounts: Accounts, *, by_folder: bool = False
) -> tuple[Table, list[str]]:
    """Read the pictures of a folder as a table. Each picture has one row, or one for each of its metadata rows.

    Args:
        place: The folder.
        wanted: Returns whether a column of a metadata file is read.
        accounts: Counts files and rows of metadata.
        by_folder: Take the first folder as the domain, and the second one as the class.

    Returns the table and notes. Raises DataError when there is no picture, or a metadata file cannot be read.
    """
    root = Path(place)
    spool = Spool()
    files = picture_files(root, accounts)
    pictures = [path for path in files if path.name.lower() not in METADATA]
    described, columns = _described(
        root,
        [path for path in files if path.name.lower() in METADATA],
        wanted,
        spool,
        accounts,
        {os.path.normpath(path): path for path in pictures},
    )
    if not pictures:
        left = f"; {accounts.examples()}" if accounts.found else ""
        raise DataError(f"{place}: holds no pictures, in any format that Pillow reads{left}")
    accounts.read("files", len(pictures))
    splits, notes = _splits(root, pictures)
    rows: list[tuple[Path, dict[str, Any]]] = [
        (path, cells) for path in pictures for cells in described.get(path, [{}])
    ]
    labelled = CLASS in columns  # the labels of metadata have priority over the folders
    classes = [_class(root, path, bool(splits) + by_folder) for path, _ in rows]
    own: dict[str, list[Any]] = {PICTURE: [str(path) for path, _ in rows]}
    if not labelled and any(classes):
        own[CLASS] = classes
        loose = sum(1 for path, name in zip((p for p, _ in rows), classes, strict=True) if not name)
        if loose:
            notes.append(
                f"{place}: {counted(loose, 'picture stands', 'pictures stand')} beside the folders of classes and have no class"
            )
    if by_folder:
        own[DOMAIN] = [_class(root, path, int(bool(splits))) for path, _ in rows]
    own |= {name: [cells.get(name) for _, cells in rows] for name in columns}
    segments = []
    order = dict.fromkeys(splits.get(path, "") for path, _ in rows)
    for split in order:
        at = [n for n, (path, _) in enumerate(rows) if splits.get(path, "") == split]
        cells = {name: ListCells([values[n] for n in at]) for name, values in own.items()}
        segments.append(Segment(root, len(at), dict(cells), split=split, folder=""))
    return Table(place, segments, spool, own_files=PICTURE), notes


def _splits(root: Path, pictures: list[Path]) -> tuple[dict[Path, str], list[str]]:
    """Return each picture's split by its top folder, and notes. No picture has one where the top folders are classes."""
    top = {path: path.relative_to(root).parts for path in pictures}
    folders = {parts[0] for parts in top.values() if len(parts) > 1}
    named = {folder: SPLITS[folder.lower()] for folder in sorted(folders) if folder.lower() in SPLITS}
    kinds = set(named.values())
    names = f"the folder{'s' if len(named) > 1 else ''} {', '.join(named)}"
    one = len(named) == 1
    if named and len(named) == len(folders) and (len(kinds) == 1 or "train" in kinds):
        splits = {path: named[parts[0]] for path, parts in top.items() if len(parts) > 1}
        return splits, [
            f"{root}: {names} {'is a split' if one else 'are splits'}, not {'a class' if one else 'classes'}"
        ]
    if named and len(folders) > 1:
        taken = f"{root}: {names} {'is taken for a class' if one else 'are taken for classes'}"
        if len(named) == len(folders):
            return {}, [f"{taken}, because none of them is the training split"]
        return {}, [f"{taken}, because other pictures are beside {'it' if one else 'them'}"]
    return {}, []


def _class(root: Path, path: Path, above: int) -> str:
    """Return a picture's class: the first folder below the root and so many folders above; "" without a folder."""
    parts = path.relative_to(root).parts[above:]
    return parts[0] if len(parts) > 1 else ""


def _described(
    root: Path,
    files: list[Path],
    wanted: Callable[[str], bool],
    spool: Spool,
    accounts: Accounts,
    pictures: dict[str, Path],
) -> tuple[dict[Path, list[dict[str, Any]]], list[str]]:
    """Return the rows of the metadata files by picture, and the names of their columns."""
    found: dict[Path, list[dict[str, Any]]] = {}
    columns: dict[str, None] = {}
    for file in files:
        segment = _metadata(file, wanted, spool)
        accounts.read("files")
        name = next((n for n in NAMES if n in segment.columns), "")
        if not name:
            raise DataError(f"{file}: has no column file_name; add one with the name of each row's picture")
        others = [n for n in segment.columns if n != name]
        columns |= dict.fromkeys(f"{n}_" if n == PICTURE else n for n in others)
        accounts.find("metadata rows", segment.count + len(segment.broken))
        for broken in segment.broken:
            accounts.leave(Line(str(file), broken.number, broken.reason, unit="metadata rows"))
        for number, cell, cells in _rows(segment, name, others):
            path = _path(file.parent, cell, pictures)
            if path is None:
                reason = "names no picture" if cell else "has no file name"
                line = Line(str(file), number, reason, column=name, value=str(cell or ""), unit="metadata rows")
                accounts.leave(line)
            else:
                accounts.read("metadata rows")
                found.setdefault(path, []).append(cells)
    return found, list(columns)


def _rows(segment: Segment, name: str, others: list[str]) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    numbers = range(1, segment.count + 1) if segment.numbers is None else segment.numbers.tolist()
    cells = zip(*(segment.columns[n] for n in others), strict=True) if others else ((),) * segment.count
    for number, file, values in zip(numbers, segment.columns[name], cells, strict=True):
        names = [f"{n}_" if n == PICTURE else n for n in others]
        yield number, file, dict(zip(names, values, strict=True))


def _path(folder: Path, cell: Any, pictures: dict[str, Path]) -> Path | None:
    """Return the picture that a cell names; None where it does not exist."""
    if not isinstance(cell, str) or not cell.strip():
        return None
    return pictures.get(os.path.normpath(folder / cell.strip()))


def _metadata(file: Path, wanted: Callable[[str], bool], spool: Spool) -> Segment:
    def read(name: str) -> bool:
        return name in NAMES or wanted(name)

    if file.suffix.lower() == ".parquet":
        return read_parquet(file, read, spool)
    return read_jsonl(file, read) if file.suffix.lower() == ".jsonl" else read_delimited(file, read)
