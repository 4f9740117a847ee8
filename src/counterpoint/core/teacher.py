"""Teachers that are moving averages of networks, and schedules of their momentum and weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint.core.checks import need_within, need_word


def cosine_momentum(step: int, total: int, base: float) -> float:
    """Compute a momentum that rises from `base` at step 0 to 1 at step `total` on half a cosine.

    m = 1 + (base - 1) (1 + cos(pi step / total)) / 2   (BYOL, arXiv 2006.07733, Sec. 3.3)
    """
    if total < 1 or not 0 <= step <= total:
        raise ValueError(f"step must lie in 0..total and total be positive, got step {step} of {total}")
    return 1.0 + 0.5 * (base - 1.0) * (1.0 + math.cos(math.pi * step / total))


def ramped_momentum(step: int, limit: float = 0.999) -> float:
    """Compute the momentum of a plain mean of all students so far, at most `limit`: min(1 - 1/(step + 1), limit).

    Step 0 copies the student. (Mean teacher, arXiv 1703.01780; the ramp is that of the authors' code.)

    >>> [ramped_momentum(step) for step in (0, 1, 10_000)]
    [0.0, 0.5, 0.999]
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    return min(1.0 - 1.0 / (step + 1.0), limit)


def sigmoid_ramp(epoch: float, length: float, maximum: float = 1.0) -> float:
    """Weight that rises from nearly 0 to `maximum` over `length` epochs: maximum exp(-5 (1 - min(epoch, length)/length)^2).

    Epochs may be fractions; length 0 gives the maximum at once. (Laine & Aila, ICLR 2017, arXiv 1610.02242, Appendix A.)

    >>> [round(sigmoid_ramp(epoch, 5), 4) for epoch in (0, 3, 5, 9)]
    [0.0067, 0.4493, 1.0, 1.0]
    """
    if epoch < 0 or length < 0:
        raise ValueError(f"epoch and length must not be negative, got {epoch} and {length}")
    if length == 0:
        return maximum
    return maximum * math.exp(-5.0 * (1.0 - min(epoch, length) / length) ** 2)


@torch.no_grad()
def blend(target: Mapping[str, Tensor], source: Mapping[str, Tensor], momentum: float) -> None:
    """Set target[name] <- momentum * target[name] + (1 - momentum) * source[name], in place, for every name in both.

    Raises ValueError when the shapes under a name differ, or when no name is shared.
    """
    shared = [name for name in target if name in source]
    if not shared:
        raise ValueError("the two networks share no parameter name")
    for name in shared:
        if target[name].shape != source[name].shape:
            raise ValueError(
                f"'{name}' is {tuple(target[name].shape)} in one and {tuple(source[name].shape)} in the other"
            )
    torch._foreach_lerp_(
        [target[name] for name in shared],
        [source[name].to(target[name].dtype) for name in shared],
        1.0 - momentum,
    )


class EMATeacher(nn.Module):
    """A copy of a network that no gradient reaches and that follows it slowly: theta' <- m theta' + (1 - m) theta.

    Args:
        student: the network to copy; it is not changed.
        buffers: treatment of running statistics and counters. "own": the teacher keeps those of its own forward passes
            (MoCo, BYOL, mean teacher). "copy": `update` copies the student's, whole numbers included.
        mode: "train": the teacher is in training mode when its parent module is, as in those methods. "eval": it never is.
            Then dropout is off and normalisation uses the running statistics (so copy the buffers).

    Calling it calls the copy, without gradient. Its state dict is the copy's under the prefix `module.`.

    >>> student = nn.Linear(2, 2)
    >>> teacher = EMATeacher(student)
    >>> teacher.update(student, momentum=0.99)
    >>> teacher(torch.ones(1, 2)).requires_grad
    False
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        buffers: Literal["own", "copy"] = "own",
        mode: Literal["train", "eval"] = "train",
    ) -> None:
        super().__init__()
        need_word(("own", "copy"), buffers=buffers)
        need_word(("train", "eval"), mode=mode)
        self.buffer_policy = buffers
        self.mode = mode
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.train(student.training)

    def train(self, mode: bool = True) -> EMATeacher:
        super().train(mode)
        self.module.train(mode and self.mode == "train")
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Move the parameters towards the student's; momentum 1 leaves them, 0 copies. Buffers: see the class.

        Raises ValueError for a student whose parameters or buffers have other names or shapes, or a momentum outside 0..1.
        """
        need_within(0, 1, momentum=momentum)
        own, other = dict(self.module.named_parameters()), dict(student.named_parameters())
        kept, theirs = dict(self.module.named_buffers()), dict(student.named_buffers())
        odd = (own.keys() ^ other.keys()) | (kept.keys() ^ theirs.keys())
        if odd:
            raise ValueError(f"student and teacher are not the same network: '{min(odd)}' is in one of them only")
        if own:
            blend(own, other, momentum)
        if self.buffer_policy == "copy":
            for name, buffer in kept.items():
                buffer.copy_(theirs[name])
