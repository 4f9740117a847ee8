"""One rule for the types of what a function is given.

    half precision   float16 and bfloat16 tensors are widened to float32; gradients come back in the type of the input
    autocast         is off within the function: exponentials and sums are float32 or wider
    products         of a matrix of similarities follow the half precision of the tensors or of autocast (`products`): on a GPU
                     all of them; on a CPU with bf16 instructions those of the gradients, for bf16. Others are float32 or wider
    mixed types      operands are all of one floating type once widened, otherwise ValueError; 0-dim tensors and numbers follow
    memories         (queues, banks, centres, states) keep their own type and are read in the operands'
    whole numbers    narrow integers (indices, labels, permutations) are widened to int64
    arrays           numpy scalars and 0-dim arrays, as files hold them, become numbers or strings

`full_precision` applies the rule to a function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args, overload

import numpy as np
import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
NARROW = (torch.int8, torch.int16, torch.int32, torch.uint8)

F = TypeVar("F", bound=Callable[..., Any])

# Types of the operands of the kernel's products: float32 ("exact"), or rounded to fewer bits. Sums are float32 in every case.
Products = Literal["exact", "tf32", "bf16", "fp16"]
_NAMES: dict[torch.dtype, Products] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_asked: ContextVar[Products | None] = ContextVar("products", default=None)


@contextmanager
def products(kind: Products | Literal["auto"]) -> Iterator[None]:
    """Choose the type of the products that the kernel computes within a `with` block.

    Args:
        kind: "exact": float32, to 1e-6 of float64. "tf32", "bf16", "fp16": operands rounded to 10, 7 or 10 bits, sums in
            float32. "auto": no choice. Then the type is that of half-precision inputs or of autocast, otherwise what
            `torch.backends.cuda.matmul` says about float32.

    Raises ValueError for another kind. A CPU always computes exact similarities. For "bf16", one with bf16 instructions
    rounds the factors of gradients in `pair_logsumexp` beyond one tile, and in its total. Other kinds make no difference there.
    """
    if kind != "auto" and kind not in get_args(Products):
        raise ValueError(f"precision must be auto or one of {', '.join(get_args(Products))}, got {kind!r}")
    if kind == "auto":
        yield
        return
    token = _asked.set(kind)
    try:
        yield
    finally:
        _asked.reset(token)


@functools.cache
def fast_bf16() -> bool:
    """Return whether this CPU multiplies bf16 with instructions of its own (avx512_bf16 or AMX), as far as PyTorch knows."""
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch up to 2.8
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def chosen_products(device: str) -> Products:
    """Return the type of products on this kind of device: as `products` says, or PyTorch's choice for float32."""
    asked = _asked.get()
    if asked is not None:
        return asked
    if device != "cuda":
        return "exact"
    matmul = torch.backends.cuda.matmul
    # PyTorch before 2.9 has allow_tf32 alone; later ones refuse to mix both names.
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    return "tf32" if getattr(matmul, name) in ("tf32", True) else "exact"


def half_type(kind: Products) -> torch.dtype | None:
    """Return the type of the operands of products in half precision; None for others, whose operands are float32."""
    return _TYPES.get(kind)


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
            elif isinstance(value, list | tuple | np.ndarray | np.generic):
                break
        else:
            if first is None or not torch.is_autocast_enabled(first.device.type):
                return function(*args, **kwargs)
        return checked(args, kwargs)

    def checked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found: dict[str, torch.dtype] = {}
        device = ""
        half: torch.dtype | None = None

        def widened(name: str, value: Any) -> Any:
            nonlocal device, half
            if isinstance(value, Tensor):
                device = device or value.device.type
                dtype = value.dtype
                if name in kept:
                    return value
                if dtype in NARROW:
                    return value.long()
                if dtype in HALF:
                    half = dtype
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
            return value.item() if isinstance(value, np.ndarray | np.generic) and not value.ndim else value

        args = tuple([widened(names[at] if at < len(names) else names[-1], value) for at, value in enumerate(args)])
        kwargs = {name: widened(name, value) for name, value in kwargs.items()}
        autocast = bool(device) and torch.is_autocast_enabled(device)
        if autocast and half is None:
            half = torch.get_autocast_dtype(device)
        # The outermost function decides: those that it calls see float32 tensors.
        kind: Products | Literal["auto"] = "auto" if half is None or _asked.get() else _NAMES.get(half, "auto")
        with products(kind), torch.autocast(device, enabled=False) if autocast else nullcontext():
            return function(*args, **kwargs)

    return run
