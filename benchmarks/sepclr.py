"""Compare SepCLR's loss with a transcription of the authors' way: time, value, and peak memory.

    python benchmarks/sepclr.py [--rounds 9] [--threads 1]      writes results/bench/sepclr.json

Both take the same float32 heads of width 32, half of them targets. They run forward and backward, in turn in one process. The
record has the medians over the rounds and the median of the rounds' ratios. A ratio is the transcription's time over ours: above
1 ours is faster. The transcription computes all distances by torch.pdist and torch.cdist. It takes their exponentials, and then
the logarithm of the mean. It holds several matrices of the batch by the batch. Memory is the peak of a separate process of each,
minus its memory before the call.
"""

from __future__ import annotations

import argparse
import json
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

OUT = Path(__file__).parents[1] / "results" / "bench" / "sepclr.json"
WIDTH = 32
SALIENT, BACKGROUND, JEM = 1.0, 100.0, 10.0
CASES = {"128 rows": 128, "256 rows": 256, "512 rows": 512, "1,024 rows": 1024, "4,096 rows": 4096}


def align(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).norm(dim=1).pow(2).mean()


def uniform(x: Tensor) -> Tensor:
    return torch.pdist(x).pow(2).mul(-1).exp().mean().log()


def joint_entropy(c: Tensor, s: Tensor) -> Tensor:
    kernels = torch.cdist(s, s).pow(2).mul(-1).exp() * torch.cdist(c, c).pow(2).mul(-1).exp()
    return kernels.mean(1).log().mean()


def case(n: int) -> Case:
    """Make the heads of n pictures."""
    heads = [(0.3 * normal(number, n, WIDTH)).requires_grad_() for number in range(4)]
    target = torch.arange(n) % 2

    def ours() -> Tensor:
        return fn.sepclr_loss(*heads, target, SALIENT, BACKGROUND, JEM)["loss"]

    def plain() -> Tensor:
        n1, n2 = (F.normalize(x, dim=1) for x in heads[:2])
        s1, s2 = heads[2:]
        chosen = target.bool()
        k1, k2 = (x * target[:, None] for x in (s1, s2))
        zero = torch.zeros_like(s1[~chosen])
        common = align(n1, n2) + uniform(n1) + uniform(n2)
        salient = align(s1[chosen], s2[chosen]) + uniform(k1) + uniform(k2)
        background = (align(s1[~chosen], zero) + align(s2[~chosen], zero)) / 2
        jem = (joint_entropy(n1, k1) + joint_entropy(n2, k2)) / 2
        return common + SALIENT * salient + BACKGROUND * background + JEM * jem

    return ours, plain


def peak(side: int, name: str) -> float:
    """Return the peak memory of one call, minus the memory before it, in megabytes."""
    timed(case(32)[side])
    function = case(CASES[name])[side]
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
    for name, n in CASES.items():
        ours, plain = case(n)
        timed(ours), timed(plain)
        rounds = [(timed(ours), timed(plain)) for _ in range(options.rounds)]
        held = [
            float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            for side in "01"
            for words in [[sys.executable, __file__, "--threads", str(options.threads), "--peak", side, name]]
        ]
        found = {
            "ours_s": round(statistics.median(a[0] for a, _ in rounds), 5),
            "transcription_s": round(statistics.median(b[0] for _, b in rounds), 5),
            "ratio": round(statistics.median(b[0] / a[0] for a, b in rounds), 2),
            "ours_megabytes": held[0],
            "transcription_megabytes": held[1],
            "values_apart": float(f"{float((rounds[0][0][1] - rounds[0][1][1]).abs()):.1e}"),
        }
        record["cases"][name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
    options.out.write_text(json.dumps(record | {"machine": machine(), "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
