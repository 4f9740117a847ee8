"""Cut small patches out of pictures, from a grid of overlapping cells, each moved at random within its cell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.errors import CounterpointError


class Grid(NamedTuple):
    """A grid of `per_side` x `per_side` overlapping cells of `side + reach` pixels, in a square of `canvas` pixels."""

    canvas: int
    side: int  # of a patch
    reach: int  # pixels by which a patch may move within its cell
    per_side: int = 3

    @classmethod
    def for_patches(cls, side: int) -> Grid:
        """Scale the grid of context prediction to patches of this side: 96 pixels move by up to 24, in 256 pixels."""
        return cls(round(side * 256 / 96), side, round(side * 24 / 96))

    def draw(self, batch: int, count: int, generator: torch.Generator) -> Int[Tensor, "batch count 2"]:
        """Draw the top and left pixels of `count` patches of different cells, in random order, for each picture.

        Raises CounterpointError for more patches than cells.
        """
        cells = self.per_side**2
        if not 1 <= count <= cells:
            raise CounterpointError(f"patches come from different cells of {cells}, got {count} patches")
        cell = torch.rand(batch, cells, generator=generator).argsort(1)[:, :count]
        places = torch.stack([cell // self.per_side, cell % self.per_side], 2)
        room = self.canvas - self.side - self.reach
        corner = torch.div(places * room, self.per_side - 1, rounding_mode="floor") if self.per_side > 1 else places
        return corner + (torch.rand(batch, count, 2, generator=generator) * (self.reach + 1)).long()

    def cut(
        self, pictures: Float[Tensor, "batch channels canvas canvas"], corners: Int[Tensor, "batch count 2"]
    ) -> Float[Tensor, "batch count channels side side"]:
        """Cut the patches with these top and left pixels."""
        within = torch.arange(self.side, device=pictures.device)
        top, left = (corners.to(pictures.device)[..., axis, None] + within for axis in (0, 1))
        rows = torch.arange(len(pictures), device=pictures.device)[:, None, None, None]
        found = pictures.movedim(1, 3)[rows, top[:, :, :, None], left[:, :, None, :]]
        return found.movedim(4, 2)
