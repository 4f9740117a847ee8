"""Attention blocks shared by systems that mix two token sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.core.dropout import dropout


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with four maps, `linears` = query, key, value, output (Vaswani et al. 2017).

    Args:
        dim: width of all of them, a multiple of `heads`.
        rate: of dropout on the attention weights.
    """

    def __init__(self, dim: int, heads: int, rate: float) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"the width {dim} is not a multiple of the {heads} heads")
        self.heads = heads
        self.rate = rate
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        key: Float[Tensor, "batch keys dim"],
        value: Float[Tensor, "batch keys dim"],
        key_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Compute attention of queries to keys; `key_mask` is False for keys that are left out. Default: no key is left out."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in zip(self.linears, (query, key, value), strict=False)
        )
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if self.training and self.rate:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            out = dropout(scores.softmax(-1), self.rate) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.linears[3](out.transpose(1, 2).flatten(2))
