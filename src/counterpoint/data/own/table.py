"""Define tables as columns, which the reader of every kind of file returns. Regular files are held in Arrow arrays."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import images
from counterpoint.data.images import Indices
from counterpoint.data.own.arrow import codes_of, is_numbers, is_text, pa, pc
from counterpoint.errors import DataError
from counterpoint.files import cache_folder
from counterpoint.words import counted

KEY = "__key__"  # the column of the keys of an archive's samples; another archive may have the same keys


class Slice(NamedTuple):
    """Bytes that stay on disk: a range of a file."""

    file: int | Path  # a descriptor, or a file
    offset: int
    size: int

    def read(self) -> bytes:
        """Read all bytes. DataError when the file no longer has them."""
        try:
            if isinstance(self.file, int):
                # pread uses no file position, so processes and threads do not disturb each other.
                found = os.pread(self.file, self.size, self.offset)
            else:
                with self.file.open("rb") as file:
                    file.seek(self.offset)
                    found = file.read(self.size)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from error
        if len(found) != self.size:
            raise DataError("has been truncated since it was opened")
        return found


class Spool:
    """Bytes of cells: in memory up to `images.KEEP`, then in a temporary file that is deleted with the process."""

    def __init__(self) -> None:
        self.held = 0
        self.file: Any = None

    def has_room(self, size: int) -> bool:
        """Return whether `size` more bytes may stay in memory, and count them if so."""
        if self.held + size > images.KEEP:  # read at the call, so that a test can change it
            return False
        self.held += size
        return True

    def write(self, content: Any) -> tuple[int, int]:
        """Write bytes (any buffer) to the file. Return its descriptor and their offset."""
        if self.file is None:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the data
        offset = self.file.seek(0, io.SEEK_END)
        self.file.write(content)
        self.file.flush()
        return self.file.fileno(), offset

    def keep(self, content: bytes) -> bytes | Slice:
        """Keep the bytes of one cell."""
        if self.has_room(len(content)):
            return content
        descriptor, offset = self.write(content)
        return Slice(descriptor, offset, len(content))


# --------------------------------------------------------------------------------------------------------------- cells


class BadCell(str):
    """A substitute for an invalid cell: the reason why the cell cannot be used."""


class Cells:
    """One column of one file, or of all files, indexed by row. A cell is a Python value."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, row: int) -> Any:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def parts(self) -> Iterator[tuple[int, Any]]:
        """Yield parts of the column, each with its first row: an Arrow array where there is one, else `Cells`."""
        yield 0, self


class ListCells(Cells):
    """Cells that are Python values already."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> Any:
        return self.values[row]


class NoCells(Cells):
    """The rows of a file that lacks this column."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return None


class ArrowCells(Cells):
    """An Arrow array. Lists of numbers come as numpy arrays, which take a tenth of the memory of Python's lists."""

    def __init__(self, array: Any) -> None:
        kind = array.type
        if pa.types.is_dictionary(kind):
            array = array.dictionary_decode()
        if str(array.type) in ("string_view", "halffloat"):
            array = array.cast(pa.large_string() if str(array.type) == "string_view" else pa.float32())
        self.array = array
        self.numbers = is_numbers(array.type)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> Any:
        cell = self.array[row]
        if not cell.is_valid:
            return None
        if self.numbers:
            return np.asarray(cell.values.to_numpy(zero_copy_only=False), np.float64)
        return cell.as_py()

    def __iter__(self) -> Iterator[Any]:
        if self.numbers:
            return super().__iter__()
        return (cell for start in range(0, len(self), 4096) for cell in self.array[start : start + 4096].to_pylist())

    def parts(self) -> Iterator[tuple[int, Any]]:
        yield 0, self.array if is_text(self.array.type) or self.numbers else self


class SpooledCells(Cells):
    """Bytes in a file, with each row's offset and size. A size of -1 is an empty cell."""

    def __init__(self, descriptor: int, offsets: Indices, sizes: Indices) -> None:
        self.descriptor, self.offsets, self.sizes = descriptor, offsets, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> Any:
        size = int(self.sizes[row])
        return None if size < 0 else Slice(self.descriptor, int(self.offsets[row]), size)


class RecordCells(Cells):
    """Records of bytes and path, as `datasets` writes pictures and sounds."""

    def __init__(self, content: Cells, paths: Cells | None) -> None:
        self.content, self.paths = content, paths

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, row: int) -> Any:
        return {"bytes": self.content[row], "path": None if self.paths is None else self.paths[row]}


class InnerCells(Cells):
    """A field of a column of records: `json.caption` is the field caption of the column json."""

    def __init__(self, outer: Cells, path: Sequence[str]) -> None:
        self.outer, self.path = outer, path

    def __len__(self) -> int:
        return len(self.outer)

    def __getitem__(self, row: int) -> Any:
        value = self.outer[row]
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


class FirstCells(Cells):
    """Alternative columns: a row's cell is the first one that is not empty."""

    def __init__(self, columns: Sequence[Cells]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, row: int) -> Any:
        return next((cell for column in self.columns if not is_blank(cell := column[row])), None)


class Joined(Cells):
    """The concatenation of several columns."""

    def __init__(self, cells: Sequence[Cells]) -> None:
        self.cells = list(cells)
        self.starts = np.cumsum([0, *(len(part) for part in self.cells)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> Any:
        at = int(np.searchsorted(self.starts, row, "right")) - 1
        return self.cells[at][row - int(self.starts[at])]

    def __iter__(self) -> Iterator[Any]:
        return (cell for part in self.cells for cell in part)

    def parts(self) -> Iterator[tuple[int, Any]]:
        for start, part in zip(self.starts.tolist(), self.cells, strict=False):
            yield from ((start + at, inner) for at, inner in part.parts())


def is_blank(cell: Any) -> bool:
    """Return whether a cell is empty: null, NaN, empty text, empty bytes, or a record without bytes and path."""
    if cell is None or (isinstance(cell, float) and cell != cell):
        return True
    if isinstance(cell, str):
        return not cell.strip()
    if isinstance(cell, dict):
        return cell.get("array") is None and is_blank(cell.get("bytes")) and is_blank(cell.get("path"))
    return isinstance(cell, (list, np.ndarray)) and not len(cell)


def factorise(cells: Cells) -> tuple[NDArray[np.int64], list[Any]]:
    """Return numbers that are equal where cells are, -1 for null, and the distinct values by first row.

    Whitespace around text is ignored. Memory is O(rows) numbers. Only distinct values become Python objects.
    """
    codes = np.full(len(cells), -1, np.int64)
    numbers: dict[Any, int] = {}
    for start, part in cells.parts():
        if isinstance(part, Cells):
            for row, value in enumerate(part, start):
                value = value.strip() if isinstance(value, str) else value
                try:
                    if value is not None:
                        # 1 and True are the same dictionary key, but different values of a cell.
                        key = (type(value), value) if isinstance(value, bool) else value
                        codes[row] = numbers.setdefault(key, len(numbers))
                except TypeError:  # lists and records are not hashable: each counts as distinct
                    codes[row] = numbers.setdefault((id(cells), row), len(numbers))
        elif is_text(part.type):
            found = pc.dictionary_encode(pc.utf8_trim_whitespace(part))
            values = found.dictionary.to_pylist()
            of = np.array([numbers.setdefault(value, len(numbers)) for value in values] + [-1], np.int64)
            codes[start : start + len(part)] = of[codes_of(found)]
        else:
            for row, value in enumerate(ArrowCells(part), start):
                if value is not None:
                    codes[row] = numbers.setdefault((id(cells), row), len(numbers))
    return codes, list(numbers)


# --------------------------------------------------------------------------------------------------------------- tables


class Broken(NamedTuple):
    """A row that could not be read as cells."""

    number: int  # number of the row in its file, from 1
    reason: str
    key: str = ""  # key of the sample in an archive


@dataclass
class Segment:
    """The rows of one file."""

    path: Path
    count: int  # number of rows with cells
    columns: dict[str, Cells]
    numbers: Indices | None = None  # numbers of the rows in their file, from 1; None for 1, 2, ...
    broken: list[Broken] = field(default_factory=list)
    names: list[str] = field(
        default_factory=list
    )  # names of all its columns; empty: those of the columns that are read
    split: str = ""  # the split that the file's name gives
    usual: dict[str, str] = field(default_factory=dict)  # roles of columns that are known without their names
    classes: dict[str, list[str]] = field(default_factory=dict)  # names of numbered classes, by column
    notes: list[str] = field(default_factory=list)
    folder: str | None = None  # base of relative paths in it; None for its own file's folder

    @property
    def base(self) -> str:
        """The base of relative paths in its cells."""
        return str(self.path.parent) if self.folder is None else self.folder


class Table:
    """All rows of all files of a place.

    Args:
        place: The place that the user named.
        segments: The segments of its files, in order.
        spool: Stores bytes of cells, as long as the table exists.
        own_files: The column of files, for a place where each row is a file, such as a folder of pictures. Empty: a table.
    """

    def __init__(self, place: str, segments: Sequence[Segment], spool: Spool, own_files: str = "") -> None:
        self.place, self.segments, self.spool, self.own_files = place, list(segments), spool, own_files
        self.unit = "pictures" if own_files else "rows"  # unit of the accounts
        self.starts = np.cumsum([0, *(segment.count for segment in self.segments)])
        self.columns = list(dict.fromkeys(n for segment in self.segments for n in segment.names or segment.columns))
        self.usual = {name: role for segment in self.segments for name, role in segment.usual.items()}
        self.classes = {name: names for segment in self.segments for name, names in segment.classes.items()}
        names = [segment.path.name for segment in self.segments]
        self.names = [
            name if names.count(name) == 1 else str(segment.path)
            for name, segment in zip(names, self.segments, strict=True)
        ]
        self._cells: dict[str, Cells] = {}
        self.key = ""  # the column that names a row: an id, or a key in an archive
        self.paths: list[str] = []  # columns of paths; the first names a row without key

    def __len__(self) -> int:
        return int(self.starts[-1])

    def cells(self, name: str) -> Cells:
        """Return a column over all rows. `json.caption` is the field caption in the records of a column json."""
        if name not in self._cells:
            if name not in self.columns and "." in name:
                outer, *inner = name.split(".")
                self._cells[name] = InnerCells(self.cells(outer), inner)
            else:
                found = [segment.columns.get(name, NoCells(segment.count)) for segment in self.segments]
                self._cells[name] = found[0] if len(found) == 1 else Joined(found)
        return self._cells[name]

    def has(self, name: str) -> bool:
        """Return whether the table has this column, or the column of records that holds it."""
        return name in self.columns or name.partition(".")[0] in self.columns

    def where(self, row: int) -> tuple[int, int]:
        """Return the segment of a row, and the row's number in its file."""
        at = int(np.searchsorted(self.starts, row, "right")) - 1
        inner = row - int(self.starts[at])
        numbers = self.segments[at].numbers
        return at, inner + 1 if numbers is None else int(numbers[inner])

    def base(self, row: int) -> str:
        """Return the base of relative paths in a row."""
        return self.segments[self.where(row)[0]].base

    def short(self, row: int) -> str:
        """Name a row for a message: "items.csv row 3", or its own file."""
        if self.own_files:
            return str(self.cells(self.own_files)[row])
        at, number = self.where(row)
        return f"{self.names[at]} row {number}"

    def key_of(self, row: int) -> str:
        """Return the id of a row, or its key in an archive; empty where there is none."""
        if not self.key:
            return ""
        value = self.cells(self.key)[row]
        value = value.strip() if isinstance(value, str) else value
        return "" if is_blank(value) else shown(value)

    def name(self, row: int) -> str:
        """Name a row for a reader: "items.csv row 3 (a17)", with its id, its key or the path in it."""
        if self.own_files:
            return self.short(row)
        inside = self.key_of(row) or next((shown(v) for c in self.paths if is_path(v := self.cells(c)[row])), "")
        return self.short(row) + (f" ({inside})" if inside else "")

    def splits(self) -> NDArray[np.object_]:
        """Return the splits [rows] that the files' names give, "" for none."""
        return np.repeat(
            np.array([s.split for s in self.segments], object), [segment.count for segment in self.segments]
        )


def is_path(value: Any) -> bool:
    """Return whether a cell has the form of a path."""
    return isinstance(value, str) and bool(value.strip())


def shown(value: Any) -> str:
    """Format a cell for a list or message, in at most 120 characters."""
    if isinstance(value, Slice):
        return f"{value.size} bytes"
    if isinstance(value, (bytes, bytearray)):
        return f"{counted(len(value), 'byte')}"
    if isinstance(value, np.ndarray):
        return f"{counted(len(value), 'number')}"
    if isinstance(value, dict) and (value.get("path") or value.get("bytes") is not None):
        return shown(value.get("path") or value.get("bytes"))
    text = "" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
