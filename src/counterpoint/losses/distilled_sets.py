"""Define losses by which a synthetic set learns to stand for real data."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class KernelRidge(Loss):
    """KRR-ST's outer loss: the ridge regression from a synthetic set's features and targets fits real images' targets.

    Args:
        ridge: Ridge over the trace of the synthetic rows' kernel, > 0.
        group: Processes whose real rows are averaged: None (this process), a ProcessGroup, or "world" (all). All hold the same
            synthetic rows.

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | feat_syn | [m, d] | features of the synthetic images |
        | target_syn | [m, k] | their targets |
        | feat_real | [n, d] | features of real images by the same network; no gradient |
        | target_real | [n, k] | a teacher's features of the real images; no gradient |

    Relations: FitNets fits a student's rows to a teacher's row by row; here the fit is solved on other rows, in closed form.

    Source: Lee et al., arXiv 2310.06511, the outer objective without its constant.

    >>> KernelRidge()(torch.eye(2), torch.zeros(2, 1), torch.eye(2), torch.ones(2, 1))
    tensor(1.)
    """

    calls = "krr-st:krr_outer_loss"

    def __init__(self, ridge: float = 1e-6, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(ridge=ridge)
        self.ridge = ridge

    def forward(
        self,
        feat_syn: Float[Tensor, "m d"],
        target_syn: Float[Tensor, "m k"],
        feat_real: Float[Tensor, "n d"],
        target_real: Float[Tensor, "n k"],
    ) -> Float[Tensor, ""]:
        """Return the mean over real rows and outputs."""
        with over(self.group):
            return self.function(feat_syn, target_syn, feat_real, target_real, self.ridge)
