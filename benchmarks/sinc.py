"""Compare the in-context classifier with a plain reading of the paper: time, and peak memory.

    python benchmarks/sinc.py [--rounds 9] [--threads 1]      writes results/bench/sinc.json

A step is the loss of 16 queries with its gradients. A query has 8 demonstrations, each of 5 slots of 1792 features. The fuser has
width 768. A GPT-2 of two layers of width 256 reads the prompt, and the classifier has 64 hidden units.

"plain" multiplies each pair of a state and a class elementwise, as the authors' code does, at all positions. It also attends from
the fuser's query to itself. "ours" is a product of matrices. "training" is the query's position alone, as in a step. In "all
positions" both sides score the demonstrations, too.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, normal, run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.encoders.in_context import EPS, InContextNetwork

OUT = Path(__file__).parents[1] / "results" / "bench" / "sinc.json"
SLOTS, FEATURES, FUSER, HEADS, DEMOS = 5, 1792, 768, 12, 8
BLOCK = "fuser.attention_layers.0."


def attended(w: dict[str, Tensor], name: str, x: Tensor, keys: Tensor) -> Tensor:
    """Compute a post-norm attention of BERT by its formula."""

    def parts(part: str, of: Tensor) -> Tensor:
        at = f"{BLOCK}{name}.self.{part}"
        found = F.linear(of, w[f"{at}.weight"], w[f"{at}.bias"])
        return found.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    query, key, value = parts("query", x), parts("key", keys), parts("value", keys)
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return ended(w, f"{name}.output", (weights @ value).transpose(1, 2).flatten(2), x)


def ended(w: dict[str, Tensor], name: str, inner: Tensor, x: Tensor) -> Tensor:
    out = F.linear(inner, w[f"{BLOCK}{name}.dense.weight"], w[f"{BLOCK}{name}.dense.bias"])
    norm = f"{BLOCK}{name}.LayerNorm"
    return F.layer_norm(x + out, x.shape[-1:], w[f"{norm}.weight"], w[f"{norm}.bias"], EPS)


def plain_logits(w: dict[str, Tensor], meta: torch.nn.Module, items: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
    """Compute the logits at all positions as the paper writes them, for one token of each class."""
    n = len(items)
    x = F.linear(w["fuser_query"], w["fuser.fc.weight"], w["fuser.fc.bias"]).expand(n * items.shape[1], 1, -1)
    y = F.linear(items.flatten(0, 1), w["fuser.fc.weight"], w["fuser.fc.bias"])
    h = attended(w, "attention", x, x)
    h = attended(w, "crossattention", h, torch.cat([y, x], 1))
    inner = F.gelu(F.linear(h, w[BLOCK + "intermediate.dense.weight"], w[BLOCK + "intermediate.dense.bias"]))
    x = x + ended(w, "output", inner, h)
    x = x + F.linear(x, w["fuser.fcs.0.weight"], w["fuser.fcs.0.bias"])
    r = F.linear(x.relu(), w["fuser.final.weight"], w["fuser.final.bias"]).mean(1).unflatten(0, (n, -1))
    v = F.linear(w["label_token_embeddings"][tokens].mean(1), w["label_proj.weight"], w["label_proj.bias"])
    prompt = [F.linear((r[:, :1] * r[:, 1:]).mean(1), w["corr_proj.weight"], w["corr_proj.bias"])]
    for at in range(DEMOS):
        prompt += [r[:, 1 + at], v[labels[:, at]]]
    states = meta(F.linear(torch.stack([*prompt, r[:, 0]], 1), w["in_proj.weight"], w["in_proj.bias"]))[:, 1::2]
    a = F.linear(states, w["classifier.dense_d.weight"], w["classifier.dense_d.bias"]).relu()
    b = F.linear(v, w["classifier.dense_l.weight"], w["classifier.dense_l.bias"]).relu()
    pairs = a[:, :, None] * b
    return F.linear(pairs, w["classifier.dense.weight"], w["classifier.dense.bias"])[..., 0]


def case(n: int, classes: int, alone: bool) -> Case:
    """Make both sides for n queries and as many classes."""
    torch.manual_seed(0)
    network = InContextNetwork(FEATURES, torch.randn(classes, FUSER), FUSER, "gpt2-256-2-4", 2 * DEMOS + 2, 64)
    weights = network.weights
    own = f"{BLOCK}attention.self."
    theirs = weights | {f"{own}{part}.weight": torch.eye(FUSER) for part in ("query", "key")}
    theirs |= {f"{own}{part}.bias": torch.zeros(FUSER) for part in ("query", "key")}
    items = normal(1, n, 1 + DEMOS, SLOTS, FEATURES)
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(classes, (n, DEMOS), generator=generator)
    truth = torch.randint(classes, (n,), generator=generator)
    tokens = torch.arange(classes)[:, None]

    def loss(logits: Tensor) -> Tensor:
        network.zero_grad()
        found = F.cross_entropy(logits[:, -1], truth)
        found.backward()
        return found.detach()

    def ours() -> Tensor:
        return loss(
            fn.in_context_classifier(
                *(items[:, 0], items[:, 1:], labels, tokens, torch.ones_like(tokens), weights, network.meta),
                num_heads=HEADS,
                query_alone=alone,
            )
        )

    return ours, lambda: loss(plain_logits(theirs, network.meta, items, labels, tokens))


CASES = {
    "16 queries, 1,000 classes, training": (16, 1000, True),
    "16 queries, 3,926 classes, training": (16, 3926, True),
    "16 queries, 3,926 classes, all positions": (16, 3926, False),
}

if __name__ == "__main__":
    cases = {name: Sides(partial(case, *given), partial(case, 1, 20, True)) for name, given in CASES.items()}
    run(cases, OUT, __doc__, rounds=7, slots=SLOTS, features=FEATURES, fuser=FUSER, demonstrations=DEMOS)
