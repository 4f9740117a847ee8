"""Score rows against learned prototypes, and keep a running centre of the scores (DINO and the systems built on it)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.distributed import gather_rows
from counterpoint.core.operands import unit
from counterpoint.core.precision import wide


class DINOHead(nn.Module):
    """A head of three layers with GELU between them, a normalisation, and a linear layer of unit rows.

    The third layer is a bottleneck. Unit rows equal the authors' weight normalisation with its gain fixed to 1.

    Args:
        dim: width of the features.
        hidden: width of the two hidden layers.
        bottleneck: width of the third layer.
        outcomes: number of prototypes, the width of the output.
        norm: batch normalisation in the hidden layers; False (default): none.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, outcomes: int, *, norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (dim, hidden):
            layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(bottleneck, outcomes, bias=False)

    def forward(self, features: Float[Tensor, "n dim"]) -> Float[Tensor, "n outcomes"]:
        return F.linear(unit(self.mlp(features)), unit(self.last.weight))


@torch.no_grad()
def moved_center(
    center: Float[Tensor, "*one outcomes"], rows: Float[Tensor, "rows outcomes"], momentum: float = 0.9
) -> Float[Tensor, "*one outcomes"]:
    """Compute m center + (1 - m) mean of all processes' rows (DINO, arXiv 2104.14294, Eq. 4).

    Args:
        center: the centre so far; its type is kept.
        rows: the teacher's raw outputs.
        momentum: m, 0 to 1, by default 0.9.

    >>> moved_center(torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0.5)
    tensor([1.0000, 1.5000])
    """
    count = gather_rows(torch.tensor([len(rows)], device=rows.device)).sum()
    mean = gather_rows(wide(rows).sum(0, keepdim=True)).sum(0) / count
    return center.detach().lerp(mean.to(center.dtype), 1 - momentum)
