"""Build networks whose inner feature maps judge restored pictures: a small critic of high frequencies, and VGG19."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.wavelets import haar_high_frequency
from counterpoint.errors import CounterpointError
from counterpoint.views.images import normalise

Maps = Float[Tensor, "b channels height width"]
BLOCKS = 8  # of the critic


class HaarCritic(nn.Module):
    """E: eight blocks of convolution, batch normalisation and LeakyReLU on Haar bands, then 16 logits of patches.

    Args:
        width: channels of the first block; 64 as published.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks, inputs = nn.ModuleList(), 9
        for number in range(BLOCKS):
            outputs = width * 2 ** (number // 2)
            conv = nn.Conv2d(inputs, outputs, 3, 1 + number % 2, 1, bias=False)
            self.blocks.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2, inplace=True)))
            inputs = outputs
        self.head = nn.Conv2d(inputs, 1, 1)
        self.to(memory_format=torch.channels_last)

    def features(self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int]) -> list[Maps]:
        """Compute the outputs of these blocks, in the order of `layers`; stop after the last of them."""
        x, found = haar_high_frequency(images).contiguous(memory_format=torch.channels_last), {}
        for number in range(max(layers) + 1):
            found[number] = x = self.blocks[number](x)
        return [found[layer] for layer in layers]

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b 16"]:
        (last,) = self.features(images, [BLOCKS - 1])
        return self.head(F.adaptive_avg_pool2d(last, 4)).flatten(1)


class VGG19(nn.Module):
    """The convolutions of torchvision's VGG19 trained on ImageNet, the embedding of earlier contrastive restoration."""

    def __init__(self) -> None:
        super().__init__()
        import torchvision.models as tv

        self.layers = _downloaded(tv).features
        for layer in self.layers:  # in place, a layer would overwrite the output of the one before
            if isinstance(layer, nn.ReLU):
                layer.inplace = False

    def features(self, images: Float[Tensor, "b 3 height width"], layers: Sequence[int]) -> list[Maps]:
        """Compute the outputs of these layers, numbered as in torchvision's `features`."""
        x, found = normalise(images), {}
        for number in range(max(layers) + 1):
            found[number] = x = self.layers[number](x)
        return [found[layer] for layer in layers]


def _downloaded(tv: Any) -> Any:
    try:
        return tv.vgg19(weights="DEFAULT")
    except OSError as error:
        raise CounterpointError(f"--embedding vgg19 needs weights that torchvision downloads: {error}") from error


@contextmanager
def fixed(network: nn.Module, *, own_statistics: bool) -> Iterator[None]:
    """Freeze weights and running statistics within the block; gradients still pass through to the inputs.

    Args:
        network: of any layers.
        own_statistics: normalise each batch by its own statistics. False: by the running ones.
    """
    weights = [p for p in network.parameters() if p.requires_grad]
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = network.training
    network.requires_grad_(False).train(own_statistics)
    for layer in layers:
        layer.track_running_stats = not own_statistics
    try:
        yield
    finally:
        network.train(before)
        for parameter in weights:
            parameter.requires_grad_(True)
        for layer in layers:
            layer.track_running_stats = True
