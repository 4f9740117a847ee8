"""Compare TNCE with TACT's way of computing it: time, value, and peak memory.

    python benchmarks/teminal.py [--rounds 9] [--threads 1]      writes results/bench/teminal.json

TACT stacks the blocks, stores their whole matrix of logits, adds a matrix of log-weights, and takes two cross-entropies. Both
take the same float32 unit rows of width 256, with a scale of 14. They run forward and backward, in turn in one process. The record
has the medians over the rounds and the median of the rounds' ratios. A ratio is TACT's time over ours: above 1 ours is faster.
Memory is the peak of a separate process of each, minus its memory before the call.

"equal" cases have the paper's weights of 1, "weighted" ones alpha_same 2 and alpha_cross 0.5. Cases of three blocks also have
overlapped rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from obow import Case, normal, status, timed
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.engine.run import machine, versions

OUT = Path(__file__).parents[1] / "results" / "bench" / "teminal.json"
WIDTH, SCALE = 256, 14.0
WEIGHTS = {"equal": (1.0, 1.0), "weighted": (2.0, 0.5)}
CASES = {
    f"{blocks} blocks of {n:,} pairs, {name}": (n, blocks, *WEIGHTS[name])
    for n, blocks, name in (
        *((n, 2, name) for n in (32, 1024, 2048, 4096) for name in WEIGHTS),
        *((n, 3, "equal") for n in (1024, 2048)),
    )
}


def tact(audios: list[Tensor], texts: list[Tensor], same: float, cross: float) -> Tensor:
    """Compute the loss in TACT's way, extended to any number of blocks."""
    n, blocks = len(audios[0]), len(audios)
    weights = torch.full((n, n), math.log(cross + 1e-8)).fill_diagonal_(math.log(same + 1e-8))
    table = torch.zeros(blocks, n, blocks, n)
    for one in range(blocks):
        for other in range(blocks):
            if one != other:
                table[one, :, other] = weights
    logits = SCALE * torch.cat(texts) @ torch.cat(audios).T + table.view(blocks * n, blocks * n)
    target = torch.arange(blocks * n)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def case(n: int, blocks: int, same: float, cross: float) -> Case:
    """Make unit rows of n pairs in every block."""
    audios, texts = (
        [F.normalize(normal(seed + k, n, WIDTH), dim=1).requires_grad_() for k in range(blocks)] for seed in (0, 10)
    )
    third = (audios[2], texts[2]) if blocks == 3 else (None, None)

    def ours() -> Tensor:
        return fn.temporal_nce(audios[0], audios[1], texts[0], texts[1], same, cross, SCALE, *third).loss

    return ours, lambda: tact(audios, texts, same, cross)


def peak(side: int, name: str) -> float:
    """Return the peak memory of one call, minus the memory before it, in megabytes."""
    timed(case(32, *CASES[name][1:])[side])
    function = case(*CASES[name])[side]
    before = status("VmRSS")
    timed(function)
    return round(max(0.0, status("VmHWM") - before), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(int(options.peak[0]), options.peak[1]))
        return
    record: dict[str, Any] = {
        "what": "float32, forward and backward, medians; ratio above 1: ours is faster; megabytes: peak of a process",
        "width": WIDTH, "threads": options.threads, "rounds": options.rounds, "cases": {},
    }  # fmt: skip
    for name, given in CASES.items():
        ours, plain = case(*given)
        rounds = options.rounds * (40 if given[0] <= 256 else 1)
        timed(ours), timed(plain), timed(ours), timed(plain)
        taken = [(timed(ours), timed(plain)) for _ in range(rounds)]
        held = [
            float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            for side in "01"
            for words in [[sys.executable, __file__, "--threads", str(options.threads), "--peak", side, name]]
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


if __name__ == "__main__":
    main()
