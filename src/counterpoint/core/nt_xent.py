"""The contrast of two views of a batch, which several papers use: SimCLR's loss."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_word
from counterpoint.core.distributed import batch_logsumexp, global_mean
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Diagonal
from counterpoint.core.world import over_group


@over_group
@full_precision
def nt_xent(
    z1: Float[Tensor, "n dim"],
    z2: Float[Tensor, "n dim"],
    temperature: float | Tensor = 0.5,
    similarity: Literal["cos", "dot"] = "cos",
    *,
    ring: bool = False,
) -> Float[Tensor, ""]:
    r"""Compute normalised-temperature cross-entropy: the mean over 2n views i of -s_{i,pos(i)} + log sum_{j != i} exp s_ij.

    Args:
        z1, z2: projections of the two views, row by row. This function normalises them, if similarity is "cos".
        temperature: > 0, by default 0.5; s is the similarity divided by it.
        similarity: "cos" (default), the cosine; or "dot", the product of the rows as they are.
        ring: across processes, pass keys round instead of gathering them; by default gather.

    Across processes, negatives come from all processes. One image alone has no negatives, and its loss is 0. Raises
    ValueError for different shapes or types, an empty batch, and a temperature that is not positive and finite.
    Source: SimCLR, arXiv 2002.05709, Eq. 1; MCLRec's code has the product of rows.

    >>> nt_xent(torch.eye(3), torch.eye(3), temperature=1.0)
    tensor(0.9048)
    """
    need_alike("n dim", z1=z1, z2=z2)
    need_positive(temperature=temperature)
    need_word(("cos", "dot"), similarity=similarity)
    both = torch.cat([z1, z2])
    x = scaled(unit(both) if similarity == "cos" else both, temperature**0.5)
    positive = positive_similarity(*x.chunk(2))
    return global_mean(batch_logsumexp(x, exclude=Diagonal(), ring=ring).rows) - global_mean(positive)
