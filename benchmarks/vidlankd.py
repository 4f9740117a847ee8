"""Compare VidLanKD's losses and Mod-X's with transcriptions of the authors' way: time, value, and kept memory.

    python benchmarks/vidlankd.py [--rounds 7] [--threads 1]      writes results/bench/vidlankd.json

The method is that of benchmarks/alignment.py. n is the number of sentences, of 126 tokens with 768 numbers. For `mod_x` it is the
number of pairs with 512 numbers. The authors' contrast makes a matrix for each position in a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from alignment import run
from kd3 import kept_bytes, normal
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "vidlankd.json"
TOKENS, DIM, PAIRED = 126, 768, 512
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def tokens(n: int) -> tuple[Tensor, Tensor]:
    return normal(0, n, TOKENS, DIM).requires_grad_(), normal(1, n, TOKENS, DIM)


def hinge(n: int) -> Case:
    lang, _ = tokens(n)
    video, mask = F.normalize(normal(2, n, DIM), dim=1).requires_grad_(), torch.ones(n, TOKENS)

    def plain() -> Tensor:
        total = 0.0
        for one, other in ((slice(n // 2), slice(n // 2, n)), (slice(n // 2, n), slice(n // 2))):
            right = (lang[one] * video[one][:, None]).sum(2)
            wrong = (lang[one] * video[other][:, None]).sum(2)
            total = total + (F.relu(1 - right + wrong) * mask[one]).sum()
        return total / mask.sum()

    return [lang, video], lambda: fn.paired_hinge_loss(lang, video, mask), plain


def nst(n: int) -> Case:
    student, teacher = tokens(n)

    def plain() -> Tensor:
        s, t = (F.normalize(x, dim=2).mT for x in (student, teacher))
        total = 0.0
        for one, other in zip(F.normalize(s, dim=2), F.normalize(t, dim=2), strict=True):
            total = total + (one @ one.T).square().mean() - 2 * (one @ other.T).square().mean()
        return total / TOKENS

    return [student], lambda: fn.nst_loss(student, teacher), plain


def contrast(n: int) -> Case:
    student, teacher = tokens(n)
    own, target = ~torch.eye(2 * n, dtype=torch.bool), (torch.arange(2 * n) + n) % (2 * n)

    def plain() -> Tensor:
        total = 0.0
        for j in range(TOKENS):
            z = torch.cat([F.normalize(student[:, j], dim=1), F.normalize(teacher[:, j], dim=1)])
            logits = (z @ z.T).masked_fill(~own, -torch.inf)
            total = total + F.cross_entropy(logits, target) / (2 * n)
        return total / TOKENS

    return [student], lambda: fn.token_contrastive_loss(student, teacher), plain


def mod_x(n: int) -> Case:
    new = [normal(seed, n, PAIRED).requires_grad_() for seed in (0, 1)]
    base = normal(2, n, PAIRED)
    old = [base, base + 4 * normal(3, n, PAIRED)]

    def plain() -> Tensor:
        u, w, old_u, old_w = (F.normalize(x, dim=1) for x in (*new, *old))
        similar, before, at = u @ w.T, old_u @ old_w.T, torch.arange(n)
        loss = (F.cross_entropy(similar * 20, at) + F.cross_entropy(similar.T * 20, at)) / 2
        for now, then in ((similar, before), (similar.T, before.T)):
            kept = torch.where((then.argmax(1) == at)[:, None], then, now)
            loss = loss + 20 * F.kl_div(now.log_softmax(1), kept.softmax(1), reduction="sum") / 2
        return loss

    scale = float(torch.tensor(20.0).log())
    return new, lambda: fn.mod_x(*new, *old, scale).loss, plain


CASES: dict[str, tuple[Callable[[int], Case], tuple[int, ...]]] = {
    "hinge": (hinge, (32, 128)),
    "nst": (nst, (8, 32)),
    "contrast": (contrast, (32, 128)),
    "mod_x": (mod_x, (280, 2048)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM, memory=kept_bytes)
