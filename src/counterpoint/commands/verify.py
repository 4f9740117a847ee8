"""`counterpoint verify SLUG`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from counterpoint.commands.common import CLAIMS, HERE, Count, Machines, console, say, table, unset


def main(
    slug: Annotated[Positional[str], arg(metavar="SLUG")],
    *,
    seeds: Annotated[Count, unset(metavar="INT")] = None,
    quick: bool = False,
    jobs: Annotated[Count, unset(aliases=["--workers"], metavar="INT")] = None,
    out: Annotated[Path, arg(metavar="DIR")] = CLAIMS,
    variants: bool = True,
    rejudge: bool = False,
    machines: OmitArgPrefixes[Machines] = HERE,
) -> int:
    """Test a paper's central claim by its protocol: all arms on the same seeds, an interval and a verdict for each part.

    Write OUT/SLUG.json and OUT/SLUG.html. Finished runs are kept, so an interrupted verification continues.

    Example: counterpoint verify macil-sd --quick

    Args:
        slug: The system whose claim is tested.
        seeds: Number of seeds, from 0 on; at least 5. Default: the protocol's.
        quick: Rehearse on a smaller setting in 1 to 2 minutes. The result is no evidence; it is written to SLUG-quick.json.
        jobs: Number of runs at a time, one thread each; at least 1. Default: 2, on Ray all that there is room for.
        machines: Where the runs take place.
        out: The folder of records.
        variants: Also run the claim's variants, which are reported beside it.
        rejudge: Train nothing. Judge the recorded figures again by the protocol.
    """
    from counterpoint.lab import claims as room
    from counterpoint.lab import verify as lab
    from counterpoint.report.claim import write_claim_report

    if rejudge:
        record = room.rejudge(slug, out)
    else:
        record = lab.verify(
            slug,
            seeds=seeds,
            quick=quick,
            jobs=machines.jobs(jobs, 2),
            cluster=machines.cluster(),
            out=out,
            variants=variants,
        )
    for title, part in (("claim", record), *record.get("variants", {}).items()):
        shown = table(*room.COLUMNS, title=f"{slug}, {title}: {part['verdict']}")
        for row in part["conjuncts"]:
            shown.add_row(*room.cells(row))
        console().print(shown)
    for lack in record["missing"]:
        say(f"lacks: {lack}")
    name = f"{slug}-quick" if quick else slug
    page = write_claim_report(record, out / f"{name}.html")
    say(f"Verdict: {record['verdict']}. Record: {out / name}.json  Page: {page}")
    return 0
