"""Attention blocks shared by systems that mix two token sequences, and attention pools of tokens and sets (CLHE)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.dropout import dropout
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision

LN_EPS = 1e-9  # of sets


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


@full_precision
def modality_fusion(
    tokens: Float[Tensor, "n tokens dim"], w_q: Float[Tensor, "dim dim"], w_k: Float[Tensor, "dim dim"]
) -> Float[Tensor, "n dim"]:
    """Return the item vectors of n items: attention over their tokens, and the mean.

    Args:
        tokens: m, e and u of each item, of any norm; normalised here. A row of zeros stays zero.
        w_q, w_k: weights of query and key, y = W x.

    Raises ValueError for shapes that do not fit and an empty batch.

    >>> modality_fusion(torch.ones(1, 3, 2), torch.eye(2), torch.eye(2))
    tensor([[0.7071, 0.7071]])
    """
    if tokens.ndim != 3 or w_q.shape != w_k.shape or w_q.shape != (tokens.shape[2],) * 2:
        raise ValueError(
            f"tokens must be [n, tokens, dim] and weights [dim, dim], got {shapes(tokens=tokens, w_q=w_q, w_k=w_k)}"
        )
    need_rows(tokens=tokens)
    rows = unit(tokens)
    among = (rows @ w_q.T @ (rows @ w_k.T).transpose(1, 2) / math.sqrt(rows.shape[2])).softmax(2)
    return (among @ rows).mean(1)


@full_precision
def set_attention_pool(
    x: Float[Tensor, "n items dim"],
    pad_mask: Bool[Tensor, "n items"],
    w_q: Float[Tensor, "dim dim"],
    w_k: Float[Tensor, "dim dim"],
    ln_eps: float = LN_EPS,
) -> Float[Tensor, "n dim"]:
    """Return the vectors of n sets: attention over layer-normalised items, and the mean over the items.

    Args:
        x: item vectors of each set.
        pad_mask: True where a place holds no item. A set without items is 0.
        w_q, w_k: weights of query and key, y = W x.
        ln_eps: added to the variance of a row; by default 1e-9.

    Raises ValueError for shapes that do not fit and an empty batch.

    >>> set_attention_pool(torch.zeros(1, 2, 4), torch.tensor([[False, True]]), torch.eye(4), torch.eye(4)).shape
    torch.Size([1, 4])
    """
    if x.ndim != 3 or pad_mask.shape != x.shape[:2] or w_q.shape != w_k.shape or w_q.shape != (x.shape[2],) * 2:
        raise ValueError(
            "x must be [n, items, dim], pad_mask [n, items] and weights [dim, dim], got "
            f"{shapes(x=x, pad_mask=pad_mask, w_q=w_q, w_k=w_k)}"
        )
    need_rows(x=x)
    rows, empty = F.layer_norm(x, x.shape[-1:], eps=ln_eps), pad_mask.bool()
    among = rows @ w_q.T @ (rows @ w_k.T).transpose(1, 2) / math.sqrt(rows.shape[2])
    seen = among.masked_fill(empty[:, None], -1e9).softmax(2) @ rows
    return seen.masked_fill(empty[..., None], 0.0).sum(1) / ((~empty).sum(1, keepdim=True) + 1e-9)
