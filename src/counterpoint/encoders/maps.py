"""Compute feature maps of any image encoder: one vector for each cell of a grid over the picture."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.images import ImageEncoder
from counterpoint.encoders.small_images import ConvNet
from counterpoint.encoders.taps import recorded
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.errors import CounterpointError

_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Flatten, nn.Identity)


def feature_map(
    encoder: nn.Module, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch dim rows columns"]:
    """Compute the last map before an encoder pools it, with channels first. Gradients flow through it.

    A convolutional network gives its last map. A transformer gives the tokens of its patches as a grid, and leaves out class
    token and registers.

    Args:
        encoder: an encoder of `build_image_encoder`.
        images: normalised pictures.

    Raises CounterpointError for an encoder without a map, such as mlp-s.

    >>> from counterpoint.encoders.images import build_image_encoder
    >>> feature_map(build_image_encoder("conv-s", 32), torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 128, 4, 4])
    """
    return vector_and_map(encoder, images)[1]


def vector_and_map(
    encoder: nn.Module, images: Float[Tensor, "batch channels height width"]
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch channels rows columns"]]:
    """Compute an encoder's vector and its last map in one pass; arguments and errors are those of `feature_map`.

    The widths of the two differ for networks with layers after the pooling.
    """
    if isinstance(encoder, VisionTokens):
        rows, columns = (side // encoder.patch for side in images.shape[2:])
        tokens = encoder.tokens(images)
        return encoder.head(tokens), _grid(tokens[:, encoder.prefix :], rows, columns)
    if hasattr(encoder, "features"):
        found: Tensor = cast(Any, encoder).features(images)
        return found.flatten(1) if isinstance(encoder, ConvNet) else found.mean((2, 3)), found
    model: Any = getattr(encoder, "model", None)
    if model is None:
        raise CounterpointError(
            f"{type(encoder).__name__} has no feature map; choose an encoder with one: conv-s, conv-fine, resnet-s, vit-s, "
            "timm:NAME, torchvision:NAME or hf:NAME"
        )
    if hasattr(model, "forward_features"):
        found = model.forward_features(images)
        vector = model.forward_head(found)
        if found.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
            return vector, found.permute(0, 3, 1, 2)
        return vector, found if found.ndim == 4 else _tokens_of(found, images, _patch(model))
    if hasattr(model, "config"):  # transformers
        # A classifier holds the network whose output has the map under its family's name.
        inner = getattr(model, "base_model_prefix", "")
        name = f"model.{inner}" if inner and hasattr(model, inner) else "model"
        with recorded(encoder, [name]) as seen:
            vector = encoder(images)
        output: Any = seen[name]
        found = output.last_hidden_state
        return vector, found if found.ndim == 4 else _tokens_of(found, images, _patch(model))
    # torchvision: the output of the last of its children that has a map and is no pooling layer.
    names = [name for name, child in model.named_children() if not isinstance(child, _POOLS)]
    with recorded(encoder, names) as maps:
        vector = encoder(images)
    for name in reversed(list(maps)):
        value = maps[name]
        if isinstance(value, Tensor) and value.ndim == 4:
            return vector, value
        if isinstance(value, Tensor) and value.ndim == 3:
            return vector, _tokens_of(value, images, _patch(model))
    raise CounterpointError(f"{type(model).__name__} has no feature map; choose another encoder")


def map_networks(encoder: ImageEncoder) -> list[tuple[nn.Module, str]]:
    """List the (module, method) pairs that `vector_and_map` calls and that treat each picture independently.

    The list is empty for encoders whose maps come from hooks: they cannot run a batch part by part (`--accumulate`).
    """
    if isinstance(encoder, VisionTokens):
        return [(encoder, "tokens")]
    if hasattr(encoder, "features"):
        return [(encoder, "features")]
    model = getattr(encoder, "model", None)
    return [(model, "forward_features")] if isinstance(model, nn.Module) and hasattr(model, "forward_features") else []


def feature_maps(
    encoder: ImageEncoder, images: Float[Tensor, "batch channels height width"]
) -> list[Float[Tensor, "batch dim rows columns"]]:
    """Compute an encoder's last map of every resolution, the finest first, for decoders that use several scales.

    A network without stages of several resolutions, such as a vision transformer, gives its last map alone.

    Args:
        encoder: an encoder of `build_image_encoder`.
        images: normalised pictures.

    Raises CounterpointError for an encoder without a map, such as mlp-s.

    >>> from counterpoint.encoders.images import build_image_encoder
    >>> [list(x.shape) for x in feature_maps(build_image_encoder("conv-s", 32), torch.zeros(2, 3, 32, 32))]
    [[2, 32, 16, 16], [2, 64, 8, 8], [2, 128, 4, 4]]
    """
    model: Any = getattr(encoder, "model", None)
    found: list[Any] = []
    if isinstance(encoder, VisionTokens):
        pass
    elif hasattr(encoder, "features"):
        names = [name for name, _ in encoder.named_children() if name == "stem" or name.startswith("layer")]
        with recorded(encoder, names) as maps:
            feature_map(encoder, images)
        found = list(maps.values())
    elif hasattr(model, "forward_intermediates"):
        found = model.forward_intermediates(images, intermediates_only=True)
    elif hasattr(model, "config"):
        found = list(model(pixel_values=images, output_hidden_states=True).hidden_states or ())
    elif model is not None:
        inner = model.features if isinstance(getattr(model, "features", None), nn.Sequential) else model
        prefix = "features." if inner is not model else ""
        names = [f"{prefix}{name}" for name, child in inner.named_children() if not isinstance(child, _POOLS)]
        with recorded(encoder, names) as maps:
            encoder(images)
        found = list(maps.values())
    last: dict[tuple[int, ...], Tensor] = {}  # by resolution
    for value in found:
        if isinstance(value, Tensor) and value.ndim == 4:
            last[tuple(value.shape[2:])] = value
    return sorted(last.values(), key=lambda x: -x.shape[2]) if len(last) > 1 else [feature_map(encoder, images)]


class MapDecoder(nn.Module):
    """The decoder of SegFormer (arXiv 2105.15203): it joins maps of several resolutions at the finest one.

    Each map passes a 1 x 1 convolution to `width` channels and is scaled up bilinearly. A 1 x 1 convolution with batch
    normalisation and ReLU joins them.

    Args:
        channels: channels of each map, the finest first.
        width: channels of the result.
    """

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(each, width, 1) for each in channels)
        self.join = nn.Sequential(
            nn.Conv2d(width * len(channels), width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )

    def forward(self, maps: list[Tensor]) -> Float[Tensor, "batch width rows columns"]:
        """Return one map of the resolution of the first."""
        size = maps[0].shape[2:]
        each = [project(x) for project, x in zip(self.project, maps, strict=True)]
        scaled = [F.interpolate(x, size, mode="bilinear", align_corners=False) if n else x for n, x in enumerate(each)]
        return self.join(torch.cat(scaled, 1))


class MapProjector(nn.Sequential):
    """SimKD's projector of maps (arXiv 2203.14001): 1 x 1, 3 x 3 and 1 x 1 convolutions without biases.

    Batch normalisation and ReLU follow each.

    Args:
        student, teacher: channels of the maps; between the convolutions half of the teacher's.
    """

    def __init__(self, student: int, teacher: int) -> None:
        half = max(1, teacher // 2)
        layers: list[nn.Module] = []
        for a, b, side in ((student, half, 1), (half, half, 3), (half, teacher, 1)):
            layers += [nn.Conv2d(a, b, side, padding=side // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        super().__init__(*layers)


@torch.no_grad()
def map_shape(encoder: nn.Module, size: int, channels: int = 3) -> tuple[int, int, int]:
    """Return channels, rows and columns of an encoder's `feature_map` of pictures of `size` pixels, measured on a black one.

    Raises CounterpointError for an encoder without a map.
    """
    training, device = encoder.training, next((p.device for p in encoder.parameters()), None)
    found = feature_map(encoder.eval(), torch.zeros(1, channels, size, size, device=device)).shape
    encoder.train(training)
    return found[1], found[2], found[3]


def map_channels(encoder: ImageEncoder, size: int, channels: int = 3) -> list[int]:
    """Return the channels of an encoder's `feature_maps` of pictures of `size` pixels, the finest first."""
    training = encoder.training
    with torch.no_grad():
        found = feature_maps(encoder.eval(), torch.zeros(1, channels, size, size))
    encoder.train(training)
    return [x.shape[1] for x in found]


def has_map(encoder: nn.Module) -> bool:
    """Return whether `feature_map` takes an encoder: all but plain layers such as mlp-s."""
    return isinstance(encoder, VisionTokens) or hasattr(encoder, "features") or hasattr(encoder, "model")


def _patch(model: Any) -> tuple[int, int]:
    """Return height and width in pixels of a transformer's patch."""
    owner = getattr(model, "config", None) or getattr(model, "patch_embed", None) or model
    size = getattr(owner, "patch_size", None)
    if size is None:
        raise CounterpointError(f"{type(model).__name__} has no feature map: its patch size is unknown")
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _tokens_of(tokens: Tensor, images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Arrange the tokens of patches as a map; other tokens come first and are left out."""
    rows, columns = (side // size for side, size in zip(images.shape[2:], patch, strict=True))
    return _grid(tokens[:, tokens.shape[1] - rows * columns :], rows, columns)


def _grid(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))
