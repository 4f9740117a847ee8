"""Train a student whose crops predict its moving average's large crops, as DINO and EsViT do.

The settings and the learner have what those methods share: heads with prototypes, centres, temperatures that warm up, and a
last layer that is frozen at first. A system writes the loss. `TwoLevels` is EsViT's network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.prototypes import DINOHead
from counterpoint.core.teacher import EMATeacher, cosine_momentum
from counterpoint.encoders.images import ImageEncoder
from counterpoint.encoders.maps import vector_and_map
from counterpoint.errors import CounterpointError
from counterpoint.tasks.views import MultiCropConfig, MultiCropLearner


@dataclass
class SelfDistilledConfig(MultiCropConfig):
    """Settings that DINO and EsViT share. Defaults are DINO's for ImageNet (Sec. 3.2 and Appendix C)."""

    epochs: int = 300
    batch_size: int = 1024
    recipe: str = "dino"
    optimizer: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.04
    final_weight_decay: float | None = 0.4
    warmup_epochs: int = 10
    clip_norm: float | None = 3.0
    hidden: int = 2048
    """Width of the head's two hidden layers."""
    bottleneck: int = 256
    """Width of the head's third layer, whose output is normalised."""
    head_norm: bool = False
    """Use batch normalisation in the head's hidden layers, for convolutional encoders."""
    projection: int = 65536
    """Number of outcomes of the distributions that the loss compares."""
    student_temperature: float = 0.1
    """Temperature of the student."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher after its warm-up."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher in the first epoch."""
    teacher_warmup: int = 30
    """Number of epochs in which the teacher's temperature rises linearly."""
    center_momentum: float = 0.9
    """Share of the centre that each step keeps, 0 to 1."""
    momentum_teacher: float = 0.996
    """Momentum of the teacher at the first step, 0 to 1; it rises to 1 on half a cosine."""
    freeze_epochs: int = 1
    """Number of first epochs in which the head's last layer is frozen."""
    late: ClassVar = {"freeze_epochs": ("the training of the head's last layer", 0)}

    counts: ClassVar[tuple[str, ...]] = (*MultiCropConfig.counts, "bottleneck")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("student_temperature", "teacher_temperature", "teacher_temperature_start")
        self.need_share("center_momentum", "momentum_teacher")
        if min(self.teacher_warmup, self.freeze_epochs) < 0:
            raise CounterpointError(
                f"teacher_warmup and freeze_epochs must not be negative, got {self.teacher_warmup} and {self.freeze_epochs}"
            )


class Levels(NamedTuple):
    """Outputs, crop by crop and picture by picture, and the number of regions of each size of crops."""

    image: Float[Tensor, "vb outcomes"]
    region: Float[Tensor, "rows outcomes"]
    feature: Float[Tensor, "rows dim"]
    regions: list[int]


class TwoLevels(nn.Module):
    """An encoder with a head for its vectors and a head for the regions of its maps."""

    def __init__(self, encoder: ImageEncoder, image: DINOHead, region: DINOHead) -> None:
        super().__init__()
        self.encoder, self.image, self.region = encoder, image, region

    def forward(self, crops: Sequence[Tensor]) -> Levels:
        """Compute both levels of groups of crops, each [crops of b, 3, side, side] of its own size."""
        vectors, maps = zip(*(vector_and_map(self.encoder, group) for group in crops), strict=True)
        feature = torch.cat([found.flatten(2).transpose(1, 2).flatten(0, 1) for found in maps])
        return Levels(self.image(torch.cat(vectors)), self.region(feature), feature, [m[0, 0].numel() for m in maps])


class SelfDistilledLearner(MultiCropLearner):
    """A student on all crops, and a teacher on the large crops, which is the student's moving average.

    Subclasses write `loss(batch)`, which moves the centres. The teacher copies `network`, whose first module is the encoder.
    """

    center: Tensor
    projector: DINOHead
    teacher: EMATeacher

    def __init__(self, config: SelfDistilledConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher = EMATeacher(self.network)
        self.register_buffer("center", torch.zeros(config.projection))

    def head(self, dim: int) -> DINOHead:
        """Build a head for features of this width."""
        config = self.config
        return DINOHead(dim, config.hidden, config.bottleneck, config.projection, norm=config.head_norm)

    def build_projector(self, dim: int) -> DINOHead:
        return self.head(dim)

    @property
    def heads(self) -> list[DINOHead]:
        """The student's heads."""
        return [self.projector]

    def embed(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        encoder: nn.Module = next(self.teacher.module.children())
        found: Tensor = encoder(images)
        return found

    def teacher_temperature(self) -> float:
        """Compute the teacher's temperature in this epoch."""
        config = self.config
        share = min(1.0, self.position.epoch / max(1, config.teacher_warmup - 1)) if config.teacher_warmup else 1.0
        start: float = config.teacher_temperature_start
        return start + (config.teacher_temperature - start) * share

    def before_step(self) -> None:
        if self.position.epoch < self.config.freeze_epochs:
            for head in self.heads:
                head.last.weight.grad = None

    def end_step(self) -> None:
        momentum = cosine_momentum(self.position.step, self.total_steps, self.config.momentum_teacher)
        self.teacher.update(self.network, momentum)
