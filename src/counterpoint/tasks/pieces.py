"""Ranks of matching snippets, and the piece that a query's snippets come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, shapes
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds
from counterpoint.tasks.measures import retrieval_ranks


class RetrievalMetrics(NamedTuple):
    """How the right snippets rank. `hits[k]` counts queries with theirs among the first k."""

    ranks: Int[Tensor, " n"]
    mean_rank: float
    med_rank: float
    map: float  # mean reciprocal rank, which mean average precision is with one right answer
    mean_dist: float  # mean cosine distance between queries and their matches
    hits: dict[int, int]


@full_precision
def retrieval_metrics(
    query: Float[Tensor, "n dim"], database: Float[Tensor, "n dim"], at: Sequence[int] = (1, 5, 10, 25)
) -> RetrievalMetrics:
    """Rank, from 1, of row i of the database by cosine similarity to row i of the query, and what follows.

    Rows are normalised here. What ties with the match counts before it, so that embeddings which are all alike find
    nothing (the authors' code breaks ties by position). Raises ValueError for shapes that differ, no rows and values
    that are not finite. Source: the authors' code, utils/train_utils.py.

    >>> retrieval_metrics(torch.eye(3), torch.eye(3).roll(1, 0)).map  # each match ties with a wrong one
    0.3333333333333333
    """
    need_alike("n dim", query=query, database=database)
    q, d = _directions(query=query, database=database)
    ranks = retrieval_ranks(q, d)
    exact = ranks.double()
    return RetrievalMetrics(
        ranks,
        float(exact.mean()),
        float(exact.quantile(0.5)),
        float((1 / exact).mean()),
        float((1 - (q * d).sum(1)).mean()),
        {k: int((ranks <= k).sum()) for k in at},
    )


def _directions(**rows: Tensor) -> list[Tensor]:
    """Unit rows; ValueError where they have no direction."""
    for name, value in rows.items():
        if holds(~value.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    return [unit(value) for value in rows.values()]


class PieceVotes(NamedTuple):
    """Candidate pieces, best first. A piece without a vote has the rank of the last one that has some."""

    pieces: Int[Tensor, " p"]
    votes: Int[Tensor, " p"]
    ranks: Int[Tensor, " p"]


@full_precision
def identify_pieces(
    query: Float[Tensor, "n dim"],
    database: Float[Tensor, "m dim"],
    pieces: Int[Tensor, " m"],
    *,
    neighbours: int = 25,
    snippets: int = 100,
) -> PieceVotes:
    """Which piece the snippets of one query come from: each votes for the pieces of its nearest ones.

    Args:
        query: snippets of one piece in their order, in one modality.
        database: snippets of all candidate pieces in the other.
        pieces: the piece of each of the database's.
        neighbours: how many a snippet retrieves, each of which is a vote.
        snippets: of the query, equally spaced; all when there are fewer.

    Rows are normalised here; of pieces with equally many votes the nearer is first. Raises ValueError for shapes that
    do not fit, nothing to compare, numbers below 1 and values that are not finite. The task `aligned` measures the same
    of every test split whose items have groups, with all snippets of each piece (`<a>_to_<b>_group_accuracy`,
    `..._group_mrr`). Source: the authors' code, audio_sheet_server.py.

    >>> identify_pieces(torch.eye(3)[:2], torch.eye(3), torch.tensor([7, 7, 4]), neighbours=1).pieces
    tensor([7, 4])
    """
    if query.ndim != 2 or database.ndim != 2 or query.shape[1] != database.shape[1]:
        raise ValueError(
            f"query and database must be [n, dim] and [m, dim], got {shapes(query=query, database=database)}"
        )
    if not len(query) or pieces.shape != (len(database),) or not len(database):
        raise ValueError(f"there must be a query and a piece for each row of the database, got {shapes(pieces=pieces)}")
    if neighbours < 1 or snippets < 1:
        raise ValueError(f"neighbours and snippets must be at least 1, got {neighbours} and {snippets}")
    if len(query) > snippets:
        query = query[torch.linspace(0, len(query) - 1, snippets, dtype=torch.float64).round().long()]
    q, d = _directions(query=query, database=database)
    similarity, found = (q @ d.T).topk(min(neighbours, len(d)), dim=1)
    names, column = pieces.unique(return_inverse=True)
    voted = column[found.flatten()]
    votes = torch.bincount(voted, minlength=len(names))
    nearness = similarity.new_zeros(len(names), dtype=torch.float64)
    nearness.index_add_(0, voted, similarity.flatten().double())
    # The nearer first, then, keeping that order among equals, those with more votes.
    order = nearness.argsort(descending=True, stable=True)
    order = order[votes[order].argsort(descending=True, stable=True)]
    ranks = torch.arange(1, len(names) + 1, device=order.device).clamp(max=int((votes > 0).sum()))
    return PieceVotes(names[order], votes[order], ranks)
