"""One rule for the types of what a function is given.

    half precision   float16 and bfloat16 tensors are widened to float32; gradients come back in the type of the input
    autocast         is off within the function: products, exponentials and sums are float32 or wider
    mixed types      operands are all of one floating type once widened, otherwise ValueError; 0-dim tensors and numbers follow
    memories         (queues, banks, centres, states) keep their own type and are read in the operands'
    whole numbers    narrow integers (indices, labels, permutations) are widened to int64

`full_precision` applies the rule to a function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
NARROW = (torch.int8, torch.int16, torch.int32, torch.uint8)

F = TypeVar("F", bound=Callable[..., Any])


def wide(x: Tensor) -> Tensor:
    """Return x in float32 if it is in half precision, otherwise x itself."""
    return x.float() if x.dtype in HALF else x


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a number or a 0-dim tensor as a 0-dim tensor of the type and on the device of `like`; gradients flow."""
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=like.dtype)
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def exact(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast on this kind of device; it costs nothing where autocast is off."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _mixed(first: str, its: torch.dtype, name: str, dtype: torch.dtype) -> ValueError:
    if name == first:
        types = ", ".join(sorted(map(str, (its, dtype))))
        return ValueError(f"{name} must be of one floating type, got {types}: convert one of them")
    return ValueError(f"{first} and {name} must be of one floating type, got {its} and {dtype}: convert one of them")


@overload
def full_precision(function: F) -> F: ...
@overload
def full_precision(*, keep: tuple[str, ...]) -> Callable[[F], F]: ...
def full_precision(function: F | None = None, *, keep: tuple[str, ...] = ()) -> Any:
    """Decorate a function so that its tensors follow the rule of this module.

    Args:
        function: any function with tensors, or lists and tuples of tensors, among its arguments.
        keep: names of arguments that keep their type and need not agree with the others: memories, images.

    The decorated function raises ValueError that names arguments and types where float32 and float64 are mixed.
    """
    if function is None:
        return functools.partial(full_precision, keep=keep)
    names = list(inspect.signature(function).parameters)
    kept = frozenset(keep)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Most calls need nothing: found out first, since a loss of a small batch takes less than a millisecond.
        first: Tensor | None = None
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                dtype = value.dtype
                if first is None and (dtype is torch.float32 or dtype is torch.float64):
                    first = value
                elif not (dtype is torch.int64 or dtype is torch.bool or (first is not None and dtype is first.dtype)):
                    break
            elif isinstance(value, list | tuple):
                break
        else:
            if first is None or not torch.is_autocast_enabled(first.device.type):
                return function(*args, **kwargs)
        return checked(args, kwargs)

    def checked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found: dict[str, torch.dtype] = {}
        device = ""

        def widened(name: str, value: Any) -> Any:
            nonlocal device
            if isinstance(value, Tensor):
                device = device or value.device.type
                dtype = value.dtype
                if name in kept:
                    return value
                if dtype in NARROW:
                    return value.long()
                if dtype in HALF:
                    value = value.float()
                    dtype = torch.float32
                if dtype.is_floating_point and value.ndim:
                    found.setdefault(name, dtype)
                    first = next(iter(found))
                    if dtype is not found[first]:
                        raise _mixed(first, found[first], name, dtype)
                return value
            if type(value) in (list, tuple):
                return type(value)([widened(name, part) for part in value])
            return value

        args = tuple([widened(names[at] if at < len(names) else names[-1], value) for at, value in enumerate(args)])
        kwargs = {name: widened(name, value) for name, value in kwargs.items()}
        if device and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run
