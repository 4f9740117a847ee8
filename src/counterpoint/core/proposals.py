"""Proposals, boxes that may hold an object: the uncertainty of a set of them, and pseudo boxes by a teacher's classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import shapes
from counterpoint.core.precision import wide

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
