"""DCL: InfoNCE without the positive in the denominator, so that easy pairs and small batches do not stall learning.

Yeh, Hong, Hsu, Liu, Chen, LeCun: "Decoupled Contrastive Learning", ECCV 2022, arXiv 2110.06848.

For a pair i and its view k as the anchor, s+ is the similarity of the pair. U_{i,k} is the sum of the exponentials of the
anchor's 2(n-1) similarities with both views of all other pairs:

    NT-Xent   -s+ + log( exp s+ + U )        its gradient is that of DCL times q = U / (exp s+ + U), 1 - P(positive)
    DCL       -s+ + log U                    (Eq. 6)
    DCLW      -w s+ + log U                  w_i = 2 - exp(c_i / sigma) / mean_j exp(c_j / sigma), c the cosine of a pair (Eq. 7)

This is an addition: `dcl` alone is SimCLR with this loss. `moco-v2+dcl` excludes the key from the denominator, `clip+dcl` the
diagonal. Not built: DCL on NNCLR, whose anchors are nearest neighbours in a support queue.

The paper does not define a gradient of w. Here w is a constant, as in lightly's code; `detach_weight=False` differentiates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_rows
from counterpoint.core.compared import Compared, Queued, pairs, views
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_logsumexp, global_mean, place
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Labels
from counterpoint.core.transforms import once
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.parts import Losses, Part, Step
from counterpoint.systems.settings import PartConfig


@over_group
@full_precision
def dclw_weight(cosine: Float[Tensor, " n"], sigma: float = 0.5, *, detach: bool = True) -> Float[Tensor, " n"]:
    """Weight the positives (Eq. 7): 2 - exp(c_i / sigma) / mean_j exp(c_j / sigma), with mean exactly 1.

    The mean covers the pairs of all processes. The weight of a pair that is far more similar than all others is negative.

    Args:
        cosine: c, the cosine of each pair.
        sigma: > 0, by default 0.5.
        detach: return constants (default); False: let the gradient flow.
    """
    need_rows(cosine=cosine)
    need_positive(sigma=sigma)
    scores = (cosine.detach() if detach else cosine) / sigma
    total = global_logsumexp(scores.logsumexp(0))
    return 2 - place(len(cosine), cosine.device).total * (scores - total).exp()


@over_group
@full_precision
def dcl(
    z1: Float[Tensor, "n dim"],
    z2: Float[Tensor, "n dim"],
    temperature: float | Tensor = 0.1,
    weight_sigma: float | None = None,
    normalize: bool = True,
    detach_weight: bool = True,
    symmetric: bool = True,
) -> Float[Tensor, ""]:
    """Compute the decoupled contrastive loss (Eqs. 6 and 7), the mean over all 2n views as anchors.

    Args:
        z1, z2: projections of the two views, row by row.
        temperature: > 0, by default 0.1; similarities are dot products divided by it.
        weight_sigma: sigma > 0 of DCLW's weights on the positives; None (default): DCL.
        normalize: normalise the rows (default); False: use them unchanged.
        detach_weight: treat the weights as constants (default).
        symmetric: use all views as anchors (default); False: only the rows of z1.

    Across processes, negatives come from all processes. The loss has no lower bound and may be negative. Raises ValueError for
    different shapes, a temperature or sigma that is not positive, and a single pair.

    >>> dcl(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.3863)
    """
    need_alike("n dim", z1=z1, z2=z2)
    need_positive(temperature=temperature)
    if weight_sigma is not None and detach_weight:
        z1, z2 = once(z1, "dcl with constant weights"), once(z2, "dcl with constant weights")
    a, b = (unit(z1), unit(z2)) if normalize else (z1, z2)
    here = place(len(a), a.device)
    if here.total < 2:
        raise ValueError(f"z1 and z2: DCL needs at least 2 pairs, a single one has no negatives; got {here.total}")
    positive = positive_similarity(scaled(a, temperature), b)
    weight: float | Tensor = 1.0
    if weight_sigma is not None:
        weight = dclw_weight(positive * temperature, weight_sigma, detach=detach_weight)
    own = here.offset + torch.arange(len(a), device=a.device)
    if symmetric:
        x = scaled(torch.cat([a, b]), temperature**0.5)
        pair = gather_rows(torch.cat([own, own]))
        return global_mean(batch_logsumexp(x, exclude=Labels(pair)).rows) - global_mean(weight * positive)
    bank, pair = gather_rows(torch.cat([a, b])), gather_rows(torch.cat([own, own]))
    negative = pair_logsumexp(scaled(a, temperature), bank, exclude=Labels(own, pair)).rows
    return global_mean(negative - weight * positive)


@dataclass
class DCLConfig(PartConfig):
    """Settings of DCL."""

    weight_sigma: float = 0.0
    """Sigma of DCLW's weights on the positives, at least 0 (the paper's is 0.5); 0: DCL without weights."""
    decoupled: bool = True
    """Use the decoupled loss; False: keep the base's own loss, the control of a claim."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight_sigma >= 0:
            raise CounterpointError(f"weight_sigma must not be negative, got {self.weight_sigma}")


class Decoupled(Part):
    """The base's comparison without its positives in the denominators."""

    config: DCLConfig

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        if not self.config.decoupled:
            return below(compared)
        sigma = self.config.weight_sigma or None
        if compared.ways is views:
            return {"loss": dcl(compared.query, compared.key, compared.temperature, sigma)}
        losses = []
        for way in compared.directions():
            cosine = positive_similarity(way.query, way.positive)
            weight = 1.0 if sigma is None else dclw_weight(cosine, sigma)
            negative = way.negatives(compared.temperature)
            if bool((negative == -math.inf).any()):
                raise CounterpointError("a batch of one pair has no negatives for DCL; use a larger batch")
            losses.append(global_mean(negative - weight * way.positives(compared.temperature)))
        return {"loss": torch.stack(losses).mean()}


SYSTEM = Addition(
    slug="dcl",
    over="simclr",
    config=DCLConfig,
    part=Decoupled,
    fits=(views, Queued, pairs),
    loss="own",
)
