"""Ridge regression in closed form, differentiable in its inputs: the linear map that fits targets from rows.

Rows H [m, d] and targets Y [m, k] have the ridge solution W [d, k], in two equal forms:

    W = H^T (H H^T + r I)^{-1} Y        a system of m rows       (the kernel's form)
    W = (H^T H + r I)^{-1} H^T Y        a system of d columns

`ridge_weights` solves the smaller system. r is relative: `ridge` times the trace of H H^T, which has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.transforms import traced

# Up to this size of the system, products and solution are float64. A small system has a small ridge, as its trace is small.
EXACT = 256


class _Gram(torch.autograd.Function):
    """H H^T. PyTorch's gradient takes two products, G H and G^T H; this one takes one."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return rows @ rows.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return (gradient + gradient.T) @ rows


def gram(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
    """Compute H H^T of rows H."""
    return rows @ rows.T if traced() else _Gram.apply(rows)


def ridge_weights(
    rows: Float[Tensor, "m d"], targets: Float[Tensor, "m k"], ridge: float = 1e-6
) -> Float[Tensor, "d k"]:
    """Compute the W that minimises |H W - Y|^2 + r |W|^2.

    r is `ridge` times the sum of squares of all rows, which has no gradient.

    Args:
        rows: H.
        targets: Y, of the same type.
        ridge: at least 0, by default 1e-6. With 0 the smaller of the two systems must be regular.

    Returns W in float64 where the system is small (`EXACT`), else in the type of the rows. Rows of zeros give W = 0. Raises
    ValueError for a negative ridge and a singular system.

    >>> ridge_weights(torch.eye(2), torch.eye(2), 0.5)[0, 0]
    tensor(0.5000, dtype=torch.float64)
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be at least 0 and finite, got {ridge}")
    m, d = rows.shape
    small = min(m, d) <= EXACT and rows.device.type != "mps"
    h = rows.double() if small else rows
    y = targets.to(h.dtype)
    amount = ridge * h.detach().square().sum().clamp(min=torch.finfo(h.dtype).tiny ** 0.5)
    try:
        if m <= d:
            return h.T @ _solved(gram(h), amount, y)
        return _solved(gram(h.T), amount, h.T @ y)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"ridge {ridge} leaves a singular system of {min(m, d)} equations; raise it") from error


def _solved(matrix: Tensor, amount: Tensor, right: Tensor) -> Tensor:
    """Solve (matrix + amount I) x = right, in float64 where the device has it."""
    wide = matrix if matrix.device.type == "mps" else matrix.double()
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    found: Tensor = torch.linalg.solve(wide + amount.to(wide.dtype) * eye, right.to(wide.dtype))
    return found.to(right.dtype)
