#!/usr/bin/env bash
# lightly's BarlowTwinsLoss with gather_distributed standardises each process's batch by its own mean and deviation.
#
# One would guess: gather_distributed=True gives the loss and the gradient of one process with the whole batch, as the code
#   comment says ("matching single-GPU behaviour") and as the authors' code does with a synchronised batch normalisation.
# What happens: only the cross-correlation is summed over processes. Its rows were standardised by the process's own batch. On 2
#   processes with 16 rows each, the gradient has a relative error of 0.38. Equal batches on all processes hide it.
# Who is hurt: whoever trains Barlow Twins on several GPUs with small batches on each: the loss depends on how rows are spread.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 lightly==1.6.0
cat > "$place/check.py" <<'PY'
import tempfile
import warnings

import lightly
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightly.loss import BarlowTwinsLoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROWS, DIM, WORLD = 16, 8, 2


def network():
    torch.manual_seed(0)
    return nn.Linear(DIM, DIM, dtype=torch.float64)


def gradient(model, loss, a, b):
    value = loss(model(a), model(b))
    value.backward()
    return float(value), getattr(model, "module", model).weight.grad


def synchronised(a, b, lambda_param=5e-3):
    """The same loss in plain tensors, for one process: standardise over all rows that it has."""
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (a, b))
    c = a.T @ b / len(a)
    on = (c.diagonal() - 1).square().sum()
    return on + lambda_param * (c.square().sum() - c.diagonal().square().sum())


def work(rank, store):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(WORLD * ROWS, DIM, generator=g, dtype=torch.float64)
    a, b = (rows + 0.7 * torch.randn(rows.shape, generator=g, dtype=torch.float64) for _ in range(2))
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    for name, views, part in (
        ("other rows on each process", (a, b), own),
        ("the same rows on each process", (a[:ROWS].repeat(2, 1), b[:ROWS].repeat(2, 1)), slice(0, ROWS)),
    ):
        one, expected = gradient(network(), BarlowTwinsLoss(), *views)
        by_hand, same = gradient(network(), synchronised, *views)
        assert abs(one - by_hand) < 1e-9, (one, by_hand)
        assert torch.allclose(expected, same, rtol=1e-9)
        loss = BarlowTwinsLoss(gather_distributed=True)
        several, found = gradient(DistributedDataParallel(network()), loss, *(view[part] for view in views))
        error = float((found - expected).norm() / expected.norm())
        if rank == 0:
            print(f"{name}: loss {several:.4f}, of one process {one:.4f}; relative error of the gradient {error:.4f}")
        if "same" in name:
            assert error < 1e-9, error
        else:
            assert abs(several - one) > 1e-2, (several, one)
            assert error > 0.1, error
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print(f"lightly {lightly.__version__}, torch {torch.__version__}, {WORLD} processes with {ROWS} rows each", flush=True)
    mp.spawn(work, (tempfile.mktemp(),), nprocs=WORLD)
PY
OMP_NUM_THREADS=1 "$place/env/bin/python" "$place/check.py"
