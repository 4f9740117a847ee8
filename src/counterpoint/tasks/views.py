"""Define the task `views`: learn from augmented views of images; the evaluation predicts unseen labels from features.

A training batch, before and after the learner has drawn its views:

    batch["image"]   [B, 3, H, W] uint8
    batch["index"]   [B] positions in the training set, for state kept per example
    batch["label"]   [B] int64, or None without labels; self-supervised learners ignore it
    batch["views"]   list of V float tensors [B, 3, S, S], normalised

A learner's `predict` returns for a test batch:

- "feature" [n, dim].
- "embedding" [n, dim'], if its loss compares rows of another space.
- "pair", a list of two features, if the batch also holds "views" (pairs for the alignment).

Where pictures have masks (`DenseData`), it returns "maps", feature maps of the pictures or of the two views.

The evaluation measures k-nearest neighbours and a linear probe on frozen features, alignment, uniformity and tolerance. Where a
picture may have several labels (tags), it measures the mean average precision of a probe for each. Where pictures have
domains, it measures how far neighbours are of one domain. Test splits of other domains (`shifts`) are measured by the same
neighbours and the same probe, under the names <shift>_.... The measures are functions of plain arrays (tasks/measures/).
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from counterpoint.data.dense import DenseData
from counterpoint.data.images import ImageData, ImageSplit
from counterpoint.data.shown import png
from counterpoint.encoders.images import need_size
from counterpoint.encoders.maps import feature_map, has_map
from counterpoint.engine.learner import Learner
from counterpoint.errors import CounterpointError, diverged
from counterpoint.tasks.cells import CellMeasures
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
    class_chance,
    confusion,
    confusion_figure,
    gallery_rows,
    knn_accuracy,
    linear_probe,
    principal_axes,
    purity,
    tag_precision,
    tolerance,
    uniformity,
)
from counterpoint.tasks.splits import named_split
from counterpoint.views.images import ViewPipeline, normalise
from counterpoint.words import counted

SHOWN = 6  # images of the gallery, and neighbours of each
SHOWN_ON_MAP = 1000
MOST_CLASSES = 20  # maximum number of distinguishable colours of a map

# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class ViewsConfig(ImagesConfig):
    """Settings of every learner of this task."""

    hidden: int = 2048
    """Width of the projector's hidden layers."""
    projection: int = 128
    """Width of the projector's output, which the loss compares."""

    counts: ClassVar[tuple[str, ...]] = (*ImagesConfig.counts, "hidden", "projection")

    def __post_init__(self) -> None:
        super().__post_init__()
        # Check the temperature of systems that have one. With 0 or NaN, an epoch of NaN would come first.
        temperature = getattr(self, "temperature", None)
        if temperature is not None and not 0 < temperature < math.inf:
            raise CounterpointError(f"temperature must be > 0 and finite, got {temperature}")

    def check_batch(self) -> None:
        """Raise CounterpointError for a batch of one image, which has no other image to contrast it with."""
        if self.batch_size < 2:
            raise CounterpointError("batch_size must be at least 2: views are contrasted within a batch")


@dataclass
class MultiCropConfig(ViewsConfig):
    """Settings of learners with small crops in addition to the large ones."""

    local_crops: int = 8
    """Small crops of each image, after the two large ones; 0: none."""
    local_size: int = 0
    """Height and width of small crops in pixels; 0: 3/7 of the images' (96 of 224), in whole patches of the encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_crops < 0 or self.local_size < 0:
            raise CounterpointError(
                f"local_crops and local_size must not be negative, got {self.local_crops} and {self.local_size}"
            )


# Settings for a small set of small pictures on a few cores, which replace the papers'. Systems add their own.
BARE: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 256,
    "encoder": "resnet-s",
    "recipe": "simclr-cifar",
    "optimizer": "sgd",
    "lr": 0.06,
    "weight_decay": 5e-4,
    "warmup_epochs": 2,
    "evaluate_every": 10,
}
LAPTOP = BARE | {"hidden": 512}  # the same for learners with the setting `hidden`


# ---------------------------------------------------------------------------------------------------------- the learner


def mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Build linear layers with batch normalisation and ReLU between them, e.g. mlp(512, 2048, 128).

    Args:
        widths: width of the input, of each hidden layer and of the output.
        last_norm: append a batch normalisation without scale and shift (SimSiam's projector); by default none.
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
    """An encoder and a projector. Subclasses write `loss(batch)` on batch["views"]."""

    crops: ClassVar[int] = 2
    compares: ClassVar[bool] = True  # whether the loss compares the projector's rows

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.projector = self.build_projector(self.encoder.dim)

    def build_projector(self, dim: int) -> nn.Module:
        """Build the projector, from the encoder's width `dim` to the rows that the loss compares."""
        return mlp(dim, self.config.hidden, self.config.projection)

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Compute the projections of equally large views, each [B, projection], in one pass through the network."""
        return list(self.projector(self.encoder(torch.cat(views))).chunk(len(views)))

    @property
    def network(self) -> nn.Module:
        """Encoder and projector, which a momentum teacher copies."""
        return nn.Sequential(self.encoder, self.projector)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().predict(batch)
        if batch.get("part") == "test" and self.compares:
            found["embedding"] = self.projector(found["feature"])
        return found | self.seen(batch)

    def seen(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compute what the evaluation needs besides the features: pairs of views, and feature maps of pictures with masks."""
        found: dict[str, Any] = {}
        if "views" in batch:
            found["pair"] = [self.embed(view) for view in batch["views"]]
        if ("mask" in batch or "coords" in batch) and has_map(self.encoder):
            found["maps"] = [feature_map(self.encoder, image) for image in batch.get("views", [batch["image"]])]
        return found


class MultiCropLearner(ViewsLearner):
    """A ViewsLearner with small crops after the large ones in batch["views"]."""

    def build_views(self) -> ViewPipeline:
        config, patch = self.config, getattr(self.encoder, "patch", 1)
        size = config.local_size or max(1, round(self.size * 3 / 7 / patch)) * patch
        if config.local_crops:
            need_size(self.encoder, config.encoder, size)
        return ViewPipeline(self.size, self.crops, config.recipe, config.local_crops, size)

    def project(self, views: list[Tensor]) -> list[Tensor]:
        """Compute the projections of the views, each [B, projection], in one pass through the network for each size."""
        found: list[Tensor] = []
        for _, alike in itertools.groupby(views, key=lambda view: view.shape[-1]):
            found += super().project(list(alike))
        return found


# ------------------------------------------------------------------------------------------------------------- the task


class _AskedBatches(EvaluationBatches):
    """Batches of the bank (training images), then of the images to measure and of shifts, then of pairs of views."""

    def __init__(
        self, data: ImageData, config: ViewsConfig, split: ImageSplit, shifts: Mapping[str, ImageSplit]
    ) -> None:
        asked = np.arange(len(split))
        known = data.bank or data.train
        bank = chosen_bank(np.arange(len(known)), config.bank)
        more = [(name, part, np.arange(len(part))) for name, part in shifts.items()]
        super().__init__([("bank", known, bank), ("test", split, asked), *more, ("pair", split, asked[:1024])])
        self.pipeline = ViewPipeline(data.size, crops=2, recipe=config.recipe)
        self.dense = isinstance(data, DenseData)

    def __getitem__(self, number: int) -> dict[str, Any]:
        batch = super().__getitem__(number)
        _, split, rows = self.at[number]
        if batch["part"] == "pair":
            pixels = ImageBatches(split)[rows.tolist()]["image"]
            drawn = self.pipeline.draw(tuple(pixels.shape), torch.Generator().manual_seed(number))
            batch["views"] = self.pipeline.apply(pixels, drawn)
            if self.dense:
                batch["coords"] = [view.coordinates(*pixels.shape[2:]) for view in drawn]
        elif self.dense:
            batch["mask"] = torch.from_numpy(cast(Any, split).masks(rows))
        return batch


class ViewsEvaluator:
    """k-NN, alignment and uniformity at every evaluation, the linear probe at the end.

    Args:
        config: settings, with the number of neighbours.
        data: the data, whose training images are the bank.
        split: the split to measure, valid or test (default). Its images form the part "test".
    """

    def __init__(self, config: ViewsConfig, data: ImageData, split: str = "test") -> None:
        self.config, self.data, self.classes = config, data, data.classes
        self.split = split
        self.reset()

    def reset(self) -> None:
        every = ("bank", "test", *_shifts(self.data, self.split))
        self.features: dict[str, list[Tensor]] = {part: [] for part in every}
        self.labels: dict[str, list[Tensor]] = {part: [] for part in every}
        self.index: dict[str, list[Tensor]] = {part: [] for part in every}
        self.parts: dict[str, dict[str, list[Tensor]]] = {}
        self.embedded: list[Tensor] = []
        self.pairs: list[list[Tensor]] = []
        self.figures: dict[str, Any] = {}
        self.chances: dict[str, float] = {}
        self.cells = CellMeasures(self.data) if isinstance(self.data, DenseData) else None

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        part = batch["part"]
        if part == "pair":
            self.pairs.append([x.detach().float().cpu() for x in outputs["pair"]])
            if self.cells is not None and "maps" in outputs:
                self.cells.update_pairs(outputs["maps"], batch["coords"])
            return
        if self.cells is not None and "maps" in outputs and part in ("bank", "test"):
            self.cells.update(part, outputs["maps"][0], batch["mask"])
        self.features[part].append(outputs["feature"].detach().float().cpu())
        self.index[part].append(batch["index"].cpu())
        for name, value in outputs.get("parts", {}).items() if part in ("bank", "test") else ():
            self.parts.setdefault(name, {"bank": [], "test": []})[part].append(value.detach().float().cpu())
        if part == "test" and "embedding" in outputs:
            self.embedded.append(outputs["embedding"].detach().float().cpu())
        if batch["label"] is not None:
            self.labels[part].append(batch["label"].cpu())

    def compute(self, *, final: bool = False) -> dict[str, float]:
        every = {part: torch.cat(features) for part, features in self.features.items()}
        bank, test = every["bank"], every["test"]
        for features in every.values():
            if not bool(torch.isfinite(features).all()):
                raise diverged("the features hold NaN or infinite values")
        found: dict[str, float] = {}
        if self.classes and self.labels["bank"] and self.labels["test"]:
            labels, test_labels = (torch.cat(self.labels[part]) for part in ("bank", "test"))
            known, asked = labels >= 0, test_labels >= 0
            four = bank[known], labels[known], test[asked], test_labels[asked]
            judged = bool(known.any() and asked.any())
            guess = class_chance(len(self.classes))
            self.chances = {"knn_accuracy": guess, "linear_accuracy": guess} if judged else {}
            if judged:
                found["knn_accuracy"] = knn_accuracy(*four, k=self.config.neighbours)
            if final and judged:
                found["linear_accuracy"], predicted = linear_probe(*four)
                self.figures |= confusion_figure(
                    confusion(test_labels[asked], predicted, len(self.classes)), self.classes
                )
        if (tags := self.data.tags) is not None:
            own, asked = torch.from_numpy(tags.train), torch.from_numpy(getattr(tags, self.split))
            own, asked = own[torch.cat(self.index["bank"])], asked[torch.cat(self.index["test"])]
            found["tag_precision"] = tag_precision(bank, own, test, asked)
            self.chances["tag_precision"] = float(asked.float().mean())
        for part in (name for name in every if name != "bank"):
            found |= self._domains(part, every[part])
            if part != "test" and self.classes and self.labels["bank"] and self.labels[part]:
                found |= self._shifted(part, bank, every[part], final=final)
        if self.cells is not None:
            of_cells, guesses = self.cells.compute(final=final)
            found |= of_cells
            self.chances |= guesses
        pairs = [torch.cat(side) for side in zip(*self.pairs, strict=True)]
        found["alignment"], found["uniformity"] = alignment(*pairs), uniformity(test)
        if self.embedded:
            embedded = torch.cat(self.embedded)
            found["embedding_uniformity"] = uniformity(embedded)
            labels = torch.cat(self.labels["test"]) if self.labels["test"] else torch.empty(0)
            known = labels >= 0
            if int(known.sum()) > len(labels[known].unique()):
                found["embedding_tolerance"] = tolerance(embedded[known], labels[known])
        if final:
            found |= self._learned(bank, test, found.get("linear_accuracy"))
            self.figures = self._map(test) | self.figures | self._neighbours(test)
        return found

    def chance(self) -> dict[str, float]:
        """Return the chance level of every accuracy of `compute`: 1 / classes."""
        return dict(self.chances)

    def _domains(self, part: str, features: Tensor) -> dict[str, float]:
        """Measure how far neighbours are of one domain, in the measured split or a shift, where pictures have domains."""
        split = named_split(self.data, self.split) if part == "test" else self.data.shifts[part]
        numbers = getattr(split, "domains", None)
        if numbers is None or len(features) < 2:
            return {}
        domains = torch.from_numpy(numbers)[torch.cat(self.index[part])]
        name = "domain_purity" if part == "test" else f"{_prefix(part)}domain_purity"
        shares = torch.bincount(domains[domains >= 0]).double()
        self.chances[name] = float((shares / shares.sum()).square().sum())
        return {name: purity(features, domains)}

    def _shifted(self, part: str, bank: Tensor, features: Tensor, *, final: bool) -> dict[str, float]:
        """Measure pictures of other domains whose classes the bank has."""
        labels, asked = torch.cat(self.labels["bank"]), torch.cat(self.labels[part])
        known, there = labels >= 0, torch.isin(asked, labels[labels >= 0])
        if not bool(there.any()):
            return {}
        four = bank[known], labels[known], features[there], asked[there]
        found = {f"{_prefix(part)}knn_accuracy": knn_accuracy(*four, k=self.config.neighbours)}
        if final:
            found[f"{_prefix(part)}linear_accuracy"] = linear_probe(*four)[0]
        self.chances |= dict.fromkeys(found, class_chance(len(self.classes)))
        return found

    def _learned(self, bank: Tensor, test: Tensor, of_class: float | None) -> dict[str, float]:
        """Fit linear probes for every known attribute of the images, on all features and on each part of them.

        Args:
            bank, test: features of the training images and of the images to measure.
            of_class: accuracy of the linear probe for the class on all features; None where no class is known.
        """
        at = {part: torch.cat(index) for part, index in self.index.items()}
        known: dict[str, tuple[Tensor, Tensor]] = {
            name: (torch.from_numpy(of["train"])[at["bank"]], torch.from_numpy(of[self.split])[at["test"]])
            for name, classes in self.data.attributes.items()
            for of in [dict(zip(("train", "valid", "test"), classes, strict=True))]
        }
        known = {name: pair for name, pair in known.items() if all(bool((side >= 0).any()) for side in pair)}
        found: dict[str, float] = {}
        for name, (train, asked) in known.items():
            found[f"{name}_accuracy"] = _probe(bank, test, train, asked)
        guess = {name: class_chance(int(torch.cat(pair).max()) + 1) for name, pair in known.items()}
        self.chances |= {f"{name}_accuracy": value for name, value in guess.items()}
        if not self.parts:
            return found
        whole = dict(found)  # accuracies on all features
        if of_class is not None:
            whole = {"class_accuracy": of_class} | whole
            known = {"class": (torch.cat(self.labels["bank"]), torch.cat(self.labels["test"]))} | known
            guess = {"class": class_chance(len(self.classes))} | guess
        rows: list[list[Any]] = []
        for part, features in self.parts.items():
            own, others = torch.cat(features["bank"]), torch.cat(features["test"])
            values = [_probe(own, others, *pair) for pair in known.values()]
            rows.append([part, *values])
            named = part.replace(" ", "_")
            found |= {f"{named}_{name}": v for name, v in zip(known, values, strict=True)}
            self.chances |= {f"{named}_{name}": guess[name] for name in known}
        rows.append(["all", *(whole[f"{name}_accuracy"] for name in known)])
        self.figures["What each stage learned"] = {
            "kind": "table",
            "columns": ["features", *known],
            "rows": rows,
            "caption": "Accuracy of a linear probe on held-out images, for each known attribute.",
        }
        return found

    def _map(self, test: Tensor) -> dict[str, Any]:
        """Draw test features by class on their first two principal axes, or on UMAP's axes if it is installed."""
        many = test[:: max(1, len(test) // SHOWN_ON_MAP)]
        rows = F.normalize(many, dim=1)
        if len(rows) < 4:
            return {}
        if importlib.util.find_spec("umap"):
            flat = importlib.import_module("umap").UMAP(random_state=0, n_jobs=1).fit_transform(rows.numpy())
            axes, how = ["UMAP 1", "UMAP 2"], "laid out by UMAP; distances between far groups mean nothing"
        else:
            at, axes = principal_axes(rows)
            flat = at.numpy()
            how = "on their first two principal axes"
        labels = torch.cat(self.labels["test"])[:: max(1, len(test) // SHOWN_ON_MAP)] if self.labels["test"] else None
        if labels is None or not self.classes or len(self.classes) > MOST_CLASSES:
            groups = {"test images": flat}
        else:
            groups = {name: flat[(labels == n).numpy()] for n, name in enumerate(self.classes)}
        return {
            "Map of the test images": {
                "kind": "points",
                "points": {name: np.round(part, 4).tolist() for name, part in groups.items() if len(part)},
                "axes": axes,
                "caption": f"Unit features of {counted(len(rows), 'test image')}, {how}.",
            }
        }

    def _neighbours(self, test: Tensor) -> dict[str, Any]:
        """Show a few test images and the nearest other images."""
        rows, index = F.normalize(test, dim=1), torch.cat(self.index["test"])
        asked = torch.arange(len(rows))[:: max(1, len(rows) // SHOWN)][:SHOWN]
        similarity = rows[asked] @ rows.T
        similarity[torch.arange(len(asked)), asked] = -torch.inf
        labels = torch.cat(self.labels["test"]) if self.labels["test"] else index
        labels = torch.where(labels < 0, -1 - index, labels)  # an image without a class is right for no query
        found = gallery_rows(asked, torch.arange(len(rows)), similarity, labels, SHOWN)
        wanted = {row["query"] for row in found} | {cell["item"] for row in found for cell in row["found"]}
        pictures = named_split(self.data, self.split).images(index[sorted(wanted)].numpy())
        items = {f"image/{n}": {"png": png(p, least=48)} for n, p in zip(sorted(wanted), pictures, strict=True)}
        part = {"query": "image", "key": "image", "rows": found}
        return {"Nearest neighbours": {"kind": "gallery", "parts": [part], "items": items}}


def _shifts(data: ImageData, split: str) -> dict[str, ImageSplit]:
    """Return the splits of other domains that are measured with a split, by name: with test alone."""
    return dict(data.shifts) if split == "test" else {}


def _prefix(shift: str) -> str:
    return f"{shift.replace('-', '_')}_"


def _probe(bank: Tensor, test: Tensor, labels: Tensor, asked: Tensor) -> float:
    """Compute the accuracy of a linear probe on the rows of known class."""
    here, there = labels >= 0, asked >= 0
    return float(linear_probe(bank[here], labels[here], test[there], asked[there])[0])


class ViewsTask(ImageTask):
    """Loaders and evaluator of one source of images."""

    name = "views"
    headline = "knn_accuracy"  # the measure it judges by
    stand_ins: ClassVar[tuple[str, ...]] = ("correspondence",)  # instead, on data without classes

    def __init__(self, data: ImageData, config: ViewsConfig) -> None:
        super().__init__(data, config)
        config.check_batch()
        if isinstance(data, DenseData) and not data.classes:
            self.headline = "correspondence"

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the batches for `evaluator(split)`: the bank, then images of the split, then pairs of their views."""
        asked = _AskedBatches(self.data, self.config, self.split(split), _shifts(self.data, split))
        return DataLoader(asked, batch_size=None, shuffle=False)

    def evaluator(self, split: str) -> ViewsEvaluator:
        return ViewsEvaluator(self.config, self.data, split)


TASK = ViewsTask


def features_of(learner: Learner, split: ImageSplit) -> NDArray[np.float32]:
    """Compute the features [n, dim] of every image of a split with a trained learner of this task."""
    found = []
    with torch.no_grad():
        for start in range(0, len(split), BATCH):
            rows = np.arange(start, min(start + BATCH, len(split)))
            images = torch.from_numpy(split.images(rows)).permute(0, 3, 1, 2)
            found.append(learner.predict({"image": normalise(images.to(learner.device))})["feature"].cpu().numpy())
    return np.concatenate(found)
