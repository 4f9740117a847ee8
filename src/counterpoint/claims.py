"""All recorded claims together: a table, a drawing of the effects with their intervals, and the two in the documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterpoint import catalog
from counterpoint.errors import CounterpointError
from counterpoint.files import replacing

BEGIN, END = "<!-- all-claims:begin -->", "<!-- all-claims:end -->"


def records(folder: Path) -> list[dict[str, Any]]:
    """Every record of a claim in `folder`, in the catalogue's order; rehearsals are left out."""
    found = []
    for slug in catalog.entries():
        file = folder / f"{slug}.json"
        if file.is_file():
            try:
                found.append(dict(json.loads(file.read_text(encoding="utf-8"))))
            except ValueError as error:
                raise CounterpointError(f"{file} is not a record: {error}") from error
    if not found:
        raise CounterpointError(f"no claims are recorded in {folder}; make one: counterpoint verify SLUG")
    return found


def write(folder: Path, documents: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """Write `<folder>/claims.svg` and the table between the markers of each document; returns the records."""
    from counterpoint.report.analysis import claims_drawing, claims_table

    found = records(folder)
    with replacing(folder / "claims.svg") as file:
        file.write(claims_drawing(found).encode())
    for path in documents:
        text = path.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise CounterpointError(f"{path} has no {BEGIN} ... {END} block")
        path.write_text(f"{before}{BEGIN}\n{claims_table(found)}\n{END}{after}", encoding="utf-8")
    return found
