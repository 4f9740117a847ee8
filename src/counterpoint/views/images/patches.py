"""Make groups of crops of each picture: large crops, and patches from a grid of overlapping cells (OBoW, arXiv 2012.11552)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.errors import CounterpointError
from counterpoint.views.images.colours import normalise
from counterpoint.views.images.pipeline import ViewParameters, ViewPipeline


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


@dataclass
class GroupParameters:
    """The random parameters of the groups of crops of each of B pictures."""

    views: list[ViewParameters]
    corners: Int[Tensor, "batch patches 2"] | None
    flip: Tensor  # [batch], whether the whole picture is flipped

    def take(self, rows: slice | Tensor) -> GroupParameters:
        """Select the parameters of some pictures."""
        corners = None if self.corners is None else self.corners[rows]
        return GroupParameters([view.take(rows) for view in self.views], corners, self.flip[rows])


class CropGroups:
    """A group of large crops and a group of patches of each picture, and the whole picture, flipped at random.

    Args:
        size: height and width of the pictures in pixels.
        recipe: name of a recipe; its local view is the picture that patches are cut from.
        large: number of large crops, at least 0.
        large_size: height and width of large crops in pixels; 0: 5/7 of `size`.
        patches: number of patches, 0 to 9.
        patch_size: height and width of patches in pixels; 0: 3/7 of `size`.
    """

    def __init__(self, size: int, recipe: str, large: int, large_size: int, patches: int, patch_size: int) -> None:
        self.large, self.patches = large, patches
        large_size, side = large_size or max(1, round(size * 5 / 7)), patch_size or max(1, round(size * 3 / 7))
        self.grid = Grid.for_patches(side)
        self.sizes = [large_size] * (large > 0) + [side] * (patches > 0)
        self.pipeline = ViewPipeline(large_size, large, recipe, int(patches > 0), self.grid.canvas)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> GroupParameters:
        """Draw the parameters of pictures of this shape, [B, 3, H, W]."""
        views = self.pipeline.draw(shape, generator)
        flip = torch.rand(shape[0], generator=generator) < self.pipeline.recipes[0].flip
        return GroupParameters(views, self.grid.draw(shape[0], self.patches, generator) if self.patches else None, flip)

    def apply(self, images: Tensor, drawn: GroupParameters) -> tuple[list[Tensor], Tensor]:
        """Return the normalised groups, all crops of a picture in adjacent rows, and the normalised whole pictures."""
        views = self.pipeline.apply(images, drawn.views)
        groups = [torch.stack(views[: self.large], 1).flatten(0, 1)] if self.large else []
        if drawn.corners is not None:
            groups.append(self.grid.cut(views[-1], drawn.corners).flatten(0, 1))
        flip = drawn.flip.to(images.device)[:, None, None, None]
        return groups, normalise(torch.where(flip, images.flip(3), images))
