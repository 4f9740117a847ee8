"""The contract of episodes: the form that every source for the task `episodes` returns (numpy only, no torch).

An item has features in slots, such as a vision and a language slot, and a class with a name. The training split has the known
classes. The splits valid and test have further items of them, and items of unseen classes, which no other split has. Episodes of
unseen classes test whether a model learns from demonstrations alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from counterpoint.data.demonstrations import Members
from counterpoint.data.images import Indices
from counterpoint.errors import DataError


@dataclass(frozen=True)
class EpisodeSplit:
    """Items with features and classes. Positions are the same in every process and run."""

    features: Float[NDArray[np.float32], "items slots width"]  # zeros in a slot that an item lacks
    labels: Int[NDArray[np.int64], " items"]  # numbers of the classes
    present: Bool[NDArray[np.bool_], "items slots"]  # False where an item lacks a slot

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def members(self) -> Members:
        """The items of each class."""
        return Members(self.labels)

    @cached_property
    def counts(self) -> dict[int, int]:
        """Number of items of each class."""
        return dict(zip(*(part.tolist() for part in np.unique(self.labels, return_counts=True)), strict=True))

    def take(self, rows: Indices) -> EpisodeSplit:
        """Return the items at these positions."""
        return EpisodeSplit(self.features[rows], self.labels[rows], self.present[rows])


@dataclass(frozen=True)
class EpisodeData:
    """A source's splits, and the names of all classes.

    Raises DataError for features that are not finite or of several shapes, and for classes without a name.
    """

    name: str
    classes: Sequence[str]
    train: EpisodeSplit
    valid: EpisodeSplit  # to monitor training and to choose settings
    test: EpisodeSplit  # evaluated once, at the end
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            split: EpisodeSplit = getattr(self, name)
            if split.features.ndim != 3 or split.features.shape[1:] != self.train.features.shape[1:]:
                raise DataError(
                    f"{self.name}: features of {name} must be [items, slots, width], with slots and width as in training, "
                    f"got {list(split.features.shape)} and {list(self.train.features.shape)}"
                )
            if not len(split.features) == len(split.labels) == len(split.present):
                raise DataError(f"{self.name}: {name} needs a class and the presence of slots for each item")
            if not np.isfinite(split.features).all():
                row = int(np.flatnonzero(~np.isfinite(split.features).all((1, 2)))[0])
                raise DataError(f"{self.name}: the features of item {row} of {name} hold NaN or infinite values")
            if len(split) and not 0 <= split.labels.min() <= split.labels.max() < len(self.classes):
                raise DataError(f"{self.name}: class numbers of {name} must lie in 0..{len(self.classes) - 1}")
        empty = [n for n, name in enumerate(self.classes) if not name.strip()]
        if empty:
            raise DataError(f"{self.name}: class {empty[0]} has no name, and its name is its label; give it one")

    @cached_property
    def known(self) -> Indices:
        """Numbers of the classes that the training split has, in order."""
        return np.unique(self.train.labels)

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        _, slots, width = self.train.features.shape
        names = [self.classes[n] for n in self.known.tolist()]
        return {"examples": len(self.train), "slots": slots, "feature_width": width, "class_names": names}
