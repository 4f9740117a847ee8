"""MEND equations."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.answers import answer_log_probability, masked_lm_loss, masked_token_kl
from counterpoint.core.checks import need_positive, need_rows, need_within, shapes
from counterpoint.core.masking import IGNORED
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group

ABSENT = -10000.0  # score of a candidate that a query does not have


class ContextLosses(NamedTuple):
    """Losses of the two stages."""

    pretrain: Float[Tensor, ""]  # the divergence from the model with all demonstrations
    finetune: Float[Tensor, ""]  # the prediction of answers, and the weighted divergence


@over_group
@full_precision
def context_distillation_losses(
    student_logits: Float[Tensor, "n positions vocabulary"],
    teacher_logits: Float[Tensor, "n tokens vocabulary"],
    query_ids: Int[Tensor, "n query"],
    query_mask: Bool[Tensor, "n query"] | Int[Tensor, "n query"],
    answer_mask: Bool[Tensor, "n query"] | Int[Tensor, "n query"],
    teacher_mask: Bool[Tensor, "n tokens"] | Int[Tensor, "n tokens"],
    teacher_demo_mask: Bool[Tensor, "n tokens"] | Int[Tensor, "n tokens"],
    num_vectors: int,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
) -> ContextLosses:
    """Compute the losses of both stages: L_KL, and L_pred + kl_weight L_KL.

    Args:
        student_logits: of the frozen model on [vectors ; query], so there are num_vectors + query positions.
        teacher_logits: of the same model on [demonstrations ; query], with padding anywhere; no gradient.
        query_ids: token numbers of the query with its answer.
        query_mask: 1 at the tokens of the query.
        answer_mask: 1 at the tokens of the answer.
        teacher_mask: 1 at the teacher's tokens.
        teacher_demo_mask: 1 at the demonstrations among these.
        num_vectors: number of vectors before the query, at least 0.
        temperature: divisor of both logits in the divergence, > 0; the prediction term has none.
        kl_weight: weight of the divergence, at least 0.

    Without a query's token the divergence is 0, and without an answer's token the prediction term is 0. Raises ValueError for
    shapes that do not fit, a value out of range, and a row whose teacher has more or fewer tokens of the query than the student.
    """
    n, many = query_ids.shape
    if student_logits.shape[:2] != (n, num_vectors + many):
        raise ValueError(
            f"student_logits must be [n, num_vectors + query, vocabulary] with num_vectors {num_vectors}, got "
            + shapes(student_logits=student_logits, query_ids=query_ids)
        )
    for name, mask, like in (
        ("query_mask", query_mask, query_ids),
        ("answer_mask", answer_mask, query_ids),
        ("teacher_mask", teacher_mask, teacher_logits[..., 0]),
        ("teacher_demo_mask", teacher_demo_mask, teacher_logits[..., 0]),
    ):
        if mask.shape != like.shape:
            raise ValueError(f"{name} must be {list(like.shape)}, got {list(mask.shape)}")
    need_positive(temperature=temperature)
    need_within(0, math.inf, kl_weight=kl_weight)
    student, asked = student_logits[:, num_vectors:], query_mask.bool()
    theirs = teacher_mask.bool() & ~teacher_demo_mask.bool()
    divergence = masked_token_kl(student, teacher_logits, asked, temperature, teacher_mask=theirs)
    labels = torch.where(answer_mask.bool() & asked, query_ids, IGNORED)
    return ContextLosses(divergence, masked_lm_loss(student, labels) + kl_weight * divergence)


@full_precision
def candidate_scores(
    student_logits: Float[Tensor, "rows positions vocabulary"],
    ids: Int[Tensor, "rows query"],
    answer_mask: Bool[Tensor, "rows query"] | Int[Tensor, "rows query"],
    class_mask: Bool[Tensor, "n classes"] | Int[Tensor, "n classes"],
    num_vectors: int,
    num_class: int,
) -> Float[Tensor, "n classes"]:
    """Score the candidate answers of queries: the mean log-probability of a candidate's tokens.

    Args:
        student_logits: of the frozen model on [vectors ; query with candidate]; row n * num_class + c is candidate c of query n.
        ids: token numbers of each query with a candidate.
        answer_mask: 1 at the tokens of the candidate.
        class_mask: 1 at the candidates that a query has; the others score -10,000.
        num_vectors: number of vectors before the query, at least 0.
        num_class: number of candidates of each query.

    Raises ValueError for shapes that do not fit, and for a candidate of a query that has no answer token.
    """
    need_rows(student_logits=student_logits)
    rows, many = ids.shape
    if student_logits.shape[:2] != (rows, num_vectors + many) or answer_mask.shape != ids.shape:
        raise ValueError(
            f"student_logits must be [rows, num_vectors + query, vocabulary] with num_vectors {num_vectors}, and answer_mask as ids, "
            "got " + shapes(student_logits=student_logits, ids=ids, answer_mask=answer_mask)
        )
    if class_mask.shape[1:] != (num_class,) or class_mask.numel() != rows:
        raise ValueError(
            f"class_mask must be [n, {num_class}] for n * {num_class} rows, got " + shapes(class_mask=class_mask, ids=ids)
        )
    labels = torch.where(answer_mask.bool(), ids, IGNORED)
    tokens = (labels[:, 1:] != IGNORED).sum(1).view(-1, num_class)
    there = class_mask.bool()
    if holds((there & (tokens == 0)).any()):
        at = (there & (tokens == 0)).nonzero()[0].tolist()
        raise ValueError(f"answer_mask has no token for candidate {at[1]} of query {at[0]}, which class_mask names")
    scores = answer_log_probability(student_logits[:, num_vectors:], labels).view(-1, num_class)
    return torch.where(there, scores / tokens.clamp(min=1), ABSENT)
