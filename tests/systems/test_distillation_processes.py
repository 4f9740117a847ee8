"""Losses of distillation over processes: uneven shares of a batch, one of them empty, have what one process has."""

from __future__ import annotations

from pathlib import Path

import over_processes
import torch
import torch.nn.functional as F

COUNTS = [4, 0, 3]


def draw(many: int, n: int, dim: int = 5) -> list[torch.Tensor]:
    drawn = torch.randn(many, n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return list(F.normalize(drawn, dim=2))


def losses():
    """name -> (how many tensors, loss of them); the spawned processes import what they need here and nothing else."""
    from counterpoint import functional as fn
    from counterpoint.core.distributed import batch_pair_loss

    return {
        "affinities": (4, lambda *r: fn.affinity_mimicking_loss(r[0], r[1], 20.0, r[2], r[3], 10.0).loss),
        "image to text": (4, lambda *r: fn.affinity_mimicking_loss(r[0], r[1], 20.0, r[2], r[3], 10.0).loss_i2t),
        "text to image": (4, lambda *r: fn.affinity_mimicking_loss(r[0], r[1], 20.0, r[2], r[3], 10.0).loss_t2i),
        "pairs": (2, lambda u, v: batch_pair_loss(20.0 * u, v)),
        "dynamic": (2, lambda s, t: fn.dynamic_distillation_loss(5 * s, 5 * t, 2.0, 0.3).loss),
        "dynamic, uniform": (2, lambda s, t: fn.dynamic_distillation_loss(5 * s, 5 * t, 1.0, 0.3, "uniform").loss),
        "static": (2, lambda s, t: fn.dynamic_distillation_loss(s, t, 1.0, 0.3, "uniform", "uniform", True).loss),
        "weighted soft label": (2, lambda s, t: fn.weighted_soft_label_loss(5 * s, 5 * t, 2.0, 0.3).loss),
        "mined": (2, lambda s, t: fn.mined_distillation_loss(5 * s, 5 * t, 2)),
        "mined by rank": (2, lambda s, t: fn.mined_distillation_loss(5 * s, 5 * t, 2, 0.2, "rank", "uniform")),
    }


def test_losses_over_processes_equal_those_of_one(tmp_path: Path) -> None:
    over_processes.check(losses, draw, COUNTS, tmp_path)
