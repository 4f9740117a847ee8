"""Define the task `labelled`: learn from pictures and their classes; the evaluation classifies unseen pictures.

A training batch, before and after the learner has drawn its views:

    batch["image"]   [B, 3, H, W] uint8
    batch["index"]   [B] positions in the training set, for state kept per example
    batch["label"]   [B] int64; -1 where the class is hidden from a semi-supervised learner
    batch["views"]   list of V float tensors [B, 3, S, S], normalised

Pictures without a class (label -1 in the source) are left out, except for semi-supervised and unsupervised learners.

A learner with a classifier returns "logits" [n, classes] for a test batch from `predict`. It may also return others as
"<name>_logits" (a teacher's). For each, the evaluation measures:

- the share of test pictures classified right.
- the mean of this share over the classes.
- both on each test split of other domains (`shifts`), under the names <shift>_....

A learner without a classifier returns only "feature" [n, dim]. The evaluation measures:

- the share of pictures whose nearest neighbours in the training set vote for the right class; this is its `accuracy`.
- the share of pictures whose nearest neighbour in the test set has the same class.
- a linear probe, at the end.

All measures are functions of plain arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader

from counterpoint.core.checks import need_rows
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.rows import Keys
from counterpoint.core.world import over_group, processes
from counterpoint.data.images import ImageData, Indices
from counterpoint.engine.loading import Batches, Position
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.images import (
    EvaluationBatches,
    ImageBatches,
    ImageLearner,
    ImagesConfig,
    ImageTask,
    chosen_bank,
)
from counterpoint.tasks.measures import (
    class_chance,
    confusion,
    confusion_figure,
    confusion_of,
    knn_accuracy,
    linear_probe,
)
from counterpoint.words import counted

# ---------------------------------------------------------------------------------------------------------- the measures


def macro_recall(table: Int[Tensor, "classes classes"]) -> float:
    """Compute the mean over the classes of the share of each class's items that are classified right.

    Args:
        table: a confusion matrix whose rows are the truth. Classes without items are left out.
    """
    count = table.sum(1)
    return float((table.diagonal()[count > 0] / count[count > 0]).mean())


def recall_at_1(features: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> float:
    """Compute the share of items whose nearest other item (by cosine) has their class.

    This is the retrieval measure of metric learning (Oh Song et al. 2016, arXiv 1511.06452). Items that are alone in their
    class do not count; the result is nan if every item is alone. If several items tie for the nearest, the share of right
    ones among them counts.
    """
    x = F.normalize(features.float(), dim=1)
    keys, asked = Keys(x), (labels.bincount()[labels] > 1).nonzero().squeeze(1)
    right = 0.0
    for rows in asked.split(1024):
        similarity = keys.products(x[rows])
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest = similarity == similarity.amax(1, keepdim=True)
        same = nearest & (labels == labels[rows, None])
        right += float((same.sum(1).double() / nearest.sum(1)).sum())
    return right / len(asked) if len(asked) else float("nan")


def recall_at_1_chance(labels: Int[Tensor, " n"]) -> float:
    """Return the mean of `recall_at_1` if the nearest other item is drawn at random; nan if every item is alone."""
    counts = labels.bincount().double()
    counts = counts[counts > 1]
    if not len(counts):
        return float("nan")
    return float((counts * (counts - 1)).sum() / counts.sum() / (len(labels) - 1))


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class LabelledConfig(ImagesConfig):
    """Settings of every learner of this task."""

    recipe: str = "weak"
    """Augmentation of the views: simclr, simclr-cifar, supcon, moco-v1, moco-v2, byol, swav, dino, dino-cifar, adainf,
    adainf-cifar, obow, obow-cifar, mae, supervised, weak, none; for small digits digits-moved, digits-easy, digits-plain,
    digits-shifted, digits-hard, digits-s0, digits-s25, digits-s50, digits-s100, digit-patterns, digit-styles, obow-canvases,
    tile-canvases; shapes; clusters; latent-factors (see counterpoint.views.images.RECIPES)."""

    classifies: ClassVar[bool] = True  # whether the learner has a classifier, or an embedding alone
    uses_unlabelled: ClassVar[bool] = False  # whether pictures without a class remain in the training split
    unlabelled_suffices: ClassVar[bool] = False  # whether it learns where no training picture has a class

    def trained_on(self, rows: Indices, data: ImageData) -> Indices:
        """Select the training pictures to use of these positions, which have a class. Default: all."""
        return rows

    def evaluator(self, data: ImageData) -> Any:
        """Return the evaluator of data with these classes. The task sets its attribute `split`."""
        return LabelledEvaluator(self, data.classes)


@dataclass
class EmbeddingConfig(LabelledConfig):
    """Settings of learners of an embedding."""

    hidden: int = 2048
    """Width of the projector's hidden layer."""
    projection: int = 128
    """Width of the projector's output, which the loss compares."""
    images_per_class: int = 0
    """Images of each class in a batch, from batch_size / images_per_class classes; 0: draw images regardless of class."""

    classifies: ClassVar[bool] = False
    counts: ClassVar[tuple[str, ...]] = (*ImagesConfig.counts, "hidden", "projection")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_class < 0 or (self.images_per_class and self.batch_size % self.images_per_class):
            raise CounterpointError(
                f"images_per_class must be 0 or divide batch_size ({self.batch_size}), got {self.images_per_class}"
            )


@dataclass
class SemiSupervisedConfig(LabelledConfig):
    """Settings of semi-supervised learners."""

    labels_per_class: int = 400
    """Training images of each class that keep their label, chosen by the seed; 0: all."""
    labelled_batch: int = 62
    """Images of known class in each batch; 0: draw images regardless of whether their class is known."""

    uses_unlabelled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels_per_class < 0 or not 0 <= self.labelled_batch < self.batch_size:
            raise CounterpointError(
                f"labels_per_class must not be negative and labelled_batch must lie below batch_size ({self.batch_size}), "
                f"got {self.labels_per_class} and {self.labelled_batch}"
            )


# Settings for a small set of small pictures on a few cores, which replace the papers'. Systems add their own.
LAPTOP: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 128,
    "encoder": "resnet-s",
    "optimizer": "sgd",
    "lr": 0.4,
    "weight_decay": 5e-4,
    "warmup_epochs": 1,
    "evaluate_every": 5,
}


# ---------------------------------------------------------------------------------------------------------- the learner


@over_group
@full_precision
def cross_entropy(
    logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], *, label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Sum the cross-entropy over the items of known class (label >= 0), and divide it by the number of all items.

    All items include those of the other processes. If all classes are known, the result is the mean.

    Args:
        logits: outputs of the classifier.
        labels: class of each item; -1 where it is unknown.
        label_smoothing: share of each target that is spread over all classes, 0 to 1.

    Raises ValueError for an empty batch.
    """
    need_rows(logits=logits)
    each = F.cross_entropy(logits, labels.long(), ignore_index=-1, reduction="none", label_smoothing=label_smoothing)
    return global_mean(each)


class LabelledLearner(ImageLearner):
    """An encoder and a linear classifier. Subclasses write `loss(batch)` on batch["views"] and batch["label"]."""

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.classifier = nn.Linear(self.encoder.dim, data.classes)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().predict(batch)
        return found | {"logits": self.classifier(found["feature"])}


# ------------------------------------------------------------------------------------------------------------- the task


def _endless(items: Indices, count: int, generator: np.random.Generator) -> Indices:
    """Repeat the items in a new random order each time, until there are `count`."""
    turns = -(-count // len(items))
    return np.concatenate([generator.permutation(items) for _ in range(turns)] or [items])[:count]


class ClassBatches(Batches):
    """Batches of `per_class` images of each of some classes (P classes x K images: Hermans et al. 2017, arXiv 1703.07737).

    Classes take turns, and so do the images of a class. Rare classes therefore occur as often as others.
    """

    def __init__(self, labels: Indices, per_class: int, batch_size: int) -> None:
        super().__init__(len(labels), batch_size, drop_last=True)
        self.per_class = per_class
        self.members = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def order(self, generator: np.random.Generator) -> Indices:
        groups = _endless(np.arange(len(self.members)), self.counted // self.per_class, generator)
        rows = np.empty((len(groups), self.per_class), np.int64)
        for number, members in enumerate(self.members):
            mine = groups == number
            rows[mine] = _endless(members, int(mine.sum()) * self.per_class, generator).reshape(-1, self.per_class)
        return rows.ravel()


class TwoStreams(Batches):
    """Batches with `labelled` images of known class, followed by images of unknown class.

    An epoch is one pass over the images of unknown class. Source: the authors' code of the mean teacher (arXiv 1703.01780).
    """

    def __init__(self, known: Indices, unknown: Indices, labelled: int, batch_size: int) -> None:
        self.steps = len(unknown) // (batch_size - labelled)
        super().__init__(self.steps * batch_size, batch_size)
        self.known, self.unknown, self.labelled = known, unknown, labelled

    def order(self, generator: np.random.Generator) -> Indices:
        others = self.steps * (self.batch_size - self.labelled)
        streams = (
            _endless(self.known, self.steps * self.labelled, generator),
            generator.permutation(self.unknown)[:others],
        )
        return np.concatenate([stream.reshape(self.steps, -1) for stream in streams], axis=1).ravel()


def known_labels(labels: Indices, per_class: int, seed: int) -> Indices:
    """Keep `per_class` labels of each class, chosen by the seed, and set the others to -1; 0 keeps all."""
    if not per_class:
        return labels
    order = np.random.default_rng([seed, per_class]).permutation(len(labels))
    kept = np.full_like(labels, -1)
    for label in np.unique(labels[labels >= 0]):
        chosen = order[labels[order] == label][:per_class]
        kept[chosen] = label
    return kept


class LabelledEvaluator:
    """Accuracy and mean recall of every classifier, or the accuracy of nearest neighbours in an embedding."""

    def __init__(self, config: LabelledConfig, classes: tuple[str, ...]) -> None:
        self.config, self.classes = config, classes
        self.reset()

    def reset(self) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        self.labels: dict[str, list[Tensor]] = {"bank": [], "test": []}
        self.figures: dict[str, Any] = {}
        self.chances: dict[str, float] = {}  # of the last figures of classifiers

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        part = batch["part"]
        self.labels.setdefault(part, []).append(batch["label"].cpu())
        heads = [name for name in outputs if name.endswith("logits")] or ["feature"]
        for name in heads:
            self.outputs.setdefault(f"{part}/{name}", []).append(outputs[name].detach().float().cpu())

    def compute(self, *, final: bool = False) -> dict[str, float]:
        outputs = {name: torch.cat(parts) for name, parts in self.outputs.items()}
        for name, values in outputs.items():
            if not bool(torch.isfinite(values).all()):
                raise diverged(f"the {name.partition('/')[2]} hold NaN or infinite values")
        labels = torch.cat(self.labels["test"])
        if "test/feature" in outputs:
            bank = outputs["bank/feature"], torch.cat(self.labels["bank"])
            return self._embedding(*bank, outputs["test/feature"], labels, final)
        found: dict[str, float] = {}
        for name, logits in outputs.items():
            part, _, head = name.partition("/")
            prefix = ("" if part == "test" else f"{part}_") + head.removesuffix("logits")  # "teacher_" of a teacher's
            own = torch.cat(self.labels[part])
            measured = self.classified(own, logits)
            found |= {f"{prefix}{key}": value for key, (value, _) in measured.items()}
            self.chances |= {f"{prefix}{key}": level for key, (_, level) in measured.items() if level is not None}
            if part == "test":
                self.figures |= confusion_figure(confusion_of(own, logits), self.classes, head.removesuffix("logits"))
        return found

    def classified(self, labels: Tensor, logits: Tensor) -> dict[str, tuple[float, float | None]]:
        """Measure a classifier: the value and the chance level (None where there is none) of each figure."""
        table = confusion_of(labels, logits)
        guess = class_chance(len(self.classes))
        return {
            "accuracy": (float(table.diagonal().sum() / table.sum()), guess),
            "macro_recall": (macro_recall(table), guess),
        }

    def chance(self) -> dict[str, float]:
        """Return the chance level of every figure of `compute`: 1 / classes, and that of a random neighbour."""
        labels = torch.cat(self.labels["test"]) if self.labels["test"] else torch.zeros(0, dtype=torch.int64)
        guess = class_chance(len(self.classes))
        if "test/feature" in self.outputs:
            names = ("accuracy", "knn_accuracy", "linear_accuracy")
            return dict.fromkeys(names, guess) | {"recall_at_1": recall_at_1_chance(labels)}
        return dict(self.chances)

    def _embedding(
        self, bank: Tensor, bank_labels: Tensor, test: Tensor, labels: Tensor, final: bool
    ) -> dict[str, float]:
        accuracy = knn_accuracy(bank, bank_labels, test, labels, k=self.config.neighbours)
        found = {"accuracy": accuracy, "knn_accuracy": accuracy, "recall_at_1": recall_at_1(test, labels)}
        if final:
            found["linear_accuracy"], predicted = linear_probe(bank, bank_labels, test, labels)
            self.figures |= confusion_figure(confusion(labels, predicted, len(self.classes)), self.classes)
        return found


class LabelledTask(ImageTask):
    """Loaders and evaluator of one source of labelled images."""

    name = "labelled"
    headline = "accuracy"  # the measure it judges by
    watched = "labelled images"

    def __init__(self, data: ImageData, config: LabelledConfig) -> None:
        super().__init__(data, config)
        if len(self.asked("test")) < 2:
            raise DataError(f"{data.name}: needs at least 2 labelled test images, has {len(self.asked('test'))}")

    def asked(self, name: str) -> Indices:
        return _labelled(self.split(name).labels)

    def training_rows(self) -> Indices:
        labelled, classes = _labelled(self.data.train.labels), self.data.classes
        if len(classes) < 2 or not (len(labelled) or self.config.unlabelled_suffices):
            raise DataError(
                f"{self.data.name} has {'one class' if classes and len(labelled) else 'no labels'}; the task labelled needs "
                "at least two classes. For pictures without labels, use a system of the task views (see "
                "counterpoint systems)"
            )
        if self.config.uses_unlabelled:
            return super().training_rows()
        return self.config.trained_on(labelled, self.data)

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        super().check_facts(trained)
        if self.config.classifies and list(trained["class_names"]) != list(self.data.classes):
            raise CounterpointError(
                f"{self.data.name} has other classes ({_few(self.data.classes)}) than the run was trained on "
                f"({_few(trained['class_names'])}); use data with the run's classes"
            )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        if batches is not None or not isinstance(self.config, SemiSupervisedConfig):
            return super().train_loader(seed, position, batches)
        assert self.data.train.labels is not None
        labels = known_labels(self.data.train.labels, self.config.labels_per_class, seed)
        batches = self.batches()
        known, unknown = labels >= 0, labels < 0
        share, unknowns = self.config.labelled_batch, int(unknown.sum())
        if share and unknowns:
            if unknowns < self.config.batch_size - share:
                raise DataError(
                    f"{self.data.name} has {counted(unknowns, 'training image')} of unknown class, fewer than the "
                    f"{self.config.batch_size - share} of a batch; lower --batch-size or --labels-per-class"
                )
            streams = np.flatnonzero(known), np.flatnonzero(unknown)
            batches = TwoStreams(*streams, share, self.config.batch_size)
        return self.loader(ImageBatches(self.data.train, labels=labels), batches.bind(seed, position, *processes()))

    def batches(self) -> Batches:
        per_class = getattr(self.config, "images_per_class", 0)
        if not per_class:
            return super().batches()
        assert self.data.train.labels is not None
        labels = self.data.train.labels[self.rows]
        return ClassBatches(labels, per_class, self.config.batch_size)

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the batches for `evaluator(split)`: the bank if there is no classifier, then the images of the split."""
        parts = [("test", self.split(split), self.asked(split))]
        if not self.config.classifies:
            bank = chosen_bank(_labelled(self.data.train.labels), self.config.bank)
            parts.insert(0, ("bank", self.data.train, bank))
        elif split == "test":
            shifts = self.data.shifts.items()
            parts += [(name, shift, rows) for name, shift in shifts if len(rows := _labelled(shift.labels))]
        return DataLoader(EvaluationBatches(parts), batch_size=None, shuffle=False)

    def evaluator(self, split: str) -> Any:
        found = self.config.evaluator(self.data)
        found.split = split
        return found


def _labelled(labels: Indices | None) -> Indices:
    return np.flatnonzero(np.empty(0) if labels is None else labels >= 0)


def _few(names: Any) -> str:
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")


TASK = LabelledTask
