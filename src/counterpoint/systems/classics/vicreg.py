"""VICReg: views agree (invariance), every dimension varies (variance), dimensions are uncorrelated (covariance).

Bardes, Ponce, LeCun: "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022, arXiv
2105.04906.

The loss (Eqs. 1 to 6) covers the batch of all processes. As in the authors' code, the invariance term is a mean over
dimensions too, where Eq. 5 sums over them. The variance terms of the two views are averaged. Each view passes the network
separately. Not built: batch normalisation over all processes inside the network. Each process normalises over its own share.
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


def _variance_and_covariance(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute v (Eqs. 1 and 2, with a target of 1) and c (Eqs. 3 and 4) of one view."""
    n, dim = z.shape
    z = z - z.mean(0)
    variance = z.square().sum(0) / (n - 1)
    return F.relu(1 - (variance + eps).sqrt()).mean(), off_diagonal_squares(z, z) / ((n - 1) ** 2 * dim)


@over_group
@full_precision
def vicreg(
    z1: Float[Tensor, "n dim"],
    z2: Float[Tensor, "n dim"],
    sim: float = 25.0,
    std: float = 25.0,
    cov: float = 1.0,
    eps: float = 1e-4,
) -> Float[Tensor, ""]:
    r"""Compute sim * mean (z1 - z2)^2 + std * (v(z1) + v(z2)) / 2 + cov * (c(z1) + c(z2))   (Eq. 6).

    The variance term v is the mean over dimensions of relu(1 - sqrt(variance + eps)). The covariance term c is the sum of
    squared covariances of different dimensions, divided by dim. Both use the unbiased 1/(n - 1).

    Args:
        z1, z2: embeddings of the two views, row by row; not normalised.
        sim, std, cov: weights of invariance, variance and covariance, by default 25, 25 and 1.
        eps: number > 0 added to the variance inside the root, by default 1e-4.

    Equal rows give v = 1 - sqrt(eps). Raises ValueError for different shapes and for a batch of one, which has no variance.

    >>> import torch
    >>> vicreg(torch.ones(4, 3), torch.ones(4, 3))
    tensor(24.7500)
    """
    need_alike("n dim", z1=z1, z2=z2)
    need_positive(eps=eps)
    z1, z2 = gather_rows(wide(z1)), gather_rows(wide(z2))
    if len(z1) < 2:
        raise ValueError("z1 and z2 must have at least two rows, because one embedding has no variance")
    (v1, c1), (v2, c2) = _variance_and_covariance(z1, eps), _variance_and_covariance(z2, eps)
    return sim * F.mse_loss(z1, z2) + std * (v1 + v2) / 2 + cov * (c1 + c2)


@dataclass
class VICRegConfig(ViewsConfig):
    """Settings of VICReg. Defaults are the paper's for ImageNet (Sec. 4.2 and Appendix C)."""

    epochs: int = 1000
    batch_size: int = 2048
    recipe: str = "byol"
    optimizer: str = "lars"
    lr: float = 0.2
    weight_decay: float = 1e-6
    warmup_epochs: int = 10
    hidden: int = 8192
    """Width of the expander's two hidden layers."""
    projection: int = 8192
    """Width of the embeddings that the loss compares."""
    invariance: float = 25.0
    """Weight of the distance between views, lambda, at least 0."""
    variance: float = 25.0
    """Weight of the variance term, mu, at least 0."""
    covariance: float = 1.0
    """Weight of the covariance term, nu, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.invariance, self.variance, self.covariance) < 0:
            raise CounterpointError(
                "invariance, variance and covariance must not be negative, got "
                f"{self.invariance}, {self.variance} and {self.covariance}"
            )


class VICReg(ViewsLearner):
    """A learner whose embeddings of two views agree, vary, and have uncorrelated dimensions."""

    def build_projector(self, dim: int) -> nn.Module:
        return mlp(dim, self.config.hidden, self.config.hidden, self.config.projection)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        z1, z2 = (self.network(view) for view in batch["views"])
        config = self.config
        return {"loss": vicreg(z1, z2, config.invariance, config.variance, config.covariance)}


SYSTEM = System(
    slug="vicreg",
    task="views",
    config=VICRegConfig,
    learner=VICReg,
    data="cifar10",
    recipe=LAPTOP | {"epochs": 20, "projection": 512},
)
