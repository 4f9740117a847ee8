"""Measure feature maps cell by cell, on pictures with masks: a probe of the cells' classes, and matches between two crops."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.cells import CellPairs, cell_rows, near_cells
from counterpoint.core.operands import unit
from counterpoint.data.dense import IGNORE, DenseData
from counterpoint.data.shown import png
from counterpoint.encoders.maps import feature_map
from counterpoint.engine.survey import Survey
from counterpoint.tasks.measures import confusion, linear_probe
from counterpoint.tasks.measures.masks import ious
from counterpoint.views.images import ViewPipeline, denormalise

REACH = 1.0  # cell diagonals within which two cells show the same place
PICTURES = 512  # maximum number of pictures whose cells are measured
OF_PICTURE = 64  # maximum number of cells of a picture
OF_CLASS = 1000  # maximum number of cells of a class that the probe learns from
SIDE = 96  # pixels of a picture as shown
SLACK = 1e-6  # difference below which two cosines are equal


def cell_classes(
    masks: Int[Tensor, "n height width"], shape: tuple[int, int], classes: int
) -> Int[Tensor, "n rows columns"]:
    """Return each cell's most frequent class among its pixels; -1 for a cell with fewer known than unknown pixels.

    Args:
        masks: class numbers of pixels, IGNORE where unknown.
        shape: rows and columns of the cells.
        classes: number of classes.
    """
    known = masks != IGNORE
    each = F.one_hot(torch.where(known, masks.long(), 0), classes).float() * known[..., None]
    shares = F.adaptive_avg_pool2d(each.permute(0, 3, 1, 2), shape)
    return torch.where(shares.sum(1) >= 0.5, shares.argmax(1), -1)


def right_matches(
    cells_1: Float[Tensor, "n cells dim"], cells_2: Float[Tensor, "n cells dim"], pairs: CellPairs
) -> tuple[float, float]:
    """Compute the share of cells whose most similar cell of the other crop is near, and its level by chance.

    Cells without a near cell do not count. Where t cells tie for the most similar and k of them are near, the cell counts k/t.

    Args:
        cells_1, cells_2: features of the cells of both crops.
        pairs: near cells of the crops.

    Returns two nans where no cell has a near one.
    """
    cells = cells_1.shape[1]
    similarity = (unit(cells_1) @ unit(cells_2).transpose(1, 2)).flatten(0, 1)
    near = torch.zeros_like(similarity, dtype=torch.bool)
    near[pairs.first, pairs.second % cells] = True
    has = near.any(1)
    if not bool(has.any()):
        return float("nan"), float("nan")
    best = similarity >= similarity.amax(1, keepdim=True) - SLACK
    right = (best & near).sum(1) / best.sum(1)
    return float(right[has].mean()), float(near[has].float().mean())


class CellMeasures:
    """Measures of feature maps of one evaluation.

    Args:
        data: pictures with masks.
    """

    def __init__(self, data: DenseData) -> None:
        self.regions, self.background = data.regions, data.background
        self.rows: dict[str, list[Tensor]] = {"bank": [], "test": []}
        self.classes: dict[str, list[Tensor]] = {"bank": [], "test": []}
        self.pictures = {"bank": 0, "test": 0}
        self.matches: list[tuple[float, float, int]] = []

    def update(self, part: str, maps: Float[Tensor, "n dim rows columns"], masks: Tensor) -> None:
        """Take the maps of some pictures of the part "bank" or "test"."""
        room = PICTURES - self.pictures[part]
        shape = (maps.shape[2], maps.shape[3])
        step = -(-shape[0] * shape[1] // OF_PICTURE)
        masks = masks.cpu()
        known = (masks != IGNORE).flatten(1).any(1).nonzero()[:, 0][: max(0, room)]
        self.pictures[part] += len(known)
        if len(known):
            found = cell_classes(masks[known], shape, len(self.regions)).flatten(1)[:, ::step].flatten()
            rows = cell_rows(maps.detach().float().cpu()[known])[:, ::step].flatten(0, 1)
            self.rows[part].append(rows[found >= 0])
            self.classes[part].append(found[found >= 0])

    def update_pairs(self, maps: list[Tensor], coords: list[Tensor]) -> None:
        """Take the maps and coordinates of two crops of some pictures."""
        shape = (maps[0].shape[2], maps[0].shape[3])
        one, two = (cell_rows(x.detach().float().cpu()) for x in maps)
        pairs = near_cells(coords[0].cpu(), coords[1].cpu(), shape, REACH)
        number = int(pairs.first.unique().numel())
        if number:
            self.matches.append((*right_matches(one, two, pairs), number))

    def compute(self, *, final: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Return the measures, and their levels by chance."""
        found: dict[str, float] = {}
        chance: dict[str, float] = {}
        if self.matches:
            right, guess, number = (np.array(each) for each in zip(*self.matches, strict=True))
            found["correspondence"] = float((right * number).sum() / number.sum())
            chance["correspondence"] = float((guess * number).sum() / number.sum())
        if self.rows["test"]:
            rows, classes = torch.cat(self.rows["test"]), torch.cat(self.classes["test"])
            found["cell_cosine"] = float(unit(rows).mean(0).square().sum())
            if final and self.rows["bank"]:
                table = self._probe(rows, classes)
                kept = range(1 if self.background else 0, len(self.regions))
                found["cell_miou"] = float(np.nanmean(ious(table)[list(kept)]))
        return found, chance

    def _probe(self, rows: Tensor, classes: Tensor) -> Int[Tensor, "classes classes"]:
        """Fit a linear probe on equally many cells of each class, repeated where there are few; return the confusion."""
        bank, known = torch.cat(self.rows["bank"]), torch.cat(self.classes["bank"])
        order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))
        number = min(OF_CLASS, int(known.bincount().max()))
        members = [order[known[order] == label] for label in known.unique()]
        chosen = torch.cat([own[torch.arange(number) % len(own)] for own in members])
        _, predicted = linear_probe(bank[chosen], known[chosen], rows, classes)
        return confusion(classes, predicted, len(self.regions))


# ----------------------------------------------------------------------------------------------------------- the picture


def match_figure(encoder: nn.Module, survey: Survey, pipeline: ViewPipeline, split: str = "valid") -> dict[str, Any]:
    """Draw pairs of crops: a cell of one crop, where its features find it in the other crop, and where it really is.

    Args:
        encoder: an encoder with a feature map.
        survey: access to the pictures.
        pipeline: makes the two crops.
        split: the split to show.
    """
    pictures = survey.split(split)
    rows = np.arange(len(pictures))[:: max(1, len(pictures) // 24)][:24]
    images = torch.from_numpy(pictures.images(rows)).permute(0, 3, 1, 2)
    drawn = pipeline.draw(tuple(images.shape), torch.Generator().manual_seed(0))[:2]
    views = pipeline.apply(images, drawn)
    coords = [view.coordinates(*images.shape[2:]) for view in drawn]
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    with torch.no_grad():
        maps = [feature_map(encoder, view.to(device)).float().cpu() for view in views]
    encoder.train(training)
    shape = (maps[0].shape[2], maps[0].shape[3])
    cells = shape[0] * shape[1]
    one, two = (unit(cell_rows(x)) for x in maps)
    pairs = near_cells(coords[0], coords[1], shape, 0.7)
    here = pairs.first
    spread = one.var(1).sum(1)  # pictures whose cells differ show most
    found: list[list[str]] = []
    for n in spread.argsort(descending=True).tolist():
        mine = here[(here // cells) == n].unique() % cells
        if not len(mine) or len(found) == 6:
            continue
        distinct = (one[n, mine] - one[n].mean(0)).square().sum(1)
        cell = int(mine[distinct.argmax()])
        similarity = (two[n] @ one[n, cell]).view(shape).numpy()
        true = (pairs.second[here == n * cells + cell] % cells).tolist()
        first, second = (_shown(view[n]) for view in views)
        heat = (similarity - similarity.min()) / max(float(np.ptp(similarity)), 1e-6)
        found.append(
            [
                png(_framed(first, [cell], shape)),
                png(_framed(second, [int(similarity.argmax())], shape)),
                png(_heat(heat)),
                png(_framed(second, true, shape)),
            ]
        )
    if not found:
        return {}
    return {
        "Cells found again in another crop": {
            "kind": "pictures",
            "columns": ["a cell of one crop", "its most similar cell", "similarity", "cells at its place"],
            "rows": found,
            "caption": "Features of the encoder; a bright cell is similar. The last column is the truth.",
        }
    }


def _shown(view: Tensor) -> NDArray[np.uint8]:
    pixels = (denormalise(view[None])[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    larger = max(1, SIDE // len(pixels))
    found = pixels.repeat(larger, 0).repeat(larger, 1)
    return np.ascontiguousarray(found)


def _framed(pixels: NDArray[np.uint8], cells: list[int], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a white frame with a dark edge around cells."""
    found = pixels.copy()
    high, wide = (len(pixels) / shape[0], pixels.shape[1] / shape[1])
    for cell in cells:
        row, column = divmod(cell, shape[1])
        top, left, bottom, right = (
            round(x) for x in (row * high, column * wide, (row + 1) * high, (column + 1) * wide)
        )
        for inset, shade in ((0, 0), (1, 255), (2, 255), (3, 0)):
            part = found[top + inset : bottom - inset, left + inset : right - inset]
            if part.size:
                part[[0, -1]], part[:, [0, -1]] = shade, shade
    return found


def _heat(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    larger = max(1, SIDE // len(values))
    return (values * 255).astype(np.uint8).repeat(larger, 0).repeat(larger, 1)
