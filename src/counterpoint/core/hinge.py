"""Sums of hinges over all pairs of two sets of rows, in memory linear in their number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from counterpoint.core.precision import exact
from counterpoint.core.transforms import refuse_graph

# Hinges computed at a time: 4 MiB in float32, which stays in a core's cache.
TILE = 2**20


class Hinges(torch.autograd.Function):
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
