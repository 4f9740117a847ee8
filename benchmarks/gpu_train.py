"""Train on a GPU: SimCLR beside a loop of lightly, and five systems by the library's own loop. `gpu.py` calls it."""

from __future__ import annotations

import json
import os
import tempfile
import time
import traceback
from typing import Any

import numpy as np
import torch

import counterpoint as cp
from counterpoint.engine.services import Callback

# Data that are made on the spot, or ride in scikit-learn.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "simclr": ("digits", {"batch_size": 256, "epochs": 8}),
    "clip": ("digit-captions", {"batch_size": 64, "epochs": 8}),
    "macil-sd": ("async-bags", {"batch_size": 32, "epochs": 4}),
    "albef": ("digit-pairs", {"batch_size": 64, "epochs": 2}),
    "crd": ("digits", {"batch_size": 64, "epochs": 2, "teacher_epochs": 2}),
}
# The same for a rehearsal without a GPU.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "simclr": ("digits?size=8&train=60", {"batch_size": 20, "epochs": 1, "encoder": "conv-s"}),
    "clip": ("digit-captions?train=60", {"batch_size": 20, "epochs": 1, "image_encoder": "conv-s"}),
    "macil-sd": ("async-bags?train=32", {"batch_size": 8, "epochs": 1}),
    "albef": ("digit-pairs?train=60", {"batch_size": 16, "queue": 16, "epochs": 1}),
    "crd": (
        "digits?size=8&train=60",
        {"batch_size": 20, "epochs": 1, "encoder": "conv-s", "teacher_encoder": "conv-s"},
    ),
}


class Ends(Callback):
    """Notes when each step of each epoch ends. The loop has read the step's loss by then."""

    def __init__(self) -> None:
        self.epochs: list[list[float]] = [[]]

    def on_step(self, learner: Any, batch: Any, losses: Any) -> None:
        self.epochs[-1].append(time.perf_counter())

    def on_epoch(self, row: dict[str, float]) -> None:
        self.epochs.append([])

    def step(self) -> float:
        """Return the mean seconds of a step, within epochs; the first epoch counts only where it is the only one."""
        epochs = [ends for ends in self.epochs if len(ends) > 1]
        counted = epochs[1:] or epochs
        return sum(ends[-1] - ends[0] for ends in counted) / sum(len(ends) - 1 for ends in counted)


def trained(slug: str, data: Any, device: str, **settings: Any) -> dict[str, Any]:
    """Train a system by the library's own loop, in bf16. Return its speed, and the share of the time spent waiting."""
    ends = Ends()
    with tempfile.TemporaryDirectory() as folder:
        run = cp.train(
            slug, data=data, out=folder, quiet=True, callbacks=[ends], device=device, precision="bf16", **settings
        )
        speed = run.run.speed()
        return {
            "system": slug,
            "items_per_second": speed["items"] / speed["steps"] / ends.step(),
            "waiting_share": speed["waiting_share"],
            "metrics": dict(run.metrics),
        }


def runs(device: str = "cuda", *, small: bool = False) -> list[dict[str, Any]]:
    """Train five systems; one that ends in an error is a result, too."""
    rows: list[dict[str, Any]] = []
    for slug, (data, settings) in (SMALL if small else RUNS).items():
        try:
            rows.append(trained(slug, data, device, **settings))
        except Exception:
            rows.append({"system": slug, "error": traceback.format_exc()[-3000:]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def train(
    device: str = "cuda", encoder: str = "torchvision:resnet18", batch: int = 512, steps: int = 24
) -> list[dict[str, Any]]:
    """Measure SimCLR in bf16 beside a loop of lightly: images a second, on random pictures of 32 pixels.

    Ours draws views on the device. The other loop has the same networks, lightly's transforms in worker processes, and its loss.
    """
    count = batch * steps
    pictures = np.random.default_rng(0).integers(0, 256, (count * 5 // 4, 32, 32, 3), np.uint8)
    own = cp.own({"image": pictures, "label": np.arange(len(pictures)) % 10}, test="0.1", valid="0.1")
    settings: dict[str, Any] = {"encoder": encoder, "batch_size": batch, "recipe": "simclr-cifar", "epochs": 2}
    found = {"counterpoint": trained("simclr", own, device, **settings)}
    try:
        found["lightly"] = {"items_per_second": of_lightly(pictures[:count], encoder, batch, device)}
    except ImportError as error:
        print(f"without lightly there is no loop to compare training with: {error}", flush=True)
    rows = [{"loop": name, "encoder": encoder, "batch": batch, **row} for name, row in found.items()]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def of_lightly(pictures: Any, encoder: str, batch: int, device: str) -> float:
    """Return the images a second of a plain loop with lightly's transforms and loss."""
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    transform, contrast = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0), NTXentLoss(0.1)
    learner = cp.create("simclr", encoder=encoder, size=32).to(device)
    network = torch.nn.Sequential(learner.encoder, learner.projector)
    optimizer = torch.optim.SGD(network.parameters(), 0.03, momentum=0.9)

    class Pictures(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> Any:
            return transform(Image.fromarray(pictures[index]))

    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    loader = torch.utils.data.DataLoader(Pictures(), batch, num_workers=workers, pin_memory=device == "cuda")
    ends = []
    for pair in loader:
        one, two = (view.to(device, non_blocking=True) for view in pair)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = contrast(network(one), network(two))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        float(loss.detach())  # the processor waits, as our loop does
        ends.append(time.perf_counter())
    # All steps but the first count: those of a loader that lags behind come in bursts.
    return batch * (len(ends) - 1) / (ends[-1] - ends[0])
