"""Multiply a few rows by packed weights, on a CPU.

A step of decoding multiplies a few rows by each weight. On some processors a product of two rows takes twice the time of one row:
the library reads and arranges the weight anew each time. oneDNN arranges it once. Then a product of four rows takes no longer than
one of one row. Packing takes the time of about ten products, and the memory of the weights a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

# Operations of oneDNN that torch's compiler uses. torch has no public name for them.
OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise")
LEAST_ROWS, MOST_ROWS = 2, 16  # rows of a batch for which weights are packed
WHOLE = 4  # a product of fewer rows takes longer
LEAST_STEPS = 24  # steps that repay packing
LEAST = 2**17  # entries of a weight that is packed; products with smaller ones are quick
MOST = 2**29  # entries of all such weights, 2 GiB


@contextmanager
def packed_weights(modules: Iterable[nn.Module], rows: int, steps: int) -> Iterator[int]:
    """Return a context in which linear layers of modules multiply packed weights, without gradient. It gives their number.

    No weight is packed where this would not help: off the CPU, in other types than float32, for one row or many, and for few
    steps. Nor are weights that would take too much memory.

    Args:
        modules: modules, whose weights do not change meanwhile.
        rows: rows of a batch.
        steps: number of products with each weight.
    """
    layers: list[Any] = [layer for module in modules for layer in module.modules() if _able(layer)]
    known = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in OPERATIONS)
    few = LEAST_ROWS <= rows <= MOST_ROWS and steps >= LEAST_STEPS
    if not known or not few or sum(layer.weight.numel() for layer in layers) > MOST:
        layers = []
    try:
        for layer in layers:
            layer.forward = _product(layer, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), WHOLE))
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _able(layer: Any) -> bool:
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST


def _product(layer: Any, weight: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = len(flat)
        if rows > MOST_ROWS or x.dtype != torch.float32:
            return linear(x, layer.weight, layer.bias)
        if rows < WHOLE:
            flat = pad(flat, (0, 0, 0, WHOLE - rows))
        found: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, layer.bias, "none", [], "")
        return found[:rows].view(*x.shape[:-1], -1)

    return forward
