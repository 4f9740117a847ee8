r"""The softmax over a matrix of similarities, the mathematics that most systems share, without the matrix.

With s_ij = q_i . k_j a contrastive loss is, row by row,

    loss_i = -sum_j p_ij s_ij + (sum_j p_ij) log Z_i,      Z_i = sum_j d_ij exp(s_ij).

The first term is linear in q and needs no matrix (`core.operands.positive_similarity`, `class_similarity`). What remains is log Z
over rows and, where a loss looks both ways, over columns: `pair_logsumexp`. Where to find what:

    core.operands     rows before the comparison: unit length, temperature, biases; similarity with the positives
    core.rules        which pairs a row does not see
    core.kernel       log Z over rows and columns in tiles, forward and backward
    core.affinities   soft targets from a second matrix: `pair_cross_entropy`

More keys (a queue, a bank, synthesised negatives) are `torch.logaddexp` of two calls. Keys without a gradient cost two
products instead of three or four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core import chunks, kernel
from counterpoint.core.checks import need_positive, need_rows
from counterpoint.core.exponentials import softplus_sum
from counterpoint.core.kernel import KEEP, Operands, Spare, Tile, add_product, put_product, refused, tiles
from counterpoint.core.operands import positive_similarity, unit, with_bias
from counterpoint.core.precision import Products, exact, full_precision, products, scalar, wide
from counterpoint.core.rules import Block, Rule
from counterpoint.core.transforms import traced


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
    precision: Products | Literal["auto"] = "auto",
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
            default 64 MiB, or 160 MiB for the query with itself, and on a GPU 1/32 of its memory.
        method: "blocks" or "plain" (the whole matrix, differentiable twice, traceable by torch.compile). "auto" takes the
            plain way for the smallest matrices and inside torch.compile.
        precision: type of the products on a GPU: "exact" (to 1e-6 of float64), "tf32", "bf16" or "fp16". "auto" takes the
            half precision of the operands or of autocast, otherwise PyTorch's setting for float32. A CPU is exact.

    Returns (rows, columns). A row with nothing in its denominator is -inf, with gradient 0.

    Raises ValueError for shapes or types that do not fit. Differentiating twice through "blocks" raises RuntimeError.

    >>> x = torch.eye(3)
    >>> from counterpoint.core.rules import Diagonal
    >>> pair_logsumexp(x, exclude=Diagonal()).rows
    tensor([0.6931, 0.6931, 0.6931])
    """
    rules = tuple(exclude) if isinstance(exclude, Sequence) else (exclude,)
    with products(precision):
        rows, across, _ = kernel.logsumexp(
            query, key, rules=rules, weight=weight, columns=columns, origin=origin, keep=keep, method=method
        )
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
    precision: Products | Literal["auto"] = "auto",
) -> PairLogSumExpTowards:
    r"""`pair_logsumexp`, and in the same pass every row's similarity under soft targets, towards_i = sum_j p_ij q_i . k_j.

    `target` gives p as a function (rows, columns) -> [r, c], asked for one tile at a time; for few entries to a row see
    `Targets`. It has no gradient. `own`: q_i . k_i too, as many rows as columns (`positive_similarity` in a pass of its
    own otherwise). Where p has a structure, `positive_similarity` of a mean of keys can be less work. The
    rest, errors too, as there.

    >>> x = torch.eye(3)
    >>> from counterpoint.core.rules import Targets
    >>> pair_logsumexp_towards(x, x, Targets(torch.tensor([[0], [1], [0]]), torch.ones(3, 1), 0, 3)).towards
    tensor([1., 1., 0.])
    """
    if own and query.shape != key.shape:
        raise ValueError(f"own: query {tuple(query.shape)} and key {tuple(key.shape)} must be paired row by row")
    with products(precision):
        found = kernel.logsumexp(query, key, columns=columns, origin=origin, target=target, keep=keep, own=own)
    return PairLogSumExpTowards(*found)


# ------------------------------------------------------------------------------------------------- pairs, one by one


def softplus(x: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """log(1 + exp(x)), exact in float64 too: PyTorch's own goes over to x where the difference is still 2e-9."""
    return F.softplus(x, threshold=40.0)


class _PairSoftplus(torch.autograd.Function):
    """The sum of each row in tiles. Where the keys have no gradient, the query's is made in the forward pass.

    The gradient of s_ij is sigmoid(s_ij) times what arrives for row i. At the row's own key, 1 is taken off the sigmoid.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, bias: Tensor | None, own: int | None, keep: int) -> Tensor:
        work = Operands(query, key)
        ctx.kind, ctx.own = work.kind, own
        ctx.fixed = any(ctx.needs_input_grad) and not ctx.needs_input_grad[1]
        if chunks.usable(query):
            matrix = chunks.Matrix(query, key, kind=work.kind, softplus=True)
            pull = None
            if ctx.fixed:
                rows, pull, _ = chunks.known(matrix, query.new_ones(len(query)), to_key=False)
            else:
                rows, _, _, ctx.kept = chunks.forward(matrix, columns=False, keep=keep)
            ctx.save_for_backward(query, key, bias, pull, None)
            return rows
        rows = query.new_zeros(len(query))
        pull, mass = (torch.zeros_like(query), torch.zeros_like(rows)) if ctx.fixed else (None, None)
        ctx.kept = []
        spare = Spare(query, 2)
        with exact(query.device.type):
            for tile in tiles(len(query), len(key)):
                s = _biased(work, tile, bias)
                rows[tile.rows] += softplus_sum(s, spare.like(s))
                if own is not None:
                    part, entries = _own(s, tile, own)
                    rows[part] -= entries
                size = s.numel() * s.element_size()
                fits = any(ctx.needs_input_grad) and not ctx.fixed and size <= keep
                if pull is not None and mass is not None:
                    g = _slope(s, tile, own)
                    pull[tile.rows].addmm_(g, key[tile.columns])
                    mass[tile.rows] += g.sum(1)
                ctx.kept.append(_slope(s, tile, own) if fits else None)
                if fits:
                    keep -= size
                    work.buffer = s.new_empty(0)  # the tile is kept: the next one needs memory of its own
        ctx.save_for_backward(query, key, bias, pull, mass)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, bias, pull, mass = ctx.saved_tensors
        arriving = gradients[0]
        to_key = to_bias = None
        with torch.no_grad(), exact(query.device.type):
            if pull is not None:
                to_query = arriving[:, None] * pull
                to_bias = arriving @ mass if ctx.needs_input_grad[2] else None
            elif chunks.usable(query):
                matrix = chunks.Matrix(query, key, kind=ctx.kind, softplus=True)
                wanted = ctx.needs_input_grad[:2]
                to_query, to_key = chunks.backward(matrix, (arriving,) * 2, None, ctx.kept, wanted=wanted)
            else:
                to_query, to_key, to_bias = _softplus_gradients(ctx, query, key, bias, arriving)
        found = [
            x if needed else None for x, needed in zip((to_query, to_key, to_bias), ctx.needs_input_grad, strict=False)
        ]
        if torch.is_grad_enabled():
            again = iter(refused([x for x in found if x is not None], (query, key, bias)))
            found = [None if x is None else next(again) for x in found]
        return *found, None, None


def _softplus_gradients(
    ctx: Any, query: Tensor, key: Tensor, bias: Tensor | None, arriving: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of query, key and bias, tile by tile; one that is not wanted is not set."""
    work = Operands(query, key)
    to_query, to_key = torch.empty_like(query), torch.empty_like(key)
    to_bias = arriving.new_zeros(()) if ctx.needs_input_grad[2] else None
    spare = Spare(query)
    for tile, kept in zip(tiles(len(query), len(key)), ctx.kept, strict=True):
        r, c = tile.rows, tile.columns
        g = _slope(_biased(work, tile, bias), tile, ctx.own) if kept is None else kept
        # A kept tile stays as it is: a retained graph calls this a second time.
        g = torch.mul(g, arriving[r, None], out=spare.like(g)[0])
        if ctx.needs_input_grad[0]:
            (add_product if c.start else put_product)(to_query[r], g, key[c])
        if ctx.needs_input_grad[1]:
            (add_product if r.start else put_product)(to_key[c], g.T, query[r])
        if to_bias is not None:
            to_bias += g.sum()
    return to_query, to_key, to_bias


def _biased(work: Operands, tile: Tile, bias: Tensor | None) -> Tensor:
    s = work.similarities(tile)
    return s if bias is None else s.add_(bias)


def _slope(s: Tensor, tile: Tile, own: int | None) -> Tensor:
    """Replace s by its sigmoid, less 1 at each row's own key."""
    s.sigmoid_()
    if own is not None:
        _own(s, tile, own)[1].sub_(1)
    return s


def _own(s: Tensor, tile: Tile, own: int) -> tuple[slice, Tensor]:
    """Return the rows whose own key lies in the tile, and those entries of s as a view. Row i's key is number i + `own`."""
    start = max(tile.rows.start, tile.columns.start - own)
    entries = s.diagonal(tile.rows.start + own - tile.columns.start)  # empty where the tile holds none
    return slice(start, start + len(entries)), entries


@full_precision
def pair_softplus(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    bias: float | Float[Tensor, ""] | None = None,
    *,
    own: int | None = None,
    keep: int | None = None,
    precision: Products | Literal["auto"] = "auto",
) -> Float[Tensor, " rows"]:
    r"""Compute sum_j softplus(s_ij) = sum_j log(1 + exp(s_ij)) for every row, with s_ij = q_i . k_j + bias, without the matrix.

    It serves losses of pairs that are judged one by one (SigLIP, binary cross-entropy, NCE). Since softplus(-s) =
    softplus(s) - s, a positive's logit is subtracted: `own` does so for one key of each row.

    Args:
        query: one row per anchor; float64, float32, or a half precision (then computed and returned in float32).
        key: the rows that they are compared with. Without any, the sums are 0.
        bias: a number that is added to all similarities, or a learnable scalar; default none.
        own: number of the first row's own key. Row i then has s_i,i+own subtracted. Default: no subtraction.
        keep, precision: as in `pair_logsumexp`.

    Raises ValueError for shapes that do not fit. For a scale see `scaled`.

    >>> pair_softplus(torch.zeros(2, 3), torch.zeros(4, 3))
    tensor([2.7726, 2.7726])
    >>> pair_softplus(torch.eye(2), torch.eye(2), bias=-1.0, own=0)
    tensor([1.0064, 1.0064])
    """
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query and key must be [rows, dim] and [columns, dim], got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if own is not None and not 0 <= own <= len(key) - len(query):
        raise ValueError(f"own must be from 0 to {len(key)} columns - {len(query)} rows, got {own}")
    query, key = wide(query), wide(key)
    bias = None if bias is None else scalar(bias, query)
    on_device = chunks.usable(query)
    if traced() or len(query) * len(key) <= (chunks.SMALL if on_device else kernel.SMALL):
        s = query @ key.T if bias is None else query @ key.T + bias
        sums = softplus(s).sum(1)
        return sums if own is None else sums - s.diagonal(own)
    with products(precision):
        if not on_device:
            return _PairSoftplus.apply(query, key, bias, own, KEEP if keep is None else keep)
        if bias is not None:  # the GPU's kernels know no bias
            query, key = with_bias(query, key, row=bias.expand(len(query)))
        sums = _PairSoftplus.apply(query, key, None, None, chunks.keep_default(query) if keep is None else keep)
        return sums if own is None else sums - positive_similarity(query, key[own : own + len(query)])


# ----------------------------------------------------------------------------- a bank of negatives alone


@full_precision
def info_nce(
    query: Float[Tensor, "rows dim"],
    positive: Float[Tensor, "rows dim"],
    negatives: Float[Tensor, "negatives dim"],
    temperature: float = 0.1,
    *,
    weight: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    r"""Compute InfoNCE with an explicit bank of unpaired negatives, shared by all rows.

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
