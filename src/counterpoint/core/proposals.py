"""Proposals, boxes that may hold an object: the uncertainty of a set of them, and pseudo boxes by a teacher's classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_rows, need_within, shapes
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Diagonal

NMS = tuple(n / 10 for n in range(6))  # thresholds of the uncertainty
MATCH = 0.5  # least IoU of a proposal and its pseudo box


def proposal_variance(boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Compute U, the population variance of the number of boxes that survive NMS at IoU thresholds 0, 0.1, ..., 0.5.

    Args:
        boxes: left, top, right, bottom.
        scores: logits of objectness; boxes of a sigmoid of 0.5 and less are left out.

    No box left gives 0. Raises ValueError for shapes that do not fit.

    >>> proposal_variance(torch.tensor([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 6.0, 6.0]]), torch.ones(2))
    tensor(0.)
    """
    from torchvision.ops import nms

    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"boxes must be [n, 4] and scores [n], got {shapes(boxes=boxes, scores=scores)}")
    boxes, scores = wide(boxes.detach()), wide(scores.detach()).to(wide(boxes).dtype)
    kept = scores > 0
    counts = [len(nms(boxes[kept], scores[kept], threshold)) for threshold in NMS]
    return torch.tensor(counts, dtype=boxes.dtype, device=boxes.device).var(correction=0)


class Pseudo(NamedTuple):
    """The pseudo boxes of a picture, and the proposals that match them."""

    boxes: Int[Tensor, " k"]  # positions of the proposals that are pseudo boxes
    classes: Int[Tensor, " k"]
    fg_index: Int[Tensor, " m"]  # positions of the proposals that match a pseudo box
    fg_labels: Int[Tensor, " m"]
    owner: Int[Tensor, " n"]  # number of the pseudo box that a proposal matches, k for none


@torch.no_grad()
def pseudo_boxes(logits: Float[Tensor, "n classes"], boxes: Float[Tensor, "n 4"], threshold: float) -> Pseudo:
    """Select a picture's confident proposals as pseudo boxes, one for each object by NMS, and match all proposals with them.

    Args:
        logits: the teacher's; the last class is the background.
        boxes: proposals.
        threshold: least probability of a pseudo box's class.
    """
    from torchvision.ops import batched_nms, box_iou

    best, kind = logits.softmax(1)[:, :-1].max(1)
    chosen = (best > threshold).nonzero()[:, 0]
    chosen = chosen[batched_nms(boxes[chosen], best[chosen], kind[chosen], MATCH)]
    if not len(chosen):
        none = chosen[:0]
        return Pseudo(none, none, none, none, torch.zeros(len(boxes), dtype=torch.long, device=boxes.device))
    overlap, owner = box_iou(boxes, boxes[chosen]).max(1)
    owner = torch.where(overlap >= MATCH, owner, len(chosen))
    fg_index = (owner < len(chosen)).nonzero()[:, 0]
    return Pseudo(chosen, kind[chosen], fg_index, kind[chosen][owner[fg_index]], owner)


def _mean_of_nonzero(rows: Tensor) -> Tensor:
    """Return the mean over the rows that are not exactly 0; 0 without such a row."""
    return rows.sum() / (rows != 0).sum().clamp(min=1)


@full_precision
def weak_guided_contrast(
    strong: Float[Tensor, "rows dim"],
    labels: Int[Tensor, " rows"],
    temperature: float = 0.07,
    hard_positive: Float[Tensor, "rows rows"] | None = None,
    alpha: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute the supervised contrast of strong features under labels of weak features (Sec. 3.2).

    l_i = -1/2 mean over positives j of log p_ij, log p_ij = s_ij - log sum_k e^s_ik, s = cos / temperature. A row is its own
    positive, and in its own denominator.

    Args:
        strong: rows, normalised here.
        labels: class numbers; rows with equal numbers are positives.
        temperature: > 0, by default 0.07.
        hard_positive: 1 for far positives, 0 elsewhere, see `hard_positive_mask`. None (default) or all 0: no far positives;
            memory is linear in the rows then.
        alpha: weight of the loss of the far positives, 0 to 1; the others have 1 - alpha. By default 0.

    The mean is over the rows whose loss is not exactly 0. It is 0 without such rows. Raises ValueError for an empty batch,
    shapes that do not fit and arguments out of range.

    >>> weak_guided_contrast(torch.ones(4, 2), torch.tensor([0, 0, 1, 2]))  # log(4) / 2
    tensor(0.6931)
    """
    need_positive(temperature=temperature)
    need_within(0, 1, alpha=alpha)
    if strong.ndim != 2 or labels.shape != strong.shape[:1]:
        raise ValueError(f"strong must be [rows, dim] and labels [rows], got {shapes(strong=strong, labels=labels)}")
    need_rows(strong=strong)
    if hard_positive is not None and hard_positive.shape != (len(strong), len(strong)):
        raise ValueError(f"hard_positive must be [rows, rows], got {shapes(hard_positive=hard_positive)}")
    z = unit(strong, temperature**-0.5)
    if hard_positive is None or not bool((hard_positive != 0).any()):
        own = (z * z).sum(1)
        # log Z_i - s_ii without the difference of two large numbers: it is exactly 0 where the others underflow.
        beyond = torch.log(1 + torch.exp(pair_logsumexp(z, exclude=Diagonal()).rows - own))
        _, number = labels.unique(return_inverse=True)
        sums = z.new_zeros(int(number.max()) + 1, z.shape[1]).index_add(0, number, z)
        positives = number.bincount()[number]
        # A lone row's similarity with itself is `own`: their difference is 0, not a rounding error.
        towards = torch.where(positives > 1, (z * sums[number]).sum(1) / positives - own, 0.0)
        return _mean_of_nonzero((beyond - towards) / 2)
    log_p = F.log_softmax(z @ z.T, 1)
    far = hard_positive.to(z.dtype)
    near = (labels[:, None] == labels).to(z.dtype) * (1 - far)
    rows = [-(mask * log_p).sum(1) / (mask.sum(1) + 1e-5) / 2 for mask in (far, near)]
    return alpha * _mean_of_nonzero(rows[0]) + (1 - alpha) * _mean_of_nonzero(rows[1])


@torch.no_grad()
def hard_positive_mask(
    weak: Float[Tensor, "rows dim"], labels: Int[Tensor, " rows"], background: int
) -> Float[Tensor, "rows rows"]:
    """Mark far positives H of each foreground row: alike in label, but not among its n - 1 nearest rows by cosine.

    Args:
        weak: rows of the weak views.
        labels: class numbers. n is the number of rows with a row's label.
        background: class number of the background, whose rows have no far positives.

    Raises ValueError for shapes that do not fit.

    >>> hard_positive_mask(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]), torch.tensor([0, 0, 3]), 3)[0]
    tensor([0., 1., 0.])
    """
    if weak.ndim != 2 or labels.shape != weak.shape[:1]:
        raise ValueError(f"weak must be [rows, dim] and labels [rows], got {shapes(weak=weak, labels=labels)}")
    z = unit(wide(weak))
    similarity = (z @ z.T).fill_diagonal_(-torch.inf)
    alike = labels[:, None] == labels
    rank = similarity.argsort(1, descending=True).argsort(1)
    near = rank < (alike.sum(1) - 1)[:, None]
    far = alike & ~near & (labels != background)[:, None]
    return far.fill_diagonal_(False).to(z.dtype)


@full_precision
def proposal_distillation(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]
) -> Float[Tensor, ""]:
    """Compute KL(softmax(teacher) || softmax(student)), the mean over the proposals of one picture.

    It is `kd` at temperature 1, of this process's rows alone.

    Args:
        student: logits on strong views.
        teacher: logits on weak views, without gradient.

    Raises ValueError for shapes that differ and for an empty batch.

    >>> proposal_distillation(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    tensor(0.6031)
    """
    need_alike("n classes", student=student, teacher=teacher)
    target = wide(teacher.detach()).softmax(1)
    return F.kl_div(F.log_softmax(wide(student), 1), target, reduction="batchmean")
