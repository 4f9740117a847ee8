"""Batches of slices of volumes that are divided into partitions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from counterpoint.engine.loading import Batches
from counterpoint.errors import DataError
from counterpoint.words import counted


class PartitionBatches(Batches):
    """Batches of one slice of each partition of some volumes, volume after volume.

    Args:
        groups: volume of each slice; the slices of a volume are in the order of their places.
        parts: number of partitions; the remainder at a volume's end is not used.
        batch_size: slices of a batch, a multiple of `parts`.
        steps: number of batches in an epoch.

    Raises DataError for a volume with fewer slices than partitions.
    """

    def __init__(self, groups: NDArray[np.int64], parts: int, batch_size: int, steps: int) -> None:
        super().__init__(steps * batch_size, batch_size)
        self.parts = parts
        self.volumes = [np.flatnonzero(groups == number) for number in np.unique(groups)]
        for number, rows in enumerate(self.volumes):
            if len(rows) < parts:
                raise DataError(
                    f"volume {number + 1} has {counted(len(rows), 'slice')}, fewer than {parts} partitions; lower --partitions"
                )

    def epoch(self, generator: np.random.Generator) -> Iterator[NDArray[np.int64] | list[int]]:
        each = self.batch_size // self.parts
        for _ in range(len(self)):
            turns = -(-each // len(self.volumes))
            chosen = np.concatenate([generator.permutation(len(self.volumes)) for _ in range(turns)])[:each]
            rows: list[int] = []
            for number in chosen.tolist():
                volume = self.volumes[number]
                length = len(volume) // self.parts
                places = np.arange(self.parts) * length + generator.integers(length, size=self.parts)
                rows += volume[places].tolist()
            yield rows
