"""Measure full ranking: recall, discounted gain and reciprocal rank among the first K items."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

CUTS = (5, 10, 20, 50)


def ranking_measures(
    ranks: Int[Tensor, "n w"], wanted: Int[Tensor, " n"], cuts: Sequence[int] = CUTS
) -> dict[str, Float[Tensor, " n"]]:
    """Return the measures of each query among the first K items, by name.

    - recall_K is the share of wanted items that are found. With one wanted item it is the hit rate.
    - ndcg_K is the sum of 1 / log2(rank + 1) over found items, divided by its maximum.
    - mrr_K is 1 / rank of the first item found, or 0.

    Args:
        ranks: rank of each wanted item from 1; of entries that are none, a rank above all cuts.
        wanted: number of wanted items of each query, at least 1.
        cuts: the numbers K.

    >>> {name: float(value) for name, value in ranking_measures(torch.tensor([[2]]), torch.tensor([1]), [5]).items()}
    {'recall_5': 1.0, 'ndcg_5': 0.6309297535714575, 'mrr_5': 0.5}
    """
    ranks = ranks.double()
    gain = 1 / torch.log2(ranks + 1)
    most = int(wanted.max()) if len(wanted) else 0
    best = (1 / torch.log2(torch.arange(most, dtype=torch.float64) + 2)).cumsum(0)
    found: dict[str, Tensor] = {}
    for cut in cuts:
        inside = ranks <= cut
        found[f"recall_{cut}"] = inside.sum(1) / wanted.double()
        ideal = best[wanted.clamp(max=cut) - 1] if len(wanted) else wanted.double()
        found[f"ndcg_{cut}"] = (gain * inside).sum(1) / ideal
        found[f"mrr_{cut}"] = (inside / ranks).amax(1) if ranks.shape[1] else ranks.sum(1)
    return found
