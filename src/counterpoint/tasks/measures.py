"""Measures of embeddings: functions of plain arrays (numpy's or torch's), which the tasks' evaluators are made of.

    name             function              what it says
    retrieval        retrieval             recall at k, mean reciprocal rank and median rank of the right keys of queries
    identification   identification        what queries were cut from, by the votes of what they retrieve
    zero-shot        zero_shot_accuracy    share of items whose class's prompt (or mean, `class_means`) is the nearest
    knn              knn_accuracy          share of items whose class their nearest neighbours vote for
    linear-probe     linear_probe          accuracy of logistic regression on frozen features
    gap              gap_metrics           how far apart two modalities lie
    alignment, uniformity                  Wang and Isola's, of one modality's features
    tolerance        tolerance             how close together examples of one class lie

`EVALUATORS` has them by name.

>>> import numpy as np
>>> retrieval(np.eye(3), np.eye(3))["r1"]
1.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core import gap
from counterpoint.core.checks import need_alike
from counterpoint.core.contrast import EPS
from counterpoint.core.gap import gap_metrics

RECALL = (1, 5, 10)
CHUNK = 1024  # queries compared with all keys at a time


# ------------------------------------------------------------------------------------------------------------ retrieval


def retrieval_ranks(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "m dim"],
    query_group: Int[Tensor, "n ..."] | None = None,
    key_group: Int[Tensor, "m ..."] | None = None,
) -> Int[Tensor, " asked"]:
    """The rank, from 1, of each query's best right key among all keys, by dot product; keys that tie with it count before it
    when they are wrong, so that embeddings which are all alike find nothing.

    A key is right when its group is the query's; by default item i belongs to item i. With several columns of groups, [n, k]
    and [m, k], a key is right when any of its columns equals the query's: the same picture, say, or the same caption. Queries
    that no key is right for are left out. Memory O(1024 m). Raises ValueError for shapes that do not fit.
    """
    query, key = _compared(query=query, key=key)
    groups = _group_columns("query_group", query_group, len(query))
    keys = _group_columns("key_group", key_group, len(key))
    if groups.shape[1] != keys.shape[1]:
        raise ValueError(f"query_group and key_group differ in columns: {groups.shape[1]} and {keys.shape[1]}")
    asked = torch.stack([torch.isin(a, b) for a, b in zip(groups.T, keys.T, strict=True)]).any(0)
    query, groups = query[asked], groups[asked]
    ranks = torch.empty(len(query), dtype=torch.int64)
    for start in range(0, len(query), CHUNK):
        part = slice(start, start + CHUNK)
        similarity = query[part] @ key.T
        right = torch.zeros(similarity.shape, dtype=torch.bool)
        for own, other in zip(groups[part].T, keys.T, strict=True):
            right |= own[:, None] == other
        best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        # NaN is nobody's neighbour: a query of NaN ranks last.
        before = (~(similarity < best) & ~right).sum(1)
        ranks[part] = 1 + before
    return ranks


def retrieval(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "m dim"],
    query_group: Int[Tensor, "n ..."] | None = None,
    key_group: Int[Tensor, "m ..."] | None = None,
    *,
    at: Sequence[int] = RECALL,
) -> dict[str, float]:
    """Recall at each k (`r1`, ...), mean reciprocal rank (`mrr`) and median rank, of `retrieval_ranks`; nan without queries."""
    ranks = retrieval_ranks(query, key, query_group, key_group).double()
    if not len(ranks):
        return {**{f"r{k}": math.nan for k in at}, "mrr": math.nan, "median_rank": math.nan}
    return {
        **{f"r{k}": float((ranks <= k).double().mean()) for k in at},
        "mrr": float((1 / ranks).mean()),
        "median_rank": float(ranks.quantile(0.5)),
    }


def retrieval_recall(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "m dim"],
    query_group: Int[Tensor, "n ..."] | None = None,
    key_group: Int[Tensor, "m ..."] | None = None,
    *,
    at: Sequence[int] = RECALL,
) -> dict[int, float]:
    """Share of queries with a right key among their `at` most similar (see `retrieval_ranks`); 0 without queries."""
    ranks = retrieval_ranks(query, key, query_group, key_group)
    return {k: float((ranks <= k).double().mean()) if len(ranks) else 0.0 for k in at}


def identification(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "m dim"],
    query_group: Int[Tensor, " n"],
    key_group: Int[Tensor, " m"],
    *,
    neighbours: int = 25,
) -> dict[str, float]:
    """Which whole a set of snippets was cut from, by voting: every query of a group retrieves `neighbours` keys, each votes
    for its group, and groups are ranked by their votes (Carvalho, Li and Widmer, arXiv 2309.12134).

    A group without a vote takes the last rank there is, but not the first; of groups with equal votes the one whose keys lie
    nearer is first. Returns `accuracy` (the right group ranked first) and `mrr`, over the groups of the queries that keys
    have; nan where there are none. Raises ValueError for shapes that do not fit and for NaN.
    """
    query, key = _finite(query=query, key=key)
    queries, keys = (
        _numbers("query_group", query_group, len(query)),
        _numbers("key_group", key_group, len(key)),
    )
    names, column = keys.unique(return_inverse=True)
    ranks = []
    for group in queries.unique():
        at = (names == group).nonzero()
        if not len(at):
            continue
        similarity, index = (query[queries == group] @ key.T).topk(min(neighbours, len(key)), dim=1)
        voted = column[index.flatten()]
        votes = torch.bincount(voted, minlength=len(names)).double()
        nearness = torch.zeros_like(votes).index_add_(0, voted, similarity.flatten().double())
        own = int(at)
        ahead = (votes > votes[own]) | ((votes == votes[own]) & (nearness > nearness[own]))
        ranks.append(1 + int(ahead.sum()) if votes[own] > 0 else max(2, int((votes > 0).sum())))
    found = torch.tensor(ranks, dtype=torch.float64)
    if not ranks:
        return {"accuracy": math.nan, "mrr": math.nan}
    return {"accuracy": float((found == 1).double().mean()), "mrr": float((1 / found).mean())}


# --------------------------------------------------------------------------------------------------------------- classes


def zero_shot_accuracy(
    items: Float[Tensor, "n dim"], prompts: Float[Tensor, "classes dim"], labels: Int[Tensor, " n"]
) -> float:
    """Share of labelled items whose class's prompt is the most similar; items of label -1 are left out, nan if that is all.

    Raises ValueError for shapes that do not fit, classes without a prompt and NaN.
    """
    items, prompts = _finite(items=items, prompts=prompts)
    labels = _numbers("labels", labels, len(items))
    known = labels >= 0
    if not bool(known.any()):
        return math.nan
    if int(labels.max()) >= len(prompts):
        raise ValueError(f"prompts must be one for each class, got {len(prompts)} and the label {int(labels.max())}")
    return float(((items[known] @ prompts.T).argmax(1) == labels[known]).float().mean())


def class_means(
    rows: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "classes dim"], Int[Tensor, " classes"]]:
    """The normalised mean of each class's rows, and which classes they are of; rows of label -1 are left out."""
    rows = _rows("rows", rows)
    labels = _numbers("labels", labels, len(rows))
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
    """Share of test items whose class is the one their k nearest neighbours vote for, weighted by exp(cosine / temperature).

    The protocol of Wu et al. 2018 (arXiv 1805.01978) and DINO. k is cut to what there is. Examples of label -1 do not vote,
    and are not asked; nan where nobody votes or is asked. Raises ValueError for shapes that do not fit.
    """
    features, test_features = _compared(features=features, test_features=test_features)
    labels = _numbers("labels", labels, len(features))
    test_labels = _numbers("test_labels", test_labels, len(test_features))
    votes_too, asked = labels >= 0, test_labels >= 0
    labels, test_labels = labels[votes_too], test_labels[asked]
    if not len(labels) or not len(test_labels):
        return math.nan
    bank, queries = (F.normalize(rows.float(), dim=1, eps=EPS) for rows in (features[votes_too], test_features[asked]))
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    right = 0
    for start in range(0, len(queries), 1024):
        similarity, index = (queries[start : start + 1024] @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = similarity.new_zeros(len(similarity), classes)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())
        right += int((votes.argmax(1) == test_labels[start : start + 1024]).sum())
    return right / len(queries)


def linear_probe(
    features: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    test_features: Float[Tensor, "m dim"],
    test_labels: Int[Tensor, " m"],
    *,
    regularisation: float = 1e-3,
    steps: int = 100,
) -> tuple[float, Int[Tensor, " m"]]:
    """Accuracy and predictions of multinomial logistic regression on frozen, standardised features, fitted by L-BFGS.

    `regularisation` is the weight of the summed squared coefficients beside the mean cross-entropy. Deterministic. Examples
    of label -1 are neither learned from nor counted, but told. Raises ValueError for shapes that do not fit and where no
    example has a class.
    """
    features, test_features = _compared(features=features, test_features=test_features)
    labels = _numbers("labels", labels, len(features))
    test_labels = _numbers("test_labels", test_labels, len(test_features))
    features, labels = features[labels >= 0], labels[labels >= 0]
    if not len(labels):
        raise ValueError("labels: no example has a class to learn")
    mean = features.float().mean(0)
    # One example has no spread, which is not one of nan.
    spread = features.float().std(0, correction=min(1, len(features) - 1)).clamp(min=1e-6)
    train, test = (features.float() - mean) / spread, (test_features.float() - mean) / spread
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    weight = torch.zeros(classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), labels) + regularisation * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    predicted = F.linear(test, weight, bias).argmax(1)
    return float((predicted == test_labels)[test_labels >= 0].float().mean()), predicted


def confusion(labels: Int[Tensor, " n"], predicted: Int[Tensor, " n"], classes: int) -> Int[Tensor, "classes classes"]:
    """How many items of each class (row) were taken for each class (column)."""
    labels = _numbers("labels", labels, len(labels))
    predicted = _numbers("predicted", predicted, len(labels))
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def confusion_figure(
    table: Int[Tensor, "classes classes"], classes: Sequence[str], head: str = ""
) -> dict[str, dict[str, Any]]:
    """A table of confusion as a run's page draws it (see counterpoint.report.found)."""
    title = "Confusion" + (f" ({head.strip('_')})" if head else "")
    return {title: {"kind": "matrix", "values": table.tolist(), "names": list(classes)}}


# -------------------------------------------------------------------------------------------------------------- geometry


def alignment(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"], *, power: float = 2.0) -> float:
    """Mean of |x~ - y~|^power over positive pairs, x~ of unit length (Wang and Isola 2020, arXiv 2005.10242). 0 is best.

    Raises ValueError for shapes that differ.
    """
    x, y = _compared(x=x, y=y)
    need_alike("n dim", x=x, y=y)
    return float((F.normalize(x, dim=1) - F.normalize(y, dim=1)).norm(dim=1).pow(power).mean())


def uniformity(x: Float[Tensor, "n dim"], *, t: float = 2.0) -> float:
    """`core.gap.uniformity` as a number: log of the mean of exp(-t |x~_i - x~_j|^2) over pairs; nan for fewer than two rows."""
    x = _rows("x", x)
    return float(gap.uniformity(x, t=t)) if len(x) > 1 else math.nan


def tolerance(x: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> float:
    """Mean cosine of two different examples of one class: 1 where every class is a point (Wang and Liu 2021, arXiv 2012.09740,
    Sec. 4.2, over the pairs of one class).

    Args:
        x: rows, normalised here.
        labels: their classes.

    In linear memory: of each class only the sum of its rows is needed. Raises ValueError where no class has two examples.
    """
    x = _rows("x", x)
    labels = _numbers("labels", labels, len(x))
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    pairs = (counts * (counts - 1)).sum()
    if pairs == 0:
        raise ValueError("labels: no class has two examples")
    x = F.normalize(x.double(), dim=1)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, place, x)
    return float(((sums * sums).sum() - (x * x).sum()) / pairs)


def principal_axes(x: Float[Tensor, "n dim"]) -> tuple[Float[Tensor, "n 2"], list[str]]:
    """Where rows lie on their first two principal axes, and what to call these: with the share of the variance they have.

    Raises ValueError for fewer than two rows or columns.
    """
    x = _rows("x", x)
    if min(x.shape) < 2:
        raise ValueError(f"x needs two rows and two columns to have two axes, got {list(x.shape)}")
    centred = x - x.mean(0)
    _, size, axes = torch.linalg.svd(centred, full_matrices=False)
    share = size.square() / size.square().sum().clamp(min=EPS)
    names = [f"principal axis {n + 1}, {float(value):.0%} of the variance" for n, value in enumerate(share[:2])]
    return centred @ axes[:2].T, names


def gallery_rows(
    asked: Int[Tensor, " q"],
    keys: Int[Tensor, " m"],
    similarity: Float[Tensor, "q m"],
    right: Int[Tensor, "items ..."],
    shown: int,
) -> list[dict[str, Any]]:
    """What a few queries find, as a gallery shows it: each item, how similar it is and whether it is right.

    Args:
        asked, keys: items that ask and that can be found.
        similarity: of each query with each key; -inf for one that is not to be shown.
        right: of every item a number, or several; found items that have one of the query's in its place are right.
        shown: how many of each query's are shown.
    """
    values, best = similarity.topk(min(shown, int((similarity > -math.inf).sum(1).min())), dim=1)
    return [
        {
            "query": int(query),
            "found": [
                {
                    "item": int(keys[place]),
                    "similarity": round(float(value), 3),
                    "right": bool((right[keys[place]] == right[query]).any()),
                }
                for value, place in zip(of_query, places, strict=True)
            ],
        }
        for query, of_query, places in zip(asked, values, best, strict=True)
    ]


EVALUATORS: dict[str, Callable[..., Any]] = {
    "retrieval": retrieval,
    "identification": identification,
    "zero-shot": zero_shot_accuracy,
    "knn": knn_accuracy,
    "linear-probe": linear_probe,
    "gap": gap_metrics,
    "alignment": alignment,
    "uniformity": uniformity,
    "tolerance": tolerance,
}


def _rows(name: str, values: Any) -> Tensor:
    """Plain rows as a tensor [n, dim] of at least float32."""
    rows = torch.as_tensor(values).detach().cpu()
    if rows.ndim != 2:
        raise ValueError(f"{name} must be [n, dim], got {list(rows.shape)}")
    return rows if rows.dtype == torch.float64 else rows.float()


def _compared(**both: Any) -> list[Tensor]:
    """Rows that are compared with each other: of one width, and of the wider of their types."""
    rows = [_rows(name, values) for name, values in both.items()]
    if len({found.shape[1] for found in rows}) > 1:
        raise ValueError(
            f"{' and '.join(both)} must be of one width, got {' and '.join(str(r.shape[1]) for r in rows)}"
        )
    dtype = torch.float64 if any(found.dtype == torch.float64 for found in rows) else torch.float32
    return [found.to(dtype) for found in rows]


def _finite(**both: Any) -> list[Tensor]:
    """`_compared`, without NaN: that is the largest of all where torch sorts, and would be found by everybody."""
    found = _compared(**both)
    for name, rows in zip(both, found, strict=True):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    return found


def _group_columns(name: str, values: Any, count: int) -> Tensor:
    """Groups as a tensor [count, columns]; by default every row is a group of its own."""
    found = torch.arange(count) if values is None else torch.as_tensor(values).cpu()
    if found.ndim == 2 and len(found) == count and found.shape[1] and not found.is_floating_point():
        return found.long()
    return _numbers(name, found, count)[:, None]


def _numbers(name: str, values: Any, count: int) -> Tensor:
    """Plain whole numbers as a tensor [count]."""
    found = torch.as_tensor(values).cpu()
    if found.shape != (count,) or found.is_floating_point():
        raise ValueError(f"{name} must be {count} whole numbers, got {list(found.shape)} of {found.dtype}")
    return found.long()
