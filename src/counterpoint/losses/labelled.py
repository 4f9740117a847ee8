"""Define losses that use the class of each example."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss, unit_rows


class SupCon(Loss):
    """Supervised contrastive loss: all views of all examples of the same class are positives.

    Args:
        temperature: Divisor of the dot products, > 0.
        base_temperature: The loss is multiplied by temperature / base_temperature; > 0.
        all_views: Use all views as anchors. False: only the first.
        ring: With a group, pass keys from process to process instead of gathering them: less memory, more time.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | features | [n, views, dim] | embeddings of all views |
        | labels | [n] | class of each example |

    Relations: with all labels different and base_temperature = temperature it is NTXent. SupConSingleView takes one vector
    for each example.

    Source: Khosla et al., arXiv 2004.11362, Eq. 2.

    >>> import torch
    >>> loss = SupCon(temperature=1.0, base_temperature=1.0)
    >>> loss(torch.eye(2)[:, None].expand(2, 2, 2), torch.tensor([0, 1]))
    tensor(0.5514)
    """

    calls = "supcon:supcon"

    def __init__(
        self,
        temperature: float = 0.07,
        base_temperature: float = 0.07,
        all_views: bool = True,
        *,
        ring: bool = False,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, base_temperature=base_temperature)
        self.temperature, self.base_temperature, self.all_views = temperature, base_temperature, all_views
        self.ring, self.normalize = ring, normalize

    def forward(self, features: Float[Tensor, "n views dim"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean loss of all anchors. The loss of an anchor without positive is 0."""
        if self.normalize and features.ndim == 3:
            features = unit_rows(features, normalize=True)
        with over(self.group):
            return self.function(
                features, labels, self.temperature, self.base_temperature, self.all_views, ring=self.ring
            )


class SupConSingleView(Loss):
    """SupCon of one vector for each example, as in metric-learning libraries.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        ring: With a group, pass keys from process to process instead of gathering them: less memory, more time.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | embeddings | [n, dim] | one vector for each example, of any norm |
        | labels | [n] | class of each example |

    Relations: SupCon with one view, the mean over anchors whose loss is not 0.

    Source: Khosla et al., arXiv 2004.11362, in the form of pytorch-metric-learning.

    >>> import torch
    >>> SupConSingleView()(torch.eye(2), torch.tensor([0, 1]))
    tensor(0.)
    """

    calls = "supcon:supcon_single_view"

    def __init__(self, temperature: float = 0.1, *, ring: bool = False, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.ring = temperature, ring

    def forward(self, embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean loss of the anchors that have one."""
        with over(self.group):
            return self.function(embeddings, labels, self.temperature, ring=self.ring)


class Triplet(Loss):
    """Triplet loss on the hardest examples of a batch: the furthest of the same class and the nearest of another class.

    Args:
        margin: Minimum difference between a negative's and a positive's distance.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | embeddings | [n, dim] | of any norm; distances are those of unit vectors |
        | labels | [n] | class of each example; use batches of P classes x K examples |

    Relations: BatchHinge ranks all other rows of the batch, not only the hardest.

    Source: Hermans, Beyer and Leibe, arXiv 1703.07737, Eq. 5.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> Triplet(margin=0.5)(x, torch.tensor([0, 0, 1]))
    tensor(1.2071)
    """

    calls = "triplet:triplet_hard"

    def __init__(self, margin: float = 0.2, *, group: Group = None) -> None:
        super().__init__(group)
        self.margin = margin

    def forward(self, embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean over triplets that violate the margin; 0 without any."""
        with over(self.group):
            loss: Tensor = self.function(embeddings, labels, self.margin).loss
        return loss
