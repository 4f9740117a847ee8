"""Which examples a step sees: a function of (seed, epoch, step) alone, so that runs resume and spread exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


@dataclass
class Position:
    """Where a fit stands: `batch` batches of epoch `epoch` are done, `step` steps in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches of example indices; the last partial batch is kept unless `drop_last`.

    W processes with the same arguments but their rank see disjoint shares of the same global batches that one process
    would see (`batch_size` counts the whole batch). Batches that `position` says are done come as empty lists, so that a
    run resumed in mid-epoch counts batches as an uninterrupted one does, without reading them again.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        seed: int,
        position: Position,
        rank: int,
        size: int,
        *,
        drop_last: bool = False,
        items: int | None = None,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self.rank = rank
        self.size = size
        # An epoch may see only so many of the examples, others each time.
        items = examples if items is None else min(items, examples)
        self.counted = items // batch_size * batch_size if drop_last else items

    def __len__(self) -> int:
        return -(-self.counted // self.batch_size)

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """The examples of an epoch, batch after batch; the generator's state depends on seed and epoch alone."""
        return generator.permutation(self.examples)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(np.random.default_rng([self.seed, self.position.epoch]))
        done = self.position.batch
        for batch, start in enumerate(range(0, self.counted, self.batch_size)):
            share = order[start : min(start + self.batch_size, self.counted)][self.rank :: self.size].tolist()
            yield share if batch >= done else []
