"""Retrieval that a scorer of pairs re-ranks: the nearest keys by similarity are scored pair by pair.

Source: evaluation() of the authors' Retrieval.py of ALBEF (arXiv 2107.07651).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.tasks.measures import retrieval

PAIRS = 256  # pairs that are scored at a time


def rerank(
    similarity: Float[Tensor, "n m"],
    score: Callable[[Int[Tensor, " pairs"], Int[Tensor, " pairs"]], Float[Tensor, " pairs"]],
    k: int,
) -> Float[Tensor, "n m"]:
    """Scores for ranking: of each query's k nearest keys by similarity what `score` says, -100 for all others.

    Args:
        similarity: of queries (rows) and keys.
        score: (queries, keys), numbers of rows and columns, -> a score each, such as ITM's logit; asked for 256 at a time.
        k: > 0; more than there are keys is all of them.

    Raises ValueError for a k that is not positive.

    >>> rerank(torch.tensor([[3.0, 2.0, 1.0]]), lambda query, key: key.float(), 2)
    tensor([[   0.,    1., -100.]])
    """
    need_positive(k=k)
    nearest = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    queries = torch.arange(len(similarity), device=similarity.device).repeat_interleave(nearest.shape[1])
    keys = nearest.flatten()
    found = [score(a, b) for a, b in zip(queries.split(PAIRS), keys.split(PAIRS), strict=True)]
    scores = torch.full_like(similarity, -100.0)
    scores[queries, keys] = torch.cat(found).to(scores.dtype)
    return scores


def reranked_retrieval(
    first: tuple[str, Float[Tensor, "n dim"]],
    second: tuple[str, Float[Tensor, "n dim"]],
    score: Callable[[Int[Tensor, " pairs"], Int[Tensor, " pairs"]], Float[Tensor, " pairs"]],
    k: int,
    groups: Int[Tensor, "n kinds"],
) -> dict[str, float]:
    """Measure recall at 1, 5 and 10 of both directions after re-ranking, and their mean.

    Args:
        first, second: name and unit embeddings of each side; row i of one belongs to row i of the other.
        score: (rows of the first, rows of the second) -> a score each.
        k: > 0, how many of the nearest keys are scored.
        groups: numbers of each item; items that share one are right for each other.

    Returns `reranked_<first>_to_<second>_r1` and so on, and `reranked_mean_recall`.
    """
    (a, x), (b, y) = first, second
    both: Any = (
        (a, b, x @ y.T, score),
        (b, a, y @ x.T, lambda queries, keys: score(keys, queries)),
    )
    everyone = torch.eye(len(x), device=x.device)
    found: dict[str, float] = {}
    for one, other, similarity, asked in both:
        # Each key is one place of its own, so that products with the scores are the scores.
        measured = retrieval(rerank(similarity, asked, k), everyone, groups, groups)
        found |= {f"reranked_{one}_to_{other}_{name}": measured[name] for name in ("r1", "r5", "r10")}
    return found | {"reranked_mean_recall": float(np.mean(list(found.values())))}
