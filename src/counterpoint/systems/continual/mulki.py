"""MulKI: two teachers and class prototypes keep a CLIP's knowledge while it learns task after task.

Zhang, Ji, Liu, Pang, Han: "Multi-Stage Knowledge Integration of Vision-Language Models for Continual Learning", IEEE Trans. Image
Processing 35, 2026, arXiv 2411.06764. No code was released.

**The equations below are choices of this library, not the paper's.** Its body could not be read. The four
stages and their purpose are known, and two teachers with a weight for each sample. Prototypes begin as the original CLIP's, and
relations are distilled on several levels. Protocol and softened rows are those of ZSCL (arXiv 2303.06628).

    z, W         [n, dim], [classes, dim] unit embeddings of a task's images and class texts by the student
    z_j, W_j     those by teacher j: the original network (0) and the student after the task before (1), both frozen
    P            [classes, dim] prototypes, one for each class of the task
    s, T         scale of the logits, which is fixed, and temperature
    R(a, B)      softmax(s/T a B^T) over the rows of B

1. Eliciting ideas: L_cls = CE(s z W^T, y), and L_proto, the symmetric contrast of W and P.
2. Adding ideas, for each teacher. Of each image:

       |z - z_j|^2 + KL(R(z_j, W_j) || R(z, W_j)) + KL(R(z_j, P) || R(z, P))

   and KL(R(W_j, P) || R(W, P)) of each class. Both sides of a KL have the same rows, so student and rows cannot drift together.
3. Distinguishing ideas: the weight of teacher j for an image is the softmax over teachers of log p_j(y) / T_w. A class has the mean
   weight of its images in the batch, or of the batch.
4. Making connections: L = L_cls + l1 L_proto + l2 (weighted sum of step 2). `--connect` also connects weights: a running average
   within a task as ZSCL's ensemble, an interpolation with the network before the task, or both. It is off by default.

P begins as class means of the original network's embeddings, in one pass over the task's images. After each step it moves towards
the batch's means, with momentum 0.9. `--prototypes` keeps it fixed, makes it learnable by L_proto, or gives each teacher its own
class means. In the first task both teachers are one network, which counts once. `--l1 0 --l2 0` is plain fine-tuning.

Left out: the baselines LwF and iCaRL, and ZSCL, which needs reference data. Other settings are ZSCL's.
Training lasts a number of epochs instead of 1,000 steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.averages import blended
from counterpoint.core.checks import need_positive, need_rows, need_word, shapes
from counterpoint.core.distil import softened_divergences
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, scalar, wide
from counterpoint.core.prototypes import prototype_alignment, prototypes_towards_means
from counterpoint.core.world import over_group
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, parameters
from counterpoint.systems.base import System
from counterpoint.tasks.measures import class_means
from counterpoint.tasks.task_streams import TaskStreamConfig, TaskStreamLearner


class MulKI(NamedTuple):
    loss: Float[Tensor, ""]
    classification: Float[Tensor, ""]
    prototype: Float[Tensor, ""]
    integration: Float[Tensor, ""]
    first: Float[Tensor, ""]  # mean weight of the first teacher; 0 without teachers


@full_precision
@torch.no_grad()
def teacher_weights(losses: Float[Tensor, "rows teachers"], temperature: float = 1.0) -> Float[Tensor, "rows teachers"]:
    """Weight the teachers of each row by softmax(-loss / temperature) (step 3).

    Args:
        losses: the teachers' cross-entropies of the true class.
        temperature: T_w, > 0, by default 1.

    No gradient. Raises ValueError for another shape, and for no row or no teacher.

    >>> teacher_weights(torch.tensor([[1.0, 2.0]]))
    tensor([[0.7311, 0.2689]])
    """
    if losses.ndim != 2 or not losses.shape[1]:
        raise ValueError(f"losses must be [rows, teachers], got {list(losses.shape)}")
    need_rows(losses=losses)
    need_positive(temperature=temperature)
    return (-wide(losses) / temperature).softmax(1)


@over_group
@full_precision
def mulki_loss(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " n"],
    teacher_images: Float[Tensor, "teachers n dim"],
    teacher_texts: Float[Tensor, "teachers classes dim"],
    prototypes: Float[Tensor, "classes dim"],
    logit_scale: float | Float[Tensor, ""],
    l1: float = 0.1,
    l2: float = 1.0,
    feature_weight: float = 1.0,
    temperature: float = 2.0,
    weights: Literal["adaptive", "equal"] = "adaptive",
    weight_temperature: float = 1.0,
    label_smoothing: float = 0.0,
    teacher_prototypes: Float[Tensor, "teachers classes dim"] | None = None,
) -> MulKI:
    r"""Compute L_cls + l1 L_proto + l2 L_inter (step 4). The form is this library's choice, see the module.

    Args:
        image, text: the student's embeddings of images and of the task's class texts, of any norm; normalised here.
        labels: [n] class numbers, positions in `text`.
        teacher_images, teacher_texts: those by each teacher; no gradient. No teacher: L_inter is 0.
        prototypes: P, of any norm. Relations give it no gradient, L_proto does.
        logit_scale: s, 1 / temperature of the logits, at least 0.
        l1, l2: weights of L_proto and L_inter, by default 0.1 and 1.
        feature_weight: weight of |z - z_j|^2 within L_inter, by default 1.
        temperature: T of the relations, by default 2.
        weights: "adaptive" for each image (step 3), or "equal".
        weight_temperature: T_w of adaptive weights, by default 1.
        label_smoothing: of L_cls, by default 0.
        teacher_prototypes: prototypes for each teacher's relations. Default: P for all.

    Across processes, means are over the images of all. Raises ValueError for shapes that do not fit and an empty batch.

    >>> x = torch.eye(2)
    >>> mulki_loss(x, x, torch.tensor([0, 1]), x[None], x[None], x, 1.0).integration
    tensor(0.)
    """
    need_rows(image=image, text=text)
    teachers, fit = len(teacher_images), (text.shape, prototypes.shape)
    if text.ndim != 2 or image.shape[1:] != text.shape[1:] or fit[0] != fit[1] or len(labels) != len(image):
        said = shapes(image=image, text=text, labels=labels, prototypes=prototypes)
        raise ValueError(
            f"image, text, labels and prototypes must be [n, dim], [classes, dim], [n] and as text, got {said}"
        )
    if teacher_images.shape[1:] != image.shape or teacher_texts.shape != (teachers, *text.shape):
        said = shapes(teacher_images=teacher_images, teacher_texts=teacher_texts)
        raise ValueError(f"teacher_images and teacher_texts must be a list of such rows for each teacher, got {said}")
    need_word(("adaptive", "equal"), weights=weights)
    z, w, bank = unit(wide(image)), unit(wide(text)), unit(wide(prototypes))
    s = scalar(logit_scale, z)
    classification = global_mean(
        F.cross_entropy(s * (z @ w.T), labels, reduction="none", label_smoothing=label_smoothing)
    )
    prototype = prototype_alignment(w, bank, s)
    if not teachers:
        zero = classification.new_zeros(())
        return MulKI(classification + l1 * prototype, classification, prototype, zero, zero)
    old_z, old_w = unit(wide(teacher_images.detach())), unit(wide(teacher_texts.detach()))
    need_positive(temperature=temperature)
    banks = [bank.detach()] * teachers if teacher_prototypes is None else list(unit(wide(teacher_prototypes.detach())))
    by_text, factor = [z_j @ w_j.T for z_j, w_j in zip(old_z, old_w, strict=True)], s / temperature
    every_teacher = list(zip(old_z, old_w, by_text, banks, strict=True))
    of_images = torch.stack(
        [
            feature_weight * (z - z_j).square().sum(1)
            + softened_divergences(z @ w_j.T, similar, factor)
            + softened_divergences(z @ p_j.T, z_j @ p_j.T, factor)
            for z_j, w_j, similar, p_j in every_teacher
        ],
        1,
    )
    of_classes = torch.stack(
        [softened_divergences(w @ p_j.T, w_j @ p_j.T, factor) for _, w_j, _, p_j in every_teacher], 1
    )
    a = torch.full_like(of_images, 1 / teachers)
    if weights == "adaptive":
        losses = [F.cross_entropy(s * similar, labels, reduction="none") for similar in by_text]
        a = teacher_weights(torch.stack(losses, 1), weight_temperature)
    every, numbers = gather_rows(a.detach()), gather_rows(labels)
    sums = every.new_zeros(len(w), teachers).index_add(0, numbers, every)
    count = every.new_zeros(len(w), 1).index_add(0, numbers, every.new_ones(len(every), 1))
    a_classes = torch.where(count > 0, sums / count.clamp(min=1), every.mean(0))
    integration = global_mean((a * of_images).sum(1)) + (a_classes * of_classes).sum(1).mean()
    loss = classification + l1 * prototype + l2 * integration
    return MulKI(loss, classification, prototype, integration, every[:, 0].mean())


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class MulKIConfig(TaskStreamConfig):
    """Settings of MulKI. Defaults are ZSCL's for ViT-B/16, with this library's weights of the losses."""

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-5 * 256 / 64
    weight_decay: float = 0.0
    warmup_epochs: int = 1
    schedule: Literal["epoch", "step"] = "step"
    recipe: str = "weak"
    l1: float = 0.1
    """Weight of the contrast of class texts and prototypes, at least 0."""
    l2: float = 1.0
    """Weight of the distances from the teachers, at least 0. Where l1 and l2 are 0: plain fine-tuning."""
    feature_weight: float = 1.0
    """Weight of the squared distance of student and teacher embeddings, within l2; lower it where new tasks learn too slowly."""
    temperature: float = 2.0
    """Divisor of the scaled cosines in the relations, > 0."""
    weights: Literal["adaptive", "equal", "first", "second"] = "adaptive"
    """Weights of both teachers: adaptive for each picture, equal, or one of them alone (first: the original network)."""
    weight_temperature: float = 1.0
    """Divisor of the teachers' log-probabilities in adaptive weights, > 0."""
    prototypes: Literal["updated", "fixed", "per_teacher", "learnable"] = "updated"
    """Prototypes: updated by the student's embeddings, fixed, a fixed set for each teacher, or learned by the contrast."""
    prototype_momentum: float = 0.9
    """Share of an updated prototype that remains after a step, 0 to 1."""
    label_smoothing: float = 0.2
    """Smoothing of the classes' labels, 0 to below 1."""
    connect: Literal["none", "average", "interpolate", "both"] = "none"
    """Connect weights: a running average within a task, an interpolation with the network before the task, both, or none."""
    connect_every: int = 100
    """Steps between two networks of the running average."""
    connect_share: float = 0.5
    """Share of the network before the task in the interpolation, 0 to 1."""

    distils: ClassVar[bool] = False  # its teachers are its own past
    counts: ClassVar[tuple[str, ...]] = (*TaskStreamConfig.counts, "connect_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_weight("l1", "l2", "feature_weight")
        self.need_positive("temperature", "weight_temperature")
        self.need_share("prototype_momentum", "connect_share")
        self.need_below_one("label_smoothing")


class MulKILearner(TaskStreamLearner):
    """A network of pictures and texts that learns task after task, and two frozen copies: the first, and the last task's."""

    config: MulKIConfig
    banks: Tensor  # [2, classes, dim] class means by both teachers, of the current task
    teacher_texts: Tensor  # [2, classes, dim] class texts by both teachers
    averaged: Tensor  # number of networks in the running average, and steps of the task

    def __init__(self, config: MulKIConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        shape = (data.classes, self.encoder.dim)
        self.bank = nn.Parameter(torch.zeros(shape), requires_grad=config.prototypes == "learnable")
        for name in ("banks", "teacher_texts"):
            self.register_buffer(name, torch.zeros(2, *shape))
        self.register_buffer("averaged", torch.zeros(2, dtype=torch.int64))
        averages = config.connect in ("average", "both")
        self.running = copy.deepcopy(self.encoder).requires_grad_(False) if averages else None
        self.seen: tuple[Tensor, Tensor] | None = None  # embeddings and classes of the step

    def enter_phase(self, phase: int, survey: Survey) -> None:
        super().enter_phase(phase, survey)
        self._begin_task(survey, self.phase_of(survey, "train")[survey.rows] == phase)

    def enter_joint(self, survey: Survey) -> None:
        self._begin_task(survey, np.ones(len(survey.rows), bool))

    @torch.no_grad()
    def _begin_task(self, survey: Survey, chosen: NDArray[np.bool_]) -> None:
        """Compute both teachers' class texts and class means, where the prototypes begin; begin a running average."""
        for number, teacher in enumerate((self.origin, self.previous)):
            network: Any = teacher.to(self.device).module
            self.teacher_texts[number] = network.class_rows(self.texts)
            if number == 0 or self.config.prototypes == "per_teacher":
                rows = survey.rows[chosen]
                embedded = survey.over("train", partial(_rows, teacher), rows)
                assert survey.labels is not None
                means, classes = class_means(unit(embedded.float()), survey.labels[rows])
                self.banks[number, classes.to(self.device)] = means.to(self.banks)
        self.bank.copy_(self.banks[0])
        self.averaged.zero_()

    def teachers(self) -> list[tuple[int, Frozen]]:
        """Return the teachers of the current task with their numbers; in the first task both are one network."""
        both = [(0, self.origin), (1, self.previous)]
        if self.config.weights in ("first", "second"):
            return [both[self.config.weights == "second"]]
        return both if self.phase else both[:1]

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, images = self.config, batch["views"][0]
        own = torch.from_numpy(self.classes).to(self.device)
        labels = torch.searchsorted(own, batch["label"])
        rows, text = self.embed(images), self.encoder.class_rows(self.texts_of_phase())
        used = self.teachers() if config.l2 else []
        numbers = [number for number, _ in used]
        taught = rows.new_zeros(len(used), *rows.shape)
        for n, (_, teacher) in enumerate(used):
            taught[n] = teacher(images.float())
        apart = self.banks[numbers][:, own] if config.prototypes == "per_teacher" else None
        found = mulki_loss(
            *(rows, text, labels, taught, self.teacher_texts[numbers][:, own], self.bank[own], self.scale),
            *(config.l1, config.l2, config.feature_weight, config.temperature),
            weights="equal" if config.weights == "equal" else "adaptive",
            weight_temperature=config.weight_temperature,
            label_smoothing=config.label_smoothing,
            teacher_prototypes=apart,
        )
        self.seen = unit(rows.detach().float()), batch["label"]
        shown = {"classification": found.classification, "prototype": found.prototype}
        if used:
            shown |= {"integration": found.integration, "first_weight": found.first}
        return {"loss": found.loss} | {name: value.detach() for name, value in shown.items()}

    @torch.no_grad()
    def end_step(self) -> None:
        super().end_step()
        if self.config.prototypes == "updated" and self.seen is not None:
            self.bank.copy_(prototypes_towards_means(self.bank, *self.seen, self.config.prototype_momentum))
        self.averaged[1] += 1
        if self.running is not None and int(self.averaged[1]) % self.config.connect_every == 0:
            count = int(self.averaged[0])
            blended(self.running, self.running if count else self.encoder, self.encoder, 1 / (count + 1))
            self.averaged[0] += 1

    def end_epoch(self, epoch: int) -> None:
        if self.last_epoch:
            self._connect()
        super().end_epoch(epoch)

    @torch.no_grad()
    def _connect(self) -> None:
        """Connect the weights of a task's end: the running average, then the interpolation with the network before."""
        config = self.config
        if self.running is not None and int(self.averaged[0]):
            blended(self.encoder, self.encoder, self.running, 1.0)
        if config.connect in ("interpolate", "both"):
            blended(self.encoder, self.encoder, self.previous.module, config.connect_share)

    def sizes(self) -> tuple[int, int] | None:
        return parameters(self.encoder), parameters(self.origin.module)


def _rows(teacher: Frozen, batch: dict[str, Any]) -> Tensor:
    return teacher(batch["image"])


TEACHER = (
    "fit:clip?data=digit-domains%3Forigin=1&image_encoder=mlp-s&text_encoder=tower-64-1-16&embedding=32&recipe=none&epochs=60"
    "&batch_size=64&lr=0.008&context=16&evaluate_every=60"
)
# Settings for small pictures on a few cores, which replace the paper's.
LAPTOP: dict[str, Any] = {
    "teacher": TEACHER, "templates": "{}", "epochs": 5, "batch_size": 64, "lr": 1e-3, "warmup_epochs": 0, "label_smoothing": 0.0,
    "recipe": "none", "evaluate_every": 10,
}  # fmt: skip

RECIPES = {"digit-domains": LAPTOP}
SYSTEM = System(
    slug="mulki", task="labelled", config=MulKIConfig, learner=MulKILearner, data="digit-domains", recipes=RECIPES
)
