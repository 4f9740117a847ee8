"""Compare TNCE with TACT's way of computing it: time, value, and peak memory.

    python benchmarks/teminal.py [--rounds 9] [--threads 1]      writes results/bench/teminal.json

TACT stacks the blocks, stores their whole matrix of logits, adds a matrix of log-weights, and takes two cross-entropies. Both
take the same float32 unit rows of width 256, with a scale of 14. They run forward and backward, in turn in one process. The record
has the medians over the rounds and the ratio of the medians. A ratio is TACT's time over ours: above 1 ours is faster.
Memory is the peak of a separate process of each, minus its memory before the call.

"equal" cases have the paper's weights of 1, "weighted" ones alpha_same 2 and alpha_cross 0.5. Cases of three blocks also have
overlapped rows.
"""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, normal, run
from torch import Tensor

from counterpoint import functional as fn

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


if __name__ == "__main__":
    cases = {
        name: Sides(partial(case, *given), partial(case, 32, *given[1:]), 40 if given[0] <= 256 else 1)
        for name, given in CASES.items()
    }
    run(cases, OUT, __doc__, rounds=9, width=WIDTH)
