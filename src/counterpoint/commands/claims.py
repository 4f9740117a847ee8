"""`counterpoint claims`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from counterpoint.commands.common import CLAIMS, console, say, table, unset


def main(
    *,
    out: Annotated[Path, arg(metavar="DIR")] = CLAIMS,
    into: Annotated[tuple[Path, ...], unset(metavar="FILE [FILE ...]")] = (),
) -> int:
    """Show all recorded claims together and draw OUT/claims.svg.

    Example: counterpoint claims --into RESULTS.md

    Args:
        out: The folder of records.
        into: Markdown files. In each, replace the table of claims between its two markers.
    """
    from counterpoint.lab import claims as room

    found = room.write(out, into)
    shown = table("system", "kind", "claim", *room.COLUMNS)
    for record in found:
        for number, row in enumerate(record["conjuncts"]):
            first = (record["slug"], record["kind"], record["verdict"]) if number == 0 else ("", "", "")
            shown.add_row(*first, *room.cells(row))
    console().print(shown)
    say(f"Drawing: {out / 'claims.svg'}")
    return 0
