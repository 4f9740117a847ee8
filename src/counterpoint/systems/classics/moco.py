"""MoCo: contrast against a queue of keys that a slowly moving copy of the encoder made.

He, Fan, Wu, Xie, Girshick: "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv
1911.05722 (v1); Chen, Fan, Girshick, He: "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297 (v2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.contrast import EPS, pair_logsumexp, positive_similarity, scaled, softplus, wide
from counterpoint.core.distributed import gather_rows, global_mean


class MoCoOutput(NamedTuple):
    loss: Float[Tensor, ""]
    queue_after: Float[Tensor, "keys dim"]


def moco(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "n dim"],
    queue: Float[Tensor, "keys dim"],
    temperature: float | Tensor = 0.07,
) -> MoCoOutput:
    r"""InfoNCE of a query with its key against a queue (v1, Eq. 1): mean_i of -s(q_i, k_i) + log( exp s(q_i, k_i) + sum_m
    exp s(q_i, Q_m) ), s the cosine divided by the temperature.

    Args:
        query: from the network that learns; normalised here.
        key: from the momentum network; normalised here, no gradient.
        queue: older keys, unit rows, no gradient. It is read as it is: this batch's keys are not among them.
        temperature: > 0.

    Returns the loss and the queue as a first-in-first-out queue whose oldest row is the first would be afterwards: the
    keys written over its first n rows. `core.memory.Queue` keeps the place to write at over many steps.

    >>> moco(torch.eye(2), torch.eye(2), torch.eye(2)).loss.item() > 0.6
    True
    """
    if query.shape != key.shape or query.ndim != 2 or queue.ndim != 2 or queue.shape[1] != query.shape[1]:
        raise ValueError(
            f"query and key must be [n, dim] alike and queue [keys, dim], got {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(queue.shape)}"
        )
    key = F.normalize(key.detach(), dim=1, eps=EPS)
    q = scaled(F.normalize(wide(query), dim=1, eps=EPS), temperature)
    positive = positive_similarity(q, key)
    negative = pair_logsumexp(q, queue.detach().to(q.dtype)).rows
    new = gather_rows(key)[: len(queue)]
    return MoCoOutput(global_mean(softplus(negative - positive)), torch.cat([new.to(queue.dtype), queue[len(new) :]]))
