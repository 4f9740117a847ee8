"""Contrast: softmax losses over similarities, the mathematics most systems share.

So far the one form the first system needs, InfoNCE against an explicit bank of negatives; the blockwise kernel that
never materialises its matrix will live here too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# The floor under a vector's length when it is normalised, as torch.nn.functional.normalize has it: a zero vector stays zero.
EPS = 1e-12


def info_nce(
    query: Float[Tensor, "rows dim"],
    positive_key: Float[Tensor, "rows dim"],
    negative_keys: Float[Tensor, "negatives dim"],
    temperature: float = 0.1,
    *,
    weight: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    r"""InfoNCE with an explicit bank of unpaired negatives, shared by all rows.

    All vectors are L2-normalised here. With s the cosine divided by the temperature,

        loss_r = -s(q_r, p_r) + log( exp s(q_r, p_r) + sum_m exp s(q_r, n_m) ),   loss = mean over r.

    Other rows' positives are not negatives. No negatives: the loss is 0.

    Args:
        query: one row per anchor.
        positive_key: row r is the positive of query r.
        negative_keys: the bank.
        temperature: > 0.
        weight: how often each row counts in the mean (k equal rows are one row of weight k). Default: once each.

    Returns:
        The mean loss, a scalar. No rows, or weights that sum to 0: a zero.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.

    Source: van den Oord et al. 2018, arXiv 1807.03748, in the form of MACIL-SD (arXiv 2207.05500).

    >>> info_nce(torch.eye(2), torch.eye(2), torch.zeros(1, 2), temperature=1.0)
    tensor(0.3133)
    """
    if query.ndim != 2 or query.shape != positive_key.shape:
        raise ValueError(
            f"query and positive_key must be [rows, dim] alike, got {tuple(query.shape)} and {tuple(positive_key.shape)}"
        )
    if negative_keys.ndim != 2 or negative_keys.shape[1] != query.shape[1]:
        raise ValueError(f"negative_keys must be [negatives, {query.shape[1]}], got {tuple(negative_keys.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if query.shape[0] == 0:
        return query.sum()  # an empty sum: zero, and still part of the graph
    q = F.normalize(query, dim=1, eps=EPS)
    positive = (q * F.normalize(positive_key, dim=1, eps=EPS)).sum(1) / temperature
    negative = q @ F.normalize(negative_keys, dim=1, eps=EPS).T / temperature
    # log(e^p + sum e^n) - p = softplus(logsumexp(n) - p): never exponentiates a large number.
    loss = F.softplus(negative.logsumexp(1) - positive)
    if weight is None:
        return loss.mean()
    return (loss * weight).sum() / weight.sum().clamp(min=torch.finfo(loss.dtype).tiny)
