"""Contrast pairs in blocks that hold the same events in other orders: rows of other blocks have weights of their own (TNCE)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_scale
from counterpoint.core.distributed import batch_logsumexp, gather_rows, place
from counterpoint.core.operands import positive_similarity
from counterpoint.core.precision import scalar, wide
from counterpoint.core.rules import Block, Where
from counterpoint.core.transforms import traced
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


@dataclass(frozen=True)
class BlockWeights:
    """The weights of pairs of rows: 1 within a block, elsewhere one of both alphas."""

    same: float  # of the same pair
    cross: float  # of other pairs
    blocks: int
    rows: int  # of a block, in this process
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, same: float, cross: float, blocks: int, n: int, like: Tensor) -> BlockWeights | None:
        """Return the weights of blocks of n rows. None where all weights are 1 in the type of the operands."""
        same, cross = same + LEAST, cross + LEAST
        if max(abs(same - 1), abs(cross - 1)) < torch.finfo(like.dtype).eps / 2:
            return None
        return cls(same, cross, blocks, n, like.dtype, like.device)

    def logs(self) -> Float[Tensor, "rows rows"]:
        """Return the logarithms of the weights of all pairs of this process's rows; they are not to be changed."""
        return _logs.__wrapped__(self) if traced() else _logs(self)

    def tiles(self) -> Block:
        """Return a function that makes the weights of a tile of the rows of all processes."""
        table = torch.full((self.blocks, self.blocks), self.cross, dtype=self.dtype, device=self.device)
        table.fill_diagonal_(1.0)
        numbers = place(self.rows, self.device).offset + torch.arange(self.rows, device=self.device)
        block = gather_rows(torch.arange(self.blocks, device=self.device).repeat_interleave(self.rows))
        pair = gather_rows(numbers.repeat(self.blocks))

        def tile(rows: slice, columns: slice) -> Float[Tensor, "r c"]:
            here, there = block[rows], block[columns]
            own = (pair[rows][:, None] == pair[columns]) & (here[:, None] != there)
            return table[here][:, there].masked_fill_(own, self.same)

        return tile


@lru_cache(maxsize=4)  # every step of a training asks for the same
@torch.inference_mode(False)
def _logs(weights: BlockWeights) -> Float[Tensor, "rows rows"]:
    blocks, n = weights.blocks, weights.rows
    found = torch.full((blocks, n, blocks, n), math.log(weights.cross), dtype=weights.dtype, device=weights.device)
    for block in range(blocks):
        found[block, :, block] = 0
    own = found.diagonal(dim1=1, dim2=3)  # [blocks, blocks, n]: the same pair in two blocks
    own.fill_(math.log(weights.same)).diagonal().zero_()
    return found.view(blocks * n, blocks * n)
