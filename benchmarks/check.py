"""Compare fresh benchmarks with their records: no ratio to a peer may fall by more than 15 %.

    python benchmarks/check.py                            records in results/bench/ against those of the last commit
    python benchmarks/check.py --run images albef         run these benchmarks first
    python benchmarks/check.py --against v0.1.0           against those of another commit

A ratio is a number under `ratio`, `times`, `times_faster`, `times_ours`, `times_real_time` or a name with
`times_faster_than` in it. All of them grow as we get faster. Times in seconds are not compared: they are another machine's.
Exit code 1: a ratio fell.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BENCH = Path("results") / "bench"
RATIO = re.compile(r"ratio|times|times_faster|times_ours|times_real_time|.*times_faster_than.*")
ALLOWED = 0.15


def ratios(record: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """Yield (place, ratio) of a record. A row of a list is found again by its words and its whole numbers."""
    if isinstance(record, dict):
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and RATIO.fullmatch(name):
                yield f"{at}/{name}", float(value)
            else:
                yield from ratios(value, f"{at}/{name}")
    elif isinstance(record, list):
        for row in record:
            if isinstance(row, dict):
                known = [f"{k}={v}" for k, v in row.items() if isinstance(v, str | int) and not isinstance(v, bool)]
                yield from ratios(row, f"{at}[{' '.join(known)}]")


def fallen(before: Any, now: Any, allowed: float = ALLOWED) -> list[tuple[str, float, float]]:
    """Return (place, before, now) of each ratio that fell by more than the share allowed. Cases of one side alone count not."""
    old = dict(ratios(before))
    return [(at, old[at], new) for at, new in ratios(now) if at in old and new < old[at] * (1 - allowed)]


def committed(name: str, commit: str) -> Any:
    """Return the record of a commit; None where it has none."""
    found = subprocess.run(["git", "show", f"{commit}:{BENCH / name}"], capture_output=True, text=True, cwd=ROOT)
    return json.loads(found.stdout) if found.returncode == 0 else None


def main() -> int:
    """Print every ratio that fell; return 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", default=[], help="benchmarks to run first, by the names of their files")
    parser.add_argument("--against", default="HEAD", help="commit of the records to compare with")
    options = parser.parse_args()
    for name in options.run:
        script = ROOT / "benchmarks" / f"{name}.py"
        if not script.is_file():
            known = ", ".join(sorted(p.stem for p in script.parent.glob("*.py") if p.stem != "check"))
            print(f"check: there is no benchmark '{name}'; known: {known}", file=sys.stderr)
            return 2
        subprocess.run([sys.executable, str(script)], check=True, cwd=ROOT)
    compared = bad = 0
    for path in sorted((ROOT / BENCH).glob("*.json")):
        before, now = committed(path.name, options.against), json.loads(path.read_text(encoding="utf-8"))
        if before is None:
            print(f"{path.stem}: no record in {options.against}")
            continue
        compared += len(dict(ratios(now)))
        for at, old, new in fallen(before, now):
            bad += 1
            print(f"{path.stem}{at}: {new:.2f}, was {old:.2f} ({100 * (new / old - 1):+.0f} %)")
    print(f"{compared} ratios, {bad} fell by more than {100 * ALLOWED:.0f} %")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
