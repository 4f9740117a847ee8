"""Compare PromptKD's loss, projector and step with the authors' way: time, value, and peak memory.

    python benchmarks/promptkd.py [--rounds 5] [--threads 1]      writes results/bench/promptkd.json

The transcriptions follow the authors' trainer: KL with the reduction "sum", divided by the number of logits; two 1 x 1
convolutions with batch normalisation; prompts joined to the tokens inside the transformer's loop. Both sides take the same float32
tensors, in turn in one process. The last case is a step of a student of 4 blocks: ours with the stored class texts, the authors'
trainer with the teacher's texts computed again.
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
from counterpoint.encoders.text import TextTransformer
from counterpoint.encoders.vision_transformers import vit_s

OUT = Path(__file__).parents[1] / "results" / "bench" / "promptkd.json"
CLASSES = 1000


def loss(n: int) -> Case:
    """Make logits of n pictures over 1,000 classes."""
    student, teacher = normal(0, n, CLASSES).requires_grad_(), normal(1, n, CLASSES)

    def plain() -> Tensor:
        own, wanted = F.log_softmax(student / 1.0, dim=1), F.softmax(teacher / 1.0, dim=1)
        return 1000.0 * F.kl_div(own, wanted, reduction="sum") * (1.0 * 1.0) / student.numel()

    return lambda: fn.prompt_distillation_loss(student, teacher, 1.0, 1000.0), plain


def projector(n: int) -> Case:
    """Make features of n pictures, 512 wide, and a projector into a space of 768."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(512, 768, 1), nn.BatchNorm2d(768), nn.ReLU(), nn.Conv2d(768, 768, 1))
    h = normal(0, n, 512).requires_grad_()
    weights = {f"conv1.{name}": value for name, value in layers.state_dict(keep_vars=True).items() if value.ndim}

    def plain() -> Tensor:
        u = layers(h[:, :, None, None])[:, :, 0, 0]
        return (u / u.norm(dim=-1, keepdim=True)).square().mean(1).sum()

    return lambda: fn.prompt_projector(h, weights, True).square().mean(1).sum(), plain


def step(n: int) -> Case:
    """Make a student of n pictures of 32 pixels, with prompts before 4 blocks, and texts of 100 classes."""
    torch.manual_seed(0)
    tower, text = vit_s(32, patch=4).eval().requires_grad_(False), TextTransformer(300).eval().requires_grad_(False)
    images, teacher = normal(0, n, 3, 32, 32), normal(1, n, 100)
    names = ["VPT", *(f"transformer.resblocks.{k}.VPT_shallow" for k in (1, 2, 3))]
    prompts = {name: normal(2 + k, 4, 128).requires_grad_() for k, name in enumerate(names)}
    ids = torch.randint(1, 300, (100, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        stored = F.normalize(text(ids, mask), dim=1)

    def ours() -> Tensor:
        h = fn.prompted_vit(images, prompts, 4, 4, 4, 4, tower=tower)
        return fn.prompt_distillation_loss(10 * F.normalize(h, dim=1) @ stored.T, teacher, 1.0, 1000.0)

    def plain() -> Tensor:
        with torch.no_grad():
            texts = F.normalize(text(ids, mask), dim=1)
        model: Any = tower.model
        x = model._pos_embed(model.patch_embed(images))
        count = x.shape[1]
        for number, name in enumerate(names):
            x = torch.cat([x[:, :count], prompts[name].expand(n, -1, -1)], dim=1)
            x = model.blocks[number](x)
        h = model.norm(x)[:, 0]
        logits = 10 * (h / h.norm(dim=-1, keepdim=True)) @ texts.T
        return 1000.0 * F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="sum") / logits.numel()

    return ours, plain


CASES: dict[str, tuple[Any, int]] = {
    "loss, 64 pictures": (loss, 64),
    "loss, 1,024 pictures": (loss, 1024),
    "loss, 4,096 pictures": (loss, 4096),
    "projector, 256 pictures": (projector, 256),
    "step with stored texts, 32 pictures": (step, 32),
}


SIDES = {name: Sides(partial(make, n), partial(make, 2)) for name, (make, n) in CASES.items()}

if __name__ == "__main__":
    run(SIDES, OUT, __doc__, rounds=5, other="transcription", classes=CLASSES)
