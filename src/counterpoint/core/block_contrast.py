"""Contrast pairs in blocks that hold the same events in other orders: rows of other blocks have weights of their own (TNCE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_scale
from counterpoint.core.distributed import batch_logsumexp, gather_rows, place
from counterpoint.core.operands import positive_similarity
from counterpoint.core.precision import scalar, wide
from counterpoint.core.rules import Where
from counterpoint.core.world import world

LEAST = 1e-8  # added to both weights, as in TACT's code
FEW = 512  # rows up to which whole matrices are faster


def anchor_losses(
    audio: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    meaning: Tensor | None = None,
    weights: BlockWeights | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return the losses of texts among the sounds, and of sounds among the texts, of all processes."""
    need_scale(logit_scale=logit_scale)
    key = wide(audio)
    query = wide(text) * scalar(logit_scale, key)
    every = None if meaning is None else gather_rows(meaning)

    def alike(rows: slice, columns: slice) -> Tensor:
        """Mark the pairs of two different rows that have one meaning."""
        assert every is not None
        numbers = torch.arange(len(every), device=every.device)
        return (every[rows][:, None] == every[columns]) & (numbers[rows][:, None] != numbers[columns])

    if world()[1] == 1 and len(key) <= FEW:
        whole = slice(0, len(key))
        logits = query @ key.T
        own = logits.diagonal()
        if weights is not None:
            logits = logits + weights(whole, whole).log()
        if every is not None:
            logits = logits.masked_fill(alike(whole, whole), -torch.inf)
        return logits.logsumexp(1) - own, logits.logsumexp(0) - own
    rules = () if every is None else (Where(alike),)
    found = batch_logsumexp(query, key, exclude=rules, weight=weights, columns=True)
    assert found.columns is not None
    own = positive_similarity(query, key)
    return found.rows - own, found.columns - own


@dataclass
class BlockWeights:
    """The weights of pairs of rows: 1 within a block, elsewhere one of both alphas."""

    table: Float[Tensor, "blocks blocks"]  # of other pairs
    same: float
    block: Int[Tensor, " rows"]
    pair: Int[Tensor, " rows"]

    @classmethod
    def of(cls, same: float, cross: float, blocks: int, n: int, like: Tensor) -> BlockWeights | None:
        """Number the rows of all processes. None where all weights are 1 in the type of the operands."""
        same, cross = same + LEAST, cross + LEAST
        if max(abs(same - 1), abs(cross - 1)) < torch.finfo(like.dtype).eps / 2:
            return None
        here = place(n, like.device).offset + torch.arange(n, device=like.device)
        numbers = torch.arange(blocks, device=like.device)
        table = like.detach().new_full((blocks, blocks), cross).fill_diagonal_(1.0)
        return cls(table, same, gather_rows(numbers.repeat_interleave(n)), gather_rows(here.repeat(blocks)))

    def __call__(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        here, there = self.block[rows], self.block[columns]
        found = self.table[here][:, there]
        own = (self.pair[rows][:, None] == self.pair[columns]) & (here[:, None] != there)
        return found.masked_fill_(own, self.same)
