"""Compare KRR-ST's outer loss with the authors' way, and a step of distillation with a plain loop.

    python benchmarks/krr_st.py [--rounds 7] [--threads 1]      writes results/bench/krr-st.json

The first part has the method of benchmarks/alignment.py; n there is m, the number of synthetic images. A batch has 1,024 real
images and targets of 512 numbers. `flattened` has 8,192 features (the paper's network at 32 pixels), `pooled` 128 (conv-s). The
transcription computes both kernels and solves the system of m rows, all in float32, as the authors' code does. Its values differ
from ours, as its small ridge meets the rounding of float32: `error` is the distance of each from float64, relative to the loss.

The second part times a whole step on digits: views, teacher, outer loss, AdamW, and the step of a network of the pool. The plain
loop has the same networks, views and optimisers of PyTorch, and the authors' way to compute the loss.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.engine.options import Loop
from counterpoint.engine.stepper import Stepper
from counterpoint.experiment import Experiment

OUT = Path(__file__).parents[1] / "results" / "bench" / "krr-st.json"
REAL, TARGETS = 1024, 512
SIZES = (10, 100, 1000)
STEPS = 60
TEACHER = "fit:simclr?data=digits%3Fsize=8&encoder=conv-fine&recipe=none&epochs=1&hidden=64&evaluate_every=9"


def authors(feat_syn: Tensor, target_syn: Tensor, feat_real: Tensor, target_real: Tensor) -> Tensor:
    """Compute the outer loss by both kernels."""
    h, x = (torch.cat([part, torch.ones_like(part[:, :1])], 1) for part in (feat_syn, feat_real))
    own, across = h @ h.T, x @ h.T
    ridge = 1e-6 * own.detach().trace() * torch.eye(len(own), dtype=own.dtype)
    return F.mse_loss(across @ torch.linalg.solve(own + ridge, target_syn), target_real)


def rows(m: int, d: int) -> list[Tensor]:
    """Draw features as after a ReLU, and targets that depend on them."""
    g = torch.Generator().manual_seed(0)
    syn, real = (torch.randn(n, d, generator=g).relu() for n in (m, REAL))
    towards = torch.randn(d, TARGETS, generator=g) / d**0.5
    return [syn, syn @ towards, real, real @ towards]


def case(d: int) -> Callable[[int], tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]]:
    def make(m: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
        four = rows(m, d)
        inputs = [part.requires_grad_() for part in four[:2]]
        return inputs, lambda: fn.krr_outer_loss(*four), lambda: authors(*four)

    return make


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "flattened": (case(8192), SIZES),
    "pooled": (case(128), SIZES),
}


def errors(d: int) -> dict[str, dict[str, float]]:
    """Measure how far both are from float64."""
    found = {}
    for m in SIZES:
        four = rows(m, d)
        true = authors(*(part.double() for part in four))
        found[str(m)] = {
            name: float(f"{float(abs(loss(*four) - true) / true):.1e}")
            for name, loss in (("ours", fn.krr_outer_loss), ("transcription", authors))
        }
    return found


def steps() -> dict[str, float]:
    """Time steps of the learner and of a plain loop in turn, by their medians."""
    settings = {"teacher": TEACHER, "batch_size": 256, "judges": 0}
    experiment = Experiment.resolve("krr-st", "digits?size=8", overrides=settings)
    task = experiment.task()
    learners: list[Any] = []
    for _ in range(2):
        learner: Any = experiment.learner(task.facts, 0)
        stepper = Stepper(learner, task, Loop(device="cpu"))
        stepper.begin(torch.device("cpu"))
        stepper.enter(0)
        learners.append((learner, stepper))
    (learner, stepper), (other, its) = learners
    experiment.config.most_age = 10**6  # from here on no network is replaced
    synthetic = other.synthetic
    outer = torch.optim.AdamW(synthetic.parameters(), lr=0.03, weight_decay=0.0)
    inner = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3) for n in other.pool]
    batch = next(iter(stepper.loader))

    def plain() -> None:
        prepared = its.prepared(batch)
        (view,), member, optimizer = prepared["views"], other.pool[prepared["member"]], inner[prepared["member"]]
        wanted = other.wanted(view)
        member.eval()
        with torch.no_grad():
            real = member.encoder(view)
        outer.zero_grad()
        authors(member.encoder(synthetic.pictures), synthetic.targets, real, wanted).backward()
        outer.step()
        member.train()
        optimizer.zero_grad()
        F.mse_loss(member(synthetic.pictures.detach()), synthetic.targets.detach()).backward()
        optimizer.step()

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(STEPS):
        for into, step in zip(times, (lambda: stepper.step(batch), plain), strict=True):
            started = time.perf_counter()
            step()
            into.append(time.perf_counter() - started)
        learner.position.step += 1
        other.position.step += 1
    ours, theirs = (statistics.median(part[5:]) for part in times)
    return {"ours_s": round(ours, 5), "plain_loop_s": round(theirs, 5), "ratio": round(theirs / ours, 2)}


if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=8192)
    record = json.loads(OUT.read_text())
    record |= {"real": REAL, "targets": TARGETS, "error": {"flattened": errors(8192), "pooled": errors(128)}}
    record["step"] = {"data": "digits, 256 images of 8 pixels, 10 synthetic, convnet-s", **steps()}
    print(record["error"], record["step"])
    OUT.write_text(json.dumps(record, indent=1) + "\n")
