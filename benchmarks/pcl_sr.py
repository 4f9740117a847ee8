"""Compare PCL-SR's losses and its Haar bands with transcriptions of the authors' code: time and value.

    python benchmarks/pcl_sr.py [--rounds 7] [--threads 1]      writes results/bench/pcl-sr.json

The method is that of benchmarks/alignment.py. n is the number of patches, or of the critic's logits of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from alignment import run
from torch import Tensor

from counterpoint import functional as fn

OUT = Path(__file__).parents[1] / "results" / "bench" / "pcl-sr.json"
Case = tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def maps(count: int, n: int, seed: int = 0) -> list[Tensor]:
    """Make feature maps of block 4 of PCL-SR's critic, of n patches of 96 pixels."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 256, 12, 12, generator=g) for _ in range(count)]


def pcl_sr(n: int) -> Case:
    """Contrast n outputs with four positives and four negatives each; the other way normalises every map, as the authors'."""
    anchor, *others = maps(9, n)
    anchor.requires_grad_()

    def plain() -> Tensor:
        def similarity(other: Tensor) -> Tensor:
            return (F.normalize(anchor, dim=1) * F.normalize(other, dim=1)).sum(1).mean((1, 2))

        negatives = torch.stack([similarity(other) for other in others[4:]], 1)
        losses = []
        for other in others[:4]:
            logits = torch.cat([similarity(other)[:, None], negatives], 1)
            losses.append(F.cross_entropy(logits, torch.zeros(n, dtype=torch.long)))
        return torch.stack(losses).mean()

    return [anchor], lambda: fn.patch_nce(anchor, others[:4], others[4:]), plain


def haar(n: int) -> Case:
    """Make the bands of n patches of 96 pixels; the other way filters rows, then columns, as the authors' wavelet library."""
    image = torch.rand(n, 3, 96, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    filters = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5

    def plain() -> Tensor:
        across = F.conv2d(image, filters.repeat(3, 1)[:, None, None], stride=(1, 2), groups=3)
        down = F.conv2d(across, filters.repeat(6, 1)[:, None, :, None], stride=(2, 1), groups=6)
        bands = down.unflatten(1, (3, 2, 2))  # colour, across, down
        found = torch.cat([bands[:, :, 0, 1], bands[:, :, 1, 0], bands[:, :, 1, 1]], 1)
        return found.square().sum()

    return [image], lambda: fn.haar_high_frequency(image).square().sum(), plain


def critic(n: int) -> Case:
    """Contrast n logits of each kind; the other way stores a row of all logits of the other kind for each."""
    g = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, generator=g).requires_grad_() for _ in range(2))

    def half(r: Tensor, f: Tensor) -> Tensor:
        logits = torch.cat([r[:, None], f.expand(n, n)], 1)
        return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))

    return [real, fake], lambda: fn.contrastive_discriminator(real, fake), lambda: half(real, fake) + half(-fake, -real)


CASES: dict[str, tuple[Callable[[int], Case], tuple[int, ...]]] = {
    "contrast": (pcl_sr, (4, 16, 64)),
    "bands": (haar, (16, 64)),
    "critic": (critic, (256, 1024, 4096)),
}

if __name__ == "__main__":
    run(CASES, OUT, __doc__)
