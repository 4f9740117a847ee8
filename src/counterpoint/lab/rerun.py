"""Run claims again, one after another: claims without a record, of a changed protocol, or with an incomplete record.

    python -m counterpoint.lab.rerun                 every claim that needs it, smallest budget first
    python -m counterpoint.lab.rerun dcl cacr        only these claims
    python -m counterpoint.lab.rerun --list          list the claims that would run, with their budgets

Finished runs are kept, so the same command continues after an interruption. A claim that fails is reported at the end, and
the others still run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.lab import claims
from counterpoint.lab.protocol import of_system, slugs
from counterpoint.lab.verify import FOLDER, read_record, verify
from counterpoint.report.claim import write_claim_report
from counterpoint.words import counted


def due(folder: Path = FOLDER) -> list[str]:
    """Return the claims that need a run: their record is absent, incomplete, or of another version of the protocol."""
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
    """Run the named claims, or those that are due. Return the number of failures, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m counterpoint.lab.rerun", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("slugs", nargs="*", help="claims to run; default: those that need it")
    parser.add_argument("--list", action="store_true", help="list the claims that would run, and stop")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel runs, one thread each; default: 2")
    parser.add_argument("--no-variants", action="store_true", help="run the claims without their variants")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the records")
    parser.add_argument("--into", type=Path, nargs="*", default=(), help="documents whose table of claims is replaced")
    options = parser.parse_args(words)
    todo = options.slugs or due(options.out)
    failed = 0
    for slug in todo:
        protocol = of_system(slug)
        print(
            f"{slug}: {counted(protocol.seeds, 'seed')}, {counted(len(protocol.arms), 'arm')}, at most {protocol.minutes:g} "
            "processor minutes"
        )
        if options.list:
            continue
        try:
            record = verify(slug, jobs=options.jobs, out=options.out, variants=not options.no_variants)
        except Interrupted as error:
            print(error, file=sys.stderr)
            return 130
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
