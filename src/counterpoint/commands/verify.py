"""`counterpoint verify SLUG`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import CLAIMS, console, say, signed, table


def main(
    slug: Annotated[Positional[str], arg(metavar="SLUG")],
    *,
    seeds: int = 5,
    quick: bool = False,
    jobs: int = 2,
    out: Annotated[Path, arg(metavar="DIR")] = CLAIMS,
    variants: bool = True,
) -> int:
    """Test a paper's central claim: method and baseline on the same seeds, with 95 % paired intervals and a verdict.

    Writes OUT/SLUG.json and OUT/SLUG.html. Finished runs are kept, so an interrupted verification continues.

    Example: counterpoint verify macil-sd --quick

    Args:
        slug: The system whose claim is tested.
        seeds: Number of seeds, from 0 on; at least 1.
        quick: Rehearse on a smaller setting in a minute or two. This is no evidence; it is written to SLUG-quick.json.
        jobs: Number of runs at a time, one thread each.
        out: The folder of records.
        variants: Also run the claim's variants, which are reported beside it.
    """
    from counterpoint import verify as room
    from counterpoint.report.claim import write_claim_report

    record = room.verify(slug, seeds=seeds, quick=quick, jobs=jobs, out=out, variants=variants)
    for title, part in (("claim", record), *record.get("variants", {}).items()):
        columns = ("arm", "against", "mean difference", "95 % interval", "verdict")
        shown = table(*columns, title=f"{slug}, {title}: {part['metric']}")
        for pair in part["comparisons"]:
            interval = signed(pair["low"], pair["high"])
            shown.add_row(pair["arm"], pair["baseline"], f"{pair['mean']:+.4f}", interval, pair["verdict"])
        console().print(shown)
    name = f"{slug}-quick" if quick else slug
    page = write_claim_report(record, out / f"{name}.html")
    say(f"Verdict: {record['verdict']}. Record: {out / name}.json  Page: {page}")
    return 0
