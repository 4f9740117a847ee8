"""Relate a number of each item to the size of the item's class: the mean of each class, its rank, head and tail."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class ClassMeans(NamedTuple):
    """The classes that occur, in the order of their numbers."""

    classes: Int[Tensor, " classes"]
    sizes: Int[Tensor, " classes"]  # number of items
    means: Float[Tensor, " classes"]

    def rank_correlation(self) -> float:
        """Compute Spearman's rank correlation of sizes and means; 0 if either is constant."""
        from scipy import stats

        sizes, means = self.sizes.numpy(), self.means.numpy()
        if np.ptp(sizes) == 0 or np.ptp(means) == 0:
            return 0.0
        return float(stats.spearmanr(sizes, means).statistic)

    def tail_and_head(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Average the means of the smallest third of the classes, and of the largest third; at least one class each."""
        third = max(1, len(self.sizes) // 3)
        order = self.sizes.argsort(stable=True)
        return self.means[order[:third]].mean(), self.means[order[-third:]].mean()

    def points(self, names: tuple[str, ...], axes: tuple[str, str], caption: str) -> dict[str, Any]:
        """Return a figure for a run's page: one point for each class, its mean over its size.

        Args:
            names: names of the classes by number. A class beyond them is called by its number.
            axes: labels of the horizontal and the vertical axis.
            caption: sentences below the figure.
        """
        classes, sizes, means = (part.tolist() for part in self)
        return {
            "kind": "points",
            "points": {
                (names[number] if number < len(names) else str(number)): [[size, value]]
                for number, size, value in zip(classes, sizes, means, strict=True)
            },
            "axes": list(axes),
            "caption": caption,
        }


def means_by_class(values: Float[Tensor, " n"], labels: Int[Tensor, " n"] | None) -> ClassMeans | None:
    """Average a number of each item over each class.

    Args:
        values: one number for each item.
        labels: classes; negative ones are unknown, and their items are left out. None: all are unknown.

    Returns None for fewer than two known classes.

    >>> means_by_class(torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([4, 4, 2, -1])).means
    tensor([5., 2.])
    """
    if labels is None:
        return None
    known = labels >= 0
    classes, place, sizes = labels[known].unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        return None
    means = torch.zeros(len(classes)).index_add_(0, place, values.cpu()[known].float()) / sizes
    return ClassMeans(classes, sizes, means)
