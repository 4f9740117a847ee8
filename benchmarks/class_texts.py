"""Compare losses of teachers of pictures and texts, SWAD and a step with kept teacher's rows with the plain ways.

    python benchmarks/class_texts.py [--rounds 7] [--threads 1]      writes results/bench/class-texts.json

vl2v: pictures in a batch, rows 512 wide. vlm: the same with 200 classes; the plain way stores the matrices. swad: weights in
thousands; the plain way keeps deep copies of modules. step: pictures in a batch of vlm-ood-distill. There the plain way asks
the teacher (vit-s, 32 pixels) at each step, and ours reads its kept rows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor, nn
from wscol import kept_bytes

from counterpoint import functional as fn
from counterpoint.core.loss_valley import LossValley
from counterpoint.encoders.images import build_image_encoder
from counterpoint.engine.teachers import Cached

OUT = Path(__file__).parents[1] / "results" / "bench" / "class-texts.json"
DIM, CLASSES, T = 512, 200, 0.07


def made(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher, text = (torch.randn(count, DIM, generator=generator) for count in (n, n, CLASSES))
    return student.requires_grad_(), teacher, text, torch.randint(CLASSES, (n,), generator=generator)


def vl2v(n: int) -> Any:
    student, teacher, text, labels = made(n)
    weight, bias = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)) / 20, torch.zeros(DIM)

    def plain() -> Tensor:
        rows = F.normalize(student @ weight.T + bias, dim=1)
        image, own = F.normalize(teacher, dim=1), F.normalize(text, dim=1)[labels]
        return -0.5 * F.cosine_similarity(rows, image).mean() - 0.5 * F.cosine_similarity(rows, own).mean()

    return [student], lambda: fn.vl2v_loss(student, labels, teacher, text, weight, bias), plain


def authors(student: Tensor, teacher: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Compute all losses of vlm-ood-distill from matrices."""
    s, t, w = (F.normalize(x, dim=1) for x in (student, teacher, text))
    ls, lt = s @ w.T / T, t @ w.T / T
    best, at = lt.topk(CLASSES, 1)
    right = lt.argmax(1) == labels
    kl = (best.softmax(1) * (best.log_softmax(1) - ls.gather(1, at).log_softmax(1))).sum(1)[right]
    logits, own = s @ t.T / T, torch.arange(len(s))
    contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    align = kl.mean() if len(kl) else kl.sum()
    return F.cross_entropy(ls, labels) + align + (s - t).square().sum(1).mean() + contrast


def vlm(n: int) -> Any:
    rows = made(n)
    return [rows[0]], lambda: fn.vlm_ood_distillation_loss(*rows)[0], lambda: authors(*rows)


def swad(thousands: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    network = nn.Linear(1000, thousands)
    losses = [1.0, *(0.5 + 0.01 * float(x) for x in torch.rand(19, generator=generator))]
    begin = torch.zeros(1, requires_grad=True)

    def vector() -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in network.parameters()])

    def ours() -> Tensor:
        valley = LossValley(vector())
        for loss in losses:
            for _ in range(3):
                valley.update(vector())
            valley.evaluate(loss)
        return valley.finish()[0].sum() + begin.sum() * 0

    def plain() -> Tensor:
        kept: list[nn.Module] = []
        average: list[nn.Module] = []
        for _ in losses:
            running = copy.deepcopy(network)
            for step in range(3):
                with torch.no_grad():
                    for mean, new in zip(running.parameters(), network.parameters(), strict=True):
                        mean.copy_(mean + (new - mean) / (step + 1))
            kept.append(copy.deepcopy(running))
            kept = kept[-6:]
            average.append(copy.deepcopy(kept[0]))
            average = average[-1:]
        return torch.cat([p.detach().reshape(-1) for p in average[0].parameters()]).sum() + begin.sum() * 0

    return [begin], ours, plain


def step(n: int) -> Any:
    torch.manual_seed(0)
    student, teacher = build_image_encoder("conv-s", 32), build_image_encoder("vit-s", 32).eval()
    head = nn.Linear(student.dim, teacher.dim)
    pictures = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = torch.randn(CLASSES, teacher.dim, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(n) % CLASSES
    with torch.no_grad():
        kept = Cached(teacher(pictures).numpy())
    index = torch.arange(n)

    def loss(rows: Tensor) -> Tensor:
        return fn.vlm_ood_distillation_loss(head(student(pictures)), rows, text, labels)[0]

    def plain() -> Tensor:
        with torch.no_grad():
            rows = teacher(pictures)
        return loss(rows)

    return [head.weight], lambda: loss(kept[index]), plain


CASES = {
    "vl2v": (vl2v, (96, 1024)),
    "vlm": (vlm, (128, 1024, 4096)),
    "swad": (swad, (100, 1000)),
    "step": (step, (64,)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM, memory=kept_bytes)
