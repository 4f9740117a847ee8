"""`counterpoint claims`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from counterpoint.commands.common import CLAIMS, console, say, signed, table


def main(
    *,
    out: Annotated[Path, arg(metavar="DIR")] = CLAIMS,
    into: Annotated[tuple[Path, ...], arg(metavar="FILE [FILE ...]")] = (),
) -> int:
    """Show all recorded claims together and draw OUT/claims.svg.

    Example: counterpoint claims --into README.md

    Args:
        out: The folder of records.
        into: Markdown files. The table of claims between its two markers is written anew in each.
    """
    from counterpoint import claims as room
    from counterpoint.report.analysis import first_of

    found = room.write(out, into)
    shown = table("system", "arm", "against", "mean gain", "95 % interval", "seeds", "verdict")
    for record in found:
        pair = first_of(record)
        interval, gain = signed(pair["low"], pair["high"], 3), f"{pair['mean']:+.3f}"
        seeds = str(len(record["seeds"]))
        shown.add_row(record["slug"], pair["arm"], pair["baseline"], gain, interval, seeds, record["verdict"])
    console().print(shown)
    say(f"Drawing: {out / 'claims.svg'}")
    return 0
