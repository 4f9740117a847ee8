"""Similarities of sets as weights of pairs, without their matrix: one tile at a time, and only between distinct sets.

`JaccardSets` computes the similarities |A n B| / |A u B| of a tile. `PairScores` holds scores of the pairs of n examples, by
classes of equal examples. `scored_sums` multiplies the matrix of scores between classes by rows. `weighted_others` sums
rows with weights or scores. `soft_supcon` contrasts two passes with such weights (SPACE-2, Eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, place
from counterpoint.core.operands import unit
from counterpoint.core.precision import exact, full_precision
from counterpoint.core.rules import Block, Diagonal
from counterpoint.core.transforms import holds, traced
from counterpoint.core.world import over_group

FEW = 512  # examples up to which the matrix of scores is faster than its tiles
LARGEST = 2**62  # bound of the numbers of rows
TILE = 512  # classes whose scores with all others are held at a time


def joined_numbers(columns: Int[Tensor, "n columns"]) -> Int[Tensor, " n"]:
    """Give each row one number, so that equal rows share it and no others do. All entries must be at least 0.

    >>> joined_numbers(torch.tensor([[5, 1], [0, 1], [5, 1]])).tolist()
    [11, 1, 11]
    """
    number, bound = torch.zeros(len(columns), dtype=torch.int64, device=columns.device), 1
    for column in columns.T if len(columns) else ():
        size = int(column.max()) + 1
        if bound * size > LARGEST:
            number, column = (x.unique(return_inverse=True)[1] for x in (number, column))
            bound, size = (int(x.max()) + 1 for x in (number, column))
        number, bound = number * size + column, bound * size
    return number


def packed_sets(ids: Int[Tensor, "n most"], there: Bool[Tensor, "n most"]) -> Int[Tensor, "n most"]:
    """Write each set once: distinct numbers in ascending order, then -1.

    Args:
        ids: numbers, at least 0.
        there: False at padding.

    >>> packed_sets(torch.tensor([[4, 2, 4]]), torch.tensor([[True, True, True]]))
    tensor([[ 2,  4, -1]])
    """
    if not ids.shape[1]:
        return ids
    last = torch.iinfo(ids.dtype).max
    ordered = ids.masked_fill(~there, last).sort(1).values
    again = torch.zeros_like(there)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    ordered = ordered.masked_fill(again, last).sort(1).values
    return ordered.masked_fill(ordered == last, -1)


def set_numbers(sets: Int[Tensor, "n most"]) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " n"]]:
    """Return the position of one example of each distinct set, and the number of each example's set.

    Args:
        sets: as `packed_sets` returns them.
    """
    names, number = joined_numbers(sets + 1).unique(return_inverse=True)
    many = len(names)
    at = torch.arange(len(number), device=sets.device)
    return at.new_full((many,), len(number)).scatter_reduce_(0, number, at, "amin"), number


class JaccardSets:
    """Sets of numbers, and their Jaccard similarities one tile at a time; 0 between two empty sets.

    Args:
        sets: as `packed_sets` returns them.
        dtype: type of the similarities.
    """

    def __init__(self, sets: Int[Tensor, "n most"], dtype: torch.dtype) -> None:
        names, self.sets = sets.unique(return_inverse=True)
        self.padding = len(names) and int(names[0]) < 0  # then padding has number 0
        self.elements, self.dtype = len(names), dtype
        self.size = (sets >= 0).sum(1).to(dtype)

    def block(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """Return the similarities of a tile."""
        of_rows, others = self.sets[rows], self.sets[columns]
        table = torch.zeros(self.elements, len(of_rows), dtype=self.dtype, device=of_rows.device)
        at = torch.arange(len(of_rows), device=of_rows.device)
        for column in of_rows.T:
            table[column, at] = 1
        if self.padding:
            table[0] = 0
        common = torch.zeros(len(others), len(of_rows), dtype=self.dtype, device=of_rows.device)
        for column in others.T:
            common += table[column]
        common = common.T
        return common / (self.size[rows][:, None] + self.size[columns] - common).clamp(min=1)


@dataclass(frozen=True)
class PairScores:
    """Scores of the pairs of n examples. Examples of one class have equal scores. An example's score with itself is 1."""

    number: Int[Tensor, " n"]  # class of each example
    own: Float[Tensor, " classes"]  # score between two examples of the same class
    block: Block  # scores between classes, symmetric, as a function of a tile

    def dense(self) -> Float[Tensor, "n n"]:
        """Return the matrix of scores of all pairs of examples."""
        whole = slice(0, len(self.own))
        return self.block(whole, whole)[self.number][:, self.number].fill_diagonal_(1)


class _ScoredSums(torch.autograd.Function):
    """The product in stripes of rows. The matrix is symmetric, so its backward pass is the same product."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scores: PairScores) -> Tensor:
        ctx.scores = scores
        whole = slice(0, len(rows))
        found = torch.empty_like(rows)
        with exact(rows.device.type):
            for start in range(0, len(rows), TILE):
                stripe = slice(start, min(start + TILE, len(rows)))
                torch.mm(scores.block(stripe, whole), rows, out=found[stripe])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _ScoredSums.apply(gradients[0].contiguous(), ctx.scores), None


def scored_sums(scores: PairScores, rows: Float[Tensor, "classes dim"]) -> Float[Tensor, "classes dim"]:
    """Multiply the scores between classes by a row for each class. Memory is linear in the number of classes.

    The scores have no gradient.
    """
    if traced() or len(rows) <= TILE:
        whole = slice(0, len(rows))
        with exact(rows.device.type):
            return scores.block(whole, whole) @ rows
    return _ScoredSums.apply(rows, scores)


def weighted_others(
    sums: Float[Tensor, "n dim"], weights: Tensor | PairScores, offset: int, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each example's weight with itself, its weighted sum over the other examples, and their weights' sum.

    Args:
        sums: a row of each example of this process.
        weights: weights of the pairs without gradient, or scores of all processes' examples.
        offset: place of the first example among those of all processes.
        total: number of examples of all processes.

    Raises ValueError for weights of another shape or out of range.
    """
    n, everything = len(sums), gather_rows(sums)
    if isinstance(weights, PairScores):
        if len(weights.number) != total:
            raise ValueError(f"weights must have scores of {total} examples, has {len(weights.number)}")
        if total <= FEW:
            weights = weights.dense()[offset : offset + n]
    if isinstance(weights, PairScores):
        number = weights.number
        mine = number[offset : offset + n]
        row = torch.cat([everything, everything.new_ones(total, 1)], 1)
        of_class = row.new_zeros(len(weights.own), row.shape[1]).index_add(0, number, row)
        score = PairScores(number, weights.own, lambda r, c: weights.block(r, c).to(row.dtype))
        found = scored_sums(score, of_class)[mine] - weights.own.to(row.dtype)[mine, None] * row[offset : offset + n]
        return row.new_ones(n), found[:, :-1], found[:, -1].detach()
    if weights.shape != (n, total):
        raise ValueError(f"weights must be [n, total] = [{n}, {total}], got {shapes(weights=weights)}")
    w = weights.detach().to(sums.dtype)
    own = w.diagonal(offset)
    if holds((w < 0).any() | (own <= 0).any()):
        raise ValueError("weights must be at least 0, and above 0 on the diagonal")
    w = w.clone()
    w.diagonal(offset).zero_()
    return own, w @ everything, w.sum(1)


@over_group
@full_precision(keep=("weights",))
def soft_supcon(
    features: Float[Tensor, "n 2 dim"],
    weights: Float[Tensor, "n total"] | PairScores | None = None,
    temperature: float = 0.07,
    base_temperature: float = 0.07,
) -> Float[Tensor, ""]:
    r"""Contrast two passes of n examples with a weight for each pair: the mean over the 2n anchors a of (Eq. 3)

        -(temperature / base_temperature) sum_b M_ab log p(b|a) / sum_b M_ab,    p(b|a) = exp s_ab / sum_{c != a} exp s_ac.

    M_ab is the weight of the two examples, and 0 for a itself. So an example's other pass has the weight on the diagonal.

    Args:
        features: both passes, rows of any norm; normalised here.
        weights: weights of the pairs, at least 0, with a positive diagonal; total is the number of examples of all processes. Or
            scores that are computed tile by tile. Default: the identity, which gives NT-Xent.
        temperature: > 0, by default 0.07; s is the cosine divided by it.
        base_temperature: > 0, by default 0.07; divides the loss, as in the authors' code.

    Memory is linear in n, apart from given weights. One example has no negatives, and its loss is 0. Raises ValueError for shapes
    that do not fit and an empty batch. Raises it too for weights or temperatures out of range.

    Relations: the identity gives NT-Xent, equality of labels gives SupCon.

    >>> soft_supcon(torch.eye(2)[:, None].expand(2, 2, 2), temperature=1.0, base_temperature=1.0)
    tensor(0.5514)
    """
    if features.ndim != 3 or features.shape[1] != 2:
        raise ValueError(f"features must be [n, 2, dim], got {shapes(features=features)}")
    need_rows(features=features)
    need_positive(temperature=temperature, base_temperature=base_temperature)
    x = unit(features, temperature**-0.5)
    at = place(len(x), x.device)
    log_z = batch_logsumexp(x.flatten(0, 1), exclude=Diagonal()).rows.view(-1, 2).mean(1)
    twin = (x[:, 0] * x[:, 1]).sum(1)
    if weights is None:
        return temperature / base_temperature * global_mean(log_z - twin)
    # Both anchors of an example together: the sum over the other examples, and the twin from both sides.
    sums = x.sum(1)
    own, others, count = weighted_others(sums, weights, at.offset, at.total)
    towards = ((sums * others).sum(1) / 2 + own * twin) / (2 * count + own)
    return temperature / base_temperature * global_mean(log_z - towards)
