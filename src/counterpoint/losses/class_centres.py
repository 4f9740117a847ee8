"""Define losses with learnt centres of classes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class _Clusters(Loss):
    """The base class of losses with learnt class centres, `weight`, which start at N(0, 0.01^2)."""

    def __init__(
        self, classes: int, dim: int, temperature: float, sample_rate: float, filter_threshold: float, group: Group
    ) -> None:
        super().__init__(group)
        need_positive(classes=classes, dim=dim, temperature=temperature)
        self.classes, self.dim, self.temperature = classes, dim, temperature
        self.sample_rate, self.filter_threshold = sample_rate, filter_threshold
        self.weight = nn.Parameter(0.01 * torch.randn(classes, dim))


class MLCD(_Clusters):
    """Multi-label cluster discrimination: separate terms for a row's several classes and for all others.

    Args:
        classes: Number of classes.
        dim: Width of an embedding.
        temperature: Divisor of the cosines, > 0.
        margin: Added to the angle between a row and its class, 0 to below pi.
        sample_rate: Share of the classes that take part, 0 to 1; those of the batch always do.
        coupled: Use one term of all pairs instead (MLC).
        filter_threshold: A cosine with another class above it counts as 0; 0: no filter.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | embeddings | [n, dim] | one vector for each example, of any norm |
        | labels | [n, l] | classes of each example, -1 for none |
        | generator | | draws classes if sample_rate < 1, in the same state on all processes |

    Relations: coupled, with one label and sample_rate = 1, it is ClusterMargin with one label.

    Source: An et al., arXiv 2407.17331. The margin's gradient is that of the plain cosine, as in the authors' UNICOM.

    >>> import torch
    >>> loss = MLCD(2, 2, temperature=1.0, margin=0.0, sample_rate=1.0)
    >>> loss(torch.zeros(1, 2), torch.tensor([[0]])).detach()
    tensor(1.3863)
    """

    calls = "mlcd:mlcd_loss"

    def __init__(
        self,
        classes: int,
        dim: int,
        temperature: float = 1 / 64,
        margin: float = 0.3,
        sample_rate: float = 0.1,
        *,
        coupled: bool = False,
        filter_threshold: float = 0.0,
        group: Group = None,
    ) -> None:
        super().__init__(classes, dim, temperature, sample_rate, filter_threshold, group)
        self.margin, self.coupled = margin, coupled

    def forward(
        self,
        embeddings: Float[Tensor, "n dim"],
        labels: Int[Tensor, "n labels"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean loss of all rows."""
        given = embeddings, self.weight, labels, 1 / self.temperature, self.margin, self.sample_rate, generator
        with over(self.group):
            return self.function(*given, coupled=self.coupled, filter_threshold=self.filter_threshold)


class ClusterMargin(_Clusters):
    """Cross-entropy of learnt class centres with margins; of several labels of an example, the mean.

    Args:
        classes: Number of classes.
        dim: Width of an embedding.
        temperature: Divisor of the cosines, > 0.
        margin: Added to the angle between a row and its class, 0 to below pi (ArcFace).
        cosine_margin: Subtracted from the cosine between a row and its class, at least 0 (CosFace).
        sample_rate: Share of the classes that take part, 0 to 1; those of the batch always do.
        filter_threshold: A cosine with another class above it counts as 0; 0: no filter.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | embeddings | [n, dim] | one vector for each example, of any norm |
        | labels | [n] or [n, l] | classes of each example, -1 for none |
        | generator | | draws classes if sample_rate < 1, in the same state on all processes |

    Relations: MLCD has separate terms for an example's classes and for all others.

    Source: An et al., UNICOM, arXiv 2304.05884. The angle's margin has the gradient of the plain cosine, as in its code.

    >>> import torch
    >>> loss = ClusterMargin(2, 2, temperature=1.0, margin=0.0)
    >>> loss(torch.zeros(1, 2), torch.tensor([0])).detach()
    tensor(0.6931)
    """

    calls = "mlcd:margin_cluster_loss"

    def __init__(
        self,
        classes: int,
        dim: int,
        temperature: float = 1 / 64,
        margin: float = 0.3,
        cosine_margin: float = 0.0,
        sample_rate: float = 1.0,
        *,
        filter_threshold: float = 0.0,
        group: Group = None,
    ) -> None:
        super().__init__(classes, dim, temperature, sample_rate, filter_threshold, group)
        self.margin, self.cosine_margin = margin, cosine_margin

    def forward(
        self,
        embeddings: Float[Tensor, "n dim"],
        labels: Int[Tensor, " n *labels"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean loss of all labels."""
        margins = self.margin, self.cosine_margin, self.filter_threshold
        given = embeddings, self.weight, labels, 1 / self.temperature, *margins
        with over(self.group):
            return self.function(*given, sample_rate=self.sample_rate, generator=generator)
