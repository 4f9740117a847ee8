"""Define losses of instances over time."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class ReID(Loss):
    """CTVIS's loss of items: an anchor's positives are more similar to it than each of its negatives.

    Args:
        contrastive_weight: Weight of log(1 + sum_p sum_n exp(a.n - a.p)), at least 0.
        aux_weight: Weight of the squared errors of cosines (1 for positives, 0 for negatives), at least 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | products | [items, candidates] | dot products of each anchor with its candidates |
        | cosines | [items, candidates] | their cosines |
        | roles | [items, candidates] | 1 for a positive, 0 for a negative, -1 for no candidate |

    Relations: with one positive the contrastive part is InfoNCE at temperature 1. `functional.reid_loss` takes lists of rows.

    Source: Ying and others, arXiv 2307.12616.

    >>> ReID(1.0, 0.0)(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([[1, 0, 0]]))
    tensor(1.0986)
    """

    calls = "ctvis:item_losses"

    def __init__(self, contrastive_weight: float = 2.0, aux_weight: float = 3.0, *, group: Group = None) -> None:
        super().__init__(group)
        if min(contrastive_weight, aux_weight) < 0:
            raise ValueError(f"weights must not be negative, got {contrastive_weight} and {aux_weight}")
        self.contrastive_weight, self.aux_weight = contrastive_weight, aux_weight

    def forward(
        self,
        products: Float[Tensor, "items candidates"],
        cosines: Float[Tensor, "items candidates"],
        roles: Tensor,
    ) -> Float[Tensor, ""]:
        """Return the weighted sum of both parts, at least 0."""
        with over(self.group):
            found = self.function(products, cosines, roles)
        total: Tensor = self.contrastive_weight * found.contrastive + self.aux_weight * found.aux
        return total
