"""Compare COCONUT's contrasts with a plain way of writing them: time, value, and peak memory.

    python benchmarks/coconut.py [--rounds 15] [--threads 1]      writes results/bench/coconut.json

The authors published no code. The plain way follows the equations with whole matrices and masks, as common implementations of
SupCon do. Both take the same float32 embeddings of width 256. One fifth of the rows is rehearsed, and there are 20 classes. They
run forward and backward, in turn in one process. The record has the medians over the rounds and the ratio of the
medians. A ratio is the plain way's time over ours: above 1 ours is faster. Memory is the peak of a separate process of each, minus
its memory before the call.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, normal, run
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "coconut.json"
WIDTH, CLASSES, TAU = 256, 20, 0.1
SIZES = {"32 rows": 32, "256 rows": 256, "1,024 rows": 1024, "4,096 rows": 4096}
CASES = {f"{loss}, {name}": (loss, n) for loss in ("nspt", "mm") for name, n in SIZES.items()}


def plain_nspt(student: Tensor, teacher: Tensor, labels: Tensor, rehearsal: Tensor) -> Tensor:
    a, b = F.normalize(student, dim=1), F.normalize(teacher, dim=1).detach()
    towards, against = a @ b.T / TAU, a @ a.T / TAU
    others = 1 - torch.eye(len(a))
    log_sum = torch.log((against.exp() * others).sum(1, keepdim=True))
    positive = (labels[:, None] == labels[None]).float() * rehearsal[None]
    losses = -(positive * (towards - log_sum)).sum(1) / positive.sum(1).clamp(min=1)
    return losses[rehearsal].mean()


def plain_mm(audio: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    a, t = F.normalize(audio, dim=1), F.normalize(text, dim=1)
    logits = a @ t.T / TAU
    positive = (labels[:, None] == labels[None]).float()
    ways = [-(positive * F.log_softmax(found, dim=1)).sum(1) / positive.sum(1) for found in (logits, logits.T)]
    return (ways[0].mean() + ways[1].mean()) / 2


def case(name: str, n: int) -> Case:
    """Make the embeddings of n items."""
    one, other = normal(0, n, WIDTH).requires_grad_(), normal(1, n, WIDTH).requires_grad_(name == "mm")
    labels = torch.arange(n) % CLASSES
    rehearsal = torch.arange(n) % 5 == 0
    if name == "mm":
        return lambda: fn.coconut_mm(one, other, labels, TAU), lambda: plain_mm(one, other, labels)
    return lambda: fn.coconut_nspt(one, other, labels, rehearsal, TAU), lambda: plain_nspt(
        one, other, labels, rehearsal
    )


if __name__ == "__main__":
    cases = {
        name: Sides(partial(case, loss, n), partial(case, loss, 32), 20 if n <= 256 else 1)
        for name, (loss, n) in CASES.items()
    }
    run(cases, OUT, __doc__, rounds=15, width=WIDTH)
