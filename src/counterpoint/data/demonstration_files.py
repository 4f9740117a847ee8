"""`demonstrations:PLACE`: the user's own tasks, in the layout of MetaICL.

    demonstrations:tasks.jsonl    a .jsonl, .json, .csv or .parquet file, or a folder of them: a row for each example

    {"task": "sentiment", "input": "a fine film", "output": "good", "options": ["good", "bad"]}

`options` may be absent: then the outputs of the task are its options. A column `role` restricts an example to "demonstration" or
"query", as in MetaICL's files of few shots. A column `split` gives each task its split.

`?texts=more.txt` adds plain texts for training: a text file with one a line, a table with a column `text`, or a folder of these.

Splits follow the rule of all own data: given names, else a fifth and a tenth. A task stays in one split.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.demonstrations import DemonstrationData, DemonstrationSplit, Example
from counterpoint.data.own.cells import text_of
from counterpoint.data.own.item_splits import item_splits
from counterpoint.data.own.opening import open_table
from counterpoint.data.own.places import SPLITS
from counterpoint.data.texts import plain_texts
from counterpoint.errors import DataError

COLUMNS = ("task", "input", "output", "options", "role", "split")
NEEDED = ("task", "input", "output")


def load(place: str, *, texts: str = "", test: str = "", valid: str = "") -> DemonstrationData:
    """Read the examples (see the module).

    Args:
        place: a file or folder.
        texts: a file or folder of plain texts. Default: none.
        test: fraction of the tasks in the test split, or the name of a split. Default: as for all own data.
        valid: fraction of the training tasks in the valid split, or the name of a split. Default: as for all own data.

    Raises DataError for unreadable files, a missing column, no usable example, and a task in two splits.
    """
    notes: list[str] = []
    rows = _rows(place, notes)
    number: dict[str, int] = {}
    together = np.array([number.setdefault(example.task, len(number)) for example, _ in rows], np.int64)
    of: dict[str, str] = {}
    for example, split in rows:
        if of.setdefault(example.task, split) != split:
            raise DataError(
                f"{place}: the task '{example.task}' is in two splits, and these need different tasks. Mark a task's examples by "
                'the column role: "demonstration" or "query"'
            )
    parts = item_splits(place, [split for _, split in rows], np.ones(len(rows), bool), together, test, valid)
    notes += [note.replace("items with labels", "examples") for note in parts[3]]
    train, watched, held = (DemonstrationSplit([rows[n][0] for n in part.tolist()]) for part in parts[:3])
    written = plain_texts(texts, notes) if texts else []
    return DemonstrationData(f"demonstrations:{place}", train, watched, held, written, notes)


def _rows(place: str, notes: list[str]) -> list[tuple[Example, str]]:
    """Read all examples of a place with their splits. DataError where none can be used."""
    accounts = Accounts(place)
    table, said = open_table(place, "", lambda name: name.lower() in COLUMNS, accounts)
    notes += said
    by_name = {column.lower(): column for column in reversed(table.columns)}
    missing = [name for name in NEEDED if name not in by_name]
    if missing:
        raise DataError(
            f"{place}: has no column {' or '.join(missing)}; write an example a line: "
            '{"task": "...", "input": "...", "output": "...", "options": ["...", "..."]}'
        )
    broken = [(segment.path, row) for segment in table.segments for row in segment.broken]
    accounts.find("rows", len(table) + len(broken))
    for file, row in broken:
        accounts.leave(Line(str(file), row.number, row.reason))
    found: list[tuple[Example, str]] = []
    for n in range(len(table)):
        segment, line = table.where(n)
        cells = {name: table.cells(column)[n] for name, column in by_name.items() if name in COLUMNS}
        try:
            example = example_of(cells)
        except DataError as error:
            accounts.leave(Line(str(table.segments[segment].path), line, str(error)))
            continue
        split = text_of(cells.get("split")) or table.segments[segment].split
        found.append((example, SPLITS.get(str(split).strip().lower(), "")))
    accounts.read("rows", len(found))
    accounts.check()
    accounts.write()
    notes += accounts.notes()
    if not found:
        raise DataError(f"{place}: has no example that can be used: {accounts.examples()}")
    return found


def example_of(cells: dict[str, Any]) -> Example:
    """Return the example of a row. DataError for a value of another form."""
    options = cells.get("options")
    if isinstance(options, np.ndarray):
        options = options.tolist()
    if isinstance(options, str) and options.strip():
        raise DataError("has options that are a text, where a list of texts must be")
    role = (text_of(cells.get("role")) or "").strip().lower()
    return Example(
        (text_of(cells.get("task")) or "").strip(),
        (text_of(cells.get("input")) or "").strip(),
        (text_of(cells.get("output")) or "").strip(),
        tuple("" if option is None else str(option).strip() for option in options or ()),
        role,
    )
