"""Keep the labels that a reader gives to items, in the folder of the run that embedded them.

A file has a JSON object a line: split, item, source, label, time. A later line replaces an earlier one of the same item; an empty
label removes it. So a crash loses nothing, and two readers do not overwrite each other.
"""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from counterpoint.errors import CounterpointError

LONGEST = 80  # characters of a label
COLUMNS = ("split", "item", "source", "label", "time")
_LOCK = threading.Lock()


def labels_file(run: Path, embeddings: Path) -> Path:
    """Return the file of the labels of a file of embeddings, in its run's folder."""
    return run / f"labels-{embeddings.stem}.jsonl"


def check_label(label: str) -> str:
    """Return a label without spaces around it. CounterpointError for one that is too long, or not printable."""
    label = label.strip()
    if len(label) > LONGEST or not label.isprintable():
        raise CounterpointError(f"a label has at most {LONGEST} printable characters")
    return label


def add_labels(file: Path, items: Iterable[Mapping[str, Any]], label: str) -> int:
    """Give items a label and return their number.

    Args:
        file: The file of labels; made where it is missing.
        items: For each item its split, item and source.
        label: The label. An empty one removes the items' labels.
    """
    now = round(time.time(), 3)
    lines = [json.dumps({**item, "label": label, "time": now}, ensure_ascii=False) + "\n" for item in items]
    with _LOCK, file.open("a", encoding="utf-8") as out:
        out.writelines(lines)
    return len(lines)


def read_labels(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the labelled items by split and item. Skip lines that are damaged."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    if not file.is_file():
        return found
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                key = (str(row["split"]), int(row["item"]))
                label = str(row["label"])
            except (ValueError, KeyError, TypeError):
                continue
            found.pop(key, None)
            if label:
                found[key] = {name: row.get(name) for name in COLUMNS}
    return found


def as_csv(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = COLUMNS) -> str:
    """Return rows as a CSV table.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(columns)
    writer.writerow(names)
    for row in rows:
        writer.writerow([_harmless(row.get(name)) for name in names])
    return out.getvalue()


def as_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as JSON objects, a line each."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
