"""Compare PromptKD's loss, projector and step with the authors' way: time, value, and peak memory.

    python benchmarks/promptkd.py [--rounds 5] [--threads 1]      writes results/bench/promptkd.json

The transcriptions follow the authors' trainer: KL with the reduction "sum", divided by the number of logits; two 1 x 1
convolutions with batch normalisation; prompts joined to the tokens inside the transformer's loop. Both sides take the same float32
tensors, in turn in one process. The last case is a step of a student of 4 blocks: ours with the stored class texts, the authors'
trainer with the teacher's texts computed again.
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
from counterpoint.encoders.images import vit_s
from counterpoint.encoders.text import TextTransformer
from counterpoint.engine.run import machine, versions

OUT = Path(__file__).parents[1] / "results" / "bench" / "promptkd.json"
CLASSES = 1000


def loss(n: int) -> Case:
    """Make logits of n pictures over 1,000 classes."""
    student, teacher = normal(0, n, CLASSES).requires_grad_(), normal(1, n, CLASSES)

    def plain() -> Tensor:
        own, wanted = F.log_softmax(student / 1.0, dim=1), F.softmax(teacher / 1.0, dim=1)
        return 1000.0 * F.kl_div(own, wanted, reduction="sum") * (1.0 * 1.0) / student.numel()

    return lambda: fn.prompt_distillation_loss(student, teacher, 1.0, 1000.0), plain


def projector(n: int) -> Case:
    """Make features of n pictures, 512 wide, and a projector into a space of 768."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(512, 768, 1), nn.BatchNorm2d(768), nn.ReLU(), nn.Conv2d(768, 768, 1))
    h = normal(0, n, 512).requires_grad_()
    weights = {f"conv1.{name}": value for name, value in layers.state_dict(keep_vars=True).items() if value.ndim}

    def plain() -> Tensor:
        u = layers(h[:, :, None, None])[:, :, 0, 0]
        return (u / u.norm(dim=-1, keepdim=True)).square().mean(1).sum()

    return lambda: fn.prompt_projector(h, weights, True).square().mean(1).sum(), plain


def step(n: int) -> Case:
    """Make a student of n pictures of 32 pixels, with prompts before 4 blocks, and texts of 100 classes."""
    torch.manual_seed(0)
    tower, text = vit_s(32, patch=4).eval().requires_grad_(False), TextTransformer(300).eval().requires_grad_(False)
    images, teacher = normal(0, n, 3, 32, 32), normal(1, n, 100)
    names = ["VPT", *(f"transformer.resblocks.{k}.VPT_shallow" for k in (1, 2, 3))]
    prompts = {name: normal(2 + k, 4, 128).requires_grad_() for k, name in enumerate(names)}
    ids = torch.randint(1, 300, (100, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        stored = F.normalize(text(ids, mask), dim=1)

    def ours() -> Tensor:
        h = fn.prompted_vit(images, prompts, 4, 4, 4, 4, tower=tower)
        return fn.prompt_distillation_loss(10 * F.normalize(h, dim=1) @ stored.T, teacher, 1.0, 1000.0)

    def plain() -> Tensor:
        with torch.no_grad():
            texts = F.normalize(text(ids, mask), dim=1)
        model: Any = tower.model
        x = model._pos_embed(model.patch_embed(images))
        count = x.shape[1]
        for number, name in enumerate(names):
            x = torch.cat([x[:, :count], prompts[name].expand(n, -1, -1)], dim=1)
            x = model.blocks[number](x)
        h = model.norm(x)[:, 0]
        logits = 10 * (h / h.norm(dim=-1, keepdim=True)) @ texts.T
        return 1000.0 * F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="sum") / logits.numel()

    return ours, plain


CASES: dict[str, tuple[Any, int]] = {
    "loss, 64 pictures": (loss, 64),
    "loss, 1,024 pictures": (loss, 1024),
    "loss, 4,096 pictures": (loss, 4096),
    "projector, 256 pictures": (projector, 256),
    "step with stored texts, 32 pictures": (step, 32),
}


def peak(side: int, name: str) -> float:
    """Return the peak memory of one call, minus the memory before it, in megabytes."""
    make, n = CASES[name]
    timed(make(2)[side])
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
        "classes": CLASSES, "threads": options.threads, "rounds": options.rounds, "cases": {},
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
        record["cases"][name] = found = {
            "ours_s": round(statistics.median(a[0] for a, _ in rounds), 5),
            "transcription_s": round(statistics.median(b[0] for _, b in rounds), 5),
            "ratio": round(statistics.median(b[0] / a[0] for a, b in rounds), 2),
            "ours_megabytes": held[0],
            "transcription_megabytes": held[1],
            "values_apart": float(f"{float((rounds[0][0][1] - rounds[0][1][1]).abs()):.1e}"),
        }
        print(f"{name}: {json.dumps(found)}", flush=True)
    options.out.write_text(json.dumps(record | {"machine": machine(), "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
