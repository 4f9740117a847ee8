"""Compare SepCLR's loss with a transcription of the authors' way: time, value, and peak memory.

    python benchmarks/sepclr.py [--rounds 9] [--threads 1]      writes results/bench/sepclr.json

Both take the same float32 heads of width 32, half of them targets. They run forward and backward, in turn in one process. The
record has the medians over the rounds and the ratio of the medians. A ratio is the transcription's time over ours: above
1 ours is faster. The transcription computes all distances by torch.pdist and torch.cdist. It takes their exponentials, and then
the logarithm of the mean. It holds several matrices of the batch by the batch. Memory is the peak of a separate process of each,
minus its memory before the call.
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


SIDES = {name: Sides(partial(case, n), partial(case, 32)) for name, n in CASES.items()}

if __name__ == "__main__":
    run(SIDES, OUT, __doc__, rounds=9, other="transcription", width=WIDTH)
