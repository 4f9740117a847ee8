"""Define the task `dense`: learn from pictures with a class for each pixel; the evaluation classifies the pixels of others.

A training batch, before and after the learner has drawn its views:

    batch["image"]       [B, 3, H, W] uint8, the first modality
    batch["modalities"]  [B, M, 3, H, W] uint8, where the data have several modalities
    batch["present"]     [B, M] bool, whether an item has a modality, where the data have several
    batch["mask"]        [B, H, W] uint8 class numbers, 255 (IGNORE) where unknown
    batch["domain"]      [B] number of the domain that an item comes from, -1 for none, where the data have domains
    batch["index"]       [B] positions in the training set
    batch["views"]       list of V float tensors, normalised: [B, 3, S, S], or [B, M, 3, S, S] of several modalities
    batch["masks"]       list of V masks, cropped as the views

An evaluation batch has normalised pictures and masks. A learner returns "logits" [n, classes, h, w] for it from `predict`; maps of
another size are scaled bilinearly to the mask's. It may return others as "<name>_logits" (subsets of the modalities, a teacher's).
For each, the evaluation measures:

- `miou`: the mean over the classes of intersection over union, of all pixels of the split together.
- `dice`: the mean over the classes but the background of the Dice coefficient, of all pixels, or per volume, then averaged.
- `pixel_accuracy`: the share of known pixels that are classified right.

A learner from any subset of several modalities returns a head for each subset and each corruption (`tasks/subsets.py`). Only
`<name>_miou` is measured for these, and their means:

- `subset_miou`: over all non-empty subsets of the modalities.
- `corrupted_miou`: over the corruptions of one modality.

Pixels of unknown class do not count. A class that is in neither truth nor prediction does not count.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group, processes
from counterpoint.data.dense import IGNORE, DenseData, DenseSplit, labelled_rows
from counterpoint.data.images import Indices
from counterpoint.data.shown import png
from counterpoint.engine.loading import Batches, Position
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.images import ImageBatches, ImageLearner, ImagesConfig, ImageTask
from counterpoint.tasks.measures.masks import dices, ious, pixel_confusion
from counterpoint.tasks.subsets import corruptions, subsets
from counterpoint.views.images import normalise
from counterpoint.views.images.masks import cropped_masks

SHOWN = 6  # pictures on the page
SIDE = 96  # pixels of a picture as shown
BATCH = 32  # pictures in a batch of the evaluation
HARDEST = 16  # one in so many pixels of a picture counts as hard in any case

# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class DenseConfig(ImagesConfig):
    """Settings of every learner of this task."""

    recipe: str = "weak"
    """Augmentation of pictures and masks: weak, supervised, shapes, none, or another name of
    counterpoint.views.images.RECIPES."""

    labels_only: ClassVar[bool] = True  # whether pictures without labels are left out of training
    by_domain: ClassVar[bool] = False  # whether the learner has parts for the data's domains, by number

    def facts(self, data: Any) -> dict[str, Any]:
        return super().facts(data) | {"regions": list(data.regions), "modalities": list(data.modalities)}


# Settings for a small set of small pictures on a few cores, which replace the papers'. Systems add their own.
LAPTOP: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 16,
    "encoder": "conv-cells",
    "recipe": "shapes",
    "optimizer": "adam",
    "lr": 1.6e-2,  # 1e-3 for a batch of 16
    "weight_decay": 0.0,
    "warmup_epochs": 0,
    "evaluate_every": 5,
}


# ---------------------------------------------------------------------------------------------------------- the learner


@over_group
@full_precision
def pixel_cross_entropy(
    logits: Float[Tensor, "n classes height width"], masks: Integer[Tensor, "n height width"], hard: float = 0.0
) -> Float[Tensor, ""]:
    """Compute the cross-entropy of each picture's known pixels, the mean over the pictures of all processes.

    Args:
        logits: one number per class and pixel.
        masks: class numbers, IGNORE where unknown.
        hard: online hard examples (OHEM): a pixel counts if its true class has at most this probability, 0 to 1, or if it is
            among the hardest sixteenth of the picture's known pixels. Default 0: all pixels count.

    Pictures without a known pixel count as 0, with gradient 0. Raises ValueError for an empty batch and shapes that differ.

    >>> pixel_cross_entropy(torch.zeros(1, 2, 1, 2), torch.tensor([[[1, 255]]]))
    tensor(0.6931)
    """
    if logits.ndim != 4 or masks.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            f"masks must be [n, height, width] of logits' pixels, got {shapes(logits=logits, masks=masks)}"
        )
    need_rows(logits=logits)
    known = masks != IGNORE
    each = F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="none").flatten(1)
    count = known.sum((1, 2))
    if hard > 0:
        with torch.no_grad():
            ordered = each.masked_fill(~known.flatten(1), -1.0).sort(1, descending=True).values
            least = ordered.gather(1, (count // HARDEST - 1).clamp(min=0)[:, None]).clamp(max=-math.log(hard))
            chosen = (each >= least) & known.flatten(1)
        each, count = torch.where(chosen, each, 0.0), chosen.sum(1)
    return global_mean(each.sum(1) / count.clamp(min=1))


class DenseLearner(ImageLearner):
    """An ImageLearner whose views are cropped with their masks. Subclasses write `loss` and `segment`."""

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.regions, self.modalities = tuple(data.regions), tuple(data.modalities)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        images = batch["image"]
        total, mine = self.share(len(images))
        drawn = [view.take(mine) for view in self.views.draw((total, *images.shape[1:]), generator)]
        if "modalities" in batch:
            each = [self.views.apply(part, drawn) for part in batch["modalities"].unbind(1)]
            views = [torch.stack(parts, 1) for parts in zip(*each, strict=True)]
        else:
            views = self.views.apply(images, drawn)
        return batch | {"views": views, "masks": [cropped_masks(batch["mask"], view) for view in drawn]}

    def segment(self, images: Tensor) -> Float[Tensor, "n classes h w"]:
        """Compute the logits of the pixels of normalised pictures."""
        raise NotImplementedError

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"logits": self.segment(batch["image"])}


# ------------------------------------------------------------------------------------------------------------- the task


class DenseBatches(ImageBatches):
    """A split, or some of its pictures, with masks and modalities, read by lists of positions."""

    split: Any

    def __init__(self, split: DenseSplit, modalities: Sequence[str], rows: Indices | None = None) -> None:
        super().__init__(split, rows)
        self.modalities = modalities

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any]:
        found = super().__getitem__(indices)
        rows = found["index"].numpy()
        found["mask"] = torch.from_numpy(self.split.masks(rows))
        if (domains := getattr(self.split, "domains", None)) is not None:
            found["domain"] = torch.from_numpy(domains[rows])
        if len(self.modalities) > 1:
            each = [torch.from_numpy(self.split.modality(name, rows)).permute(0, 3, 1, 2) for name in self.modalities]
            found["modalities"] = torch.stack(each, 1)
            there = [torch.from_numpy(self.split.present(name)[rows]) for name in self.modalities]
            found["present"] = torch.stack(there, 1)
        return found


def normalised(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with its pictures normalised, of all modalities."""
    found = batch | {"image": normalise(batch["image"])}
    if "modalities" in batch:
        flat = normalise(batch["modalities"].flatten(0, 1))
        found["modalities"] = flat.unflatten(0, batch["modalities"].shape[:2])
    return found


class _AskedScenes(Dataset[dict[str, Any]]):
    """Batches of the pictures to measure."""

    def __init__(self, batches: DenseBatches, rows: Indices) -> None:
        self.batches = batches
        self.at = [rows[start : start + BATCH].tolist() for start in range(0, len(rows), BATCH)]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return normalised(self.batches[self.at[number]]) | {"part": "test"}

    def __len__(self) -> int:
        return len(self.at)


class DenseEvaluator:
    """Confusion of the pixels' classes, for every head of a learner.

    Args:
        data: the data.
        split: the split to measure, valid or test.
    """

    def __init__(self, data: DenseData, split: str) -> None:
        self.data, self.split = data, split
        self.classes = len(data.regions)
        self.groups = {"subset": [*subsets(data.modalities)], "corrupted": [*corruptions(data.modalities)]}
        self.brief = {f"{name}_" for names in self.groups.values() for name in names}  # heads of which mIoU is enough
        self.reset()

    def reset(self) -> None:
        self.tables: dict[str, dict[int, Int[Tensor, "classes classes"]]] = {}  # by head, then by volume
        self.figures: dict[str, Any] = {}
        self.shown: list[list[str]] = []

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        truth = batch["mask"].cpu()
        groups = getattr(self.data, self.split).groups
        rows = batch["index"].cpu().numpy()
        of = np.zeros(len(rows), np.int64) if groups is None else groups[rows]
        for name, value in outputs.items():
            if not name.endswith("logits"):
                continue
            logits = value.detach().float().cpu()
            if not bool(torch.isfinite(logits).all()):
                raise CounterpointError(f"the {name} hold NaN or infinite values: training diverged; lower --lr")
            if logits.shape[2:] != truth.shape[1:]:
                logits = F.interpolate(logits, truth.shape[1:], mode="bilinear", align_corners=False)
            predicted = logits.argmax(1)
            tables = self.tables.setdefault(name.removesuffix("logits"), {})
            for group in np.unique(of).tolist():
                mine = torch.from_numpy(of == group)
                found = pixel_confusion(truth[mine], predicted[mine], self.classes)
                tables[group] = tables[group] + found if group in tables else found
            if name == "logits":
                self._keep(batch, truth, predicted)

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found: dict[str, float] = {}
        first = 1 if self.data.background else 0
        for head, tables in self.tables.items():
            whole = torch.stack(list(tables.values())).sum(0)
            found[f"{head}miou"] = _mean(ious(whole))
            if head in self.brief:
                continue
            found[f"{head}dice"] = _mean(np.array([_mean(dices(table)[first:]) for table in tables.values()]))
            found[f"{head}pixel_accuracy"] = float(whole.diagonal().sum() / whole.sum().clamp(min=1))
        for group, names in self.groups.items():
            if names and all(f"{name}_miou" in found for name in names):
                found[f"{group}_miou"] = float(np.mean([found[f"{name}_miou"] for name in names]))
        if final and "" in self.tables:
            self.figures = self._drawn(torch.stack(list(self.tables[""].values())).sum(0))
        return found

    def chance(self) -> dict[str, float]:
        """Return the measures of a prediction that gives every pixel the most frequent class of the split."""
        found: dict[str, float] = {}
        for head, tables in self.tables.items():
            if head in self.brief:
                continue
            count = torch.stack(list(tables.values())).sum((0, 2))
            share = float(count.max() / count.sum().clamp(min=1))
            found[f"{head}pixel_accuracy"] = share
            found[f"{head}miou"] = share / max(1, int((count > 0).sum()))
        return found

    # --- figures

    def _keep(self, batch: dict[str, Any], truth: Tensor, predicted: Tensor) -> None:
        if len(self.shown) < SHOWN:
            rows = batch["index"].cpu().numpy()[: SHOWN - len(self.shown)]
            split = getattr(self.data, self.split)
            each = [split.modality(name, rows) for name in self.data.modalities]
            for n in range(len(rows)):
                pictures = [pixels[n] for pixels in each]
                pictures += [painted(mask[n].numpy(), self.classes) for mask in (truth, predicted)]
                self.shown.append([png(enlarged(picture)) for picture in pictures])

    def _drawn(self, table: Int[Tensor, "classes classes"]) -> dict[str, Any]:
        rows = [
            [name, float(iou), float(dice), int(count)]
            for name, iou, dice, count in zip(
                self.data.regions, ious(table), dices(table), table.sum(1).tolist(), strict=True
            )
        ]
        several = self.data.modalities if len(self.data.modalities) > 1 else ("picture",)
        named = [
            (" + ".join(self.data.modalities[n] for n in at), f"{name}_")
            for name, at in subsets(self.data.modalities).items()
        ]
        named += [
            (
                f"all, {self.data.modalities[change.modality]} is {'noise' if change.kind == 'noise' else 'dark'}",
                f"{name}_",
            )
            for name, change in corruptions(self.data.modalities).items()
        ]
        measured = [
            [said, _mean(ious(torch.stack(list(self.tables[head].values())).sum(0)))]
            for said, head in named
            if head in self.tables
        ]
        some = {
            "Subsets of the modalities": {
                "kind": "table",
                "columns": ["modalities", "mIoU"],
                "rows": measured,
                "caption": "The same network with these modalities alone, and with one of them corrupted.",
            }
        }
        return (some if measured else {}) | {
            "Segmentations": {
                "kind": "pictures",
                "columns": [*several, "truth", "prediction"],
                "rows": self.shown,
                "caption": "A colour for each class; the background is black and unknown pixels are grey.",
            },
            "Classes": {
                "kind": "table",
                "columns": ["class", "IoU", "Dice", "pixels"],
                "rows": rows,
                "caption": "Of all known pixels of the split.",
            },
        }


def _mean(values: NDArray[np.floating]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def painted(mask: NDArray[np.integer], classes: int) -> NDArray[np.uint8]:
    """Paint class numbers [h, w]: class 0 black, others in distinct colours, unknown pixels grey."""
    colours = np.full((256, 3), 128, np.uint8)
    for number in range(min(classes, 255)):
        hue = (number * 0.618) % 1
        colour = colorsys.hsv_to_rgb(hue, 0.65, 0.95) if number else (0.0, 0.0, 0.0)
        colours[number] = [round(255 * part) for part in colour]
    return colours[mask]


def enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Repeat pixels so that a small picture can be seen."""
    larger = max(1, SIDE // pixels.shape[0])
    return pixels.repeat(larger, 0).repeat(larger, 1)


class DenseTask(ImageTask):
    """Loaders and evaluator of one source of pictures with masks."""

    name = "dense"
    headline = "miou"  # the measure it judges by
    contract = "dense"
    at_once = BATCH
    watched = "pictures with masks"
    data: DenseData

    def __init__(self, data: DenseData, config: DenseConfig) -> None:
        if not isinstance(data, DenseData):
            raise CounterpointError(
                f"{data.name} has no class for each pixel, which the task dense needs; name a source of pictures with masks"
            )
        super().__init__(data, config)

    def asked(self, name: str) -> Indices:
        return labelled_rows(self.split(name))

    def training_rows(self) -> Indices:
        found = labelled_rows(self.data.train)
        if not len(found):
            raise DataError(f"{self.data.name}: no training picture has a pixel of known class")
        return found if self.config.labels_only else super().training_rows()

    def split(self, name: str) -> Any:
        return super().split(name)

    def evaluation_batch(self, split: Any, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these pictures of a split as a learner's `predict` takes them."""
        chosen = self.split(split) if isinstance(split, str) else split
        batches = DenseBatches(chosen, self.data.modalities)
        return normalised(batches[list(map(int, rows))]) | {"part": "survey"}

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        super().check_facts(trained)
        for name in ("regions", "modalities", *(["domains"] if self.config.by_domain else [])):
            if list(trained[name]) != list(getattr(self.data, name)):
                raise CounterpointError(
                    f"{self.data.name} has the {name} {', '.join(getattr(self.data, name))}; the run was trained on "
                    f"{', '.join(trained[name])}"
                )

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        batches = self.batches() if batches is None else batches
        items = DenseBatches(self.data.train, self.data.modalities, self.rows)
        return self.loader(items, batches.bind(seed, position, *processes()))

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the batches for `evaluator(split)`: pictures with masks, in order."""
        batches = DenseBatches(self.split(split), self.data.modalities)
        return DataLoader(_AskedScenes(batches, self.asked(split)), batch_size=None, shuffle=False)

    def evaluator(self, split: str) -> DenseEvaluator:
        return DenseEvaluator(self.data, split)


TASK = DenseTask
