"""Define losses of regions of pictures."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.distributed import gather_rows
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class WeakGuidedContrast(Loss):
    """WSCoL's contrast of strong features of a picture's regions, under labels clustered from their weak features.

    Args:
        temperature: Temperature, > 0.
        alpha: Weight of the far positives' own loss, 0 to 1.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all). The far
            positives are then those of all rows.

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | strong | [rows, dim] | features of the strong views, normalised here |
        | labels | [rows] | class numbers; equal numbers are positives |
        | hard_positive | [rows, rows] | optional: 1 for far positives, see `functional.hard_positive_mask` |

    Relations: half of SupCon's loss in which each row is also its own positive, and in its own denominator.

    Source: Yang and others, arXiv 2410.05557.

    >>> import torch
    >>> WeakGuidedContrast()(torch.ones(4, 2), torch.tensor([0, 0, 1, 2]))
    tensor(0.6931)
    """

    calls = "wscol:weak_guided_contrast"

    def __init__(self, temperature: float = 0.07, alpha: float = 0.0, *, group: Group = None) -> None:
        super().__init__(group)
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise ValueError(f"temperature must be positive and alpha lie in 0..1, got {temperature} and {alpha}")
        self.temperature, self.alpha = temperature, alpha

    def forward(
        self,
        strong: Float[Tensor, "rows dim"],
        labels: Int[Tensor, " rows"],
        hard_positive: Float[Tensor, "rows rows"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over the rows whose loss is not 0, at least 0."""
        with over(self.group):
            strong, labels = gather_rows(strong), gather_rows(labels)
            loss: Tensor = self.function(strong, labels, self.temperature, hard_positive, self.alpha)
        return loss
