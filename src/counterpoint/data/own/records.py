"""Read tables of records: .jsonl (one record a line) and .json (a list of records)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.own.table import Broken, Cells, ListCells, Segment
from counterpoint.errors import DataError

Wanted = Callable[[str], bool]


def parsed(text: str | bytes) -> Any:
    """Parse JSON. DataError with the fault when it is invalid."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError("is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise DataError(f"is not JSON ({str(error)[:120]})") from error


def read_jsonl(path: Path, wanted: Wanted) -> Segment:
    """Read one record from each line. A line without a valid record becomes a broken row."""
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        return _segment(path, (_line(line.removeprefix(b"\xef\xbb\xbf")) for line in lines), wanted)


def _line(line: bytes) -> Any:
    try:
        return parsed(line)
    except DataError as error:
        return error


def read_json(path: Path, wanted: Wanted) -> Segment:
    """Read a list of records. DataError when the file holds no list."""
    try:
        records = parsed(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: should be a list of records; name a file with one record a line .jsonl")
    return _segment(path, records, wanted)


def _segment(path: Path, records: Iterable[Any], wanted: Wanted) -> Segment:
    columns: dict[str, list[Any]] = {}
    names: dict[str, bool] = {}  # whether each column is read
    numbers, broken, count = list[int](), list[Broken](), 0
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            reason = str(record) if isinstance(record, DataError) else f"is a {type(record).__name__}, not a record"
            broken.append(Broken(number, reason))
            continue
        for name, value in record.items():
            if name not in names:
                names[name] = wanted(name)
            if not names[name]:
                continue
            column = columns.setdefault(name, [])
            if len(column) < count:
                column += [None] * (count - len(column))
            column.append(compact(value) if isinstance(value, list) else value)
        numbers.append(number)
        count += 1
    for column in columns.values():
        column += [None] * (count - len(column))
    cells: dict[str, Cells] = {name: ListCells(column) for name, column in columns.items()}
    return Segment(path, count, cells, np.array(numbers, np.int64) if broken else None, broken, names=list(names))


def compact(values: list[Any]) -> Any:
    """Convert a list of numbers to an array, which takes a tenth of the memory. Return any other list unchanged."""
    if not values or not all(type(value) in (int, float) for value in values):
        return values
    try:
        return np.array(values, np.float64)
    except OverflowError:
        return values
