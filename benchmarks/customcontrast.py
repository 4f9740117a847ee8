"""Compare the losses of CustomContrast with the usual ways of computing them: time, value, and peak memory.

    python benchmarks/customcontrast.py [--rounds 3] [--threads 1]      writes results/bench/customcontrast.json

"MACL" cases: pseudo-words of n subjects in 4 layers, with the real similarity from features of width 64. The usual way stores the
matrix of real similarities and that of every layer. "CSCL" cases: codes of both modalities, against the stored matrix.

Both ways take the same float32 rows of width 64. They run forward and backward, in turn in one process. The record has the medians
over the rounds and the ratio of the medians. A ratio is the usual time over ours: above 1 ours is faster. Memory is the
peak of a separate process of each, minus its memory before the call.
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

OUT = Path(__file__).parents[1] / "results" / "bench" / "customcontrast.json"
WIDTH, LAYERS, TAU = 64, 4, 0.07


def stored(anchors: Tensor, positives: Tensor, features: Tensor) -> Tensor:
    """Compute MACL with whole matrices."""
    r = F.normalize(features, dim=1)
    weight = (1 - (r @ r.T).clamp(0, 1)).fill_diagonal_(0.0)
    a, p = F.normalize(anchors, dim=2), F.normalize(positives, dim=2)
    own = (a * p).sum(2) / TAU
    negatives = (a @ a.transpose(1, 2) / TAU + weight.log()).logsumexp(2)
    return (torch.logaddexp(own, negatives) - own).mean()


def codes(visual: Tensor, textual: Tensor) -> Tensor:
    """Compute CSCL with a stored matrix."""
    s = F.normalize(visual, dim=1) @ F.normalize(textual, dim=1).T / TAU
    target = torch.arange(len(s))
    return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2


def words_of(n: int) -> Case:
    """Make pseudo-words of n subjects."""
    a, p = (torch.stack([normal(seed + k, n, WIDTH) for k in range(LAYERS)]).requires_grad_() for seed in (0, 9))
    features, subjects = normal(20, n, WIDTH), torch.arange(n)
    return lambda: fn.macl(a, p, fn.subject_similarity(features, subjects), TAU), lambda: stored(a, p, features)


def codes_of(n: int) -> Case:
    """Make codes of n subjects."""
    v, u = (normal(seed, n, WIDTH).requires_grad_() for seed in (0, 1))
    return lambda: fn.cscl(v, u, TAU), lambda: codes(v, u)


if __name__ == "__main__":
    cases = {f"MACL, {n:,} subjects": (words_of, n) for n in (64, 512, 2048)}
    cases |= {f"CSCL, {n:,} subjects": (codes_of, n) for n in (64, 2048)}
    run(
        {name: Sides(partial(make, n), partial(make, 16), 10 if n <= 64 else 1) for name, (make, n) in cases.items()},
        OUT,
        __doc__,
        rounds=3,
        width=WIDTH,
    )
