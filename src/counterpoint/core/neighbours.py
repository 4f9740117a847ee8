"""Find nearest rows, rank them again by the neighbours that they share, and smooth features over their graph.

- `nearest_rows`: exact neighbours by cosine, a block of queries at a time.
- `k_reciprocal_rerank`: distances that mix the original one with the Jaccard distance of k-reciprocal neighbours. Source:
  Zhong, Zheng, Cao, Li, CVPR 2017, arXiv 1701.08398.
- `rerank_lists`: the same for each row inside its own list of neighbours.
- `graph_smooth`: features averaged over a symmetric graph. Source: SGC, Wu et al., ICML 2019, arXiv 1902.07153.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_numbers, need_positive, need_rows, need_within, shapes
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds

CELLS = 1 << 24  # similarities in memory at a time
PLACES = 5  # decimal places in which distances differ


class Neighbours(NamedTuple):
    rows: Int[Tensor, "n k"]
    similarity: Float[Tensor, "n k"]


@torch.no_grad()
def nearest_rows(rows: Float[Tensor, "n dim"], k: int) -> Neighbours:
    """Find the k nearest rows of each row by cosine, the nearest first. Each row's first neighbour is itself.

    Args:
        rows: finite rows, which this function normalises. A row of zeros has cosine 0 with all others.
        k: number of neighbours, at least 1, the row itself included; at most n are returned.

    Memory is O(n k) and a block of similarities. Raises ValueError for an empty batch, rows that are not finite and k < 1.

    >>> nearest_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.2, 1.0]]), 2).rows.tolist()
    [[0, 2], [1, 2], [2, 1]]
    """
    need_rows(rows=rows)
    need_positive(k=k)
    if holds(~rows.isfinite().all()):
        raise ValueError("rows must be finite, got NaN or infinite entries")
    x, n = unit(rows.detach().float()), len(rows)
    at, found = torch.arange(n, device=rows.device), list[tuple[Tensor, Tensor]]()
    for own in at.split(max(1, CELLS // n)):
        cosine = x[own] @ x.T
        cosine[torch.arange(len(own), device=rows.device), own] = torch.inf  # before equal rows
        values, index = cosine.topk(min(k, n), 1)
        values[:, 0] = (x[own] ** 2).sum(1)
        found.append((index, values))
    return Neighbours(torch.cat([index for index, _ in found]), torch.cat([values for _, values in found]))


@torch.no_grad()
@full_precision
def k_reciprocal_rerank(
    probe: Float[Tensor, "p dim"], gallery: Float[Tensor, "n dim"], k1: int = 20, k2: int = 6, lam: float = 0.3
) -> Float[Tensor, "p n"]:
    """Compute re-ranked distances: (1 - lam) Jaccard distance of k-reciprocal neighbours + lam original distance.

    The original distance is the squared Euclidean one. Each row's distances are divided by the largest of them, over probe
    and gallery. The neighbours of a row within k1 that have it among theirs are its k-reciprocal ones. Those of a neighbour
    within k1 / 2 join, if more than two thirds of them are in the set. Members weigh exp(-distance), and a row's weights are
    the mean over its k2 nearest rows.

    Args:
        probe, gallery: finite rows, not normalised here.
        k1: number of neighbours that are reciprocal, at least 1, by default 20.
        k2: number of rows whose weights are averaged, at least 1, by default 6.
        lam: share of the original distance, 0 to 1, by default 0.3.

    Memory is O((p + n)^2). Raises ValueError for empty or unlike rows and numbers out of range. Source: Zhong et al. 2017.

    >>> near, far = k_reciprocal_rerank(torch.zeros(1, 2), torch.tensor([[0.1, 0.0], [3.0, 0.0]]), 1, 1)[0]
    >>> bool(near < far)
    True
    """
    need_rows(probe=probe, gallery=gallery)
    need_positive(k1=k1, k2=k2)
    need_within(0, 1, lam=lam)
    if probe.ndim != 2 or gallery.ndim != 2 or probe.shape[1] != gallery.shape[1]:
        raise ValueError(f"probe and gallery must be rows of one width, got {shapes(probe=probe, gallery=gallery)}")
    rows = torch.cat([probe, gallery])[None]
    return _reranked(rows, k1, k2, lam)[0, : len(probe), len(probe) :]


def _reranked(rows: Float[Tensor, "lists m dim"], k1: int, k2: int, lam: float) -> Float[Tensor, "lists m m"]:
    """Return the re-ranked distances within each list of rows."""
    m = rows.shape[1]
    squared = (rows**2).sum(2)
    distance = (squared[:, :, None] + squared[:, None] - 2 * rows @ rows.mT).clamp(min=0)
    distance = distance / distance.amax(2, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    # Ties go to the row of lower position. Distances that differ by rounding alone are ties.
    order = distance.round(decimals=PLACES).argsort(dim=2, stable=True)
    rank = torch.empty_like(order).scatter_(2, order, torch.arange(m, device=rows.device).expand_as(order))
    member = _reciprocal(rank, k1)
    half = _reciprocal(rank, round(k1 / 2))
    # Candidate c joins i's set: c in the set of i, and |half(c) & set(i)| > 2/3 |half(c)|.
    shared = member.to(rows.dtype) @ half.to(rows.dtype).mT
    joins = member & (shared > 2 / 3 * half.sum(2)[:, None])
    member = member | (joins.to(rows.dtype) @ half.to(rows.dtype) > 0)
    weight = torch.where(member, (-distance).exp(), torch.zeros_like(distance))
    weight = weight / weight.sum(2, keepdim=True)
    if k2 > 1:
        near = (rank < k2).to(rows.dtype)
        weight = near @ weight / near.sum(2, keepdim=True)
    least = torch.stack([torch.minimum(weight[:, i : i + 1], weight).sum(2) for i in range(m)], 1)
    return (1 - lam) * (1 - least / (2 - least)) + lam * distance


def _reciprocal(rank: Int[Tensor, "lists m m"], k: int) -> Bool[Tensor, "lists m m"]:
    """Return whether i and j are among each other's k nearest rows, each row itself besides."""
    near = rank <= k
    return near & near.mT


@torch.no_grad()
@full_precision
def rerank_lists(
    rows: Float[Tensor, "n dim"], neighbours: Int[Tensor, "n k"], keep: int, k1: int = 20, k2: int = 6, lam: float = 0.3
) -> Neighbours:
    """Rank each row's neighbours again inside its own list, and keep the first ones, the row itself as the first.

    Args:
        rows: rows, which this function normalises.
        neighbours: for each row its nearest rows, itself as the first (see `nearest_rows`).
        keep: number of neighbours to keep, 1 to k, the row itself included.
        k1, k2, lam: see `k_reciprocal_rerank`.

    The similarity is 1 - re-ranked distance, 1 for the row itself. Raises ValueError for numbers out of range.
    """
    need_rows(rows=rows)
    need_within(1, neighbours.shape[1], keep=keep)
    need_positive(k1=k1, k2=k2)
    need_within(0, 1, lam=lam)
    x, k = unit(rows), neighbours.shape[1]
    found = []
    for part in neighbours.split(max(1, CELLS // (16 * (k + 1) ** 2))):
        # The gallery has the query itself, as the authors' does: the list with the query before it.
        lists = x[torch.cat([part[:, :1], part], 1)]
        distance = _reranked(lists, k1, k2, lam)[:, 0, 1:]
        distance[:, 0] = -torch.inf
        at = distance.round(decimals=PLACES).argsort(dim=1, stable=True)[:, :keep]
        values = distance.gather(1, at)
        values[:, 0] = 0
        found.append((part.gather(1, at), 1 - values))
    return Neighbours(torch.cat([index for index, _ in found]), torch.cat([value for _, value in found]))


@torch.no_grad()
@full_precision
def graph_smooth(
    neighbours: Int[Tensor, "n k"],
    similarity: Float[Tensor, "n k"],
    text: Float[Tensor, "n dim"],
    self_weight: float = 0.0,
    degree: int = 1,
) -> Float[Tensor, "n dim"]:
    """Average features over a graph of neighbours, `degree` hops.

    Edges weigh their similarity, clipped to 0..1. The graph is made symmetric by the larger weight of both directions, and its
    rows are divided by their sums. Then `self_weight` of the row itself is added, and rows are divided again.

    Args:
        neighbours: for each row its neighbours; the first is the row itself, and is dropped. Other edges to itself are, too.
        similarity: weights of the edges.
        text: features to smooth. A missing one is a row of zeros.
        self_weight: weight of the row's own features, at least 0, by default 0.
        degree: number of hops, at least 1, by default 1.

    A row without edges and without own weight is 0. The graph is sparse: memory is O(n (k + dim)). Raises ValueError for shapes
    that do not fit, positions outside the rows and numbers out of range.

    >>> graph_smooth(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2), torch.eye(2))
    tensor([[0., 1.],
            [1., 0.]])
    """
    need_rows(text=text)
    need_positive(degree=degree)
    n = len(text)
    if neighbours.ndim != 2 or similarity.shape != neighbours.shape or text.ndim != 2 or len(neighbours) != n:
        raise ValueError(
            "neighbours and similarity must be [n, k] alike and text [n, dim], got "
            f"{shapes(neighbours=neighbours, similarity=similarity, text=text)}"
        )
    if not self_weight >= 0:
        raise ValueError(f"self_weight must be at least 0, got {self_weight}")
    need_numbers(n, neighbours=neighbours)
    to = neighbours[:, 1:].flatten()
    at = torch.arange(n, device=to.device).repeat_interleave(neighbours.shape[1] - 1)
    weight = similarity[:, 1:].clamp(0, 1).to(text.dtype).flatten()
    other = at != to
    at, to, weight = at[other], to[other], weight[other]
    edge, place = torch.cat([at * n + to, to * n + at]).unique(return_inverse=True)
    weight = weight.new_zeros(len(edge)).scatter_reduce_(0, place, weight.repeat(2), "amax")
    at, to = edge // n, edge % n

    def normalised() -> Tensor:
        total = weight.new_zeros(n).index_add_(0, at, weight)
        return weight / torch.where(total > 0, total, 1)[at]

    weight = normalised()
    if self_weight:
        own = torch.arange(n, device=to.device)
        at, to = torch.cat([at, own]), torch.cat([to, own])
        weight = torch.cat([weight, weight.new_full((n,), self_weight)])
        weight = normalised()
    graph = torch.sparse_coo_tensor(torch.stack([at, to]), weight, (n, n), check_invariants=False)
    for _ in range(int(degree)):
        text = torch.sparse.mm(graph, text)
    return text
