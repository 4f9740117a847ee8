"""Compare Global-Local's losses with loops over pairs and regions, as in the authors' code.

    python benchmarks/global_local_seg.py [--rounds 7] [--threads 1]      writes results/bench/global-local-seg.json

The authors' TensorFlow code builds a term for each pair of rows, and for each region of two maps. The transcriptions here are
such loops in PyTorch. n is the number of slices of a batch; maps have 48 x 48 cells of 64 channels, as at 192 pixels.
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

OUT = Path(__file__).parents[1] / "results" / "bench" / "global-local-seg.json"
T, PARTS = 0.1, 4


def slices(n: int) -> Any:
    z = torch.randn(4 * n, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def plain() -> Tensor:
        rows, total = 4 * n, z.new_zeros(())
        for p in range(rows):
            if p % (2 * PARTS) >= PARTS:
                continue
            others = [k for k in range(rows) if k % PARTS != p % PARTS]
            a, b, c, d = (z[(p + k * PARTS) % rows] for k in range(4))
            for x, y in ((a, b), (b, a), (a, c), (c, a), (c, d), (d, c), (b, d), (d, b)):
                positive = F.cosine_similarity(x, y, dim=0) / T
                negative = F.cosine_similarity(x[None], z[others]) / T
                total = total + torch.cat([positive[None], negative]).logsumexp(0) - positive
        return total / rows

    return [z], lambda: fn.partition_contrastive_loss(z, PARTS, 2, T), plain


def regions(n: int) -> Any:
    maps = torch.randn(2 * n, 48, 48, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    dense = torch.randn(9 * 64, 128, generator=torch.Generator().manual_seed(1)) / 24
    found = fn.grid_regions(48, 48)

    def row(k: int, corner: Tensor) -> Tensor:
        i, j = corner.tolist()
        return maps[k, i : i + 3, j : j + 3].flatten() @ dense

    def plain() -> Tensor:
        total = maps.new_zeros(())
        for k in range(2 * n):
            other = k ^ 1
            for corner, around in zip(found.positive, found.negative, strict=True):
                anchor, positive = row(k, corner), row(other, corner)
                rows = torch.stack([positive, *(row(m, c) for m in (k, other) for c in around)])
                s = F.cosine_similarity(anchor[None], rows) / T
                total = total + s.logsumexp(0) - s[0]
        return total / len(found.positive) / (2 * n)

    return [maps], lambda: fn.local_region_contrastive_loss(maps, *found, dense=dense), plain


CASES: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "slices": (slices, (8, 24)),
    "regions": (regions, (4, 12)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__, dim=128)
