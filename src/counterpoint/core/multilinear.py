"""Multilinear inner products of rows of several matrices: the sum over coordinates of the product of one row of each.

M matrices of n rows have an array of n^M such products. `combined_logsumexp` sums its exponentials without storing it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import gather_rows, global_logsumexp, place

# Numbers in the products of rows that are held at a time: 64 MiB in float32.
BLOCK = 16 * 2**20


def product(factors: Sequence[Float[Tensor, "n dim"]]) -> Float[Tensor, "n dim"]:
    """Multiply all factors, coordinate by coordinate, into a new tensor. A single factor is returned itself."""
    found = factors[0]
    for factor in factors[1:]:
        found = found * factor
    return found


def outer(factors: Sequence[Float[Tensor, "n dim"]]) -> Float[Tensor, "combinations dim"]:
    """Compute the products of all combinations of rows, [n_1 n_2 ..., dim]; the last factor's row varies fastest."""
    found = factors[0]
    for factor in factors[1:]:
        found = (found[:, None] * factor).flatten(0, 1)
    return found


def combined_logsumexp(factors: Sequence[Float[Tensor, "n dim"]]) -> list[Float[Tensor, " n"]]:
    """Compute log Z of each row of each factor: over all combinations of rows of the others, of their inner products.

    The array of all n^M products is a matrix: rows are combinations of the first factors, columns of the last. Compute its
    log-sum-exps over rows and columns, then sum these over all factors but one.

    Args:
        factors: M >= 2 matrices of one shape. Memory is n^floor(M/2) dim and n^ceil(M/2).

    Across processes n is the number of all processes' rows. Each process gets log Z of its own rows.

    >>> combined_logsumexp([torch.zeros(4, 2)] * 3)[0]   # log 4^2
    tensor([2.7726, 2.7726, 2.7726, 2.7726])
    """
    first = (len(factors) + 1) // 2
    here = place(len(factors[0]), factors[0].device)
    everyone = gather_rows(torch.stack(list(factors), 1)).unbind(1)
    if here.rows == 0:  # no rows here, but the other processes wait for this one, forward and backward
        own, shared = factors[0].sum(1), torch.stack(everyone[1:]).sum(2) * 0 - math.inf
    else:
        own, shared = _marginals(factors[0], everyone[1:first], everyone[first:])
    # This process has its own rows of the first factor; the other factors need the sums over all processes' rows.
    return [own, *global_logsumexp(shared)[:, here.offset : here.offset + here.rows]]


def _marginals(rows: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute log Z of each of `rows`, and log Z [others, n] of the others, over all combinations of rows."""
    n = len(right[0])
    keys = outer(right)
    at_once = max(1, BLOCK // (n ** len(left) * keys.shape[1]))
    blocks = []
    for part in rows.split(at_once):
        if at_once >= len(rows):
            blocks.append(_block(keys, part, *left))
        else:  # neither the products nor their similarities are kept: the backward pass computes them again in blocks
            blocks.append(checkpoint(_block, keys, part, *left, use_reentrant=False, preserve_rng_state=False))
    row = torch.cat([found for found, _ in blocks]).view(len(rows), *[n] * len(left))
    column = torch.stack([found for _, found in blocks]).logsumexp(0).view([n] * len(right))
    own = row.flatten(1).logsumexp(1) if left else row
    shared = [row.movedim(1 + d, 0).flatten(1).logsumexp(1) for d in range(len(left))]
    shared += [column.movedim(d, 0).reshape(n, -1).logsumexp(1) for d in range(len(right))]
    return own, torch.stack(shared)


def _block(keys: Tensor, *left: Tensor) -> tuple[Tensor, Tensor]:
    found = pair_logsumexp(outer(left), keys, columns=True)
    assert found.columns is not None
    return found.rows, found.columns
