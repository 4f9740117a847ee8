"""Changed copies of rows of numbers and of series: noise, columns of other rows, shifts in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.errors import CounterpointError


@dataclass(frozen=True)
class NumberViews:
    """A pipeline of views of tables [n, columns] and series [n, length, channels].

    Args:
        deviation: deviation of each column or channel, > 0, in which `noise` is measured.
        noise: standard deviation of Gaussian noise, at least 0.
        swapped: chance of a table's number to be that of a random other row of the batch, 0 to 1 (SCARF, arXiv 2106.15147).
        shift: largest shift of a series in time, as a share of its length, 0 to 1; it is cyclic.
        crops: number of views.
    """

    deviation: Sequence[float]
    noise: float = 0.1
    swapped: float = 0.0
    shift: float = 0.0
    crops: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise CounterpointError(f"noise must be at least 0 and finite, got {self.noise}")
        for name in ("swapped", "shift"):
            if not 0 <= getattr(self, name) <= 1:
                raise CounterpointError(f"{name} must lie in 0..1, got {getattr(self, name)}")

    def __call__(
        self,
        rows: Float[Tensor, ...],
        every: Float[Tensor, ...],
        mine: slice,
        generator: torch.Generator,
    ) -> list[Float[Tensor, ...]]:
        """Return the views of this process's rows.

        Args:
            rows: this process's rows of the batch, [n, columns] or [n, length, channels].
            every: all rows of the batch, from which swapped numbers are taken.
            mine: the slice of the batch that `rows` are.
            generator: draws for the whole batch.
        """
        shape, found = every.shape, []
        unit = torch.tensor(self.deviation, dtype=rows.dtype, device=rows.device)
        for _ in range(self.crops):
            x = rows
            if self.swapped and len(shape) == 2:
                other = torch.randint(shape[0], shape, generator=generator)[mine].to(rows.device)
                swap = (torch.rand(shape, generator=generator) < self.swapped)[mine].to(rows.device)
                x = torch.where(swap, every.gather(0, other), x)
            if self.shift and len(shape) == 3:
                length = shape[1]
                most = int(self.shift * length)
                by = torch.randint(-most, most + 1, (shape[0], 1), generator=generator)[mine]
                at = ((torch.arange(length) + by) % length).to(rows.device)
                x = x.gather(1, at[:, :, None].expand_as(x))
            if self.noise:
                x = x + self.noise * unit * torch.randn(shape, generator=generator)[mine].to(x)
            found.append(x)
        return found
