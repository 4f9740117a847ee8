"""Decode masks by learned queries: SAM's two-way transformer, and for each query the weights of its own mask.

Kirillov and others, "Segment Anything", arXiv 2304.02643; one query for each modality: Xu and others, arXiv 2407.14153. The
names of weights are those of the authors' checkpoints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, shapes

Weights = Mapping[str, Tensor]


def channel_norm(
    x: Float[Tensor, "batch dim height width"], weight: Float[Tensor, " dim"], bias: Float[Tensor, " dim"]
) -> Float[Tensor, "batch dim height width"]:
    """Normalise the channels of each cell of a map, with epsilon 1e-6.

    Raises ValueError for a map of another width than the weight.
    """
    if x.ndim != 4 or x.shape[1] != len(weight):
        raise ValueError(f"x must be [batch, {len(weight)}, height, width], got {shapes(x=x)}")
    return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, 1e-6).movedim(-1, 1)


def fourier_positions(
    gaussian: Float[Tensor, "2 half"], height: int, width: int
) -> Float[Tensor, "1 dim height width"]:
    """Return SAM's positional encoding of a map's cells: sines and cosines of random projections of x and y in -1..1."""
    y = (torch.arange(height, device=gaussian.device, dtype=gaussian.dtype) + 0.5) / height
    x = (torch.arange(width, device=gaussian.device, dtype=gaussian.dtype) + 0.5) / width
    places = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], 2)
    angles = 2 * math.pi * ((2 * places - 1) @ gaussian)
    return torch.cat([angles.sin(), angles.cos()], 2).permute(2, 0, 1)[None]


class _Named:
    """Layers by the prefix of their weights' names."""

    def __init__(self, weights: Weights, heads: int) -> None:
        self.weights, self.heads = weights, heads

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.weights[f"{name}.bias"])

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.{kind}_proj", x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for kind, x in (("q", query), ("k", key), ("v", value))
        )
        found = F.scaled_dot_product_attention(q, k, v)
        return self.linear(f"{name}.out_proj", found.transpose(1, 2).flatten(2))

    def grow(self, name: str, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride=2)


def query_decoupled_decoder(
    src: Float[Tensor, "batch dim height width"],
    pos: Float[Tensor, "1 dim height width"],
    tokens: Float[Tensor, "batch queries dim"],
    weights: Weights,
    heads: int,
    masks: int | None = None,
) -> Float[Tensor, "batch masks rows columns"]:
    """Decode the mask of each query, of 4 times the map's height and width.

    All queries attend to each other, to the map, and the map to them. An MLP maps a query to the weights of its mask.

    Args:
        src: map of the pictures.
        pos: positional encoding of its cells, of 1 picture or of the batch.
        tokens: the queries, of 1 picture or of the batch.
        weights: tensors by name. `transformer.layers.N`: `self_attn`, `cross_attn_token_to_image`,
            `cross_attn_image_to_token` (each `q_proj`, `k_proj`, `v_proj`, `out_proj`), `norm1` to `norm4`, `mlp.lin1` and
            `mlp.lin2`. `transformer.final_attn_token_to_image`, `transformer.norm_final_attn`.
            `output_upscaling.0`, `.1`, `.3`: transposed convolution, normalisation of channels, transposed convolution.
            `output_hypernetworks_mlps.J.layers.L`: the MLP of query J; the first one alone serves all queries.
        heads: number of heads of every attention.
        masks: number of queries, from the first, that give a mask. Default: all but the last, which is spare.

    Raises ValueError for an empty batch, other shapes, and more masks than queries.
    """
    need_rows(src=src)
    if src.ndim != 4 or tokens.ndim != 3 or tokens.shape[2] != src.shape[1] or pos.shape[1:] != src.shape[1:]:
        raise ValueError(
            "src and pos must be [batch, dim, height, width] and tokens [batch, queries, dim], got "
            f"{shapes(src=src, pos=pos, tokens=tokens)}"
        )
    masks = tokens.shape[1] - 1 if masks is None else masks
    if not 1 <= masks <= tokens.shape[1]:
        raise ValueError(f"masks must lie in 1..{tokens.shape[1]}, the number of tokens, got {masks}")
    net = _Named(weights, heads)
    batch, _, height, width = src.shape
    image = src.flatten(2).mT  # [batch, cells, dim]
    place = pos.flatten(2).mT
    first = tokens.expand(batch, -1, -1)
    query = first
    for number in itertools.count():
        layer = f"transformer.layers.{number}"
        if not net.has(f"{layer}.norm1"):
            break
        if number == 0:
            query = net.attend(f"{layer}.self_attn", query, query, query)
        else:
            placed = query + first
            query = query + net.attend(f"{layer}.self_attn", placed, placed, query)
        query = net.norm(f"{layer}.norm1", query)
        query = query + net.attend(f"{layer}.cross_attn_token_to_image", query + first, image + place, image)
        query = net.norm(f"{layer}.norm2", query)
        query = query + net.linear(f"{layer}.mlp.lin2", net.linear(f"{layer}.mlp.lin1", query).relu())
        query = net.norm(f"{layer}.norm3", query)
        image = image + net.attend(f"{layer}.cross_attn_image_to_token", image + place, query + first, query)
        image = net.norm(f"{layer}.norm4", image)
    query = query + net.attend("transformer.final_attn_token_to_image", query + first, image + place, image)
    query = net.norm("transformer.norm_final_attn", query)[:, :masks]
    maps = net.grow("output_upscaling.0", image.mT.unflatten(2, (height, width)))
    maps = F.gelu(channel_norm(maps, weights["output_upscaling.1.weight"], weights["output_upscaling.1.bias"]))
    maps = F.gelu(net.grow("output_upscaling.3", maps))
    kernels = [_hyper(net, number, query[:, number : number + 1]) for number in range(masks)] if _own(net) else None
    kernel = torch.cat(kernels, 1) if kernels else _hyper(net, 0, query)
    return (kernel @ maps.flatten(2)).unflatten(2, maps.shape[2:])


def _own(net: _Named) -> bool:
    return net.has("output_hypernetworks_mlps.1.layers.0")


def _hyper(net: _Named, number: int, query: Tensor) -> Tensor:
    name = f"output_hypernetworks_mlps.{number}.layers"
    return net.linear(f"{name}.2", net.linear(f"{name}.1", net.linear(f"{name}.0", query).relu()).relu())


# ------------------------------------------------------------------------------------------------------------- modules


class _Attention(nn.Module):
    """The weights of an attention of this inner width."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)


class _TwoWay(nn.Module):
    """The weights of a two-way block."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = _Attention(dim, dim)
        self.cross_attn_token_to_image, self.cross_attn_image_to_token = (_Attention(dim, dim // 2) for _ in range(2))
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(dim, hidden), "lin2": nn.Linear(hidden, dim)})


class QueryDecoder(nn.Module):
    """The shared weights of `query_decoupled_decoder`, without the queries and the MLPs of their masks.

    Args:
        dim: width, a multiple of 8 and of twice `heads`.
        heads: number of heads, by default 8.
        hidden: width of the MLPs' hidden layers, by default 2048.
        depth: number of two-way blocks, by default 2.

    Raises ValueError for a width that does not fit.
    """

    def __init__(self, dim: int, heads: int = 8, hidden: int = 2048, depth: int = 2) -> None:
        super().__init__()
        if dim % 8 or dim % (2 * heads):
            raise ValueError(f"dim must be a multiple of 8 and of {2 * heads}, twice the heads, got {dim}")
        self.heads = heads
        self.transformer = nn.ModuleDict(
            {
                "layers": nn.ModuleList(_TwoWay(dim, hidden) for _ in range(depth)),
                "final_attn_token_to_image": _Attention(dim, dim // 2),
                "norm_final_attn": nn.LayerNorm(dim),
            }
        )
        self.output_upscaling = nn.ModuleDict(
            {
                "0": nn.ConvTranspose2d(dim, dim // 4, 2, 2),
                "1": nn.LayerNorm(dim // 4),
                "3": nn.ConvTranspose2d(dim // 4, dim // 8, 2, 2),
            }
        )


class MaskMLP(nn.Module):
    """Map a query of width `dim` to the weights of its mask, by three linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim // 8)])


class SelfPrompt(nn.Module):
    """Self-patch prompt generator: predict coarse patches of foreground, and add them to the map as a prompt.

    Args:
        dim: channels of the map.
        hidden: channels of the patch head, by default 64.
    """

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.down, self.norm, self.patch = nn.Conv2d(dim, hidden, 2, 2), nn.LayerNorm(hidden), nn.Conv2d(hidden, 1, 1)
        self.embed, self.embed_norm = nn.Conv2d(1, dim, 1), nn.LayerNorm(dim)

    def forward(
        self, maps: Float[Tensor, "n dim rows columns"]
    ) -> tuple[Float[Tensor, "n dim rows columns"], Float[Tensor, "n coarse wide"]]:
        """Return the prompted maps, and the logits of patches of 2 x 2 cells. No gradient flows through the prompt to them."""
        patches = self.patch(F.gelu(channel_norm(self.down(maps), self.norm.weight, self.norm.bias)))
        prompt = F.interpolate((patches.detach().sigmoid() >= 0.5).to(maps.dtype), scale_factor=2.0)
        dense = F.gelu(channel_norm(self.embed(prompt), self.embed_norm.weight, self.embed_norm.bias))
        return maps + dense, patches[:, 0]
