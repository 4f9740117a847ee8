"""Define the base of small convolutional encoders that are trained here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.image_encoder import ImageEncoder


class ChannelsLast(ImageEncoder):
    """A convolutional encoder with channels last, which on a CPU is 1.3 to 1.5 times as fast forward and backward."""

    def _finish(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim h w"]:
        """Compute the last feature map."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        return self.features(images).mean((2, 3))


def conv(inputs: int, outputs: int, stride: int, kernel: int = 3, groups: int = 0) -> nn.Sequential:
    """Build a convolution, batch normalisation (or, with `groups`, group normalisation) and ReLU."""
    norm = nn.GroupNorm(groups, outputs) if groups else nn.BatchNorm2d(outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), norm, nn.ReLU(True))


class Sampled(nn.Conv2d):
    """A 1 x 1 convolution with a stride. It takes every n-th pixel first, then convolves without a stride.

    The numbers are the same. Narrow networks need it: training with PyTorch's own way has ended the process on some CPUs.
    """

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        across = self.stride[0]
        sampled = x[:, :, ::across, ::across].contiguous(memory_format=torch.channels_last)
        return F.conv2d(sampled, self.weight, self.bias)
