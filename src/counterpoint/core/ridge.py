"""Ridge regression in closed form, differentiable in its inputs: predict targets of some rows from other rows and their targets.

Rows H [m, d] and X [n, d] get a column of ones. Targets are Y [m, k]. There are three equal ways to the prediction P [n, k]:

    (X H^T) A              A = (H H^T + r I)^{-1} Y          few rows: the kernels of both
    X (H^T A)              with the same A                   more rows: the linear map
    X W                    W = (H^T H + r I)^{-1} H^T Y      more rows than columns: the smaller system

`ridge_predict` takes the way with the fewest products. r is relative: `ridge` times the trace of H H^T, without gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.transforms import traced

# Up to this size of the system, its matrix is computed in float64. A small system has a small ridge, as its trace is small.
EXACT = 256
# Up to this number of multiplications, so is the rest.
CHEAP = 2**22


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


def ridge_predict(
    rows: Float[Tensor, "m d"], targets: Float[Tensor, "m k"], others: Float[Tensor, "n d"], ridge: float = 1e-6
) -> Float[Tensor, "n k"]:
    """Predict targets of other rows by ridge regression on rows with an appended column of ones.

    Args:
        rows, targets: H and Y, at least one row.
        others: X.
        ridge: r over the sum of squares of all rows, at least 0, by default 1e-6. With 0 the smaller system must be regular.

    Returns P in the type of the rows, or in float64 where it is cheap. Raises ValueError for a negative ridge and a singular
    system.

    >>> ridge_predict(torch.zeros(2, 3), torch.tensor([[1.0], [3.0]]), torch.zeros(1, 3))
    tensor([[2.0000]], dtype=torch.float64)
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be at least 0 and finite, got {ridge}")
    (m, d), n, k = rows.shape, len(others), targets.shape[1]
    doubles = rows.device.type != "mps"
    h = rows.double() if doubles and min(m, d + 1) <= EXACT else rows
    by_kernel, by_map = n * m * (d + k), d * k * (n + m)
    cheap = doubles and min(by_kernel, by_map) <= CHEAP
    kind = torch.float64 if cheap else rows.dtype
    x, amount = others.to(kind), ridge * (h.detach().square().sum() + m)
    try:
        if m > d + 1:
            ones = torch.cat([h, h.new_ones(m, 1)], 1)
            w = _solved(gram(ones.T), amount, ones.T @ targets.to(h.dtype)).to(kind)
            return torch.addmm(w[-1], x, w[:-1])
        a = _solved(gram(h) + 1, amount, targets)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"ridge {ridge} leaves a singular system of {min(m, d + 1)} equations; raise it") from error
    if by_kernel <= by_map:
        return (x @ rows.to(kind).T + 1) @ a.to(kind)
    return torch.addmm(a.sum(0).to(kind), x, (h.T @ a.to(h.dtype)).to(kind))


def _solved(matrix: Tensor, amount: Tensor, right: Tensor) -> Tensor:
    """Solve (matrix + amount I) x = right, in float64 where the device has it."""
    wide = matrix if matrix.device.type == "mps" else matrix.double()
    eye = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    found: Tensor = torch.linalg.solve(wide + amount.to(wide.dtype) * eye, right.to(wide.dtype))
    return found
