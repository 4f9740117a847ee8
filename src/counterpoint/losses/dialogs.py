"""Define losses of dialogs: contrasts whose positives have weights, and the regulariser of two passes."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.tree_scores import VIEWS
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class SoftSupCon(Loss):
    """Contrast two passes of each example with a weight for each pair of examples: graded positives.

    Args:
        temperature: Temperature of the cosines, > 0.
        base_temperature: Divides the loss, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | features | [n, 2, dim] | both passes of each example, of any norm |
        | weights | [n, total] | weights of the pairs, at least 0, above 0 on the diagonal; total: examples of all processes |

    Relations: the identity gives NTXent, equality of labels gives SupCon. TreeContrast takes the weights from annotations.

    Source: SPACE-2 (He et al., COLING 2022, arXiv 2209.06638), Eq. 3.

    >>> SoftSupCon(temperature=1.0, base_temperature=1.0)(torch.eye(2)[:, None].expand(2, 2, 2), torch.eye(2))
    tensor(0.5514)
    """

    calls = "space-2:soft_supcon"

    def __init__(self, temperature: float = 0.07, base_temperature: float = 0.07, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, base_temperature=base_temperature)
        self.temperature, self.base_temperature = temperature, base_temperature

    def forward(self, features: Float[Tensor, "n 2 dim"], weights: Float[Tensor, "n total"]) -> Float[Tensor, ""]:
        """Return the mean over anchors."""
        with over(self.group):
            return self.function(features, weights, self.temperature, self.base_temperature)


class TreeContrast(Loss):
    """Contrast two passes of each example in one subspace for each view of a semantic tree, with graded positives.

    Args:
        temperature: Temperature of the cosines, > 0.
        base_temperature: Divides the loss, > 0.
        views: Names of the views, in the order of the subspaces. Default: D, I, S, V, DI, IS, SV, DIS, ISV, DISV.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | features | [n, 2, views, dim] | rows of each subspace for both passes, of any norm |
        | frames | [n, rows, 4] | paths (domain, intent, slot, value); 0 default, -1 absent, -2 padding |

    Relations: the mean over views of SoftSupCon, with Jaccard similarities of the annotations as weights.

    Source: SPACE-2 (He et al., COLING 2022, arXiv 2209.06638).

    >>> TreeContrast(1.0, 1.0, views=["D"])(torch.eye(2)[:, None, None].expand(2, 2, 1, 2), torch.ones(2, 1, 4).long())
    tensor(1.2181)
    """

    calls = "space-2:tree_contrast"

    def __init__(
        self,
        temperature: float = 0.07,
        base_temperature: float = 0.07,
        views: Sequence[str] = VIEWS,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, base_temperature=base_temperature)
        self.temperature, self.base_temperature, self.views = temperature, base_temperature, tuple(views)

    def forward(self, features: Float[Tensor, "n 2 views dim"], frames: Int[Tensor, "n rows 4"]) -> Float[Tensor, ""]:
        """Return the mean over views."""
        with over(self.group):
            return self.function(features, frames, self.temperature, self.base_temperature, self.views)


class RDrop(Loss):
    """R-Drop: both passes of a classifier with different dropout predict the same.

    Args:
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | logits_1, logits_2 | [n, classes] | logits of the two passes; both get a gradient |

    Relations: the mean of KD in both directions, at temperature 1 and with a gradient on both sides.

    Source: Liang et al., NeurIPS 2021, arXiv 2106.14448, as in SPACE-2.

    >>> RDrop()(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor(0.)
    """

    calls = "space-2:r_drop"

    def forward(self, logits_1: Float[Tensor, "n classes"], logits_2: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
        """Return the mean over rows."""
        with over(self.group):
            return self.function(logits_1, logits_2)
