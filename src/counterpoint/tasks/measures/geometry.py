"""Measure the geometry of embeddings, and prepare figures of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core import gap
from counterpoint.core.checks import need_alike
from counterpoint.core.operands import EPS
from counterpoint.tasks.measures.checks import compared, item_numbers, rows_of


def alignment(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"], *, power: float = 2.0) -> float:
    """Mean of |x~ - y~|^power over positive pairs, x~ of unit length (Wang and Isola 2020, arXiv 2005.10242). 0 is best.

    Raises ValueError for different shapes.
    """
    x, y = compared(x=x, y=y)
    need_alike("n dim", x=x, y=y)
    return float((F.normalize(x, dim=1) - F.normalize(y, dim=1)).norm(dim=1).pow(power).mean())


def uniformity(x: Float[Tensor, "n dim"], *, sharpness: float = 2.0) -> float:
    """Return `core.gap.uniformity` as a number; nan for fewer than two rows.

    It is the logarithm of the mean of exp(-sharpness |x~_i - x~_j|^2) over pairs.
    """
    x = rows_of("x", x)
    return float(gap.uniformity(x, sharpness=sharpness)) if len(x) > 1 else math.nan


def tolerance(x: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> float:
    """Compute the mean cosine of two different examples of one class; 1 if every class is a point.

    Args:
        x: rows, which this function normalises.
        labels: classes of the rows.

    Memory is linear in the rows, because the sum of each class's rows suffices. Raises ValueError if no class has two
    examples. Source: Wang and Liu 2021, arXiv 2012.09740, Sec. 4.2, over the pairs of one class.
    """
    x = rows_of("x", x)
    labels = item_numbers("labels", labels, len(x))
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    pairs = (counts * (counts - 1)).sum()
    if pairs == 0:
        raise ValueError("labels: no class has two examples to compare")
    x = F.normalize(x.double(), dim=1)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, place, x)
    return float(((sums * sums).sum() - (x * x).sum()) / pairs)


def cosine_between_classes(x: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], classes: int) -> float | None:
    """Compute the mean cosine of two rows of different classes; None without such a pair.

    Args:
        x: unit rows.
        labels: class numbers; rows with a number outside 0 to classes - 1 are left out.
        classes: number of classes.
    """
    own = (labels >= 0) & (labels < classes)
    sums = torch.zeros(classes, x.shape[1]).index_add(0, labels[own], x[own])
    counts = labels[own].bincount(minlength=classes).float()
    pairs = float(counts.sum() ** 2 - (counts**2).sum())
    return float(sums.sum(0).square().sum() - sums.square().sum()) / pairs if pairs else None


def principal_axes(x: Float[Tensor, "n dim"]) -> tuple[Float[Tensor, "n 2"], list[str]]:
    """Project rows on their first two principal axes; return the coordinates and the axes' names with their variance.

    Raises ValueError for fewer than two rows or columns.
    """
    x = rows_of("x", x)
    if min(x.shape) < 2:
        raise ValueError(f"x needs two rows and two columns to have two axes, got {list(x.shape)}")
    centred = x - x.mean(0)
    _, size, axes = torch.linalg.svd(centred, full_matrices=False)
    share = size.square() / size.square().sum().clamp(min=EPS)
    names = [f"principal axis {n + 1}, {float(value):.0%} of the variance" for n, value in enumerate(share[:2])]
    return centred @ axes[:2].T, names


def axes_figure(groups: Mapping[str, Float[Tensor, "n dim"]], caption: str, most: int | None = None) -> dict[str, Any]:
    """Draw groups of rows on the first two principal axes of all rows together.

    Args:
        groups: rows of each group by its name in the legend; at least two rows in all, of at least two columns.
        caption: sentence below the figure.
        most: maximum number of rows of a group to draw. Default: all.
    """
    groups = {name: rows for name, rows in groups.items() if len(rows)}
    flat, axes = principal_axes(torch.cat(list(groups.values())))
    at = flat.split([len(rows) for rows in groups.values()])
    points = {name: np.round(part[:most].numpy(), 4).tolist() for name, part in zip(groups, at, strict=True)}
    return {"kind": "points", "points": points, "axes": axes, "caption": caption}


def gallery_rows(
    asked: Int[Tensor, " q"],
    keys: Int[Tensor, " m"],
    similarity: Float[Tensor, "q m"],
    right: Int[Tensor, "items ..."],
    shown: int,
) -> list[dict[str, Any]]:
    """List the retrieved items of a few queries for a gallery: each item, its similarity and whether it is right.

    Args:
        asked: items that are queries.
        keys: items to retrieve.
        similarity: similarity of each query with each key; -inf for keys to hide.
        right: one or several numbers of every item; a retrieved item is right if it shares the query's number in any column.
        shown: maximum number of retrieved items per query.
    """
    values, best = similarity.topk(min(shown, int((similarity > -math.inf).sum(1).min())), dim=1)
    return [
        {
            "query": int(query),
            "found": [
                {
                    "item": int(keys[place]),
                    "similarity": round(float(value), 3),
                    "right": bool((right[keys[place]] == right[query]).any()),
                }
                for value, place in zip(of_query, places, strict=True)
            ],
        }
        for query, of_query, places in zip(asked, values, best, strict=True)
    ]
