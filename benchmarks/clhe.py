"""Compare CLHE's contrast and its training step with the authors' way: time, value, and memory.

    python benchmarks/clhe.py [--rounds 7] [--threads 1]      writes results/bench/clhe.json

The method is that of benchmarks/alignment.py; ratios above 1 mean that ours is faster. "contrast" is cl of n pairs of width 64.
The transcription stores the matrix of their products. "training step" is the loss of 256 bundles of 10 items, and its gradients.
There are n items, with 64 content, 48 text and 64 feedback features. The transcription follows the authors' code. It encodes all
items four times: for the bundles, for the bundles' views, and for both views of items. Then it takes the batch's rows. Tokens
are left out with probability 0, so that both values agree. `bytes` is the peak of each side's allocations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from audio_sheet_retrieval import peak
from torch import Tensor, nn

from counterpoint import functional as fn
from counterpoint.systems.recommendation.clhe import CLHE, CLHEConfig

OUT = Path(__file__).parents[1] / "results" / "bench" / "clhe.json"
DIM, BUNDLES, LENGTH, TAU = 64, 256, 10, 0.2
WIDTHS = {"content": 64, "text": 48, "cf": 64}
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def matrix_contrast(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(a)))


def contrast(n: int) -> Case:
    """Make n pairs of rows."""
    torch.manual_seed(0)
    a, b = (torch.randn(n, DIM, requires_grad=True) for _ in range(2))
    return [a, b], lambda: fn.one_way_infonce(a, b, TAU), lambda: matrix_contrast(a, b, TAU)


class Plain:
    """The training step of the authors' code, around the weights of a learner."""

    def __init__(self, learner: CLHE) -> None:
        self.learner, self.features = learner, learner.features

    def table(self, encoder: nn.Module, drop: float = 0.0) -> Tensor:
        """Encode all items."""
        content, text = (
            self.perceptron(self.features[name], getattr(encoder, prefix))
            for name, prefix in (("content", "c_encoder"), ("text", "t_encoder"))
        )
        m = F.normalize(content, dim=1) + F.normalize(text, dim=1)
        cf = encoder.cf_transformation(self.features["cf"])
        cf = torch.where(self.learner.cold[:, None], m, cf)
        tokens = torch.stack([m, encoder.item_embeddings, cf], 1)
        tokens = F.normalize(F.dropout(tokens, drop), dim=2)
        among = encoder.w_q(tokens) @ encoder.w_k(tokens).transpose(1, 2) / DIM**0.5
        return (among.softmax(2) @ tokens).mean(1)

    def perceptron(self, x: Tensor, layers: nn.ModuleDict) -> Tensor:
        return layers["w3"](layers["w2"](layers["w1"](x).relu()).relu())

    def pooled(self, ids: Tensor) -> Tensor:
        """Encode bundles of ids with 0 for padding."""
        learner, empty = self.learner, ids == 0
        rows = F.layer_norm(self.table(learner.encoder)[(ids - 1).clamp(min=0)], (DIM,), eps=1e-9)
        among = learner.bundle_q(rows) @ learner.bundle_k(rows).transpose(1, 2) / DIM**0.5
        seen = among.masked_fill(empty[:, None], -1e9).softmax(2) @ rows
        return seen.masked_fill(empty[..., None], 0).sum(1) / ((~empty).sum(1, keepdim=True) + 1e-9)

    def __call__(self, ids: Tensor, view: Tensor) -> Tensor:
        config, learner = self.learner.config, self.learner
        state, member = self.pooled(ids), torch.zeros(len(ids), len(learner.cold) + 1)
        member = member.scatter_(1, ids, 1.0)[:, 1:]
        logits = state @ self.table(learner.decoder).T
        loss = -(member * logits.log_softmax(1)).sum(1).div(member.sum(1)).mean()
        at = ids[ids > 0].unique() - 1
        first, second = (self.table(learner.encoder, config.drop)[at] for _ in range(2))
        loss = loss + config.item_weight * matrix_contrast(first, second, config.item_temperature)
        return loss + config.bundle_weight * matrix_contrast(state, self.pooled(view), config.bundle_temperature)


def step(n: int) -> Case:
    """Make a learner of n items, and a batch with its views."""
    torch.manual_seed(0)
    config = replace(CLHEConfig(), drop=0.0, length=LENGTH, dim=DIM)
    learner = CLHE(config, SimpleNamespace(items=n, features=WIDTHS), 0)
    found = {name: torch.randn(n, width) for name, width in WIDTHS.items()}
    found["cf"][torch.rand(n) < 0.2] = 0.0
    learner.begin(SimpleNamespace(item_features=found))
    ids = torch.stack([torch.randperm(n)[:LENGTH] for _ in range(BUNDLES)]) + 1
    batch: dict[str, Any] = {"ids": ids, "lengths": torch.full((BUNDLES,), LENGTH)}
    batch = learner.prepare(batch, torch.Generator().manual_seed(0))
    plain = Plain(learner)
    return list(learner.parameters()), lambda: learner.loss(batch)["loss"], lambda: plain(ids, batch["view"])


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "contrast": (contrast, (64, 256, 1024, 4096)),
    "training step": (step, (400, 4000, 20_000)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM, memory=peak)
