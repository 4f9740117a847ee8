"""Compare CMD's loss with transcriptions of the authors' way: time, value, and peak memory.

    python benchmarks/cmd.py [--rounds 5] [--threads 1]      writes results/bench/cmd.json

Both take the same float32 outputs and features, forward and backward, in turn in one process. The record has the medians over
the rounds and the median of the rounds' ratios. A ratio is the transcription's time over ours: above 1 ours is faster. There are
10 crops, with 49 regions in the two global ones and 9 in the others, of width 768. The transcription loops over pairs of crops.
For each pair it computes similarities, gathers matches, and computes the student's log-softmax anew, as the released code does.
The inter-level term is the corrected one in both. Memory is the peak of a separate process of each, minus its memory before the
call.
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

OUT = Path(__file__).parents[1] / "results" / "bench" / "cmd.json"
CROPS, GRID, LOCAL, DIM = 10, 49, 9, 768
STUDENT, TEACHER = 0.1, 0.05


def case(b: int, outcomes: int, inter: str, pooling: str = "mean") -> Case:
    """Make the outputs of b pictures."""
    counts = [GRID] * 2 + [LOCAL] * (CROPS - 2)
    rows = b * sum(counts)
    student = [normal(0, CROPS * b, outcomes).tanh_(), normal(1, rows, outcomes).tanh_()]
    student = [x.requires_grad_() for x in student]
    features, theirs = normal(2, rows, DIM), normal(3, 2 * b * GRID, DIM)
    teacher = [normal(4, 2 * b, outcomes).tanh_(), normal(5, 2 * b * GRID, outcomes).tanh_()]
    center, center_grid = torch.zeros(1, outcomes), torch.zeros(1, outcomes)

    def ours() -> Tensor:
        given: Any = (*student, features, *teacher, theirs)
        others: Any = ([GRID, LOCAL], CROPS, center, center_grid, STUDENT, TEACHER)
        return fn.cmd_loss(*given, *others, inter=inter, pooling=pooling).loss

    def plain() -> Tensor:
        p = F.softmax((teacher[0] - center) / TEACHER, -1).chunk(2)
        grid = [x.view(b, GRID, -1) for x in F.softmax((teacher[1] - center_grid) / TEACHER, -1).chunk(2)]
        t_feat = [x.view(b, GRID, -1) for x in theirs.chunk(2)]
        images = (student[0] / STUDENT).chunk(CROPS)
        sizes = [b * count for count in counts]
        outputs = [x.view(b, n, -1) for x, n in zip((student[1] / STUDENT).split(sizes), counts, strict=True)]
        own = [x.view(b, n, -1) for x, n in zip(features.split(sizes), counts, strict=True)]
        total, pairs = torch.zeros(()), 0
        for q in range(2):
            for v in range(CROPS):
                if v == q:
                    continue
                loss = 0.5 * (-p[q] * F.log_softmax(images[v], -1)).sum(-1).mean()
                similar = F.normalize(own[v], dim=-1) @ F.normalize(t_feat[q], dim=-1).transpose(1, 2)
                at = similar.max(2)[1]
                matched = grid[q].gather(1, at[..., None].expand(-1, -1, outcomes))
                loss = loss + 0.5 * (-matched * F.log_softmax(outputs[v], -1)).sum(-1).mean(-1).mean()
                if inter == "within":
                    weight = torch.full((b, counts[v]), 1 / counts[v])
                    if pooling == "attention":
                        cosine = F.cosine_similarity(own[v], own[v].mean(1, keepdim=True), dim=2)
                        weight = (cosine / 0.1).softmax(1)
                    bag = (weight[..., None] * F.softmax(outputs[v], -1)).sum(1)
                    log_q = F.log_softmax(images[v], -1)
                    loss = loss + (bag * ((bag + 1e-12).log() - log_q)).sum(-1).mean()
                total, pairs = total + loss, pairs + 1
        return total / pairs

    return ours, plain


CASES: dict[str, tuple[Any, ...]] = {
    "EsViT, 4 pictures, 8,192 outcomes": (4, 8192, "none"),
    "EsViT, 1 picture, 65,536 outcomes": (1, 65536, "none"),
    "CMD, mean, 4 pictures, 8,192 outcomes": (4, 8192, "within"),
    "CMD, attention, 4 pictures, 8,192 outcomes": (4, 8192, "within", "attention"),
    "CMD, mean, 64 pictures, 256 outcomes": (64, 256, "within"),
}


def peak(side: int, name: str) -> float:
    """Return the peak memory of one call, minus the memory before it, in megabytes."""
    sizes = CASES[name]
    timed(case(1, 64, *sizes[2:])[side])
    function = case(*sizes)[side]
    before = status("VmRSS")
    timed(function)
    return round(max(0.0, status("VmHWM") - before), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
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
        "crops": CROPS, "regions": [GRID, LOCAL], "dim": DIM, "threads": options.threads, "rounds": options.rounds,
        "cases": {},
    }  # fmt: skip
    for name, sizes in CASES.items():
        ours, plain = case(*sizes)
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
