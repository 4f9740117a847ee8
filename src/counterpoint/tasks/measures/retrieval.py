"""Measure retrieval: ranks, recall, reciprocal rank, chance, and the votes of retrieved items."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.rows import Keys
from counterpoint.tasks.measures.checks import compared, finite, group_columns, item_numbers

RECALL = (1, 5, 10)
CHUNK = 1024  # queries compared with all keys per pass
SLACK = 1e-9  # relative difference below which two sums of votes are equal, whatever the order of their terms


def retrieval_ranks(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "m dim"],
    query_group: Int[Tensor, "n ..."] | None = None,
    key_group: Int[Tensor, "m ..."] | None = None,
) -> Int[Tensor, " asked"]:
    """Rank each query's best right key among all keys, from 1, by dot product.

    Wrong keys that tie with it count before it, so that equal embeddings find nothing. Queries without a right key are left
    out. Memory O(1024 m).

    Args:
        query, key: rows to compare by their dot product.
        query_group, key_group: [n] and [m] numbers; a key is right if its number is the query's. With several columns, [n, k]
            and [m, k], it is right if any column is equal, such as the same picture or the same caption. None: row numbers,
            so item i belongs to item i.

    Raises ValueError for shapes that do not fit.
    """
    query, key = compared(query=query, key=key)
    groups = group_columns("query_group", query_group, len(query))
    keys = group_columns("key_group", key_group, len(key))
    if groups.shape[1] != keys.shape[1]:
        raise ValueError(f"query_group and key_group differ in columns: {groups.shape[1]} and {keys.shape[1]}")
    asked = torch.stack([torch.isin(a, b) for a, b in zip(groups.T, keys.T, strict=True)]).any(0)
    query, groups = query[asked], groups[asked]
    ranks = torch.empty(len(query), dtype=torch.int64)
    bank = Keys(key)
    for start in range(0, len(query), CHUNK):
        part = slice(start, start + CHUNK)
        similarity = bank.products(query[part])
        right = _matches(groups[part], keys)
        best = similarity.masked_fill(~right, -math.inf).amax(1, keepdim=True)
        # NaN is nearest to no query, so a query of NaN ranks last.
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


def retrieval_chance(
    query_group: Int[Tensor, "n ..."],
    key_group: Int[Tensor, "m ..."],
    *,
    at: Sequence[int] = RECALL,
) -> dict[str, float]:
    """Compute the mean results of `retrieval` if keys are ranked in random order.

    Args:
        query_group, key_group: as for `retrieval`.
        at: ranks k of the recalls; by default 1, 5 and 10.

    Returns recall at each k (`r1`, ...) and mean reciprocal rank (`mrr`); nan if no query has a right key. With g right keys
    among m, one of them has rank k or less with probability

        1 - C(m - g, k) / C(m, k)

    >>> retrieval_chance(torch.arange(4), torch.arange(4), at=(1, 2))["r2"]
    0.5
    """
    queries, keys = (
        found[:, None] if (found := torch.as_tensor(values).cpu().long()).ndim == 1 else found
        for values in (query_group, key_group)
    )
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"query_group and key_group must fit, got {list(queries.shape)} and {list(keys.shape)}")
    total = len(keys)
    counts = [_matches(part, keys).sum(1) for part in queries.split(CHUNK)]
    right, many = torch.cat(counts or [torch.zeros(0, dtype=torch.int64)]).unique(return_counts=True)
    right, many = right[right > 0].double(), many[right > 0].double()
    if not len(right):
        return {**{f"r{k}": math.nan for k in at}, "mrr": math.nan}
    ranks = torch.arange(1, total + 1, dtype=torch.float64)
    recall, reciprocal = dict.fromkeys(at, 0.0), 0.0
    for count, weight in zip(right, many / many.sum(), strict=True):
        # The chance that none of the first k keys is right.
        missed = torch.cumprod(((total - count - ranks + 1) / (total - ranks + 1)).clamp(min=0), 0)
        for k in at:
            recall[k] += float(weight) * (1.0 if k >= total else 1 - float(missed[k - 1]))
        first = torch.cat([torch.ones(1, dtype=torch.float64), missed[:-1]]) - missed
        reciprocal += float(weight) * float((first / ranks).sum())
    return {**{f"r{k}": value for k, value in recall.items()}, "mrr": reciprocal}


def _matches(queries: Int[Tensor, "n columns"], keys: Int[Tensor, "m columns"]) -> Bool[Tensor, "n m"]:
    """Return whether a key and a query have the same number in any column."""
    right = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for own, other in zip(queries.T, keys.T, strict=True):
        right |= own[:, None] == other
    return right


def class_chance(classes: int) -> float:
    """Return the share of items that a uniform guess among `classes` classes gets right; nan for no classes.

    >>> class_chance(4)
    0.25
    """
    return 1 / classes if classes > 0 else math.nan


def identification(
    query: Float[Tensor, "n dim"],
    key: Float[Tensor, "m dim"],
    query_group: Int[Tensor, " n"],
    key_group: Int[Tensor, " m"],
    *,
    neighbours: int = 25,
) -> dict[str, float]:
    """Identify the whole that a set of snippets was cut from, by voting (Carvalho, Li and Widmer, arXiv 2309.12134).

    Every query of a group retrieves `neighbours` keys, and each key votes for its group. Groups are ranked by their votes.
    Keys that tie for the last places share these places. A group without a vote takes the last rank, but never the first.
    Among groups with equal votes, the group with the nearer keys ranks first. Groups that tie in both share their ranks: the
    figures are the expectation over their random order. Equal embeddings therefore score chance.

    Args:
        query, key: rows to compare by their dot product.
        query_group, key_group: number of the group of each row.
        neighbours: > 0, keys that each query retrieves, at most the number of keys; by default 25.

    Returns `accuracy` (the share of groups that rank first) and `mrr`, over the queries' groups that have keys. Both are nan
    if there are no such groups. Raises ValueError for shapes that do not fit and for NaN.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    query, key = finite(query=query, key=key)
    queries, keys = (
        item_numbers("query_group", query_group, len(query)),
        item_numbers("key_group", key_group, len(key)),
    )
    names, column = keys.unique(return_inverse=True)
    bank = Keys(key)
    first, reciprocal = list[float](), list[float]()
    for group in queries.unique():
        at = (names == group).nonzero()
        if not len(at):
            continue
        votes, nearness = torch.zeros(2, len(names), dtype=torch.float64)
        for part in query[queries == group].split(CHUNK):
            similarity = bank.products(part)
            weight = nearest_weights(similarity, neighbours)
            votes.index_add_(0, column, weight.sum(0))
            nearness.index_add_(0, column, (weight * similarity.double()).sum(0))
        own = int(at)
        if votes[own] <= 0:
            rank = max(2, int((votes > 0).sum()))
            first.append(0.0)
            reciprocal.append(1 / rank)
            continue
        alike = _equal(votes, votes[own])
        near = _equal(nearness, nearness[own])
        ahead = int(((~alike & (votes > votes[own])) | (alike & ~near & (nearness > nearness[own]))).sum())
        tied = int((alike & near).sum())
        first.append(1 / tied if ahead == 0 else 0.0)
        reciprocal.append(sum(1 / (ahead + place) for place in range(1, tied + 1)) / tied)
    if not first:
        return {"accuracy": math.nan, "mrr": math.nan}
    return {"accuracy": math.fsum(first) / len(first), "mrr": math.fsum(reciprocal) / len(first)}


def _equal(values: Tensor, value: Tensor) -> Tensor:
    return (values - value).abs() <= SLACK * value.abs().clamp(min=1e-30)


def nearest_weights(similarity: Float[Tensor, "n m"], k: int) -> Float[Tensor, "n m"]:
    """Weigh each key as one of a query's k nearest: 1, 0, or its share of the last places if keys tie for these."""
    k = min(k, similarity.shape[1])
    last = similarity.topk(k, dim=1).values[:, -1:]
    nearer, tied = similarity > last, similarity == last
    share = (k - nearer.sum(1, keepdim=True)).double() / tied.sum(1, keepdim=True)
    return nearer.double() + tied.double() * share
