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
- `hd95`: of volumes, at the end, for the first head: the 95 % Hausdorff distance in mm (`tasks/measures/surfaces.py`). It is the
  mean over the classes but the background, then over the volumes. A volume whose slices are not all labelled is left out.

A learner from any subset of several modalities returns a head for each subset and each corruption (`tasks/subsets.py`). Only
`<name>_miou` is measured for these, and their means:

- `subset_miou`: over all non-empty subsets of the modalities.
- `corrupted_miou`: over the corruptions of one modality.

Pixels of unknown class do not count. A class that is in neither truth nor prediction does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group, processes
from counterpoint.data.dense import IGNORE, DenseData, DenseSplit, labelled_rows
from counterpoint.data.images import Indices
from counterpoint.engine.loading import Batches, Position
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.dense_figures import DenseEvaluator
from counterpoint.tasks.images import ImageBatches, ImageLearner, ImagesConfig, ImageTask
from counterpoint.views.images import normalise
from counterpoint.views.images.masks import cropped_masks

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
        images, drawn = batch["image"], self.drawn(batch["image"], generator)
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
