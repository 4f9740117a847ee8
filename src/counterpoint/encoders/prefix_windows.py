"""An encoder of pictures by windows, whose shared part serves all modalities and whose controllers belong to one each.

The shared part (modality aggregator) is TinyViT's: a convolutional stem, inverted bottlenecks, windowed attention, a neck. A
modality's controller has, for each block of attention, a prefix, the prefix's bias and an adapter. Without a controller the
prefix is masked and the adapter adds 0.

ESP-MedSAM: Xu and others, arXiv 2407.14153; TinyViT: Wu and others, arXiv 2207.10666. Names of a block's weights are those
of the authors' checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.prefix import Weights, prefix_window_attention
from counterpoint.core.query_decoder import channel_norm
from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.errors import CounterpointError

NONE = -1  # number of the modality of a picture without controller


class Shape(NamedTuple):
    """Widths of the stages, from the stem's; depths, heads, windows and strides of the stages of attention."""

    stem: int
    bottlenecks: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def patch(self) -> int:
        """Side of a cell of the map in pixels."""
        return 4 * math.prod(self.strides)


SHAPES = {
    "prefix-tiny": Shape(64, 2, (128, 160, 320), (2, 6, 2), (4, 5, 10), (7, 14, 7), (2, 2, 1)),
    "prefix-s": Shape(24, 0, (24,), (3,), (3,), (4,), (1,)),
}


# ------------------------------------------------------------------------------------------------------------- the block


def _part(weights: Weights, name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def _mlp(x: Tensor, weights: Weights) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"])
    x = F.gelu(F.linear(x, weights["fc1.weight"], weights["fc1.bias"]))
    return F.linear(x, weights["fc2.weight"], weights["fc2.bias"])


def student_block(
    x: Float[Tensor, "batch cells dim"],
    weights: Weights,
    heads: int,
    window: int,
    controllers: Sequence[Weights] | None = None,
    modality: Int[Tensor, " batch"] | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch cells dim"]:
    """Compute a block: windowed attention with prefix, depthwise convolution, MLP and adapter.

    Args:
        x: cells of square maps, row by row. Maps are padded with zeros, right and below, to whole windows.
        weights: tensors by name. `attn`: see `prefix_window_attention`. `local_conv.c.weight`, `local_conv.bn`: 3 x 3
            convolution of each channel, and batch normalisation. `mlp` and `med_dah` (the adapter, optional): `norm`,
            `fc1`, `fc2`.
        heads: number of heads.
        window: side of a window in cells.
        controllers: weights of several modalities: `attn.deep_QKV_embeddings_med`, `attn.med_attention_biases`, `med_dah`.
            Default: those among `weights`, where there are any.
        modality: [batch] number of each picture's controller, -1 for none. Needed with `controllers`.
        norm: normalisation that replaces that of `local_conv.bn`, such as a module in training. Default: by the running
            statistics.

    Raises ValueError for an empty batch, maps that are not square, and numbers of controllers out of range.
    """
    need_rows(x=x)
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1] or window < 1:
        raise ValueError(f"x must be [batch, side * side, dim] and window at least 1, got {shapes(x=x)} and {window}")
    attention = _part(weights, "attn")
    padded = -(-side // window) * window
    each = (padded // window) ** 2
    if controllers is not None:
        if modality is None or modality.shape != x.shape[:1]:
            raise ValueError("modality must give the number of a controller for each picture")
        check_modality(modality, len(controllers))
        for name in ("deep_QKV_embeddings_med", "med_attention_biases", "deep_V_embeddings_med"):
            attention.pop(name, None)
        attention |= _prefixes(controllers, modality, each)
    y = F.pad(x.unflatten(1, (side, side)), (0, 0, 0, padded - side, 0, padded - side))
    y = y.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)  # [batch, rows, columns, w, w, dim]
    grid = y.shape
    y = prefix_window_attention(y.reshape(-1, window * window, x.shape[2]), attention, heads)
    y = y.view(grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :side, :side]
    y = (x.unflatten(1, (side, side)) + y).permute(0, 3, 1, 2)
    y = F.conv2d(y, weights["local_conv.c.weight"], padding=1, groups=x.shape[2])
    if norm is None:
        mean, variance, scale, shift = (
            weights[f"local_conv.bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        y = F.batch_norm(y, mean, variance, scale, shift)
    else:
        y = norm(y)
    y = y.flatten(2).mT
    found = y + _mlp(y, _part(weights, "mlp"))
    if controllers is None or modality is None:
        return found + _mlp(y, _part(weights, "med_dah")) if "med_dah.fc1.weight" in weights else found
    numbers = modality[modality >= 0].unique().tolist()
    if not numbers:
        return found
    rows = [(modality == number).nonzero()[:, 0] for number in numbers]
    added = [_mlp(y[own], _part(controllers[n], "med_dah")) for n, own in zip(numbers, rows, strict=True)]
    return found.index_add(0, torch.cat(rows), torch.cat(added).to(found.dtype))


def check_modality(modality: Int[Tensor, " batch"], count: int) -> None:
    """Raise ValueError for a number of a modality that is neither -1 (none) nor one of `count` modalities."""
    if len(modality) and not -1 <= int(modality.min()) <= int(modality.max()) < count:
        raise ValueError(
            f"modality must lie in 0..{count - 1}, or be -1 for a picture of none, got {sorted(set(modality.tolist()))}"
        )


def _prefixes(controllers: Sequence[Weights], modality: Tensor, windows: int) -> dict[str, Tensor]:
    """Return prefixes and biases of all windows, by their pictures' modalities; minus infinity masks a missing one."""
    if not controllers or not bool((modality >= 0).any()):
        return {}
    which = modality.clamp(min=0)
    found = {}
    for name in ("deep_QKV_embeddings_med", "med_attention_biases", "deep_V_embeddings_med"):
        if f"attn.{name}" in controllers[0]:
            of = torch.stack([weights[f"attn.{name}"] for weights in controllers])[which]
            if name == "med_attention_biases":
                of = torch.where(modality[:, None] >= 0, of, -torch.inf)
            found[name] = of.repeat_interleave(windows, 0)
    return found


# ------------------------------------------------------------------------------------------------------------- modules


class _MLP(nn.Module):
    """The weights of a normalisation and two linear layers."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))


class PrefixBlock(nn.Module):
    """The shared weights of one block.

    Args:
        dim: width, a multiple of `heads`.
        heads: number of heads.
        window: side of a window in cells.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.dim, self.heads, self.window = dim, heads, window
        self.attn = _Attention(dim, heads, window)
        self.local_conv = nn.ModuleDict(
            {"c": nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), "bn": nn.BatchNorm2d(dim)}
        )
        self.mlp = _MLP(dim, 4)


class Controller(nn.Module):
    """One modality's weights of one block: prefix, its bias, adapter. At first the adapter adds 0.

    Args:
        block: the block.
        ratio: width of the adapter's hidden layer, in widths of the block.
        separate: give the values their own prefix.
    """

    def __init__(self, block: PrefixBlock, ratio: float, separate: bool) -> None:
        super().__init__()
        shape = (block.heads, 1, block.dim // block.heads)
        self.attn = nn.ParameterDict(
            {"deep_QKV_embeddings_med": 0.02 * torch.randn(shape), "med_attention_biases": torch.zeros(1)}
        )
        if separate:
            self.attn["deep_V_embeddings_med"] = 0.02 * torch.randn(shape)
        self.med_dah = _MLP(block.dim, ratio)
        nn.init.zeros_(self.med_dah.fc2.weight)
        nn.init.zeros_(self.med_dah.fc2.bias)


def _norm_conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class _Bottleneck(nn.Module):
    """TinyViT's MBConv: widen 4 times, convolve each channel, narrow; a shortcut around."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = 4 * dim
        self.layers = nn.Sequential(
            _norm_conv(dim, wide), nn.GELU(), _norm_conv(wide, wide, 3, groups=wide), nn.GELU(), _norm_conv(wide, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.layers(x))


class PrefixWindows(ImageEncoder):
    """Maps of pictures by shared weights and by the controllers of their modalities.

    Args:
        size: height and width of the pictures in pixels, a multiple of the shape's patch.
        shape: a name of SHAPES.
        dim: channels of the map.
        channels: number of channels of the pictures, by default 3.
        ratio: width of the adapters' hidden layers, in widths of the block; default 4, as the MLP.
        separate: give the values their own prefixes. Default: keys and values share them.

    Raises CounterpointError for an unknown shape and a size that does not fit.
    """

    def __init__(
        self, size: int, shape: str, dim: int, channels: int = 3, ratio: float = 4.0, separate: bool = False
    ) -> None:
        super().__init__()
        at = SHAPES[shape]
        if size % at.patch:
            raise CounterpointError(f"{shape} has cells of {at.patch} pixels; {size} is not a multiple of that")
        self.dim, self.patch, self.grid = dim, at.patch, size // at.patch
        self.ratio, self.separate = ratio, separate
        half = max(1, at.stem // 2)
        self.stem = nn.Sequential(
            _norm_conv(channels, half, 3, 2), nn.GELU(), _norm_conv(half, at.stem, 3, 2),
            *(_Bottleneck(at.stem) for _ in range(at.bottlenecks)),
        )  # fmt: skip
        self.joins, self.blocks, self.depths = nn.ModuleList(), nn.ModuleList(), at.depths
        width = at.stem
        for stage, outputs in enumerate(at.widths):
            plain = outputs == width and at.strides[stage] == 1
            self.joins.append(
                nn.Identity()
                if plain
                else nn.Sequential(
                    _norm_conv(width, outputs), nn.GELU(),
                    _norm_conv(outputs, outputs, 3, at.strides[stage], outputs), nn.GELU(), _norm_conv(outputs, outputs),
                )
            )  # fmt: skip
            width = outputs
            for _ in range(at.depths[stage]):
                self.blocks.append(PrefixBlock(width, at.heads[stage], at.windows[stage]))
        self.neck = nn.ModuleDict(
            {
                "narrow": nn.Conv2d(width, dim, 1, bias=False),
                "norm1": nn.LayerNorm(dim),
                "mix": nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                "norm2": nn.LayerNorm(dim),
            }
        )
        self.controllers = nn.ModuleDict()
        self.moving = False  # whether batch normalisation uses and updates the batch's statistics in training

    def add(self, name: str) -> None:
        """Add a modality's controller after the others, whose weights do not change."""
        self.controllers[name] = nn.ModuleList(
            Controller(cast(PrefixBlock, block), self.ratio, self.separate) for block in self.blocks
        )

    @property
    def shared(self) -> list[nn.Module]:
        """The modules of the shared part."""
        return [self.stem, self.joins, self.blocks, self.neck]

    def move(self, moving: bool) -> None:
        """Set whether batch normalisation uses and updates the batch's statistics in training."""
        if moving != self.moving:
            self.moving = moving
            self.train(self.training)

    def train(self, mode: bool = True) -> PrefixWindows:
        super().train(mode)
        if not self.moving:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def features(
        self, images: Float[Tensor, "batch channels height width"], modality: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch dim h w"]:
        """Compute the map.

        Args:
            images: normalised pictures.
            modality: number of each picture's modality in the order of `controllers`, -1 for none. Default: none.
        """
        x = self.stem(images)
        which = images.new_full((len(images),), NONE, dtype=torch.int64) if modality is None else modality
        at = 0
        for join, depth in zip(self.joins, self.depths, strict=True):
            x = join(x)
            side = x.shape[2]
            x = x.flatten(2).mT
            for number in range(at, at + depth):
                x = self._block(number, x, which)
            at += depth
            x = x.mT.unflatten(2, (side, side))
        neck: Any = self.neck
        x = channel_norm(neck["narrow"](x), neck["norm1"].weight, neck["norm1"].bias)
        return channel_norm(neck["mix"](x), neck["norm2"].weight, neck["norm2"].bias)

    def _block(self, number: int, x: Tensor, which: Tensor) -> Tensor:
        block = cast(PrefixBlock, self.blocks[number])
        own = [tensors_of(cast(nn.ModuleList, each)[number]) for each in self.controllers.values()]
        norm = block.local_conv["bn"]
        statistics = norm if norm.training else None
        return student_block(x, tensors_of(block), block.heads, block.window, own, which, statistics)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], modality: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        return self.features(images, modality).mean((2, 3))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
