"""Compare losses that modify contrastive learning of images with transcriptions of the authors' code.

    python benchmarks/images.py [--rounds 7] [--threads 1]      writes results/bench/images.json

The method is that of benchmarks/alignment.py. CACR has a separate benchmark. n is the number of pairs of views. For MoCHi it is
the number of queries, against a queue of 4,096 with 64 + 16 synthetic negatives each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import rows, run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core.compared import Compared, Queued, views
from counterpoint.systems.images.hard_contrastive import hard_losses
from counterpoint.systems.images.mochi import mixed_losses

OUT = Path(__file__).parents[1] / "results" / "bench" / "images.json"
T = 0.2
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def dcl(n: int, sigma: float | None = None) -> Case:
    z1, z2 = rows(2, n)

    def one_way(a: Tensor, b: Tensor) -> Tensor:
        own, other = a @ a.T / T, a @ b.T / T
        positive = other.diagonal()
        weight = 1.0 if sigma is None else 2 - n * (positive.detach() * T / sigma).softmax(0)
        negatives = torch.cat([own, other], 1)
        gone = torch.eye(n, dtype=torch.bool).repeat(1, 2)
        return (negatives.masked_fill(gone, -torch.inf).logsumexp(1) - weight * positive).mean()

    def plain() -> Tensor:
        a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        return (one_way(a, b) + one_way(b, a)) / 2

    return [z1, z2], lambda: fn.dcl(z1, z2, T, sigma), plain


def isogclr(n: int) -> Case:
    z1, z2 = rows(2, n)
    state = {"s": torch.zeros(n), "u": torch.zeros(n), "tau": torch.full((n,), T)}
    index = torch.arange(n)

    def ours() -> Tensor:
        return fn.isogclr_step(state, index, torch.stack([z1, z2], 1), first_epoch=True)[0]

    def plain() -> Tensor:
        z = torch.cat([z1, z2])
        sim = z @ z.T
        own = torch.arange(2 * n)
        mask = torch.ones(2 * n, 2 * n)
        mask[own, own] = mask[own, (own + n) % (2 * n)] = 0
        tau = state["tau"].repeat(2)[:, None]
        e = (sim.detach() / tau).exp() * mask
        s = e.sum(1, keepdim=True) / (2 * n - 2)
        weight = e / s
        gradient = s[:, 0].log() + 0.4 - (weight * (sim.detach() / tau)).sum(1) / (2 * n - 2)
        u = 0.9 * (gradient[:n] + gradient[n:]).clamp(-6, 6) / 2
        (state["tau"] - 0.03 * u).clamp(0.05, 1.0)  # the temperatures, as ours computes them too
        return ((weight * sim).sum(1) / (2 * n - 2) - sim[own, (own + n) % (2 * n)]).sum() / n

    return [z1, z2], ours, plain


def hard(n: int) -> Case:
    z1, z2 = rows(2, n)

    def ours() -> Tensor:
        (way,) = Compared(z1, z2, views).directions()
        return hard_losses(way, T, 0.3).mean()

    def plain() -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        sim, own = z @ z.T, torch.arange(2 * n)
        positive = sim[own, (own + n) % (2 * n)]
        gone = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
        gone[own, own] = gone[own, (own + n) % (2 * n)] = True
        kept = sim.masked_fill(gone, -torch.inf).topk(int((2 * n - 2) * 0.3), dim=1).values
        return F.cross_entropy(torch.cat([positive[:, None], kept], 1) / T, torch.zeros(2 * n, dtype=torch.long))

    return [z1, z2], ours, plain


def by_index(n: int) -> Case:
    z1, z2 = rows(2, n)
    index = torch.arange(n).repeat(2)

    def plain() -> Tensor:
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        sim = (z @ z.T / T).exp()
        same = index[:, None] == index
        positive = same & ~torch.eye(2 * n, dtype=torch.bool)
        pos, neg = (sim * positive).sum(1), (sim * ~same).sum(1)
        return -(pos / (pos + neg)).log().mean()

    return [z1, z2], lambda: fn.ntxent_by_index(torch.cat([z1, z2]), index, T), plain


def mochi(n: int) -> Case:
    query, key = rows(2, n)
    (queue,) = (x.detach() for x in rows(1, 4096, seed=1))
    random = torch.rand(n, 80, 3, generator=torch.Generator().manual_seed(2))
    split, hardest = 64, 128

    def ours() -> Tensor:
        (way,) = Compared(query, key, Queued(queue), T).directions()
        return mixed_losses(way, T, random, hardest, split).losses.mean()

    def plain() -> Tensor:
        q = F.normalize(query, dim=1)
        k = F.normalize(key.detach(), dim=1)
        known = q @ queue.T
        places = known.detach().topk(hardest, dim=1).indices
        at = (random[..., :2] * hardest).long()
        i, j = places.gather(1, at[..., 0]), places.gather(1, at[:, :split, 1])
        with torch.no_grad():
            alpha, beta = random[:, :split, 2:], random[:, split:, 2:] / 2
            one = F.normalize(alpha * queue[i[:, :split]] + (1 - alpha) * queue[j], dim=2)
            two = F.normalize(beta * q[:, None] + (1 - beta) * queue[i[:, split:]], dim=2)
        made = torch.einsum("nd,nsd->ns", q, torch.cat([one, two], 1))
        logits = torch.cat([(q * k).sum(1, keepdim=True), known, made], 1) / T
        return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))

    return [query, key], ours, plain


def hydra(n: int) -> Case:
    """Make n anchors and keys of 100 classes; the other way gates every key for every anchor, as the first author's code."""
    z1, z2 = rows(2, n)
    g = torch.Generator().manual_seed(0)
    gate, y1 = torch.rand(z1.shape, generator=g), torch.randint(0, 100, (n,), generator=g)
    y2 = y1[torch.randperm(n, generator=g)]

    def plain() -> Tensor:
        one = F.normalize(gate * z1, dim=1)
        two = F.normalize(gate[:, None] * z2[None], dim=2)
        logits = torch.einsum("nd,nkd->nk", one, two) / T
        own, positive = y1 == y1[:, None], y1 == y2[:, None]
        negative = (logits.exp() * ~(own | positive)).sum(1, keepdim=True)
        each = (logits.exp() + negative).log() - logits
        return (each * positive).sum() / positive.sum()

    return [z1, z2], lambda: fn.gated_pair_infonce(z1, z2, y1, y2, gate, T), plain


def sla(n: int) -> Case:
    """Make n pictures with four copies each and 100 classes, with self-distillation."""
    g = torch.Generator().manual_seed(0)
    joint, second = (torch.randn(4 * n, width, generator=g).requires_grad_() for width in (400, 100))
    label = torch.randint(0, 100, (n,), generator=g)

    def plain() -> Tensor:
        loss, votes = torch.zeros(()), []
        for i in range(4):
            loss = loss + F.cross_entropy(joint[i::4], label * 4 + i) / 4
            votes.append(joint[i::4, i::4])
        target = F.softmax(torch.stack(votes).mean(0), dim=1).detach()
        own = second[::4]
        return loss + F.cross_entropy(own, label) + F.kl_div(F.log_softmax(own, 1), target, reduction="batchmean")

    return [joint, second], lambda: fn.sla_loss(joint, label, 4, second), plain


SIZES = (256, 1024, 4096)
CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "dcl": (dcl, SIZES),
    "dclw": (lambda n: dcl(n, 0.5), SIZES),
    "isogclr": (isogclr, SIZES),
    "hard-contrastive": (hard, (256, 1024, 2048)),
    "adainf": (by_index, SIZES),
    "mochi": (mochi, (64, 256, 512)),
    "sla": (sla, (128, 1024)),
    "hydra": (hydra, (256, 1024)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__)
