"""Seed PyTorch's global generators."""

from __future__ import annotations

import torch


def seed_torch(seed: int) -> None:
    """Seed the global generator of the CPU and, where there are any, those of all accelerators, as `torch.manual_seed` does.

    Without an accelerator this takes 2 microseconds instead of 200: `torch.manual_seed` then notes a traceback for each kind of
    device that it cannot find.

    Args:
        seed: any integer of 64 bits.

    >>> seed_torch(3)
    >>> first = torch.rand(2)
    >>> _ = torch.manual_seed(3)
    >>> torch.equal(first, torch.rand(2))
    True
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
