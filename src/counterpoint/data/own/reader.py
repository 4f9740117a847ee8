"""Read the cells of a table, column by column: every row's content in every modality, and the rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import images
from counterpoint.data.accounts import BAD, Accounts, Line
from counterpoint.data.images import Indices
from counterpoint.data.own.places import SPLITS
from counterpoint.data.own.roles import Role, Roles, modality_name
from counterpoint.data.own.sources import Sources, Wanted
from counterpoint.data.own.table import KEY, Cells, FirstCells, Table, factorise, shown
from counterpoint.data.own.values import Texts, read_numbers, read_texts, read_vectors, same_vectors
from counterpoint.data.pairs import Kind, Modality
from counterpoint.data.sounds import resampled_note
from counterpoint.errors import DataError
from counterpoint.waiting import patient_track
from counterpoint.words import counted


@dataclass
class Column:
    """One modality of all rows."""

    role: Role
    name: str
    gives: Kind | Literal["group"]
    has: NDArray[np.bool_]  # [rows]
    same: Indices  # [rows] numbers that are equal where rows have equal content in this modality, -1 where they lack it
    sources: Sources | None = None  # sources of pictures, sounds and videos
    chunks: Sequence[Any] = ()  # Arrow arrays of texts
    vectors: NDArray[np.float32] | None = None
    at: Indices | None = None  # [rows] positions of vectors

    def texts(self, rows: Indices) -> Texts:
        """Return the texts of these rows."""
        return Texts(self.chunks, np.where(self.has[rows], rows, -1))

    def rows_of(self, rows: Indices) -> NDArray[np.float32]:
        """Return the vectors of these rows; zeros where a row has none."""
        assert self.vectors is not None
        assert self.at is not None
        out = np.zeros((len(rows), self.vectors.shape[1]), np.float32)
        here = self.has[rows]
        out[here] = self.vectors[self.at[rows[here]]]
        return out


def _counted(at: Indices) -> Indices:
    """Number the entries that are not -1, in order."""
    return np.where(at >= 0, np.cumsum(at >= 0) - 1, -1)


class Reader:
    """The rows of a table, read once.

    Args:
        table: The table to read.
        roles: Roles of its columns.
        wanted: Sizes of decoded pictures and sounds.
        accounts: Records every row that cannot be used, and notes on other rows.
    """

    def __init__(self, table: Table, roles: Roles, wanted: Wanted, accounts: Accounts) -> None:
        self.table, self.roles, self.wanted, self.accounts = table, roles, wanted, accounts
        self.place = table.place
        self.columns: list[Column] = []
        self.linked: list[Column] = []  # columns that are not modalities but keep rows together, such as groups
        self.good = np.ones(len(table), bool)
        self.wrong: dict[int, list[tuple[str, Any, str]]] = {}  # by row: column, value, reason
        self.notes: list[str] = []
        table.key = roles.id or (KEY if KEY in table.columns else "")
        table.paths = [
            name for role in roles.modalities if role.kind in ("image", "audio", "video") for name in role.columns
        ]
        self._read()

    # --- reading

    def _cells(self, role: Role) -> Cells:
        found = [self.table.cells(name) for name in role.columns]
        return found[0] if len(found) == 1 else FirstCells(found)

    def _read(self) -> None:
        roles = self.roles.modalities
        sounds = not any(role.kind == "audio" for role in roles)
        sources = {
            role.name: Sources(self.table, role, self._cells(role), self.wanted)
            for role in roles
            if role.kind in ("image", "audio", "video")
        }
        self._examine(list(sources.values()), sounds)
        empty: dict[str, Indices] = {}
        for role in roles:
            cells = self._cells(role)
            if role.kind == "text":
                chunks, has, same, empty[role.name], bad = read_texts(self.table, cells)
                column = Column(role, role.name, "text", has, same, chunks=chunks)
            elif role.kind == "vector":
                values, at, bad = read_vectors(self.table, cells)
                column = Column(role, role.name, "vector", at >= 0, same_vectors(values, at), vectors=values, at=at)
            elif role.kind == "numbers":
                column, bad = self._numbers(role)
            else:
                found = sources[role.name]
                bad = found.bad_rows()
                has = found.at >= 0
                has[list(bad)] = False
                gives: Kind = "audio" if role.kind == "audio" else "image"
                column = Column(role, role.name, gives, has, found.groups(has, found.at), found)
            self.columns.append(column)
            for row, reason in bad.items():
                self._bad(row, role.column, cells[row], reason)
        for role in [role for role in roles if role.kind == "video" and sounds]:
            self._sound(role, sources[role.name])
        self._targets()
        self._splits()
        self._nothing()
        self._twice()
        self._report(empty, sounds)

    def _examine(self, sources: Sequence[Sources], sounds: bool) -> None:
        """Examine all pictures, sounds and videos. Keep them decoded where all fit into memory."""
        count = sum(len(found.items) for found in sources)
        # Read at the call, so that a test can change it.
        self.whole = sum(len(found.items) * found.bytes_each for found in sources) <= images.KEEP
        steps: Iterator[int] = (step for found in sources for step in found.examine(self.whole, sounds=sounds))
        for _ in patient_track(steps, "reading items" if self.whole else "checking items", count):
            pass

    def _sound(self, role: Role, sources: Sources) -> None:
        """Add the sound of a column of videos as a separate modality."""
        name = modality_name(f"{role.name}_sound", [column.name for column in self.columns])
        has = (sources.at >= 0) & (sources.sounding[sources.at] if len(sources.items) else False)
        has &= next(column.has for column in self.columns if column.role is role)
        self.columns.append(Column(role, name, "audio", has, sources.groups(has, sources.at), sources))

    def _numbers(self, role: Role) -> tuple[Column, dict[int, str]]:
        """Read columns of numbers as one vector for each row, which has no empty cell."""
        values, bad = read_numbers([(name, self.table.cells(name)) for name in role.columns])
        empty = np.isnan(values)
        if (worded := empty.all(0) & (len(bad) > 0)).any() and not worded.all():
            names = np.array(role.columns)
            raise DataError(
                f"{self.place}: the column '{names[worded][0]}' holds no number; "
                f"name the columns of numbers alone: ?columns={','.join(names[~worded])}"
            )
        for row in np.flatnonzero(empty.any(1)).tolist():
            bad.setdefault(row, f"'{role.columns[int(empty[row].argmax())]}' is empty")
        at = np.where(empty.any(1), -1, np.arange(len(values)))
        found = np.nan_to_num(values).astype(np.float32)
        return Column(
            role, role.name, "vector", at >= 0, same_vectors(found[at >= 0], _counted(at)), vectors=found, at=at
        ), bad

    def _targets(self) -> None:
        """Read the numbers to predict; a row without one is bad."""
        name = self.roles.target
        if not name:
            return
        cells = self.table.cells(name)
        values, bad = read_numbers([(name, cells)])
        self.targets = values[:, 0]
        for row in np.flatnonzero(np.isnan(self.targets)).tolist():
            reason = bad.get(row, f"'{name}' is empty")
            self._bad(row, name, cells[row], f"the target {reason}")

    def _bad(self, row: int, column: str, value: Any, reason: str) -> None:
        self.wrong.setdefault(row, []).append((column, value, reason))
        self.good[row] = False

    # --- rows as a whole

    def _splits(self) -> None:
        """Set the split of every row from its split column, else from its file's name."""
        self.split = self.table.splits()
        if not self.roles.split:
            return
        cells = self.table.cells(self.roles.split)
        codes, values = factorise(cells)
        said = np.full(len(values) + 1, "", object)
        for n, value in enumerate(values):
            if isinstance(value, str) and len(value) < 100:
                said[n] = SPLITS.get(value.lower(), value.lower())
            else:
                for row in np.flatnonzero(codes == n):
                    self._bad(int(row), self.roles.split, cells[int(row)], "is not the name of a split")
        found = said[codes]
        self.split = np.where(found == "", self.split, found)

    def _nothing(self) -> None:
        has = np.any([column.has for column in self.columns], axis=0)
        for row in np.flatnonzero(self.good & ~has):
            self._bad(int(row), "", None, "has no modality")

    def _twice(self) -> None:
        """Keep only the first usable row of those with the same id in the same split."""
        if not self.roles.id:
            return
        cells = self.table.cells(self.roles.id)
        codes, values = factorise(cells)
        usable = np.array([isinstance(v, (str, int, float, bytes)) and v != "" and v == v for v in values] + [False])
        names = {name: n for n, name in enumerate(dict.fromkeys(self.split))}
        split = np.array([names[name] for name in self.split], np.int64)
        rows = np.flatnonzero(self.good & usable[codes])
        _, first, of = np.unique(codes[rows] * len(names) + split[rows], return_index=True, return_inverse=True)
        for at in np.flatnonzero(first[of] != np.arange(len(rows))):
            row, before = int(rows[at]), int(rows[first[of[at]]])
            reason = f"the id is that of {self.table.short(before)} too, which is used instead"
            self._bad(row, self.roles.id, cells[row], reason)

    # --- reports

    def line(self, row: int, column: str, value: Any, what: str, reason: str) -> Line:
        """Make the list's line for one row."""
        key, unit = self.table.key_of(row), self.table.unit
        if self.table.own_files:
            return Line(self.table.short(row), None, reason, key, what=what, unit=unit)
        at, number = self.table.where(row)
        return Line(str(self.table.segments[at].path), number, reason, key, column, shown(value), what, unit)

    def _report(self, empty: dict[str, Indices], sounds: bool) -> None:
        """List every row that is left out, and rows that are used with a change."""
        self.accounts.find(self.table.unit, len(self.table))
        lines: list[tuple[int, int, Line]] = []  # by segment and number
        for at, segment in enumerate(self.table.segments):
            self.accounts.find(self.table.unit, len(segment.broken))
            for broken in segment.broken:
                line = Line(str(segment.path), broken.number, broken.reason, broken.key, unit=self.table.unit)
                lines.append((at, broken.number, line))
            self.notes += segment.notes
        for row, wrong in self.wrong.items():
            name, value, reason = wrong[0]
            more = [f"{c}{f' ({shown(v)})' if shown(v) else ''}: {r}" for c, v, r in wrong[1:]]
            lines.append((*self.table.where(row), self.line(row, name, value, BAD, "; and ".join([reason, *more]))))
        for _, _, line in sorted(lines, key=lambda found: found[:2]):
            self.accounts.leave(line)
        for column in self.columns:
            rows = empty.get(column.name, np.zeros(0, np.int64))
            rows = rows[self.good[rows]]
            for row in rows.tolist():
                value = self.table.cells(column.role.columns[0])[row]
                self.accounts.leave(self.line(row, column.role.column, value, "missing", "empty text"))
            if len(rows):
                self.notes.append(
                    f"{self.place}: the text of {column.role.column} is empty in {len(rows)} of {counted(self.total, 'row')}, "
                    "which "
                    f"are used without it (see the list {self.accounts.file})"
                )
        self._rates()
        videos = [column for column in self.columns if column.role.kind == "video" and column.gives == "image"]
        if sounds and videos:
            heard = {column.role.name: column.has for column in self.columns if column.gives == "audio"}
            added = [c for c in self.columns if c.gives == "audio" and (c.has & self.good).any()]
            self.notes += [
                f"{self.place}: the sound of the videos in '{column.role.column}' is a modality, too: {column.name}"
                for column in added
            ]
            silent = sum(int((c.has & self.good & ~heard[c.role.name]).sum()) for c in videos)
            if silent:
                self.notes.append(f"{self.place}: {counted(silent, 'video')} without sound that can be used")

    def _rates(self) -> None:
        """List the sounds whose rate is not the wanted one."""
        rates: Counter[int] = Counter()
        for column in self.columns:
            if column.gives != "audio" or column.sources is None:
                continue
            rows = np.flatnonzero(column.has & self.good)
            rates += column.sources.rates_of(rows)
            own = column.sources.rates[column.sources.at[rows]] if len(column.sources.items) else rows
            for row, rate in zip(rows[own != self.wanted.rate], own[own != self.wanted.rate], strict=True):
                reason = f"resampled to {self.wanted.rate} Hz"
                self.accounts.leave(self.line(int(row), column.role.column, f"{rate} Hz", "resampled", reason))
        self.notes += [
            f"{self.place}: {note} (all listed in {self.accounts.file})"
            for note in resampled_note(rates, self.wanted.rate)
        ]

    @property
    def total(self) -> int:
        """Number of rows, including broken ones."""
        return self.accounts.found[self.table.unit]

    def judge(self, max_bad: float | None) -> None:
        """Check the number of rows that cannot be used.

        Args:
            max_bad: Maximum number of bad rows, or their maximum fraction if below 1. None: any number.

        Raises DataError when more rows are bad, or when no row is left.
        """
        bad = len(self.accounts.left(self.table.unit))
        if bad == self.total:
            self.accounts.write()
            raise DataError(
                f"{self.place}: none of its {self.total} {self.table.unit} can be used: {self.accounts.examples()}"
            )
        if max_bad is None:
            return
        allowed = max_bad * self.total if max_bad < 1 else max_bad
        if bad > allowed + 1e-9:  # in floating point, 0.29 * 100 is slightly less than 29
            self.accounts.write()
            said = f"{max_bad:g} of {self.total}" if max_bad < 1 else f"{max_bad:g}"
            raise DataError(
                f"{self.place}: {bad} of {counted(self.total, 'row is', 'rows are')} bad, more than max_bad={said}: "
                f"{self.accounts.examples()}. "
                "Correct them, or allow more: --max-bad N, or ?max_bad=N after the place"
            )

    # --- access

    def modality(self, column: Column) -> Modality:
        """Return the facts of a column."""
        if column.gives == "image":
            return Modality("image", size=self.wanted.size)
        if column.gives == "audio":
            return Modality("audio", rate=self.wanted.rate, samples=self.wanted.samples)
        if column.gives == "vector":
            assert column.vectors is not None
            return Modality("vector", dim=column.vectors.shape[1])
        return Modality("text")

    def row_names(self, rows: Indices) -> list[str]:
        """Name rows for a reader (see `counterpoint.data.images.Listed`)."""
        return [self.table.name(int(row)) for row in rows]

    def files(self, rows: Indices, name: str) -> list[str | None]:
        """Return the path of each row's own file in one modality (see `counterpoint.data.images.Listed`)."""
        column = next((column for column in self.columns if column.name == name), self.columns[0])
        if column.sources is None:
            return [None] * len(rows)
        return [column.sources.file(int(row)) if column.has[row] else None for row in rows]

    def list_rows(self, split: str, name: str, rows: Indices, what: str, reason: str) -> Path | None:
        """Write these rows of a split to the list, replacing earlier ones. Return the list's file, None if it is empty."""
        role = next(column.role for column in self.columns if column.name == name)
        cells = self.table.cells(role.columns[0])
        lines = [self.line(int(row), role.column, cells[int(row)], what, reason) for row in rows]
        return self.accounts.replace((split, name, what), lines)
