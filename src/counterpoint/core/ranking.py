"""Rank items for each query by similarity, in memory linear in the number of queries: full ranking."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.precision import exact

SCORES = 2**21  # scores held at a time: 8 MiB in float32, which is faster than more of them
FEW = 16  # wanted items of a query up to which counting each is faster than sorting all scores


@torch.no_grad()
def ranks_of_wanted(
    query: Float[Tensor, "n dim"],
    items: Float[Tensor, "items dim"],
    wanted: Int[Tensor, "n w"],
    hidden: Int[Tensor, "n h"],
) -> Int[Tensor, "n w"]:
    """Return the rank of each wanted item among all items that are not hidden, by the dot product; 1 is the best.

    Other items of equal score count before it, so that equal vectors find nothing.

    Args:
        query: a vector for each query.
        items: a vector for each item.
        wanted: item numbers, -1 for none. Such an entry has the rank items + 1.
        hidden: items that are no candidates of a query, -1 for none. A wanted item stays a candidate.

    Memory is at most 16 MiB of scores and O((n + items) dim). An item whose score is NaN is the last.

    Raises ValueError for shapes that do not fit and item numbers out of range.

    >>> ranks_of_wanted(torch.eye(2), torch.eye(2), torch.tensor([[0], [0]]), torch.tensor([[-1], [-1]]))
    tensor([[1],
            [2]])
    """
    if query.ndim != 2 or items.ndim != 2 or query.shape[1] != items.shape[1] or not len(items):
        raise ValueError(
            f"query and items must be [n, dim] and [items, dim], got {list(query.shape)}, {list(items.shape)}"
        )
    for name, given in (("wanted", wanted), ("hidden", hidden)):
        if given.ndim != 2 or len(given) != len(query):
            raise ValueError(f"{name} must be [{len(query)}, any], got {list(given.shape)}")
        if given.numel() and not -1 <= int(given.min()) <= int(given.max()) < len(items):
            raise ValueError(f"{name} must have item numbers below {len(items)}, or -1")
    found = torch.full(wanted.shape, len(items) + 1, device=query.device)
    high = max(1, SCORES // len(items))
    # The first write to new memory costs more than the products, so all scores use one place.
    columns, held = items.T.contiguous(), query.new_empty(min(high, len(query)), len(items))
    with exact(query.device.type):
        for start in range(0, len(query), high):
            part = slice(start, start + high)
            scores = torch.mm(query[part], columns, out=held[: len(query[part])])
            want, hide = wanted[part], hidden[part]
            own = scores.gather(1, want.clamp(min=0))
            row = torch.arange(len(hide), device=hide.device)[:, None].expand_as(hide)[hide >= 0]
            scores[row, hide[hide >= 0]] = -torch.inf
            row = torch.arange(len(want), device=want.device)[:, None].expand_as(want)[want >= 0]
            scores[row, want[want >= 0]] = own[want >= 0]
            if want.shape[1] > FEW:
                # Of ascending scores, those from the first that is not below the item's own.
                above = scores.shape[1] - torch.searchsorted(scores.sort(1).values, own)
            else:
                above = torch.stack(
                    [_at_least(scores, own[:, w : w + 1], w) for w in reversed(range(want.shape[1]))], 1
                )
                above = above.flip(1)
            above = torch.where(own.isnan(), len(items), above)
            found[part] = torch.where(want >= 0, above, found[part])
    return found


def _at_least(scores: Tensor, own: Tensor, more: int) -> Tensor:
    """Count the scores of each row that are at least its own. Where no more items are to count, `scores` is overwritten."""
    exactly = torch.float32 if scores.shape[1] < 2**24 else torch.float64
    # Ones and zeros of the scores' type are written and summed four times as fast as booleans.
    return (scores.clone() if more else scores).ge_(own).sum(1, dtype=exactly).long()
