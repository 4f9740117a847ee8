"""Losses of the alignment systems over processes: uneven shares of a batch, one of them empty, have what one process has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from counterpoint.core.world import leave

COUNTS = [4, 0, 3]


def draw(m: int, n: int = sum(COUNTS), dim: int = 4) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(m)
    return list(F.normalize(torch.randn(m, n, dim, generator=g, dtype=torch.float64), dim=2))


def permutations(m: int) -> torch.Tensor:
    from counterpoint.systems.alignment.symile import draw_permutations

    return draw_permutations(m, sum(COUNTS), torch.Generator().manual_seed(0))


def mine(whole: torch.Tensor) -> torch.Tensor:
    """Return this process's part of something that has an entry for each row of the batch."""
    from counterpoint.core.distributed import world

    rank, size = world()
    return whole if size == 1 else whole[sum(COUNTS[:rank]) : sum(COUNTS[: rank + 1])]


def losses():
    """name -> (how many tensors, loss of them); the spawned processes import what they need here and nothing else."""
    from counterpoint import functional as fn

    scale = torch.tensor(1.5, dtype=torch.float64)
    mask = torch.arange(sum(COUNTS)) % 3 > 0
    mixed = torch.tensor([3, 1, 6, 0, 4, 2, 5]), torch.rand(sum(COUNTS), generator=torch.Generator().manual_seed(1))
    return {
        "m3co": (2, lambda x, y: fn.m3co_loss(x, y, *map(mine, mixed))),
        "m3co accumulated": (
            2,
            lambda x, y: fn.m3co_loss(x, y, *map(mine, mixed), 0.2, False, accumulate_targets=True),
        ),
        "multisclip": (2, fn.multisclip_loss),
        "cl2l": (6, lambda *r: fn.cl2l_loss(r[0], r[1], r[2:4], r[4:6], scale, 2 * scale)),
        "barlow cross": (2, fn.barlow_cross),
        "byol cross": (2, fn.byol_cross),
        "swalip": (4, lambda *r: fn.swalip_loss(r[:2], r[2:], scale)),
        "mil nce": (3, lambda v, t, u: fn.mil_nce(v, torch.stack([t, u], 1).flatten(0, 1))),
        "masked mil nce": (2, lambda v, t: fn.mil_nce(v, t, mine(mask))),
        "symile n": (3, lambda *r: fn.symile(r, 3.0, "n", permutations(3))),
        "symile n_squared 2": (2, lambda *r: fn.symile(r, 3.0, "n_squared")),
        "symile n_squared 3": (3, lambda *r: fn.symile(r, 3.0, "n_squared")),
        "symile n_squared 4": (4, lambda *r: fn.symile(r, 3.0, "n_squared")),
        "pairwise clip": (3, lambda *r: fn.clip_pairwise_loss(r, 3.0)),
        "interleaved contrast": (
            2,
            lambda v, t: fn.interleaved_contrast(v, t, scale, mine(torch.arange(sum(COUNTS)) % 3)),
        ),
        "cwcl": (3, lambda p, q, f: fn.cwcl(p, q, f, scale)),
        "cwcl, moments": (3, lambda p, q, f: fn.cwcl(p, q, f[:, :1], scale)),
        "cwcl variants": (3, lambda p, q, f: fn.cwcl(p, q, f, scale, row_feat=f * f, sharpness=2.0)),
        "contrastive gap": (2, lambda x, y: fn.contrastive_gap_loss(x, y, 0.1, True, True, True).loss),
    }


def run(name, share=slice(None)):
    m, function = losses()[name]
    tensors = [x[share].clone().requires_grad_() for x in draw(m)]
    loss = function(*tensors)
    loss.backward()
    return loss.detach(), [x.grad for x in tensors if x.grad is not None]


def work(rank, folder):
    from counterpoint import functional as fn

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS))
    from counterpoint.core.distributed import over

    with over("world"):
        share = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
        found = {name: run(name, share) for name in losses()}
        torch.manual_seed(rank)  # each process would draw permutations of its own
        drawn = fn.symile([x[share] for x in draw(3)], 3.0)
        released = [x[share].clone().requires_grad_() for x in draw(2)]
        local = fn.cl2l_loss(*released, [released[0]], [released[1]], 3.0, 2.0, 0.2, local_gradients=True)
        local.backward()
        # Every process measures the whole set, whatever other processes measure.
        measured = fn.gap_metrics(*draw(2, 20))
        torch.save((found, drawn, measured, (local.detach(), [x.grad for x in released])), f"{folder}/{rank}.pt")
    leave()


def test_processes_together_have_the_losses_and_the_gradients_of_one(tmp_path):
    from counterpoint import functional as fn

    mp.start_processes(work, (str(tmp_path),), nprocs=len(COUNTS), start_method="forkserver")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(COUNTS))]
    for name in losses():
        loss, gradients = run(name)
        for rank, (found, *_) in enumerate(results):
            share = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
            torch.testing.assert_close(
                (found[name][0], [gradient / len(COUNTS) for gradient in found[name][1]]),
                (loss, [gradient[share] for gradient in gradients]),
                rtol=1e-9,
                atol=1e-12,
                msg=lambda message, name=name: f"{name}: {message}",
            )
    assert len({round(drawn.item(), 12) for _, drawn, *_ in results}) == 1
    # With gradients of a process's own rows alone, the other side of each cross-entropy is a constant.
    x, y = (x.clone().requires_grad_() for x in draw(2))
    target = torch.arange(sum(COUNTS))
    value = fn.cl2l_loss(x, y, [x], [y], 3.0, 2.0, 0.2)
    constant = [
        (
            F.cross_entropy(3 * a @ b.detach().T, target)
            + F.cross_entropy(2 * a @ b.detach().T, target, label_smoothing=0.2)
        )
        / 4
        for a, b in ((F.normalize(x), y), (F.normalize(y), x))
    ]
    torch.stack(constant).sum().backward()
    for rank, (*_, (local, gradients)) in enumerate(results):
        share = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
        torch.testing.assert_close(local, value.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            [gradient / len(COUNTS) for gradient in gradients], [z.grad[share] for z in (x, y)], rtol=1e-9, atol=1e-12
        )
    for _, _, measured, _ in results:
        assert measured == pytest.approx(fn.gap_metrics(*draw(2, 20)))
