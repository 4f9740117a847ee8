"""Compare the losses over class centres with the ancestor's code, and measure a step's memory with a million classes.

    python benchmarks/mlcd.py [--rounds 7] [--threads 1]      writes results/bench/mlcd.json

The method is that of benchmarks/alignment.py. n is the number of images, with 8 labels each (unicom: one). Of 100,000 classes a
tenth takes part. The transcription follows PartialFC: random numbers and a top-k draw the classes. It copies their centres,
normalises them, and stores the matrix of all logits. For several labels it has a mask of the same size. The authors did not
publish that code. The two draw different classes, so their values differ. With 4,096 images the labels alone are more than a
tenth of the classes: both use exactly these, and their values agree.

The second part runs one step with 256 images in a separate process for each row. `extra_bytes` is the rise of the peak of
resident memory above the centres, which every method holds. `dense` is the same loss with a gradient of all centres. The peak
is `VmHWM` of Linux, because `ru_maxrss` of a child process starts at the peak of its parent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import DIM, rows, run
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "mlcd.json"
CLASSES, RATE, SCALE, MARGIN = 100_000, 0.1, 64.0, 0.3
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def drawn(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Draw classes as PartialFC does; return them, and the labels' places among them."""
    used = labels.unique()
    chance = torch.rand(CLASSES)
    chance[used] = 2.0
    chosen = chance.topk(max(len(used), int(RATE * CLASSES))).indices.sort().values
    return chosen, torch.searchsorted(chosen, labels)


def cosines(embedding: Tensor, centers: Tensor, chosen: Tensor) -> Tensor:
    part = centers.detach()[chosen].requires_grad_()
    return (F.normalize(embedding, dim=1) @ F.normalize(part, dim=1).T).clamp(-1, 1)


def turned(cosine: Tensor) -> Tensor:
    """Turn cosines by the margin without gradient."""
    return cosine + ((cosine.detach().arccos() + MARGIN).cos() - cosine.detach())


def data(n: int, labels: int) -> tuple[Tensor, Tensor, Tensor]:
    (embedding,) = rows(1, n)
    g = torch.Generator().manual_seed(1)
    return embedding, 0.01 * torch.randn(CLASSES, DIM, generator=g), torch.randint(CLASSES, (n, labels), generator=g)


def mlcd(n: int) -> Case:
    embedding, centers, labels = data(n, 8)
    centers.requires_grad_()
    generator = torch.Generator().manual_seed(2)

    def ours() -> Tensor:
        return fn.mlcd_loss(embedding, centers, labels, SCALE, MARGIN, RATE, generator, sparse=True)

    def plain() -> Tensor:
        chosen, at = drawn(labels)
        cosine = cosines(embedding, centers, chosen)
        own = torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, at, True)
        positive = torch.where(own, -SCALE * turned(cosine), -torch.inf).logsumexp(1)
        negative = torch.where(own, -torch.inf, SCALE * cosine).logsumexp(1)
        return (F.softplus(positive) + F.softplus(negative)).mean()

    return [embedding, centers], ours, plain


def unicom(n: int) -> Case:
    embedding, centers, labels = data(n, 1)
    centers.requires_grad_()
    generator = torch.Generator().manual_seed(2)

    def ours() -> Tensor:
        return fn.margin_cluster_loss(
            embedding, centers, labels, SCALE, MARGIN, sample_rate=RATE, generator=generator, sparse=True
        )

    def plain() -> Tensor:
        chosen, at = drawn(labels)
        cosine = cosines(embedding, centers, chosen)
        changed = cosine.scatter(1, at, turned(cosine.gather(1, at)))
        return F.cross_entropy(SCALE * changed, at[:, 0])

    return [embedding, centers], ours, plain


SIZES = (256, 1024, 4096)
CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {"mlcd": (mlcd, SIZES), "unicom": (unicom, SIZES)}

STEP = """
import json, re, sys, torch
from counterpoint import functional as fn
classes, rate, sparse = json.loads(sys.argv[1])
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def step(centers, rate):
    e = torch.randn(256, 128, generator=g, requires_grad=True)
    labels = torch.randint(len(centers), (256, 8), generator=g)
    fn.mlcd_loss(e, centers, labels, 64.0, 0.3, rate, g, sparse=sparse).backward()
step(torch.nn.Parameter(torch.randn(3000, 128)), 0.9)
centers = torch.nn.Parameter(torch.empty(classes, 128).normal_(generator=g))
before = status("VmRSS")
step(centers, rate)
print(status("VmHWM") - before)
"""


def memory() -> list[dict[str, Any]]:
    """Measure the extra memory of a step for several numbers of classes and of those that take part."""
    found = []
    for classes, part in ((100_000, 10_000), (1_000_000, 10_000), (1_000_000, 50_000), (1_000_000, 100_000)):
        for sparse in (True, False):
            given = json.dumps([classes, part / classes, sparse])
            said = subprocess.run([sys.executable, "-c", STEP, given], check=True, capture_output=True, text=True)
            found.append(
                {"classes": classes, "taking_part": part, "dense": not sparse, "extra_bytes": int(said.stdout)}
            )
            print(found[-1], flush=True)
            if not sparse and found[-1]["extra_bytes"] < 4 * 128 * classes:
                raise RuntimeError(
                    "a dense gradient cannot need less memory than its own size: the measurement is wrong"
                )
    return found


if __name__ == "__main__":
    run(CASES, OUT, __doc__)
    record = json.loads(OUT.read_text())
    record |= {"classes": CLASSES, "rate": RATE, "memory": {"images": 256, "dim": 128, "rows": memory()}}
    OUT.write_text(json.dumps(record, indent=1) + "\n")
