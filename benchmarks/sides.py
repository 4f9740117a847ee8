"""Time two ways of one computation in turn, and measure the peak memory of each in its own process.

A benchmark calls `run` with its cases. The record has medians over the rounds, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from obow import Case, status, timed

from counterpoint.engine.run import machine, versions


class Sides(NamedTuple):
    """A case of a benchmark.

    Attributes:
        make: Makes both ways, ours first.
        small: Makes them on a small input, which warms a process up.
        often: Factor of the rounds, more for a quick case.
    """

    make: Callable[[], Case]
    small: Callable[[], Case]
    often: int = 1


def peak(sides: Sides, side: int) -> float:
    """Return the peak memory of one call, minus the memory before it, in megabytes."""
    timed(sides.small()[side])
    function = sides.make()[side]
    before = status("VmRSS")
    timed(function)
    return round(max(0.0, status("VmHWM") - before), 1)


def run(cases: Mapping[str, Sides], out: Path, said: str | None, *, rounds: int, **facts: Any) -> None:
    """Measure all cases and write the record.

    Args:
        cases: Cases by name.
        out: The record to write, unless the command line names another.
        said: Text for --help.
        rounds: Number of rounds of a case.
        facts: Further entries of the record, such as the width.
    """
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(cases[options.peak[1]], int(options.peak[0])))
        return
    what = "float32, forward and backward, medians; ratio above 1: ours is faster; megabytes: peak of a process"
    record: dict[str, Any] = {"what": what, **facts, "threads": options.threads, "rounds": options.rounds, "cases": {}}
    for name, sides in cases.items():
        ours, plain = sides.make()
        timed(ours), timed(plain), timed(ours), timed(plain)
        taken = [(timed(ours), timed(plain)) for _ in range(options.rounds * sides.often)]
        held = [
            float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            for side in "01"
            for words in [[sys.executable, sys.argv[0], "--threads", str(options.threads), "--peak", side, name]]
        ]
        found = {
            "ours_s": round(statistics.median(a[0] for a, _ in taken), 6),
            "plain_s": round(statistics.median(b[0] for _, b in taken), 6),
            "ratio": round(statistics.median(b[0] / a[0] for a, b in taken), 2),
            "ours_megabytes": held[0],
            "plain_megabytes": held[1],
            "values_apart": float(f"{float((taken[0][0][1] - taken[0][1][1]).abs()):.1e}"),
        }
        record["cases"][name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
    options.out.write_text(json.dumps(record | {"machine": machine(), "versions": versions()}, indent=1) + "\n")
