"""Encode a history of items as one vector: SASRec's causal transformer. An augmenter makes a learned view of it (MCLRec).

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781, in the form of RecBole: GELU,
layer normalisation after each block, and a mask of -10,000. So a history without a visible item has finite states.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.operands import unit
from counterpoint.core.precision import wide
from counterpoint.errors import CounterpointError

HIDDEN = -10_000.0  # added to similarities with items that are not seen


class CausalBlock(nn.Module):
    """Attention to earlier items and two linear layers, each with a residual and layer normalisation after it."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.inputs, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.first, self.second = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.norms = nn.ModuleList([nn.LayerNorm(dim, eps=1e-12) for _ in range(2)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "n length dim"], mask: Float[Tensor, "n 1 length length"]) -> Tensor:
        """Update the states of items."""
        n, length, dim = x.shape
        query, key, value = self.inputs(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        x = self.norms[0](x + self.dropout(self.output(seen.transpose(1, 2).reshape(n, length, dim))))
        return self.norms[1](x + self.dropout(self.second(F.gelu(self.first(x)))))


class HistoryEncoder(nn.Module):
    """SASRec: embeddings of items and positions, causal blocks, and the state at the last item.

    Args:
        items: number of items. Item n has row n + 1 of the embedding; row 0 is padding.
        length: largest number of items of a history.
        dim: width of embeddings and states.
        layers: number of blocks.
        heads: number of attention heads, a divisor of dim.
        inner: width of the inner layer of each block.
        dropout: probability, after embeddings, attention and each block's layers.

    Weights start from a normal distribution of deviation 0.02.

    Raises CounterpointError where heads do not divide dim.
    """

    def __init__(
        self, items: int, length: int, dim: int, layers: int = 2, heads: int = 2, inner: int = 256, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if dim % heads:
            raise CounterpointError(f"{heads} heads do not divide the width {dim} of a history's states")
        self.dim, self.length = dim, length
        self.items = nn.Embedding(items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(length, dim)
        self.norm, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)
        self.blocks = nn.ModuleList([CausalBlock(dim, heads, inner, dropout) for _ in range(layers)])
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.items.weight[0] = 0

    @property
    def table(self) -> Float[Tensor, "items dim"]:
        """The embedding of each item."""
        return self.items.weight[1:]

    def forward(self, ids: Int[Tensor, "n length"], lengths: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """Return the state at the last item of each history.

        Args:
            ids: item numbers plus 1, 0 for padding and for masked items.
            lengths: number of items, masked ones too, at least 1.
        """
        width = ids.shape[1]
        x = self.items(ids) + self.positions.weight[:width]
        earlier = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        seen = earlier & (ids != 0)[:, None, None]
        mask = torch.where(seen, 0.0, HIDDEN).to(x.dtype)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        at = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
        return x.gather(1, at)[:, 0]


def augmented(h: Float[Tensor, "n dim"], weights: Mapping[str, Tensor]) -> Float[Tensor, "n dim"]:
    """Return unit rows by an augmenter: three linear layers, with GELU after the first two.

    Args:
        h: states of histories.
        weights: "dense_1.weight" [dim / 2, dim], "dense_1.bias" [dim / 2], and those of dense_2 and dense_3, back to dim.
    """
    h = wide(h)
    for n in (1, 2, 3):
        weight, bias = (weights[f"dense_{n}.{name}"].to(h.dtype) for name in ("weight", "bias"))
        h = F.linear(F.gelu(h) if n > 1 else h, weight, bias)
    return unit(h)


class Augmenter(nn.Module):
    """A learned view of states: dim -> dim / 2 -> dim / 4 -> dim, and unit length."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense_1, self.dense_2 = nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim // 4)
        self.dense_3 = nn.Linear(dim // 4, dim)

    def forward(self, h: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        return augmented(h, dict(self.named_parameters()))
