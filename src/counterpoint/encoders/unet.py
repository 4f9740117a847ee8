"""The two halves of a U-Net: an encoder of pictures that gives a map at each scale, and a decoder that joins them.

Ronneberger, Fischer, Brox 2015, arXiv 1505.04597, in the form of Chaitanya et al. 2020, arXiv 2006.10511, Appendix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.image_encoder import ImageEncoder
from counterpoint.errors import CounterpointError
from counterpoint.words import counted

WIDTHS = {"unet": (16, 32, 64, 128, 128, 128), "unet-s": (8, 16, 32)}


def _convolutions(inputs: int, outputs: int, count: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(count):
        layers += [
            nn.Conv2d(inputs if number == 0 else outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNetEncoder(ImageEncoder):
    """The contracting path: two 3 x 3 convolutions at each level, max-pooling between levels.

    Args:
        size: height and width of the pictures, a multiple of 2 ^ (levels - 1).
        channels: number of channels of the pictures.
        widths: channels of the levels, from the finest.

    Raises CounterpointError for a size that does not fit.
    """

    def __init__(self, size: int, channels: int = 3, widths: tuple[int, ...] = WIDTHS["unet"]) -> None:
        super().__init__()
        if size % 2 ** (len(widths) - 1):
            raise CounterpointError(
                f"a U-Net of {counted(len(widths), 'level')} halves pictures {len(widths) - 1} times; {size} pixels are not a "
                "multiple of "
                f"{2 ** (len(widths) - 1)}"
            )
        self.widths, self.dim = widths, widths[-1]
        self.blocks = nn.ModuleList(
            _convolutions(inputs, outputs) for inputs, outputs in zip((channels, *widths), widths, strict=False)
        )

    def levels(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """Compute the maps of all levels, from the finest."""
        found: list[Tensor] = []
        x = images
        for block in self.blocks:
            x = block(F.max_pool2d(x, 2) if found else x)
            found.append(x)
        return found

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim h w"]:
        """Compute the map of the coarsest level."""
        return self.levels(images)[-1]

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        return self.features(images).mean((2, 3))


class UNetDecoder(nn.Module):
    """The expanding path: double the size, 2 x 2 convolution, join the encoder's map, two 3 x 3 convolutions.

    Args:
        widths: channels of the encoder's levels, from the finest.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        coarse = list(widths[::-1])
        self.up = nn.ModuleList()
        self.join = nn.ModuleList()
        for inputs, outputs in itertools.pairwise(coarse):
            self.up.append(
                nn.Sequential(
                    nn.Upsample(scale_factor=2),
                    nn.ZeroPad2d((0, 1, 0, 1)),  # as padding="same", without its warning
                    nn.Conv2d(inputs, outputs, 2, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                )
            )
            self.join.append(_convolutions(2 * outputs, outputs))

    def forward(self, levels: Sequence[Tensor], blocks: int | None = None) -> Float[Tensor, "batch dim h w"]:
        """Compute the map after the first `blocks` blocks, from the coarsest; None: all."""
        x = levels[-1]
        for number in range(len(self.up) if blocks is None else blocks):
            x = self.join[number](torch.cat([self.up[number](x), levels[-2 - number]], 1))
        return x
