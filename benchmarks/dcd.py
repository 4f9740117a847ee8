"""Compare DCD's losses and its mined step with the authors' way, and both scorers in retrieval: time, value, memory.

    python benchmarks/dcd.py [--rounds 7] [--threads 1]      writes results/bench/dcd.json

The method is that of benchmarks/alignment.py. n is the number of pictures, with 64 captions each. The authors' loss has a loop over
pictures. `step` is one of a student of 3 co-attention layers, 64 wide. It scores the 8 captions that a teacher of 6 layers
chooses among 64. The other way scores all 64 by the student. `retrieval` scores all pairs of n pictures and n captions without
gradient by that student; the other way is by its teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.encoders.pair_scorers import PairScorer, build_scorer

OUT = Path(__file__).parents[1] / "results" / "bench" / "dcd.json"
CAPTIONS, HARD, WIDTH, PATCHES, TOKENS = 64, 7, 64, 17, 8
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(n: int) -> Case:
    student, teacher = normal(0, n, HARD + 1).requires_grad_(), normal(1, n, HARD + 1)

    def plain() -> Tensor:
        share = teacher.softmax(1)
        entropy = (share * share.log()).sum(1) / (share * share.log()).sum()
        imitation = ((1 - entropy) ** 2).softmax(0)
        distill = (F.mse_loss(teacher, student) * imitation).sum()
        label = torch.zeros(HARD + 1)
        label[0] = 1
        task = torch.zeros(())
        for row, weight in zip(student, entropy, strict=True):
            task = task + F.binary_cross_entropy_with_logits(row, label) * weight
        return 0.2 * distill + 0.8 * task

    return [student], lambda: fn.dynamic_distillation_loss(student, teacher, 1.0, 0.2, "uniform").loss, plain


def selection(n: int) -> Case:
    teacher = normal(0, n, CAPTIONS)

    def plain() -> Tensor:
        found = []
        for order in teacher.argsort(1, descending=True)[:, : HARD + 1].tolist():
            rest = [k for k in order if k != 0][:HARD]
            found.append([0, *rest])
        return torch.tensor(found).sum()

    return [], lambda: fn.select_hard_negatives(teacher, HARD).sum(), plain


def scored(scorer: PairScorer, image: Tensor, text: Tensor, at: Tensor) -> Tensor:
    rows = torch.arange(len(at)).repeat_interleave(at.shape[1])
    return scorer(image[rows], text[at.flatten()]).view(at.shape)


def step(n: int) -> Case:
    torch.manual_seed(0)
    student, teacher = build_scorer("coattention", WIDTH, 3, 4), build_scorer("coattention", WIDTH, 6, 4)
    image, text = normal(0, n, PATCHES, WIDTH), normal(1, CAPTIONS, TOKENS, WIDTH)
    at = torch.arange(CAPTIONS).expand(n, -1)

    def ours() -> Tensor:
        with torch.no_grad():
            taught = torch.cat([scored(teacher, part, text, at[: len(part)]) for part in image.split(16)])
            chosen = fn.select_hard_negatives(taught, HARD)
        return fn.dynamic_distillation_loss(scored(student, image, text, chosen), taught.gather(1, chosen)).loss

    def plain() -> Tensor:
        with torch.no_grad():
            taught = torch.cat([scored(teacher, part, text, at[: len(part)]) for part in image.split(16)])
        return fn.dynamic_distillation_loss(scored(student, image, text, at), taught).loss

    return list(student.parameters()), ours, plain


def retrieval(n: int) -> Case:
    torch.manual_seed(0)
    student, teacher = build_scorer("coattention", WIDTH, 3, 4), build_scorer("coattention", WIDTH, 6, 4)
    image, text = normal(0, n, PATCHES, WIDTH), normal(1, n, TOKENS, WIDTH)
    at = torch.arange(n).expand(n, -1)

    def by(scorer: PairScorer) -> Callable[[], Tensor]:
        @torch.no_grad()
        def call() -> Tensor:
            return torch.cat([scored(scorer, part, text, at[: len(part)]) for part in image.split(8)]).sum()

        return call

    return [], by(student), by(teacher)


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
    "loss": (loss, (64, 512, 4096)),
    "selection": (selection, (64, 512)),
    "step": (step, (8, 16)),
    "retrieval": (retrieval, (32, 64)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=WIDTH, memory=kept_bytes)
