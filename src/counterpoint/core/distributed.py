"""What a loss over the whole batch needs when the batch is spread over processes. Without a process group: nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when not distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _GatherRows(torch.autograd.Function):
    """All processes' rows in rank order; backward hands each process the sum of all processes' gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rank, size = world()
        counts = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(size)]
        dist.all_gather(counts, torch.tensor(rows.shape[0], device=rows.device))
        ctx.counts = [int(count) for count in counts]
        ctx.rank = rank
        # Collectives want equal shapes: pad to the longest, cut afterwards.
        longest = max(ctx.counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:count] for part, count in zip(parts, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)  # autograd may share it
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[ctx.rank]


def gather_rows(rows: Tensor) -> Tensor:
    """[n, ...] of every process -> [sum of n, ...] on all of them, in rank order, with gradients; n may differ.

    A mean loss computed on the gathered rows is the loss of the whole batch. Its gradient arrives summed over the
    processes, which DistributedDataParallel then divides by their number: the same gradients as one process would have.
    """
    if world()[1] == 1:
        return rows
    if rows.dtype.is_floating_point:
        return _GatherRows.apply(rows)
    with torch.no_grad():
        return _GatherRows.apply(rows)


def global_max(value: int, device: torch.device | str = "cpu") -> int:
    """The largest of all processes' values."""
    if world()[1] == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)
