r"""SLA: learn class and transformation as one joint label, and let the transformed copies of a picture vote for its class.

Lee, Hwang, Shin: "Self-supervised Label Augmentation via Input Transformations", ICML 2020, arXiv 1910.05872. Code:
github.com/hankook/SLA.

A picture and its M known transformations (rotations, permutations of the colours) are M copies. Data augmentation gives all
copies the picture's class, and so forces a network to ignore the transformation. SLA makes no such demand: a copy's label is
the pair (class, transformation), one of C M.

    C, M      number of classes, number of transformations; transformation 0 is the identity
    J         joint logits [B, M, C, M]: J[b, i, c, j] of copy i of picture b, for class c and transformation j
    A         aggregated logits [B, C]
    u         logits [B, C] of a second head, of the identity's copy alone

    L_SLA = mean over b, i of CE( J[b, i], (y_b, i) ), a softmax over all C M labels                         (Eq. 3)
    P(c | x) = softmax_c J[b, 0, c, 0]                       one pass, "single"
    A[b, c] = (1/M) sum_i J[b, i, c, i],  P = softmax A      M passes, "aggregated"                          (Eq. 4)
    L = L_SLA + CE(u, y) + T^2 KL( softmax(A / T) || softmax(u / T) ),  A without gradient                   (Eq. 5)

The second head distils the vote of the copies into one pass, "distilled". Eq. 5's weight of the cross-entropy is 1, as in
the code.

`method` also trains the three baselines with the same network: "plain", without transformations; "augment" (the paper's DA),
where each copy has the class as its label; "multi-task" (MT), which predicts class and transformation with two heads. These
are SLA with joint logits w_c and w_c + v_j: tests compare them.

Differences: batches are passes over the training set, where the code draws each batch anew. Learning rates fall on half a
cosine, not in two steps. The paper's few-shot and imbalanced losses below SLA are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_numbers, need_positive, need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.images import ImageLearner
from counterpoint.tasks.labelled import LAPTOP, LabelledConfig, cross_entropy
from counterpoint.tasks.vote_figures import vote_figures
from counterpoint.views.images import denormalise, normalise

# --------------------------------------------------------------------------------------------------------- transformations

ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
CYCLES = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
# name: (numbers of quarter turns counter-clockwise, orders of the colours); the turns are the outer index.
TRANSFORMATIONS: dict[str, tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "none": ((0,), ORDERS[:1]),
    "rotation": ((0, 1, 2, 3), ORDERS[:1]),
    "rotation2": ((0, 2), ORDERS[:1]),
    "color_perm": ((0,), ORDERS),
    "color_perm3": ((0,), CYCLES),
    "rot_color_perm6": ((0, 2), CYCLES),
    "rot_color_perm12": ((0, 1, 2, 3), CYCLES),
    "rot_color_perm24": ((0, 1, 2, 3), ORDERS),
}


def named(name: str) -> list[str]:
    """Return the names of the transformations of a set, in order: "0 degrees", "90 degrees, BGR", ..."""
    turns, orders = _chosen(name)
    colours = ["".join("RGB"[channel] for channel in order) for order in orders]
    return [f"{90 * turn} degrees" + (f", {colour}" if len(orders) > 1 else "") for turn in turns for colour in colours]


def _chosen(name: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    if name not in TRANSFORMATIONS:
        raise unknown("set of transformations", name, list(TRANSFORMATIONS))
    return TRANSFORMATIONS[name]


def expand(images: Float[Tensor, "b channels height width"], name: str = "rotation") -> Tensor:
    """Return the M transformed copies of every image, [b M, channels, height, width], all copies of an image together.

    Args:
        images: of any type; for sets with colours, three channels.
        name: a set of `TRANSFORMATIONS`; "rotation" (default): 0, 90, 180 and 270 degrees counter-clockwise. In copy
            "BGR" the first channel is the image's third.

    Raises ValueError for images that are not square under quarter turns, and for another number of channels than three.
    Raises CounterpointError for an unknown set.

    >>> expand(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), "rotation")[1].tolist()
    [[[2.0, 4.0], [1.0, 3.0]]]
    """
    turns, orders = _chosen(name)
    if images.ndim != 4:
        raise ValueError(f"images must be [b, channels, height, width], got {shapes(images=images)}")
    if any(turn % 2 for turn in turns) and images.shape[2] != images.shape[3]:
        raise ValueError(
            f"quarter turns need square images, got {shapes(images=images)}; rotation2 has half turns alone"
        )
    if len(orders) > 1 and images.shape[1] != 3:
        raise ValueError(f"{name} permutes three channels, got {shapes(images=images)}")
    copies = []
    for turn in turns:
        turned = images.rot90(turn, (2, 3))
        copies += [turned if order == ORDERS[0] else turned[:, list(order)] for order in orders]
    return torch.stack(copies, 1).flatten(0, 1)


# --------------------------------------------------------------------------------------------------------------- equations


def _joint(joint_logits: Tensor, num_transforms: int) -> Tensor:
    """Return J [B, M, C, M] of the logits [B M, C M]."""
    if num_transforms < 1:
        raise ValueError(f"num_transforms must be at least 1, got {num_transforms}")
    rows, columns = joint_logits.shape if joint_logits.ndim == 2 else (1, 1)
    if joint_logits.ndim != 2 or rows % num_transforms or columns % num_transforms or not columns:
        raise ValueError(
            f"joint_logits must be [b M, classes M] with M = num_transforms = {num_transforms}, got "
            f"{shapes(joint_logits=joint_logits)}"
        )
    return joint_logits.view(-1, num_transforms, columns // num_transforms, num_transforms)


@full_precision
def aggregate(joint_logits: Float[Tensor, "bm cm"], num_transforms: int) -> Float[Tensor, "b c"]:
    """Compute A[b, c] = (1/M) sum_i J[b, i, c, i]: each copy is read in the columns of its own transformation.

    Args:
        joint_logits: [b M, classes M], the copies of a picture together; columns ordered by class, then transformation.
        num_transforms: M, at least 1.

    The softmax of A is the geometric mean of the copies' conditional probabilities, up to a factor.

    >>> aggregate(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 1.0]]), 2)
    tensor([[2.0000, 0.5000]])
    """
    return _joint(joint_logits, num_transforms).diagonal(dim1=1, dim2=3).mean(2)


@full_precision
def identity_logits(joint_logits: Float[Tensor, "bm cm"], num_transforms: int) -> Float[Tensor, "b c"]:
    """Return J[b, 0, c, 0]: the untransformed copy in the columns of the identity; arguments as in `aggregate`.

    >>> identity_logits(torch.tensor([[1.0, 0.0, 5.0, 0.0], [0.0, 3.0, 0.0, 1.0]]), 2)
    tensor([[1., 5.]])
    """
    return _joint(joint_logits, num_transforms)[:, 0, :, 0]


def joint_label(label: Int[Tensor, " b"], num_transforms: int) -> Int[Tensor, " bm"]:
    """Return the labels y M + i of the copies i of pictures of class y, [b M].

    >>> joint_label(torch.tensor([0, 2]), 2)
    tensor([0, 1, 4, 5])
    """
    return (label[:, None] * num_transforms + torch.arange(num_transforms, device=label.device)).flatten()


@over_group
@full_precision
def sla_loss(
    joint_logits: Float[Tensor, "bm cm"],
    label: Int[Tensor, " b"],
    num_transforms: int,
    single_logits: Float[Tensor, "bm c"] | None = None,
    temperature: float = 1.0,
    sum_over_transforms: bool = False,
) -> Float[Tensor, ""]:
    r"""Compute L_SLA (Eq. 3) and, with the logits of a second head, L (Eq. 5).

    Args:
        joint_logits: [b M, classes M], the copies of a picture together; columns ordered by class, then transformation.
        label: class of each picture, 0 to classes - 1.
        num_transforms: M, at least 1.
        single_logits: the second head's logits of all copies; those of the identity count. Default: no self-distillation.
        temperature: T > 0 of the self-distillation; default 1.
        sum_over_transforms: whether L_SLA is a sum over the copies, not their mean (the code's "large loss"); default no.

    Returns a scalar: across processes that of all pictures. All logits 0: log(classes M) for L_SLA. Raises ValueError for shapes
    that do not fit, an empty batch and labels outside the classes. Raises it too for a temperature that is not positive.
    Source: the authors' code, trainers.py.

    >>> sla_loss(torch.zeros(4, 6), torch.tensor([0, 2]), 2)
    tensor(1.7918)
    """
    classes = _joint(joint_logits, num_transforms).shape[2]
    if label.shape != (len(joint_logits) // num_transforms,):
        raise ValueError(f"label must be [b] for joint_logits [b M, classes M], got {shapes(label=label)}")
    need_rows(label=label)
    need_positive(temperature=temperature)
    need_numbers(classes, label=label)
    losses = F.cross_entropy(joint_logits, joint_label(label, num_transforms), reduction="none")
    loss = global_mean(losses) * (num_transforms if sum_over_transforms else 1)
    if single_logits is None:
        return loss
    if single_logits.shape != (len(joint_logits), classes):
        raise ValueError(f"single_logits must be [b M, classes] = {[len(joint_logits), classes]}, got "
                         f"{shapes(single_logits=single_logits)}")  # fmt: skip
    own = single_logits[::num_transforms]
    target = (aggregate(joint_logits, num_transforms).detach() / temperature).log_softmax(1)
    log_q = (own / temperature).log_softmax(1)
    p = target.exp()
    # A class of probability 0 adds nothing, also where its logarithm is -inf.
    divergence = torch.where(p > 0, p * (target - log_q), 0.0).sum(1)
    hard = F.cross_entropy(own, label, reduction="none")
    return loss + global_mean(hard + temperature**2 * divergence)


# ----------------------------------------------------------------------------------------------------------- the learner


@dataclass
class SLAConfig(LabelledConfig):
    """Settings of SLA. Defaults are the authors' for CIFAR, where 80,000 steps of 128 pictures are 204 epochs."""

    epochs: int = 204
    batch_size: int = 128
    """Pictures in a batch, over all processes together; the network sees M times as many copies."""
    optimizer: str = "sgd"
    lr: float = 0.2
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256."""
    weight_decay: float = 1e-4
    warmup_epochs: int = 0
    method: Literal["sla", "plain", "augment", "multi-task"] = "sla"
    """sla; or a baseline: plain (no transformations), augment (all copies have the class), multi-task (two heads)."""
    transformations: str = "rotation"
    """Transformations: none, rotation (quarter turns, M = 4), rotation2 (half turns), color_perm (orders of the colours, M = 6),
    color_perm3 (cycles), and both together: rot_color_perm6, rot_color_perm12, rot_color_perm24. A number in a name is M."""
    self_distill: bool = False
    """Train a second head on the vote of the copies, so that one pass suffices."""
    temperature: float = 1.0
    """Temperature of the self-distillation."""
    sum_over_transforms: bool = False
    """Sum the loss over the copies, instead of their mean, as the authors do for ImageNet."""
    inference: Literal["aggregated", "single", "distilled"] = "aggregated"
    """Classifier that `accuracy` measures: aggregated (M passes), single (one pass of the joint head), or distilled (one
    pass of the second head). The others are measured under their own names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        if self.self_distill and self.method != "sla":
            raise CounterpointError(f"self_distill needs --method sla, got {self.method}")
        if self.inference == "distilled" and not self.self_distill:
            raise CounterpointError("--inference distilled needs the second head: add --self-distill")

    def check(self) -> None:
        super().check()
        _chosen(self.transformations)


class SLA(ImageLearner):
    """An encoder with a joint head for class and transformation, or one of the baselines."""

    config: SLAConfig

    def __init__(self, config: SLAConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.copies = 1 if config.method == "plain" else len(named(config.transformations))
        self.classes = data.classes
        dim = self.encoder.dim
        self.joint = nn.Linear(dim, data.classes * self.copies) if config.method == "sla" else None
        second = config.method != "sla" or config.self_distill
        self.classifier = nn.Linear(dim, data.classes) if second else None
        self.transformed = nn.Linear(dim, self.copies) if config.method == "multi-task" else None

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if len(_chosen(self.config.transformations)[1]) > 1 and self.config.method != "plain":
            images = denormalise(survey.batch("train", survey.rows[:256])["image"])
            if bool(((images - images[:, :1]).abs() < 1e-3).all()):
                raise DataError(
                    f"permutations of the colours do not change grey pictures: --transformations "
                    f"{self.config.transformations} would give copies that are all equal; use rotation"
                )

    def copied(self, images: Tensor) -> Tensor:
        """Return all copies of normalised images; colours change places before they are normalised."""
        if self.copies == 1:
            return images
        if len(_chosen(self.config.transformations)[1]) == 1:
            return expand(images, self.config.transformations)
        return normalise(expand(denormalise(images), self.config.transformations))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, label = self.config, batch["label"]
        features = self.encoder(self.copied(batch["views"][0]))
        if self.joint is not None:
            second = None if self.classifier is None else self.classifier(features)
            joint = self.joint(features)
            options = config.temperature, config.sum_over_transforms
            return {"loss": sla_loss(joint, label, self.copies, second, *options)}
        assert self.classifier is not None
        found = {"classes": cross_entropy(self.classifier(features), label.repeat_interleave(self.copies))}
        if self.transformed is not None:
            number = torch.arange(self.copies, device=label.device).repeat(len(label))
            found["transformations"] = cross_entropy(self.transformed(features), number)
        return {"loss": torch.stack(list(found.values())).sum()} | found

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        features = self.encoder(self.copied(batch["image"]))
        found = {"feature": features[:: self.copies]}
        if self.joint is not None:
            joint = self.joint(features)
            heads = {"aggregated": aggregate(joint, self.copies), "single": identity_logits(joint, self.copies)}
            if self.classifier is not None:
                heads["distilled"] = self.classifier(found["feature"])
        else:
            assert self.classifier is not None
            logits = self.classifier(features).view(-1, self.copies, self.classes)
            # A baseline classifies the picture itself; the mean over its copies is measured too.
            heads = {"single": logits[:, 0], "aggregated": logits.mean(1)}
        chosen = heads.pop(self.config.inference if self.joint is not None else "single")
        return found | {"logits": chosen} | {f"{name}_logits": logits for name, logits in heads.items()}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show how accuracy grows with the copies that vote, and which transformations the joint head recognises."""
        head = self.joint
        if head is None or self.copies == 1:
            return {}

        def read(batch: Mapping[str, Any]) -> Tensor:
            return _joint(head(self.encoder(self.copied(batch["image"]))), self.copies)

        rows = np.flatnonzero(survey.split("test").labels >= 0)
        joint = survey.over("test", read, rows)
        label = torch.from_numpy(survey.split("test").labels[rows])
        return vote_figures(joint, label, named(self.config.transformations))


SYSTEM = System(
    slug="sla",
    task="labelled",
    config=SLAConfig,
    learner=SLA,
    data="cifar10",
    recipe=LAPTOP | {"lr": 0.2},
)
