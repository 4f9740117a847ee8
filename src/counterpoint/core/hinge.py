"""Sums of hinges over all pairs of two sets of rows, in memory linear in their number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.precision import exact
from counterpoint.core.transforms import refuse_graph, traced

# Hinges computed at a time: 4 MiB in float32, which stays in a core's cache.
TILE = 2**20


class _Hinges(torch.autograd.Function):
    """The sum over i and j != i of max(0, margin - x_i . y_i + x_i . y_j).

    Row i of x and row i + offset of y are a pair.

    Each hinge is linear on either side of its bend, so its gradient is known with its value. A tile of similarities
    gives its share of the value and of both gradients, and its memory is used again.

    x [n, dim] and y [m, dim] are of one type; offset is the row of y that belongs to the first row of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, margin: float, offset: int) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        sums: list[Tensor] = []
        to_x: list[Tensor] = []
        to_y: Tensor | None = None
        high, device = max(1, TILE // len(y)), x.device.type
        with exact(device):
            for start in range(0, max(1, len(x)), high):
                part = x[start : start + high]
                # In place, so that a tile stays in the cache: similarities, hinges, slopes.
                tile = torch.mm(part, y.T)
                own = tile.diagonal(offset + start)
                tile.sub_((own - margin).unsqueeze(1))
                # Not zero_: an infinite similarity, which would close the hinge, has become NaN and is to stay it.
                own.mul_(0)
                sums.append(tile.relu_().sum())
                if wanted:
                    # The slope by x_i . y_j: 1 where the hinge is open, and less all of these for the row's own pair.
                    own.sub_(tile.sign_().sum(1))
                    to_x.append(tile @ y)
                    to_y = tile.T @ part if to_y is None else to_y.addmm_(tile.T, part)
        if wanted:
            ctx.save_for_backward(to_x[0] if len(to_x) == 1 else torch.cat(to_x), to_y)
        return sum(sums[1:], sums[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph("batch_hinge")
        to_x, to_y = ctx.saved_tensors
        return gradients[0] * to_x, gradients[0] * to_y, None, None


def hinge_sum(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], margin: float, offset: int = 0
) -> Float[Tensor, ""]:
    """Compute the sum over i and j != i of max(0, margin - x_i . y_i + x_i . y_j).

    Args:
        x: rows, of one floating type with y.
        y: rows that each row of x is compared with.
        margin: any number.
        offset: row of y that belongs to the first row of x; by default the first.

    Memory is O((n + m) dim), forward and backward. Inside torch.func and torch.compile the function uses PyTorch's own
    operations, with memory O(n m). An infinite similarity makes the sum infinite or NaN, never a number. Not differentiable
    twice.

    >>> hinge_sum(torch.eye(2), torch.eye(2).flip(0), margin=0.5)
    tensor(3.)
    """
    if not traced():
        return _Hinges.apply(x, y, margin, offset)
    s = x @ y.T
    own = torch.arange(len(x), device=x.device)[:, None] + offset == torch.arange(len(y), device=x.device)
    paired = s.diagonal(offset)[:, None]
    # Not relu(...) * 0: where a similarity is infinite, the result must stay NaN.
    return torch.where(own, paired * 0, F.relu(margin - paired + s)).sum()
