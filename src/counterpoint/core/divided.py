"""Tensors that processes divide among them (FSDP2): recognise them, gather them, clip their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is divided among processes."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def whole(value: Any) -> Any:
    """Return a tensor, or nested dictionaries and lists of them, with all divided tensors gathered. All processes call it."""
    if isinstance(value, Mapping):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(whole, value))
    return value.full_tensor() if is_sharded(value) else value


def clip_norm(parameters: Sequence[nn.Parameter], norm: float) -> None:
    """Scale gradients down to a maximum norm over all parameters, divided or whole. All processes call it."""
    gradients: list[Any] = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    squares = torch.stack([whole(torch.linalg.vector_norm(gradient)).square() for gradient in gradients]).sum()
    factor = (norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        (gradient.to_local() if is_sharded(gradient) else gradient).mul_(factor)
