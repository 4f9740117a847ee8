"""Compare CACR with a direct transcription of its formulas: time, value, and peak memory.

    python benchmarks/cacr.py [--rounds 7] [--threads 1]      writes results/bench/cacr.json

Both take the same float32 rows, forward and backward, in turn in one process. The record has the medians over the rounds and
the ratio of the medians. A ratio is the transcription's time over ours: above 1 ours is faster. For every pair of views
the transcription makes the matrix of squared distances by one matrix product. That is faster than the norms of differences in
the authors' code. Memory is the peak of a separate process of each with two views, minus its memory before the call. The
transcription is not run with 8,192 rows and more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import ratio, status
from torch import Tensor

from counterpoint.engine.run import machine, versions
from counterpoint.systems.images.cacr import cacr, cacr_momentum

OUT = Path(__file__).parents[1] / "results" / "bench" / "cacr.json"
DIM = 128
TAU_POS, TAU_NEG, T = 1.0, 0.9, 0.5


def squared(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T


def transcribed(z: Tensor) -> Tensor:
    attraction, repulsion = [], []
    own = torch.eye(z.shape[1], dtype=torch.bool)
    for x in range(len(z)):
        d = torch.stack([(z[x] - z[v]).square().sum(1) for v in range(len(z)) if v != x], 1)
        attraction.append(((TAU_POS * d).softmax(1) * d).sum(1).mean())
    for x, y in itertools.combinations(range(len(z)), 2):
        d = squared(z[x], z[y])
        weights = (-TAU_NEG * d).masked_fill(own, -torch.inf).softmax(1)
        repulsion.append(-(weights * d).sum(1).mean())
    return torch.stack(attraction).mean() + torch.stack(repulsion).mean()


def transcribed_euclidean(z: Tensor, key: Tensor) -> Tensor:
    q, k = F.normalize(z, dim=2), F.normalize(key, dim=1)
    costs = 1 - q @ k.T
    n = len(k)
    with torch.no_grad():
        p = (2 * costs.diagonal(0, 1, 2) / T).softmax(0)
        w = (-costs / T).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf).softmax(2)
    return (p * (costs.diagonal(0, 1, 2) - (w * costs).sum(2))).sum() / n


def rows(views: int, n: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(views, n, DIM, generator=g), dim=2).requires_grad_()


def pair(form: str, views: int, n: int) -> tuple[Tensor, Callable[[], Tensor], Callable[[], Tensor]]:
    z = rows(views, n)
    if form == "plain":
        return z, lambda: sum(cacr(z, positive_sharpness=TAU_POS, negative_sharpness=TAU_NEG)), lambda: transcribed(z)
    key = torch.randn(n, DIM, generator=torch.Generator().manual_seed(1))
    return z, lambda: cacr_momentum(z, key, T, "euclidean", "mean"), lambda: transcribed_euclidean(z, key)


def timed(inputs: Tensor, loss: Callable[[], Tensor]) -> tuple[float, float]:
    inputs.grad = None
    started = time.perf_counter()
    value = loss()
    value.backward()
    return time.perf_counter() - started, value.item()


def peak(side: int, n: int) -> float:
    """Return the peak memory of one forward and backward pass, minus the memory before it, in megabytes."""
    timed(*pair("plain", 2, 64)[:2])
    inputs, *losses = pair("plain", 2, n)
    before = status("VmRSS")
    timed(inputs, losses[side])
    return round(max(0.0, status("VmHWM") - before), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peak", type=int, nargs=2, metavar=("SIDE", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(*options.peak))
        return
    record: dict[str, Any] = {
        "what": "forward and backward in float32, medians; ratio above 1: ours is faster",
        "dim": DIM,
        "threads": options.threads,
        "rounds": options.rounds,
        "cases": {},
        "megabytes_of_two_views": {},
    }
    for form, views, n in [
        ("plain", 5, 64),
        ("plain", 5, 128),
        ("plain", 5, 256),
        ("plain", 5, 1024),
        ("plain", 2, 256),
        ("plain", 2, 1024),
        ("euclidean", 2, 256),
        ("euclidean", 2, 1024),
    ]:
        inputs, ours, plain = pair(form, views, n)
        timed(inputs, ours), timed(inputs, plain)
        rounds = [(timed(inputs, ours), timed(inputs, plain)) for _ in range(options.rounds)]
        found = {
            "ours_s": round(statistics.median(a[0] for a, _ in rounds), 5),
            "transcription_s": round(statistics.median(b[0] for _, b in rounds), 5),
            "ratio": round(ratio([b[0] for _, b in rounds], [a[0] for a, _ in rounds]), 2),
            "values_apart": float(f"{abs(rounds[0][0][1] - rounds[0][1][1]):.1e}"),
        }
        record["cases"][f"{form}, {views} views of {n}"] = found
        print(f"{form}, {views} views of {n}: {json.dumps(found)}", flush=True)
    for n in (1024, 2048, 4096, 8192, 16384):
        found = {}
        for side, name in enumerate(["ours", "transcription"]):
            if side == 0 or n < 8192:
                words = [sys.executable, __file__, "--threads", str(options.threads), "--peak", str(side), str(n)]
                found[name] = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        record["megabytes_of_two_views"][str(n)] = found
        print(f"two views of {n}, megabytes: {json.dumps(found)}", flush=True)
    options.out.write_text(json.dumps(record | {"machine": machine(), "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
