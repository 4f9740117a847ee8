#!/usr/bin/env bash
# open_clip's ClipLoss with its defaults gives the towers a gradient that is W times too small on W processes, not the scale.
#
# One would guess: the defaults train as one process with the whole batch. The README calls the results of --local-loss with
#   --gather-with-grad "one-to-one numerical results as the naive method", that is, as the defaults.
# What happens: without gather_with_grad each process has a gradient for its own rows alone, and DistributedDataParallel divides
#   their sum by W. The weights of both towers get 1/W of the gradient of one process. logit_scale gets all of it.
# Who is hurt: whoever changes the number of GPUs, or between the two settings, under SGD, LARS or clipping by the norm of all
#   gradients: the towers learn W times more slowly than the scale. Adam divides the factor away, up to its epsilon.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 open_clip_torch==3.3.0
cat > "$place/check.py" <<'PY'
import sys
import tempfile
import warnings

import open_clip
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.loss import ClipLoss
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

ROWS, DIM = 8, 6  # of a process
SETTINGS = ((False, False), (False, True), (True, True))  # local_loss, gather_with_grad


class Clip(nn.Module):
    """Two linear towers and a learnt scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image, text):
        return normalize(self.image(image), dim=1), normalize(self.text(text), dim=1), self.logit_scale.exp()


def gradients(model, loss, image, text):
    model.zero_grad()
    loss(*model(image, text)).backward()
    model = getattr(model, "module", model)
    return {"towers": torch.cat([model.image.weight.grad, model.text.weight.grad]), "scale": model.logit_scale.grad}


def work(rank, world, store):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    g = torch.Generator().manual_seed(1)
    image, text = (torch.randn(world * ROWS, DIM, generator=g, dtype=torch.float64) for _ in range(2))
    one = gradients(Clip().double(), ClipLoss(), image, text)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    for local, with_grad in SETTINGS:
        loss = ClipLoss(local_loss=local, gather_with_grad=with_grad, rank=rank, world_size=world)
        found = gradients(DistributedDataParallel(Clip().double()), loss, image[own], text[own])
        share = {name: float((found[name] * one[name]).sum() / one[name].square().sum()) for name in one}
        rest = max(float((found[name] - share[name] * one[name]).abs().max()) for name in one)
        if rank == 0:
            said = ", ".join(f"{name} {number:.4f}" for name, number in share.items())
            print(f"  local_loss={local} gather_with_grad={with_grad}: times the gradient of one process: {said}")
        assert rest < 1e-12, rest
        assert abs(share["scale"] - 1) < 1e-9, share
        assert abs(share["towers"] - (1.0 if with_grad else 1 / world)) < 1e-9, share
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print(f"open_clip {open_clip.__version__}, torch {torch.__version__}")
    for world in (2, 4):
        print(f"{world} processes")
        sys.stdout.flush()
        mp.spawn(work, (world, tempfile.mktemp()), nprocs=world)
PY
OMP_NUM_THREADS=1 "$place/env/bin/python" "$place/check.py"
