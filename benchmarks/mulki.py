"""Compare MulKI's loss with a direct transcription of its steps, forward and backward: time and value.

    python benchmarks/mulki.py [--rounds 7]      writes results/bench/mulki.json

No code of the authors exists. The transcription computes each softmax and divergence by PyTorch's functions, one teacher and one
term after the other. A batch of 64 is ZSCL's. Ratios above 1: ours is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from alignment import run
from gopro import drawn
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "mulki.json"
DIM, SCALE, T = 512, 100.0, 2.0


def of_loss(n: int, classes: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """Make n pictures of some classes, with two teachers."""
    z, w = drawn(n, DIM, seed=0).requires_grad_(), drawn(classes, DIM, seed=1).requires_grad_()
    old_z, old_w = drawn(2, n, DIM, seed=2), drawn(2, classes, DIM, seed=3)
    bank, labels = drawn(classes, DIM, seed=4), torch.arange(n) % classes

    def relations(new: Tensor, old: Tensor, rows: Tensor) -> Tensor:
        target = F.softmax(SCALE / T * old @ rows.T, dim=1)
        return F.kl_div(F.log_softmax(SCALE / T * new @ rows.T, dim=1), target, reduction="none").sum(1)

    def plain() -> Tensor:
        x, text, p = F.normalize(z, dim=1), F.normalize(w, dim=1), F.normalize(bank, dim=1)
        past, words = F.normalize(old_z, dim=2), F.normalize(old_w, dim=2)
        every = torch.arange(classes)
        loss = F.cross_entropy(SCALE * x @ text.T, labels)
        logits = SCALE * text @ p.T
        loss = loss + 0.1 * (F.cross_entropy(logits, every) + F.cross_entropy(logits.T, every)) / 2
        weight = torch.stack(
            [-F.cross_entropy(SCALE * past[j] @ words[j].T, labels, reduction="none") for j in (0, 1)], 1
        ).softmax(1)
        one_hot = F.one_hot(labels, classes).to(x.dtype)
        count = one_hot.sum(0)[:, None]
        of_class = torch.where(count > 0, one_hot.T @ weight / count.clamp(min=1), weight.mean(0))
        for j in (0, 1):
            of_image = (x - past[j]).square().sum(1) + relations(x, past[j], words[j]) + relations(x, past[j], p)
            loss = loss + (weight[:, j] * of_image).mean() + (of_class[:, j] * relations(text, words[j], p)).mean()
        return loss

    return [z, w], lambda: fn.mulki_loss(z, w, labels, old_z, old_w, bank, SCALE).loss, plain


CASES = {
    "10 classes": (lambda n: of_loss(n, 10), (64, 1024)),
    "100 classes": (lambda n: of_loss(n, 100), (64, 1024)),
    "1,000 classes": (lambda n: of_loss(n, 1000), (64,)),
}


if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM)
