"""Encode items of a catalogue from frozen features, vectors of user feedback and free embeddings (CLHE)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint.core.attention import modality_fusion
from counterpoint.core.operands import unit


def item_vectors(features: Mapping[str, Tensor], weights: Mapping[str, Tensor], cold: Tensor | None = None) -> Tensor:
    """Return the vectors of items by one encoder: the tokens m, e, u and their fusion.

    Args:
        features: "content" and "text" [n, width], unit rows or zeros where missing, and "cf" [n, width]; any may be left out.
        weights: "c_encoder.w1.weight" and so on, "t_encoder....", "item_embeddings" [n, dim], "cf_transformation.weight" and bias,
            "w_q.weight", "w_k.weight".
        cold: [n] True for items without user feedback, whose u is m, or e where there is no m.
    """
    tokens = []
    for name, prefix in (("content", "c_encoder"), ("text", "t_encoder")):
        if name in features:
            tokens.append(unit(_mlp(features[name], weights, prefix)))
    tokens = [torch.stack(tokens).sum(0)] if tokens else []
    tokens.append(weights["item_embeddings"])
    if "cf" in features:
        u = F.linear(features["cf"], weights["cf_transformation.weight"], weights["cf_transformation.bias"])
        tokens.append(u if cold is None else torch.where(cold.bool()[:, None], tokens[0], u))
    return torch.stack(tokens, 1)


def _mlp(x: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    for n in (1, 2, 3):
        x = F.linear(F.relu(x) if n > 1 else x, weights[f"{prefix}.w{n}.weight"], weights[f"{prefix}.w{n}.bias"])
    return x


class ItemEncoder(nn.Module):
    """The weights of `item_vectors` and of the fusion."""

    def __init__(self, items: int, widths: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.item_embeddings = nn.Parameter(nn.init.xavier_uniform_(torch.empty(items, dim)))
        for name, prefix in (("content", "c_encoder"), ("text", "t_encoder")):
            if name in widths:
                sizes = (widths[name], widths[name], 256, dim)
                layers = {f"w{n}": nn.Linear(sizes[n - 1], sizes[n]) for n in (1, 2, 3)}
                for layer in layers.values():
                    nn.init.xavier_normal_(layer.weight)
                    nn.init.zeros_(layer.bias)
                setattr(self, prefix, nn.ModuleDict(layers))
        if "cf" in widths:
            self.cf_transformation = nn.Linear(widths["cf"], dim)
        self.w_q, self.w_k = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def tokens(self, features: Mapping[str, Tensor], cold: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the tokens of all items, or of those at `rows`."""
        weights: dict[str, Tensor] = dict(self.named_parameters())
        if rows is not None:
            features, cold = {name: of[rows] for name, of in features.items()}, cold[rows]
            weights["item_embeddings"] = self.item_embeddings[rows]
        return item_vectors(features, weights, cold)

    def fused(self, tokens: Tensor) -> Tensor:
        """Return the vectors of items."""
        return modality_fusion(tokens, self.w_q.weight, self.w_k.weight)
