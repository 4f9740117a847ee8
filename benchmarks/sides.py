"""Time two ways of one computation in turn, and measure the peak memory of each in its own process.

A benchmark calls `run` with its cases. The record has medians over the rounds, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from counterpoint.engine.run import machine, versions

Case = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # ours, and the other way


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the seconds of a call, with its gradients where it has some, and its value. With one thread, of the processor."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    value = function()
    if value.requires_grad:
        value.backward()
    return clock() - started, value.detach()


def status(name: str) -> float:
    """Return an entry of this process's status on Linux in megabytes, such as VmHWM, the peak of its memory."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the ratio of the medians: how many times as fast the second way is as the first."""
    return statistics.median(slow) / statistics.median(fast)


class Sides(NamedTuple):
    """A case of a benchmark.

    Attributes:
        make: Makes both ways, ours first.
        small: Makes them on a small input, which warms a process up.
        often: Factor of the rounds, more for a quick case.
        equal: Whether both ways compute the same value.
    """

    make: Callable[[], Case]
    small: Callable[[], Case]
    often: int = 1
    equal: bool = True


def peak(sides: Sides, side: int) -> float:
    """Return the peak memory of one call, minus the memory before it, in megabytes."""
    timed(sides.small()[side])
    function = sides.make()[side]
    before = status("VmRSS")
    timed(function)
    return round(max(0.0, status("VmHWM") - before), 1)


def compared(case: Case, rounds: int, words: Sequence[str], other: str = "plain", equal: bool = True) -> dict[str, Any]:
    """Time both ways of a case in turn, and measure the peak memory of each in its own process.

    Args:
        case: Both ways.
        rounds: Number of rounds.
        words: Words of the command line that name the case after `--peak SIDE`.
        other: Name of the other way in the record.
        equal: Whether both ways compute the same value.
    """
    ours, plain = case
    timed(ours), timed(plain), timed(ours), timed(plain)
    taken = [(timed(ours), timed(plain)) for _ in range(rounds)]
    program = [sys.executable, sys.argv[0], "--threads", str(torch.get_num_threads()), "--peak"]
    held = [
        float(subprocess.run([*program, side, *words], check=True, capture_output=True, text=True).stdout)
        for side in "01"
    ]
    found = {
        "ours_s": round(statistics.median(a[0] for a, _ in taken), 6),
        f"{other}_s": round(statistics.median(b[0] for _, b in taken), 6),
        "ratio": round(ratio([b[0] for _, b in taken], [a[0] for a, _ in taken]), 2),
        "ours_megabytes": held[0],
        f"{other}_megabytes": held[1],
    }
    apart = float((taken[0][0][1] - taken[0][1][1]).abs().max()) if equal else 0.0
    return found | ({"values_apart": float(f"{apart:.1e}")} if equal else {})


def parser_of(said: str | None, rounds: int, out: Path) -> argparse.ArgumentParser:
    """Return the options of every benchmark of two ways, without `--peak`."""
    parser = argparse.ArgumentParser(description=said, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=out)
    return parser


def written(record: Mapping[str, Any], out: Path) -> None:
    """Write a record with the machine and the versions."""
    out.write_text(json.dumps({**record, "machine": machine(), "versions": versions()}, indent=1) + "\n")


def run(
    cases: Mapping[str, Sides], out: Path, said: str | None, *, rounds: int, other: str = "plain", **facts: Any
) -> None:
    """Measure all cases and write the record.

    Args:
        cases: Cases by name.
        out: The record to write, unless the command line names another.
        said: Text for --help.
        rounds: Number of rounds of a case.
        other: Name of the other way in the record.
        facts: Further entries of the record, such as the width.
    """
    parser = parser_of(said, rounds, out)
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(cases[options.peak[1]], int(options.peak[0])))
        return
    what = "float32, forward and backward, medians; ratio above 1: ours is faster; megabytes: peak of a process"
    record: dict[str, Any] = {"what": what, **facts, "threads": options.threads, "rounds": options.rounds, "cases": {}}
    for name, sides in cases.items():
        found = compared(sides.make(), options.rounds * sides.often, [name], other, sides.equal)
        record["cases"][name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
    written(record, options.out)
