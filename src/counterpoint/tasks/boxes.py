"""Define the task `boxes`: learn from pictures with boxes around objects; the evaluation detects the objects of others.

A training batch, before and after the learner has drawn its views:

    batch["image"]   [B, 3, H, W] uint8
    batch["boxes"]   [B, K, 4] left, top, right, bottom in pixels, of at most K objects a picture
    batch["kinds"]   [B, K] class numbers from 1 on; -1 where a picture has fewer objects
    batch["index"]   [B] positions in the training set
    batch["views"]   list of one float tensor [B, 3, S, S], normalised
    batch["seen"]    list of one pair (boxes, kinds), cut as the view; -1 where the view shows too little of an object

An evaluation batch has normalised pictures. A learner returns for it from `predict` "boxes" [n, K, 4], "kinds" [n, K] and
"scores" [n, K]. The measures are COCO's (`tasks/measures/boxes.py`): `ap`, `ap50`, `ap75` and `ar100`. They compare boxes in the
square that the source makes of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from counterpoint.data.dense import Boxes, DenseData
from counterpoint.data.shown import PALETTE, with_boxes
from counterpoint.errors import CounterpointError, DataError, diverged
from counterpoint.tasks.images import EvaluationBatches, ImageBatches, ImageLearner, ImagesConfig, ImageTask
from counterpoint.tasks.measures.boxes import Detections, average_precision
from counterpoint.views.images.boxes import cropped_boxes

BATCH = 32  # pictures in a batch of the evaluation
PICTURES = 6  # on the page
SIDE = 96  # pixels of a picture as shown, at least
SHOWN = 0.5  # least score of a box that is drawn


@dataclass
class BoxesConfig(ImagesConfig):
    """Settings of every learner of this task."""

    recipe: str = "weak"
    """Augmentation of pictures and boxes: weak, supervised, shapes, none, or another name of
    counterpoint.views.images.RECIPES."""

    def facts(self, data: Any) -> dict[str, Any]:
        return super().facts(data) | {"regions": list(data.regions)}


def padded(each: Sequence[Boxes]) -> tuple[Tensor, Tensor]:
    """Return the boxes [B, K, 4] and class numbers [B, K] of pictures as tensors; -1 where a picture has fewer objects."""
    most = max((len(one.labels) for one in each), default=0)
    corners, labels = np.zeros((len(each), most, 4), np.float32), np.full((len(each), most), -1, np.int64)
    for row, one in enumerate(each):
        corners[row, : len(one.labels)], labels[row, : len(one.labels)] = one.corners, one.labels
    return torch.from_numpy(corners), torch.from_numpy(labels)


class BoxesLearner(ImageLearner):
    """An ImageLearner whose views are cropped with their boxes. Subclasses write `loss` and `detect`."""

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.regions = tuple(data.regions)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        drawn = self.drawn(batch["image"], generator)
        seen = []
        for view in drawn:
            boxes, kept = cropped_boxes(batch["boxes"], view)
            seen.append((boxes, torch.where(kept, batch["kinds"], -1)))
        return batch | {"views": self.views.apply(batch["image"], drawn), "seen": seen}

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Return "boxes" [k, 4] in pixels, "labels" [k] and "scores" [k] of each normalised picture, the best first."""
        raise NotImplementedError

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = self.detect(batch["image"])
        return {
            "boxes": torch.nn.utils.rnn.pad_sequence([one["boxes"] for one in found], True),
            "kinds": torch.nn.utils.rnn.pad_sequence([one["labels"] for one in found], True, -1),
            "scores": torch.nn.utils.rnn.pad_sequence([one["scores"] for one in found], True),
        }


# ------------------------------------------------------------------------------------------------------------- measures


class BoxesEvaluator:
    """Average precision of the detections of a split, and pictures with both."""

    def __init__(self, data: DenseData, split: str) -> None:
        self.regions, self.split = data.regions, getattr(data, split)
        self.reset()

    def reset(self) -> None:
        self.truth: list[Boxes] = []
        self.found: list[Detections] = []
        self.rows: list[int] = []
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        rows = batch["index"].cpu().numpy()
        boxes, kinds, scores = (outputs[name].detach().cpu() for name in ("boxes", "kinds", "scores"))
        if not (torch.isfinite(scores).all() and torch.isfinite(boxes).all()):
            raise diverged("the detections hold NaN or infinite values")
        self.truth += self.split.boxes(rows)
        self.rows += rows.tolist()
        for own, kind, score in zip(boxes, kinds, scores, strict=True):
            there = kind >= 0
            self.found.append(Detections(own[there].float().numpy(), kind[there].numpy(), score[there].float().numpy()))

    def compute(self, *, final: bool = False) -> dict[str, float]:
        measured, each = average_precision(self.truth, self.found)
        if final:
            self.figures = self._drawn(each)
        return measured

    def _drawn(self, each: dict[int, tuple[float, float]]) -> dict[str, Any]:
        rows = []
        for at in range(min(PICTURES, len(self.rows))):
            (picture,), true, found = self.split.images(np.array([self.rows[at]])), self.truth[at], self.found[at]
            larger = -(-SIDE // min(picture.shape[:2]))
            good = found.scores >= SHOWN
            cells = [
                {"png": with_boxes(picture, true.corners, (true.labels - 1).tolist(), larger), "text": "truth"},
                {
                    "png": with_boxes(picture, found.corners[good], (found.labels[good] - 1).tolist(), larger),
                    "text": f"detected with a score of {SHOWN} or more",
                },
            ]
            rows.append({"cells": cells})
        count = {n: sum(int((one.labels == n).sum()) for one in self.truth) for n in each}
        colours = ", ".join(f"{self.regions[n]}: {PALETTE[(n - 1) % len(PALETTE)]}" for n in list(each)[: len(PALETTE)])
        return {
            "Detections": {
                "kind": "captioned",
                "rows": rows,
                "caption": f"Boxes in the colours of their classes. {colours}.",
            },
            "Classes of the objects": {
                "kind": "table",
                "columns": ["class", "AP", "AP50", "objects"],
                "rows": [[self.regions[n], *values, count[n]] for n, values in each.items()],
                "caption": "Average precision over IoU of 0.5 to 0.95, and at 0.5, of all pictures of the split.",
            },
        }


# ------------------------------------------------------------------------------------------------------------- the task


class BoxBatches(ImageBatches):
    """A split with boxes, read by lists of positions."""

    split: Any

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Any]:
        found = super().__getitem__(indices)
        found["boxes"], found["kinds"] = padded(self.split.boxes(found["index"].numpy()))
        return found


class BoxesTask(ImageTask):
    """Loaders and evaluator of one source of pictures with boxes."""

    name = "boxes"
    headline = "ap"  # the measure it judges by
    contract = "dense"
    at_once = BATCH
    watched = "pictures"
    reader = BoxBatches
    data: DenseData

    def __init__(self, data: DenseData, config: BoxesConfig) -> None:
        splits = (data.train, data.valid, data.test) if isinstance(data, DenseData) else ()
        if not splits or any(len(split) and split.boxes(np.arange(1)) is None for split in splits):
            raise CounterpointError(
                f"{data.name} has no boxes around objects, which the task boxes needs; name shapes or coco:FILE"
            )
        super().__init__(data, config)

    def split(self, name: str) -> Any:
        return super().split(name)

    def check_training(self) -> None:
        super().check_training()
        for name in ("train", "valid", "test"):
            split = self.split(name)
            if not any(len(one.labels) for one in split.boxes(np.arange(len(split)))):
                raise DataError(f"{self.data.name}: no picture of the {name} split has an object; name another split")

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        super().check_facts(trained)
        if list(trained["regions"]) != list(self.data.regions):
            raise CounterpointError(
                f"{self.data.name} has the classes {', '.join(self.data.regions[1:])}; the run was trained on "
                f"{', '.join(trained['regions'][1:])}"
            )

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the batches for `evaluator(split)`, in order."""
        pictures = self.split(split)
        parts = EvaluationBatches([("test", pictures, np.arange(len(pictures)))], BoxBatches, BATCH)
        return DataLoader(parts, batch_size=None, shuffle=False)

    def evaluator(self, split: str) -> BoxesEvaluator:
        return BoxesEvaluator(self.data, split)


TASK = BoxesTask
