r"""Log-sum-exp over the rows and the columns of a matrix of similarities that is never stored.

The formula. Two sets of rows, q [N, D] and k [M, D], have the similarities s_ij = q_i . k_j. Every softmax loss needs

    log Z_i = log sum_j d_ij exp(s_ij)         for each row i
    log Y_j = log sum_i d_ij exp(s_ij)         for each column j, where the loss looks both ways

Let a_i be the gradient that arrives for log Z_i, and b_j the one for log Y_j. The gradient of the similarities is

    g_ij = d_ij exp(s_ij) (a_i / Z_i + b_j / Y_j)

and those of the operands are two matrix products, dq = g k and dk = g^T q.

Legend.

    q, k          query and key, the two operands
    N, M, D       number of rows, number of columns, width of both
    d_ij          weight of a pair: 1, 0 where a rule excludes the pair, or what a weight function returns
    t_ij          soft target of a pair, and T_i = sum_j t_ij s_ij, the similarity of row i under its targets
    tile          a rectangle of the matrix; the largest thing that is held
    e             exponentials of a tile, d exp(s - r)
    r             reference of a tile, its largest similarity: exp(s - r) cannot overflow

The steps.

    1. `tiles` cuts the matrix. A symmetric matrix is cut into the tiles on and above its diagonal.
    2. `Operands.similarities` multiplies one tile and applies the rules.
    3. `forward` adds each tile to log Z and log Y. It keeps the exponentials of as many tiles as fit into `keep` bytes.
       Where some row lies far below r, exp(s - r) is 0 for all of it. Then rows and columns get references of their own,
       and the similarities are kept.
    4. `backward` makes g of each tile, from what was kept, or from a new product. It adds g k to dq and g^T q to dk.

The unit of cost is a matrix product of N x M x D multiplications. The steps take 3 of them where all tiles are kept, and 4
where none is. There are two shorter ways:

    `OneTile`     a matrix of one tile needs no running sums
    `FixedKeys`   keys without a gradient (a queue, a bank, a locked tower) need 2 products and keep no tile

On a GPU, `core.chunks` does steps 1 to 4 with larger parts and kernels of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterpoint.core import chunks
from counterpoint.core.exponentials import exp_
from counterpoint.core.operands import positive_similarity
from counterpoint.core.precision import Products, chosen_products, exact, fast_bf16, wide
from counterpoint.core.rules import Block, Rule
from counterpoint.core.transforms import refuse_second, traced

# Rows and columns of a tile: large enough for products at full speed, small enough to stay in the processor's cache.
TILE = (512, 2048)

# Bytes of tiles that the forward pass may keep. The backward pass computes all other tiles again: a third more work.
KEEP = 64 * 2**20
# The same for the similarities of a set of rows with itself. The half matrix of both views of 4,096 pairs fits.
KEEP_SYMMETRIC = 160 * 2**20

# Up to this many similarities the plain way, which holds the whole matrix, is as fast.
SMALL = 64 * 64

# How messages name every function that computes in tiles.
BLOCKWISE = "a loss of more than 64 x 64 similarities, made block by block (pair_logsumexp has method='plain'),"


# ------------------------------------------------------------------------------------------------------ 1. cut the matrix


class Tile(NamedTuple):
    """A rectangle of the matrix."""

    rows: slice
    columns: slice
    square: bool  # it lies on the diagonal of a symmetric matrix, and so holds (i, j) and (j, i)


def tiles(rows: int, columns: int, symmetric: bool = False) -> Iterator[Tile]:
    """List tiles that cover a matrix of this size. Those of a symmetric matrix cover the diagonal and all above it.

    Args:
        rows, columns: size of the matrix.
        symmetric: whether entry (i, j) equals entry (j, i); default no.
    """
    high, broad = TILE
    if symmetric:
        # A square on the diagonal computes both of its halves. Small squares waste little, and larger ones multiply faster.
        high = min(high, max(256, rows // 8))
    for top in range(0, rows, high):
        row = slice(top, min(top + high, rows))
        first = 0
        if symmetric:
            yield Tile(row, row, True)
            first = row.stop
        for left in range(first, columns, broad):
            yield Tile(row, slice(left, min(left + broad, columns)), False)


# ---------------------------------------------------------------------------------------------------- 2. compute one tile


class Operands:
    """The operands and rules of a matrix, from which both passes compute one tile at a time.

    Args:
        query: [N, D].
        key: [M, D] of the same type.
        rules: which pairs have no place in Z and Y; default none.
        weight: d as a function of a tile; default 1 everywhere.
        origin: position of the first row and column in the larger matrix that rules, weights and targets refer to.
        target: t as a function of a tile; default no targets.
        kind: type of the products; default that of `core.precision.products`. A backward pass takes the forward pass's type.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        rules: Sequence[Rule] = (),
        weight: Block | None = None,
        origin: tuple[int, int] = (0, 0),
        target: Block | None = None,
        kind: Products | None = None,
    ) -> None:
        self.query, self.key, self.rules, self.weight, self.origin = query, key, rules, weight, origin
        self.target = target
        self.kind = kind or chosen_products(query.device.type)
        # A row that lies this far below the reference of its tile is lost to rounding.
        self.reach = 60.0 if query.dtype == torch.float32 else 600.0
        self.buffer = query.new_empty(0)
        # Operands of the gradients' products. On a CPU with bf16 products these are the rounded ones; s stays exact.
        self.rounds = self.kind == "bf16" and query.dtype == torch.float32 and not query.is_cuda and fast_bf16()
        self.halves: dict[str, Tensor] = {}

    def factor(self, which: str) -> Tensor:
        """Return "query" or "key" in the type of the gradients' products."""
        whole: Tensor = getattr(self, which)
        if not self.rounds:
            return whole
        if which not in self.halves:
            self.halves[which] = whole.bfloat16()
        return self.halves[which]

    def rounded(self, g: Tensor) -> Tensor:
        """Return g, or exponentials, in the type of the gradients' products."""
        return g.bfloat16() if self.rounds else g

    def matrix(self, symmetric: bool = False) -> chunks.Matrix:
        """Return the same operands for the GPU's kernels."""
        asked = (self.rules, self.weight, self.origin, self.target, self.kind)
        return chunks.Matrix(self.query, self.key, *asked, symmetric=symmetric)

    def similarities(self, tile: Tile) -> Tensor:
        """Compute s of a tile, with -inf at excluded pairs. The next call overwrites the result."""
        rows, columns = tile.rows, tile.columns
        high, broad = rows.stop - rows.start, columns.stop - columns.start
        if self.buffer.numel() < high * broad:
            self.buffer = self.query.new_empty(high * broad)
        s = torch.mm(self.query[rows], self.key[columns].T, out=self.buffer[: high * broad].view(high, broad))
        for rule in self.rules:
            rule.exclude(s, *self.placed(tile))
        return s

    def placed(self, tile: Tile) -> tuple[slice, slice]:
        """Return the rows and columns of a tile in the larger matrix that this one may be a part of."""
        row, column = self.origin
        return (
            slice(tile.rows.start + row, tile.rows.stop + row),
            slice(tile.columns.start + column, tile.columns.stop + column),
        )

    def weighted(self, e: Tensor, tile: Tile) -> Tensor:
        """Multiply exponentials by their weights d, in place."""
        return e if self.weight is None else e.mul_(self.weight(*self.placed(tile)))

    def targeted(self, tile: Tile) -> Tensor | None:
        """Return the targets t of a tile; None without targets."""
        return None if self.target is None else self.target(*self.placed(tile))


class Spare:
    """Memory for tiles, used again from tile to tile: new memory of a tile costs as much as a pass over it.

    Args:
        like: tensor whose type and device it has.
        count: how many tiles at a time; default one.
    """

    def __init__(self, like: Tensor, count: int = 1) -> None:
        self.parts = [like.new_empty(0)] * count

    def like(self, tile: Tensor) -> list[Tensor]:
        """Return memory of this tile's shape, whose values are not set."""
        if self.parts[0].numel() < tile.numel():
            self.parts = [tile.new_empty(tile.numel()) for _ in self.parts]
        return [part[: tile.numel()].view(tile.shape) for part in self.parts]


def add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two matrices to `into`. Both have the type of `into` (float32 or wider), or both are bf16."""
    if left.dtype == into.dtype:
        into.addmm_(left, right)
    else:
        into.add_(left @ right)


def put_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """Write the product of two matrices to `into`; their types are those of `add_product`."""
    if left.dtype == into.dtype:
        torch.mm(left, right, out=into)
    else:
        into.copy_(left @ right)


def finite(reference: Tensor) -> Tensor:
    """Replace -inf, the reference of a row without entries, by 0, so that it can be subtracted."""
    return reference.masked_fill(reference == -math.inf, 0.0)


# ------------------------------------------------------------------------------------------------------------ 3. forward


class Kept(NamedTuple):
    """What the backward pass will use of a tile."""

    exponentials: Tensor  # or, without a reference, the similarities themselves
    reference: Tensor | None  # scalar
    target: Tensor | None


def near(reference: Tensor, tops: Sequence[Tensor], reach: float) -> bool:
    """Return whether all these largest similarities lie less than `reach` below the reference; -inf, no entry, does not count."""
    return all(bool((reference - top.masked_fill(top == -math.inf, math.inf)).amax() < reach) for top in tops)


def forward(
    work: Operands, *, columns: bool, symmetric: bool = False, keep: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Any]]:
    """Compute log Z [N], log Y [M] and T [N] in one pass over the tiles. Return them with the kept tiles.

    Without `columns` log Y is None. Without targets T is None.

    Args:
        work: the operands.
        columns: whether to compute log Y.
        symmetric: whether the matrix equals its transpose. A tile above the diagonal then counts for its mirror image.
        keep: bytes of exponentials to keep; default none. A tile that is not kept is None in the list.
    """
    query, key = work.query, work.key
    if chunks.usable(query):
        return chunks.forward(work.matrix(symmetric), columns=columns, keep=keep)
    row = query.new_full((len(query),), -math.inf)
    column = query.new_full((len(key),), -math.inf) if columns else None
    towards = None if work.target is None else query.new_zeros(len(query))
    kept: list[Kept | None] = []
    for tile in tiles(len(query), len(key), symmetric):
        s = work.similarities(tile)
        target = work.targeted(tile)
        if towards is not None and target is not None:
            towards[tile.rows] += torch.linalg.vecdot(target, s)
        # The sums down a tile are log Y of its columns; in a symmetric matrix they are log Z of the mirrored rows.
        into = row if symmetric else column
        down = into is not None and not tile.square
        tops = [s.amax(1), s.amax(0)] if down else [s.amax(1)]
        highest = finite(tops[0].amax())
        reference: Tensor | None = highest if near(highest, tops, work.reach) else None
        if reference is not None:
            e = work.weighted(exp_(s.sub_(reference)), tile)
            sums = [e.sum(1), e.sum(0)] if down else [e.sum(1)]
            if work.weight is not None and min(float(x.amin()) for x in sums) <= math.exp(-work.reach):
                s, reference = work.similarities(tile), None
        if reference is not None:
            logs = [x.log_() + reference for x in sums]
        else:  # a row lies far below the reference: each row and column gets its own
            tops = [finite(top) for top in tops]
            e = s
            logs = [work.weighted(exp_(s - tops[0][:, None]), tile).sum(1).log_() + tops[0]]
            if down:
                logs.append(work.weighted(exp_(s - tops[1]), tile).sum(0).log_() + tops[1])
        row[tile.rows] = torch.logaddexp(row[tile.rows], logs[0])
        if down:
            assert into is not None
            into[tile.columns] = torch.logaddexp(into[tile.columns], logs[1])
        size = e.numel() * e.element_size() * (1 if target is None else 2)
        fits = size <= keep
        kept.append(Kept(e, reference, target) if fits else None)
        if fits:
            keep -= size
            work.buffer = e.new_empty(0)  # the tile is kept: the next one needs memory of its own
    return row, column, towards, kept


# ----------------------------------------------------------------------------------------------------------- 4. backward


@dataclass(frozen=True)
class Side:
    """One direction of the loss: log Z of the rows with a, or log Y of the columns with b."""

    logs: Tensor
    gradient: Tensor

    def __getitem__(self, part: slice) -> Side:
        return Side(self.logs[part], self.gradient[part])

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        return self.logs, self.gradient

    def share(self, reference: Tensor) -> Tensor:
        """Return a exp(r - log Z), the factor that turns exp(s - r) into the gradient of s; 0 for a row without entries."""
        return self.gradient * (reference - self.logs).masked_fill_(self.logs == -math.inf, -math.inf).exp_()


def tile_gradient(s: Tensor, row: Side, column: Side | None, reach: float) -> Tensor:
    """Return g of a tile without its weights: the sum over the directions of gradient x exp(s - log). Overwrites s.

    Args:
        s: similarities of the tile.
        row, column: the directions, cut to the tile; column None for a loss over rows only.
        reach: largest difference between the reference and a log for which exp stays exact.
    """
    reference = finite(s.amax())
    logs = row.logs if column is None else torch.cat([row.logs, column.logs])
    lowest = logs.masked_fill(logs == -math.inf, math.inf).amin()
    if reference - lowest < reach:
        factor = row.share(reference)[:, None]
        if column is not None:
            factor = factor + column.share(reference)
        return exp_(s.sub_(reference)).mul_(factor)
    # With one reference, exp would overflow for some row. So each direction takes its own logs as references.
    there = finite(row.logs)
    first = exp_(s - there[:, None]).mul_(row.share(there)[:, None])
    if column is None:
        return first
    there = finite(column.logs)
    return first.add_(exp_(s.sub_(there)).mul_(column.share(there)))


def backward(
    work: Operands,
    row: Side,
    column: Side | None,
    kept: Sequence[Any] = (),
    *,
    symmetric: bool = False,
    wanted: tuple[bool, bool] = (True, True),
    towards: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute dq [N, D] and dk [M, D] in a second pass over the tiles.

    Args:
        work: the operands.
        row, column: the directions; column None for a loss over rows only.
        kept: tiles that `forward` kept; default none, so every tile is computed again.
        symmetric: whether the matrix equals its transpose. `column` must then be `row`, and dq holds the whole gradient.
        wanted: whether to compute dq, and dk. One that is not computed stays 0 and costs nothing.
        towards: gradient that arrives for T; None without targets.
    """
    query, key = work.query, work.key
    if chunks.usable(query):
        down = None if column is None else column.both
        return chunks.backward(work.matrix(symmetric), row.both, down, kept, wanted=wanted, towards=towards)
    to_query = torch.zeros_like(query)
    to_key = to_query if symmetric else torch.zeros_like(key)
    spare = Spare(query)
    for number, tile in enumerate(tiles(len(query), len(key), symmetric)):
        r, c = tile.rows, tile.columns
        found = kept[number] if kept else None
        across = None if column is None else column[c]
        if found is None or found.reference is None:
            # A kept tile must stay as it is: a retained graph calls backward a second time.
            s = (
                work.similarities(tile)
                if found is None
                else spare.like(found.exponentials)[0].copy_(found.exponentials)
            )
            g = work.weighted(tile_gradient(s, row[r], across, work.reach), tile)
        else:
            (g,) = spare.like(found.exponentials)
            factor = row[r].share(found.reference)[:, None]
            if across is None:
                torch.mul(found.exponentials, factor, out=g)
            else:
                torch.add(factor, across.share(found.reference), out=g).mul_(found.exponentials)
        target = work.targeted(tile) if found is None else found.target
        if towards is not None and target is not None:
            g.addcmul_(target, towards[r, None])
        g = work.rounded(g)
        if wanted[0]:
            add_product(to_query[r], g, work.factor("key")[c])
        if wanted[1] and not tile.square:
            add_product(to_key[c], g.T, work.factor("query")[r])
    return to_query, to_key


def refused(gradients: Sequence[Tensor], operands: Sequence[Tensor | None]) -> list[Tensor]:
    """Mark gradients that were made tile by tile, so that differentiating them raises RuntimeError."""
    leaf = next(x for x in operands if x is not None and x.requires_grad)
    return [refuse_second(gradient, leaf, BLOCKWISE) for gradient in gradients]


# ------------------------------------------------------------------------------------------------------- shorter: one tile


class OneTile(NamedTuple):
    """A matrix of one tile: its exponentials, their sums over rows and columns, and the targets."""

    exponentials: Tensor
    rows: Tensor
    columns: Tensor | None
    target: Tensor | None

    @staticmethod
    def of(work: Operands, columns: bool, own: bool) -> tuple[OneTile, Tensor, Tensor | None, Tensor | None] | None:
        """Return the tile, its reference, T and the diagonal of s; None where the rows differ too much for one reference.

        Args:
            work: the operands.
            columns: whether to sum columns too.
            own: whether to return the diagonal, each row's similarity with the key of its own number.
        """
        whole = Tile(slice(0, len(work.query)), slice(0, len(work.key)), True)
        s, target = work.similarities(whole), work.targeted(whole)
        towards = None if target is None else torch.linalg.vecdot(target, s)
        diagonal = s.diagonal().clone() if own else None
        reference = s.amax()
        e = work.weighted(exp_(s.sub_(reference)), whole)
        found = OneTile(e, e.sum(1), e.sum(0) if columns else None, target)
        low = min(side.amin().item() for side in (found.rows, found.columns) if side is not None)
        # A reference of -inf makes every entry NaN. The comparison is False for NaN, too.
        return (found, reference, towards, diagonal) if low > math.exp(-work.reach) else None

    def gradients(
        self, work: Operands, gradients: Sequence[Tensor], symmetric: bool, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """Return dq and dk for the gradients of log Z, log Y, T and the diagonal; see `backward`."""
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
        to_query = g @ work.key if wanted[0] else torch.zeros_like(work.query)
        return to_query, to_query if symmetric or not wanted[1] else g.T @ work.query


class LogSumExp(torch.autograd.Function):
    """Autograd function of log Z, log Y, T and the diagonal. Without a key, the query is compared with itself."""

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
        work = Operands(query, query if key is None else key, rules, weight, origin, target)
        ctx.asked, ctx.own = (rules, weight, origin, target, work.kind), own
        keep = keep if any(ctx.needs_input_grad) else 0
        ctx.one = None
        with exact(query.device.type):
            size = len(query) * len(work.key) * query.element_size() * (1 if target is None else 2)
            if len(query) <= TILE[0] and len(work.key) <= TILE[1] and size <= keep and not chunks.usable(query):
                found = OneTile.of(work, columns, own)
                if found is not None:
                    ctx.one, reference, towards, diagonal = found
                    ctx.save_for_backward(query, key)
                    ctx.set_materialize_grads(True)
                    column = None if ctx.one.columns is None else ctx.one.columns.log().add_(reference)
                    return ctx.one.rows.log().add_(reference), column, towards, *([diagonal] if own else [])
            row, column, towards, ctx.kept = forward(work, columns=columns, symmetric=key is None, keep=keep)
        ctx.save_for_backward(query, key, row, column)
        ctx.set_materialize_grads(True)
        return row, column, towards, *([torch.linalg.vecdot(query, work.key)] if own else [])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, *logs = ctx.saved_tensors
        work = Operands(query, query if key is None else key, *ctx.asked)
        wanted = (ctx.needs_input_grad[0], key is None or ctx.needs_input_grad[1])
        with torch.no_grad(), exact(query.device.type):
            if ctx.one is not None:
                to_query, to_key = ctx.one.gradients(work, gradients, key is None, wanted)
            else:
                row, column = logs
                side = Side(row, gradients[0])
                to_query, to_key = backward(
                    work,
                    side,
                    side if key is None else None if column is None else Side(column, gradients[1]),
                    ctx.kept,
                    symmetric=key is None,
                    wanted=wanted,
                    towards=None if ctx.asked[3] is None else gradients[2],
                )
                if ctx.own:
                    to_query.addcmul_(key, gradients[3][:, None])
                    to_key.addcmul_(query, gradients[3][:, None])
        if torch.is_grad_enabled():
            to_query, to_key = refused((to_query, to_key), (query, key))
        return to_query, to_key if ctx.needs_input_grad[1] else None, *[None] * 7


# ----------------------------------------------------------------------------------------------------- shorter: fixed keys


class FixedKeys(torch.autograd.Function):
    """Autograd function of log Z where the keys have no gradient. It takes two products, whatever the size of the matrix.

    Here dq_i = a_i m_i with m_i = sum_j p_ij k_j. This is the mean key under the softmax p_ij = d_ij exp(s_ij) / Z_i. The
    arriving gradient a_i is one factor for the whole row. So the forward pass already sums m, tile by tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        rules: Sequence[Rule],
        weight: Block | None,
        origin: tuple[int, int],
    ) -> Tensor:
        work = Operands(query, key, rules, weight, origin)
        if chunks.usable(query):
            rows, mean, _ = chunks.known(work.matrix(), query.new_ones(len(query)), to_key=False)
            ctx.save_for_backward(query, mean)
            return rows
        # Each row has a reference of its own, the largest similarity so far. When a tile raises it, what was summed
        # up to then shrinks by exp(old reference - new reference).
        reference = query.new_full((len(query),), -math.inf)
        total, mean = query.new_zeros(len(query)), torch.zeros_like(query)
        with exact(query.device.type):
            for tile in tiles(len(query), len(key)):
                r, c = tile.rows, tile.columns
                s = work.similarities(tile)
                top = torch.maximum(reference[r], s.amax(1))
                shrink = (reference[r] - finite(top)).exp_()
                e = work.weighted(exp_(s.sub_(finite(top)[:, None])), tile)
                reference[r] = top
                total[r] = total[r].mul_(shrink).add_(e.sum(1))
                add_product(mean[r].mul_(shrink[:, None]), work.rounded(e), work.factor("key")[c])
        # A row without entries has log Z = -inf and the gradient 0.
        mean.div_(total.masked_fill(total == 0, 1.0)[:, None])
        ctx.save_for_backward(query, mean)
        return total.log() + finite(reference)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, mean = ctx.saved_tensors
        to_query = gradients[0][:, None] * mean
        if torch.is_grad_enabled():
            (to_query,) = refused((to_query,), (query,))
        return to_query, *[None] * 4


# ----------------------------------------------------------------------------------------------------- the choice of a way


def plain(
    query: Tensor,
    key: Tensor,
    rules: Sequence[Rule],
    weight: Block | None,
    columns: bool,
    origin: tuple[int, int],
    target: Block | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute log Z, log Y and T of the whole matrix by PyTorch's own operations, with derivatives of any order."""
    s = query @ key.T
    whole = slice(origin[0], origin[0] + len(query)), slice(origin[1], origin[1] + len(key))
    towards = None if target is None else (target(*whole) * s).sum(1)
    for rule in rules:
        rule.exclude(s, *whole)
    if weight is not None:
        s = s + weight(*whole).to(s.dtype).log()
    # A row of -inf alone would have a gradient of nan.
    empty = s == -math.inf
    s = s.masked_fill(empty, torch.finfo(s.dtype).min)

    def over(dim: int) -> Tensor:
        return s.logsumexp(dim).masked_fill(empty.all(dim), -math.inf)

    return over(1), over(0) if columns else None, towards


def logsumexp(
    query: Tensor,
    key: Tensor | None,
    *,
    rules: tuple[Rule, ...] = (),
    weight: Block | None = None,
    columns: bool = False,
    origin: tuple[int, int] = (0, 0),
    target: Block | None = None,
    keep: int | None = None,
    method: str = "auto",
    own: bool = False,
) -> Any:
    """Check the operands, choose the method, and return log Z, log Y or None, T or None; with `own` also the diagonal.

    The arguments are those of `core.contrast.pair_logsumexp` and `pair_logsumexp_towards`, errors too.
    """
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
    on_gpu = chunks.usable(query)
    small = method == "auto" and entries <= (chunks.SMALL if on_gpu else SMALL)
    if traced() or method == "plain" or small or entries == 0:
        found = plain(query, query if key is None else key, rules, weight, columns, origin, target)
        return *found, *([positive_similarity(query, query if key is None else key)] if own else [])
    if key is not None and fixed(query, key) and not (columns or target or own):
        return FixedKeys.apply(query, key, rules, weight, origin), None, None
    if keep is None:
        keep = chunks.keep_default(query) if on_gpu else KEEP_SYMMETRIC if key is None else KEEP
    return LogSumExp.apply(query, key, rules, weight, columns, origin, target, keep, own)


def fixed(query: Tensor, *others: Tensor) -> bool:
    """Tell whether a backward pass will want the gradient of the query alone."""
    return torch.is_grad_enabled() and query.requires_grad and not any(x.requires_grad for x in others)
