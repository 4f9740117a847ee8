"""Measure how often the rows of two modalities find their partners in a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike
from counterpoint.core.distributed import gather_rows, global_mean, place
from counterpoint.core.operands import unit
from counterpoint.core.precision import wide
from counterpoint.core.world import over_group

ROWS = 1024  # rows of similarities at once


class Matching(NamedTuple):
    """Shares of rows whose own partner is the nearest, and among the k nearest; means of both directions."""

    top1: Float[Tensor, ""]
    topk: Float[Tensor, ""]


@over_group
@torch.no_grad()
def matching_accuracy(vision: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"], k: int = 5) -> Matching:
    """Compute how often a row's partner is the nearest, and among the k nearest, by the cosine, in both directions.

    Args:
        vision, text: embeddings of n pictures and of their captions, of any norm.
        k: number of nearest rows, at least 1; at most n count.

    Across processes each row meets the rows of all processes. Has no gradient. Raises ValueError for shapes that differ, an empty
    batch and k below 1.

    >>> matching_accuracy(torch.eye(3), torch.eye(3)[[1, 0, 2]], k=2)
    Matching(top1=tensor(0.3333), topk=tensor(1.))
    """
    need_alike("n dim", vision=vision, text=text)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    sides = unit(wide(vision)), unit(wide(text))
    hits: list[tuple[Tensor, Tensor]] = []
    for query, other in (sides, sides[::-1]):
        keys, own = gather_rows(other), (query * other).sum(1)
        mine = place(len(query), query.device).offset + torch.arange(len(query), device=query.device)
        before = [
            ((s := query[at : at + ROWS] @ keys.T) > own[at : at + ROWS, None]).sum(1)
            - (
                s.gather(1, mine[at : at + ROWS, None])[:, 0] > own[at : at + ROWS]
            ).long()  # its own product, rounded up
            for at in range(0, len(query), ROWS)
        ]
        rank = torch.cat(before)
        hits.append((global_mean((rank < 1).to(own.dtype)), global_mean((rank < k).to(own.dtype))))
    (one, near), (other_one, other_near) = hits
    return Matching((one + other_one) / 2, (near + other_near) / 2)
