"""Run claims anew, one after another: those whose record is older than their protocol, or lacks something.

    python -m counterpoint.lab.rerun                 every claim that needs it, cheapest budget first
    python -m counterpoint.lab.rerun dcl cacr        these alone
    python -m counterpoint.lab.rerun --list          show what would run, and each one's budget

Finished runs are kept, so the same command goes on after an interruption. A claim that fails is reported at the end, and the
others still run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from counterpoint.errors import CounterpointError
from counterpoint.lab import claims
from counterpoint.lab.protocol import of_system, slugs
from counterpoint.lab.verify import FOLDER, read_record, verify
from counterpoint.report.claim import write_claim_report


def due(folder: Path = FOLDER) -> list[str]:
    """Name the claims that need a run: no record, one of another protocol, or one that lacks something."""
    found = []
    for slug in slugs():
        try:
            record = read_record(slug, folder)
        except CounterpointError:
            found.append(slug)
            continue
        if record.get("missing") or record.get("protocol", {}).get("ran") != of_system(slug).sha256:
            found.append(slug)
    return sorted(found, key=lambda slug: of_system(slug).minutes)


def main(words: Sequence[str] | None = None) -> int:
    """Run the claims named, or those due; returns the number of failures."""
    parser = argparse.ArgumentParser(
        prog="python -m counterpoint.lab.rerun", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("slugs", nargs="*", help="claims to run; default: those that need it")
    parser.add_argument("--list", action="store_true", help="show what would run, and stop")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--no-variants", action="store_true", help="leave the variants out")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the records")
    parser.add_argument(
        "--into", type=Path, nargs="*", default=(), help="documents whose table of claims is written anew"
    )
    options = parser.parse_args(words)
    todo = options.slugs or due(options.out)
    failed = 0
    for slug in todo:
        protocol = of_system(slug)
        print(
            f"{slug}: {protocol.seeds} seeds, {len(protocol.arms)} arms, at most {protocol.minutes:g} processor minutes"
        )
        if options.list:
            continue
        try:
            record = verify(slug, jobs=options.jobs, out=options.out, variants=not options.no_variants)
        except CounterpointError as error:
            failed += 1
            print(f"{slug} failed: {error}", file=sys.stderr)
            continue
        page = options.out / f"{slug}.html"
        if page.exists():
            write_claim_report(record, page)
        print(f"{slug}: {record['verdict']}, {record['minutes']:.1f} processor minutes")
    if not options.list:
        claims.write(options.out, options.into)
    return failed


if __name__ == "__main__":
    sys.exit(main())
