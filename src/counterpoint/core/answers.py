"""Losses and log-probabilities of answers: tokens that a causal language model predicts after a prompt."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.masking import IGNORED
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group


def _need(logits: Tensor, labels: Tensor) -> None:
    need_rows(logits=logits)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            "logits must be [n, tokens, vocabulary] and labels [n, tokens], got " + shapes(logits=logits, labels=labels)
        )


def _next(
    logits: Float[Tensor, "n tokens vocabulary"], labels: Int[Tensor, "n tokens"]
) -> tuple[Float[Tensor, " m"], Int[Tensor, "n shifted"]]:
    """Compute the negative log-probabilities of the m chosen tokens, and the labels shifted by one."""
    labels = labels[:, 1:]
    chosen = labels != IGNORED
    return F.cross_entropy(logits[:, :-1][chosen], labels[chosen], reduction="none"), labels


@over_group
@full_precision
def masked_lm_loss(logits: Float[Tensor, "n tokens vocabulary"], labels: Int[Tensor, "n tokens"]) -> Float[Tensor, ""]:
    """Compute the cross-entropy of the next token, averaged over the answers' tokens of the whole batch.

    Args:
        logits: those at position t predict the token at t + 1.
        labels: token numbers; -100 at tokens that are not learned: prompt, pictures, padding. The first token has no prediction.

    Without an answer's token the loss is 0. Raises ValueError for shapes that do not fit and an empty batch.

    >>> masked_lm_loss(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]))
    tensor(1.3863)
    """
    _need(logits, labels)
    return global_mean(_next(logits, labels)[0])


@full_precision
def answer_log_probability(
    logits: Float[Tensor, "n tokens vocabulary"], labels: Int[Tensor, "n tokens"]
) -> Float[Tensor, " n"]:
    """Compute the log-probability of each answer, the sum over its tokens; 0 for a row without an answer.

    Args:
        logits, labels: as in `masked_lm_loss`.

    >>> answer_log_probability(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]))
    tensor([-2.7726])
    """
    _need(logits, labels)
    found, shifted = _next(logits, labels)
    out = logits.new_zeros(shifted.shape)
    out[shifted != IGNORED] = -found
    return out.sum(1)
