"""`counterpoint report RUN|SLUG`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import CLAIMS, say
from counterpoint.errors import RunError


def main(target: Annotated[Positional[str], arg(metavar="RUN|SLUG")]) -> int:
    """Write the HTML page of a run, or of a system's claim, again.

    Example: counterpoint report runs/first

    Args:
        target: A run directory, or a system whose claim was verified.
    """
    path = Path(target)
    if path.exists():
        from counterpoint.engine.run import Run
        from counterpoint.report.run import write_run_report

        say(str(write_run_report(Run.open(path))))
        return 0
    from counterpoint.lab.verify import read_record
    from counterpoint.report.claim import write_claim_report

    if path.name != target:
        raise RunError(f"{target}: no such run directory; name a folder that counterpoint train made")

    say(str(write_claim_report(read_record(target, CLAIMS), CLAIMS / f"{target}.html")))
    return 0
