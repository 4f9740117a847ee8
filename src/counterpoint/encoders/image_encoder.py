"""Define the base class of image encoders, for modules that build on each other."""

from __future__ import annotations

from typing import Self

from torch import nn

from counterpoint.encoders.adapters import keep_statistics


class ImageEncoder(nn.Module):
    """A module that maps normalised pictures [batch, channels, height, width] to vectors [batch, dim].

    Attributes:
        dim: width of the vectors.
        still: whether running statistics stay as they are, also in training mode.
    """

    dim: int
    still: bool = False

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.still:
            keep_statistics(self)
        return self
