"""Find nearest rows among many by an inverted file (faiss), with a recall that is measured against exact neighbours.

Rows are clustered, and a row looks for neighbours in the clusters nearest to it. The number of these clusters is doubled until a
sample of rows finds enough of its exact neighbours; with all clusters the search is exact. Source: the inverted file of Jegou,
Douze, Schmid, PAMI 2011.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, need_within
from counterpoint.core.neighbours import Neighbours
from counterpoint.core.operands import unit
from counterpoint.core.transforms import holds

SAMPLE = 256  # rows whose recall is measured
TRAINED = 64  # rows for each cluster that train the clusters
FIRST = 4  # clusters at first


class Approximate(NamedTuple):
    neighbours: Neighbours
    recall: float  # share of the exact neighbours that a sample of rows finds
    visited: int  # clusters that a row looks at
    clusters: int


@torch.no_grad()
def approximate_rows(
    rows: Float[Tensor, "n dim"], k: int, *, recall: float = 0.95, clusters: int | None = None, seed: int = 0
) -> Approximate:
    """Find about the k nearest rows of each row by cosine, the nearest first. Each row's first neighbour is itself.

    Args:
        rows: finite rows, which this function normalises.
        k: number of neighbours, at least 1, the row itself included; at most n are returned.
        recall: least share of the exact neighbours that a sample of rows finds, 0 to 1, by default 0.95.
        clusters: number of clusters, 1 to n. None (default): 4 sqrt(n), at most n / 16.
        seed: seed of the clusters' centres and of the sample.

    A row that finds fewer than k neighbours has itself in the other places, with similarity 0. Memory is O(n (k + dim)).
    Raises ValueError for an empty batch, rows that are not finite and numbers out of range, ImportError without faiss.

    >>> found = approximate_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.2, 1.0]]), 2)
    >>> found.neighbours.rows.tolist(), found.recall
    ([[0, 2], [1, 2], [2, 1]], 1.0)
    """
    need_rows(rows=rows)
    need_positive(k=k)
    need_within(0, 1, recall=recall)
    if holds(~rows.isfinite().all()):
        raise ValueError("rows must be finite, got NaN or infinite entries")
    n, k = len(rows), min(k, len(rows))
    count = max(1, min(round(4 * n**0.5), n // 16)) if clusters is None else clusters
    need_within(1, n, clusters=count)
    faiss = importlib.import_module("faiss")
    points = np.ascontiguousarray(unit(rows.detach().float()).cpu().numpy())
    generator = np.random.default_rng(seed)
    sample = generator.permutation(n)[:SAMPLE]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(points.shape[1]), points.shape[1], count, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.min_points_per_centroid = 1
    index.train(points[generator.permutation(n)[: TRAINED * count]])
    index.add(points)
    kth = np.partition(points[sample] @ points.T, n - k, axis=1)[:, n - k]
    visited, share = min(FIRST, count), 0.0
    while True:
        index.nprobe = visited
        similarity, found = index.search(points[sample], k)
        share = float(((found >= 0) & (similarity >= kth[:, None] - 1e-6)).sum(1).mean() / k)
        if share >= recall or visited == count:
            break
        visited = min(2 * visited, count)
    similarity, found = index.search(points, k)
    at, near = _itself_first(torch.from_numpy(found), torch.from_numpy(similarity))
    near[:, 0] = torch.from_numpy((points**2).sum(1))
    return Approximate(Neighbours(at.to(rows.device), near.to(rows.device)), share, visited, count)


def _itself_first(found: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Put each row itself before its neighbours, and in the places of neighbours that were not found."""
    own = torch.arange(len(found))[:, None]
    missing = found < 0
    found = torch.where(missing, own, found)
    similarity = torch.where(missing, 0.0, similarity)
    itself = (found == own) & ~missing
    # Where it is not among them (equal rows), it takes the place of the last.
    last = ~itself.any(1)
    found[last, -1], itself[last, -1] = own[last, 0], True
    order = (~itself).long().argsort(dim=1, stable=True)
    return found.gather(1, order), similarity.gather(1, order)
