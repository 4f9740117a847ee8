"""Define students of the task `labelled`, which learn from a teacher: a frozen classifier, usually larger.

Sources of the teacher:

    --teacher RUN       the network of a finished run of a labelled system; the run must not move until the student's run is
                        complete
    default             train it first, in the same run, for `teacher_epochs` epochs: a stage before the student's

The teacher runs in evaluation mode and without gradient. Both networks see the same view.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from counterpoint.core.distil import kd
from counterpoint.data.images import ImageData
from counterpoint.encoders.adapters import merged_state
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.taps import recorded
from counterpoint.engine.run import Run
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, parameters
from counterpoint.errors import CounterpointError, RunError
from counterpoint.tasks import labelled
from counterpoint.tasks.labelled import LabelledConfig, LabelledLearner, cross_entropy
from counterpoint.tasks.started import started_encoder


@dataclass
class TaughtConfig(LabelledConfig):
    """Settings of every student.

    Defaults come from the comparison on CIFAR-100 of Tian et al. 2020. Source: CRD, arXiv 1910.10699, Sec. 4.1, and its
    published scripts. Two defaults differ: the learning rate follows a cosine instead of steps, and the two networks are those of
    the comparison on ImageNet.
    """

    epochs: int = 240
    """Passes over the training images by the student."""
    batch_size: int = 64
    encoder: str = "torchvision:resnet18"
    """The student: resnet-s, conv-s, vit-s, timm:NAME, torchvision:NAME, hf:NAME."""
    lr: float = 0.2
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256."""
    weight_decay: float = 5e-4
    teacher: str = ""
    """Folder of a run of a labelled system whose network is the teacher. Default: first train a teacher in this run."""
    teacher_encoder: str = "torchvision:resnet34"
    """The teacher's encoder; with --teacher, the run's encoder replaces it."""
    teacher_pretrained: bool = False
    """Start the teacher from published weights if its encoder has them."""
    teacher_epochs: int = 240
    """Passes over the training images by the teacher, before the student's; with --teacher, none."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy with the labels."""
    kd_weight: float = 0.0
    """Weight of Hinton's distillation of the teacher's outputs."""
    kd_temperature: float = 4.0
    """Temperature of both networks' outputs in Hinton's distillation."""

    weights: ClassVar[tuple[str, ...]] = ("ce_weight", "kd_weight")  # settings with the weights of the loss's terms

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_epochs < 0:
            raise CounterpointError(f"teacher_epochs must not be negative, got {self.teacher_epochs}")
        self.need_positive("kd_temperature")
        values = [getattr(self, name) for name in self.weights]
        if min(values) < 0 or max(values) == 0:
            said = ", ".join(f"{name} {value}" for name, value in zip(self.weights, values, strict=True))
            raise CounterpointError(f"weights must not be negative and not all be 0, got {said}")

    @classmethod
    def of_names(cls, teacher: str, student: str) -> dict[str, Any]:
        """Return the settings of `counterpoint distill` for names of a teacher and a student."""
        kind, _, place = teacher.partition(":")
        if kind != "run":
            raise CounterpointError(
                f"kd, rkd, fitnets, attention-transfer, crd and diswot learn from a run of a labelled system: --teacher run:RUN; "
                f"got '{teacher}'. For other teachers see vl2v-adip, vlm-ood-distill and kd3"
            )
        return {"teacher": place, "encoder": student}

    def facts(self, data: ImageData) -> dict[str, Any]:
        encoder = encoder_of_run(self.teacher, data) if self.teacher else self.teacher_encoder
        return super().facts(data) | {"teacher_encoder": encoder}


# Settings for a small set of small pictures on a few cores, which replace the paper's.
LAPTOP: dict[str, Any] = labelled.LAPTOP | {
    "encoder": "conv-s",
    "teacher_encoder": "resnet-s",
    "teacher_epochs": 12,
    "epochs": 24,
    "evaluate_every": 6,
}


# --------------------------------------------------------------------------------------------------- networks seen inside


class Seen(NamedTuple):
    """One network's outputs for a batch."""

    logits: Tensor  # [n, classes]
    feature: Tensor  # [n, dim]
    maps: list[Tensor]  # of the requested layers, [n, channels, height, width] in a convolutional network


class Classifier(nn.Module):
    """An encoder and a linear classifier, named as in a labelled learner."""

    def __init__(self, encoder: str, data: Any, pretrained: bool = False) -> None:
        super().__init__()
        self.encoder = build_image_encoder(encoder, data.size, channels=data.channels, pretrained=pretrained)
        self.classifier = nn.Linear(self.encoder.dim, data.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(images))


def look(network: Any, images: Tensor, layers: Sequence[str] = ()) -> Seen:
    """Compute the outputs of a network with `encoder` and `classifier` for normalised images."""
    with recorded(network.encoder, layers) as maps:
        feature = network.encoder(images)
    return Seen(network.classifier(feature), feature, [maps[name] for name in layers])


# ----------------------------------------------------------------------------------------------------- a run as a teacher


def encoder_of_run(path: str, data: ImageData) -> str:
    """Return the name of the encoder that a run trained. Raises RunError if the run cannot teach on these data."""
    run = Run.open(path)
    if run.config.get("task") != "labelled":
        raise RunError(
            f"{path} is a run of {run.slug}, which does not classify pictures and cannot teach; name a labelled system's run"
        )
    trained = run.facts()
    for name, own in (data.spec | {"class_names": list(data.classes)}).items():
        if trained.get(name) != own:
            said = name.replace("_", " ")
            raise RunError(
                f"{path} cannot teach on {data.name}: it was trained with {said} {trained.get(name)}, not {own}"
            )
    # of a search, the one found
    return str(run.structure().get("encoder") or started_encoder(run) or run.config["config"]["encoder"])


def load_teacher(teacher: nn.Module, path: str) -> None:
    """Load the network of a run into `teacher`. Raises RunError if the run has no classifier or is not finished."""
    weights = Run.open(path).load_weights()
    if any(".lora_A" in name for name in weights):  # its adapters are merged
        weights = merged_state(importlib.import_module("counterpoint.experiment").load_learner(path))
    parts = ("encoder.", "classifier.")
    try:
        teacher.load_state_dict({name: value for name, value in weights.items() if name.startswith(parts)})
    except RuntimeError as error:
        why = (
            f"it has no classifier; give it one: counterpoint finetune {path} --data SOURCE"
            if not any(name.startswith(parts[1]) for name in weights)
            else " ".join(str(error).split())[:300]
        )
        raise RunError(f"{path} cannot teach: {why}") from error


# ---------------------------------------------------------------------------------------------------------- the learner


class TaughtLearner(LabelledLearner):
    """A student, and a teacher that is trained first or comes from a run. Subclasses write `lesson`.

    The student's loss is ce_weight cross-entropy + kd_weight KD + whatever `lesson` returns.
    """

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.channels = data.channels
        teacher = Classifier(data.teacher_encoder, data, config.teacher_pretrained)
        self.teacher: Classifier | None = None if config.teacher else teacher
        # A run's network: a fit loads its weights, which are not part of this run's weights.
        self.instructor = Frozen(teacher, f"run:{config.teacher}", partial(look, teacher)) if config.teacher else None

    def layers(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the names of the student's and the teacher's layers that `lesson` needs."""
        return (), ()

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return weighted terms of the loss, by name, in addition to cross-entropy and KD."""
        return {}

    def shapes(self) -> list[list[tuple[int, ...]]]:
        """Measure the shapes, without the batch, of the outputs of student's and teacher's layers on a black picture."""
        found = []
        for network, names in zip((self, self.instructing), self.layers(), strict=True):
            training = network.training
            network.eval()
            with torch.no_grad():
                maps = look(network, torch.zeros(1, self.channels, self.size, self.size), names).maps
            found.append([tuple(x.shape[1:]) for x in maps])
            network.train(training)
        return found

    @property
    def instructing(self) -> nn.Module:
        """The teacher's network, from this run or another."""
        network = self.teacher if self.instructor is None else self.instructor.module
        assert network is not None
        return network

    def sizes(self) -> tuple[int, int] | None:
        return parameters(self.encoder, self.classifier), parameters(self.instructing)

    def instruct(self, images: Tensor, layers: Sequence[str] = ()) -> Seen:
        """Compute the teacher's outputs for a batch, in evaluation mode and without gradient."""
        if self.instructor is not None:
            seen: Seen = self.instructor(images, layers)
            return seen
        with torch.no_grad():
            return look(self.instructing.eval(), images, layers)

    def both(self, images: Tensor) -> tuple[Seen, Seen]:
        """Compute the student's and the teacher's outputs for a batch."""
        of_student, of_teacher = self.layers()
        return look(self, images, of_student), self.instruct(images, of_teacher)

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.instructor is not None:
            load_teacher(self.instructor.module, self.config.teacher)

    def stages(self) -> list[Stage]:
        student = Stage("student", self.config.epochs, trains=self.student_parts)
        if self.teacher is None or not self.config.teacher_epochs:
            return [student]
        teacher = self.teacher
        return [
            Stage("teacher", self.config.teacher_epochs, trains=lambda: [teacher], turns=self.teacher_turns),
            student,
        ]

    def student_parts(self) -> list[nn.Module]:
        """Return the modules that the student's stage trains."""
        return [module for name, module in self.named_children() if name != "teacher"]

    @property
    def at_teacher(self) -> bool:
        """Whether the current stage trains the teacher."""
        return self.survey is not None and self.position.stage + 1 < len(self.stages())

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        if self.at_teacher and self.teacher is not None:
            return [(self.teacher.encoder, "forward")]
        return () if any(self.layers()) else super().row_wise()  # inner layers are recorded once, for the whole batch

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (view,) = batch["views"]
        if self.at_teacher:
            return {"loss": cross_entropy(self.instructing(view), batch["label"])}
        student, teacher = self.both(view)
        config, terms = self.config, {}
        if config.ce_weight:
            terms["ce"] = config.ce_weight * cross_entropy(student.logits, batch["label"])
        if config.kd_weight:
            terms["kd"] = config.kd_weight * kd(student.logits, teacher.logits, config.kd_temperature)
        terms |= self.lesson(student, teacher, batch)
        return {"loss": torch.stack(list(terms.values())).sum()} | terms

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        # While the teacher trains, the student has no outputs.
        found = {} if self.at_teacher else super().predict(batch)
        # Another run's network is loaded only in a fit. A trained student works without it.
        if self.instructor is None or self.survey is not None:
            found["teacher_logits"] = self.instruct(batch["image"]).logits
        return found

    def turns(self) -> list[Turn]:
        return [self.turn_of(self.student_parts())]

    def teacher_turns(self) -> list[Turn]:
        """Return the turns of the teacher's stage."""
        return [self.turn_of([self.instructing])]
