"""Losses of the image systems over processes: uneven shares of a batch have what one process has."""

from __future__ import annotations

import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

COUNTS = [4, 2]


def draw(n: int = sum(COUNTS), dim: int = 5) -> list[torch.Tensor]:
    return list(torch.randn(2, n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def mine(whole: torch.Tensor) -> torch.Tensor:
    from counterpoint.core.distributed import world

    rank, size = world()
    return whole if size == 1 else whole[sum(COUNTS[:rank]) : sum(COUNTS[: rank + 1])]


def losses():
    """name -> loss of two sides; the spawned processes import what they need here and nothing else."""
    from counterpoint import functional as fn
    from counterpoint.core.compared import Compared, directions
    from counterpoint.core.distributed import global_mean
    from counterpoint.systems.images.hard_contrastive import hard_losses
    from counterpoint.systems.images.isogclr import Settings, _side, _views
    from counterpoint.systems.images.mochi import mixed_losses

    settings = Settings(0.4, 0.8, 0.03, 0.9, 0.05, 1.0, 3.0)
    queue = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)
    random = torch.rand(sum(COUNTS), 2, 7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def state(n: int) -> dict[str, torch.Tensor]:
        values = {"s": 0.0, "u": 0.0, "b": 0.0, "tau": 0.3}
        return {k: torch.full((n,), v, dtype=torch.float64) for k, v in values.items()}

    def ways(form, x, y):
        return directions(Compared(form, x, y, 0.3, None, queue))

    def drawn(way, n, number):
        own = mine(random)
        return own.transpose(0, 1).flatten(0, 1) if len(way.query) == 2 * n else own[:, number]

    def mochi(form):
        return lambda x, y: torch.stack(
            [
                global_mean(mixed_losses(way, 0.3, drawn(way, len(x), number), 4, 5).losses)
                for number, way in enumerate(ways(form, x, y))
            ]
        ).sum()

    def hard(form):
        return lambda x, y: torch.stack([global_mean(hard_losses(way, 0.3, 0.5)) for way in ways(form, x, y)]).sum()

    def unit(f):
        return lambda x, y: f(F.normalize(x, dim=1), F.normalize(y, dim=1))

    index = torch.tensor([0, 1, 0, 2, 3, 4])
    return {
        "dcl": lambda x, y: fn.dcl(x, y, 0.3),
        "dclw": lambda x, y: fn.dcl(x, y, 0.3, 0.5),
        "dcl one way": lambda x, y: fn.dcl(x, y, 0.3, symmetric=False),
        "by index": lambda x, y: fn.ntxent_by_index(torch.cat([x, y]), torch.cat([mine(index), mine(index)]), 0.3),
        "isogclr views": unit(lambda x, y: _views(state(len(x)), x, y, settings, True, False)[0]),
        "isogclr pairs": unit(lambda x, y: _side(state(len(x)), x, y, settings, 1e-10, False)[0]),
        **{f"mochi {form}": mochi(form) for form in ("views", "queue", "pairs")},
        **{f"hard {form}": hard(form) for form in ("views", "queue", "pairs")},
    }


def run(name, share=slice(None)):
    tensors = [x[share].clone().requires_grad_() for x in draw()]
    loss = losses()[name](*tensors)
    loss.backward()
    return loss.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in tensors]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS))
    share = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    torch.save({name: run(name, share) for name in losses()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_together_have_the_losses_and_the_gradients_of_one(tmp_path):
    multiprocessing.set_forkserver_preload(["counterpoint.systems.images.mochi"])
    mp.start_processes(work, (str(tmp_path),), nprocs=len(COUNTS), start_method="forkserver")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(COUNTS))]
    for name in losses():
        loss, gradients = run(name)
        for rank, found in enumerate(results):
            share = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
            torch.testing.assert_close(
                (found[name][0], [gradient / len(COUNTS) for gradient in found[name][1]]),
                (loss, [gradient[share] for gradient in gradients]),
                rtol=1e-9,
                atol=1e-12,
                msg=lambda message, name=name: f"{name}: {message}",
            )
