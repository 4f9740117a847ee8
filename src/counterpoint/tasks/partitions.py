"""Divide volumes into partitions: batches of their slices; how alike the slices of a partition are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

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


def partitions_of(groups: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Return the partition of each slice, from 0; -1 for the remainder at a volume's end.

    Args:
        groups: volume of each slice; the slices of a volume are in the order of their places.
        parts: number of partitions.
    """
    found = np.full(len(groups), -1, np.int64)
    for number in np.unique(groups):
        mine = np.flatnonzero(groups == number)
        length = len(mine) // parts
        found[mine[: length * parts]] = np.repeat(np.arange(parts), length)
    return found


def partition_retrieval(rows: Float[Tensor, "n dim"], groups: NDArray[np.int64], parts: int) -> float:
    """Return the share of slices whose nearest slice of another volume is of the same partition.

    Args:
        rows: unit rows of the slices.
        groups, parts: see `partitions_of`; at least two volumes.
    """
    part = partitions_of(groups, parts)
    similarity = (rows @ rows.T).masked_fill(torch.from_numpy(groups[:, None] == groups), -torch.inf)
    similarity[:, torch.from_numpy(part < 0)] = -torch.inf
    nearest, known = similarity.argmax(1).numpy(), part >= 0
    return float((part[nearest] == part)[known].mean())


def partition_figure(rows: Float[Tensor, "n dim"], groups: NDArray[np.int64], parts: int) -> dict[str, Any]:
    """Draw the mean similarity of each two partitions, of slices of different volumes; arguments of `partition_retrieval`."""
    part, other = partitions_of(groups, parts), groups[:, None] != groups
    similarity = (rows @ rows.T).numpy()
    table = [
        [float(similarity[other & (part[:, None] == a) & (part == b)].mean()) for b in range(parts)]
        for a in range(parts)
    ]
    caption = "Mean cosine of slices of different training volumes, by the global head; dark is similar."
    return {"kind": "matrix", "values": table, "names": [f"part {n + 1}" for n in range(parts)], "caption": caption}
