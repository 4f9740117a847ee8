"""Logits of rows and learnt, normalised class centres: sampled classes, several labels in each row, margins, a filter.

The centres that take part are those of the batch's labels and some others, the same for all rows (PartialFC: An et al. 2022,
arXiv 2203.15565). Cosines with a row's own classes are a list [n, l], those with all others a log-sum-exp (`core.contrast`).
They do not store the matrix [n, classes].

`class_margin_loss` has all classes, and a margin below the true one. `next_item_loss` has all items of a catalogue as classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, need_scale, need_within, shapes
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Listed, Where
from counterpoint.core.total import mean_cross_entropy
from counterpoint.core.transforms import holds, need_fixed, once
from counterpoint.core.world import over_group

CHUNK = 1024  # rows that are compared with all centres at a time, without gradient


def sampled_classes(
    labels: Int[Tensor, "n labels"], classes: int, rate: float, generator: torch.Generator | None
) -> Int[Tensor, " sampled"]:
    """Draw the classes of a step: all labels of the batch, then others without replacement up to floor(rate classes).

    Where the labels are more than that, return them alone. Processes draw alike from generators of equal state.

    Args:
        labels: classes of each row of this process, 0 to classes - 1; -1 for none.
        classes: k, number of classes, at least 1.
        rate: share of the classes, 0 to 1.
        generator: draws the others; it may be None if there is nothing to draw.

    Returns sorted classes. Raises ValueError for numbers out of range, and for a missing generator.

    >>> sampled_classes(torch.tensor([[3, 5], [5, -1]]), 9, 0.1, None)
    tensor([3, 5])
    """
    need_positive(classes=classes)
    need_within(0, 1, sample_rate=rate)
    used = gather_rows(labels.flatten()).unique()
    used = used[used >= 0]
    if rate == 1:
        return torch.arange(classes, device=labels.device)
    more = math.floor(rate * classes + 1e-9) - len(used)
    if more <= 0:
        return used
    if generator is None:
        raise ValueError("generator: a sample_rate below 1 draws classes; pass a torch.Generator, or sample_rate=1")
    drawn = torch.randperm(classes - len(used), generator=generator, device=generator.device)[:more].to(used.device)
    # `drawn` counts classes without those in use: skip each of these that lies before.
    before = used - torch.arange(len(used), device=used.device)
    return torch.cat([used, drawn + torch.searchsorted(before, drawn, right=True)]).sort().values


def distinct_labels(embedding: Tensor, class_center: Tensor, labels: Tensor) -> Tensor:
    """Return a copy of labels in which repeated labels of a row are -1. Raise ValueError for shapes that do not fit."""
    if embedding.ndim != 2 or class_center.ndim != 2 or embedding.shape[1] != class_center.shape[1]:
        raise ValueError(
            f"embedding and class_center must be [n, dim] and [k, dim], got {list(embedding.shape)} and "
            f"{list(class_center.shape)}"
        )
    if labels.ndim != 2 or len(labels) != len(embedding) or labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers [{len(embedding)}, l], got {list(labels.shape)}")
    need_rows(embedding=embedding, class_center=class_center)
    need_fixed("a loss over sampled classes", labels=labels)
    if holds(((labels < -1) | (labels >= len(class_center))).any()):
        raise ValueError(
            f"labels must lie in -1..{len(class_center) - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
    earlier = (labels[:, :, None] == labels[:, None]).tril(-1).any(2)
    return labels.masked_fill(earlier, -1)


class ClassLogits:
    """The logits of a batch: those of listed labels, and the log-sum-exp of all other classes that take part.

    Args:
        embedding: [n, dim], of any length.
        class_center: [k, dim], of any length.
        labels: [n, l] classes, -1 for none. A repeated label of a row counts once.
        scale: 1 / temperature, > 0.
        rate: share of the classes that take part, 0 to 1 (see `sampled_classes`).
        generator: draws them; it may be None for a rate of 1.
        threshold: a cosine of another class above it counts as 0; 0: no filter.
        sparse: whether the gradient of `class_center` is sparse, with the rows that take part alone.

    Attributes:
        labels: [n, l], repeated ones replaced by -1.
        valid: [n, l], False where `labels` is -1.
        cosine: [n, l], with the labels' centres; undefined where not `valid`.
    """

    def __init__(
        self,
        embedding: Tensor,
        class_center: Tensor,
        labels: Tensor,
        scale: float,
        rate: float = 1.0,
        generator: torch.Generator | None = None,
        threshold: float = 0.0,
        *,
        sparse: bool = False,
    ) -> None:
        self.labels = labels = distinct_labels(embedding, class_center, labels)
        self.valid, self.scale, self.threshold = labels >= 0, scale, threshold
        chosen = sampled_classes(labels, len(class_center), rate, generator)
        key = class_center
        if sparse:
            key = F.embedding(chosen, class_center, sparse=True)
        elif rate < 1:
            key = class_center[chosen]
        at = torch.searchsorted(chosen, labels.clamp(min=0)) if rate < 1 else labels
        self.at = at.masked_fill(~self.valid, -1)
        self.query, self.key = unit(embedding, scale), unit(key)
        own = self.key[self.at.clamp(min=0)] if len(chosen) else self.query[:, None]  # [n, l, dim]
        self.cosine = (torch.einsum("nd,nld->nl", self.query, own.expand(-1, labels.shape[1], -1)) / scale).clamp(-1, 1)

    def margined(self, m_arc: float, m_cos: float) -> Tensor:
        """Return the labels' logits [n, l] with margins; that on the angle has the gradient of the plain cosine."""
        cosine = self.cosine
        if m_arc:
            plain = cosine.detach()
            cosine = once(cosine, "an angular margin") + ((plain.arccos() + m_arc).cos() - plain)
        return self.scale * (cosine - m_cos)

    def others(self) -> Tensor:
        """Return log B [n]: the log-sum-exp over the classes that are no labels of the row; -inf if there are none."""
        listed = Listed(self.at)
        if not self.threshold:
            return pair_logsumexp(self.query, self.key, exclude=listed).rows
        query, key, limit = self.query.detach(), self.key.detach(), self.threshold * self.scale
        filtered = Where(lambda rows, columns: query[rows] @ key[columns].T > limit)
        near = torch.cat([(part @ key.T > limit).sum(1) for part in query.split(CHUNK)])
        near = near - ((self.cosine.detach() > self.threshold) & self.valid).sum(1)
        rest = pair_logsumexp(self.query, self.key, exclude=(filtered, listed)).rows
        return torch.where(near > 0, torch.logaddexp(rest, near.clamp(min=1).to(rest).log()), rest)


def need_margins(scale: float, m_arc: float, m_cos: float, threshold: float) -> None:
    need_positive(scale=scale)
    if not (0 <= m_arc < math.pi and 0 <= m_cos < math.inf):
        raise ValueError(f"margins must not be negative, and one of an angle lies below pi, got {m_arc} and {m_cos}")
    need_within(0, 1, filter_threshold=threshold)


@over_group
@full_precision
def class_margin_loss(
    emb: Float[Tensor, "n dim"],
    class_weights: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " n"],
    logit_scale: float = 1.0,
    margin: float = 4.0,
) -> Float[Tensor, ""]:
    """Compute a party's own loss: cross-entropy with a margin below the true class, and half of one between class weights.

    Args:
        emb: unit embeddings.
        class_weights: a row for each class; negative entries count as 0.
        labels: classes of the rows.
        logit_scale: 1 / temperature, factor of the products; by default 1. The code has 128 for images.
        margin: subtracted from the logit of the true class, by default 4.

    The second term classifies each class's weights by all classes' weights, which spreads them. Raises ValueError for shapes that
    do not fit, a label outside the classes, and a negative logit_scale.

    >>> class_margin_loss(torch.eye(2), 9 * torch.eye(2), torch.tensor([0, 1]), margin=0.0)
    tensor(0.0001)
    """
    need_rows(emb=emb, class_weights=class_weights)
    need_scale(logit_scale=logit_scale)
    if emb.ndim != 2 or emb.shape[1] != class_weights.shape[1] or labels.shape != (len(emb),):
        raise ValueError(
            "emb must be [n, dim], class_weights [classes, dim] and labels [n], got "
            + shapes(emb=emb, class_weights=class_weights, labels=labels)
        )
    if holds(((labels < 0) | (labels >= len(class_weights))).any()):
        raise ValueError(f"labels must lie in 0..{len(class_weights) - 1}")
    weights = class_weights.relu()
    logits = logit_scale * (wide(emb) @ weights.T) - margin * F.one_hot(labels, len(weights))
    spread = F.cross_entropy(weights @ weights.T, torch.arange(len(weights), device=weights.device))
    return global_mean(F.cross_entropy(logits, labels, reduction="none")) + 0.5 * spread


@over_group
@full_precision
def next_item_loss(
    state: Float[Tensor, "n dim"], items: Float[Tensor, "items dim"], target: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Compute L_rec: the mean cross-entropy of the products of n states and all items with the next items.

    Args:
        state: state of each history.
        items: embedding of each item.
        target: number of each next item.

    Memory is O((n + items) dim) and a block. Raises ValueError for shapes that do not fit and numbers out of range.

    >>> next_item_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([1]))
    tensor(0.6931)
    """
    if state.ndim != 2 or items.ndim != 2 or state.shape[1] != items.shape[1] or target.shape != state.shape[:1]:
        raise ValueError(
            f"state, items and target must be [n, dim], [items, dim] and [n], got {list(state.shape)}, {list(items.shape)} and "
            f"{list(target.shape)}"
        )
    need_rows(state=state, items=items)
    return mean_cross_entropy(state, items, target)
