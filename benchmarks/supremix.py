"""Compare SupReMix's loss with the authors' way, which builds every mixture as a vector, and measure its memory.

    python benchmarks/supremix.py [--rounds 7] [--threads 1]      writes results/bench/supremix.json

The method is that of benchmarks/alignment.py. n is the number of rows of 64 numbers: two views of n / 2 examples. Targets are
whole numbers of 0..99, the window is 5, and the shares of Mix-neg are given. The transcription builds the mixtures [n, n, 64] of
Mix-neg, and of Mix-pos only those that exist. The authors' code has n^3 places for them. Both subtract two maxima, so values agree.

At 4,096 rows Mix-pos has about 110 million mixtures, 28 GB as vectors: there the transcription has Mix-neg alone.

The second part takes one step in a separate process for each line. Shares are drawn block by block. `extra_bytes` is the
rise of the peak of resident memory. With one target for each example (`distinct`) the window holds 1 / 20 of the targets.
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
from alignment import run
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "supremix.json"
DIM, TAU, WINDOW = 64, 0.3, 5.0
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def built(x: Tensor, y: Tensor, alpha: Tensor, between: bool) -> Tensor:
    """Compute the loss with every mixture as a vector."""
    n, fixed = len(x), x.detach()
    own = torch.eye(n, dtype=torch.bool)
    distance = (y[:, None] - y).abs()
    same = distance == 0
    real = x @ x.T / TAU
    real = real - real.detach().amax(1, keepdim=True)
    vectors = torch.lerp(fixed[None], fixed[:, None], alpha[:, :, None])
    mixed = torch.einsum("id,ikd->ik", x, vectors) / TAU
    top = mixed.detach().masked_fill(same, 0).amax(1)
    label = alpha * y[:, None] + (1 - alpha) * y
    if between:
        below, above = ((sign & (distance < WINDOW)) for sign in (y < y[:, None], y > y[:, None]))
        i, j, k = (below[:, :, None] & above[:, None]).nonzero().T
        b = ((y[k] - y[i]) / (y[k] - y[j]))[:, None]
        logits = (x[i] * (b * fixed[j] + (1 - b) * fixed[k])).sum(1) / TAU
        top = top.scatter_reduce(0, i, logits.detach(), "amax")
        logits = logits - top[i]
    mixed = mixed - top[:, None]
    z = (real.exp() * (distance + 1)).masked_fill(own, 0).sum(1)
    z = z + (mixed.exp() * ((y[:, None] - label).abs() + 1)).masked_fill(same, 0).sum(1)
    positive, count = real.masked_fill(~same | own, 0).sum(1), (same & ~own).sum(1)
    if between:
        z = z.index_add(0, i, logits.exp())
        positive, count = positive.index_add(0, i, logits), count.index_add(0, i, torch.ones_like(i))
    return (z.log() - positive / count).mean()


def given(n: int, between: bool) -> Case:
    g = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(n // 2, 2, DIM, generator=g), dim=2).requires_grad_()
    y = torch.randint(100, (n // 2,), generator=g).float()
    alpha = torch.rand(n, n, generator=g) * 0.4

    def ours() -> Tensor:
        return fn.supremix_loss(features, y, TAU, WINDOW, alpha, mix_pos=between)

    def plain() -> Tensor:
        return built(features.transpose(0, 1).flatten(0, 1), y.repeat(2), alpha, between)

    return [features], ours, plain


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "both mixtures": (lambda n: given(n, True), (64, 128, 512, 1024)),
    "Mix-neg": (lambda n: given(n, False), (128, 1024, 4096)),
}

STEP = """
import json, re, sys, time, torch
import torch.nn.functional as F
from counterpoint import functional as fn
from counterpoint.core.label_mixtures import BetaShares
n, distinct = json.loads(sys.argv[1])
torch.set_num_threads(1)
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
def step(n):
    x = F.normalize(torch.randn(n // 2, 2, 64), dim=2).requires_grad_()
    y = torch.rand(n // 2).double() * 100 if distinct else torch.randint(100, (n // 2,)).double()
    start = time.perf_counter()
    fn.supremix_loss(x, y, 0.3, 5.0, BetaShares(0, 2.0, 8.0, n), separate_max=False).backward()
    return time.perf_counter() - start
step(256)
before = status("VmRSS")
seconds = step(n)
print(json.dumps({"extra_bytes": status("VmHWM") - before, "seconds": round(seconds, 2)}))
"""


def memory() -> list[dict[str, Any]]:
    """Measure the extra memory of a step for several numbers of rows."""
    found = []
    for distinct, sizes in ((False, (1024, 2048, 4096, 8192)), (True, (512, 1024, 2048))):
        for n in sizes:
            said = subprocess.run(
                [sys.executable, "-c", STEP, json.dumps([n, distinct])], check=True, capture_output=True, text=True
            )
            found.append({"rows": n, "distinct": distinct} | json.loads(said.stdout))
            print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM)
    record = json.loads(OUT.read_text())
    record |= {"window": WINDOW, "targets": 100, "memory": memory()}
    OUT.write_text(json.dumps(record, indent=1) + "\n")
