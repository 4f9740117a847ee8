"""Compute a loss over a batch that is spread over processes.

A loss is that of this process's batch unless its caller names a group: `group=` of the public functions, or `over(group)`
around the call. The engine enters `over("world")` once, around a whole fit.

One convention: every process returns the loss of the *whole* batch as its value. The *mean* of the processes' gradients is
the gradient that one process with the whole batch would have. DistributedDataParallel and the engine take this mean. Without
them, a process's own gradient of its rows is W times its share, W being the number of processes. Two ways there:

    gather_rows, then a loss of the gathered rows on every process: simple and correct for every loss, but every process
        does all of the work;
    batch_logsumexp and global_mean: each process has its own rows against the keys of all processes, and the mean is over
        all rows. The work is shared, and with `ring=True` so is the memory: blocks of keys go from process to process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core import kernel
from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.contrast import PairLogSumExp, PairLogSumExpTowards, pair_logsumexp, pair_logsumexp_towards
from counterpoint.core.kernel import Operands, Side
from counterpoint.core.operands import positive_similarity
from counterpoint.core.precision import chosen_products, full_precision, wide
from counterpoint.core.rules import Block, Diagonal, Rule
from counterpoint.core.transforms import once, traced
from counterpoint.core.world import Group, over, over_group, process_group, world

__all__ = [
    "Group",
    "Place",
    "batch_logsumexp",
    "batch_logsumexp_apart",
    "batch_logsumexp_towards",
    "batch_order",
    "batch_pair_cross_entropy",
    "batch_pair_loss",
    "gather_rows",
    "global_logsumexp",
    "global_max",
    "global_mean",
    "mean_of_total",
    "mean_where",
    "over",
    "over_group",
    "place",
    "row_counts",
    "world",
]


FEW = 2**15  # similarities of several small batches up to which one product for all of them is faster on a CPU


def row_counts(rows: int, device: torch.device | str = "cpu") -> list[int]:
    """Return the number of rows of each process, in rank order.

    The numbers go from processor to processor where the group can do so. Otherwise they go by the `device` of the rows, whose
    work in progress is then waited for.
    """
    if world()[1] == 1:
        return [rows]
    if "cpu:" in dist.get_backend_config(process_group()):
        device = "cpu"
    counts = [torch.zeros((), dtype=torch.long, device=device) for _ in range(world()[1])]
    dist.all_gather(counts, torch.tensor(rows, device=device), group=process_group())
    return [int(count) for count in counts]


class _Told(NamedTuple):
    """How rows are spread over a group. The backward pass may run in a thread that knows no `over`, so this is kept."""

    group: dist.ProcessGroup | None
    rank: int
    counts: list[int]


def _told(rows: Tensor) -> _Told:
    return _Told(process_group(), world()[0], row_counts(len(rows), rows.device))


class _GatherRows(torch.autograd.Function):
    """All processes' rows in rank order; backward hands each process the sum of all processes' gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, told: _Told | None = None) -> Tensor:
        told = told or _told(rows)
        ctx.told = told
        # Collectives want equal shapes: pad to the longest, cut afterwards.
        longest = max(told.counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in told.counts]
        dist.all_gather(parts, padded.contiguous(), group=told.group)
        return torch.cat([part[:count] for part, count in zip(parts, told.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _SumOwnRows.apply(grads[0], ctx.told), None


class _SumOwnRows(torch.autograd.Function):
    """Sum all processes' tensors and keep this process's rows of the sum; backward gathers: the gather's counterpart."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, told: _Told) -> Tensor:
        ctx.told = told
        total = rows.clone(memory_format=torch.contiguous_format)  # autograd may share it
        dist.all_reduce(total, group=told.group)
        return total.split(told.counts)[told.rank]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _GatherRows.apply(grads[0], ctx.told), None


def gather_rows(rows: Tensor) -> Tensor:
    """Gather [n, ...] of every process as [sum of n, ...] on all of them, in rank order, with gradients; n may differ.

    A mean loss computed on the gathered rows is the loss of the whole batch. Its gradient arrives summed over the
    processes, which the engine then divides by their number: the same gradients as one process would have.
    """
    if world()[1] == 1:
        return rows
    if traced():
        raise RuntimeError(
            "torch.func and torch.compile do not follow a loss over several processes: apply them without a process group"
        )
    if rows.dtype.is_floating_point:
        return _GatherRows.apply(rows)
    with torch.no_grad():
        return _GatherRows.apply(rows)


def global_max(value: int, device: torch.device | str = "cpu") -> int:
    """Return the largest of all processes' values."""
    if world()[1] == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=process_group())
    return int(tensor)


class _GlobalMean(torch.autograd.Function):
    """Mean over all processes' values; the gradient is scaled so that the processes' mean of it is right."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = torch.stack([values.sum(), values.new_full((), float(len(values)))])
        dist.all_reduce(total, group=process_group())
        ctx.length, ctx.count, ctx.size = len(values), total[1].clamp(min=1), world()[1]
        return total[0] / ctx.count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return (grads[0] * ctx.size / ctx.count).expand(ctx.length)


def global_mean(values: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Mean over the values of all processes, each of which may hold a different number; 0 of none at all."""
    if world()[1] == 1:
        return values.mean() if len(values) else values.sum()
    return _GlobalMean.apply(values)


def mean_of_total(total: Float[Tensor, ""], count: int | Int[Tensor, ""]) -> Float[Tensor, ""]:
    """Divide the sum of all processes' totals by `count`; the gradient follows `global_mean`, for a mean over processes."""
    return global_mean((total * world()[1] / count)[None])


@over_group
@full_precision
def mean_where(values: Float[Tensor, " n"], kept: Bool[Tensor, " n"]) -> Float[Tensor, ""]:
    """Compute the mean over the kept rows of all processes; 0 if no row is kept. A row that is not kept may hold any value.

    >>> mean_where(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True]))
    tensor(3.5000)
    """
    share = global_mean(kept.to(values.dtype)).detach()
    return global_mean(torch.where(kept, values, 0)) / share.clamp(min=torch.finfo(values.dtype).tiny)


def global_logsumexp(values: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """log of the sum over all processes of exp(values), entry by entry; -inf where no process has anything."""
    if world()[1] == 1:
        return values
    parts = gather_rows(values[None])
    empty = parts == -math.inf
    # An entry of -inf alone would have a gradient of nan.
    return parts.masked_fill(empty, torch.finfo(parts.dtype).min).logsumexp(0).masked_fill(empty.all(0), -math.inf)


class Place(NamedTuple):
    """Where this process's rows stand in the whole batch."""

    offset: int  # index of its first row
    rows: int  # how many it has
    total: int  # how many there are


def place(rows: int, device: torch.device | str = "cpu") -> Place:
    """Return the position of this process's `rows` rows among those of all processes, in rank order."""
    counts = row_counts(rows, device)
    return Place(sum(counts[: world()[0]]), rows, sum(counts))


def batch_order(total: int) -> Int[Tensor, " total"]:
    """Return the position in the batch of each gathered row, in rank order; the batch's items go to the processes in turn.

    Args:
        total: number of items of the whole batch.

    >>> batch_order(3)
    tensor([0, 1, 2])
    """
    size = world()[1]
    return torch.cat([torch.arange(rank, total, size) for rank in range(size)])


def _pass_on(tensors: Sequence[Tensor], rows_to_come: int, told: _Told) -> list[Tensor]:
    """Hand tensors to the next process in the ring and take as many, of `rows_to_come` rows, from the one before."""
    size = len(told.counts)
    group = told.group or dist.group.WORLD
    assert group is not None  # the ring is there only where the processes are
    after, before = (dist.get_global_rank(group, (told.rank + step) % size) for step in (1, -1))
    arriving = [tensor.new_empty((rows_to_come, *tensor.shape[1:])) for tensor in tensors]
    work = []
    for tag, (out, new) in enumerate(zip(tensors, arriving, strict=True)):
        if len(out):
            work.append(dist.P2POp(dist.isend, out.contiguous(), after, group=told.group, tag=tag))
        if len(new):
            work.append(dist.P2POp(dist.irecv, new, before, group=told.group, tag=tag))
    for request in dist.batch_isend_irecv(work) if work else []:
        request.wait()
    return arriving


class _Ring(torch.autograd.Function):
    """pair_logsumexp of this process's rows against everybody's keys, which pass by block by block."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, rules: Sequence[Rule], columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        # The backward pass may run in a thread that knows no `products`.
        ctx.rules, ctx.columns, ctx.kind = rules, columns, chosen_products(query.device.type)
        ctx.told, ctx.keys = _told(query), row_counts(len(key), key.device)
        rank, size = ctx.told.rank, len(ctx.keys)
        row = query.new_full((len(query),), -math.inf)
        held, column = key, key.new_full((len(key) if columns else 0,), -math.inf)
        for step in range(size):
            owner = (rank - step) % size
            if len(query) and len(held):
                work = Operands(query, held, rules, origin=_origin(ctx, owner), kind=ctx.kind)
                part, across, _, _ = kernel.forward(work, columns=columns)
                row = torch.logaddexp(row, part)
                column = column if across is None else torch.logaddexp(column, across)
            coming = ctx.keys[(owner - 1) % size]
            (held,) = _pass_on([held], coming, ctx.told)
            if columns:
                (column,) = _pass_on([column], coming, ctx.told)
        ctx.save_for_backward(query, key, row, column)
        ctx.set_materialize_grads(True)
        return row, column if columns else None

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, row, column = ctx.saved_tensors
        rank, size = ctx.told.rank, len(ctx.keys)
        to_query, to_held = torch.zeros_like(query), torch.zeros_like(key)
        held, logs = key, column
        arriving = gradients[1] if ctx.columns else column
        for step in range(size):
            owner = (rank - step) % size
            if len(query) and len(held):
                work = Operands(query, held, ctx.rules, origin=_origin(ctx, owner), kind=ctx.kind)
                across = Side(logs, arriving) if ctx.columns else None
                here, there = kernel.backward(work, Side(row, gradients[0]), across)
                to_query += here
                to_held += there
            coming = ctx.keys[(owner - 1) % size]
            held, to_held = _pass_on([held, to_held], coming, ctx.told)
            if ctx.columns:
                logs, arriving = _pass_on([logs, arriving], coming, ctx.told)
        return to_query, to_held, None, None


def _origin(ctx: Any, owner: int) -> tuple[int, int]:
    return sum(ctx.told.counts[: ctx.told.rank]), sum(ctx.keys[:owner])


def batch_logsumexp(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"] | None = None,
    *,
    exclude: Rule | Sequence[Rule] = (),
    weight: Block | None = None,
    columns: bool = False,
    ring: bool = False,
) -> PairLogSumExp:
    """Compute `pair_logsumexp` over the batch of all processes: this process's rows against all keys, and the reverse.

    Args:
        query, key: this process's rows and keys; numbers may differ between processes. key None: the query's.
        exclude: rules in terms of the whole batch, rows and keys counted in rank order (see `place`).
        weight: non-negative weights of pairs, as of `pair_logsumexp`, in terms of the whole batch too. Not with `ring`.
        columns: also log Z of this process's keys over the rows of all processes.
        ring: pass blocks of keys from process to process instead of gathering them. So no process ever holds all keys. It is
            slower by the time of the network, and computes all tiles twice.

    Without a process group this is `pair_logsumexp`. The mean of a loss made of it is `global_mean`.
    """
    if ring and weight is not None:
        raise ValueError("ring: blocks of keys that are passed round cannot be weighted; gather them with ring=False")
    if world()[1] == 1:
        return pair_logsumexp(query, key, exclude=exclude, weight=weight, columns=columns)
    rules = tuple(exclude) if isinstance(exclude, Sequence) else (exclude,)
    query = wide(query)
    key = query if key is None else wide(key)
    if ring:
        what = "a loss with ring=True"
        return PairLogSumExp(*_Ring.apply(once(query, what), once(key, what), rules, columns))
    return PairLogSumExp(*_against_all(query, key, rules, columns, None, weight)[:2])


def batch_logsumexp_apart(groups: Float[Tensor, "groups rows dim"]) -> Float[Tensor, "groups rows"]:
    """Compute log Z of every row over the other rows of its own group, of all processes.

    Args:
        groups: operands of several batches that do not see each other, such as views; equally many rows of each.

    Up to FEW similarities of rows are one matrix product for all groups. Beyond, each is `batch_logsumexp`. A row alone is -inf.
    """
    few = groups.shape[0] * groups.shape[1] ** 2 <= FEW and not groups.is_cuda
    if world()[1] > 1 or groups.shape[1] < 2 or not few:
        return torch.stack([batch_logsumexp(group, exclude=Diagonal()).rows for group in groups])
    similarity = groups @ groups.mT
    similarity.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    return similarity.logsumexp(2)


def batch_pair_loss(
    query: Float[Tensor, "rows dim"], key: Float[Tensor, "rows dim"], *, ring: bool = False
) -> Float[Tensor, ""]:
    """Compute the loss of CLIP: the cross-entropy of row i with key i among all keys, and back; the mean of both.

    Args:
        query, key: this process's operands, equally many; temperatures: see `core.operands.scaled`.
        ring: see `batch_logsumexp`.
    """
    out = batch_logsumexp(query, key, columns=True, ring=ring)
    assert out.columns is not None
    return global_mean((out.rows + out.columns) / 2 - positive_similarity(query, key))


def batch_pair_cross_entropy(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "rows dim"],
    teacher_query: Float[Tensor, "rows teacher_dim"],
    teacher_key: Float[Tensor, "rows teacher_dim"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """`pair_cross_entropy` over the batch of all processes, of this process's rows and of its columns.

    Args:
        query, key: this process's operands of the student.
        teacher_query, teacher_key: the teacher's, without gradient.
    """
    if world()[1] == 1:
        out = pair_cross_entropy(query, key, teacher_query, teacher_key, columns=True, entropy=False)
        assert out.columns is not None
        return out.rows, out.columns

    def of_rows(own: Tensor, other: Tensor, taught: Tensor, taught_other: Tensor) -> Tensor:
        every, all_taught = gather_rows(other), gather_rows(taught_other)
        if not len(own):  # nothing to compare, but the other processes wait in the gather's backward pass
            return own.sum(1) + every.sum() * 0
        return pair_cross_entropy(own, every, taught, all_taught, entropy=False).rows

    return of_rows(query, key, teacher_query, teacher_key), of_rows(key, query, teacher_key, teacher_query)


def batch_logsumexp_towards(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    target: Block,
    *,
    columns: bool = False,
    own: bool = False,
) -> PairLogSumExpTowards:
    """`pair_logsumexp_towards` over the batch of all processes, as `batch_logsumexp`; the targets are the whole batch's."""
    if world()[1] == 1:
        return pair_logsumexp_towards(query, key, target, columns=columns, own=own)
    rows, across, towards = _against_all(wide(query), wide(key), (), columns, target)
    assert towards is not None
    return PairLogSumExpTowards(rows, across, towards, positive_similarity(query, key) if own else None)


@full_precision
def _against_all(
    query: Tensor,
    key: Tensor,
    rules: tuple[Rule, ...],
    columns: bool,
    target: Block | None,
    weight: Block | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compare this process's rows with all processes' keys: log Z of both, and the rows' similarity under targets."""
    here = place(len(query), query.device)
    own = place(len(key), key.device)
    everything = gather_rows(key)
    if here.rows == 0:
        # Nothing to compare, but the other processes wait for this one in the gathers, forward and backward.
        rows, across = query.sum(1) + everything.sum() * 0, everything.sum(1) * 0 - math.inf
        towards = None if target is None else rows
    else:
        origin = (here.offset, 0)
        rows, found, towards = kernel.logsumexp(
            query, everything, rules=rules, weight=weight, columns=columns, origin=origin, target=target
        )
        across = everything.new_empty(0) if found is None else found
    if not columns:
        return rows, None, towards
    # Each process has the columns' sums over its own rows; gathered, their log-sum-exp is that over all rows.
    total = global_logsumexp(across)
    return rows, total[own.offset : own.offset + own.rows], towards
