"""Compare Hybrid Distill's losses and dropping with the authors' way: time, value, and peak memory.

    python benchmarks/hybrid_distill.py [--rounds 5] [--threads 1]      writes results/bench/hybrid-distill.json

Hybrid Distill has no public code. So the transcriptions are those of the two losses that it combines: TinyMIM's relations by
softmax, logarithm and KL, and FD's smooth L1 of normalised tokens. The transcription of the dropping has the matrix of cosines.
Both take the same float32 tensors, in turn in one process. The sizes are those of ViT-B/16: 12 heads of 64, 197 tokens.
The last case is a training step of vit-s on 32 pictures of 32 pixels: with a keep_ratio of 0.7 ("ours") and without dropping.
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
from torch import Tensor, nn

from counterpoint import functional as fn
from counterpoint.core.tokens import drop_redundant_tokens
from counterpoint.encoders.inside import TokenNetwork
from counterpoint.encoders.vision_transformers import vit_s

OUT = Path(__file__).parents[1] / "results" / "bench" / "hybrid-distill.json"
HEADS, TOKENS, WIDTH = 12, 197, 64


def relations(n: int) -> Case:
    """Make queries, keys and values of both networks for n pictures."""
    shape = (n, HEADS, TOKENS, WIDTH)
    student = [normal(s, *shape).requires_grad_() for s in range(3)]
    teacher = [normal(s + 3, *shape) for s in range(3)]

    def plain() -> Tensor:
        total = torch.zeros(())
        for a, b in ((0, 1), (2, 2)):
            own = F.softmax(student[a] @ student[b].transpose(-2, -1) * WIDTH**-0.5, dim=-1)
            wanted = F.softmax(teacher[a] @ teacher[b].transpose(-2, -1) * WIDTH**-0.5, dim=-1)
            total = total + F.kl_div(own.log(), wanted, reduction="none").sum(-1).mean()
        return total

    return lambda: fn.relation_distillation_loss(student, teacher), plain


def features(n: int) -> Case:
    """Make the last tokens of both networks for n pictures, and the projection."""
    dim = HEADS * WIDTH
    student, teacher, layer = normal(0, n, TOKENS, dim).requires_grad_(), normal(1, n, TOKENS, dim), nn.Linear(dim, dim)

    def plain() -> Tensor:
        target = F.layer_norm(teacher, (dim,))
        return F.smooth_l1_loss(layer(student), target, beta=2.0)

    return lambda: fn.feature_distillation_loss(student, teacher, layer), plain


def dropping(n: int) -> Case:
    """Make the tokens of n pictures; the result is the sum of the kept positions."""
    tokens = normal(0, n, TOKENS, HEADS * WIDTH).requires_grad_()

    def plain() -> Tensor:
        z = F.normalize(tokens[:, 1:].detach(), dim=2)
        cosine = z @ z.transpose(1, 2)
        rho = (cosine.sum(2) - cosine.diagonal(dim1=1, dim2=2)) / (TOKENS - 2)
        kept = rho.argsort(dim=1, stable=True)[:, :138].sort(1).values
        return kept.double().add(1).sum() + 0 * tokens[0, 0, 0]

    return lambda: fn.drop_redundant_tokens(tokens, 0.7).double().sum() + 0 * tokens[0, 0, 0], plain


def step(n: int) -> Case:
    """Make a student of n pictures, run with and without dropping before three of its layers."""
    torch.manual_seed(0)
    network, images = TokenNetwork(vit_s(32, patch=4), "vit-s", 32), normal(0, n, 3, 32, 32)

    def ours() -> Tensor:
        choose = dict.fromkeys((0, 1, 2), drop_redundant_tokens)
        return network.dropping(images, choose, [2]).tokens.square().mean()

    return ours, lambda: network(images, [2]).tokens.square().mean()


CASES: dict[str, tuple[Any, int]] = {
    "relations, 8 pictures": (relations, 8),
    "relations, 32 pictures": (relations, 32),
    "features, 32 pictures": (features, 32),
    "dropping, 32 pictures": (dropping, 32),
    "student with dropping against without, 32 pictures": (step, 32),
}


SIDES = {name: Sides(partial(make, n), partial(make, 1), equal=make is not step) for name, (make, n) in CASES.items()}

if __name__ == "__main__":
    facts = {"heads": HEADS, "tokens": TOKENS, "width": WIDTH}
    run(SIDES, OUT, __doc__, rounds=5, other="transcription", **facts)
