"""Compare losses of distillation with torchdistill's on the same tensors: time, value, and kept memory.

    pip install --no-deps torchdistill
    python benchmarks/torchdistill_losses.py [--rounds 7] [--threads 1]      writes results/bench/torchdistill_losses.json

The method is that of benchmarks/alignment.py. n is the number of pictures. Logits have 100 classes, features 512 numbers, maps 256
channels of 8 x 8 positions. CRD has embeddings of 128 numbers, a set of 50,000 pictures and 4,096 negatives of each. Both ways get
the same lists of negatives, memories and constants.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from alignment import run
from kd3 import kept_bytes, normal
from torch import Tensor
from torchdistill.losses.mid_level import ATLoss, CRDLoss, KDLoss, RKDLoss

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "torchdistill_losses.json"
DIM, PICTURES, NEGATIVES = 128, 50_000, 4096
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def io(value: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"m": {"output": value}}


def kd(n: int) -> Case:
    student, teacher = normal(0, n, 100).requires_grad_(), normal(1, n, 100)
    theirs = KDLoss("m", "output", "m", "output", temperature=4.0, alpha=0)
    return [student], lambda: fn.kd(student, teacher, 4.0), lambda: theirs(io(student), io(teacher)) * 16


def rkd(n: int) -> Case:
    student, teacher = normal(0, n, 512).requires_grad_(), normal(1, n, 512)
    theirs = RKDLoss("m", "m", dist_factor=25.0, angle_factor=50.0, reduction="mean")
    return [student], lambda: fn.rkd(student, teacher).loss, lambda: theirs(io(student), io(teacher))


def attention(n: int) -> Case:
    student, teacher = normal(0, n, 256, 8, 8).requires_grad_(), normal(1, n, 256, 8, 8)
    side = {"path": "m", "io": "output"}
    theirs = ATLoss({"one": {"student": side, "teacher": side}})
    return [student], lambda: fn.attention_transfer(student, teacher), lambda: theirs(io(student), io(teacher))


def crd(n: int) -> Case:
    student, teacher = (F.normalize(normal(seed, n, DIM), dim=1).requires_grad_() for seed in (0, 1))
    draw = torch.Generator().manual_seed(2)
    index = torch.randperm(PICTURES, generator=draw)[:n]
    others = torch.randint(PICTURES, (n, NEGATIVES), generator=draw)
    listed = torch.cat([index[:, None], others], 1)
    theirs = CRDLoss("s", "e", "t", DIM, PICTURES, NEGATIVES, PICTURES)
    memories = [F.normalize(normal(seed, PICTURES, DIM), dim=1) for seed in (3, 4)]
    state = fn.crd(student.detach(), teacher.detach(), *memories, index, listed)
    z = {"Z_student": state.Z_student.detach(), "Z_teacher": state.Z_teacher.detach()}
    # Theirs scores the teacher's rows with the student's memory first.
    theirs.memory_v1.copy_(memories[0]), theirs.memory_v2.copy_(memories[1])
    theirs.params[2], theirs.params[3] = z["Z_student"], z["Z_teacher"]

    def plain() -> Tensor:
        theirs.memory_v1.copy_(memories[0]), theirs.memory_v2.copy_(memories[1])
        given = {"s": {"output": student}, "e": {"input": {"pos_idx": index, "contrast_idx": listed}}}
        return theirs(given, {"t": {"output": teacher}}).sum()

    return [student, teacher], lambda: fn.crd(student, teacher, *memories, index, listed, **z).loss, plain


CASES: dict[str, tuple[Callable[[int], Case], tuple[int, ...]]] = {
    "kd": (kd, (64, 4096)),
    "rkd": (rkd, (64, 256)),
    "attention transfer": (attention, (64, 512)),
    "crd": (crd, (64,)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM, memory=kept_bytes)
