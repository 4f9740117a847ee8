"""Classify by neighbours, means, prompts and probes; count ties and confusions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.operands import EPS
from counterpoint.core.rows import Keys, distinct_rows
from counterpoint.engine.optim import light
from counterpoint.tasks.measures.checks import finite, item_numbers, rows_of
from counterpoint.tasks.measures.retrieval import CHUNK, SLACK, nearest_weights

LOGIT_SLACK = 1e-6  # difference below which two logits of a fitted classifier are equal


def _tied(logits: Float[Tensor, "n classes"], slack: float = 0.0) -> Tensor:
    """Mark the classes whose logit is the row's largest, or smaller by at most `slack`."""
    return logits >= logits.amax(1, keepdim=True) - slack


def decided_shares(
    logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], *, slack: float = 0.0
) -> Float[Tensor, " n"]:
    """Score each item's classification: 1 if right, 0 if wrong, 1/t if the right class is among t with the largest logit.

    Args:
        logits: one number per class; the class with the largest is chosen.
        labels: classes, 0 to classes - 1.
        slack: >= 0, largest difference of logits that count as equal; by default 0.

    >>> decided_shares(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    tied = _tied(logits, slack)
    return tied.gather(1, labels[:, None]).squeeze(1).double() / tied.sum(1)


def decided(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], *, slack: float = 0.0) -> Int[Tensor, " n"]:
    """Return the class with the largest logit. If the true class ties with others, return the first of the others.

    Arguments are those of `decided_shares`, but labels may be -1 for unknown classes.
    """
    tied = _tied(logits, slack)
    known = labels >= 0
    others = tied.clone()
    others[known.nonzero().flatten(), labels[known]] = False
    chosen = torch.where(others.any(1, keepdim=True), others, tied)
    # argmax may return any of several equal numbers. Decreasing factors select the first.
    return (chosen.long() * torch.arange(chosen.shape[1], 0, -1)).argmax(1)


def zero_shot_accuracy(
    items: Float[Tensor, "n dim"], prompts: Float[Tensor, "classes dim"], labels: Int[Tensor, " n"]
) -> float:
    """Compute the share of labelled items whose most similar prompt is that of their class.

    If t prompts tie for an item and its own is among them, it counts 1/t.

    Args:
        items, prompts: rows to compare by their dot product.
        labels: class numbers; items of label -1 are left out. If no item remains, the result is nan.

    Raises ValueError for shapes that do not fit, classes without a prompt and NaN.
    """
    items, prompts = finite(items=items, prompts=prompts)
    labels = item_numbers("labels", labels, len(items))
    known = labels >= 0
    if not bool(known.any()):
        return math.nan
    if int(labels.max()) >= len(prompts):
        raise ValueError(f"prompts must be one for each class, got {len(prompts)} and the label {int(labels.max())}")
    return float(decided_shares(Keys(prompts).products(items[known]), labels[known]).mean())


def class_means(
    rows: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "classes dim"], Int[Tensor, " classes"]]:
    """Compute the normalised mean of each class's rows, and the numbers of the classes. Leave out rows of label -1."""
    rows = rows_of("rows", rows)
    labels = item_numbers("labels", labels, len(rows))
    known = labels >= 0
    numbers, at = labels[known].unique(return_inverse=True)
    sums = rows.new_zeros(len(numbers), rows.shape[1]).index_add_(0, at, rows[known])
    return F.normalize(sums, dim=1, eps=EPS), numbers


def knn_accuracy(
    features: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m dim"],
    test_labels: Int[Tensor, " m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Compute the share of test items whose k nearest neighbours vote for their class, weighted by exp(cosine / temperature).

    This is the protocol of Wu et al. 2018 (arXiv 1805.01978) and DINO. Neighbours that tie for the last places share these.
    If t classes tie for an item and its own is among them, it counts 1/t.

    Args:
        features, labels: rows that vote and their classes; rows of label -1 do not vote.
        test_features, test_labels: rows to classify and their classes; rows of label -1 do not count.
        k: > 0, number of neighbours, at most the number of voting rows; by default 20.
        temperature: > 0, by default 0.07. Weights are relative to the nearest neighbour's, so any low value works.

    Returns nan if no row votes or no row is classified. Raises ValueError for shapes that do not fit, NaN, and numbers out of
    range.
    """
    if k < 1 or not 0 < temperature < math.inf:
        raise ValueError(f"k must be at least 1 and temperature > 0 and finite, got {k} and {temperature}")
    features, test_features = finite(features=features, test_features=test_features)
    labels = item_numbers("labels", labels, len(features))
    test_labels = item_numbers("test_labels", test_labels, len(test_features))
    votes_too, asked = labels >= 0, test_labels >= 0
    labels, test_labels = labels[votes_too], test_labels[asked]
    if not len(labels) or not len(test_labels):
        return math.nan
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    right = 0.0
    for start, votes in _votes(features[votes_too], labels, test_features[asked], classes, k, temperature):
        best = votes.amax(1, keepdim=True) * (1 - SLACK)
        right += float(decided_shares(torch.where(votes >= best, 1.0, 0.0), test_labels[start : start + CHUNK]).sum())
    return right / len(test_labels)


def knn_votes(
    features: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m dim"],
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "m classes"]:
    """Compute the share of the votes that each class gets from a row's k nearest neighbours (see `knn_accuracy`).

    Args:
        features, labels: rows that vote and their classes, 0 to classes - 1.
        queries: rows to classify.
        classes: number of classes.
        k, temperature: as in `knn_accuracy`.

    >>> knn_votes(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[1.0, 0.0]]), 2, k=1)
    tensor([[1., 0.]], dtype=torch.float64)
    """
    parts = [
        votes / votes.sum(1, keepdim=True) for _, votes in _votes(features, labels, queries, classes, k, temperature)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, classes, dtype=torch.float64)


def _votes(
    features: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, temperature: float
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first position of each chunk of queries and its votes [chunk, classes]."""
    bank, queries = (F.normalize(rows.float(), dim=1, eps=EPS) for rows in (features, queries))
    keys, k = Keys(bank), min(k, len(bank))
    for start in range(0, len(queries), CHUNK):
        similarity = keys.products(queries[start : start + CHUNK])
        nearest, index = similarity.topk(k, dim=1)
        weight = ((nearest.double() - nearest[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(weight), classes)
        votes.scatter_add_(1, labels[index], weight)
        # Share the last places if more neighbours tie than there are places.
        last = nearest[:, -1:]
        unsure = ((similarity == last).sum(1) > (nearest == last).sum(1)).nonzero().flatten()
        for rows in unsure.split(max(1, CHUNK // 8)):
            shared = nearest_weights(similarity[rows], k)
            shared *= ((similarity[rows].double() - nearest[rows, :1]) / temperature).clamp(max=0).exp()
            votes[rows] = weight.new_zeros(len(rows), classes).index_add_(1, labels, shared)
        yield start, votes


def purity(features: Float[Tensor, "n dim"], groups: Int[Tensor, " n"], *, k: int = 10) -> float:
    """Compute the mean share of a row's k nearest other rows, by cosine, that are of its own group.

    With domains as groups, it is domain purity: low where neighbours mix domains. Neighbours that tie for the last places
    share these.

    Args:
        features: rows to compare.
        groups: numbers of groups; rows of group -1 are left out.
        k: > 0, number of neighbours, at most the number of other rows; by default 10.

    Returns nan for fewer than two rows. Raises ValueError for shapes that do not fit, NaN, and k below 1.

    >>> purity(torch.eye(2).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1]), k=1)
    1.0
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    (features,) = finite(features=features)
    groups = item_numbers("groups", groups, len(features))
    rows, groups = F.normalize(features[groups >= 0].float(), dim=1, eps=EPS), groups[groups >= 0]
    if len(rows) < 2:
        return math.nan
    keys, k, total = Keys(rows), min(k, len(rows) - 1), 0.0
    for start in range(0, len(rows), CHUNK):
        similarity = keys.products(rows[start : start + CHUNK])
        at = torch.arange(len(similarity))
        similarity[at, start + at] = -math.inf
        same = groups[start : start + CHUNK, None] == groups
        total += float((nearest_weights(similarity, k) * same).sum())
    return total / (k * len(rows))


def linear_probe(
    features: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m dim"],
    test_labels: Int[Tensor, " m"],
    *,
    regularisation: float = 1e-3,
    steps: int = 100,
) -> tuple[float, Int[Tensor, " m"]]:
    """Fit multinomial logistic regression on frozen, standardised features by L-BFGS; return its accuracy and predictions.

    The result is deterministic. If t classes tie for a test item and its own is among them, it counts 1/t. Its prediction
    is then another of them.

    Args:
        features, labels: rows and classes to learn; rows of label -1 are left out.
        test_features, test_labels: rows and classes to predict; rows of label -1 are predicted, but not counted.
        regularisation: weight of the sum of squared coefficients, added to the mean cross-entropy; by default 1e-3.
        steps: > 0, maximum number of iterations of L-BFGS; by default 100.

    Raises ValueError for shapes that do not fit, NaN, and if no example has a class.
    """
    features, test_features = finite(features=features, test_features=test_features)
    labels = item_numbers("labels", labels, len(features))
    test_labels = item_numbers("test_labels", test_labels, len(test_features))
    features, labels = features[labels >= 0], labels[labels >= 0]
    if not len(labels):
        raise ValueError("labels: no example has a class to learn; at least one label must not be negative")
    mean = features.float().mean(0)
    # One example has a spread of 0, not of nan.
    spread = features.float().std(0, correction=min(1, len(features) - 1)).clamp(min=1e-6)
    train, test = (features.float() - mean) / spread, (test_features.float() - mean) / spread
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    dim = train.shape[1]
    both = torch.zeros(classes * (dim + 1))  # weight and bias in one tensor: L-BFGS then gathers nothing
    weight, bias = both[: classes * dim].view(classes, dim), both[classes * dim :]
    both.grad = torch.empty_like(both)
    slope_of_weight, slope_of_bias = both.grad[: classes * dim].view(classes, dim), both.grad[classes * dim :]
    optimizer = light(torch.optim.LBFGS)([both], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")
    # The gradient of the loss for log p. The closure computes what autograd would, bit for bit, in less time.
    picked = torch.zeros(len(labels), classes).scatter_(1, labels[:, None], -1 / len(labels))

    @torch.no_grad()
    def closure() -> Tensor:
        log_p = F.linear(train, weight, bias).log_softmax(1)
        slope = torch.ops.aten._log_softmax_backward_data(picked, log_p, 1, log_p.dtype)
        torch.mm(slope.T, train, out=slope_of_weight).add_(weight * (2 * regularisation))
        torch.sum(slope, 0, out=slope_of_bias)
        return F.nll_loss(log_p, labels) + regularisation * weight.square().sum()

    optimizer.step(closure)
    logits, known = F.linear(test, weight, bias).detach(), test_labels >= 0
    shares = decided_shares(logits[known], test_labels[known], slack=LOGIT_SLACK)
    return float(shares.mean()), decided(logits, test_labels, slack=LOGIT_SLACK)


def tag_precision(
    features: Float[Tensor, "n dim"],
    tags: Int[Tensor, "n tags"],
    test_features: Float[Tensor, "m dim"],
    test_tags: Int[Tensor, "m tags"],
    *,
    regularisation: float = 1e-3,
    steps: int = 100,
) -> float:
    """Fit a logistic regression for each tag on frozen, standardised features; return the mean average precision.

    The result is deterministic. Items of equal score count as one step of the curve of precision and recall. A tag that no test
    item has, or all have, is left out. Without any other tag the result is nan.

    Args:
        features, tags: rows to learn from, and 1 where an item has a tag, else 0.
        test_features, test_tags: rows to rank, and their tags.
        regularisation: weight of the sum of squared coefficients, added to the mean cross-entropy; by default 1e-3.
        steps: > 0, maximum number of iterations of L-BFGS; by default 100.

    Raises ValueError for shapes that do not fit and NaN.
    """
    from sklearn.metrics import average_precision_score

    features, test_features = finite(features=features, test_features=test_features)
    tags, test_tags = (torch.as_tensor(x).float() for x in (tags, test_tags))
    if tags.ndim != 2 or len(tags) != len(features) or test_tags.shape != (len(test_features), tags.shape[1]):
        raise ValueError(
            f"tags must be [{len(features)}, tags] and test_tags [{len(test_features)}, tags], got {list(tags.shape)} and "
            f"{list(test_tags.shape)}"
        )
    mean, spread = (
        features.float().mean(0),
        features.float().std(0, correction=min(1, len(features) - 1)).clamp(min=1e-6),
    )
    train, test = (features.float() - mean) / spread, (test_features.float() - mean) / spread
    weight = torch.zeros(tags.shape[1], train.shape[1], requires_grad=True)
    bias = torch.zeros(tags.shape[1], requires_grad=True)
    optimizer = light(torch.optim.LBFGS)([weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        each = F.binary_cross_entropy_with_logits(F.linear(train, weight, bias), tags, reduction="none")
        loss = each.mean(0).sum() + regularisation * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    first, number = distinct_rows(test)  # equal rows tie to the last bit
    scores = F.linear(test[first], weight, bias).detach()[number]
    judged = [n for n, own in enumerate(test_tags.T) if 0 < float(own.sum()) < len(own)]
    found = [average_precision_score(test_tags[:, n].numpy(), scores[:, n].numpy()) for n in judged]
    return float(np.mean(found)) if found else math.nan


class RocCounts(nn.Module):
    """Histograms of a score from -1 to 1, of negative and of positive items: the area under its ROC curve.

    It is a module, so that a run keeps and restores them.
    """

    BINS = 400

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, self.BINS))
        self.counts: Tensor

    def add(self, scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> None:
        """Count items by score and kind."""
        bins = ((scores + 1) / 2 * self.BINS).long().clamp(0, self.BINS - 1)
        self.counts.index_put_((positive.long(), bins), self.counts.new_ones(len(bins)), accumulate=True)

    def area(self) -> float:
        """Compute the probability that a positive item has the lower score. Two items in one bin count half.

        Returns nan unless there are both kinds.
        """
        good, bad = (row / row.sum() for row in self.counts.double())
        above = 1 - good.cumsum(0)
        return float((bad * (above + good / 2)).sum())


def confusion(labels: Int[Tensor, " n"], predicted: Int[Tensor, " n"], classes: int) -> Int[Tensor, "classes classes"]:
    """Count the items of each class (row) by predicted class (column)."""
    labels = item_numbers("labels", labels, len(labels))
    predicted = item_numbers("predicted", predicted, len(labels))
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def confusion_of(labels: Int[Tensor, " n"], logits: Float[Tensor, "n classes"]) -> Tensor:
    """Count the items of each class (row) by a classifier's predicted class (column).

    If t classes tie for an item, it counts 1/t for each of them.

    Returns [classes, classes] of int64, or of float64 if classes tie.
    """
    tied = _tied(logits)
    many = tied.sum(1)
    if bool((many == 1).all()):
        return confusion(labels, logits.argmax(1), logits.shape[1])
    table = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.float64)
    return table.index_add_(0, labels, tied.double() / many[:, None])


def confusion_figure(
    table: Int[Tensor, "classes classes"], classes: Sequence[str], head: str = ""
) -> dict[str, dict[str, Any]]:
    """Build the figure of a confusion table for a run's page (see counterpoint.report.found).

    Args:
        table: counts, rows are the truth.
        classes: names of the classes.
        head: prefix of the classifier's figures, for the title; "" for the learner's own.
    """
    title = "Confusion" + (f" ({head.strip('_')})" if head else "")
    return {title: {"kind": "matrix", "values": table.tolist(), "names": list(classes)}}
