"""W processes with batch N / W give the loss and the gradients of one process with batch N."""

from __future__ import annotations

import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from counterpoint.core import distributed, kernel
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import batch_logsumexp, batch_logsumexp_apart, gather_rows, global_mean, over, place
from counterpoint.core.rules import Diagonal, Labels
from counterpoint.core.world import leave


def losses(q, k, x, labels, ring):
    """Check two-sided sums, one-sided sums of a set with itself, and rules that refer to the whole batch."""
    here = batch_logsumexp(q * 2.0, k, columns=True, ring=ring)
    own = (q * 2.0 * k).sum(1)
    everybody = gather_rows(labels)
    others = batch_logsumexp(x, exclude=[Diagonal(), Labels(everybody)], ring=ring).rows
    itself = batch_logsumexp(x * 1.5, exclude=Diagonal(), ring=ring).rows
    return (
        global_mean((here.rows + here.columns) / 2 - own)
        + global_mean(others.masked_fill(others == -math.inf, 0))
        + global_mean(itself)
    )


def alone(q, k, x, labels):
    here = pair_logsumexp(q * 2.0, k, columns=True, method="plain")
    others = pair_logsumexp(x, exclude=[Diagonal(), Labels(labels)], method="plain").rows
    itself = pair_logsumexp(x * 1.5, exclude=Diagonal(), method="plain").rows
    return (
        ((here.rows + here.columns) / 2 - (q * 2.0 * k).sum(1)).mean()
        + others.masked_fill(others == -math.inf, 0).mean()
        + itself.mean()
    )


def of_functions(a, b, labels):
    """Compare the classics that contrast over the batch."""
    from counterpoint.functional import clip, moco, of, siglip, supcon, supcon_single_view

    scale = torch.tensor(1.0, dtype=torch.float64)
    queue = torch.nn.functional.normalize(torch.arange(1.0, 21).view(4, 5).double().sin(), dim=1)
    views = torch.nn.functional.normalize(torch.stack([a, b], 1), dim=2)
    return (
        clip(a, b, scale)
        + clip(a, b, scale, ring=True)
        + siglip(a, b, scale, -scale)
        + of("simclr").nt_xent(a, b)
        + moco(a, b, queue).loss
        + supcon(views, labels)
        + supcon(views, labels, all_views=False)
        + supcon_single_view(a, labels)
    )


def work(rank, counts, port):
    kernel.TILE, kernel.SMALL = (3, 4), 0
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(counts))
    with over("world"):
        g = torch.Generator().manual_seed(0)
        total = sum(counts)
        q, k, x = (torch.randn(total, 5, dtype=torch.float64, generator=g) for _ in range(3))
        labels = torch.randint(0, 3, (total,), generator=g)
        start = sum(counts[:rank])
        share = slice(start, start + counts[rank])
        # The processors tell each other, wherever the rows are: "meta" has no values.
        assert place(counts[rank]) == place(counts[rank], "meta") == (start, counts[rank], total)
        for ring in (False, True):
            mine = [t[share].clone().requires_grad_() for t in (q, k, x)]
            whole = [t.clone().requires_grad_() for t in (q, k, x)]
            found, expected = losses(*mine, labels[share], ring), alone(*whole, labels)
            found.backward()
            expected.backward()
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            for a, b in zip(mine, whole, strict=True):  # DistributedDataParallel averages over the processes
                torch.testing.assert_close(a.grad / len(counts), b.grad[share], rtol=1e-9, atol=1e-9)
        mine = [t[share].clone().requires_grad_() for t in (q, k)]
        found = of_functions(*mine, labels[share])
        found.backward()
    leave()
    whole = [t.clone().requires_grad_() for t in (q, k)]
    expected = of_functions(*whole, labels)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(mine, whole, strict=True):
        torch.testing.assert_close(a.grad / len(counts), b.grad[share], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("counts", [[7], [7, 5], [4, 3, 2, 6], [4, 0, 3, 6]])
def test_several_processes_equal_one(counts):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, (counts, port), nprocs=len(counts), start_method="forkserver")


def test_blocks_that_are_passed_round_are_not_weighted():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="ring: blocks of keys that are passed round cannot be weighted"):
        batch_logsumexp(x, weight=lambda rows, columns: x[rows, columns], ring=True)


@pytest.mark.parametrize("few", [0, 2**15])  # group by group, and in one product
def test_groups_apart_are_batches_of_their_own(few, monkeypatch):
    monkeypatch.setattr(distributed, "FEW", few)
    groups = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = batch_logsumexp_apart(groups)
    wanted = torch.stack([pair_logsumexp(x, exclude=Diagonal(), method="plain").rows for x in groups])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.arange(21.0, dtype=torch.float64).view(3, 7)
    ours, theirs = (torch.autograd.grad((weight * out).sum(), groups)[0] for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_row_alone_in_its_group_sees_nothing_and_has_no_gradient():
    groups = torch.ones(2, 1, 3, requires_grad=True)
    found = batch_logsumexp_apart(groups)
    assert (found == -math.inf).all()
    torch.nn.functional.softplus(found).sum().backward()
    assert groups.grad is not None
    assert not groups.grad.any()
