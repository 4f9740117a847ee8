"""Losses and log-probabilities of answers: tokens that a causal language model predicts after a prompt.

A student also learns from a teacher's distribution of the next token, position by position (`masked_token_kl`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, need_within, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.masking import IGNORED
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds
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


@over_group
@full_precision
def flag_weighted_lm_loss(
    logits: Float[Tensor, "n tokens vocabulary"],
    labels: Int[Tensor, "n tokens"],
    flags: Sequence[int],
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute the cross-entropy of the next token, in whose mean over the whole batch a flag counts `weight` times.

    Args:
        logits, labels: as in `masked_lm_loss`.
        flags: numbers of the tokens that decide what follows.
        weight: at least 1; 1 gives `masked_lm_loss`.

    Without an answer's token the loss is 0. Raises ValueError for shapes that do not fit, an empty batch and a weight below 1.

    >>> flag_weighted_lm_loss(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]), [1], 5.0)
    tensor(1.3863)
    """
    _need(logits, labels)
    need_within(1, math.inf, weight=weight)
    losses, shifted = _next(logits, labels)
    chosen = torch.isin(shifted[shifted != IGNORED], torch.as_tensor(list(flags), device=labels.device))
    weights = torch.where(chosen, float(weight), 1.0).to(losses.dtype)
    # Without a token both means are 0.
    return global_mean(losses * weights) / global_mean(weights).clamp(min=1.0)


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


@over_group
@full_precision
def masked_token_kl(
    student: Float[Tensor, "n tokens vocabulary"],
    teacher: Float[Tensor, "n other vocabulary"],
    mask: Bool[Tensor, "n tokens"],
    temperature: float = 1.0,
    *,
    teacher_mask: Bool[Tensor, "n other"] | None = None,
) -> Float[Tensor, ""]:
    """Compute KL(softmax(teacher / temperature) || softmax(student / temperature)), averaged over the chosen positions.

    The sum is over the vocabulary, the mean over the positions of the whole batch. There is no factor of temperature^2.

    Args:
        student, teacher: logits of the next token at each position; the teacher's get no gradient.
        mask: True at the student's positions that are compared.
        temperature: > 0.
        teacher_mask: True at the teacher's positions, as many in each row, in the same order. Default: `mask`.

    Without a chosen position the loss is 0. Logits elsewhere may hold any value. Raises ValueError for shapes that do not fit and
    for an empty batch. So it does for a row whose masks choose different numbers of positions.

    >>> masked_token_kl(torch.zeros(1, 2, 2), torch.tensor([[[0.0, 4.0], [9.0, 0.0]]]), torch.tensor([[True, False]]))
    tensor(0.6031)
    """
    need_rows(student=student)
    need_positive(temperature=temperature)
    other = mask if teacher_mask is None else teacher_mask
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[::2] != teacher.shape[::2]:
        raise ValueError(
            "student must be [n, tokens, vocabulary] and teacher [n, other tokens, vocabulary], got "
            + shapes(student=student, teacher=teacher)
        )
    for name, chosen, logits in (("mask", mask, student), ("teacher_mask", other, teacher)):
        if chosen.dtype != torch.bool or chosen.shape != logits.shape[:2]:
            raise ValueError(
                f"{name} must be bool of {list(logits.shape[:2])}, got {chosen.dtype} {list(chosen.shape)}"
            )
    if teacher_mask is not None and holds((mask.sum(1) != other.sum(1)).any()):
        raise ValueError(
            f"mask and teacher_mask must choose as many positions in each row, got {mask.sum(1).tolist()} and "
            f"{other.sum(1).tolist()}"
        )
    own = F.log_softmax(wide(student[mask]) / temperature, dim=1)
    target = F.log_softmax(wide(teacher.detach()[other]) / temperature, dim=1)
    return global_mean(F.kl_div(own, target, reduction="none", log_target=True).sum(1))
