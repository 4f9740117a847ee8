"""Compare Hybrid Distill's losses and dropping with the authors' way: time, value, and peak memory.

    python benchmarks/hybrid_distill.py [--rounds 5] [--threads 1]      writes results/bench/hybrid-distill.json

Hybrid Distill has no public code. So the transcriptions are those of the two losses that it combines: TinyMIM's relations by
softmax, logarithm and KL, and FD's smooth L1 of normalised tokens. The transcription of the dropping has the matrix of cosines.
Both take the same float32 tensors, in turn in one process. The sizes are those of ViT-B/16: 12 heads of 64, 197 tokens.
The last case is a training step of vit-s on 32 pictures of 32 pixels: with a keep_ratio of 0.7 ("ours") and without dropping.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from obow import Case, normal, status, timed
from torch import Tensor, nn

from counterpoint import functional as fn
from counterpoint.core.tokens import drop_redundant_tokens
from counterpoint.encoders.images import vit_s
from counterpoint.encoders.inside import TokenNetwork
from counterpoint.engine.run import machine, versions

OUT = Path(__file__).parents[1] / "results" / "bench" / "hybrid-distill.json"
HEADS, TOKENS, WIDTH = 12, 197, 64


def relations(n: int) -> Case:
    """Make queries, keys and values of both networks for n pictures."""
    shape = (n, HEADS, TOKENS, WIDTH)
    student = [normal(s, *shape).requires_grad_() for s in range(3)]
    teacher = [normal(s + 3, *shape) for s in range(3)]

    def plain() -> Tensor:
        total = torch.zeros(())
        for a, b in ((0, 1), (2, 2)):
            own = F.softmax(student[a] @ student[b].transpose(-2, -1) * WIDTH**-0.5, dim=-1)
            wanted = F.softmax(teacher[a] @ teacher[b].transpose(-2, -1) * WIDTH**-0.5, dim=-1)
            total = total + F.kl_div(own.log(), wanted, reduction="none").sum(-1).mean()
        return total

    return lambda: fn.relation_distillation_loss(student, teacher), plain


def features(n: int) -> Case:
    """Make the last tokens of both networks for n pictures, and the projection."""
    dim = HEADS * WIDTH
    student, teacher, layer = normal(0, n, TOKENS, dim).requires_grad_(), normal(1, n, TOKENS, dim), nn.Linear(dim, dim)

    def plain() -> Tensor:
        target = F.layer_norm(teacher, (dim,))
        return F.smooth_l1_loss(layer(student), target, beta=2.0)

    return lambda: fn.feature_distillation_loss(student, teacher, layer), plain


def dropping(n: int) -> Case:
    """Make the tokens of n pictures; the result is the sum of the kept positions."""
    tokens = normal(0, n, TOKENS, HEADS * WIDTH).requires_grad_()

    def plain() -> Tensor:
        z = F.normalize(tokens[:, 1:].detach(), dim=2)
        cosine = z @ z.transpose(1, 2)
        rho = (cosine.sum(2) - cosine.diagonal(dim1=1, dim2=2)) / (TOKENS - 2)
        kept = rho.argsort(dim=1, stable=True)[:, :138].sort(1).values
        return kept.double().add(1).sum() + 0 * tokens[0, 0, 0]

    return lambda: fn.drop_redundant_tokens(tokens, 0.7).double().sum() + 0 * tokens[0, 0, 0], plain


def step(n: int) -> Case:
    """Make a student of n pictures, run with and without dropping before three of its layers."""
    torch.manual_seed(0)
    network, images = TokenNetwork(vit_s(32, patch=4), "vit-s", 32), normal(0, n, 3, 32, 32)

    def ours() -> Tensor:
        choose = dict.fromkeys((0, 1, 2), drop_redundant_tokens)
        return network.dropping(images, choose, [2]).tokens.square().mean()

    return ours, lambda: network(images, [2]).tokens.square().mean()


CASES: dict[str, tuple[Any, int]] = {
    "relations, 8 pictures": (relations, 8),
    "relations, 32 pictures": (relations, 32),
    "features, 32 pictures": (features, 32),
    "dropping, 32 pictures": (dropping, 32),
    "student with dropping against without, 32 pictures": (step, 32),
}


def peak(side: int, name: str) -> float:
    """Return the peak memory of one call, minus the memory before it, in megabytes."""
    make, n = CASES[name]
    timed(make(1)[side])
    function = make(n)[side]
    before = status("VmRSS")
    timed(function)
    return round(max(0.0, status("VmHWM") - before), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(int(options.peak[0]), options.peak[1]))
        return
    record: dict[str, Any] = {
        "what": "float32, forward and backward, medians; ratio above 1: ours is faster; megabytes: peak of a process",
        "heads": HEADS, "tokens": TOKENS, "width": WIDTH, "threads": options.threads, "rounds": options.rounds,
        "cases": {},
    }  # fmt: skip
    for name, (make, n) in CASES.items():
        ours, plain = make(n)
        timed(ours), timed(plain)
        rounds = [(timed(ours), timed(plain)) for _ in range(options.rounds)]
        held = [
            float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            for side in "01"
            for words in [[sys.executable, __file__, "--threads", str(options.threads), "--peak", side, name]]
        ]
        found = {
            "ours_s": round(statistics.median(a[0] for a, _ in rounds), 5),
            "transcription_s": round(statistics.median(b[0] for _, b in rounds), 5),
            "ratio": round(statistics.median(b[0] / a[0] for a, b in rounds), 2),
            "ours_megabytes": held[0],
            "transcription_megabytes": held[1],
        }
        if make is not step:
            found["values_apart"] = float(f"{float((rounds[0][0][1] - rounds[0][1][1]).abs()):.1e}")
        record["cases"][name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
    options.out.write_text(json.dumps(record | {"machine": machine(), "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
