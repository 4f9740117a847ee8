"""Encode snippets of sheet music and of spectrograms with a convolutional network (Carvalho, Widmer: arXiv 2309.12134)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MAPS = 32  # channels of an encoder's output
HIDDEN = 512  # width of a projector's hidden layer


class Block(nn.Module):
    """Twice [convolution 3x3, batch normalisation, ELU], then max pooling over 2 x 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h2 w2"]:
        # Channels last is a third faster on a CPU with so few channels.
        x = F.elu(self.bn1(self.conv1(x).contiguous(memory_format=torch.channels_last)))
        # The ELU is increasing, so the maximum may precede it and leaves it a quarter of the work.
        return F.elu(F.max_pool2d(self.bn2(self.conv2(x)), 2))


class SnippetEncoder(nn.Module):
    """One pathway, [n, 1, height, width] -> [n, dim]: four blocks of F, 2F, 4F, 4F channels, then 1x1 to 32 maps.

    Args:
        height, width: pixels of a snippet, at least 16: 92 x T_s for audio, 80 x 100 for sheet music.
        filters: F, the number of channels of the first block, at least 1; by default 24.

    `dim` is 32 (height // 16) (width // 16): 800 for 84 frames of audio, 960 for sheet music. Raises ValueError for
    smaller snippets or no filters, and in `forward` for snippets of another size.

    >>> SnippetEncoder(92, 84, filters=3)(torch.zeros(2, 1, 92, 84)).shape
    torch.Size([2, 800])
    """

    def __init__(self, height: int, width: int, filters: int = 24) -> None:
        super().__init__()
        if min(height, width) < 16 or filters < 1:
            raise ValueError(
                f"an encoder needs snippets of at least 16 x 16 and one filter, got {height} x {width} and {filters}"
            )
        widths = [1, filters, 2 * filters, 4 * filters, 4 * filters]
        self.block1, self.block2, self.block3, self.block4 = (Block(widths[n], widths[n + 1]) for n in range(4))
        self.conv = nn.Conv2d(widths[-1], MAPS, 1, bias=False)
        self.bn = nn.BatchNorm2d(MAPS)
        self.size = (1, height, width)
        self.dim = MAPS * (height // 16) * (width // 16)
        linear_start(self)

    def forward(self, x: Float[Tensor, "n 1 height width"]) -> Float[Tensor, "n dim"]:
        if x.shape[1:] != self.size:
            raise ValueError(f"x must be [n, {', '.join(map(str, self.size))}], got {list(x.shape)}")
        x = self.block4(self.block3(self.block2(self.block1(x))))
        return self.bn(self.conv(x)).flatten(1)


def output_layer(dim: int, embedding: int) -> nn.Module:
    """Build the layer after an encoder: from its width `dim` to that of the shared space."""
    return linear_start(nn.Linear(dim, embedding))


def projector(dim: int, embedding: int) -> nn.Module:
    """Build the network after an encoder for its pre-training: a hidden layer of 512, normalised over the batch, ReLU."""
    return linear_start(
        nn.Sequential(nn.Linear(dim, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, embedding))
    )


def linear_start(module: nn.Module) -> nn.Module:
    """Draw weights of convolutions and linear layers Kaiming-uniform with a linear unit's gain, as the authors do."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(part.weight, nonlinearity="linear")
    return module
