"""Contrast pairs in blocks that hold the same events in other orders: rows of other blocks have weights of their own (TNCE)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_scale
from counterpoint.core.distributed import batch_logsumexp, gather_rows, place
from counterpoint.core.operands import positive_similarity
from counterpoint.core.precision import scalar, wide
from counterpoint.core.rules import Block, Where
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
        if weights is not None:
            logits = logits + weights.logs()
        if every is not None:
            logits = logits.masked_fill(alike(whole, whole), -torch.inf)
        return -logits.log_softmax(1).diagonal(), -logits.log_softmax(0).diagonal()
    rules = () if every is None else (Where(alike),)
    tiles = None if weights is None else weights.tiles()
    found = batch_logsumexp(query, key, exclude=rules, weight=tiles, columns=True)
    assert found.columns is not None
    own = positive_similarity(query, key)
    return found.rows - own, found.columns - own


@dataclass
class BlockWeights:
    """The weights of pairs of rows: 1 within a block, elsewhere one of both alphas."""

    table: Float[Tensor, "blocks blocks"]  # of other pairs
    same: float
    rows: int  # of a block, in this process

    @classmethod
    def of(cls, same: float, cross: float, blocks: int, n: int, like: Tensor) -> BlockWeights | None:
        """Return the weights of blocks of n rows. None where all weights are 1 in the type of the operands."""
        same, cross = same + LEAST, cross + LEAST
        if max(abs(same - 1), abs(cross - 1)) < torch.finfo(like.dtype).eps / 2:
            return None
        return cls(like.detach().new_full((blocks, blocks), cross).fill_diagonal_(1.0), same, n)

    def logs(self) -> Float[Tensor, "rows rows"]:
        """Return the logarithms of the weights of all pairs of this process's rows."""
        blocks, n = len(self.table), self.rows
        found = self.table.log()[:, None, :, None].repeat(1, n, 1, n)
        own = found.diagonal(dim1=1, dim2=3)  # [blocks, blocks, n]: the same pair in two blocks
        own.fill_(math.log(self.same)).diagonal().zero_()
        return found.view(blocks * n, blocks * n)

    def tiles(self) -> Block:
        """Return a function that makes the weights of a tile of the rows of all processes."""
        device, blocks = self.table.device, len(self.table)
        numbers = place(self.rows, device).offset + torch.arange(self.rows, device=device)
        block = gather_rows(torch.arange(blocks, device=device).repeat_interleave(self.rows))
        pair = gather_rows(numbers.repeat(blocks))

        def tile(rows: slice, columns: slice) -> Float[Tensor, "r c"]:
            here, there = block[rows], block[columns]
            own = (pair[rows][:, None] == pair[columns]) & (here[:, None] != there)
            return self.table[here][:, there].masked_fill_(own, self.same)

        return tile
