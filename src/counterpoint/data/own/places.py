"""Find the files of a place that the user names: a file, a folder or a pattern. Find the splits that file names give."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterpoint.data.accounts import Accounts, Line
from counterpoint.errors import DataError
from counterpoint.files import walk

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
ENDINGS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tgz": "tar",
    ".tar.gz": "tar",
    ".tar.bz2": "tar",
    ".tar.xz": "tar",
}
READABLE = ".csv, .tsv, .jsonl, .json, .parquet, .tar"
STORES = {"lance": "a table of Lance", "litdata": "an optimised folder of litdata"}  # kinds that are folders
MANY = 1_000_000  # files that braces may name
# train.csv, train-0.csv, test_00001.parquet, validation-00000-of-00004.parquet
_SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})([-_. ]?\d+)?([-_. ]of[-_. ]\d+)?")


def mode_of(path: Path | str) -> int | None:
    """Return the mode of a file or folder, None where the path does not exist. DataError when it cannot be accessed."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        if error.strerror == "File name too long":
            return None
        raise DataError(f"{path} cannot be read ({error.strerror or error}); see its permissions") from error


def is_folder(path: Path | str) -> bool:
    """Return whether a path is a folder. DataError when it cannot be accessed."""
    mode = mode_of(path)
    return mode is not None and stat.S_ISDIR(mode)


def kind_of(path: Path) -> str:
    """Return the kind of a table or archive by its ending; empty for another file."""
    name = path.name.lower()
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending) and name != ending), "")


def store_of(path: Path) -> str:
    """Return the kind in STORES of a folder that is one table, empty for any other folder."""
    if (path / "_versions").is_dir():
        return "lance"
    try:
        with (path / "index.json").open("rb") as file:
            index = json.load(file)
    except (OSError, ValueError, RecursionError):
        return ""
    return "litdata" if isinstance(index, dict) and {"chunks", "config"} <= index.keys() else ""


def _stores(root: Path) -> list[tuple[Path, str]]:
    """Return a folder itself where it is a table, else the tables among the folders in it."""
    if kind := store_of(root):
        return [(root, kind)]
    try:
        inside = sorted(path for path in root.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:
        return []  # `_inside` reports it
    return [(path, kind) for path in inside if (kind := store_of(path))]


def matches(place: str) -> list[Path]:
    """Return the files and folders that match a pattern. Brackets in the names of existing folders are not patterns."""
    parts = Path(place).parts
    literal = Path(parts[0]) if parts else Path()
    escaped = [glob.escape(parts[0]) if os.path.lexists(parts[0]) else parts[0]] if parts else []
    for part in parts[1:]:
        literal = literal / part
        escaped.append(glob.escape(part) if os.path.lexists(literal) else part)
    try:
        return [Path(name) for name in sorted(glob.glob(os.path.join(*escaped), recursive=True))] if parts else []
    except (OSError, ValueError, re.error) as error:
        raise DataError(f"{place}: cannot be opened ({error})") from error


def expanded(place: str) -> list[str]:
    """Return the places that `::` and braces name, as WebDataset's users write them: {0000..0012} counts, {a,b} chooses.

    DataError for braces that name more than a million places.

    >>> expanded("a-{08..10}.tar::b.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b.tar']
    """
    found = []
    for part in place.split("::"):
        pieces, many = re.split(r"\{([^{}]*)\}", part), 1
        choices = [[pieces[0]]]
        for inside, after in zip(pieces[1::2], pieces[2::2], strict=True):
            if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
                first, last = int(bounds[1]), int(bounds[2])
                width = max(map(len, bounds.groups())) if any(n != "0" and n[0] == "0" for n in bounds.groups()) else 0
                numbers = range(first, last + 1)
                many *= len(numbers)
                if many > MANY:
                    raise DataError(f"{place}: names more than {MANY:,} files")
                choices.append([f"{n:0{width}d}" for n in numbers])
            else:
                choices.append(inside.split(",") if "," in inside else [f"{{{inside}}}"])
            choices.append([after])
        found += ["".join(chosen) for chosen in itertools.product(*choices)]
    return found


def _named(place: str) -> list[Path]:
    """Return the files and folders that a place without a file of its name stands for. DataError for one that is missing."""
    if found := matches(place):  # also where a folder of the place has braces or colons in its name
        return found
    parts = expanded(place)
    for part in parts:
        roots = [Path(part)] if mode_of(part) is not None else matches(part)
        if not roots and len(parts) > 1:
            raise DataError(f"{place}: {part}: no such file, folder or pattern")
        found += roots
    return list(dict.fromkeys(found))


def files_of(place: str, kind: str, accounts: Accounts) -> list[tuple[Path, str]]:
    """Return the tables or archives of a place with their kinds. Other files are left out, with a reason.

    Args:
        place: A file, a folder (searched recursively, through links) or a pattern, also with braces (`expanded`). The name of
            an existing file or folder is never a pattern.
        kind: csv, jsonl, json, parquet, tar, lance or litdata: the kind of what is named. Empty: from endings and contents.
        accounts: Counts the files. A table of Lance and a folder of litdata count as one file. In a folder, files that are
            neither tables nor archives are not counted; they may be the pictures that a table names.

    Raises DataError when no file can be read.
    """
    mode = mode_of(place)
    if mode is None and "://" in place:
        raise DataError(f"{place} is on the net; download it and name the file")
    roots = [Path(place)] if mode is not None else _named(place)
    found: list[tuple[Path, str]] = []
    for root in roots:
        if is_folder(root):
            stores = _stores(root)
            accounts.find("files", len(stores))
            found += stores
            if kind not in STORES and not (stores and stores[0][0] == root):
                found += _inside(root, kind, accounts, [path for path, _ in stores])
        elif kind in STORES:
            raise DataError(f"{root}: is a file; {STORES[kind]} is a folder")
        elif kind or kind_of(root):
            accounts.find("files")
            found.append((root, kind or kind_of(root)))
        elif len(roots) == 1:
            raise DataError(f"{root}: its ending says no kind that can be read: {READABLE}")
        else:
            accounts.find("files")
            accounts.leave(_file(root, f"its ending says no kind that can be read: {READABLE}"))
    kinds = sorted({what for _, what in found})
    if kind and (other := set(kinds) - {kind}):
        raise DataError(f"{place}: holds files of the kind {other.pop()}, not {kind}")
    if len(kinds) > 1:
        raise DataError(f"{place}: holds files of several kinds ({', '.join(kinds)}); name one, or a pattern")
    full = []
    for path, what in found:
        if what in STORES or os.stat(path).st_size:
            full.append((path, what))
        else:
            accounts.leave(_file(path, "is empty (0 bytes)"))
    if not full:
        if len(found) == 1:
            raise DataError(f"{found[0][0]}: is empty (0 bytes)")
        if kind in STORES and roots:
            raise DataError(f"{place}: is not {STORES[kind]}, and holds none")
        what = "holds no table or archive" if roots and is_folder(roots[0]) else "no such file, folder or pattern"
        left = f" ({accounts.examples()})" if accounts.left("files") else ""
        raise DataError(f"{place}: {what}{left}; name {STORES.get(kind) or f'{READABLE} files'}")
    return full


def _inside(root: Path, kind: str, accounts: Accounts, but: Sequence[Path] = ()) -> list[tuple[Path, str]]:
    """Return the tables and archives below a folder, without what is in the folders `but`."""
    inside = walk(root)
    found = []
    for path, reason in inside.left_out:
        # The content of an unreadable folder is unknown.
        if (kind_of(path) or not path.suffix) and not any(store in path.parents for store in but):
            accounts.find("files")
            accounts.leave(_file(path, reason))
    for path in inside.files:
        what = kind_of(path)
        if not what or any(store in path.parents for store in but):
            continue
        accounts.find("files")
        if kind and what != kind:
            accounts.leave(_file(path, f"no file of the kind {kind}"))
        elif what == "json" and not kind:
            # A single .json in a folder usually describes the data and is not the data.
            accounts.leave(_file(path, "a .json in a folder is not taken for a table; name it to read it"))
        else:
            found.append((path, what))
    return found


def _file(path: Path, reason: str) -> Line:
    return Line(str(path), None, reason, unit="files")


def file_splits(place: str, paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Return the split of each file by its name or its folder's name, "" for none, and notes.

    Names give splits only where every file, or its folder, has such a name (train.csv, test-0.csv). A longer name, such as
    "test shots.csv", gives none.
    """
    if not paths:
        return [], []
    root = Path(place) if is_folder(place) else None
    folders = [path.relative_to(root).parts[0].lower() if root in path.parents else "" for path in paths if root]
    if folders and all(folder in SPLITS for folder in folders):
        return [SPLITS[folder] for folder in folders], []
    names = [_SPLIT_NAME.fullmatch(path.name.partition(".")[0].lower()) for path in paths]
    if all(names) and len(paths) > 1:
        return [SPLITS[name[1]] for name in names if name], []
    notes = []
    odd = [path.name for path, name in zip(paths, names, strict=True) if name]
    if odd and len(paths) > 1:
        notes.append(
            f"{place}: the name of {odd[0]} is not taken for a split, because other files have none; name splits in a column split"
        )
    return [""] * len(paths), notes


def read_json(file: Path) -> Any:
    """Return the content of a JSON file. Raises DataError for a file that cannot be read or is no JSON."""
    try:
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({str(error)[:120]})") from error
