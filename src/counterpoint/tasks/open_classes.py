"""Measure classifiers by texts on classes and domains that training did not see; settings and evaluation for the task `labelled`.

With `--base 0.5` the first half of the classes, in their order, are base classes; the others are novel. No label of a novel class
trains. The evaluation measures base pictures among the base classes, and novel pictures among the novel ones. It also gives the
harmonic mean of both. Domains are left out by the data: `?unseen=...` (see LabelledEvaluator).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.images import ImageData, Indices
from counterpoint.errors import CounterpointError
from counterpoint.tasks.labelled import LabelledConfig, LabelledEvaluator, macro_recall
from counterpoint.tasks.measures import class_chance, confusion_of


@dataclass
class OpenConfig(LabelledConfig):
    """Settings of classifiers by texts."""

    base: float = 1.0
    """Share of the classes, in their order, that are base classes (rounded up), above 0 to 1; no label of the others, the novel
    classes, trains. Default: all."""

    transductive: ClassVar[bool] = False  # whether pictures of novel classes train, without their label

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.base <= 1:
            raise CounterpointError(f"base must lie above 0 and be at most 1, got {self.base}")

    def base_classes(self, classes: int) -> int:
        """Return the number of base classes. Raises CounterpointError for one base or one novel class, which decide nothing."""
        found = math.ceil(self.base * classes)
        if found < classes and min(found, classes - found) < 2:
            raise CounterpointError(
                f"base {self.base} leaves {found} base and {classes - found} novel classes; each needs at least two"
            )
        return found

    def trained_on(self, rows: Indices, data: ImageData) -> Indices:
        """Select the training pictures to use of these positions."""
        base = self.base_classes(len(data.classes))
        assert data.train.labels is not None
        return rows if self.transductive else rows[data.train.labels[rows] < base]

    def evaluator(self, data: ImageData) -> OpenEvaluator:
        """Return the evaluator of data with these classes."""
        return OpenEvaluator(self, data.classes)


class OpenEvaluator(LabelledEvaluator):
    """Accuracy of every classifier over all classes, over the base classes and over the novel ones."""

    config: OpenConfig

    def classified(self, labels: Tensor, logits: Tensor) -> dict[str, tuple[float, float | None]]:
        found = super().classified(labels, logits)
        base = self.config.base_classes(len(self.classes))
        if base == len(self.classes):
            return found
        halves = {"base": slice(0, base), "novel": slice(base, None)}
        for name, part in halves.items():
            numbers = torch.arange(len(self.classes))[part]
            own = torch.isin(labels, numbers)
            table = confusion_of(labels[own] - int(numbers[0]), logits[own][:, part])
            guess = class_chance(len(numbers))
            found[f"{name}_accuracy"] = (float(table.diagonal().sum() / table.sum()), guess)
            found[f"{name}_macro_recall"] = (macro_recall(table), guess)
        values, guesses = zip(*(found[f"{name}_accuracy"] for name in halves), strict=True)
        found["harmonic_mean"] = (harmonic_mean(*values), harmonic_mean(*guesses))
        return found


def harmonic_mean(base: float, novel: float) -> float:
    """Compute the harmonic mean of two shares; 0 where both are 0. It is the H of base-to-novel protocols.

    >>> harmonic_mean(0.5, 1.0)
    0.6666666666666666
    """
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def class_shots(labels: Indices, shots: int, seed: int) -> Indices:
    """Select `shots` positions of each class, chosen by the seed; all of a class with fewer. 0 selects all.

    Args:
        labels: [n] class numbers; positions of label -1 are left out.
        shots: number for each class, at least 0.
        seed: seed of the choice.
    """
    known = np.flatnonzero(labels >= 0)
    if not shots or not len(known):
        return known
    order = np.random.default_rng([seed, shots]).permutation(known)
    return np.sort(np.concatenate([order[labels[order] == label][:shots] for label in np.unique(labels[known])]))
