"""Train a critic to tell real examples from made ones: losses of its logits."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows
from counterpoint.core.distributed import gather_rows
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group


@over_group
@full_precision
def contrastive_discriminator(real: Float[Tensor, ...], fake: Float[Tensor, ...]) -> Float[Tensor, ""]:
    r"""Compute half(r, f) + half(-f, -r): each logit of one kind is contrasted with all logits of the other.

    half(r, f) = mean_i [ -r_i + log( e^{r_i} + sum_j e^{f_j} ) ]

    Args:
        real: logits r of original pictures, of any shape.
        fake: logits f of restored pictures, of any shape.

    Returns:
        The loss, a scalar; for one logit each it is 2 log(1 + e^(f - r)). Time and memory are linear in the logits.

    Raises ValueError where one kind has no logits. Source: PCL-SR's code (arXiv
    2111.13924), after the dual contrastive loss of Yu et al., arXiv 2103.16748.

    >>> contrastive_discriminator(torch.zeros(1), torch.zeros(1))  # 2 log 2
    tensor(1.3863)
    """
    r, f = real.flatten(), fake.flatten()
    need_rows(real=r, fake=f)
    r, f = gather_rows(r), gather_rows(f)
    return F.softplus(f.logsumexp(0) - r).mean() + F.softplus((-r).logsumexp(0) + f).mean()
