"""The contract of data with a real-valued target: the form of the task `regression` (numpy only, no torch).

    kind     an item's inputs                                   facts
    image    uint8 [size, size, 3] RGB                          size
    table    float32 [dim], a row's columns                     columns
    series   float32 [length, channels]                         length, channels

Columns and channels are raw: a learner standardises them by the training split's mean and deviation, which are facts of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts
from counterpoint.data.images import ArrayImages, ImageSplit, Indices
from counterpoint.errors import DataError
from counterpoint.words import counted

Kind = Literal["image", "table", "series"]
AT_ONCE = 4096  # items that are read together for their statistics


class TargetSplit(Protocol):
    """One split. Positions are stable: the same number is the same item in every process and run."""

    @property
    def targets(self) -> NDArray[np.float64]:
        """[len] finite numbers."""
        ...

    def __len__(self) -> int: ...

    def inputs(self, indices: Indices) -> NDArray[Any]:
        """Return the inputs of n positions, as the kind has them."""
        ...


class Targets:
    """Pictures, or rows of numbers, with their targets: a `TargetSplit`.

    Args:
        items: an `ImageSplit`, uint8 pictures (see `ArrayImages`), or float32 [n, dim] or [n, length, channels].
        targets: [n] numbers.
        row_names: names items for a reader (see `counterpoint.data.images.Listed`); default: none.
        files: paths of items; default: none.

    Raises DataError where lengths differ, and for targets and numbers that are not finite.
    """

    labels: None = None

    def __init__(
        self,
        items: ImageSplit | NDArray[Any],
        targets: NDArray[Any],
        row_names: Callable[[Indices], list[str]] | None = None,
        files: Callable[..., list[str | None]] | None = None,
    ) -> None:
        self.items: Any = items
        if isinstance(items, np.ndarray) and items.dtype == np.uint8:
            self.items = ArrayImages(items)
        self.targets = np.asarray(targets, np.float64)
        if self.targets.shape != (len(items),):
            raise DataError(
                f"targets have shape {list(self.targets.shape)}, expected [{len(items)}]: one for each item"
            )
        if not np.isfinite(self.targets).all():
            raise DataError(
                f"{int((~np.isfinite(self.targets)).sum())} of {counted(len(items), 'target is', 'targets are')} NaN or infinite"
            )
        if isinstance(self.items, np.ndarray) and not np.isfinite(self.items).all():
            raise DataError("columns hold NaN or infinite values")
        self._names, self._files = row_names, files

    def __len__(self) -> int:
        return len(self.items)

    def inputs(self, indices: Indices) -> NDArray[Any]:
        if isinstance(self.items, np.ndarray):
            return self.items[indices]
        found: NDArray[Any] = self.items.images(indices)
        return found

    def images(self, indices: Indices) -> NDArray[Any]:
        """Return the pictures of n positions, for pages and embeddings."""
        return self.inputs(indices)

    def row_names(self, positions: Indices) -> list[str]:
        """Name items for a reader; by their number where they have no name."""
        return [f"item {n}" for n in positions.tolist()] if self._names is None else self._names(positions)

    def files(self, positions: Indices, modality: str = "") -> list[str | None]:
        """Return the path of each item; None where it has none."""
        return [None] * len(positions) if self._files is None else self._files(positions)


@dataclass(frozen=True)
class TargetData:
    """A source's three splits, and the facts needed to read them."""

    name: str
    train: TargetSplit
    valid: TargetSplit  # to monitor training and to choose settings
    test: TargetSplit  # evaluated once, at the end
    kind: Kind
    target: str = "target"  # name of the target, with its unit where it has one
    size: int = 0  # pixels of a picture, height and width
    columns: tuple[str, ...] = ()  # names of a table's columns, or of a series' channels
    notes: list[str] = field(default_factory=list)
    accounts: Accounts | None = None
    classes: tuple[str, ...] = ()  # none: for parts of the package that ask any data for its classes

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        known = self.train.targets
        found: dict[str, Any] = {
            "kind": self.kind,
            "size": self.size,
            "channels": 3,
            "classes": 0,
            "class_names": [],
            "target": self.target,
            "target_mean": float(known.mean()) if len(known) else 0.0,
            "target_deviation": float(known.std()) if len(known) else 1.0,
        }
        if self.kind == "image":
            return found
        shape = self.train.inputs(np.arange(1)).shape[1:]
        sums, squares, count = np.zeros(shape[-1]), np.zeros(shape[-1]), 0
        for start in range(0, len(self.train), AT_ONCE):
            rows = self.train.inputs(np.arange(start, min(start + AT_ONCE, len(self.train)))).reshape(-1, shape[-1])
            sums, squares, count = (
                sums + rows.sum(0, dtype=np.float64),
                squares + (rows.astype(float) ** 2).sum(0),
                count + len(rows),
            )
        mean = sums / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return found | {
            "channels": shape[-1],
            "length": shape[0] if self.kind == "series" else 0,
            "columns": list(self.columns),
            "mean": mean.tolist(),
            "deviation": np.where(deviation > 1e-12 * np.abs(mean), deviation, 1.0).tolist(),
            "modalities": {self.kind: {"kind": "vector", "dim": int(np.prod(shape))}},
        }
