"""Cut regions from pictures, and encode, classify and map them: the networks of a classifier of proposals."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import shapes
from counterpoint.encoders.images import build_image_encoder
from counterpoint.encoders.taps import recorded
from counterpoint.errors import CounterpointError


def drawn_regions(images: Tensor, boxes: Float[Tensor, "pictures n 4"], size: int) -> Float[Tensor, "rows 3 size size"]:
    """Cut regions from pictures and scale them, bilinearly, by torchvision's roi_align.

    Args:
        images: [pictures, 3, height, width], uint8, or floating point in 0..1.
        boxes: left, top, right, bottom in pixels.
        size: height and width of a region.

    Returns values in 0..1, the regions of a picture one after another. Raises ValueError for shapes that do not fit.
    """
    from torchvision.ops import roi_align

    if images.ndim != 4 or boxes.ndim != 3 or len(boxes) != len(images) or boxes.shape[2] != 4:
        raise ValueError(f"boxes must be [pictures, n, 4] of images, got {shapes(images=images, boxes=boxes)}")
    if not len(images):  # a process's share of a small batch
        return torch.zeros(0, 3, size, size, device=images.device)
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    return roi_align(pixels, list(boxes.to(pixels.dtype)), size, sampling_ratio=2, aligned=True)


class RegionEncoder(nn.Module):
    """An encoder whose output is a feature map.

    Args:
        name: name of an image encoder.
        layer: layer whose output is the map; "" for the encoder's last map.
        size: height and width of the pictures in pixels.
        pretrained: load published weights.

    Attributes:
        dim, side: channels and height of the map.

    Raises CounterpointError for an encoder or a layer without a map.
    """

    def __init__(self, name: str, layer: str, size: int, pretrained: bool = False) -> None:
        super().__init__()
        self.encoder, self.layer, self.size = build_image_encoder(name, size, pretrained=pretrained), layer, size
        if not layer and not hasattr(self.encoder, "features"):
            raise CounterpointError(f"{name} has no feature map of its own; name a layer, such as --layer layer4")
        self.eval()
        with torch.no_grad():
            found = self(torch.zeros(1, 3, size, size))
        self.train()
        if found.ndim != 4 or found.shape[2] != found.shape[3]:
            raise CounterpointError(f"layer {layer} of {name} has no square map but {list(found.shape)}; name another")
        self.dim, self.side = int(found.shape[1]), int(found.shape[2])

    def forward(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim side side"]:
        if not self.layer:
            found: Tensor = cast(Any, self.encoder).features(images)
            return found
        with recorded(self.encoder, [self.layer]) as seen:
            self.encoder(images)
        return seen[self.layer]


class Mapper(nn.Module):
    """WSCoL's mapping network M of a region's map: convolutions without padding, then m(x) of the features' width, then z(x).

    Args:
        dim, side: channels and height of a region's feature map.
        hidden: channels of the convolutions.
        projection: width of z.

    A map of 7 x 7 gets three convolutions; a smaller one as many as fit. Where a map remains, it is averaged. Weights begin as
    Kaiming's, which is our choice.
    """

    def __init__(self, dim: int, side: int, hidden: int, projection: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n in range(min(3, (side - 1) // 2)):
            layers += [nn.Conv2d(hidden if n else dim, hidden, 3), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Sequential(nn.Linear(hidden if layers else dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.projector = nn.Linear(dim, projection)
        for module in self.modules():  # PyTorch's own start shrinks the signal, until biases make all rows alike
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def m(self, maps: Float[Tensor, "n dim side side"]) -> Float[Tensor, "n dim"]:
        return self.linear(self.convolutions(maps).mean((2, 3)))

    def forward(self, maps: Float[Tensor, "n dim side side"]) -> Float[Tensor, "n projection"]:
        return self.projector(F.relu(self.m(maps)))


class RegionNetwork(nn.Module):
    """Encoder of regions, classifier of C classes and the background, and mapping network.

    Args:
        encoder: the encoder of regions.
        classes: C.
        hidden, projection: see `Mapper`.
    """

    def __init__(self, encoder: RegionEncoder, classes: int, hidden: int, projection: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.dim, classes + 1)
        self.mapper = Mapper(encoder.dim, encoder.side, hidden, projection)

    def pooled(self, maps: Float[Tensor, "n dim side side"]) -> Float[Tensor, "n dim"]:
        return maps.mean((2, 3))

    def logits(self, maps: Float[Tensor, "n dim side side"]) -> Float[Tensor, "n classes"]:
        return self.classifier(self.pooled(maps))
