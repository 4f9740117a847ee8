"""Measure predicted masks of one split, and draw them: the evaluator of the task `dense` (see tasks/dense.py)."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.data.dense import DenseData
from counterpoint.data.shown import png
from counterpoint.errors import diverged
from counterpoint.tasks.measures.masks import dices, ious, pixel_confusion
from counterpoint.tasks.measures.surfaces import volume_distances
from counterpoint.tasks.subsets import corruptions, subsets

SHOWN = 6  # pictures on the page
SIDE = 96  # pixels of a picture as shown


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
        self.spacings: NDArray[np.float64] | None = getattr(getattr(data, split), "spacings", None)
        self.brief = {f"{name}_" for names in self.groups.values() for name in names}  # heads of which mIoU is enough
        self.reset()

    def reset(self) -> None:
        self.tables: dict[str, dict[int, Int[Tensor, "classes classes"]]] = {}  # by head, then by volume
        self.figures: dict[str, Any] = {}
        self.shown: list[list[str]] = []
        self.volumes: dict[int, list[tuple[Tensor, Tensor]]] = {}  # truth and prediction of slices, by volume

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
                raise diverged(f"the {name} hold NaN or infinite values")
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
                for group in np.unique(of).tolist() if self.spacings is not None else ():
                    mine = torch.from_numpy(of == group)
                    self.volumes.setdefault(group, []).append((truth[mine], predicted[mine].to(torch.uint8)))

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
        distances = self.distances() if final else np.zeros((0, self.classes))
        if not np.isnan(distances).all():
            found["hd95"] = _mean(np.array([_mean(row) for row in distances]))
        if final and "" in self.tables:
            self.figures = self._drawn(torch.stack(list(self.tables[""].values())).sum(0), distances)
        return found

    def distances(self) -> NDArray[np.float64]:
        """Return HD95 in mm of each volume and class [volumes, classes]; nan where there is none."""
        rows, spacings = [], self.spacings
        for group, parts in self.volumes.items() if spacings is not None else ():
            truth, predicted = (torch.cat(side).numpy() for side in zip(*parts, strict=True))
            if len(truth) < int((getattr(self.data, self.split).groups == group).sum()):
                continue
            assert spacings is not None
            spacing = spacings[group].tolist()
            rows.append(volume_distances(truth, predicted, self.classes, spacing, background=self.data.background))
        return np.array(rows).reshape(-1, self.classes)

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

    def _drawn(self, table: Int[Tensor, "classes classes"], distances: NDArray[np.float64]) -> dict[str, Any]:
        surfaces = [_mean(column) for column in distances.T] if len(distances) else None
        rows = [
            [name, _cell(iou), _cell(dice), int(count), *([] if surfaces is None else [_cell(surfaces[number])])]
            for number, (name, iou, dice, count) in enumerate(
                zip(self.data.regions, ious(table), dices(table), table.sum(1).tolist(), strict=True)
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
                "columns": ["class", "IoU", "Dice", "pixels", *([] if surfaces is None else ["HD95 in mm"])],
                "rows": rows,
                "caption": "Of all known pixels of the split."
                + ("" if surfaces is None else " HD95 is the mean over the volumes that have the class."),
            },
        }


def _cell(value: float) -> float | str:
    """Return a number for a table; nothing where it is not defined."""
    return "" if np.isnan(value) else float(value)


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
