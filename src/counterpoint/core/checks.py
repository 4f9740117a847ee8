"""Shapes and numbers that a loss was given, checked before anything is computed of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from counterpoint.core.precision import wide
from counterpoint.core.transforms import hidden, holds
from counterpoint.core.world import world


def shapes(**tensors: Tensor) -> str:
    """Name tensors with their shapes for a message: 'a [2, 3] and b [4]'."""
    return " and ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def need_rows(**tensors: Tensor) -> None:
    """Raise ValueError for a batch without rows. One process's share of a batch may be empty, the batch of one may not."""
    for name, tensor in tensors.items():
        if tensor.shape[0] == 0 and world()[1] == 1:  # len() would fix the size for torch.export
            raise ValueError(f"{name} is an empty batch: {shapes(**{name: tensor})}")


def need_alike(axes: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape with these axes, say "n dim", and there are rows."""
    first, *others = tensors.values()
    if first.ndim != len(axes.split()) or any(other.shape != first.shape for other in others):
        raise ValueError(f"{' and '.join(tensors)} must be [{axes.replace(' ', ', ')}] alike, got {shapes(**tensors)}")
    need_rows(**tensors)


def need_one_type(**lists: Sequence[Tensor]) -> None:
    """Raise ValueError unless all tensors of all lists are of one floating type."""
    types = {tensor.dtype for tensors in lists.values() for tensor in tensors}
    if len(types) > 1 or not all(found.is_floating_point for found in types):
        raise ValueError(
            f"{' and '.join(lists)} must be of one floating type, got {', '.join(sorted(map(str, types)))}"
        )


def need_positive(**numbers: float | Tensor) -> None:
    """Raise ValueError for a number that is not above 0 or not finite: a temperature, a scale, a size.

    Tensors (learnable temperatures, one for each row) are checked entry by entry. Under vmap and torch.compile their values
    cannot be read, and on a GPU the processor would wait for them: there they are not checked.
    """
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            if number.ndim:
                if holds(~((number > 0) & (number < math.inf)).all()):
                    raise ValueError(f"{name} must be positive and finite in every entry, got {number.detach()}")
                continue
            if number.is_cuda or hidden(number):
                continue
            number = number.item()
        if isinstance(number, str):
            raise ValueError(f"{name} must be a number, got {number!r}")
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
        if number == math.inf:
            raise ValueError(f"{name} must be finite, got {number}")


def need_scale(**numbers: float | Tensor) -> None:
    """Raise ValueError for a scale of logits (1 / temperature) that is negative or not finite; 0 makes all logits equal."""
    for name, number in numbers.items():
        bad = ~((number >= 0) & (number < math.inf)) if isinstance(number, Tensor) else not 0 <= number < math.inf
        if holds(bad):
            raise ValueError(f"{name} must be at least 0 and finite, got {float(number)}")


def need_within(low: float, high: float, **numbers: float) -> None:
    """Raise ValueError for a number outside low..high, both included."""
    for name, number in numbers.items():
        if not low <= number <= high:
            raise ValueError(f"{name} must lie in {low}..{high}, got {number}")


def need_numbers(count: int, **numbers: Tensor) -> None:
    """Raise ValueError for a class or a position outside 0..count - 1. On a GPU the values are not read."""
    for name, found in numbers.items():
        if holds(((found < 0) | (found >= count)).any()):
            raise ValueError(f"{name} must lie in 0..{count - 1}, got {int(found.min())}..{int(found.max())}")


def need_finite_values(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor with NaN or an infinite value. On a GPU the values are not read."""
    for name, tensor in tensors.items():
        if holds(~tensor.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values")


def whole_numbers(value: int | Tensor, n: int, name: str) -> Int[Tensor, " n"]:
    """Return one whole number for each of n rows, of a number for all or of one for each.

    Raises ValueError for other numbers and other shapes.

    >>> whole_numbers(3, 2, "donors")
    tensor([3, 3])
    """
    found = torch.as_tensor(value)
    if found.is_floating_point() or found.dtype == torch.bool or found.shape not in ((), (n,)):
        raise ValueError(f"{name} must be a whole number or {n} of them, got {found.dtype} {list(found.shape)}")
    return found.long().expand(n)


def need_word(words: Sequence[str], **given: object) -> None:
    """Raise ValueError for an argument that is none of these words."""
    for name, word in given.items():
        if word not in words:
            raise ValueError(f"{name} must be one of {', '.join(words)}, got {word!r}")


def stacked(views: Sequence[Tensor] | Tensor, least: int, name: str, why: str) -> Tensor:
    """Stack views to [views, n, dim] in float32 at least.

    Args:
        views: a list of [n, dim], or one tensor [views, n, dim].
        least: minimum number of views.
        name: name of the argument, for messages.
        why: reason for the minimum, for the message.

    Raises ValueError for other shapes and for too few views.
    """
    if not isinstance(views, Tensor):
        sizes = [list(view.shape) for view in views]
        if not sizes or any(size != sizes[0] for size in sizes):
            raise ValueError(f"{name} must be [n, dim] alike, got {sizes}")
        views = torch.stack(list(views))
    if views.ndim != 3:
        raise ValueError(f"{name} must be [views, n, dim], got {list(views.shape)}")
    if len(views) < least:
        raise ValueError(f"{name} must be at least {least}, got {len(views)}: {why}")
    return wide(views)
