"""Losses over processes against one process with the whole batch: what several tests of systems share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from counterpoint.core.world import leave

# name -> (how many tensors, loss of them); a function of a module's own, which spawned processes find by its name.
Losses = Callable[[], dict[str, tuple[int, Callable[..., Tensor]]]]
Draw = Callable[[int, int], list[Tensor]]  # so many tensors of so many rows


def share(rank: int, counts: Sequence[int]) -> slice:
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def mine(whole: Tensor, counts: Sequence[int]) -> Tensor:
    """Return this process's part of something that has an entry for each row of the batch."""
    from counterpoint.core.distributed import world

    rank, size = world()
    return whole if size == 1 else whole[share(rank, counts)]


def run(losses: Losses, draw: Draw, name: str, rows: int, part: slice = slice(None)) -> tuple[Tensor, list[Tensor]]:
    many, function = losses()[name]
    tensors = [x[part].clone().requires_grad_() for x in draw(many, rows)]
    loss = function(*tensors)
    loss.backward()
    return loss.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]


def _work(rank: int, folder: str, losses: Losses, draw: Draw, counts: Sequence[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(counts))
    from counterpoint.core.distributed import over

    with over("world"):
        found = {name: run(losses, draw, name, sum(counts), share(rank, counts)) for name in losses()}
        torch.save(found, f"{folder}/{rank}.pt")
    leave()


def check(losses: Losses, draw: Draw, counts: Sequence[int], folder: Path) -> None:
    """Fail unless processes with so many rows each have the losses of one process, and gradients whose mean is its."""
    mp.start_processes(_work, (str(folder), losses, draw, counts), nprocs=len(counts), start_method="forkserver")
    results = [torch.load(folder / f"{rank}.pt") for rank in range(len(counts))]
    for name in losses():
        loss, gradients = run(losses, draw, name, sum(counts))
        for rank, found in enumerate(results):
            torch.testing.assert_close(
                (found[name][0], [gradient / len(counts) for gradient in found[name][1]]),
                (loss, [gradient[share(rank, counts)] for gradient in gradients]),
                rtol=1e-9,
                atol=1e-12,
                msg=lambda message, name=name: f"{name}: {message}",
            )
