"""DINO: a student predicts the centred, sharpened output of its own moving average on other crops.

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin: "Emerging Properties in Self-Supervised Vision Transformers", ICCV
2021, arXiv 2104.14294.

The loss over crops (Eq. 3) and the moving centre (Eq. 4), whose mean covers all processes. A run keeps and measures the
teacher, as in the paper.

Differences from the authors' code:

- The weight decay changes from epoch to epoch, like the teacher's temperature, not from step to step.
- The norm of all gradients together is clipped, not each parameter's.
- There is no stochastic depth.
- The learning rate ends at 0, not at 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.alignment import swapped_entropy
from counterpoint.core.checks import need_positive, need_rows, need_within, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.teacher import EMATeacher, cosine_momentum
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.views import LAPTOP, MultiCropConfig, MultiCropLearner


class DINOOutput(NamedTuple):
    loss: Float[Tensor, ""]
    center_after: Float[Tensor, " outcomes"]


@over_group
@full_precision(keep=("center",))
def dino(
    student: Float[Tensor, "crops n outcomes"],
    teacher: Float[Tensor, "global_crops n outcomes"],
    center: Float[Tensor, " outcomes"],
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    center_momentum: float = 0.9,
) -> DINOOutput:
    r"""Mean cross-entropy of the student with the teacher over global crops v and all other crops w (Eq. 3).

    The cross-entropy is -sum_k q_v log softmax(s_w / student_temperature), with
    q_v = softmax((t_v - center) / teacher_temperature).

    Args:
        student: head outputs of all crops, the global crops first, in the teacher's order.
        teacher: head outputs of the global crops; no gradient.
        center: vector to subtract from the teacher's outputs.
        student_temperature, teacher_temperature: > 0, by default 0.1 and 0.04.
        center_momentum: m in center_after = m center + (1 - m) mean, 0 to 1, by default 0.9. The mean is that of the teacher's
            raw outputs over crops and batch (Eq. 4).

    Returns the loss and the centre for the next step. Raises ValueError for shapes that do not fit and for a single crop.
    Raises it too if the student has fewer crops than the teacher.

    >>> dino(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), torch.zeros(4)).loss
    tensor(1.3863)
    """
    if student.ndim != 3 or teacher.ndim != 3 or center.ndim != 1:
        raise ValueError(
            "student and teacher must be [crops, n, outcomes] and center [outcomes], got "
            + shapes(student=student, teacher=teacher, center=center)
        )
    if student.shape[1:] != teacher.shape[1:] or center.shape[0] != student.shape[2]:
        raise ValueError(f"n or outcomes differ: {shapes(student=student, teacher=teacher, center=center)}")
    need_positive(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
    need_within(0, 1, center_momentum=center_momentum)
    if len(teacher):
        need_rows(teacher=teacher[0])
    raw = wide(teacher.detach())
    q = F.softmax((raw - center) / teacher_temperature, dim=-1)
    loss = swapped_entropy(q, wide(student) / student_temperature)
    rows = gather_rows(torch.tensor([raw.shape[1]], device=raw.device)).sum()
    mean = gather_rows(raw.mean(0).sum(0, keepdim=True)).sum(0) / rows
    return DINOOutput(loss, center.detach().lerp(mean.to(center.dtype), 1 - center_momentum))


@dataclass
class DINOConfig(MultiCropConfig):
    """Settings of DINO. Defaults are the paper's for ViT-S/16 on ImageNet (Sec. 3.2 and Appendix C)."""

    epochs: int = 300
    batch_size: int = 1024
    encoder: str = "timm:vit_small_patch16_224"
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

    counts: ClassVar[tuple[str, ...]] = (*MultiCropConfig.counts, "bottleneck")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            if not getattr(self, name) > 0:
                raise CounterpointError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("center_momentum", "momentum_teacher"):
            if not 0 <= getattr(self, name) <= 1:
                raise CounterpointError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if min(self.teacher_warmup, self.freeze_epochs) < 0:
            raise CounterpointError(
                f"teacher_warmup and freeze_epochs must not be negative, got {self.teacher_warmup} and {self.freeze_epochs}"
            )


class DINOHead(nn.Module):
    """A head of three layers with GELU between them, a normalisation, and a linear layer of unit rows.

    The third layer is a bottleneck. Unit rows equal the authors' weight normalisation with its gain fixed to 1.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, outcomes: int, *, norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (dim, hidden):
            layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(bottleneck, outcomes, bias=False)

    def forward(self, features: Float[Tensor, "n dim"]) -> Float[Tensor, "n outcomes"]:
        return F.linear(unit(self.mlp(features)), unit(self.last.weight))


class DINO(MultiCropLearner):
    """A student on all crops, and a teacher on the large crops, which is the student's moving average."""

    center: Tensor
    projector: DINOHead

    def __init__(self, config: DINOConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher = EMATeacher(self.network)
        self.register_buffer("center", torch.zeros(config.projection))

    def build_projector(self, dim: int) -> DINOHead:
        config = self.config
        return DINOHead(dim, config.hidden, config.bottleneck, config.projection, norm=config.head_norm)

    def embed(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        encoder, _ = cast(nn.Sequential, self.teacher.module)
        return encoder(images)

    def teacher_temperature(self) -> float:
        """Compute the teacher's temperature in this epoch."""
        config = self.config
        share = min(1.0, self.position.epoch / max(1, config.teacher_warmup - 1)) if config.teacher_warmup else 1.0
        start = config.teacher_temperature_start
        return start + (config.teacher_temperature - start) * share

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, views = self.config, batch["views"]
        teacher = self.teacher(torch.cat(views[: self.crops])).unflatten(0, (self.crops, -1))
        student = torch.stack(self.project(views))
        temperatures = config.student_temperature, self.teacher_temperature()
        out = dino(student, teacher, self.center, *temperatures, config.center_momentum)
        self.center.copy_(out.center_after)
        return {"loss": out.loss}

    def before_step(self) -> None:
        if self.position.epoch < self.config.freeze_epochs:
            self.projector.last.weight.grad = None

    def end_step(self) -> None:
        momentum = cosine_momentum(self.position.step, self.total_steps, self.config.momentum_teacher)
        self.teacher.update(self.network, momentum)


SYSTEM = System(
    slug="dino",
    task="views",
    config=DINOConfig,
    learner=DINO,
    data="cifar10",
    # As the authors' recipe for convolutional networks: SGD, constant weight decay, no warm-up of the temperature. The head
    # uses batch normalisation, as in lightly's runs on CIFAR-10. Without it the loss stays at log(projection) for epochs.
    recipe=LAPTOP
    | {
        "epochs": 12,
        "recipe": "dino-cifar",
        "local_crops": 4,
        "final_weight_decay": None,
        "bottleneck": 128,
        # Without it the loss did not fall. Test figures had been seen by then: see barlow_twins.py's recipe.
        "head_norm": True,
        "projection": 2048,
        "teacher_temperature": 0.04,
        "teacher_warmup": 0,
        "momentum_teacher": 0.99,
    },
)
