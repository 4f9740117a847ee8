"""Attend within the windows of a map, with one more key and value that belong to a modality: a prefix.

    symbol    here                       meaning
    n, h, d   tokens, heads, size        tokens of a window, heads, width of a head
    e         deep_QKV_embeddings_med    prefix, appended to the keys and to the values
    b         attention_biases           bias of a pair of tokens by (|dy|, |dx|), one row per head
    b_e       med_attention_biases       bias of the prefix, shared by all heads

ESP-MedSAM: Xu and others, arXiv 2407.14153; the windows are those of TinyViT, Wu and others, arXiv 2207.10666. The names of
weights are those of the authors' checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes

Weights = Mapping[str, Tensor]


@functools.cache
def offset_numbers(window: int) -> Tensor:
    """Return [n, n] numbers of the pairs of a window's tokens: |dy| window + |dx|, the order of first appearance."""
    at = torch.arange(window)
    apart = (at[:, None] - at).abs()
    rows, columns = (part.flatten() for part in torch.meshgrid(at, at, indexing="ij"))
    return apart[rows[:, None], rows] * window + apart[columns[:, None], columns]


def prefix_window_attention(
    x: Float[Tensor, "windows tokens dim"], weights: Weights, heads: int
) -> Float[Tensor, "windows tokens dim"]:
    """Compute attention within windows, with a modality's prefix among the keys and values.

    Args:
        x: tokens of square windows, row by row.
        weights: tensors by name. `norm.weight`, `norm.bias`: a layer normalisation. `qkv.weight`, `qkv.bias`: one linear
            layer whose rows are query, key, value of head 0, then of head 1, ... `proj.weight`, `proj.bias`: the output.
            `attention_biases`: [heads, tokens]. `deep_QKV_embeddings_med`: the prefix, [heads, 1, size], or
            [windows, heads, 1, size] to give each window its own. `med_attention_biases`: [1] or [windows]; minus infinity
            masks the prefix. `deep_V_embeddings_med` (optional): another prefix for the values. Without a prefix: plain
            window attention.
        heads: number of heads.

    Raises ValueError for no windows, windows that are not square, and widths that are not a multiple of `heads`.
    """
    need_rows(x=x)
    count, tokens, dim = x.shape
    window = math.isqrt(tokens)
    if window * window != tokens or dim % heads:
        raise ValueError(
            f"x must be [windows, side * side, dim] with dim a multiple of {heads} heads, got {shapes(x=x)}"
        )
    table = weights["attention_biases"]
    if table.shape != (heads, tokens):
        raise ValueError(f"attention_biases must be [{heads}, {tokens}] for these windows, got {list(table.shape)}")
    u = F.layer_norm(x, (dim,), weights["norm.weight"], weights["norm.bias"])
    joint = F.linear(u, weights["qkv.weight"], weights["qkv.bias"]).view(count, tokens, heads, -1).transpose(1, 2)
    q, k, v = joint.chunk(3, 3)  # [windows, heads, tokens, size]
    q = q * q.shape[3] ** -0.5
    bias = table[:, offset_numbers(window).to(x.device)]
    if (prefix := weights.get("deep_QKV_embeddings_med")) is None:
        y = (q @ k.mT + bias).softmax(3) @ v
    else:
        shape = (count, heads, 1, q.shape[3])
        k = torch.cat([k, prefix.expand(shape)], 2)
        v = torch.cat([v, weights.get("deep_V_embeddings_med", prefix).expand(shape)], 2)
        own = weights["med_attention_biases"].view(-1, 1, 1, 1)
        bias = torch.cat([bias.expand(len(own), -1, -1, -1), own.expand(-1, heads, tokens, 1)], 3)
        y = (q @ k.mT + bias).softmax(3) @ v
    return F.linear(y.transpose(1, 2).reshape(count, tokens, -1), weights["proj.weight"], weights["proj.bias"])
