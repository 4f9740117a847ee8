"""Normalise batches over processes: every process uses the statistics of the whole batch.

`synchronise` changes a network in place when training starts under torchrun. On GPUs it uses PyTorch's SyncBatchNorm, by way
of timm, which also converts its own fused layers. PyTorch has no such layer for CPUs, so this module gathers the sums there.
With either, W processes train as one process does, to rounding, whatever their shares of a batch.

Two kinds of layers keep the statistics of their own process: layers that freeze them (`track_running_stats` in evaluation
mode), and normalisation that is no subclass of `torch.nn.BatchNorm`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterpoint.core.world import processes


class _Summed(torch.autograd.Function):
    """The sum of all processes' tensors; the gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Summed.apply(grads[0])


def _normalised(layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """Normalise x [n, channels, ...] with the batch statistics of all processes' rows.

    The mean of the processes' gradients equals the gradient of one process with all rows.
    """
    batch_statistics = layer.training or layer.running_mean is None
    if not batch_statistics or processes()[1] == 1:
        return nn.modules.batchnorm._BatchNorm.forward(layer, x)
    channels = x.shape[1]
    other = [d for d in range(x.ndim) if d != 1]
    wide = x if x.dtype == torch.float64 else x.float()
    count = torch.tensor([wide.numel() / channels], dtype=torch.float64, device=x.device)
    dist.all_reduce(count)
    total = count.to(wide.dtype)
    # Two passes: with a large mean, the variance as a difference of squares would cancel.
    mean = _Summed.apply(wide.sum(other)) / total
    shape = [1, channels, *[1] * (x.ndim - 2)]
    centred = wide - mean.view(shape)
    variance = _Summed.apply(centred.square().sum(other)) / total
    if layer.training and layer.track_running_stats and layer.running_mean is not None:
        with torch.no_grad():
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.add_(1)
            share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            unbiased = variance * total / (total - 1).clamp(min=1)
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), share)
    out = centred * torch.rsqrt(variance + layer.eps).view(shape)
    if layer.affine:
        out = out * layer.weight.view(shape) + layer.bias.view(shape)
    return out.to(x.dtype)


class _Gathered1d(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return _normalised(self, input)


class _Gathered2d(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return _normalised(self, input)


class _Gathered3d(nn.BatchNorm3d):
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return _normalised(self, input)


_OF: dict[type, type] = {
    nn.BatchNorm1d: _Gathered1d,
    nn.BatchNorm2d: _Gathered2d,
    nn.BatchNorm3d: _Gathered3d,
}


def _gathered_act(kind: type) -> type:
    """Return a subclass of timm's layer of normalisation, dropout and activation that gathers its statistics."""

    def forward(self: Any, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.drop(_normalised(self, x)))
        return found

    return type(f"Gathered{kind.__name__}", (kind,), {"forward": forward})


def synchronise(network: nn.Module, *, cuda: bool) -> int:
    """Make every batch normalisation of a network use the statistics of all processes. Return the number of such layers.

    Args:
        network: Changed in place. Names, parameters and buffers stay the same objects, so optimisers and saved weights stay
            valid.
        cuda: Whether the network will train on GPUs.
    """
    found = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not found:
        return 0
    if cuda:
        from timm.layers import convert_sync_batchnorm

        for name, child in list(network.named_children()):
            setattr(network, name, convert_sync_batchnorm(child))
        return len(found)
    for layer in found:
        if type(layer) in _OF:
            layer.__class__ = _OF[type(layer)]
        elif hasattr(layer, "drop") and hasattr(layer, "act"):
            layer.__class__ = _OF.setdefault(type(layer), _gathered_act(type(layer)))
    return sum(type(layer) not in _OF for layer in found)
