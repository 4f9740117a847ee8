"""Read tables of text: .csv, .tsv and similar files. Every cell is text; none is converted to a number or to null.

**Quotation marks** are interpreted row by row, because real files mix quoted cells and marks as text:

1. A cell is quoted (RFC 4180) under three conditions. It begins with a mark. Its marks inside are doubled. Its closing mark
   is before a delimiter or the end of the line. Marks in the middle of a cell are always text.
2. A quoted cell may hold line breaks. The opening mark is unpaired, however, where each of its lines is itself a row of the
   table. Such a line has the table's number of cells, and its first cell resembles the first cells of other rows.
3. In all other cases the marks of that line are text, and a note counts such lines.

A line with more or fewer cells than the header is a row that is left out. Empty lines are not rows.

Files whose lines all obey rule 1 go to Arrow's reader unchanged. In other files the other lines are quoted again first.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.own.arrow import pa, pa_csv
from counterpoint.data.own.table import ArrowCells, Broken, Joined, Segment
from counterpoint.errors import DataError

BLOCK = 8 << 20  # bytes read at a time
LONGEST = 1 << 27  # maximum bytes of a row; vectors as text are long
_SAMPLE = 2000  # number of lines from which the shapes of first cells are collected
REACH = 2000  # maximum number of lines in a quoted cell
Wanted = Callable[[str], bool]


def read_delimited(path: Path, wanted: Wanted) -> Segment:
    """Read a table of text.

    Args:
        path: The file, in UTF-8. The delimiter is a tab where the file ends in .tsv or its header has no other delimiter.
            Otherwise it is the first of "," ";" "|" that the header has.
        wanted: Returns whether a column of this name is read.

    Raises DataError when the file as a whole is not a table.
    """
    lines = _Lines(path)
    header = next((line for _, line in zip(range(1), lines.physical(), strict=False)), b"")
    between = _delimiter(path, header)
    lines.rules(between)
    names, skipped = _header(path, lines, between)
    odd = lines.scan(len(names), skipped)
    named = [name for name in names if not name.startswith("\0")]
    read = [name for name in named if wanted(name)]
    source: Any = str(path) if odd is None else _Stream(lines.cleaned(odd, skipped))
    broken: list[Broken] = []

    def leave_out(row: Any) -> str:
        number = row.number - (skipped if odd is None else 0)
        what = "many" if row.actual_columns > row.expected_columns else "few"
        broken.append(
            Broken(number, f"has too {what} fields ({row.actual_columns}; the header has {row.expected_columns})")
        )
        return "skip"

    size = min(LONGEST, max(BLOCK, 2 * lines.longest))
    columns: dict[str, list[Any]] = {name: [] for name in read}
    try:
        reader = pa_csv.open_csv(
            source,
            # Arrow numbers the rows that it leaves out only when it reads with one thread.
            pa_csv.ReadOptions(
                use_threads=False, block_size=size, column_names=names, skip_rows=skipped if odd is None else 0
            ),
            pa_csv.ParseOptions(
                delimiter=between.decode(), newlines_in_values=odd is not None, invalid_row_handler=leave_out
            ),
            pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=False,
                include_columns=read or names[:1],
            ),
        )
        count = 0
        for batch in reader:
            count += batch.num_rows
            for name in read:
                columns[name].append(batch.column(batch.schema.get_field_index(name)))
    except pa.ArrowInvalid as error:
        if "Empty CSV file" not in str(error):
            raise DataError(f"{path}: not a table that can be read ({str(error).splitlines()[0][:200]})") from error
        count = 0
    numbers = None
    if broken:
        bad = np.array([row.number for row in broken])
        numbers = np.setdiff1d(np.arange(1, count + len(broken) + 1), bad)
    cells = {name: Joined([ArrowCells(part) for part in parts]) for name, parts in columns.items()}
    notes = [f"{path}: {odd.note()}"] if odd is not None and odd.plain else []
    if len(named) < len(names):
        what = "1 column has no name and is" if len(named) + 1 == len(names) else "the columns without a name are"
        notes.append(f"{path}: {what} not read")
    return Segment(path, count, dict(cells), numbers, broken, names=named, notes=notes)


def _delimiter(path: Path, header: bytes) -> bytes:
    bare = re.sub(rb'"[^"]*"', b"", header)
    if path.suffix.lower() in (".tsv", ".tab"):
        return b"\t"
    return next((mark for mark in (b",", b";", b"|", b"\t") if mark in bare), b",")


def _header(path: Path, lines: _Lines, between: bytes) -> tuple[list[str], int]:
    """Return the names of the columns, and the number of physical rows of the header."""
    first = next(iter(lines.physical()), b"")
    cells = lines.cells(first) if lines.strict.fullmatch(first) else first.split(between)
    try:
        names = [cell.decode("utf-8").strip() for cell in cells]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    if not any(names):
        raise DataError(f"{path}: has no header; its first line should name the columns")
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        raise DataError(f"{path}: names the column '{twice[0]}' twice; correct its first line")
    # Columns without a name (pandas' row numbers, a delimiter at the end) get a name that no reader wants.
    return [name or f"\0{number}" for number, name in enumerate(names)], 1


class _Odd:
    """The findings of the scan about irregular lines."""

    def __init__(self) -> None:
        self.plain = 0  # number of lines whose marks are text
        self.shapes: set[bytes] = set()  # shapes of the first cells of regular rows

    def note(self) -> str:
        lines = "1 line" if self.plain == 1 else f"{self.plain} lines"
        return f"the quotation marks of {lines} are read as text, because they enclose no cell"


class _Lines:
    """The lines of a file, by the rules of quotation marks in the module's docstring."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.longest = 0

    def rules(self, between: bytes) -> None:
        """Set the delimiter."""
        self.between = between
        mark = re.escape(between)
        inner = rb'[^"]*+(?:""[^"]*+)*+'
        quoted, bare = rb'"%b"' % inner, rb'[^"\r\n%b][^\r\n%b]*+' % (between, between)
        # Possessive: the first alternative that fits is final, so that no line takes more than linear time.
        row = rb"(?:%b|%b|)(?:%b(?:%b|%b|))*+"
        self.strict = re.compile(row % (quoted, bare, mark, quoted, bare))
        short = quoted.replace(rb'[^"]', rb'[^"\r\n]')
        self.regular = re.compile(rb"(?:%b\r?\n)*+" % (row % (short, bare, mark, short, bare)))  # lines of this kind
        self.cell = re.compile(rb"(?:(%b)|(%b)|)(?:%b|$)" % (quoted, bare, mark))
        # The line ends inside a quoted cell.
        self.opens = re.compile(rb'(?:(?:%b|%b|)%b)*+"%b' % (quoted, bare, mark, inner))
        self.inside = re.compile(inner)
        self.closes = re.compile(rb'%b"(?=%b|$)' % (inner, mark))

    def cells(self, line: bytes) -> list[bytes]:
        """Return the cells of a line that obeys the first rule."""
        found, at = [], 0
        while True:
            match = self.cell.match(line, at)
            assert match is not None
            quoted = match[1]
            found.append(match[2] or b"" if quoted is None else quoted[1:-1].replace(b'""', b'"'))
            at = match.end()
            if at == len(line) and not match[0].endswith(self.between):
                return found
            if at == len(line):
                return [*found, b""]

    def blocks(self) -> Iterator[bytes]:
        """Yield the file in blocks of whole lines, without its byte-order mark. DataError for bytes that are not text."""
        decoder, at, rest = codecs.getincrementaldecoder("utf-8")(), 0, b""
        with self.path.open("rb") as file:
            while True:
                block = file.read(BLOCK)
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    byte = at - len(decoder.getstate()[0]) + error.start
                    raise DataError(f"{self.path}: is not text in UTF-8 (byte {byte}); save it as UTF-8") from error
                if not at:
                    block = block.removeprefix(codecs.BOM_UTF8)
                at += len(block)
                if not block:
                    break
                whole, newline, rest_of = (rest + block).rpartition(b"\n")
                if len(rest_of) > LONGEST:
                    raise DataError(f"{self.path}: has a line of more than {LONGEST >> 20} MiB; is it a table?")
                if newline:
                    yield whole + newline
                rest = rest_of
        if rest:
            yield rest

    def physical(self) -> Iterator[bytes]:
        """Yield all lines, even empty ones, without their line ends of any kind."""
        for block in self.blocks():
            yield from block.splitlines()

    def scan(self, cells: int, skipped: int) -> _Odd | None:
        """Find the lines that do not obey the first rule. Return None where there are none."""
        self.count = cells
        odd, shapes, seen = False, set[bytes](), 0
        for block in self.blocks():
            plain = self._plain(block)
            if plain:
                self.longest = max(self.longest, _longest(block))
            # In a block without marks, only the first lines are examined, for the shapes of first cells.
            for line in block.split(b"\n", _SAMPLE)[:_SAMPLE] if plain else block.splitlines():
                if not plain:
                    self.longest = max(self.longest, len(line))
                    if b'"' in line and not self.strict.fullmatch(line):
                        odd = True
                        continue
                if seen < _SAMPLE:
                    seen += 1
                    if seen > skipped and line.count(self.between) == cells - 1:
                        shapes.add(_shape(line.partition(self.between)[0]))
        if not odd:
            return None
        found = _Odd()
        found.shapes = shapes
        return found

    def _plain(self, block: bytes) -> bool:
        """Return whether all lines of a block obey the first rule and end with a line end."""
        if b'"' in block:
            return self.regular.fullmatch(block) is not None
        return b"\r" not in block or b"\r" not in block.replace(b"\r\n", b"\n")

    def cleaned(self, odd: _Odd, skipped: int) -> Iterator[bytes]:
        """Yield the rows with every cell quoted in the form that strict readers accept."""
        lines = self.physical()
        for _ in range(skipped):
            next(lines, None)
        waiting = deque[bytes]()  # lines that were read ahead

        def following() -> Iterator[bytes]:
            yield from tuple(waiting)
            for line in lines:
                waiting.append(line)
                yield line

        while True:
            read = waiting.popleft() if waiting else next(lines, None)
            if read is None:
                return
            line = read
            if b'"' not in line or self.strict.fullmatch(line):
                yield line
                continue
            taken = self._record(line, following(), odd) if self.opens.fullmatch(line) else 0
            if taken:
                yield b"\n".join([line, *(waiting.popleft() for _ in range(taken))])
            else:
                odd.plain += 1
                cells = line.split(self.between)
                yield self.between.join(
                    b'"' + cell.replace(b'"', b'""') + b'"' if b'"' in cell else cell for cell in cells
                )

    def _record(self, line: bytes, following: Iterator[bytes], odd: _Odd) -> int:
        """Return the number of further lines in the open quoted cell of a line; 0 where its mark is unpaired."""
        rows = [line]
        for number, more in enumerate(following, 1):
            rows.append(more)
            closing = self.closes.match(more)
            if closing is not None:
                whole = b"\n".join(rows)
                if not self.strict.fullmatch(whole):
                    # A cell that opens after this one may continue over further lines.
                    if self.opens.fullmatch(whole) and number < REACH:
                        continue
                    return 0
                alike = all(row.count(self.between) == self.count - 1 for row in rows)
                known = all(_shape(row.partition(self.between)[0]) in odd.shapes for row in rows[1:])
                if len(self.cells(whole)) != self.count or (alike and known):
                    return 0
                return number
            if number >= REACH or not self.inside.fullmatch(more):
                return 0
        return 0


def _longest(block: bytes) -> int:
    found = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
    return int(np.diff(found, prepend=-1, append=len(block)).max()) if len(found) else len(block)


def _shape(cell: bytes) -> bytes:
    """Return the shape of a cell, with words as "a" and numbers as "9": "a/9.png" for "t/12.png"."""
    return re.sub(rb"\d+", b"9", re.sub(rb"[^\W\d_]+", b"a", cell.strip()))


class _Stream:
    """Lines in the form of a file, for Arrow."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self.lines, self.rest, self.closed = lines, b"", False

    def read(self, size: int = -1) -> bytes:
        parts, have = [self.rest], len(self.rest)
        while size < 0 or have < size:
            line = next(self.lines, None)
            if line is None:
                break
            parts.append(line + b"\n")
            have += len(line) + 1
        found = b"".join(parts)
        if size < 0:
            size = len(found)
        self.rest = found[size:]
        return found[:size]

    def close(self) -> None:
        self.closed = True
