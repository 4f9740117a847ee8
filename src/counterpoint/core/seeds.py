"""Seeds of random numbers that depend on whole numbers alone, such as a run's seed, a round and an item."""

from __future__ import annotations

import numpy as np
import torch


def seeded(*numbers: int) -> int:
    """Return a seed of 32 bits that depends on these numbers alone, each at least 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator on the CPU whose draws depend on these numbers alone, each at least 0."""
    return torch.Generator().manual_seed(seeded(*numbers))
