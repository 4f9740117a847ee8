"""How many processes there are and which one this is."""

from __future__ import annotations

import torch.distributed as dist


def world() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) when not distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
