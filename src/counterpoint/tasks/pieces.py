"""Rank matching snippets, and identify the piece that a query's snippets come from."""

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
    """Ranks of the right snippets. `hits[k]` counts the queries whose right snippet is among the first k."""

    ranks: Int[Tensor, " n"]
    mean_rank: float
    med_rank: float
    map: float  # mean reciprocal rank, which equals mean average precision with one right answer
    mean_dist: float  # mean cosine distance between queries and their matches
    hits: dict[int, int]


@full_precision
def retrieval_metrics(
    query: Float[Tensor, "n dim"], database: Float[Tensor, "n dim"], at: Sequence[int] = (1, 5, 10, 25)
) -> RetrievalMetrics:
    """Rank row i of the database, from 1, by its cosine similarity to row i of the query.

    This function normalises rows. Rows that tie with the match count before it, so that equal embeddings find nothing. The
    authors' code breaks ties by position.

    Args:
        query, database: rows, of which row i matches row i.
        at: numbers k of `hits`; by default 1, 5, 10 and 25.

    Raises ValueError for different shapes, no rows and values that are not finite. Source: the authors' code,
    utils/train_utils.py.

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
    """Normalise rows. Raises ValueError for values that are not finite."""
    for name, value in rows.items():
        if holds(~value.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    return [unit(value) for value in rows.values()]


class PieceVotes(NamedTuple):
    """Candidate pieces, best first. A piece without a vote has the rank of the last piece with votes."""

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
    """Identify the piece of a query's snippets: each snippet votes for the pieces of its nearest snippets.

    This function normalises rows. Among pieces with equal votes, the nearer piece is first.

    Args:
        query: snippets of one piece in their order, in one modality.
        database: snippets of all candidate pieces in the other modality.
        pieces: number of the piece of each row of the database.
        neighbours: number of snippets that a query's snippet retrieves, each of which is a vote; by default 25.
        snippets: number of the query's snippets to use, equally spaced; by default 100. All if there are fewer.

    Raises ValueError for shapes that do not fit, no rows, numbers below 1 and values that are not finite. The task `aligned`
    measures the same on test splits with groups, with all snippets of each piece. Its figures are
    `<a>_to_<b>_group_accuracy` and `..._group_mrr`. Source: the authors' code, audio_sheet_server.py.

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
    # Sort by nearness, then by votes; the second sort is stable.
    order = nearness.argsort(descending=True, stable=True)
    order = order[votes[order].argsort(descending=True, stable=True)]
    ranks = torch.arange(1, len(names) + 1, device=order.device).clamp(max=int((votes > 0).sum()))
    return PieceVotes(names[order], votes[order], ranks)
