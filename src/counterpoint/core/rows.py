"""Rows that are equal to the last bit: found in linear time, and compared with queries so that they tie exactly.

Equal rows need not get equal dot products: a matrix product treats the rows at its edge by another kernel, whose sums are
rounded in another order. Measures that count ties therefore multiply each distinct row once (`Keys`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 1 << 16  # rows whose bits are summed at a time


def distinct_rows(x: Float[Tensor, "n dim"]) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " n"]]:
    """Find the distinct rows of a matrix.

    Args:
        x: float32 or float64 rows; 0 and -0 are equal, and so are two NaN of the same bits.

    Returns the position of each distinct row's first occurrence, in ascending order. Returns also, for each row, the
    number of its distinct row: `x[first][number]` equals `x`. Time O(n dim + n log n).

    >>> first, number = distinct_rows(torch.tensor([[1.0], [2.0], [1.0]]))
    >>> first.tolist(), number.tolist()
    ([0, 1], [0, 1, 0])
    """
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be [n, dim] of float32 or float64, got {list(x.shape)} of {x.dtype}")
    kind = torch.int32 if x.dtype == torch.float32 else torch.int64
    bits = (x.detach().cpu() + 0.0).contiguous().view(kind)
    # A random linear map modulo 2^64 tells rows apart; the comparison below makes sure of it.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-(2**62), 2**62, (x.shape[1],), generator=generator) * 2 + 1
    sums = [(part.long() * weight).sum(1) for part in bits.split(CHUNK)]
    key = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64)
    first, number = _first_occurrences(key)
    if len(first) < len(x) and not torch.equal(bits[first[number]], bits):
        _, exact = torch.unique(bits, dim=0, return_inverse=True)
        first, number = _first_occurrences(exact)
    return first, number


def _first_occurrences(values: Int[Tensor, " n"]) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " n"]]:
    """Return the positions of first occurrences, ascending, and for each value the number of its first occurrence."""
    names, number = values.unique(return_inverse=True)
    first = torch.full((len(names),), len(values)).scatter_reduce_(0, number, torch.arange(len(values)), "amin")
    order = first.argsort()
    return first[order], order.argsort()[number]


class Keys:
    """Rows that queries are compared with; equal rows get equal products with a query, to the last bit.

    Args:
        rows: [m, dim].
    """

    def __init__(self, rows: Float[Tensor, "m dim"]) -> None:
        first, number = distinct_rows(rows)
        self.rows = rows if len(first) == len(rows) else rows[first]
        self.number = None if len(first) == len(rows) else number

    def products(self, query: Float[Tensor, "n dim"]) -> Float[Tensor, "n m"]:
        """Compute the dot products of queries with all rows."""
        found = query @ self.rows.T
        return found if self.number is None else found[:, self.number]


def token_numbers(ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Int[Tensor, " n"]:
    """Number texts so that equal tokens get equal numbers, whatever the padding: a hash of 62 bits, not negative.

    Args:
        ids: token numbers.
        mask: False where a token is padding.

    Of a million texts, two share a number by chance in one set of ten million.
    """
    total = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    for column in range(ids.shape[1]):
        step = (total * 6364136223846793005 + ids[:, column] + 1442695040888963407) ^ (total >> 29)
        total = torch.where(mask[:, column], step, total)
    return total & (2**62 - 1)
