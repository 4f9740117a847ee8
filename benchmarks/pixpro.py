"""Compare PixPro's matching of cells and its loss with a transcription of the authors' code.

    python benchmarks/pixpro.py [--rounds 31] [--threads 1]      writes results/bench/pixpro.json

For each direction, the authors compute the matrix of all distances, [n, T, T], and a mask of near cells. Their loss multiplies
the mask with all similarities. "pairs" are those of both directions, which a step needs. The cases name the rows and columns of
the maps: 7 for ResNet-50 at 224 pixels, 14 and 28 for dense maps.

A timing is the mean of several calls in a row (`calls`: ours, theirs). Both ways take turns, timing by timing. The record has
medians. The allocator is warm. In a new process each call of the authors' way also pays for new pages of memory. It then takes
three to five times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor

from counterpoint import functional as fn
from counterpoint.core.cells import near_cells, near_cells_both_ways, near_sums

OUT = Path(__file__).parents[1] / "results" / "bench" / "pixpro.json"
REACH = 0.7


def crops(n: int) -> list[Tensor]:
    """Draw coordinates of two crops of n pictures, of 8 to 100 % of the area, half of them flipped."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        side = (0.08 + 0.92 * torch.rand(n, 1, generator=generator)).sqrt()
        low = torch.rand(n, 2, generator=generator) * (1 - side)
        boxes = torch.cat([low, low + side], 1)
        boxes[::2] = boxes[::2][:, [2, 1, 0, 3]]
        found.append(boxes)
    return found


def all_distances(one: Tensor, two: Tensor, side: int) -> Tensor:
    """Compute the authors' mask [n, T, T] from all distances."""
    across = torch.arange(0.0, side).view(1, 1, -1).repeat(1, side, 1)
    down = torch.arange(0.0, side).view(1, -1, 1).repeat(1, 1, side)
    centres = []
    diagonals = []
    for box in (one, two):
        wide, high = (((box[:, k + 2] - box[:, k]) / side).view(-1, 1, 1) for k in (0, 1))
        centres.append(
            ((across + 0.5) * wide + box[:, 0].view(-1, 1, 1), (down + 0.5) * high + box[:, 1].view(-1, 1, 1))
        )
        diagonals.append((wide**2 + high**2).sqrt())
    most = torch.max(*diagonals)
    (x1, y1), (x2, y2) = centres
    gaps = [(a.view(-1, side**2, 1) - b.view(-1, 1, side**2)) ** 2 for a, b in ((x1, x2), (y1, y2))]
    return (((gaps[0] + gaps[1]).sqrt() / most) < REACH).float()


def matching(n: int, side: int) -> Any:
    one, two = crops(n)
    keys = F.normalize(torch.randn(n, side**2, 256), dim=2)

    def ours() -> Tensor:
        pairs = near_cells(one, two, (side, side), REACH)
        return near_sums(pairs, keys.flatten(0, 1)).view_as(keys) / (pairs.counts[:, None, None] + 1e-6)

    def plain() -> Tensor:
        mask = all_distances(one, two, side)
        return mask @ keys / (mask.sum((1, 2), keepdim=True) + 1e-6)

    return [], lambda: ours().sum(), lambda: plain().sum()


def pairs_only(n: int, side: int) -> Any:
    one, two = crops(n)

    def ours() -> Tensor:
        return torch.stack([pairs.counts.sum() for pairs in near_cells_both_ways(one, two, (side, side), REACH)]).sum()

    return [], ours, lambda: all_distances(one, two, side).sum() + all_distances(two, one, side).sum()


def loss(n: int, side: int, channels: int = 256) -> Any:
    proj_1, proj_2 = (torch.randn(n, channels, side, side, requires_grad=True) for _ in range(2))
    key_1, key_2 = (torch.randn(n, channels, side, side) for _ in range(2))
    one, two = crops(n)

    def propagated(x: Tensor) -> Tensor:
        rows = F.normalize(x, dim=1).flatten(2)
        similarity = torch.bmm(rows.transpose(1, 2), rows).clamp(min=0.0).pow(2)
        return torch.bmm(F.normalize(x, dim=1).flatten(2), similarity.transpose(1, 2)).view_as(x)

    def direction(x: Tensor, key: Tensor, a: Tensor, b: Tensor) -> Tensor:
        mask = all_distances(a, b, side)
        q, k = F.normalize(propagated(x), dim=1).flatten(2), F.normalize(key, dim=1).flatten(2)
        each = (torch.bmm(q.transpose(1, 2), k) * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6)
        return -2 * each.mean()

    def plain() -> Tensor:
        return direction(proj_1, key_2, one, two) + direction(proj_2, key_1, two, one)

    return [proj_1, proj_2], lambda: fn.pixpro_loss(proj_1, proj_2, key_1, key_2, one, two), plain


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    # One GPU of the paper's eight, half, and its whole batch.
    "pairs, 7 x 7": (lambda n: pairs_only(n, 7), (128, 512, 1024)),
    "pairs, 14 x 14": (lambda n: pairs_only(n, 14), (128,)),
    "pairs, 28 x 28": (lambda n: pairs_only(n, 28), (32,)),
    "targets, 7 x 7": (lambda n: matching(n, 7), (128,)),
    "targets, 28 x 28": (lambda n: matching(n, 28), (32,)),
    "loss, 7 x 7": (lambda n: loss(n, 7), (128,)),
    "loss, 14 x 14": (lambda n: loss(n, 14), (32,)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=256, rounds=31, lasts=0.02)
