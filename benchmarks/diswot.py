"""Compare DisWOT's distances, and the score of a candidate, with the authors' way.

    python benchmarks/diswot.py [--rounds 7] [--threads 1]      writes results/bench/diswot.json

The method of the first part is that of benchmarks/alignment.py: forward and backward of a distance. The transcriptions store whole
matrices, as the authors' losses do. The size is a number of images, with maps of 64 channels and 8 x 8 places. For `semantic` it is
the number of classes, of 512 channels. `bytes` is what autograd keeps for the backward pass.

The second part scores one candidate with random weights: 64 images of 32 x 32 pixels, 100 classes, ResNet-56 as teacher. The
authors' loop runs teacher and student forward and backward for each candidate, and compares the maps sample by sample. `batched`
is the same loop with their losses of the whole batch. Ours runs the student forward alone. All make the student anew.
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
from counterpoint.encoders.images import build_image_encoder

OUT = Path(__file__).parents[1] / "results" / "bench" / "diswot.json"
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]
CLASSES, IMAGES = 100, 64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_rows(x: Tensor, y: Tensor) -> Tensor:
    """Sum squared differences of Gram matrices with normalised rows, stored as a whole."""
    return (F.normalize(x @ x.mT, dim=-1) - F.normalize(y @ y.mT, dim=-1)).square().sum()


def relation(n: int) -> Case:
    t, s = drawn(n, 64, 8, 8), drawn(n, 64, 8, 8, seed=1).requires_grad_()
    return [s], lambda: fn.relation_distance(t, s), lambda: of_rows(t.flatten(1), s.flatten(1)) / n**2


def channel(n: int) -> Case:
    t, s = drawn(n, 64, 8, 8), drawn(n, 64, 8, 8, seed=1).requires_grad_()
    return [s], lambda: fn.channel_correlation(s, t), lambda: of_rows(s.flatten(2), t.flatten(2)) / (64 * n)


def semantic(n: int) -> Case:
    t, s = drawn(n, 512), drawn(n, 512, seed=1).requires_grad_()
    return [s], lambda: fn.semantic_distance(t, s), lambda: of_rows(t[:, :, None], s[:, :, None]) / t.numel()


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "relation": (relation, (64, 512, 2048)),
    "channel": (channel, (64, 512)),
    "semantic": (semantic, (10, 100, 400)),
}


def kept(inputs: list[Tensor], loss: Callable[[], Tensor]) -> int:
    """Count the bytes that autograd keeps for the backward pass, each storage once."""
    seen: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss()
    return sum(seen.values())


class Network(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = build_image_encoder(name, 32)
        self.fc = torch.nn.Linear(self.encoder.dim, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.encoder.features(images)
        feature = maps.mean((2, 3))
        return maps, feature, self.fc(feature)


def scores(rounds: int) -> list[dict[str, Any]]:
    images, labels = drawn(IMAGES, 3, 32, 32), torch.arange(IMAGES)
    teacher = Network("resnet-cifar:9-9-9")

    def slope(network: Network) -> tuple[Tensor, Tensor]:
        network.zero_grad()
        maps, _, logits = network(images)
        F.cross_entropy(logits, labels).backward()
        assert network.fc.weight.grad is not None
        return maps.detach(), network.fc.weight.grad

    def authors(name: str) -> float:
        (t, g), (s, h) = slope(teacher), slope(Network(name))
        relation = sum(of_rows(a.flatten(1), b.flatten(1)) / len(a) ** 2 for a, b in zip(t, s, strict=True))
        return -float(relation + of_rows(g[:, :, None], h[:, :, None]) / g.numel())

    def batched(name: str) -> float:
        (t, g), (s, h) = slope(teacher), slope(Network(name))
        return -float(
            of_rows(t.flatten(1), s.flatten(1)) / IMAGES**2 + of_rows(g[:, :, None], h[:, :, None]) / g.numel()
        )

    with torch.no_grad():
        t, feature, logits = teacher(images)
        g = fn.classifier_gradient(feature, logits, labels)

    @torch.no_grad()
    def ours(name: str) -> float:
        s, feature, logits = Network(name)(images)
        return float(fn.diswot_score(t, s, g, fn.classifier_gradient(feature, logits, labels)))

    found = []
    for name in ("resnet-cifar:1-1-1", "resnet-cifar:3-3-3", "resnet-cifar:7-7-7", "nas-201:3-3-1-3-2-1"):
        times: dict[str, list[float]] = {"ours": [], "authors": [], "batched": []}
        values = {}
        for _ in range(rounds):
            for way, call in (("ours", ours), ("authors", authors), ("batched", batched)):
                torch.manual_seed(0)
                started = time.perf_counter()
                values[way] = call(name)
                times[way].append(time.perf_counter() - started)
        seconds = {f"{way}_s": round(statistics.median(each), 4) for way, each in times.items()}
        row = {"candidate": name, **seconds, "ratio": round(seconds["authors_s"] / seconds["ours_s"], 2)}
        row |= {"ratio_batched": round(seconds["batched_s"] / seconds["ours_s"], 2)}
        found.append(row | {"values_apart": float(f"{abs(values['ours'] - values['batched']):.1e}")})
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=64, memory=kept)
    record = json.loads(OUT.read_text())
    record["score"] = {"images": IMAGES, "classes": CLASSES, "rows": scores(record["rounds"])}
    OUT.write_text(json.dumps(record, indent=1) + "\n")
