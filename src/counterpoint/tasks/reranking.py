"""Re-rank retrieval with a scorer of pairs: score the nearest keys by similarity pair by pair.

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

PAIRS = 256  # pairs scored per call


def rerank(
    similarity: Float[Tensor, "n m"],
    score: Callable[[Int[Tensor, " pairs"], Int[Tensor, " pairs"]], Float[Tensor, " pairs"]],
    k: int,
) -> Float[Tensor, "n m"]:
    """Compute scores for ranking: the value of `score` for each query's k nearest keys, -100 for all others.

    Args:
        similarity: similarity of queries (rows) and keys (columns).
        score: maps numbers of rows and of columns to a score per pair, such as ITM's logit. One call has at most 256 pairs.
        k: > 0, number of keys to score; a larger number than there are keys means all.

    Raises ValueError if k is not positive.

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
        score: maps rows of the first and rows of the second to a score per pair.
        k: > 0, number of nearest keys to score.
        groups: numbers of each item; items that share a number in any column are right for each other.

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
        # Keys are one-hot rows, so that their products with the scores are the scores.
        measured = retrieval(rerank(similarity, asked, k), everyone, groups, groups)
        found |= {f"reranked_{one}_to_{other}_{name}": measured[name] for name in ("r1", "r5", "r10")}
    return found | {"reranked_mean_recall": float(np.mean(list(found.values())))}
