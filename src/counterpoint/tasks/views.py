"""The task `views`: learn from augmented views of images, judged by what frozen features know of labels never shown.

A training batch, before and after the learner has drawn its views:

    batch["image"]   [B, 3, H, W] uint8
    batch["index"]   [B] positions in the training set, for state kept per example
    batch["label"]   [B] int64, or None where nothing is labelled; self-supervised learners leave it alone
    batch["views"]   list of V float tensors [B, 3, S, S], normalised

A learner's `predict` gives "feature" [n, dim] for a test batch, and "embedding" where its loss compares rows of another space;
for a batch that also holds "views" (pairs, for the alignment) it gives "pair", a list of two. Measured are k-nearest
neighbours and a linear probe on frozen features, and alignment, uniformity and tolerance (tasks/measures.py, functions of
plain arrays).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from counterpoint.data.images import ImageData, ImageSplit
from counterpoint.encoders.images import need_size
from counterpoint.engine.learner import Learner
from counterpoint.errors import CounterpointError
from counterpoint.tasks.images import (
    BATCH,
    EvaluationBatches,
    ImageBatches,
    ImageLearner,
    ImagesConfig,
    ImageTask,
    chosen_bank,
)
from counterpoint.tasks.measures import (
    alignment,
    confusion,
    confusion_figure,
    knn_accuracy,
    linear_probe,
    tolerance,
    uniformity,
)
from counterpoint.views.images import ViewPipeline, normalise

# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class ViewsConfig(ImagesConfig):
    """What every learner of this task can be told."""

    hidden: int = 2048
    """Width of the projector's hidden layers."""
    projection: int = 128
    """Width of what the projector gives to the loss."""

    counts: ClassVar[tuple[str, ...]] = (*ImagesConfig.counts, "hidden", "projection")


@dataclass
class MultiCropConfig(ViewsConfig):
    """Settings of learners that see small crops beside the large ones."""

    local_crops: int = 8
    """Small crops of each image, after the two large ones; 0 for none."""
    local_size: int = 0
    """Their height and width; 0 takes 3/7 of the images' (96 of 224), in whole patches where the encoder has patches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_crops < 0 or self.local_size < 0:
            raise CounterpointError("local_crops and local_size must not be negative")


# What a small set of small pictures on a few cores asks for instead of the papers' settings; systems add what is theirs.
LAPTOP: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 256,
    "encoder": "resnet-s",
    "recipe": "simclr-cifar",
    "hidden": 512,
    "optimizer": "sgd",
    "lr": 0.06,
    "weight_decay": 5e-4,
    "warmup_epochs": 2,
    "evaluate_every": 10,
}


# ---------------------------------------------------------------------------------------------------------- the learner


def mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them, e.g. mlp(512, 2048, 128).

    `last_norm` adds a batch normalisation without scale and shift at the end (SimSiam's projector).
    """
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(itertools.pairwise(widths)):
        last = number == len(widths) - 2
        layers.append(nn.Linear(a, b, bias=last and not last_norm))
        if not last:
            layers += [nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class ViewsLearner(ImageLearner):
    """An encoder and a projector. Subclasses write `loss(batch)` on batch["views"], and what else they need."""

    crops: ClassVar[int] = 2

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.projector = self.build_projector(self.encoder.dim)

    def build_projector(self, dim: int) -> nn.Module:
        """From the encoder's width to what the loss compares."""
        return mlp(dim, self.config.hidden, self.config.projection)

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Projections of equally large views, each [B, projection]; one pass through the network."""
        return list(self.projector(self.encoder(torch.cat(views))).chunk(len(views)))

    @property
    def network(self) -> nn.Sequential:
        """Encoder and projector: what a teacher is a copy of."""
        return nn.Sequential(self.encoder, self.projector)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().predict(batch)
        if batch.get("part") == "test":
            found["embedding"] = self.projector(found["feature"])
        if "views" in batch:
            found["pair"] = [self.embed(view) for view in batch["views"]]
        return found


class MultiCropLearner(ViewsLearner):
    """The same with small crops after the large ones in batch["views"]."""

    def build_views(self) -> ViewPipeline:
        config, patch = self.config, getattr(self.encoder, "patch", 1)
        size = config.local_size or max(1, round(self.size * 3 / 7 / patch)) * patch
        if config.local_crops:
            need_size(self.encoder, config.encoder, size)
        return ViewPipeline(self.size, self.crops, config.recipe, config.local_crops, size)

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Projections of the views, each [B, projection]; one pass through the network for each size."""
        found: list[Tensor] = []
        for _, alike in itertools.groupby(views, key=lambda view: view.shape[-1]):
            found += super().project(list(alike))
        return found


# ------------------------------------------------------------------------------------------------------------- the task


class _TestBatches(EvaluationBatches):
    """First the bank (training images), then the test images, then pairs of views of test images."""

    def __init__(self, data: ImageData, config: ViewsConfig) -> None:
        test = np.arange(len(data.test))
        known = data.bank or data.train
        bank = chosen_bank(np.arange(len(known)), config.bank)
        super().__init__([("bank", known, bank), ("test", data.test, test), ("pair", data.test, test[:1024])])
        self.pipeline = ViewPipeline(data.size, crops=2, recipe=config.recipe)

    def __getitem__(self, number: int) -> dict[str, Any]:
        batch = super().__getitem__(number)
        if batch["part"] == "pair":
            _, split, rows = self.at[number]
            pixels = ImageBatches(split)[rows.tolist()]["image"]
            batch["views"] = self.pipeline(pixels, torch.Generator().manual_seed(number))
        return batch


class ViewsEvaluator:
    """k-NN after every evaluation, the linear probe at the end; alignment and uniformity on test images."""

    def __init__(self, config: ViewsConfig, classes: tuple[str, ...]) -> None:
        self.config, self.classes = config, classes
        self.reset()

    def reset(self) -> None:
        self.features: dict[str, list[Tensor]] = {"bank": [], "test": []}
        self.labels: dict[str, list[Tensor]] = {"bank": [], "test": []}
        self.embedded: list[Tensor] = []
        self.pairs: list[list[Tensor]] = []
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        part = batch["part"]
        if part == "pair":
            self.pairs.append([x.detach().float().cpu() for x in outputs["pair"]])
            return
        self.features[part].append(outputs["feature"].detach().float().cpu())
        if part == "test" and "embedding" in outputs:
            self.embedded.append(outputs["embedding"].detach().float().cpu())
        if batch["label"] is not None:
            self.labels[part].append(batch["label"].cpu())

    def compute(self, *, final: bool = False) -> dict[str, float]:
        bank, test = (torch.cat(self.features[part]) for part in ("bank", "test"))
        for features in (bank, test):
            if not bool(torch.isfinite(features).all()):
                raise CounterpointError("the features hold NaN or infinite values: training diverged; lower --lr")
        found: dict[str, float] = {}
        if self.classes and self.labels["bank"] and self.labels["test"]:
            labels, test_labels = (torch.cat(self.labels[part]) for part in ("bank", "test"))
            known, asked = labels >= 0, test_labels >= 0
            four = bank[known], labels[known], test[asked], test_labels[asked]
            found["knn_accuracy"] = knn_accuracy(*four, k=self.config.neighbours)
            if final:
                found["linear_accuracy"], predicted = linear_probe(*four)
                self.figures |= confusion_figure(
                    confusion(test_labels[asked], predicted, len(self.classes)), self.classes
                )
        pairs = [torch.cat(side) for side in zip(*self.pairs, strict=True)]
        found["alignment"], found["uniformity"] = alignment(*pairs), uniformity(test)
        if self.embedded:
            embedded = torch.cat(self.embedded)
            found["embedding_uniformity"] = uniformity(embedded)
            labels = torch.cat(self.labels["test"]) if self.labels["test"] else torch.empty(0)
            known = labels >= 0
            if int(known.sum()) > len(labels[known].unique()):
                found["embedding_tolerance"] = tolerance(embedded[known], labels[known])
        return found


class ViewsTask(ImageTask):
    """Loaders and evaluator of one source of images."""

    name = "views"
    headline = "knn_accuracy"  # the measure it judges by

    def __init__(self, data: ImageData, config: ViewsConfig) -> None:
        super().__init__(data, config)
        if config.batch_size < 2:
            raise CounterpointError("batch_size must be at least 2: views are contrasted within a batch")

    def test_loader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_TestBatches(self.data, self.config), batch_size=None, shuffle=False)

    def evaluator(self) -> ViewsEvaluator:
        return ViewsEvaluator(self.config, self.data.classes)


TASK = ViewsTask


def features_of(learner: Learner, split: ImageSplit) -> NDArray[np.float32]:
    """[n, dim] features of every image of a split, by a trained learner of this task."""
    found = []
    with torch.no_grad():
        for start in range(0, len(split), BATCH):
            rows = np.arange(start, min(start + BATCH, len(split)))
            images = torch.from_numpy(split.images(rows)).permute(0, 3, 1, 2)
            found.append(learner.predict({"image": normalise(images.to(learner.device))})["feature"].cpu().numpy())
    return np.concatenate(found)
