"""Compare ESP-MedSAM's attention with a prefix, and its block of a batch of mixed modalities, with the authors' way.

    python benchmarks/esp_medsam.py [--rounds 31] [--threads 1]      writes results/bench/esp-medsam.json

In the first case n is the number of windows of 7 x 7 cells, 64 wide, of 2 heads. In the other n is the number of pictures of 28 x
28 such cells. Their four modalities take turns. The transcription of the attention scales all pairs. That of the block computes one
modality after another, as a network does that takes one modality a batch. A timing is the mean of several calls in a row (`calls`:
ours, theirs). Both ways take turns, timing by timing. The record has medians.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor
from wscol import kept_bytes

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "esp-medsam.json"
DIM, HEADS, WINDOW, SIDE, MODALITIES = 64, 2, 7, 28, 4
CELLS = WINDOW * WINDOW
AT = [(row, column) for row in range(WINDOW) for column in range(WINDOW)]
PAIRS = torch.tensor([[abs(a - c) * WINDOW + abs(b - d) for c, d in AT] for a, b in AT])


def drawn(*shape: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def attention_weights() -> dict[str, Tensor]:
    return {
        "norm.weight": torch.ones(DIM),
        "norm.bias": torch.zeros(DIM),
        "qkv.weight": drawn(3 * DIM, DIM),
        "qkv.bias": drawn(3 * DIM),
        "proj.weight": drawn(DIM, DIM, seed=1),
        "proj.bias": drawn(DIM),
        "attention_biases": drawn(HEADS, CELLS),
    }


def controller(seed: int) -> dict[str, Tensor]:
    """Draw the prefix, its bias and the adapter of a modality."""
    adapter = {"norm.weight": torch.ones(DIM), "norm.bias": torch.zeros(DIM)}
    for name, shape in (("fc1", (DIM // 4, DIM)), ("fc2", (DIM, DIM // 4))):
        adapter |= {f"{name}.weight": drawn(*shape, seed=seed), f"{name}.bias": drawn(shape[0], seed=seed)}
    return {
        "attn.deep_QKV_embeddings_med": drawn(HEADS, 1, DIM // HEADS, seed=seed, scale=1.0),
        "attn.med_attention_biases": drawn(1, seed=seed),
        **{f"med_dah.{name}": value for name, value in adapter.items()},
    }


def block_weights() -> dict[str, Tensor]:
    """Draw the weights that all modalities share."""
    normalisation = {"weight": torch.ones(DIM), "bias": torch.zeros(DIM)}
    mlp = {f"norm.{name}": value for name, value in normalisation.items()}
    for name, shape in (("fc1", (4 * DIM, DIM)), ("fc2", (DIM, 4 * DIM))):
        mlp |= {f"{name}.weight": drawn(*shape, seed=2), f"{name}.bias": drawn(shape[0], seed=2)}
    statistics = {"running_mean": torch.zeros(DIM), "running_var": torch.ones(DIM)}
    return {
        **{f"attn.{name}": value for name, value in attention_weights().items()},
        "local_conv.c.weight": drawn(DIM, 1, 3, 3),
        **{f"local_conv.bn.{name}": value for name, value in (normalisation | statistics).items()},
        **{f"mlp.{name}": value for name, value in mlp.items()},
    }


def authors(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Compute the attention as the released module does in training."""
    count = len(x)
    u = F.layer_norm(x, (DIM,), weights["norm.weight"], weights["norm.bias"])
    joint = F.linear(u, weights["qkv.weight"], weights["qkv.bias"]).view(count, CELLS, HEADS, -1)
    q, k, v = (part.permute(0, 2, 1, 3) for part in joint.split(DIM // HEADS, 3))
    prefix = weights["deep_QKV_embeddings_med"].unsqueeze(0).repeat(count, 1, 1, 1)
    k, v = torch.cat([k, prefix], 2), torch.cat([v, prefix], 2)
    own = weights["med_attention_biases"].view(1, 1, 1).expand(HEADS, CELLS, 1)
    logits = q @ k.transpose(2, 3) * (DIM // HEADS) ** -0.5 + torch.cat([weights["attention_biases"][:, PAIRS], own], 2)
    y = (logits.softmax(3) @ v).transpose(1, 2).reshape(count, CELLS, DIM)
    return F.linear(y, weights["proj.weight"], weights["proj.bias"])


def attention(n: int) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    own = {name.removeprefix("attn."): value for name, value in controller(3).items() if name.startswith("attn.")}
    weights = attention_weights() | own
    x = drawn(n, CELLS, DIM, scale=1.0).requires_grad_()

    def ours() -> Tensor:
        return fn.prefix_window_attention(x, weights, HEADS).square().mean()

    return [x], ours, lambda: authors(x, weights).square().mean()


def block(n: int) -> Any:
    weights, each = block_weights(), [controller(seed) for seed in range(MODALITIES)]
    x = drawn(n, SIDE * SIDE, DIM, scale=1.0).requires_grad_()
    modality = torch.arange(n) % MODALITIES

    def ours() -> Tensor:
        return fn.student_block(x, weights, HEADS, WINDOW, each, modality).square().mean()

    def plain() -> Tensor:
        found = torch.zeros_like(x)
        for number, own in enumerate(each):
            rows = (modality == number).nonzero()[:, 0]
            found = found.index_copy(0, rows, fn.student_block(x[rows], weights | own, HEADS, WINDOW))
        return found.square().mean()

    return [x], ours, plain


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "attention": (attention, (16, 256)),
    "block": (block, (4, 8, 16)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=DIM, memory=kept_bytes, rounds=31, lasts=0.02)
