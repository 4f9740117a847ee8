"""Compare KD3's losses, mixing and selection with transcriptions of the authors' way: time, value, and kept memory.

    python benchmarks/kd3.py [--rounds 7] [--threads 1]      writes results/bench/kd3.json

The method is that of benchmarks/alignment.py. n is the number of pictures. Maps have 512 channels of 4 x 4 positions, pictures
32 x 32 pixels, pooled features 512 numbers; there are 100 classes. The selection has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor, nn

from counterpoint import functional as fn
from counterpoint.systems.distillation.kd3 import Embed

OUT = Path(__file__).parents[1] / "results" / "bench" / "kd3.json"
DIM, CLASSES, T = 512, 100, 0.3
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def feature(n: int) -> Case:
    student, teacher = normal(0, n, DIM, 4, 4).requires_grad_(), normal(1, n, DIM, 4, 4)
    one, other = normal(2, n, CLASSES), normal(3, n, CLASSES)

    def plain() -> Tensor:
        weight = F.pairwise_distance(one, other).sigmoid().view(-1, 1, 1, 1)
        return (weight * F.mse_loss(student, teacher, reduction="none")).mean()

    return [student], lambda: fn.weighted_feature_loss(student, teacher, one, other), plain


def contrast(n: int) -> Case:
    """Contrast both copies of n pictures behind an embedding; the other way keeps the matrix and a mask."""
    a, b = normal(0, n, DIM).requires_grad_(), normal(1, n, DIM).requires_grad_()
    embed, linear = Embed(DIM, 128), nn.Linear(DIM, 128)
    linear.load_state_dict(embed.state_dict())
    nt_xent = fn.of("kd3").nt_xent

    def plain() -> Tensor:
        z = torch.cat([F.normalize(linear(a), dim=1), F.normalize(linear(b), dim=1)])
        similar = (z @ z.T / T).exp()
        others = ~torch.eye(2 * n, dtype=torch.bool)
        negative = similar.masked_select(others).view(2 * n, -1).sum(1)
        positive = ((z[:n] * z[n:]).sum(1) / T).exp().repeat(2)
        return -(positive / negative).log().mean()

    return [a, b], lambda: nt_xent(embed(a), embed(b), T), plain


def mixing(n: int) -> Case:
    x, lam = normal(0, n, 3, 32, 32).requires_grad_(), torch.rand(n, generator=torch.Generator().manual_seed(1))
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(2))

    def plain() -> Tensor:
        mu = x.mean((2, 3), keepdim=True).detach()
        sigma = (x.var((2, 3), keepdim=True) + 1e-6).sqrt().detach()
        share = lam.view(-1, 1, 1, 1)
        new_mu, new_sigma = share * mu + (1 - share) * mu[perm], share * sigma + (1 - share) * sigma[perm]
        return ((x - mu) / sigma * new_sigma + new_mu).sum()

    return [x], lambda: fn.mix_distribution(x, lam, perm).sum(), plain


def selection(n: int) -> Case:
    teacher, student = 3 * normal(0, n, CLASSES), 3 * normal(1, n, CLASSES)

    def plain() -> Tensor:
        confidence, predicted = (0.7 * teacher + 0.3 * student).softmax(1).max(1)
        beta = torch.tensor([float((predicted == label).sum()) for label in range(CLASSES)])
        beta = beta / beta.max()
        threshold = torch.stack([0.95 * beta[label] / (2 - beta[label]) for label in predicted.tolist()])
        return (confidence > threshold).sum()

    return [], lambda: fn.dynamic_selection(teacher, student, 0.7).sum(), plain


def kept_bytes(inputs: list[Tensor], loss: Any) -> int:
    """Count the bytes that the forward pass keeps for the backward pass."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(held.values())


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "feature": (feature, (128, 1024)),
    "contrast": (contrast, (256, 1024, 4096)),
    "mixing": (mixing, (128, 1024)),
    "selection": (selection, (2000, 50000)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM, memory=kept_bytes)
