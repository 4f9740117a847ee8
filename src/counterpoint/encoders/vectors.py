"""Build encoders, by name, of modalities whose data are vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.errors import unknown


def build_vector_encoder(name: str, inputs: int) -> nn.Module:
    """Build an encoder, [n, inputs] -> [n, dim], by name (see `AlignedConfig.vector_encoder`).

    Raises CounterpointError for an unknown name.
    """
    if name == "mlp":
        return VectorEncoder(inputs)
    widths = name.split("-")[1:]
    if name in ("linear", "as-is"):
        return LayeredEncoder(inputs, (), bias=name == "linear")
    if name.startswith("relu-") and all(width.isdecimal() and int(width) for width in widths):
        return LayeredEncoder(inputs, [int(width) for width in widths])
    raise unknown("vector encoder", name, ["mlp", "linear", "as-is", "relu-128-128"])


class LayeredEncoder(nn.Module):
    """Linear layers, each followed by ReLU. Without `widths` there are none, and the vectors pass unchanged.

    If `bias`, append a 1 to each vector. The head that follows has no bias, so the 1 makes it an affine map.
    """

    def __init__(self, inputs: int, widths: Sequence[int], *, bias: bool = False) -> None:
        super().__init__()
        sizes = [inputs, *widths]
        self.bias = bias
        self.dim = sizes[-1] + bias
        self.layers = nn.Sequential()
        for a, b in itertools.pairwise(sizes):
            self.layers.extend([nn.Linear(a, b), nn.ReLU()])

    def forward(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n dim"]:
        x = self.layers(x)
        return F.pad(x, (0, 1), value=1.0) if self.bias else x


class VectorEncoder(nn.Module):
    """LayerNorm, then two linear layers with GELU between them."""

    def __init__(self, inputs: int, dim: int = 256) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n dim"]:
        return self.layers(x)
