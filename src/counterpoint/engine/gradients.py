"""Average gradients over processes, parameter by parameter, whichever parameters a step reached."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterpoint.core.world import processes

BUCKET = 25 << 20  # bytes reduced in one call


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over the processes; do nothing with one process.

    Where only some processes reached a parameter, its gradient counts as zero on the others. Where no process reached it, it
    stays without gradient, so its optimiser skips it.
    """
    if processes()[1] == 1:
        return
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted:
        return
    reached = torch.tensor([p.grad is not None for p in wanted], dtype=torch.uint8, device=wanted[0].device)
    dist.all_reduce(reached, op=dist.ReduceOp.MAX)
    bucket: list[Tensor] = []
    held, kind = 0, None
    for parameter, somewhere in zip(wanted, reached.tolist(), strict=True):
        if not somewhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (held >= BUCKET or kind != parameter.grad.dtype):
            _average(bucket)
            bucket, held = [], 0
        bucket.append(parameter.grad)
        held, kind = held + parameter.grad.nbytes, parameter.grad.dtype
    _average(bucket)


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
