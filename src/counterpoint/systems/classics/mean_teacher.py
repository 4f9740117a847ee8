"""Mean teacher: few labels, many pictures; the student learns to agree with its moving average on another view.

Tarvainen, Valpola: "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep
learning results", NIPS 2017, arXiv 1703.01780.

The consistency (Sec. 2) is `mean_teacher`. The task evaluates the teacher, and reports the student's figures too. Not built:
the authors' second output, which decouples consistency from classification, and input noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_alike
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.teacher import EMATeacher, ramped_momentum, sigmoid_ramp
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.labelled import LAPTOP, LabelledLearner, SemiSupervisedConfig, cross_entropy


class MeanTeacherOutput(NamedTuple):
    mse: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    ramp: Float[Tensor, " epochs"]


@over_group
@full_precision
def mean_teacher(
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    rampup_length: float = 5.0,
    *,
    epochs: int = 8,
) -> MeanTeacherOutput:
    """Measure the consistency of two sets of logits: mean squared difference of the softmaxes, and KL(teacher || student).

    Args:
        student, teacher: logits; the teacher's get no gradient.
        rampup_length: number of epochs until the consistency has its full weight, by default 5.
        epochs: number of weights of `ramp` to return, by default 8.

    Returns mse (mean over batch and classes), kl (mean over the batch) and ramp. The ramp holds the weight of the consistency
    in each of the first `epochs` epochs (see `core.teacher.sigmoid_ramp`). Raises ValueError for different shapes.

    >>> mean_teacher(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]), epochs=1)
    MeanTeacherOutput(mse=tensor(0.), kl=tensor(0.), ramp=tensor([0.0067]))
    """
    need_alike("n classes", student=student, teacher=teacher)
    own, target = F.log_softmax(wide(student), dim=1), F.softmax(wide(teacher.detach()), dim=1)
    return MeanTeacherOutput(
        global_mean((own.exp() - target).square().mean(1)),
        global_mean(F.kl_div(own, target, reduction="none").sum(1)),
        own.new_tensor([sigmoid_ramp(epoch, rampup_length) for epoch in range(epochs)]),
    )


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class MeanTeacherConfig(SemiSupervisedConfig):
    """Settings of the mean teacher. Defaults are the authors' for 4,000 labels of CIFAR-10.

    Two defaults differ: the cosine ends at 0, where theirs stops earlier, and a ResNet-50 replaces the Shake-Shake network.
    """

    epochs: int = 180
    """Passes over the images of unknown class."""
    lr: float = 0.1
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256."""
    evaluate_every: int = 10
    consistency: float = 100.0
    """Full weight of the consistency, after the ramp, at least 0."""
    consistency_type: Literal["mse", "kl"] = "mse"
    """Measure of consistency: mse, mean squared difference of the probabilities, or kl, KL(teacher || student)."""
    rampup: float = 5.0
    """Number of epochs until the consistency has its full weight, at least 0; 0: from the first epoch."""
    ema_momentum: float = 0.999
    """Largest momentum of the teacher, 0 to 1; in the first steps the teacher is the mean of all students so far."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.consistency < 0 or self.rampup < 0 or not 0 <= self.ema_momentum <= 1:
            raise CounterpointError(
                "consistency and rampup must not be negative and ema_momentum must lie in 0..1, got "
                f"{self.consistency}, {self.rampup} and {self.ema_momentum}"
            )


class MeanTeacher(LabelledLearner):
    """A student, a teacher that is its moving average, and two views of every image."""

    crops: ClassVar[int] = 2

    def __init__(self, config: MeanTeacherConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher = EMATeacher(nn.Sequential(self.encoder, self.classifier))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        one, two = batch["views"]
        logits = self.classifier(self.encoder(one))
        apart = mean_teacher(logits, self.teacher(two))
        weight = sigmoid_ramp(self.position.epoch, self.config.rampup, self.config.consistency)
        known = cross_entropy(logits, batch["label"])
        consistency = apart.mse if self.config.consistency_type == "mse" else apart.kl
        return {"loss": known + weight * consistency, "ce": known, "consistency": consistency}

    def end_step(self) -> None:
        momentum = ramped_momentum(self.position.step + 1, self.config.ema_momentum)
        self.teacher.update(nn.Sequential(self.encoder, self.classifier), momentum)

    def embed(self, images: Tensor) -> Tensor:
        encoder, _ = self.teacher.module.children()
        return encoder(images)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().predict(batch)
        _, classifier = self.teacher.module.children()
        student = self.classifier(self.encoder(batch["image"]))
        return found | {"logits": classifier(found["feature"]), "student_logits": student}


SYSTEM = System(
    slug="mean-teacher",
    task="labelled",
    config=MeanTeacherConfig,
    learner=MeanTeacher,
    data="cifar10",
    recipe=LAPTOP | {"labels_per_class": 50, "labelled_batch": 32, "ema_momentum": 0.99},
)
