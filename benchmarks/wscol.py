"""Compare WSCoL's contrast, far positives and clustering with the authors' way: whole matrices, and loops over rows.

    python benchmarks/wscol.py [--rounds 31] [--threads 1]      writes results/bench/wscol.json

n is the number of regions; the authors have 300 of a picture. Rows are 512 wide. The transcription of the contrast has four
n x n matrices. That of the far positives is a loop over rows. A timing is the mean of several calls in a row (`calls`: ours,
theirs). Both ways take turns, timing by timing. The record has medians.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "wscol.json"
DIM, CLASSES, TAU = 512, 8, 0.07


def made(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw strong rows, weak rows and labels, of which the last class is the background."""
    generator = torch.Generator().manual_seed(0)
    strong, weak = (torch.randn(n, DIM, generator=generator) for _ in range(2))
    return strong.requires_grad_(), weak, torch.randint(CLASSES + 1, (n,), generator=generator)


def authors(strong: Tensor, labels: Tensor, far: Tensor | None) -> Tensor:
    """Compute the loss from matrices."""
    z = F.normalize(strong, dim=1)
    logits = z @ z.T / TAU
    logits = logits - logits.max(1, keepdim=True).values.detach()
    log_p = logits - torch.log(torch.exp(logits).sum(1, keepdim=True))
    mask = torch.eq(labels[:, None], labels[None]).float()
    if far is not None:
        mask = mask * (1 - far)
    rows = -0.5 * (mask * log_p).sum(1) / (mask.sum(1) + (0.0 if far is None else 1e-5))
    return rows[rows != 0].mean()


def contrast(n: int) -> Any:
    strong, _, labels = made(n)
    return [strong], lambda: fn.weak_guided_contrast(strong, labels), lambda: authors(strong, labels, None)


def masked(n: int) -> Any:
    strong, weak, labels = made(n)
    far = fn.hard_positive_mask(weak, labels, CLASSES)
    return (
        [strong],
        lambda: fn.weak_guided_contrast(strong, labels, TAU, far),
        lambda: authors(strong, labels, far),
    )


def far_positives(n: int) -> Any:
    strong, weak, labels = made(n)

    def plain() -> Tensor:
        z = F.normalize(weak, dim=1)
        similarity = z @ z.T
        mask = torch.zeros(n, n)
        for i in range(n):
            own = labels == labels[i]
            count = int(own.sum())
            if labels[i] == CLASSES or count < 2:
                continue
            row = similarity[i].clone()
            row[i] = -2
            near = torch.zeros(n, dtype=torch.bool)
            near[row.topk(count - 1).indices] = True
            mask[i] = (own & ~near).float()
            mask[i, i] = 0
        return mask.sum() + strong.sum() * 0

    return [strong], lambda: fn.hard_positive_mask(weak, labels, CLASSES).sum() + strong.sum() * 0, plain


def clustering(n: int) -> Any:
    strong, weak, labels = made(n)
    logits = 2 * F.one_hot(labels, CLASSES + 1) + torch.randn(
        n, CLASSES + 1, generator=torch.Generator().manual_seed(1)
    )
    prototypes = torch.stack([weak[labels == c].mean(0) for c in range(CLASSES)])
    index = torch.arange(0, n, 5)
    given = labels[index]

    def plain() -> Tensor:
        rows = F.normalize(torch.cat([weak, torch.ones(n, 1)], 1), dim=1)
        first = F.normalize(torch.cat([prototypes, torch.ones(CLASSES, 1)], 1), dim=1)
        affinity = logits.softmax(1)
        found = affinity.argmax(1)
        for step in range(4):
            centroids = affinity.T @ rows / (1e-8 + affinity.sum(0)[:, None])
            if step == 0:
                centroids[:CLASSES] = first
            kept = torch.where(torch.eye(CLASSES + 1)[found].sum(0) > 0)[0]
            distance = torch.cdist(rows, centroids[kept])
            found = kept[distance.argmin(1)]
            found[index] = given
            affinity = torch.eye(CLASSES + 1)[found]
        return distance.sum() + strong.sum() * 0

    def ours() -> Tensor:
        return fn.prototype_clustering(weak, logits, prototypes, index, given).distance.sum() + strong.sum() * 0

    return [strong], ours, plain


def kept_bytes(inputs: list[Tensor], loss: Any) -> int:
    """Count the bytes that the forward pass keeps for the backward pass."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(held.values())


CASES = {
    "contrast": (contrast, (300, 4096)),
    "contrast, far": (masked, (300,)),
    "far positives": (far_positives, (300,)),
    "clustering": (clustering, (300,)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM, memory=kept_bytes, rounds=31, lasts=0.02)
