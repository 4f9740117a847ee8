"""Attention between tokens of a text and tokens of media, such as pictures: Flamingo's blocks, and a pool with learned queries.

    perceiver_layer           latents attend to media and to themselves (a layer of the resampler)
    gated_cross_attention     a text attends to the media before it, through gates that begin closed
    learned_query_pool        one learned query reads a text

Weights are mappings with the names of the authors' modules, dots replaced by underscores. Norms have eps 1e-5, GELU is exact.

Source: Alayrac et al., Flamingo, arXiv 2204.14198; COSMO, arXiv 2401.00849.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows

Weights = Mapping[str, Tensor]
EPS = 1e-5


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}_weight"], weights[f"{name}_bias"], EPS)


def _feed_forward(x: Tensor, weights: Weights) -> Tensor:
    inner = F.gelu(F.linear(_norm(x, weights, "ff_0"), weights["ff_1_weight"]))
    return F.linear(inner, weights["ff_3_weight"])


def _attend(query: Tensor, key_value: Tensor, heads: int, scale: float, allowed: Tensor | None) -> Tensor:
    """Compute attention by heads, the outer index of the width. `allowed`: [n, queries, keys], a key for each query."""
    key, value = key_value.chunk(2, dim=-1)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = None if allowed is None else allowed[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


def media_times(media_locations: Bool[Tensor, "n tokens"]) -> Int[Tensor, "n tokens"]:
    """Count the media up to each token; the token of a medium counts itself.

    >>> media_times(torch.tensor([[False, True, False, True]]))
    tensor([[0, 1, 1, 2]])
    """
    return media_locations.cumsum(1)


def gated_cross_attention(
    hidden: Float[Tensor, "n tokens width"],
    media: Float[Tensor, "n items media_tokens media_width"],
    media_locations: Bool[Tensor, "n tokens"] | Int[Tensor, "n tokens"],
    weights: Weights,
    heads: int,
    immediate: bool = True,
    dim_head: int = 64,
) -> Float[Tensor, "n tokens width"]:
    """Add tanh(gate) times cross-attention to media, then tanh(gate) times a feed-forward layer.

    A token attends to the latest medium before it, or to all media before it. A token before the first medium gets nothing from
    attention. (In the authors' code it gets the mean of all media, later ones too, where immediate is False.)

    Args:
        hidden: states of the text.
        media: tokens of each medium, in order; 0 items for a text without media.
        media_locations: True at the tokens that stand for a medium. Or whole numbers: the number of media up to each token
            (`media_times`), for the tokens of a longer text whose beginning is in a cache.
        weights: attn_gate, attn_norm, attn_to_q, attn_to_kv (keys first), attn_to_out, ff_gate, ff_0, ff_1 and ff_3.
        heads: number of heads.
        immediate: attend to the latest medium alone. False: to all before.
        dim_head: width of a head before compression; logits are divided by its root. With a compression of r, heads are r times
            narrower, and the divisor stays.

    Raises ValueError for shapes that do not fit, and for more places of media than media.

    >>> w = {"attn_gate": torch.zeros(1), "ff_gate": torch.zeros(1), "attn_to_q_weight": torch.ones(2, 2)}
    >>> w |= {"attn_to_kv_weight": torch.ones(4, 3), "attn_to_out_weight": torch.ones(2, 2)}
    >>> w |= {f"{name}_{part}": torch.ones(2) for name in ("attn_norm", "ff_0") for part in ("weight", "bias")}
    >>> w |= {"ff_1_weight": torch.ones(8, 2), "ff_3_weight": torch.ones(2, 8)}
    >>> x = torch.ones(1, 3, 2)
    >>> torch.equal(gated_cross_attention(x, torch.ones(1, 1, 4, 3), torch.tensor([[False, True, False]]), w, 1), x)
    True
    """
    need_rows(hidden=hidden)
    if hidden.ndim != 3 or media.ndim != 4 or len(media) != len(hidden) or media_locations.shape != hidden.shape[:2]:
        raise ValueError(
            "hidden [n, tokens, width], media [n, items, media_tokens, media_width] and media_locations [n, tokens] do not fit: "
            f"{list(hidden.shape)}, {list(media.shape)} and {list(media_locations.shape)}"
        )
    times = media_times(media_locations) if media_locations.dtype == torch.bool else media_locations
    items, each = media.shape[1:3]
    most = int(times.max()) if times.numel() else 0
    if most > items:
        raise ValueError(
            f"media_locations: a text has {most} places of media, and media holds {items}; give one for each"
        )
    if items:
        number = torch.arange(1, items + 1, device=times.device)
        allowed = number == times[..., None] if immediate else number <= times[..., None]
        seen = times > 0
        # A row without a key has no softmax; it attends to all here, and its result is dropped.
        allowed = (allowed | ~seen[..., None]).repeat_interleave(each, 2)
        query = F.linear(_norm(hidden, weights, "attn_norm"), weights["attn_to_q_weight"])
        key_value = F.linear(media.flatten(1, 2), weights["attn_to_kv_weight"])
        mixed = _attend(query, key_value, heads, dim_head**-0.5, allowed)
        mixed = F.linear(mixed, weights["attn_to_out_weight"]).masked_fill(~seen[..., None], 0.0)
        hidden = hidden + weights["attn_gate"].tanh() * mixed
    return hidden + weights["ff_gate"].tanh() * _feed_forward(hidden, weights)


def perceiver_layer(
    media: Float[Tensor, "n media_tokens width"],
    latents: Float[Tensor, "n latents width"],
    weights: Weights,
    heads: int,
    dim_head: int = 64,
    mask: Bool[Tensor, "n media_tokens"] | None = None,
) -> Float[Tensor, "n latents width"]:
    """Add attention of normalised latents to normalised media and to themselves, then a feed-forward layer.

    Args:
        media: tokens to read.
        latents: those that read.
        weights: attn_norm_media, attn_norm_latents, attn_to_q, attn_to_kv (keys first), attn_to_out, ff_0, ff_1 and ff_3.
        heads: number of heads.
        dim_head: width of a head; logits are divided by its root.
        mask: True at tokens to read, False at padding. Default: all.
    """
    x, own = _norm(media, weights, "attn_norm_media"), _norm(latents, weights, "attn_norm_latents")
    query = F.linear(own, weights["attn_to_q_weight"])
    key_value = F.linear(torch.cat([x, own], 1), weights["attn_to_kv_weight"])
    allowed = None
    if mask is not None:
        allowed = torch.cat([mask, mask.new_ones(own.shape[:2])], 1)[:, None].expand(-1, own.shape[1], -1)
    mixed = _attend(query, key_value, heads, dim_head**-0.5, allowed)
    latents = latents + F.linear(mixed, weights["attn_to_out_weight"])
    return latents + _feed_forward(latents, weights)


def learned_query_pool(
    hidden: Float[Tensor, "n tokens width"],
    latent: Float[Tensor, "1 width"],
    weights: Weights,
    heads: int,
    dim_head: int = 64,
    mask: Bool[Tensor, "n tokens"] | None = None,
) -> Float[Tensor, "n width"]:
    """Summarise each text by one learned query: `perceiver_layer`, then a norm with a gain and without a bias.

    Args:
        hidden: states of the text.
        latent: the query.
        weights: those of `perceiver_layer`, and norm_gamma.
        heads: number of heads.
        dim_head: width of a head; logits are divided by its root.
        mask: True at tokens, False at padding, which is not read. Default: read all, as the authors' code does. Then the summary
            of a text depends on the longest text of its batch.

    Raises ValueError for shapes that do not fit.

    >>> w = {"attn_to_q_weight": torch.ones(2, 2), "attn_to_kv_weight": torch.ones(4, 2), "attn_to_out_weight": torch.ones(2, 2)}
    >>> names = ("attn_norm_media", "attn_norm_latents", "ff_0")
    >>> w |= {f"{name}_{part}": torch.ones(2) for name in names for part in ("weight", "bias")}
    >>> w |= {"ff_1_weight": torch.ones(8, 2), "ff_3_weight": torch.ones(2, 8), "norm_gamma": torch.ones(2)}
    >>> learned_query_pool(torch.randn(3, 5, 2), torch.tensor([[1.0, -1.0]]), w, 1).shape
    torch.Size([3, 2])
    """
    need_rows(hidden=hidden)
    if (
        hidden.ndim != 3
        or latent.shape != (1, hidden.shape[2])
        or (mask is not None and mask.shape != hidden.shape[:2])
    ):
        raise ValueError(
            "hidden, latent and mask must be [n, tokens, width], [1, width] and [n, tokens], got "
            f"{list(hidden.shape)}, {list(latent.shape)} and {None if mask is None else list(mask.shape)}"
        )
    found = perceiver_layer(hidden, latent.expand(len(hidden), 1, -1), weights, heads, dim_head, mask)[:, 0]
    return F.layer_norm(found, found.shape[-1:], weights["norm_gamma"], None, EPS)
