"""Draw the random parameters of a batch of snippets, and select and check them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from counterpoint.errors import CounterpointError


@dataclass
class Parameters:
    """The random parameters of a batch: tensors with one row per item, except those named in `shared`."""

    shared: ClassVar[tuple[str, ...]] = ()

    def take(self, rows: slice | Tensor) -> Self:
        """Select the parameters of some items, such as one process's share of a batch that is drawn as a whole."""
        chosen = {name: value[rows] for name, value in self._tensors() if name not in self.shared}
        return replace(self, **chosen)

    def moved(self, device: torch.device) -> Self:
        """Move the parameters to a device, that of the items."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]


def uniform(low: float, high: float, size: int | Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw numbers of this size, uniform from `low` to `high`, with a generator of the CPU."""
    shape = (size,) if isinstance(size, int) else tuple(size)
    return low + (high - low) * torch.rand(shape, generator=generator)


def sometimes(value: Tensor, share: float, generator: torch.Generator, otherwise: float = 0.0) -> Tensor:
    """Select each item's value with the probability `share`, else the value `otherwise`."""
    chosen = torch.rand(len(value), generator=generator) < share
    return torch.where(chosen.view(-1, *[1] * (value.ndim - 1)), value, value.new_tensor(otherwise))


def check(what: Any, shares: Sequence[str], ranges: Sequence[str]) -> None:
    """Raise CounterpointError for a field of a recipe that is no probability or share, or no range."""
    for name in shares:
        if not 0 <= getattr(what, name) <= 1:
            raise CounterpointError(f"{name} must be a probability or share, 0 to 1, got {getattr(what, name)}")
    for name in ranges:
        low, high = getattr(what, name)
        if not low <= high:
            raise CounterpointError(f"{name} must be a range (low, high), got {(low, high)}")


def some(mask: Tensor) -> list[Tensor]:
    """Return a list with the positions of True, empty if there is none."""
    rows = mask.nonzero().flatten()
    return [rows] if len(rows) else []
