"""The task `views`: learn from augmented views of images, judged by what frozen features know of labels never shown.

A training batch, before and after the learner has drawn its views:

    batch["image"]   [B, 3, H, W] uint8
    batch["index"]   [B] positions in the training set, for state kept per example
    batch["label"]   [B] int64, or None where nothing is labelled; self-supervised learners leave it alone
    batch["views"]   list of V float tensors [B, 3, S, S], normalised

A learner's `predict` gives "feature" [n, dim] for a test batch; for a batch that also holds "views" (pairs, for the
alignment) it gives "pair", a list of two. Measured are k-nearest neighbours and a linear probe on frozen features, and
alignment and uniformity; all four are functions of plain arrays here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.contrast import Diagonal, pair_logsumexp
from counterpoint.core.distributed import place, world
from counterpoint.data.images import ImageData, ImageSplit
from counterpoint.encoders.images import build_image_encoder
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import EpochBatches, Position
from counterpoint.engine.optim import OptimConfig, optimisers
from counterpoint.errors import CounterpointError, DataError
from counterpoint.views.images import ViewPipeline, normalise

BATCH = 256  # of evaluation


# -------------------------------------------------------------------------------------------------- measures of features


def knn_accuracy(
    features: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m dim"],
    test_labels: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test items whose class is the one their k nearest neighbours vote for, weighted by exp(cosine / temperature).

    The protocol of Wu et al. 2018 (arXiv 1805.01978) and DINO. k is cut to what there is.
    """
    bank, queries = F.normalize(features.float(), dim=1), F.normalize(test_features.float(), dim=1)
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    right = 0
    for start in range(0, len(queries), 1024):
        similarity, index = (queries[start : start + 1024] @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = similarity.new_zeros(len(similarity), classes)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        right += int((votes.argmax(1) == test_labels[start : start + 1024]).sum())
    return right / len(queries)


def linear_probe(
    features: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m dim"],
    test_labels: Int[Tensor, " m"],
    *,
    regularisation: float = 1e-3,
    steps: int = 100,
) -> tuple[float, Int[Tensor, " m"]]:
    """Accuracy and predictions of multinomial logistic regression on frozen, standardised features, fitted by L-BFGS.

    `regularisation` is the weight of the mean squared coefficient beside the mean cross-entropy. Deterministic.
    """
    mean, spread = features.float().mean(0), features.float().std(0).clamp(min=1e-6)
    train, test = (features.float() - mean) / spread, (test_features.float() - mean) / spread
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    weight = torch.zeros(classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), labels) + regularisation * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    predicted = F.linear(test, weight, bias).argmax(1)
    return float((predicted == test_labels).float().mean()), predicted


def alignment(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"], *, power: float = 2.0) -> float:
    """Mean of |x~ - y~|^power over positive pairs, x~ of unit length (Wang and Isola 2020, arXiv 2005.10242). 0 is best."""
    return float((F.normalize(x, dim=1) - F.normalize(y, dim=1)).norm(dim=1).pow(power).mean())


def uniformity(x: Float[Tensor, "n dim"], *, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x~_i - x~_j|^2) over pairs i != j (Wang and Isola 2020). Lower is more uniform; -2t at best."""
    if len(x) < 2:
        return math.nan
    unit = F.normalize(x, dim=1) * math.sqrt(2 * t)
    logs = pair_logsumexp(unit, exclude=Diagonal()).rows  # -t |a - b|^2 = 2 t a.b - 2 t
    return float(logs.logsumexp(0)) - 2 * t - math.log(len(x) * (len(x) - 1))


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class ViewsConfig(OptimConfig):
    """What every learner of this task can be told."""

    epochs: int = 200
    """Passes over the training images."""
    batch_size: int = 256
    """Images in a batch, over all processes together. The last, smaller batch of an epoch is left out."""
    encoder: str = "torchvision:resnet50"
    """The network that is trained and kept: resnet-s, conv-s, vit-s, timm:NAME, torchvision:NAME, hf:NAME."""
    pretrained: bool = False
    """Start from published weights where the encoder has them."""
    recipe: str = "simclr"
    """How views are made (see counterpoint.views.images.RECIPES)."""
    hidden: int = 2048
    """Width of the projector's hidden layers."""
    projection: int = 128
    """Width of what the projector gives to the loss."""
    evaluate_every: int = 10
    """Epochs between evaluations; the last epoch is always evaluated."""
    neighbours: int = 20
    """k of the k-nearest-neighbours evaluation."""
    bank: int = 10000
    """Training images whose features evaluation may use at most."""
    workers: int = 0
    """Processes that read images ahead; 0 reads in the main process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "hidden", "projection", "evaluate_every", "neighbours", "bank"):
            if getattr(self, name) < 1:
                raise CounterpointError(f"{name} must be at least 1, got {getattr(self, name)}")


# What a small set of small pictures on a few cores asks for instead of the papers' settings; systems add what is theirs.
LAPTOP: dict[str, Any] = {
    "epochs": 40,
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


class ViewsLearner(Learner):
    """An encoder and a projector. Subclasses write `loss(batch)` on batch["views"], and what else they need."""

    crops: ClassVar[int] = 2

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        self.size = data.size
        torch.manual_seed(seed)
        self.encoder = build_image_encoder(
            config.encoder, data.size, channels=data.channels, pretrained=config.pretrained
        )
        self.projector = self.build_projector(self.encoder.dim)
        self.views = self.build_views()

    def build_projector(self, dim: int) -> nn.Module:
        """From the encoder's width to what the loss compares."""
        return mlp(dim, self.config.hidden, self.config.projection)

    def build_views(self) -> ViewPipeline:
        """How views are made of the images."""
        return ViewPipeline(self.size, crops=self.crops, recipe=self.config.recipe)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        # Drawn for the whole batch and cut to this process's share, so that W processes see what one would.
        rank, size = world()
        shape = batch["image"].shape
        total = place(len(batch["image"]), self.device).total if size > 1 else shape[0]
        parameters = [view.take(slice(rank, None, size)) for view in self.views.draw((total, *shape[1:]), generator)]
        return batch | {"views": self.views.apply(batch["image"], parameters)}

    def embed(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        """Features of normalised images, what evaluation and export use."""
        return self.encoder(images)

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Projections of equally large views, each [B, projection]; one pass through the network."""
        return list(self.projector(self.encoder(torch.cat(views))).chunk(len(views)))

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"feature": self.embed(batch["image"])}
        if "views" in batch:
            found["pair"] = [self.embed(view) for view in batch["views"]]
        return found

    def configure_optimizers(self) -> Any:
        return optimisers(self.config, [self], self.config.epochs, self.config.batch_size)


# ------------------------------------------------------------------------------------------------------------- the task


class _Batches(Dataset[dict[str, Any]]):
    """A split, read by lists of positions."""

    def __init__(self, split: ImageSplit) -> None:
        self.split = split

    def __getitem__(self, indices: list[int]) -> dict[str, Any]:
        rows = np.asarray(indices, np.int64)
        labels = self.split.labels
        return {
            "image": torch.from_numpy(self.split.images(rows)).permute(0, 3, 1, 2).contiguous(),
            "index": torch.from_numpy(rows),
            "label": None if labels is None else torch.from_numpy(labels[rows]),
        }

    def __len__(self) -> int:
        return len(self.split)


class _TestBatches(Dataset[dict[str, Any]]):
    """First the bank (training images), then the test images, then pairs of views of test images."""

    def __init__(self, data: ImageData, config: ViewsConfig, size: int) -> None:
        chosen = np.random.default_rng(0).permutation(len(data.train))[: config.bank]
        self.parts = [("bank", data.train, np.sort(chosen)), ("test", data.test, np.arange(len(data.test)))]
        self.parts.append(("pair", data.test, np.arange(min(1024, len(data.test)))))
        self.at = [
            (name, split, rows[start : start + BATCH])
            for name, split, rows in self.parts
            for start in range(0, len(rows), BATCH)
        ]
        self.pipeline = ViewPipeline(size, crops=2, recipe=config.recipe)

    def __getitem__(self, number: int) -> dict[str, Any]:
        name, split, rows = self.at[number]
        batch = _Batches(split)[rows.tolist()]
        pixels = batch["image"]
        batch |= {"image": normalise(pixels), "part": name}
        if name == "pair":
            batch["views"] = self.pipeline(pixels, torch.Generator().manual_seed(number))
        return batch

    def __len__(self) -> int:
        return len(self.at)


class ViewsEvaluator:
    """k-NN after every evaluation, the linear probe at the end; alignment and uniformity on test images."""

    def __init__(self, config: ViewsConfig, classes: tuple[str, ...]) -> None:
        self.config, self.classes = config, classes
        self.reset()

    def reset(self) -> None:
        self.features: dict[str, list[Tensor]] = {"bank": [], "test": []}
        self.labels: dict[str, list[Tensor]] = {"bank": [], "test": []}
        self.pairs: list[list[Tensor]] = []
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        part = batch["part"]
        if part == "pair":
            self.pairs.append([x.detach().float().cpu() for x in outputs["pair"]])
            return
        self.features[part].append(outputs["feature"].detach().float().cpu())
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
                self.figures["confusion"] = confusion(test_labels[asked], predicted, len(self.classes)).tolist()
        pairs = [torch.cat(side) for side in zip(*self.pairs, strict=True)]
        found["alignment"], found["uniformity"] = alignment(*pairs), uniformity(test)
        return found


def confusion(labels: Int[Tensor, " n"], predicted: Int[Tensor, " n"], classes: int) -> Int[Tensor, "classes classes"]:
    """How many items of each class (row) were taken for each class (column)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


class ViewsTask:
    """Loaders and evaluator of one source of images."""

    name = "views"
    contract = "views"  # the form of data it takes (see counterpoint.data.load)

    def __init__(self, data: ImageData, config: ViewsConfig) -> None:
        if not isinstance(data, ImageData):
            raise CounterpointError(f"{data.name} gives no single images, which the task views learns from")
        if len(data.train) < config.batch_size:
            raise DataError(
                f"{data.name} has {len(data.train)} training images, fewer than a batch of {config.batch_size}; use "
                f"--batch-size {max(2, len(data.train))} or less"
            )
        if config.batch_size < 2:
            raise CounterpointError("batch_size must be at least 2: views are contrasted within a batch")
        if len(data.test) < 2:
            raise DataError(f"{data.name}: needs at least 2 test images, has {len(data.test)}")
        self.data = data
        self.config = config
        self.facts: dict[str, Any] = data.spec | {"class_names": list(data.classes)}

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """CounterpointError when a run trained on other data cannot be measured on this."""
        for name in ("size", "channels"):
            if trained[name] != self.facts[name]:
                raise CounterpointError(
                    f"{self.data.name} has images of {name} {self.facts[name]}, the run was trained on {trained[name]}"
                )

    def train_loader(self, seed: int, position: Position) -> DataLoader[dict[str, Any]]:
        rank, size = world()
        batches = EpochBatches(len(self.data.train), self.config.batch_size, seed, position, rank, size, drop_last=True)
        return DataLoader(_Batches(self.data.train), batch_size=None, sampler=batches, num_workers=self.config.workers)

    def test_loader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(_TestBatches(self.data, self.config, self.data.size), batch_size=None, shuffle=False)

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
