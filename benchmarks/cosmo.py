"""Compare COSMO's contrast and gated cross-attention with transcriptions of the authors' way: time, value, and peak memory.

    python benchmarks/cosmo.py [--rounds 9] [--threads 1]      writes results/bench/cosmo.json

The authors normalise twice, store the matrix of logits, and take two cross-entropies. Their attention makes the whole
matrix of each head. It fills the masked entries, subtracts the maximum, and fills the rows without a medium. Both ways take the
same float32 arrays and run forward and backward, in turn in one process. The record has the medians over the rounds and the
ratio of the medians. A ratio is the authors' time over ours: above 1 ours is faster. Memory is the peak of a separate process of
each, minus its memory before the call.

Embeddings are 512 wide. "block" cases have texts of 128 tokens with 3 pictures of 64 tokens. States are 512 wide; there are 8 heads
of 64.
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

OUT = Path(__file__).parents[1] / "results" / "bench" / "cosmo.json"
WIDTH, SCALE, HEADS, HEAD = 512, 7.4, 8, 64
TOKENS, ITEMS, EACH = 128, 3, 64


def contrast(n: int) -> Case:
    """Make embeddings of n pictures and captions."""
    vision, text = (normal(seed, n, WIDTH).requires_grad_() for seed in (0, 1))

    def plain() -> Tensor:
        v, t = (F.normalize(F.normalize(x, dim=1), dim=1) for x in (vision, text))
        logits = SCALE * t @ v.T
        target = torch.arange(n)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return lambda: fn.interleaved_contrast(vision, text, SCALE), plain


def block(n: int) -> Case:
    """Make n texts, their pictures and the weights of a block."""
    inner = HEADS * HEAD
    shapes = {
        "attn_to_q_weight": (inner, WIDTH),
        "attn_to_kv_weight": (2 * inner, WIDTH),
        "attn_to_out_weight": (WIDTH, inner),
        "ff_1_weight": (4 * WIDTH, WIDTH),
        "ff_3_weight": (WIDTH, 4 * WIDTH),
    }
    weights = {
        name: (WIDTH**-0.5 * normal(k, *shape)).requires_grad_() for k, (name, shape) in enumerate(shapes.items())
    }
    for name in ("attn_norm", "ff_0"):
        weights |= {f"{name}_weight": torch.ones(WIDTH), f"{name}_bias": torch.zeros(WIDTH)}
    weights |= {"attn_gate": torch.full((1,), 0.5), "ff_gate": torch.full((1,), 0.5)}
    hidden, media = normal(8, n, TOKENS, WIDTH).requires_grad_(), normal(9, n, ITEMS, EACH, WIDTH).requires_grad_()
    locations = torch.zeros(n, TOKENS, dtype=torch.bool)
    locations[:, [4, 40, 90]] = True

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)

    def plain() -> Tensor:
        w = weights
        normed = F.layer_norm(hidden, (WIDTH,), w["attn_norm_weight"], w["attn_norm_bias"])
        query = split(normed @ w["attn_to_q_weight"].T) * HEAD**-0.5
        key, value = map(split, (media.flatten(1, 2) @ w["attn_to_kv_weight"].T).chunk(2, -1))
        similarity = query @ key.transpose(2, 3)
        times = locations.cumsum(1)
        number = torch.arange(1, ITEMS + 1).repeat_interleave(EACH)
        similarity = similarity.masked_fill(times[:, None, :, None] != number, -torch.finfo(similarity.dtype).max)
        attention = (similarity - similarity.amax(-1, keepdim=True).detach()).softmax(-1)
        attention = attention.masked_fill((times == 0)[:, None, :, None], 0.0)
        mixed = (attention @ value).transpose(1, 2).flatten(2) @ w["attn_to_out_weight"].T
        x = hidden + w["attn_gate"].tanh() * mixed
        inside = F.gelu(F.layer_norm(x, (WIDTH,), w["ff_0_weight"], w["ff_0_bias"]) @ w["ff_1_weight"].T)
        return (x + w["ff_gate"].tanh() * (inside @ w["ff_3_weight"].T)).square().mean()

    return lambda: fn.gated_cross_attention(hidden, media, locations, weights, HEADS).square().mean(), plain


if __name__ == "__main__":
    cases = {
        f"contrast of {n:,} pairs": Sides(partial(contrast, n), partial(contrast, 16), 40 if n <= 256 else 1)
        for n in (64, 1024, 4096)
    }
    cases |= {f"block, {n} texts": Sides(partial(block, n), partial(block, 1)) for n in (1, 4, 16)}
    run(cases, OUT, __doc__, rounds=9, width=WIDTH)
