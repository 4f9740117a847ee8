"""Compare BSS's style transfer, its loss and a training step with a plain way: time, value, and peak memory.

    python benchmarks/bss.py [--rounds 7] [--threads 1]      writes results/bench/bss.json

Both take the same float32 numbers in turn in one process. The record has the medians over the rounds and the ratio of the
medians. Losses of a millisecond have 15 times as many rounds. A ratio is the plain way's time over ours: above 1 ours is faster.
The plain transfer is FDA's, image by image: both images' whole transforms, shifts, the exchange of a window, and back. The
plain loss stores the similarities of both columns. The plain step crops and colours a batch at once, as ours does. It differs
in transfer, loss and loop. Memory is the peak of a separate process of each, minus its memory before the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, run
from torch import Tensor

from counterpoint import catalog
from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "bss.json"
T, DIM = 0.5, 128


def pictures(n: int, size: int) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def one_by_one(images: Tensor, donors: Tensor, b: int) -> Tensor:
    """Transfer styles as FDA's code does, image by image."""
    down, across = images.shape[2] // 2, images.shape[3] // 2
    rows = slice(max(0, down - b), down + b + 1)
    columns = slice(max(0, across - b), across + b + 1)
    found = []
    for image, donor in zip(images, donors.tolist(), strict=True):
        own, given = torch.fft.fft2(image), torch.fft.fft2(images[donor])
        amplitude = torch.fft.fftshift(own.abs(), dim=(1, 2))
        amplitude[:, rows, columns] = torch.fft.fftshift(given.abs(), dim=(1, 2))[:, rows, columns]
        amplitude = torch.fft.ifftshift(amplitude, dim=(1, 2))
        found.append(torch.fft.ifft2(torch.polar(amplitude, own.angle())).real)
    return torch.stack(found)


def transfer(n: int, size: int, b: int) -> Case:
    images, donors = pictures(n, size), torch.full((n,), n // 2)
    return lambda: fn.transfer_style(images, n // 2, b), lambda: one_by_one(images, donors, b)


def columns(z1: Tensor, z2: Tensor) -> Tensor:
    """Compute the loss by column with stored similarities."""
    a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    own, total = torch.eye(len(a), dtype=torch.bool), torch.zeros(())
    positive = (a * b).sum(1, keepdim=True) / T
    for view in (a, b):
        negative = (view @ view.T / T).masked_fill(own, -torch.inf)
        total = total + (torch.cat([positive, negative], 1).logsumexp(1) - positive[:, 0]).mean() / 2
    return total


def loss(n: int) -> Case:
    z = torch.randn(n, 2, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return lambda: fn.column_infonce(z, T), lambda: columns(*z.unbind(1))


def step(n: int, size: int) -> Case:
    """Make a step of training with Adam: views, network, loss, gradients, update."""
    system = catalog.load_system("bss")
    settings = {"encoder": "conv-group", "recipe": "simclr-cifar", "hidden": 512, "bss.r_min": 0.03, "bss.r_max": 0.03}
    facts = SimpleNamespace(size=size, channels=3, classes=0)
    learners: list[Any] = [system.learner(system.config(**settings), facts, 0) for _ in range(2)]
    optimizers = [torch.optim.Adam(learner.parameters(), lr=1e-3) for learner in learners]
    images = (pictures(n, size) * 255).byte()

    def ours() -> Tensor:
        optimizers[0].zero_grad()
        batch = {"image": images, "index": torch.arange(n), "label": None}
        batch = learners[0].prepare(batch, torch.Generator().manual_seed(1))
        found: Tensor = learners[0].loss(batch)["loss"]
        found.backward()
        optimizers[0].step()
        return found.detach()

    def plain() -> Tensor:
        optimizers[1].zero_grad()
        learner, x = learners[1], images.float() / 255
        styled, made = learner.views, []
        for drawn in styled.draw(images.shape, torch.Generator().manual_seed(1)):
            moved = one_by_one(styled.pipeline.moved(x, drawn.view), drawn.donors, int(drawn.half_window[0]))
            made.append(styled.pipeline.coloured(moved, drawn.view))
        found = columns(*learner.network(torch.cat(made)).chunk(2))
        found.backward()
        optimizers[1].step()
        return found.detach()

    return ours, plain


CASES: dict[str, tuple[Callable[..., Case], tuple[int, ...]]] = {
    "transfer, 64 pictures of 16, b = 1": (transfer, (64, 16, 1)),
    "transfer, 256 pictures of 32, b = 2": (transfer, (256, 32, 2)),
    "transfer, 256 pictures of 32, b = 8": (transfer, (256, 32, 8)),
    "transfer, 64 pictures of 224, b = 5": (transfer, (64, 224, 5)),
    "transfer, 64 pictures of 224, b = 40": (transfer, (64, 224, 40)),
    "loss, 64 contents": (loss, (64,)),
    "loss, 256 contents": (loss, (256,)),
    "loss, 1024 contents": (loss, (1024,)),
    "loss, 4096 contents": (loss, (4096,)),
    "step, 64 pictures of 32": (step, (64, 32)),
    "step, 256 pictures of 32": (step, (256, 32)),
}


SIDES = {
    name: Sides(partial(make, *sizes), partial(make, 4, *sizes[1:]), often=15 if sizes in ((64,), (256,)) else 1)
    for name, (make, sizes) in CASES.items()
}

if __name__ == "__main__":
    run(SIDES, OUT, __doc__, rounds=7)
