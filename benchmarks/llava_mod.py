"""Compare LLaVA-MoD's layer of experts and mimic loss with the authors' way: time, value, and peak memory.

    python benchmarks/llava_mod.py [--rounds 7] [--threads 1]      writes results/bench/llava-mod.json

Both sides take the same float32 input. They run forward and backward, in turn in one process. The record has the medians over the
rounds and the ratio of the medians. A ratio is the authors' time over ours: above 1 ours is faster. Memory is the peak of a
separate process of each, minus its memory before the call.

Layer: four experts of Llama's kind, 256 wide with 768 inside. The authors' layer is DeepSpeed's. It makes weights [tokens, experts,
capacity] from one-hot tables. An einsum sends the tokens, another collects them. "capacity 1.5" drops the same tokens on both
sides. "none dropped" is our default; DeepSpeed needs a capacity of all tokens for it.

Mimic loss: a vocabulary of 16,384. The authors' way computes softmax and log-softmax of all positions, and then takes the answers'.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from sides import Case, Sides, normal, run
from torch import Tensor, nn

from counterpoint import functional as fn
from counterpoint.encoders.mixture_of_experts import MixtureOfExperts

OUT = Path(__file__).parents[1] / "results" / "bench" / "llava-mod.json"
WIDTH, INNER, EXPERTS, VOCABULARY = 256, 768, 4, 16384


class FeedForward(nn.Module):
    """A feed-forward network of Llama's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return found


def dispatched(layer: MixtureOfExperts, x: Tensor, capacity: int) -> Tensor:
    """Compute the layer in DeepSpeed's way."""
    rows = x.reshape(-1, WIDTH)
    logits = layer.router(rows)
    gates = logits.softmax(1)
    first = F.one_hot(gates.argmax(1), EXPERTS)
    second = F.one_hot(logits.masked_fill(first.bool(), -torch.inf).argmax(1), EXPERTS)
    place = first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0, keepdim=True)
    masks = [mask * (at < capacity) for mask, at in zip((first, second), place, strict=True)]
    weights = [(gates * mask).sum(1) for mask in masks]
    total = (weights[0] + weights[1]).clamp(min=torch.finfo(gates.dtype).eps)
    combine = torch.zeros(len(rows), EXPERTS, capacity)
    for weight, mask, at in zip(weights, masks, place, strict=True):
        slots = F.one_hot((at * mask).sum(1), capacity).float()
        combine = combine + torch.einsum("se,sc->sec", (weight / total)[:, None] * mask, slots)
    sent = torch.einsum("sec,sm->ecm", combine.bool().float(), rows)
    done = torch.stack([expert(part) for expert, part in zip(layer.experts, sent, strict=True)])
    return torch.einsum("sec,ecm->sm", combine, done).view_as(x)


def layer(tokens: int, factor: float) -> Case:
    """Make the layer on some tokens; factor 0: none is dropped."""
    torch.manual_seed(0)
    mixture = MixtureOfExperts(FeedForward(), WIDTH, EXPERTS, capacity_factor=factor)
    for expert in mixture.experts:
        for weight in expert.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    x = normal(1, 1, tokens, WIDTH).requires_grad_()
    capacity = -(-2 * tokens * factor // EXPERTS) if factor else tokens
    return lambda: mixture(x).square().mean(), lambda: dispatched(mixture, x, int(capacity)).square().mean()


def mimic(rows: int, tokens: int, answers: int) -> Case:
    """Make the mimic loss of some rows of tokens, of which the last ones are an answer."""
    student, teacher = normal(0, rows, tokens, VOCABULARY).requires_grad_(), normal(1, rows, tokens, VOCABULARY)
    labels = torch.full((rows, tokens), -100)
    labels[:, -answers:] = 1

    def plain() -> Tensor:
        target = F.softmax(teacher, dim=-1, dtype=torch.float32)
        logs = F.log_softmax(student, dim=-1, dtype=torch.float32)
        sums = (target * logs).masked_fill(torch.isinf(student), 0).sum(-1).view(-1)
        chosen = (labels != -100).int().view(-1)
        return -(sums * chosen).sum() / chosen.sum()

    return lambda: fn.mimic_loss(student, teacher, labels, shift=False), plain


if __name__ == "__main__":
    cases = {
        f"layer, {tokens:,} tokens, {said}": Sides(partial(layer, tokens, factor), partial(layer, 32, factor))
        for tokens in (256, 1024)
        for said, factor in (("none dropped", 0.0), ("capacity 1.5", 1.5))
    }
    cases |= {
        f"mimic, 2 x 512 tokens, answers of {answers}": Sides(partial(mimic, 2, 512, answers), partial(mimic, 1, 8, 4))
        for answers in (64, 256, 512)
    }
    run(cases, OUT, __doc__, rounds=7, width=WIDTH)
