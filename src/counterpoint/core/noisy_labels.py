"""Judge labels that may be wrong, make soft labels from a queue, and select confident predictions.

judged_labels       keep, correct or remove one label a row (MoPro: Li, Xiong, Hoi, ICLR 2021, arXiv 2009.07995)
judged_tags         the same where a row may have several labels (CAPro: Qin et al., NeurIPS 2023, arXiv 2310.09761)
bootstrap_target    soft label of a row: a weighted mean over a queue (CAPro)
dynamic_selection   pictures whose predicted class is confident (KD3)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_numbers, need_rows, need_within, shapes
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds


class Judged(NamedTuple):
    kept: Bool[Tensor, " n"]
    label: Int[Tensor, " n"]


def class_scores(
    logits: Float[Tensor, "n classes"], near: Float[Tensor, "n classes"], alpha: float
) -> Float[Tensor, "n classes"]:
    """Compute a softmax(logits) + (1 - a) softmax(near): the score of each label, by a classifier and by prototypes.

    Args:
        logits: of the classifier.
        near: similarities with the prototypes, over their temperature.
        alpha: a, the classifier's share, 0 to 1.
    """
    return alpha * logits.softmax(1) + (1 - alpha) * near.softmax(1)


@torch.no_grad()
@full_precision
def judged_labels(
    score: Float[Tensor, "n classes"],
    label: Int[Tensor, " n"],
    threshold: float = 0.6,
    trusted: Bool[Tensor, " n"] | None = None,
) -> Judged:
    """Keep, correct or remove each row's label.

    Rules, in this order:

    1. A label whose score is at least 1 / classes is clean.
    2. A score of at least `threshold` corrects the label to its class. The largest score decides.
    3. A trusted row keeps its label.
    4. Other rows are removed: kept is False, and the label is -1.

    Args:
        score: probabilities, rows of sum 1.
        label: classes, 0 to classes - 1.
        threshold: smallest score that corrects a label, 0 to 1, by default 0.6.
        trusted: True where the label is certain. None (default): no row.

    Raises ValueError for shapes that do not fit, labels out of range and a threshold outside 0..1.

    >>> judged_labels(torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.6, 0.4]]), torch.tensor([1, 1, 1]), 0.8).label.tolist()
    [1, 0, -1]
    """
    need_rows(score=score)
    need_within(0, 1, threshold=threshold)
    if score.ndim != 2 or label.shape != score.shape[:1] or (trusted is not None and trusted.shape != label.shape):
        given = {"score": score, "label": label} | ({} if trusted is None else {"trusted": trusted})
        raise ValueError(f"score must be [n, classes], label and trusted [n], got {shapes(**given)}")
    classes = score.shape[1]
    need_numbers(classes, label=label)
    best, guess = score.max(1)
    clean, correct = score.gather(1, label[:, None])[:, 0] >= 1 / classes, best >= threshold
    if trusted is not None:
        certain = trusted.bool()
        clean, correct = clean | certain, correct & ~certain
    kept = clean | correct
    return Judged(kept, torch.where(correct, guess, label).masked_fill(~kept, -1))


@torch.no_grad()
@full_precision
def judged_tags(
    score: Float[Tensor, "n classes"],
    tags: Int[Tensor, "n classes"],
    threshold: float = 0.9,
    trusted: Bool[Tensor, "n ..."] | None = None,
) -> Int[Tensor, "n classes"]:
    """Keep, flip or ignore each label of rows that may have several.

    A label is kept whose score is at least 1 / classes. One is flipped whose opposite has a score of at least `threshold`.
    Others become -1, and so does a label that is -1 already and that no score decides. Trusted labels are kept.

    Args:
        score: probability that each label is present.
        tags: 1 where present, 0 where absent, -1 where unknown.
        threshold: smallest score of the opposite that flips a label, 0 to 1, by default 0.9.
        trusted: True where a label, or all labels of a row, are certain. None (default): none.

    Raises ValueError for shapes that do not fit, other tags and a threshold outside 0..1.

    >>> judged_tags(torch.tensor([[0.95, 0.3, 0.05]]), torch.tensor([[0, 0, 1]])).tolist()
    [[1, 0, 0]]
    """
    need_rows(score=score)
    need_within(0, 1, threshold=threshold)
    if score.ndim != 2 or tags.shape != score.shape:
        raise ValueError(f"score and tags must be [n, classes] alike, got {shapes(score=score, tags=tags)}")
    if holds(((tags < -1) | (tags > 1)).any()):
        raise ValueError(f"tags must be -1, 0 or 1, got {int(tags.min())}..{int(tags.max())}")
    least, absent = 1 / score.shape[1], 1 - score
    found = torch.full_like(tags, -1)
    found[((tags == 1) & (score >= least)) | (score >= threshold)] = 1
    found[((tags == 0) & (absent >= least) & (score < threshold)) | (absent >= threshold)] = 0
    if trusted is None:
        return found
    if trusted.shape not in (score.shape, score.shape[:1]):
        raise ValueError(f"trusted must be [n] or [n, classes], got {shapes(score=score, trusted=trusted)}")
    return torch.where(trusted.bool() if trusted.ndim == 2 else trusted.bool()[:, None], tags, found)


@torch.no_grad()
@full_precision
def bootstrap_target(
    rows: Float[Tensor, "n dim"],
    queue: Float[Tensor, "keys dim"],
    soft: Float[Tensor, "keys classes"],
    *,
    several: bool = False,
) -> Float[Tensor, "n classes"]:
    """Compute soft labels of rows: the mean of the queue's soft labels, weighted by similarity.

    Weights are the cosines, clipped to 0..1, plus 1e-7.

    Args:
        rows, queue: unit rows.
        soft: soft label of each key.
        several: whether a row may have several labels, so that soft labels need no sum of 1. Default: one label.

    Raises ValueError for shapes that do not fit. Source: collective bootstrapping of CAPro.

    >>> bootstrap_target(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 0.0], [0.25, 0.75]])).round(decimals=4)
    tensor([[1.0000, 0.0000],
            [0.2500, 0.7500]])
    """
    need_rows(rows=rows, queue=queue)
    if rows.ndim != 2 or rows.shape[1:] != queue.shape[1:] or soft.shape[:1] != queue.shape[:1]:
        raise ValueError(
            f"rows must be [n, dim], queue [keys, dim] and soft [keys, classes], got {shapes(rows=rows, queue=queue, soft=soft)}"
        )
    weight = (rows @ queue.T).clamp_(0, 1).add_(1e-7)
    target = (weight @ soft / weight.sum(1, keepdim=True)).clamp(0, 1)
    return target if several else F.normalize(target, p=1, dim=1)


def combination_weight(epoch: float, max_epoch: float = 120, horizon: float = 160) -> float:
    """Compute alpha_e = 1 - exp(-5 ((e + 1) / horizon - 1)^2) before epoch `max_epoch`, then 0.

    Args:
        epoch: e, counted from 1; at least 0.
        max_epoch: first epoch in which the student alone selects; by default 120 of 240.
        horizon: > 0, by default 160.

    Raises ValueError for a negative epoch and a horizon that is not positive.

    >>> [round(combination_weight(epoch), 3) for epoch in (1, 80, 119, 120)]
    [0.992, 0.704, 0.268, 0.0]
    """
    if epoch < 0 or not horizon > 0:
        raise ValueError(f"epoch must not be negative and horizon must be > 0, got {epoch} and {horizon}")
    return 1 - math.exp(-5 * ((epoch + 1) / horizon - 1) ** 2) if epoch < max_epoch else 0.0


def combined_logits(teacher_logits: Tensor, student_logits: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the confidence and the class of the combined prediction, [n] each."""
    l_teacher, l_student = wide(teacher_logits), wide(student_logits)
    best = (alpha * l_teacher + (1 - alpha) * l_student).softmax(1).max(1)
    return best.values, best.indices


def _passes(confidence: Tensor, predicted: Tensor, classes: int, cutoff: float) -> Tensor:
    """Return which pictures pass the threshold of their class, p_0 beta / (2 - beta)."""
    count = predicted.bincount(minlength=classes).to(confidence.dtype)
    beta = count / count.max()
    return confidence > (cutoff * beta / (2 - beta))[predicted]


@full_precision
@torch.no_grad()
def dynamic_selection(
    teacher_logits: Float[Tensor, "n classes"],
    student_logits: Float[Tensor, "n classes"],
    alpha: float,
    cutoff: float = 0.95,
) -> Bool[Tensor, " n"]:
    """Select the pictures whose combined prediction is confident for its class.

    Let q = softmax(alpha l_T + (1 - alpha) l_S). Let n_c be the number of pictures of predicted class c, and
    beta_c = n_c / max n. A picture passes if max q > cutoff beta_c / (2 - beta_c). This is FlexMatch's mapping, arXiv
    2110.08263; counts are over all pictures.

    Args:
        teacher_logits, student_logits: of all pictures.
        alpha: the teacher's share, 0 to 1.
        cutoff: p_0, threshold of the most frequent class, 0 to 1; by default 0.95.

    Returns a mask, possibly without any picture. Raises ValueError for shapes that do not fit, no picture, NaN, and numbers out
    of range.

    >>> logits = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> dynamic_selection(logits, logits, alpha=0.5)
    tensor([ True, False,  True])
    """
    need_alike("n classes", teacher_logits=teacher_logits, student_logits=student_logits)
    need_within(0, 1, alpha=alpha, cutoff=cutoff)
    confidence, predicted = combined_logits(teacher_logits, student_logits, alpha)
    if holds(confidence.isnan().any()):
        raise ValueError("teacher_logits and student_logits must be finite; a combined prediction is NaN")
    return _passes(confidence, predicted, teacher_logits.shape[1], cutoff)
