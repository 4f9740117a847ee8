r"""Weighted sum of rows' mean similarities under a softmax of the similarities themselves, in blocks of rows.

    sum_r c_r E_r[s],      E_r[s] = sum_j p_rj s_rj,      p_r = softmax_j( s_r / t_r ),      s_rj = q_r . k_j

Legend.

    q     rows [N, D]
    k     keys [M, D], the bank; the rows themselves where there is none
    t_r   temperature of a row
    c_r   weight of a row, computed from the row's log-sum-exp, mean and maximum

The weights and the softmax count as constants in the gradient. It is then the gradient of sum_r c_r t_r log sum_j exp(s_rj / t_r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.exponentials import exp_
from counterpoint.core.rules import Rule
from counterpoint.core.transforms import traced

CHUNK = 512  # rows whose similarities are in memory together
WHOLE = 2**22  # maximum number of similarities of a batch with itself in memory: 16 MiB in float32

Weigh = Callable[[slice, Tensor, Tensor, Tensor], Tensor]


class _ExpectedSimilarity(torch.autograd.Function):
    """The sum above. The forward pass has the weights, so it computes the gradient too.

    It needs three products, and at most CHUNK rows' similarities in memory. Without a bank, rows are compared with each
    other, which needs two products for a moderate batch.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, bank: Tensor | None, temperature: Tensor, weigh: Weigh, rules: Sequence[Rule]
    ) -> Tensor:
        alike = bank is None
        whole = alike and len(query) ** 2 <= WHOLE
        bank = query if bank is None else bank
        to_query = torch.zeros_like(query)
        to_bank = to_query if alike else torch.zeros_like(bank)
        total = query.new_zeros(())
        chunk = len(query) if whole else CHUNK
        for start in range(0, len(query), chunk):
            part = slice(start, min(start + chunk, len(query)))
            s = query[part] @ bank.T
            logits = s / temperature[part, None].to(s)
            for rule in rules:
                rule.exclude(logits, part, slice(0, len(bank)))
            top = logits.amax(1)
            p = exp_(logits.sub_(top[:, None]))
            sums = p.sum(1)
            mean = torch.linalg.vecdot(p, s) / sums
            weight = weigh(part, sums.log() + top, mean, top).to(s)
            p.mul_((weight / sums)[:, None])
            total = total + (weight * mean).sum()
            if whole:
                to_query = (p + p.T) @ query
            else:
                to_query[part] += p @ bank
                to_bank.addmm_(p.T, query[part])
        ctx.save_for_backward(to_query, None if alike else to_bank)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_query, to_bank = ctx.saved_tensors
        return gradients[0] * to_query, None if to_bank is None else gradients[0] * to_bank, None, None, None


def expected_similarity(
    query: Float[Tensor, "rows dim"],
    bank: Float[Tensor, "keys dim"] | None,
    temperature: Float[Tensor, " rows"],
    weigh: Weigh,
    rules: Sequence[Rule] = (),
) -> Float[Tensor, ""]:
    """Compute the sum above.

    Args:
        query: rows, of which there is at least one.
        bank: keys; None compares the query with itself.
        temperature: > 0, one for each row; constants.
        weigh: a function that returns the weights [r] of a block of rows. Its arguments are the block as a slice of rows,
            and [r] numbers of its rows: log sum_j exp(s_rj / t_r), E_r[s] and max_j s_rj / t_r. It is called once for each
            block, in the order of rows, without gradient.
        rules: pairs to leave out of the softmax and of the mean; by default none.

    Memory is O((rows + keys) dim). Inside torch.func and torch.compile the function uses PyTorch's own operations, with memory
    O(rows keys). The blockwise gradient must not be differentiated again: call `core.transforms.once` on the operands.

    >>> expected_similarity(torch.eye(2), None, torch.ones(2), lambda rows, logs, mean, top: torch.ones(2))
    tensor(1.4621)
    """
    if not traced():
        return _ExpectedSimilarity.apply(query, bank, temperature, weigh, rules)
    s = query @ (query if bank is None else bank).T
    whole = slice(0, len(query))
    logits = s.detach() / temperature[:, None].to(s)
    for rule in rules:
        rule.exclude(logits, whole, slice(0, s.shape[1]))
    p = logits.softmax(1)
    weight = weigh(whole, logits.logsumexp(1), (p * s.detach()).sum(1), logits.amax(1)).to(s)
    return (weight[:, None] * p * s).sum()
