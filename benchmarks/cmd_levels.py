"""Compare CMD's loss with transcriptions of the authors' way: time, value, and peak memory.

    python benchmarks/cmd_levels.py [--rounds 5] [--threads 1]      writes results/bench/cmd.json

Both take the same float32 outputs and features, forward and backward, in turn in one process. The record has the medians over
the rounds and the ratio of the medians. A ratio is the transcription's time over ours: above 1 ours is faster. There are
10 crops, with 49 regions in the two global ones and 9 in the others, of width 768. The transcription loops over pairs of crops.
For each pair it computes similarities, gathers matches, and computes the student's log-softmax anew, as the released code does.
The inter-level term is the corrected one in both. Memory is the peak of a separate process of each, minus its memory before the
call.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, normal, run
from torch import Tensor

from counterpoint import functional as fn

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


SIDES = {name: Sides(partial(case, *sizes), partial(case, 1, 64, *sizes[2:])) for name, sizes in CASES.items()}

if __name__ == "__main__":
    facts = {"crops": CROPS, "regions": [GRID, LOCAL], "dim": DIM}
    run(SIDES, OUT, __doc__, rounds=5, other="transcription", **facts)
