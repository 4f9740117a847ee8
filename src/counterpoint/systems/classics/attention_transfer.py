"""AT: the student is to look where the teacher looks, at several depths.

Zagoruyko, Komodakis: "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
Attention Transfer", ICLR 2017, arXiv 1612.03928.

The loss of one pair of layers (Eq. 2, activation-based, p = 2, in the mean over places of published code) is
`counterpoint.core.distil.attention_transfer`. The gradient-based form (Sec. 3.2) is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from counterpoint.core.distil import attention_transfer
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, Seen, TaughtConfig, TaughtLearner


@dataclass
class AttentionTransferConfig(TaughtConfig):
    """Settings of AT. Defaults are those of CRD's comparison on CIFAR-100."""

    weight: float = 1000.0
    """Weight of the sum over the layers."""
    student_layers: tuple[str, ...] = ("layer1", "layer2", "layer3")
    """The student's layers that learn to look; of a wrapped library model, as the library names them."""
    teacher_layers: tuple[str, ...] = ("layer1", "layer2", "layer3")
    """The teacher's layer for each of them."""

    weights: ClassVar[tuple[str, ...]] = (*TaughtConfig.weights, "weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.student_layers or len(self.student_layers) != len(self.teacher_layers):
            raise CounterpointError(
                f"student_layers and teacher_layers go in pairs, got {len(self.student_layers)} and "
                f"{len(self.teacher_layers)}"
            )


class AttentionTransfer(TaughtLearner):
    """Cross-entropy and the attention of pairs of layers."""

    def __init__(self, config: AttentionTransferConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        for names, shapes in zip(self.layers(), self.shapes(), strict=True):
            for name, shape in zip(names, shapes, strict=True):
                if len(shape) != 3:
                    raise CounterpointError(f"layer {name} gives no maps [channels, height, width] but {list(shape)}")

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
