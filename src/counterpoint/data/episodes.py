"""The contract of episodes: the form that every source for the task `episodes` returns (numpy only, no torch).

An item has features in slots, such as a vision and a language slot, and a class with a name. The training split has the known
classes. The splits valid and test have further items of them, and items of unseen classes, which no other split has. Episodes of
unseen classes test whether a model learns from demonstrations alone.

`latent-classes` makes such items on the spot: many rare Gaussian classes.
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
from counterpoint.errors import CounterpointError, DataError

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


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


def word(number: int) -> str:
    """Return a made-up word of two or three syllables, another one for each number below 340,000.

    >>> word(0), word(71)
    ('baba', 'bebi')
    """
    syllables = [a + b for a in CONSONANTS for b in VOWELS]
    base = len(syllables)
    first, second = number % base, (number // base + number) % base
    third = number // base**2
    return syllables[first] + syllables[second] + (syllables[third - 1] if third else "")


def load(
    argument: None = None,
    *,
    classes: int = 1000,
    unseen: int = 60,
    each: int = 8,
    held: int = 20,
    width: int = 16,
    slots: int = 1,
    noise: float = 0.4,
    missing: float = 0.0,
    seed: int = 0,
) -> EpisodeData:
    """Draw `latent-classes` (in a moment): the mean of a class is a standard normal vector, an item is near it.

    Args:
        argument: not used; sources share a signature.
        classes: number of known classes, at least 2.
        unseen: number of unseen classes of each of the splits valid and test, at least 2.
        each: number of training items of a known class, at least 2.
        held: number of items of each unseen class, at least 2. Valid and test have 5 times as many of known classes as there are
            unseen ones.
        width: number of features of a slot, at least 1.
        slots: number of slots, at least 1. Each is another rotation of the item, with noise of its own.
        noise: standard deviation of items around their mean, at least 0.
        missing: share of the slots that an item lacks, 0 to 1. Every item keeps one slot.
        seed: seed of everything, at least 0; another seed gives other classes and names.

    Raises CounterpointError for an option out of range.
    """
    if min(classes, unseen, each, held) < 2 or min(width, slots) < 1 or min(noise, seed) < 0 or not 0 <= missing < 1:
        raise CounterpointError(
            "latent-classes: classes, unseen, each, held >= 2; width, slots >= 1; noise, seed >= 0; 0 <= missing < 1. "
            f"Got {classes}, {unseen}, {each}, {held}, {width}, {slots}, {noise:g}, {seed} and {missing:g}"
        )
    if classes + 2 * unseen > 340_000:
        raise CounterpointError(f"latent-classes: {classes + 2 * unseen} classes are more than the 340,000 names")
    rng = np.random.default_rng([2307_07742, seed])
    total = classes + 2 * unseen
    means = rng.standard_normal((total, width))
    turns = [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(slots)]

    def drawn(labels: Indices) -> EpisodeSplit:
        rows = [(means[labels] + noise * rng.standard_normal((len(labels), width))) @ turn for turn in turns]
        there = rng.random((len(labels), slots)) >= missing
        there[np.arange(len(labels)), rng.integers(slots, size=len(labels))] = True
        features = np.where(there[..., None], np.stack(rows, 1), 0).astype(np.float32)
        return EpisodeSplit(features, labels, there)

    def held_out(first: int) -> EpisodeSplit:
        new = np.repeat(np.arange(first, first + unseen), held)
        return drawn(np.concatenate([new, rng.integers(classes, size=5 * unseen)]))

    test = held_out(classes + unseen)  # first: the number of training items does not change it
    valid = held_out(classes)
    train = drawn(np.repeat(np.arange(classes), each))
    names = [word(n) for n in rng.permutation(max(total, 4000))[:total].tolist()]
    return EpisodeData("latent-classes", names, train, valid, test)
