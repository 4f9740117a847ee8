"""Average gradients over processes, parameter by parameter, whichever parameters a step reached."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterpoint.core.distributed import gather_rows, over, row_counts
from counterpoint.core.divided import is_sharded
from counterpoint.core.world import processes

BUCKET = 25 << 20  # bytes reduced in one call


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over the processes; do nothing with one process.

    Where only some processes reached a parameter, its gradient counts as zero on the others. Where no process reached it, it
    stays without gradient, so its optimiser skips it. A sparse gradient stays sparse. Divided parameters are left out.
    """
    if processes()[1] == 1:
        return
    wanted = [p for p in parameters if p.requires_grad and not is_sharded(p)]
    if not wanted:
        return
    kinds = [0 if p.grad is None else 2 if p.grad.is_sparse else 1 for p in wanted]
    reached = torch.tensor(kinds, dtype=torch.uint8).to(wanted[0].device, non_blocking=True)
    dist.all_reduce(reached, op=dist.ReduceOp.MAX)
    # A process that reached every parameter need not know about the others. Reading would make it wait for the backward pass.
    everywhere = reached.tolist() if 0 in kinds else kinds
    bucket: list[Tensor] = []
    held, kind = 0, None
    for parameter, somewhere in zip(wanted, everywhere, strict=True):
        if not somewhere:
            continue
        if somewhere == 2:
            parameter.grad = _average_rows(parameter)
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (held >= BUCKET or kind != parameter.grad.dtype):
            _average(bucket)
            bucket, held = [], 0
        bucket.append(parameter.grad)
        held, kind = held + parameter.grad.nbytes, parameter.grad.dtype
    _average(bucket)


def _average_rows(parameter: nn.Parameter) -> Tensor:
    """Return the mean over the processes of sparse gradients, as a sparse gradient."""
    own = parameter.grad
    if own is None:
        own = _rows(parameter, torch.empty(1, 0, dtype=torch.long), torch.empty(0, *parameter.shape[1:]))
    own = own.coalesce()
    rows, values = own.indices().T, own.values()
    with over("world"):
        counts = row_counts(len(rows), rows.device)
        everywhere = gather_rows(rows)
        # Every process compares the same lists, so all take the same branch.
        first, *others = everywhere.split(counts)
        if all(torch.equal(first, other) for other in others):
            dist.all_reduce(values)
            everywhere = rows
        else:
            values = gather_rows(values)
    return _rows(parameter, everywhere.T, values / processes()[1]).coalesce()


def _rows(parameter: nn.Parameter, rows: Tensor, values: Tensor) -> Tensor:
    """Return a sparse gradient of a parameter with these rows [1, n] and values [n, ...]."""
    device, dtype = parameter.device, parameter.dtype
    return torch.sparse_coo_tensor(rows.to(device), values.to(device, dtype), parameter.shape, check_invariants=False)


def _average(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= processes()[1]
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def share_weights(module: nn.Module) -> None:
    """Send the first process's parameters and buffers to all others, so that all processes start from the same weights."""
    if processes()[1] > 1:
        for value in [*module.parameters(), *module.buffers()]:
            dist.broadcast(value.detach(), 0)


def share_buffers(module: nn.Module) -> None:
    """Send the first process's buffers to all others, so that all processes evaluate the same network."""
    if processes()[1] > 1:
        for value in module.buffers():
            dist.broadcast(value.detach(), 0)
