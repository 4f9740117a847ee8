"""Compare PixContrast, the dense contrast of two maps, with whole matrices of similarities: time, value, and peak memory.

    python benchmarks/pix_contrast.py [--rounds 5] [--threads 1]      writes results/bench/pix_contrast.json

The plain way stores the similarities of all cells, and a mask of the near ones. Both ways take float32 maps of 256 channels. They
run forward and backward, in turn in one process. The record has the medians over the rounds and the ratio of
the medians: above 1 ours is faster. Memory is the peak of a separate process of each, minus its memory before the call. Ours takes
whole matrices too where the maps are small, and the kernel from 2^25 similarities on.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from pixpro import all_distances, crops
from sides import Case, Sides, normal, run
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "pix_contrast.json"
CHANNELS, T = 256, 0.3
CASES = {f"{n} pictures, {side} x {side}": (n, side) for n, side in ((128, 7), (32, 14), (8, 28), (4, 56), (8, 56))}


def case(n: int, side: int) -> Case:
    """Make maps and crops of n pictures."""
    proj = [normal(k, n, CHANNELS, side, side).requires_grad_() for k in range(2)]
    keys = [normal(10 + k, n, CHANNELS, side, side) for k in range(2)]
    one, two = crops(n)

    def direction(x: Tensor, key: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows, columns = F.normalize(x, dim=1).flatten(2), F.normalize(key, dim=1).flatten(2)
        s = torch.bmm(rows.transpose(1, 2), columns) / T
        near = all_distances(a, b, side) > 0
        has = near.any(2)
        own = s.masked_fill(~near, torch.finfo(s.dtype).min).logsumexp(2)
        each = torch.where(has, s.logsumexp(2) - own, 0.0)
        return (each.sum(1) / has.sum(1).clamp(min=1)).mean() / 2

    def plain() -> Tensor:
        return direction(proj[0], keys[1], one, two) + direction(proj[1], keys[0], two, one)

    return lambda: fn.pix_contrast(*proj, *keys, one, two, T), plain


if __name__ == "__main__":
    cases = {
        name: Sides(partial(case, *given), partial(case, 2, 7), 20 if given[1] <= 7 else 1)
        for name, given in CASES.items()
    }
    run(cases, OUT, __doc__, rounds=5, channels=CHANNELS)
