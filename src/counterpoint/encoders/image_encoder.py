"""Define the base class of image encoders, for modules that build on each other."""

from __future__ import annotations

from torch import nn


class ImageEncoder(nn.Module):
    """A module that maps normalised pictures [batch, channels, height, width] to vectors [batch, dim]."""

    dim: int
