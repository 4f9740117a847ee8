"""TeminAL: teach a pre-trained model of sounds and texts which of two events came first.

"Enhancing Audio-Language Models through Self-Supervised Post-Training with Text-Audio Pairs", 2024, arXiv 2408.09269. No code is
public. The loss is that of TACT, its ancestor for video ("Test of Time", CVPR 2023, code bpiyush/TestOfTime). A third block
is added.

    i, j         two sounds of different events, with the labels c_i and c_j
    F            forward: the sound [a_i; a_j] and "c_i before c_j"
    R            inverted: the sound [a_j; a_i] and "c_j before c_i", the same word with its events swapped
    O            overlapped: the sound a_i + a_j and "c_i while c_j"
    z_a, z_t     unit rows of sounds and texts
    s            scale of the logits, 1 / temperature, learned in pre-training and kept, at most 100
    alpha_same   weight of a pair's own row in another block (consistent term)
    alpha_cross  weight of another pair's row in another block (cross term)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_scale, need_within
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, place
from counterpoint.core.operands import positive_similarity
from counterpoint.core.precision import full_precision, scalar, wide
from counterpoint.core.rules import Where
from counterpoint.core.world import over_group

LEAST = 1e-8  # added to both weights, as in TACT's code

# ------------------------------------------------------------------------------------------------------------ equations


class EventContrast(NamedTuple):
    """The sum of both directions, and each of them: texts among sounds, sounds among texts."""

    loss: Float[Tensor, ""]
    text_anchor: Float[Tensor, ""]
    audio_anchor: Float[Tensor, ""]


@over_group
@full_precision
def temporal_nce(
    audio_fwd: Float[Tensor, "n dim"],
    audio_rev: Float[Tensor, "n dim"],
    text_fwd: Float[Tensor, "n dim"],
    text_rev: Float[Tensor, "n dim"],
    alpha_same: float = 1.0,
    alpha_cross: float = 1.0,
    logit_scale: float | Float[Tensor, ""] = 1.0,
    audio_over: Float[Tensor, "n dim"] | None = None,
    text_over: Float[Tensor, "n dim"] | None = None,
    beta: float = 1.0,
    gamma: float = 1.0,
    meaning: Int[Tensor, "blocks n"] | None = None,
) -> EventContrast:
    r"""Contrast event pairs with their time-inverted and overlapped versions (TNCE).

    For a text n of a block, with s = logit_scale, m over its block and T over the other blocks,

        l(n) = -log e^{s t_n a_n} / (sum_m e^{s t_n a_m} + alpha_same sum_T e^{s t_n a_T(n)} + alpha_cross sum_T,m e^{s t_n a_T(m)})

    with m != n in the last sum, and likewise for sounds among texts. A direction is a weighted mean over all anchors. Those of F
    count 1, of R beta and of O gamma.

    Args:
        audio_fwd, audio_rev: rows of n sounds, [a_i; a_j] and [a_j; a_i]; used as they are, not normalised here.
        text_fwd, text_rev: rows of their texts.
        alpha_same: weight of a pair's own rows in other blocks, at least 0; 1e-8 is added, as in TACT's code.
        alpha_cross: weight of other pairs' rows in other blocks, at least 0; likewise.
        logit_scale: 1 / temperature, at least 0; it may have a gradient. Default 1, as in TACT.
        audio_over, text_over: rows of the overlapped sounds and their texts. Default: no third block.
        beta, gamma: weights of the anchors of R and of O, at least 0. Default 1.
        meaning: numbers, equal where two rows describe the same events in the same order; rows F, R, O. Such a row is no negative.
            Default: all rows differ.

    Returns (loss, text_anchor, audio_anchor): the sum of both directions, and each. Across processes each row meets the rows of all
    processes. Memory is linear in n. Raises ValueError for shapes that differ, an empty batch, and numbers out of range.

    >>> x = torch.zeros(3, 2)
    >>> temporal_nce(x, x, x, x).loss  # 2 log 6
    tensor(3.5835)
    """
    need_alike("n dim", audio_fwd=audio_fwd, audio_rev=audio_rev, text_fwd=text_fwd, text_rev=text_rev)
    if (audio_over is None) != (text_over is None):
        raise ValueError("audio_over and text_over belong together: give both or neither")
    audios, texts, factors = [audio_fwd, audio_rev], [text_fwd, text_rev], [1.0, float(beta)]
    if audio_over is not None and text_over is not None:
        need_alike("n dim", audio_fwd=audio_fwd, audio_over=audio_over, text_over=text_over)
        audios, texts, factors = [*audios, audio_over], [*texts, text_over], [*factors, float(gamma)]
    need_within(0, math.inf, alpha_same=alpha_same, alpha_cross=alpha_cross, beta=beta, gamma=gamma)
    blocks, n = len(audios), len(audio_fwd)
    if meaning is not None and meaning.shape != (blocks, n):
        raise ValueError(f"meaning must be [{blocks}, {n}], a row for each block, got {list(meaning.shape)}")
    weights = _Weights.of(alpha_same, alpha_cross, blocks, n, wide(audio_fwd))
    of_texts, of_sounds = _anchors(
        torch.cat(audios), torch.cat(texts), logit_scale, None if meaning is None else meaning.flatten(), weights
    )
    total = sum(factors)
    text_anchor, audio_anchor = (
        sum((w / total * global_mean(part) for w, part in zip(factors, rows.split(n), strict=True)), rows.new_zeros(()))
        for rows in (of_texts, of_sounds)
    )
    return EventContrast(text_anchor + audio_anchor, text_anchor, audio_anchor)


@over_group
@full_precision
def single_dual_nce(
    audio: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    logit_scale: float | Float[Tensor, ""] = 1.0,
    meaning: Int[Tensor, " n"] | None = None,
) -> EventContrast:
    r"""Contrast sounds of one and of two events with their texts: the loss of CLAP, summed over both directions (stage A).

    The texts of a clip's single events are negatives of the clip, as the paper intends.

    Args:
        audio, text: rows of n sounds and of their texts; used as they are, not normalised here.
        logit_scale: 1 / temperature, at least 0; it may have a gradient.
        meaning: numbers, equal where two rows describe the same events; such a row is no negative. Default: all rows differ.

    Returns (loss, text_anchor, audio_anchor): the sum of both directions, and each. For n = 1 all are 0. Across processes each row
    meets the rows of all processes. Raises ValueError for shapes that differ, an empty batch and a negative scale.

    >>> single_dual_nce(torch.zeros(4, 2), torch.zeros(4, 2)).text_anchor  # log 4
    tensor(1.3863)
    """
    need_alike("n dim", audio=audio, text=text)
    if meaning is not None and meaning.shape != (len(audio),):
        raise ValueError(f"meaning must be [{len(audio)}], a number for each row, got {list(meaning.shape)}")
    text_anchor, audio_anchor = (global_mean(rows) for rows in _anchors(audio, text, logit_scale, meaning))
    return EventContrast(text_anchor + audio_anchor, text_anchor, audio_anchor)


def _anchors(
    audio: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    meaning: Tensor | None = None,
    weights: _Weights | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return the losses of texts among the sounds, and of sounds among the texts, of all processes."""
    need_scale(logit_scale=logit_scale)
    key = wide(audio)
    query = wide(text) * scalar(logit_scale, key)
    rules = ()
    if meaning is not None:
        every = gather_rows(meaning)
        numbers = torch.arange(len(every), device=every.device)

        def alike(rows: slice, columns: slice) -> Tensor:
            return (every[rows][:, None] == every[columns]) & (numbers[rows][:, None] != numbers[columns])

        rules = (Where(alike),)
    found = batch_logsumexp(query, key, exclude=rules, weight=weights, columns=True)
    assert found.columns is not None
    own = positive_similarity(query, key)
    return found.rows - own, found.columns - own


@dataclass
class _Weights:
    """The weights of pairs of rows: 1 within a block, elsewhere one of both alphas."""

    table: Float[Tensor, "blocks blocks"]  # of other pairs
    same: float
    block: Int[Tensor, " rows"]
    pair: Int[Tensor, " rows"]

    @classmethod
    def of(cls, same: float, cross: float, blocks: int, n: int, like: Tensor) -> _Weights | None:
        """Number the rows of all processes. None where all weights are 1 in the type of the operands."""
        same, cross = same + LEAST, cross + LEAST
        if bool((torch.tensor([same, cross], dtype=like.dtype) == 1).all()):
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
