"""Define losses that keep what a network knew before it learns from new data."""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from counterpoint.core.world import Group, over
from counterpoint.losses.base import BOUNDS, ScaledLoss


class ModX(ScaledLoss):
    """Mod-X: CLIP of new pairs, and the divergence of their similarities from those by the network before.

    Args:
        temperature: Initial temperature of the contrast, in 0.01..1.
        alpha: Weight of the divergence, at least 0.
        reduction: "sum" of the divergence over trusted rows (the authors'), or "mean" over all rows.
        learnable: Learn the temperature, within its bounds. False: keep it fixed.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image, text | [n, dim] | embeddings of any norm, in the same order |
        | image_old, text_old | [n, old_dim] | those of the same pairs by the network before; no gradient |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: with alpha=0 it is CLIP. AffinityMimicking follows all rows of a teacher, at temperatures of its own.

    Source: Ni et al., arXiv 2305.07437.

    >>> x = torch.eye(2)
    >>> ModX(temperature=1.0)(x, x, x, x)
    tensor(0.3133)
    """

    calls = "mod-x:mod_x"

    def __init__(
        self,
        temperature: float = 0.07,
        alpha: float = 20.0,
        reduction: Literal["sum", "mean"] = "sum",
        *,
        learnable: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group, BOUNDS)
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
        self.alpha, self.reduction = alpha, reduction

    def forward(
        self,
        image: Float[Tensor, "n dim"],
        text: Float[Tensor, "n dim"],
        image_old: Float[Tensor, "n old_dim"],
        text_old: Float[Tensor, "n old_dim"],
    ) -> Float[Tensor, ""]:
        """Return contrast + alpha divergence."""
        with over(self.group):
            found = self.function(image, text, image_old, text_old, self.scale(), self.alpha, self.reduction)
        loss: Tensor = found.loss
        return loss
