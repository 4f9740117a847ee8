"""Check the arguments of the measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from counterpoint.words import counted


def rows_of(name: str, values: Any) -> Tensor:
    """Convert rows to a tensor [n, dim] of at least float32. Raises ValueError for another shape."""
    rows = torch.as_tensor(values).detach().cpu()
    if rows.ndim != 2:
        raise ValueError(f"{name} must be [n, dim], got {list(rows.shape)}")
    return rows if rows.dtype == torch.float64 else rows.float()


def compared(**both: Any) -> list[Tensor]:
    """Convert rows for a comparison: tensors of the wider of their types. Raises ValueError for different widths."""
    rows = [rows_of(name, values) for name, values in both.items()]
    if len({found.shape[1] for found in rows}) > 1:
        raise ValueError(
            f"{' and '.join(both)} must be of one width, got {' and '.join(str(r.shape[1]) for r in rows)}"
        )
    dtype = torch.float64 if any(found.dtype == torch.float64 for found in rows) else torch.float32
    return [found.to(dtype) for found in rows]


def finite(**both: Any) -> list[Tensor]:
    """Convert rows as `compared` does. Raises ValueError for NaN, which torch sorts as the largest, and for infinity."""
    found = compared(**both)
    for name, rows in zip(both, found, strict=True):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    return found


def group_columns(name: str, values: Any, count: int) -> Tensor:
    """Convert groups to a tensor [count, columns]; None: every row is a separate group."""
    found = torch.arange(count) if values is None else torch.as_tensor(values).cpu()
    if found.ndim == 2 and len(found) == count and found.shape[1] and not found.is_floating_point():
        return found.long()
    return item_numbers(name, found, count)[:, None]


def item_numbers(name: str, values: Any, count: int) -> Tensor:
    """Convert whole numbers to a tensor [count]. Raises ValueError for another shape or type."""
    found = torch.as_tensor(values).cpu()
    if found.shape != (count,) or found.is_floating_point():
        raise ValueError(f"{name} must be {counted(count, 'whole number')}, got {list(found.shape)} of {found.dtype}")
    return found.long()
