"""Accounts of the user's files and rows: the number found equals the number read plus the number left out, by reason."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from counterpoint.files import cache_folder, replacing
from counterpoint.words import counted

BAD = "left out"  # in the column `what` of a list; other values there mark rows that are used with a change
CHANGED = "changed"
_KINDS = 6  # reasons that a note names
_EXAMPLES = 10  # lines that an error message shows


class Line(NamedTuple):
    """One line of the list: a file, a row or a member of an archive, and the report on it."""

    file: str
    row: int | None  # from 1; None for a whole file
    reason: str
    key: str = ""  # the row's id, or its key in an archive
    column: str = ""
    value: str = ""
    what: str = BAD
    unit: str = "rows"

    @property
    def place(self) -> str:
        """Return the location for a message: "items.csv row 3 image (a.png)", "items.tar x/1.xyz"."""
        name = self.file if self.row is None else f"{Path(self.file).name} row {self.row}"
        if self.row is None and self.key:
            name = f"{Path(self.file).name} {self.key}"
        return " ".join(filter(None, [name, self.column, self.value and f"({self.value})"]))


class Accounts:
    """Count the units that a source finds, reads and leaves out; list on request all that it leaves out.

    Each unit has a separate count: "files" on disk, "rows" of tables and samples of archives, "members" of archives.

    Args:
        place: path that the source reads, for its notes.
        key: distinguishes this set from others of the same path, such as by its options. It is part of the list's file name.

    >>> accounts = Accounts("items.csv")
    >>> accounts.find("rows", 3)
    >>> accounts.read("rows", 2)
    >>> accounts.leave(Line("items.csv", 3, "no such file"))
    >>> accounts.missing()
    {}
    >>> accounts.counts("rows")
    (3, 2, 1)
    """

    def __init__(self, place: str, key: str = "") -> None:
        self.place = place
        self.found: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self.lines: list[Line] = []
        self.later: dict[tuple[str, ...], list[Line]] = {}  # lines that a caller may replace
        given = f"{os.path.abspath(place)}?{key}"
        stem = re.sub(r"\W+", "-", Path(place).stem).strip("-")[:40] or "data"
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.name = f"{stem}-{digest}.csv"

    def find(self, unit: str, count: int = 1) -> None:
        """Count `count` more of a unit as found."""
        self.found[unit] += count

    def read(self, unit: str, count: int = 1) -> None:
        """Count `count` more of a unit as read."""
        self.used[unit] += count

    def leave(self, line: Line) -> None:
        """List one unit that is left out, or that is used with a change (`Line.what`)."""
        self.lines.append(line)

    def change(self, file: Path, reason: str, unit: str = "files") -> None:
        """List a file that is used with a change."""
        self.leave(Line(str(file), None, reason, what=CHANGED, unit=unit))

    def left(self, unit: str) -> list[Line]:
        """Return the lines of a unit that are left out."""
        return [line for line in self.lines if line.unit == unit and line.what == BAD]

    def counts(self, unit: str) -> tuple[int, int, int]:
        """Return the numbers of a unit that were found, read and left out."""
        return self.found[unit], self.used[unit], len(self.left(unit))

    def missing(self) -> dict[str, int]:
        """Return, by unit, how many were found but neither read nor left out. Empty where the accounts balance."""
        units = sorted(self.found | self.used)
        gaps = {unit: found - read - left for unit in units for found, read, left in [self.counts(unit)]}
        return {unit: gap for unit, gap in gaps.items() if gap}

    def check(self) -> None:
        """Raise RuntimeError where the accounts do not balance: a bug of this program, never of the data."""
        if self.missing():
            raise RuntimeError(f"{self.place}: found, read and left out do not add up: {self.missing()}")

    # --- the list

    @property
    def file(self) -> Path:
        """Return the list's file, in the cache folder under `reports`."""
        return cache_folder() / "reports" / self.name

    def replace(self, key: tuple[str, ...], lines: list[Line]) -> Path | None:
        """Replace the lines last listed under the same key; return the list's file, None if the list is empty."""
        if self.later.get(key, []) != lines:
            self.later[key] = lines
            self.write()
        return self.file if self.lines or any(self.later.values()) else None

    def write(self) -> Path | None:
        """Write the list, one line for each unit, and return its file. If the list is empty, remove the file and return None."""
        lines = [*self.lines, *(line for part in self.later.values() for line in part)]
        if not lines:
            self.file.unlink(missing_ok=True)
            return None
        text = io.StringIO()
        out = csv.writer(text)
        out.writerow(["file", "row", "id", "column", "what", "value", "reason"])
        for line in lines:
            row = "" if line.row is None else line.row
            out.writerow([line.file, row, line.key, line.column, line.what, line.value, line.reason])
        with replacing(self.file) as file:
            # File names may be invalid text.
            file.write(text.getvalue().encode("utf-8", "backslashreplace"))
        return self.file

    def notes(self) -> list[str]:
        """Return one note for each unit of which some are left out: numbers, reasons, and the file that lists all."""
        notes = []
        for unit in sorted(self.found | self.used):
            left = self.left(unit)
            if left:
                kinds = by_reason(left)
                reasons = "; ".join(
                    f"{len(lines)} {reason}: {'first ' if len(lines) > 1 else ''}{lines[0].place}"
                    for reason, lines in kinds[:_KINDS]
                )
                if len(kinds) > _KINDS:
                    reasons += f"; {sum(len(lines) for _, lines in kinds[_KINDS:])} for other reasons"
                found = self.found[unit]
                notes.append(
                    f"{self.place}: {len(left)} of {found} {unit} left out: {reasons} (all listed in {self.file})"
                )
        return notes

    def examples(self) -> str:
        """Return the first few lines left out with their reasons and the list's file, for an error message."""
        left = [line for line in self.lines if line.what == BAD]
        shown = "; ".join(f"{line.place}: {line.reason}" for line in left[:_EXAMPLES])
        more = f"; and {len(left) - _EXAMPLES} more" if len(left) > _EXAMPLES else ""
        return f"{shown}{more} (all listed in {self.file})"


def first_of(files: Sequence[Path], noun: str) -> str:
    """Count files and name the first.

    >>> first_of([Path("a.png"), Path("b.png")], "mask")
    '2 masks, first a.png'
    """
    return f"{counted(len(files), noun)}, {'first ' if len(files) > 1 else ''}{files[0]}"


def by_reason(lines: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    """Group lines by reason, the most frequent first; reasons that differ only in names and numbers count as one.

    >>> found = by_reason([Line("a", 1, "has 3 fields"), Line("a", 2, "has 4 fields"), Line("a", 3, "no such file")])
    >>> [(reason, len(lines)) for reason, lines in found]
    [('has N fields', 2), ('no such file', 1)]
    """
    kinds: dict[str, list[Line]] = {}
    for line in lines:
        first = line.reason.partition("; and ")[0]  # of several errors in a row
        kind = re.sub(r"\d+", "N", re.sub(r" \(.*\)| of \S+ row \d+", "", first))
        kinds.setdefault(kind, []).append(line)
    found = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return [
        (lines[0].reason.partition("; and ")[0] if len({line.reason for line in lines}) == 1 else kind, lines)
        for kind, lines in found
    ]
