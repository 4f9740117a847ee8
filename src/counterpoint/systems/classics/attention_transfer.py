"""AT: the student learns the teacher's maps of attention at several depths.

Zagoruyko, Komodakis: "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
Attention Transfer", ICLR 2017, arXiv 1612.03928.

`attention_transfer` is the loss of one pair of layers (Eq. 2, activation-based, p = 2). As in published code it is the mean
over places. The gradient-based form (Sec. 3.2) is not built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import traced
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, Seen, TaughtConfig, TaughtLearner

BLOCK = 2**18  # numbers of a block of maps


@over_group
@full_precision
def attention_transfer(
    student: Float[Tensor, "n channels height width"],
    teacher: Float[Tensor, "n teacher_channels teacher_height teacher_width"],
    power: float = 2,
) -> Float[Tensor, ""]:
    """Compute the mean over batch and places of (Q_s - Q_t)^2 (Sec. 3.1).

    Q is the normalised map of the mean over channels of |F|^power.

    Args:
        student, teacher: feature maps of one layer each; the teacher's get no gradient. The larger map is average-pooled to
            the smaller size first. Numbers of channels may differ.
        power: > 0, by default 2.

    For a map of zeros, Q = 0. Raises ValueError for shapes that do not fit.

    >>> attention_transfer(torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2))
    tensor(0.)
    """
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must be [n, c, h, w] of one n, got {shapes(student=student, teacher=teacher)}"
        )
    need_rows(student=student)
    need_positive(power=power)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return global_mean((_attention(student, size, power) - _attention(teacher.detach(), size, power)).square().mean(1))


def _attention(maps: Tensor, size: tuple[int, int], power: float) -> Tensor:
    maps = wide(maps)
    if maps.shape[2:] != size:
        maps = F.adaptive_avg_pool2d(maps, size)
    if power == 2:
        return unit((_composed if traced() else _MeanSquares.apply)(maps).flatten(1))
    maps = maps if power % 2 == 0 else maps.abs()
    return unit(maps.pow(power).mean(1).flatten(1))


class _MeanSquares(torch.autograd.Function):
    """Mean over channels of squares, block by block, so that a CPU keeps a block's squares in its cache."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.save_for_backward(maps)
        if maps.is_cuda or not len(maps):
            return _composed(maps)
        rows = max(1, BLOCK // max(1, maps[0].numel()))
        return torch.cat([_composed(part) for part in maps.split(rows)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (maps,) = ctx.saved_tensors
        return maps * (gradients[0] * (2 / maps.shape[1])).unsqueeze(1)


def _composed(maps: Tensor) -> Float[Tensor, "n height width"]:
    return maps.square().mean(1)


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class AttentionTransferConfig(TaughtConfig):
    """Settings of AT. Defaults are those of CRD's comparison on CIFAR-100."""

    weight: float = 1000.0
    """Weight of the sum over the layers, at least 0."""
    student_layers: tuple[str, ...] = ("layer1", "layer2", "layer3")
    """The student's layers whose attention learns; in a wrapped library model, the library's names."""
    teacher_layers: tuple[str, ...] = ("layer1", "layer2", "layer3")
    """The teacher's layer for each of the student's layers."""

    weights: ClassVar[tuple[str, ...]] = (*TaughtConfig.weights, "weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.student_layers or len(self.student_layers) != len(self.teacher_layers):
            raise CounterpointError(
                f"student_layers and teacher_layers must form pairs, got {len(self.student_layers)} and "
                f"{len(self.teacher_layers)}"
            )


class AttentionTransfer(TaughtLearner):
    """Cross-entropy and the attention of pairs of layers."""

    def __init__(self, config: AttentionTransferConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        for names, sizes in zip(self.layers(), self.shapes(), strict=True):
            for name, shape in zip(names, sizes, strict=True):
                if len(shape) != 3:
                    raise CounterpointError(
                        f"layer {name} must return maps [channels, height, width], got {list(shape)}; name another layer"
                    )

    def layers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.config.student_layers, self.config.teacher_layers

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        pairs = zip(student.maps, teacher.maps, strict=True)
        return {"attention": self.config.weight * torch.stack([attention_transfer(s, t) for s, t in pairs]).sum()}


SYSTEM = System(
    slug="attention-transfer",
    task="labelled",
    config=AttentionTransferConfig,
    learner=AttentionTransfer,
    data="cifar10",
    recipe=LAPTOP | {"student_layers": ("stem", "layer1", "layer2")},
)
