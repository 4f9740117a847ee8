"""Compare the kernel's short method for keys without a gradient with its general method: time and memory.

    python benchmarks/fixed_keys.py [--rounds 9]      writes results/bench/fixed_keys.json

Both take the same query with a gradient. The same keys have none (a queue, a bank, a locked tower). They run
forward and backward, in turn, in one process on one thread, in float32. The general method keeps tiles up to 64 MiB and
computes the rest again: two products where all is kept, else three. The short method needs two and keeps none. The record has
medians over the rounds and their ratio, general over short: above 1 the short method is faster. Memory is the peak of a
separate process of each, minus its memory before the call.
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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OUT = Path(__file__).parents[1] / "results" / "bench" / "fixed_keys.json"
# (rows, keys, width): MoCo's laptop queue and the paper's, a bank, a locked tower of a large batch.
SIZES = ((256, 4096, 128), (256, 65536, 128), (512, 65536, 256), (4096, 4096, 512), (8192, 8192, 512))


def case(rows: int, keys: int, dim: int) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """Return both methods as functions without arguments, and the query."""
    import torch
    from torch.nn.functional import normalize

    from counterpoint.core import kernel

    g = torch.Generator().manual_seed(0)
    query = (normalize(torch.randn(rows, dim, generator=g), dim=1) / 0.1).requires_grad_()
    key = normalize(torch.randn(keys, dim, generator=g), dim=1)
    general = (key, (), None, False, (0, 0), None, kernel.KEEP, False)
    return {
        "short": lambda: kernel.FixedKeys.apply(query, key, (), None, (0, 0)).mean(),
        "general": lambda: kernel.LogSumExp.apply(query, *general)[0].mean(),
    }, query


def step(call: Callable[[], Tensor], query: Tensor) -> tuple[float, float]:
    """Run forward and backward. Return the seconds and the value."""
    query.grad = None
    started = time.perf_counter()
    value = call()
    value.backward()
    return time.perf_counter() - started, float(value.detach())


def measure(rows: int, keys: int, dim: int, rounds: int) -> dict[str, Any]:
    calls, query = case(rows, keys, dim)
    times: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds, values[name] = step(call, query)
            if number:  # the first warms up
                times[name].append(seconds)
    median = {name: statistics.median(found) for name, found in times.items()}
    memory = {name: child(name, rows, keys, dim) for name in calls}
    return {
        "rows": rows,
        "keys": keys,
        "dim": dim,
        "short_ms": round(1e3 * median["short"], 2),
        "general_ms": round(1e3 * median["general"], 2),
        "times_faster": round(median["general"] / median["short"], 2),
        "short_extra_mb": memory["short"],
        "general_extra_mb": memory["general"],
        "difference": abs(values["short"] - values["general"]),
    }


def extra(name: str, rows: int, keys: int, dim: int) -> float:
    """Return the peak memory of one forward and backward pass, minus the memory before it, in megabytes."""
    small, few = case(8, 64, dim)
    step(small[name], few)
    calls, query = case(rows, keys, dim)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
    step(calls[name], query)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return round(max(int(peak[1]) / 1024 - before, 0.0), 1)


def child(*words: Any) -> float:
    out = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, words)], check=True, capture_output=True, text=True
    )
    return float(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", nargs=4)
    words = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if words.child:
        name, *sizes = words.child
        print(extra(name, *map(int, sizes)))
        return
    from counterpoint.engine.run import machine, versions

    rows = []
    for size in SIZES:
        rows.append(measure(*size, words.rounds))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    record = {"time": rows, "threads": 1, "load": os.getloadavg(), "versions": versions(), "machine": machine()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
