r"""Contrast: the softmax over a matrix of similarities, the mathematics most systems share, without the matrix.

With s_ij = q_i . k_j a contrastive loss is, row by row,

    loss_i = -sum_j p_ij s_ij + (sum_j p_ij) log Z_i,      Z_i = sum_j d_ij exp(s_ij).

The first term is linear in q: a row of p times the keys, which for one positive, for labels (class sums) and for lists
needs no matrix (`positive_similarity`, `class_similarity`). What remains is log Z over rows and, where a loss looks both
ways, over columns: `pair_logsumexp`. It goes through the matrix in tiles, both directions in one pass, and its backward
either reads the tiles it kept (within a budget of memory) or computes them again. A matrix of similarities of one set with
itself is symmetric: only its upper triangle is computed.

What is *not* here because it composes outside, with autograd's own gradients:
  temperature      scale the query (`scaled`): a number, a learnable scalar or one per row, its gradient comes with it
  additive bias    one more column on both sides (`with_bias`): per row, per key, or both; log w_j weighs key j
  extra keys       `torch.logaddexp` of two calls: a queue, a bank, synthesised negatives, with or without gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows
from counterpoint.core.precision import exact, full_precision, wide
from counterpoint.core.transforms import need_fixed, refuse_second, traced

# The floor under a vector's length when it is normalised, as torch.nn.functional.normalize has it: a zero vector stays zero.
EPS = 1e-12

# Bytes of tiles that the forward pass may keep for the backward pass. Beyond it they are computed again, a third more work.
KEEP = 64 * 2**20
# Of the query with itself: the halved matrix of both views of 4,096 pairs just fits.
KEEP_SYMMETRIC = 160 * 2**20
# Rows and columns of a tile: large enough for matrix products at full speed, small enough to stay in the cache between them.
TILE = (512, 2048)

# What a message calls the functions that never hold the matrix.
BLOCKWISE = "a loss of more than 64 x 64 similarities, made block by block (pair_logsumexp has method='plain'),"

# Up to this many entries the plain way is as fast.
SMALL = 64 * 64

Block = Callable[[slice, slice], Tensor]


# ------------------------------------------------------------------------------------------------ what a row does not see


@runtime_checkable
class Rule(Protocol):
    """Which pairs have no place in the denominator, told tile by tile."""

    @property
    def symmetric(self) -> bool:
        """Whether (i, j) is excluded whenever (j, i) is."""
        ...

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        """Set the excluded entries of the tile at [rows, columns] of the whole matrix to -inf, in place."""
        ...


@dataclass(frozen=True)
class Diagonal:
    """Row i does not see column i + offset, for each offset: 0 is itself; n and -n the other view of a batch of pairs."""

    offsets: tuple[int, ...] = (0,)

    @property
    def symmetric(self) -> bool:
        return {-offset for offset in self.offsets} == set(self.offsets)

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        for offset in self.offsets:
            along = rows.start - columns.start + offset
            if -tile.shape[0] < along < tile.shape[1]:
                tile.diagonal(along).fill_(-math.inf)


@dataclass(frozen=True)
class Views:
    """Of a batch's first views and below them its second ones, a row sees neither itself nor its other view.

    pairs   how many rows there are of each view
    offset  the column of the first row
    """

    pairs: int
    offset: int = 0

    @property
    def symmetric(self) -> bool:
        return self.offset == 0

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        Diagonal((self.offset,)).exclude(tile, rows, columns)
        for first, other in ((0, self.pairs), (self.pairs, -self.pairs)):
            start, stop = max(rows.start, first), min(rows.stop, first + self.pairs)
            if start < stop:
                part = tile[start - rows.start : stop - rows.start]
                Diagonal((self.offset + other,)).exclude(part, slice(start, stop), columns)


@dataclass(frozen=True)
class Labels:
    """Row i does not see columns of its own label (`same=True`), or sees no others (`same=False`)."""

    rows: Int[Tensor, " rows"]
    columns: Int[Tensor, " columns"] | None = None  # None: the rows'
    same: bool = True

    @property
    def symmetric(self) -> bool:
        return self.columns is None

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        other = self.rows if self.columns is None else self.columns
        match = self.rows[rows][:, None] == other[columns]
        tile.masked_fill_(match if self.same else ~match, -math.inf)


@dataclass(frozen=True)
class Listed:
    """Row i does not see the columns index[i]; entries below 0 are padding."""

    index: Int[Tensor, "rows most"]
    symmetric = False

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        index = self.index[rows] - columns.start
        row, slot = ((index >= 0) & (index < tile.shape[1]) & (self.index[rows] >= 0)).nonzero(as_tuple=True)
        tile[row, index[row, slot]] = -math.inf


@dataclass(frozen=True)
class Where:
    """Row i does not see column j where mask(rows, columns)[i, j] is True; the function is asked for one tile at a time."""

    mask: Callable[[slice, slice], Bool[Tensor, "rows columns"]]
    symmetric: bool = False  # say so if it is: then only half of the matrix is computed

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        tile.masked_fill_(self.mask(rows, columns), -math.inf)


@dataclass  # not frozen: torch.compile cannot follow the fields of a frozen one that it made itself
class Targets:
    """Soft targets with few entries to a row, for `pair_logsumexp_towards`: weight[i, k] at column index[i, k].

    Entries of one row that name the same column add up.

    offset  the row of the whole matrix at which these begin
    length  how many columns it has
    """

    index: Int[Tensor, "rows most"]
    weight: Float[Tensor, "rows most"]
    offset: int
    length: int

    def __call__(self, rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        mine = slice(rows.start - self.offset, rows.stop - self.offset)
        at, weight = self.index[mine] - columns.start, self.weight[mine]
        width = columns.stop - columns.start
        if width < self.length:
            outside = (at < 0) | (at >= width)
            at, weight = at.masked_fill(outside, 0), weight.masked_fill(outside, 0.0)
        return weight.new_zeros(len(at), width).scatter_add_(1, at, weight)


# ------------------------------------------------------------------------------------------------------------- the tiles


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    square: bool  # on the diagonal of a symmetric matrix: holds both (i, j) and (j, i)


def _tiles(rows: int, columns: int, symmetric: bool) -> Iterator[_Tile]:
    """Cover the matrix, or the upper triangle of a symmetric one with whole squares on its diagonal."""
    high, wide = TILE
    if symmetric:
        # The squares compute both halves: keep them a small part of the whole, but not so small that there is little in a tile.
        high = min(high, max(256, rows // 8))
    for top in range(0, rows, high):
        row = slice(top, min(top + high, rows))
        first = 0
        if symmetric:
            yield _Tile(row, row, True)
            first = row.stop
        for left in range(first, columns, wide):
            yield _Tile(row, slice(left, min(left + wide, columns)), False)


class _Pass:
    """What forward and backward share: the operands and how a tile of exponentials comes about."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        rules: Sequence[Rule] = (),
        weight: Block | None = None,
        origin: tuple[int, int] = (0, 0),
        target: Block | None = None,
    ) -> None:
        self.query, self.key, self.rules, self.weight, self.origin = query, key, rules, weight, origin
        self.target = target
        # A tile whose exponentials share one reference can lose a row that lies this far below it.
        self.reach = 60.0 if query.dtype == torch.float32 else 600.0
        self.buffer = query.new_empty(0)

    def similarities(self, tile: _Tile) -> Tensor:
        """s of a tile, -inf where excluded; the memory is reused by the next call."""
        rows, columns = tile.rows, tile.columns
        high, wide = rows.stop - rows.start, columns.stop - columns.start
        if self.buffer.numel() < high * wide:
            self.buffer = self.query.new_empty(high * wide)
        s = torch.mm(self.query[rows], self.key[columns].T, out=self.buffer[: high * wide].view(high, wide))
        for rule in self.rules:
            rule.exclude(s, *self.placed(tile))
        return s

    def placed(self, tile: _Tile) -> tuple[slice, slice]:
        """Where the tile lies in the whole matrix, of which this may be one process's part."""
        row, column = self.origin
        return (
            slice(tile.rows.start + row, tile.rows.stop + row),
            slice(tile.columns.start + column, tile.columns.stop + column),
        )

    def weighted(self, e: Tensor, tile: _Tile) -> Tensor:
        return e if self.weight is None else e.mul_(self.weight(*self.placed(tile)))

    def targeted(self, tile: _Tile) -> Tensor | None:
        return None if self.target is None else self.target(*self.placed(tile))


def _finite(reference: Tensor) -> Tensor:
    """A reference to subtract: 0 in place of -inf, which a row without entries has."""
    return reference.masked_fill(reference == -math.inf, 0.0)


class _Kept(NamedTuple):
    """A tile's exponentials exp(s - reference), weights included, and its targets."""

    exponentials: Tensor
    reference: Tensor  # scalar
    target: Tensor | None


def _forward(
    work: _Pass, *, columns: bool, symmetric: bool = False, keep: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None, list[_Kept | None]]:
    """log Z of rows [N] and columns [M], the rows' similarity under targets, and tiles that fit into `keep` bytes, in order."""
    query, key = work.query, work.key
    row = query.new_full((len(query),), -math.inf)
    column = query.new_full((len(key),), -math.inf) if columns else None
    towards = None if work.target is None else query.new_zeros(len(query))
    kept: list[_Kept | None] = []
    for tile in _tiles(len(query), len(key), symmetric):
        s = work.similarities(tile)
        target = work.targeted(tile)
        if towards is not None and target is not None:
            towards[tile.rows] += torch.linalg.vecdot(target, s)
        reference = _finite(s.amax())
        e = work.weighted(s.sub_(reference).exp_(), tile)
        sums = e.sum(1)
        low = sums.min()
        across = None
        if column is not None or (symmetric and not tile.square):
            across = e.sum(0)
            low = torch.minimum(low, across.min())
        if low > math.exp(-work.reach):
            row[tile.rows] = torch.logaddexp(row[tile.rows], sums.log_() + reference)
            if across is not None:
                into = row if symmetric else column
                into[tile.columns] = torch.logaddexp(into[tile.columns], across.log_() + reference)  # type: ignore[index]
            size = e.numel() * e.element_size() * (1 if target is None else 2)
            if size <= keep:
                keep -= size
                kept.append(_Kept(e, reference, target))
                work.buffer = e.new_empty(0)  # the tile is kept: the next one needs memory of its own
                continue
        else:  # some row lies far below the tile's largest entry (or has none): a reference of its own for each
            s = work.similarities(tile)
            top = _finite(s.amax(1))
            part = work.weighted((s - top[:, None]).exp_(), tile).sum(1).log_() + top
            row[tile.rows] = torch.logaddexp(row[tile.rows], part)
            if across is not None:
                top = _finite(s.amax(0))
                part = work.weighted((s - top).exp_(), tile).sum(0).log_() + top
                into = row if symmetric else column
                into[tile.columns] = torch.logaddexp(into[tile.columns], part)  # type: ignore[index]
        kept.append(None)
    return row, column, towards, kept


@dataclass(frozen=True)
class _Side:
    """One direction's log Z and the gradient that arrives for it."""

    logs: Tensor
    gradient: Tensor

    def __getitem__(self, part: slice) -> _Side:
        return _Side(self.logs[part], self.gradient[part])

    def share(self, reference: Tensor) -> Tensor:
        """gradient * exp(reference - log Z), what turns exp(s - reference) into a gradient of s; 0 for empty rows."""
        return self.gradient * (reference - self.logs).masked_fill_(self.logs == -math.inf, -math.inf).exp_()


def _pulled(s: Tensor, row: _Side, column: _Side | None, reach: float) -> Tensor:
    """sum over the directions of gradient * exp(s - log Z), the gradient of s; overwrites s."""
    reference = _finite(s.amax())
    logs = row.logs if column is None else torch.cat([row.logs, column.logs])
    lowest = logs.masked_fill(logs == -math.inf, math.inf).amin()
    if reference - lowest < reach:
        factor = row.share(reference)[:, None]
        if column is not None:
            factor = factor + column.share(reference)
        return s.sub_(reference).exp_().mul_(factor)
    # One reference would overflow for some: each direction gets probabilities of its own.
    there = _finite(row.logs)
    first = (s - there[:, None]).exp_().mul_(row.share(there)[:, None])
    if column is None:
        return first
    there = _finite(column.logs)
    return first.add_(s.sub_(there).exp_().mul_(column.share(there)))


def _backward(
    work: _Pass,
    row: _Side,
    column: _Side | None,
    kept: Sequence[_Kept | None] = (),
    *,
    symmetric: bool = False,
    key_wanted: bool = True,
    towards: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the query and the key. Symmetric: `column` is `row`, and all of the gradient is in the first.

    `towards`: the gradient that arrives for the rows' similarity under targets.
    """
    query, key = work.query, work.key
    to_query = torch.zeros_like(query)
    to_key = to_query if symmetric else torch.zeros_like(key)
    spare = query.new_empty(0)
    for number, tile in enumerate(_tiles(len(query), len(key), symmetric)):
        r, c = tile.rows, tile.columns
        found = kept[number] if kept else None
        across = None if column is None else column[c]
        if found is None:
            g = work.weighted(_pulled(work.similarities(tile), row[r], across, work.reach), tile)
        else:
            # Kept tiles stay as they are, for whoever calls backward a second time on a retained graph.
            if spare.numel() < found.exponentials.numel():
                spare = query.new_empty(found.exponentials.numel())
            g = spare[: found.exponentials.numel()].view(found.exponentials.shape)
            factor = row[r].share(found.reference)[:, None]
            if across is None:
                torch.mul(found.exponentials, factor, out=g)
            else:
                torch.add(factor, across.share(found.reference), out=g).mul_(found.exponentials)
        if towards is not None:
            target = work.targeted(tile) if found is None else found.target
            g.addcmul_(target, towards[r, None])  # type: ignore[arg-type]
        to_query[r].addmm_(g, key[c])
        if key_wanted and not tile.square:
            to_key[c].addmm_(g.T, query[r])
    return to_query, to_key


def _refused(gradients: Sequence[Tensor], operands: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients, none of which can be differentiated with any of the operands: they were made block by block."""
    leaf = next(x for x in operands if x is not None and x.requires_grad)
    return [refuse_second(gradient, leaf, BLOCKWISE) for gradient in gradients]


class _One(NamedTuple):
    """A matrix of one tile: exp(s - reference) with weights, its sums over rows and columns, and the targets."""

    exponentials: Tensor
    rows: Tensor
    columns: Tensor | None
    target: Tensor | None

    @staticmethod
    def of(work: _Pass, columns: bool, own: bool) -> tuple[_One, Tensor, Tensor | None, Tensor | None] | None:
        """It, the reference, the rows' similarity under targets and with their own key (both where they are asked for);
        None where one reference does not do for all rows."""
        whole = _Tile(slice(0, len(work.query)), slice(0, len(work.key)), True)
        s, target = work.similarities(whole), work.targeted(whole)
        towards = None if target is None else torch.linalg.vecdot(target, s)
        diagonal = s.diagonal().clone() if own else None
        reference = s.amax()
        e = work.weighted(s.sub_(reference).exp_(), whole)
        found = _One(e, e.sum(1), e.sum(0) if columns else None, target)
        low = min(side.amin().item() for side in (found.rows, found.columns) if side is not None)
        # Not so either where a reference of -inf made everything nan.
        return (found, reference, towards, diagonal) if low > math.exp(-work.reach) else None

    def gradients(
        self, work: _Pass, gradients: Sequence[Tensor], symmetric: bool, key_wanted: bool
    ) -> tuple[Tensor, Tensor]:
        row = (gradients[0] / self.rows)[:, None]
        if symmetric:
            g = torch.add(row, row.T).mul_(self.exponentials)
        elif self.columns is not None:
            g = torch.add(row, gradients[1] / self.columns).mul_(self.exponentials)
        else:
            g = row * self.exponentials
        if self.target is not None:
            g.addcmul_(self.target, gradients[2][:, None])
        if len(gradients) > 3:
            g.diagonal().add_(gradients[3])
        to_query = g @ work.key
        return to_query, to_query if symmetric or not key_wanted else g.T @ work.query


class _PairLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        rules: Sequence[Rule],
        weight: Block | None,
        columns: bool,
        origin: tuple[int, int],
        target: Block | None,
        keep: int,
        own: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.asked, ctx.own = (rules, weight, origin, target), own
        work = _Pass(query, query if key is None else key, *ctx.asked)
        keep = keep if any(ctx.needs_input_grad) else 0
        ctx.one = None
        with exact(query.device.type):
            size = len(query) * len(work.key) * query.element_size() * (1 if target is None else 2)
            if len(query) <= TILE[0] and len(work.key) <= TILE[1] and size <= keep:
                found = _One.of(work, columns, own)
                if found is not None:
                    ctx.one, reference, towards, diagonal = found
                    ctx.save_for_backward(query, key)
                    ctx.set_materialize_grads(True)
                    column = None if ctx.one.columns is None else ctx.one.columns.log().add_(reference)
                    return ctx.one.rows.log().add_(reference), column, towards, *([diagonal] if own else [])
            row, column, towards, ctx.kept = _forward(work, columns=columns, symmetric=key is None, keep=keep)
        ctx.save_for_backward(query, key, row, column)
        ctx.set_materialize_grads(True)
        return row, column, towards, *([torch.linalg.vecdot(query, work.key)] if own else [])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, *logs = ctx.saved_tensors
        work = _Pass(query, query if key is None else key, *ctx.asked)
        key_wanted = key is None or ctx.needs_input_grad[1]
        with torch.no_grad(), exact(query.device.type):
            if ctx.one is not None:
                to_query, to_key = ctx.one.gradients(work, gradients, key is None, key_wanted)
            else:
                row, column = logs
                side = _Side(row, gradients[0])
                to_query, to_key = _backward(
                    work,
                    side,
                    side if key is None else None if column is None else _Side(column, gradients[1]),
                    ctx.kept,
                    symmetric=key is None,
                    key_wanted=key_wanted,
                    towards=None if ctx.asked[3] is None else gradients[2],
                )
                if ctx.own:
                    to_query.addcmul_(key, gradients[3][:, None])
                    to_key.addcmul_(query, gradients[3][:, None])
        if torch.is_grad_enabled():
            to_query, to_key = _refused((to_query, to_key), (query, key))
        return to_query, to_key if ctx.needs_input_grad[1] else None, *[None] * 7


def _plain(
    query: Tensor,
    key: Tensor,
    rules: Sequence[Rule],
    weight: Block | None,
    columns: bool,
    origin: tuple[int, int],
    target: Block | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    s = query @ key.T
    whole = slice(origin[0], origin[0] + len(query)), slice(origin[1], origin[1] + len(key))
    towards = None if target is None else (target(*whole) * s).sum(1)
    for rule in rules:
        rule.exclude(s, *whole)
    if weight is not None:
        s = s + weight(*whole).log()
    # A row of -inf alone would have a gradient of nan.
    empty = s == -math.inf
    s = s.masked_fill(empty, torch.finfo(s.dtype).min)

    def over(dim: int) -> Tensor:
        return s.logsumexp(dim).masked_fill(empty.all(dim), -math.inf)

    return over(1), over(0) if columns else None, towards


class PairLogSumExp(NamedTuple):
    """log Z of every row and, where they were asked for, of every column."""

    rows: Float[Tensor, " rows"]
    columns: Float[Tensor, " columns"] | None


class PairLogSumExpTowards(NamedTuple):
    """log Z of every row and, where they were asked for, of every column; every row's similarity under its targets and,
    where it was asked for, with the key of its own number."""

    rows: Float[Tensor, " rows"]
    columns: Float[Tensor, " columns"] | None
    towards: Float[Tensor, " rows"]
    own: Float[Tensor, " rows"] | None = None


@full_precision
def pair_logsumexp(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"] | None = None,
    *,
    exclude: Rule | Sequence[Rule] = (),
    weight: Block | None = None,
    columns: bool = False,
    origin: tuple[int, int] = (0, 0),
    keep: int | None = None,
    method: Literal["auto", "plain", "blocks"] = "auto",
) -> PairLogSumExp:
    r"""log Z over the rows, and in the same pass the columns, of the similarities q_i . k_j, without their matrix.

        rows_i = log sum_j d_ij exp(q_i . k_j),      columns_j = log sum_i d_ij exp(q_i . k_j)

    d_ij is 1, or 0 where a rule excludes the pair, or a weight. Nothing is normalised or divided by a temperature here: see
    `scaled`. Memory grows with (rows + columns) x dim, plus `keep`.

    Args:
        query: one row per anchor; float64, float32, or a half precision (then computed and returned in float32).
        key: what they are compared with; None compares the query with itself at half the work (each pair is computed once).
        exclude: a rule or several: `Diagonal`, `Labels`, `Listed`, `Where`. A pair is excluded if any of them says so.
        weight: non-negative weights d_ij as a function (rows, columns) -> [r, c], asked for one tile at a time. No gradient.
        columns: whether columns are wanted.
        origin: where this matrix's first row and column lie in the larger one that rules and weights are told about.
        keep: bytes of intermediate results the forward pass may keep to spare the backward pass a third of its work; by
            default 64 MiB, or 160 MiB for the query with itself.
        method: "blocks" or "plain" (the whole matrix, differentiable twice, traceable by torch.compile). "auto" takes the
            plain way for the smallest matrices and inside torch.compile.

    Returns (rows, columns). A row with nothing in its denominator is -inf, with gradient 0.

    Raises ValueError for shapes or types that do not fit. Differentiating twice through "blocks" raises RuntimeError.

    >>> x = torch.eye(3)
    >>> pair_logsumexp(x, exclude=Diagonal()).rows
    tensor([0.6931, 0.6931, 0.6931])
    """
    rules = tuple(exclude) if isinstance(exclude, Sequence) else (exclude,)
    rows, across, _ = _pair_logsumexp(query, key, rules, weight, columns, origin, None, keep, method)
    return PairLogSumExp(rows, across)


@full_precision
def pair_logsumexp_towards(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    target: Block,
    *,
    columns: bool = False,
    origin: tuple[int, int] = (0, 0),
    own: bool = False,
    keep: int | None = None,
) -> PairLogSumExpTowards:
    r"""`pair_logsumexp`, and in the same pass every row's similarity under soft targets, towards_i = sum_j p_ij q_i . k_j.

    `target` gives p as a function (rows, columns) -> [r, c], asked for one tile at a time; for few entries to a row see
    `Targets`. It has no gradient. `own`: q_i . k_i too, as many rows as columns (`positive_similarity` in a pass of its
    own otherwise). Where p has a structure, `positive_similarity` of a mean of keys can be less work. The
    rest, errors too, as there.

    >>> x = torch.eye(3)
    >>> pair_logsumexp_towards(x, x, Targets(torch.tensor([[0], [1], [0]]), torch.ones(3, 1), 0, 3)).towards
    tensor([1., 1., 0.])
    """
    if own and query.shape != key.shape:
        raise ValueError(f"own: query {tuple(query.shape)} and key {tuple(key.shape)} must be paired row by row")
    return PairLogSumExpTowards(*_pair_logsumexp(query, key, (), None, columns, origin, target, keep, "auto", own))


def _pair_logsumexp(
    query: Tensor,
    key: Tensor | None,
    rules: tuple[Rule, ...],
    weight: Block | None,
    columns: bool,
    origin: tuple[int, int],
    target: Block | None,
    keep: int | None,
    method: str,
    own: bool = False,
) -> Any:  # rows, columns, towards and, where it was asked for, own
    if query.ndim != 2 or (key is not None and (key.ndim != 2 or key.shape[1] != query.shape[1])):
        raise ValueError(
            f"query and key must be [rows, dim] and [columns, dim], got {tuple(query.shape)}"
            + ("" if key is None else f" and {tuple(key.shape)}")
        )
    if not query.is_floating_point() or (key is not None and wide(key).dtype != wide(query).dtype):
        raise ValueError(
            f"query and key must be of one floating type, got {query.dtype}"
            + (f" and {key.dtype}" if key is not None else "")
        )
    query = wide(query)
    key = None if key is None else wide(key)
    alike = weight is None and target is None and origin[0] == origin[1]
    symmetric = alike and not columns and all(rule.symmetric for rule in rules)
    if key is None and not symmetric:
        key = query
    entries = len(query) * len(query if key is None else key)
    small = method == "auto" and entries <= SMALL
    if traced() or method == "plain" or small or entries == 0:
        found = _plain(query, query if key is None else key, rules, weight, columns, origin, target)
        return *found, *([positive_similarity(query, query if key is None else key)] if own else [])
    if keep is None:
        keep = KEEP_SYMMETRIC if key is None else KEEP
    return _PairLogSumExp.apply(query, key, rules, weight, columns, origin, target, keep, own)


class _Unit(torch.autograd.Function):
    """scale x / |x|: one pass forward and three backward, where normalize's division takes eight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        unit, length = _stretched(x, scale)
        ctx.scale = scale
        ctx.save_for_backward(x, unit, length)
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        x, unit, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: in terms of x
            again = _composed_unit(x, ctx.scale)
            return torch.autograd.grad(again, x, gradient, create_graph=True)[0], None
        with exact(x.device.type):
            along = torch.linalg.vecdot(unit, gradient).unsqueeze_(-1)
        # Below the floor the length is a constant, and nothing is taken away.
        along.masked_fill_(length == EPS, 0.0)
        return torch.addcmul(gradient, unit, along, value=-(ctx.scale**-2)).div_(length / ctx.scale), None


def unit(x: Float[Tensor, "*rows dim"], scale: float = 1.0) -> Float[Tensor, "*rows dim"]:
    """Divide every row by its Euclidean length, as torch.nn.functional.normalize does, in float32 at least.

    A row of zeros, and in all functions that normalise, has this one meaning: it stays a row of zeros. Its cosine with
    every row is 0, its distance from a unit row is 1, and its gradient is that which arrives divided by `EPS` (1e-12),
    once. Rows shorter than `EPS` are divided by `EPS`.

    Args:
        x: rows of any number, of any floating type.
        scale: > 0, the length that rows get. unit(x, 1 / t) is `scaled(unit(x), t)` in one pass.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    x = wide(x)
    if traced():
        return _composed_unit(x, scale)
    return _Unit.apply(x, scale) if x.requires_grad and torch.is_grad_enabled() else _stretched(x, scale)[0]


def _composed_unit(x: Tensor, scale: float) -> Tensor:
    """`unit` of PyTorch's own operations, with derivatives of any order; those of a row of zeros are finite too."""
    short = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) <= EPS
    length = torch.linalg.vector_norm(torch.where(short, 1.0, x), dim=-1, keepdim=True)
    return x / (torch.where(short, EPS, length) / scale)


def _stretched(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x at its new length, and its old one."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=EPS)
    return x / (length / scale), length


def scaled(query: Float[Tensor, "rows dim"], temperature: float | Float[Tensor, ...]) -> Float[Tensor, "rows dim"]:
    """query / temperature for a number, a (learnable) scalar or one temperature per row [rows]; in float32 at least.

    With `key=None` both sides are the query: divide by the square root of the temperature instead.
    """
    query = wide(query)
    if isinstance(temperature, Tensor) and temperature.ndim == 1:
        return query / temperature[:, None]
    return query / temperature


def with_bias(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    *,
    row: Float[Tensor, " rows"] | None = None,
    column: Float[Tensor, " columns"] | None = None,
) -> tuple[Float[Tensor, "rows wider"], Float[Tensor, "columns wider"]]:
    """Operands whose similarities are q_i . k_j + row_i + column_j, with gradients to the biases.

    column = log w weighs key j by w_j in every row's denominator (w_j = 0: use a rule, log 0 is not a number to multiply).
    """
    left, right = [wide(query)], [wide(key)]
    one, other = left[0].new_ones(len(query), 1), right[0].new_ones(len(key), 1)
    if row is not None:
        left, right = [*left, row.to(left[0].dtype)[:, None]], [*right, other]
    if column is not None:
        left, right = [*left, one], [*right, column.to(right[0].dtype)[:, None]]
    return torch.cat(left, 1), torch.cat(right, 1)


# --------------------------------------------------------------------------------------------------------- the positives


def positive_similarity(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    positives: Float[Tensor, "rows columns"] | Int[Tensor, "rows most"] | None = None,
) -> Float[Tensor, " rows"]:
    """sum_j p_ij q_i . k_j, linear in q and so without a matrix of similarities.

    Args:
        positives: None: key i is query i's one positive. A floating matrix [rows, columns]: soft targets p. Integers
            [rows, most]: a list of positive keys for each row, entries below 0 are padding, each counts 1.

    For positives by class label see `class_similarity`.
    """
    query, key = wide(query), wide(key)
    if positives is None:
        if query.shape != key.shape:
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must be paired row by row")
        return (query * key).sum(1)
    if positives.is_floating_point():
        with exact(query.device.type):
            return (query * (positives.to(key.dtype) @ key)).sum(1)
    there = positives >= 0
    chosen = key[positives.clamp(min=0)] * there.unsqueeze(-1)
    return (query * chosen.sum(1)).sum(1)


@full_precision
def class_similarity(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    query_labels: Int[Tensor, " rows"],
    key_labels: Int[Tensor, " columns"],
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """sum over the keys of a row's own class of q_i . k_j, and how many they are: by class sums, O((rows + columns) dim).

    A row that is itself among the keys counts too; take q_i . q_i and 1 away. Labels may be any integers.
    """
    need_fixed("a sum over classes", labels=query_labels, key_labels=key_labels)
    query, key = wide(query), wide(key)
    classes, index = torch.unique(torch.cat([query_labels, key_labels]), return_inverse=True)
    rows, columns = index[: len(query)], index[len(query) :]
    sums = key.new_zeros(len(classes), key.shape[1]).index_add(0, columns, key)
    count = torch.bincount(columns, minlength=len(classes))
    return (query * sums[rows]).sum(1), count[rows]


# ---------------------------------------------------------------------------------------------------------- soft targets


class PairCrossEntropy(NamedTuple):
    """Of every row (and, where asked for, column): -sum_j p_ij log softmax_j(s_ij), and the target's entropy.

    cross_entropy - entropy is the Kullback-Leibler divergence KL(p || softmax(s)).
    """

    rows: Float[Tensor, " rows"]
    row_entropy: Float[Tensor, " rows"]
    columns: Float[Tensor, " columns"] | None
    column_entropy: Float[Tensor, " columns"] | None


class _Mean:
    """A running expectation under a softmax whose terms arrive in parts: log Z and the mean of each of several values."""

    def __init__(self, like: Tensor, length: int) -> None:
        self.logs = like.new_full((length,), -math.inf)
        self.means = [like.new_zeros(length) for _ in range(2)]

    def add(self, part: slice, logs: Tensor, *means: Tensor, first: bool) -> None:
        """log Z of the entries that come, and their means; `first`: there were none before."""
        if first:
            self.logs[part] = logs
            for mean, value in zip(self.means, means, strict=True):
                mean[part] = value
            return
        total = torch.logaddexp(self.logs[part], logs)
        old, new = ((x - _finite(total)).exp() for x in (self.logs[part], logs))
        for mean, value in zip(self.means, means, strict=True):
            mean[part] = mean[part] * old + value * new
        self.logs[part] = total


class _Pairs(NamedTuple):
    """A tile of both matrices: the student's similarities, and exp(x - reference) of the student's and the teacher's."""

    s: Tensor
    student: Tensor
    teacher: Tensor
    references: tuple[Tensor, Tensor]  # scalars

    @staticmethod
    def of(s: Tensor, t: Tensor) -> _Pairs:
        references = s.amax(), t.amax()
        return _Pairs(s, (s - references[0]).exp_(), (t - references[1]).exp_(), references)


def _spread(sides: Sequence[Tensor]) -> Tensor:
    """A value for each row and, if there is another, for each column, added up over the tile."""
    return sides[0][:, None] if len(sides) == 1 else sides[0][:, None] + sides[1]


class _PairCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor | None,
        columns: bool,
        keep: int,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        student = _Pass(query, key)
        teacher = _Pass(teacher_query, teacher_query if teacher_key is None else teacher_key)
        n, m = len(query), len(key)
        keep = keep if any(ctx.needs_input_grad) else 0
        sides = [(_Mean(query, n), 1)] + ([(_Mean(query, m), 0)] if columns else [])
        logs = [query.new_full((n,), -math.inf)] + ([query.new_full((m,), -math.inf)] if columns else [])
        ctx.kept = []
        with exact(query.device.type):
            for tile in _tiles(n, m, False):
                s, t = student.similarities(tile), teacher.similarities(tile)
                pairs = _Pairs.of(s, t)
                sums = [(pairs.student.sum(dim), pairs.teacher.sum(dim)) for _, dim in sides]
                low = torch.stack([part.min() for both in sums for part in both]).min()
                values = (pairs.teacher * s, pairs.teacher * t) if low > math.exp(-student.reach) else None
                for (mean, dim), log, (sum_s, sum_t) in zip(sides, logs, sums, strict=True):
                    part = tile.rows if dim else tile.columns
                    if values is not None:
                        log_s, log_t = sum_s.log() + pairs.references[0], sum_t.log() + pairs.references[1]
                        means = [value.sum(dim) / sum_t for value in values]
                    else:  # some row lies far below the tile's largest entry: a reference of its own for each
                        log_s, log_t = s.logsumexp(dim), t.logsumexp(dim)
                        p = (t - log_t.unsqueeze(dim)).exp_()
                        means = [(p * value).sum(dim) for value in (s, t)]
                    first = (tile.columns if dim else tile.rows).start == 0
                    mean.add(part, log_t, *means, first=first)
                    log[part] = log_s if first else torch.logaddexp(log[part], log_s)
                size = 3 * s.numel() * s.element_size()
                fits = values is not None and size <= keep
                ctx.kept.append(pairs if fits else None)
                if fits:
                    keep -= size
                    student.buffer = s.new_empty(0)  # the tile is kept: the next one needs memory of its own
        ctx.columns = columns
        expected = (mean.means[0] for mean, _ in sides)
        ctx.save_for_backward(
            query, key, teacher_query, teacher_key, *logs, *(mean.logs for mean, _ in sides), *expected
        )
        out: list[Tensor | None] = []
        for (mean, _), log in zip(sides, logs, strict=True):
            out += [log - mean.means[0], mean.logs - mean.means[1]]
        ctx.mark_non_differentiable(*out[1::2])
        return tuple(out + [None] * (4 - len(out)))  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, teacher_query, teacher_key, *logs = ctx.saved_tensors
        alike = teacher_key is None
        teacher_key = teacher_query if alike else teacher_key
        student, teacher = _Pass(query, key), _Pass(teacher_query, teacher_key)
        out = [torch.zeros_like(x) for x in (query, key, teacher_query, teacher_key)]
        if alike:
            out[3] = out[2]
        half = len(logs) // 3
        mine = [_Side(log, gradients[2 * i]) for i, log in enumerate(logs[:half])]
        its = [_Side(log, -gradients[2 * i]) for i, log in enumerate(logs[half : 2 * half])]
        taught = any(ctx.needs_input_grad[2:4])
        with torch.no_grad(), exact(query.device.type):
            for tile, pairs in zip(_tiles(len(query), len(key), False), ctx.kept, strict=True):
                r, c = tile.rows, tile.columns
                parts = (r, c)[:half]
                of_s, of_t = ([side[at] for side, at in zip(sides, parts, strict=True)] for sides in (mine, its))
                means = [mean[at] for mean, at in zip(logs[2 * half :], parts, strict=True)]
                if pairs is None:
                    s, t = student.similarities(tile), teacher.similarities(tile)
                    pairs = _Pairs.of(s, t)
                    below = [
                        reference - torch.cat([side.logs for side in sides]).amin()
                        for reference, sides in zip(pairs.references, (of_s, of_t), strict=True)
                    ]
                    if not max(below) < student.reach:
                        # One reference would overflow for some: each direction gets probabilities of its own.
                        p = [side.gradient[:, None] * (t - side.logs[:, None]).exp() for side in of_t[:1]]
                        p += [side.gradient * (t - side.logs).exp() for side in of_t[1:]]
                        pull = p[0] * (s - means[0][:, None]) + (p[1] * (s - means[1]) if ctx.columns else 0)
                        g = sum(p) + _pulled(s, of_s[0], of_s[1] if ctx.columns else None, student.reach)
                        pairs = None
                if pairs is not None:
                    share = [side.share(pairs.references[1]) for side in of_t]
                    factor = _spread(share)
                    g = torch.addcmul(
                        pairs.student * _spread([side.share(pairs.references[0]) for side in of_s]),
                        pairs.teacher,
                        factor,
                    )
                    if taught:
                        # An expectation under p moves with t_ij by p_ij (s_ij - the expectation).
                        offset = _spread([part * mean for part, mean in zip(share, means, strict=True)])
                        pull = torch.mul(pairs.s, factor).sub_(offset).mul_(pairs.teacher)
                out[0][r].addmm_(g, key[c])
                out[1][c].addmm_(g.T, query[r])
                if taught and alike and len(pull) == len(query) and pull.shape[1] == len(key):
                    out[2].addmm_(pull + pull.T, teacher_key)
                elif taught:
                    out[2][r].addmm_(pull, teacher_key[c])
                    out[3][c].addmm_(pull.T, teacher_query[r])
        if torch.is_grad_enabled():
            out = _refused(out, (query, key, teacher_query, teacher_key))
        return *out[:2], out[2] if taught else None, out[3] if taught and not alike else None, None, None


@full_precision
def pair_cross_entropy(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    teacher_query: Float[Tensor, "rows teacher_dim"],
    teacher_key: Float[Tensor, "columns teacher_dim"] | None = None,
    *,
    columns: bool = False,
    teacher_gradient: bool = False,
    keep: int = KEEP,
) -> PairCrossEntropy:
    r"""Cross-entropy between the row softmaxes of two matrices of similarities, teacher's and student's, without either.

        rows_i = -sum_j p_ij log softmax_j(q_i . k_j),      p_i = softmax_j(tq_i . tk_j)

    and with `columns` the same down the columns of both, in one pass. `teacher_key` None: the teacher's matrix is of its
    query with itself. Temperatures: see `scaled`. The teacher gets no gradient, or with `teacher_gradient` that of the
    cross-entropies (the entropies never have one). Subtract `row_entropy` for the KL divergence; alpha-mixtures with hard
    targets are mixtures of this and the plain loss. Affinity mimicking, momentum targets (ALBEF) and off-diagonal
    distillation (Mod-X) are of this form. `keep`: see `pair_logsumexp`.

    Raises ValueError for shapes that do not fit. Differentiating twice raises RuntimeError, but for the smallest matrices.

    >>> x = torch.eye(3)
    >>> out = pair_cross_entropy(x, x, x, x)
    >>> torch.allclose(out.rows, out.row_entropy)
    True
    """
    shapes = [
        tuple(x.shape) for x in (query, key, teacher_query, teacher_query if teacher_key is None else teacher_key)
    ]
    if (
        any(len(shape) != 2 for shape in shapes)
        or shapes[0][1] != shapes[1][1]
        or shapes[2][1] != shapes[3][1]
        or (shapes[0][0], shapes[1][0]) != (shapes[2][0], shapes[3][0])
    ):
        raise ValueError(
            f"query, key, teacher_query and teacher_key must agree in rows, columns and widths, got {shapes}"
        )
    if 0 in shapes[0] or 0 in shapes[1]:
        raise ValueError(f"query and key must not be empty, got {shapes[:2]}")
    query, key = wide(query), wide(key)
    teacher: list[Tensor | None] = [
        None if x is None else (x if teacher_gradient else x.detach()).to(query.dtype)
        for x in (teacher_query, teacher_key)
    ]
    if traced() or len(query) * len(key) <= SMALL:
        of, against = teacher[0], teacher[0] if teacher[1] is None else teacher[1]
        assert of is not None
        assert against is not None
        s, t = query @ key.T, of @ against.T
        found: list[Tensor | None] = []
        for dim in (1, 0)[: 1 + columns]:
            found.append(-(t.softmax(dim) * s.log_softmax(dim)).sum(dim))
            found.append(-(t.detach().softmax(dim) * t.detach().log_softmax(dim)).sum(dim))
        return PairCrossEntropy(*found, *[None] * (4 - len(found)))  # type: ignore[arg-type]
    return PairCrossEntropy(*_PairCrossEntropy.apply(query, key, *teacher, columns, keep))


# ------------------------------------------------------------------------------------------------- pairs, one by one


def softplus(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """log(1 + exp(x)), exact in float64 too: PyTorch's own goes over to x where the difference is still 2e-9."""
    return F.softplus(x, threshold=40.0)


class _PairSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, keep: int) -> Tensor:
        work = _Pass(query, key)
        rows = query.new_zeros(len(query))
        ctx.kept = []
        with exact(query.device.type):
            for tile in _tiles(len(query), len(key), False):
                s = work.similarities(tile)
                rows[tile.rows] += softplus(s).sum(1)
                size = s.numel() * s.element_size()
                fits = size <= keep
                keep -= size if fits else 0
                ctx.kept.append(s.sigmoid() if fits else None)
        ctx.save_for_backward(query, key)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key = ctx.saved_tensors
        work = _Pass(query, key)
        to_query, to_key = torch.zeros_like(query), torch.zeros_like(key)
        with torch.no_grad(), exact(query.device.type):
            for tile, kept in zip(_tiles(len(query), len(key), False), ctx.kept, strict=True):
                g = work.similarities(tile).sigmoid_() if kept is None else kept
                g = g * gradients[0][tile.rows][:, None]
                to_query[tile.rows].addmm_(g, key[tile.columns])
                to_key[tile.columns].addmm_(g.T, query[tile.rows])
        if torch.is_grad_enabled():
            to_query, to_key = _refused((to_query, to_key), (query, key))
        return to_query, to_key, None


@full_precision
def pair_softplus(
    query: Float[Tensor, "rows dim"], key: Float[Tensor, "columns dim"], *, keep: int = KEEP
) -> Float[Tensor, " rows"]:
    r"""sum_j softplus(q_i . k_j) = sum_j log(1 + exp(q_i . k_j)) for every row, without the matrix.

    What a loss over pairs judged one by one needs (SigLIP, binary cross-entropy, NCE): softplus(-s) = softplus(s) - s, so
    positives cost one `positive_similarity`. Scale and bias: `scaled`, `with_bias`. No keys: 0.

    >>> pair_softplus(torch.zeros(2, 3), torch.zeros(4, 3))
    tensor([2.7726, 2.7726])
    """
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query and key must be [rows, dim] and [columns, dim], got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    query, key = wide(query), wide(key)
    if traced() or len(query) * len(key) <= SMALL:
        return softplus(query @ key.T).sum(1)
    return _PairSoftplus.apply(query, key, keep)


# --------------------------------------------------------------------------------------------- a bank of negatives alone


@full_precision
def info_nce(
    query: Float[Tensor, "rows dim"],
    positive: Float[Tensor, "rows dim"],
    negatives: Float[Tensor, "negatives dim"],
    temperature: float = 0.1,
    *,
    weight: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    r"""InfoNCE with an explicit bank of unpaired negatives, shared by all rows.

    All vectors are L2-normalised here. With s the cosine divided by the temperature,

        loss_r = -s(q_r, p_r) + log( exp s(q_r, p_r) + sum_m exp s(q_r, n_m) ),   loss = mean over r.

    Other rows' positives are not negatives. No negatives: the loss is 0.

    Args:
        query: one row per anchor.
        positive: row r is the positive of query r.
        negatives: the bank.
        temperature: > 0.
        weight: how often each row counts in the mean (k equal rows are one row of weight k). Default: once each.

    Returns:
        The mean loss, a scalar. Weights that sum to 0: a zero.

    Raises:
        ValueError: shapes that do not fit, an empty batch, or a temperature that is not positive and finite.

    Source: van den Oord et al. 2018, arXiv 1807.03748, in the form of MACIL-SD (arXiv 2207.05500).

    >>> info_nce(torch.eye(2), torch.eye(2), torch.zeros(1, 2), temperature=1.0)
    tensor(0.3133)
    """
    if query.ndim != 2 or query.shape != positive.shape:
        raise ValueError(
            f"query and positive must be [rows, dim] alike, got {tuple(query.shape)} and {tuple(positive.shape)}"
        )
    if negatives.ndim != 2 or negatives.shape[1] != query.shape[1]:
        raise ValueError(f"negatives must be [negatives, {query.shape[1]}], got {tuple(negatives.shape)}")
    need_positive(temperature=temperature)
    need_rows(query=query)
    if not len(query):
        return query.sum()  # one process's empty share of a batch
    q = unit(query)
    own = (q * unit(positive)).sum(1) / temperature
    negative = pair_logsumexp(q / temperature, unit(negatives)).rows
    # log(e^p + sum e^n) - p = softplus(logsumexp(n) - p): never exponentiates a large number.
    loss = softplus(negative - own)
    if weight is None:
        return loss.mean()
    return (loss * weight).sum() / weight.sum().clamp(min=torch.finfo(loss.dtype).tiny)
