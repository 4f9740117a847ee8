"""`counterpoint systems`."""

from __future__ import annotations

import json
from typing import Annotated

from tyro.conf import arg

from counterpoint import catalog
from counterpoint.commands.common import Text, console, say, table, unset
from counterpoint.errors import unknown
from counterpoint.words import counted


def main(
    *,
    area: Annotated[Text, unset(metavar="AREA")] = None,
    state: Annotated[Text, unset(metavar="done|built|planned")] = None,
    additions: bool = False,
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """List every system: the 63 papers and the classic baselines, with state, area and task.

    Example: counterpoint systems --area images --state done

    Args:
        area: List only the systems of this area (alignment, images, dense, ..., classics).
        state: List only systems that are "done", "built" (claim or speed not measured yet) or "planned".
        additions: List only additions to other systems: `counterpoint train SYSTEM --with ADDITION`.
        json_: Print JSON instead of a table.
    """
    rows = list(catalog.entries().values())
    areas = sorted({row.area for row in rows})
    for name, wanted, known in (("area", area, areas), ("state", state, catalog.STATES)):
        if wanted is not None and wanted not in known:
            raise unknown(name, wanted, known)
        rows = [row for row in rows if wanted is None or getattr(row, name) == wanted]
    rows = [row for row in rows if row.addition or not additions]
    if json_:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
        return 0
    shown = table("system", "state", "area", "task", "arXiv", "title")
    for column in shown.columns:
        column.no_wrap = True
    for row in rows:
        shown.add_row(row.slug, row.state, row.area, row.task, row.arxiv or "", row.title)
    console().print(shown)
    say(f"\n{counted(len(rows), 'system')}. More about one: counterpoint show SLUG")
    return 0
