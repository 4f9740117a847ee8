"""Batches that lie within one group of examples each (MCL, arXiv 2402.11816)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.engine.loading import Batches


def grouped_batches(
    labels: Int[NDArray[np.int64], " n"] | Int[Tensor, " n"],
    batch_size: int,
    permutations: Sequence[Sequence[int] | NDArray[np.int64] | Tensor],
    world_size: int = 1,
    rank: int = 0,
) -> list[list[int]]:
    """Order examples into batches that lie within one group each, the groups in turn, as the authors of MCL do.

    Args:
        labels: group of each example, from 0.
        batch_size: examples of a batch on one process.
        permutations: for each group the order of its members, as places in the ascending list of them; padding of -1 after.
        world_size, rank: a process takes every world_size-th member from its rank on, so that all are at the same group.

    Of a group of n members the first floor(floor(n / W) / b) b W are used, so groups smaller than a batch of all processes
    are left out. Batches are taken from a group's end. Raises ValueError for permutations that do not fit, labels below 0, a
    batch of none or a rank that is no process's.
    """
    labels = np.asarray(labels, np.int64)
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size must be at least 1 and rank lie in 0..world_size - 1, got {batch_size}, {rank} and {world_size}"
        )
    if int(labels.min(initial=0)) < 0:
        raise ValueError(f"labels must be numbers from 0 on, got {labels.min()}")
    # One sort finds the members of all groups: there may be as many groups as a power of the clusters.
    by_group = np.split(labels.argsort(kind="stable"), np.bincount(labels).cumsum()[:-1])
    nobody = np.empty(0, np.int64)
    lists: list[list[int]] = []
    for group, order in enumerate(permutations):
        members = by_group[group] if group < len(by_group) else nobody
        order = np.asarray(order, np.int64)
        order = order[order >= 0]
        if len(order) != len(members) or not np.array_equal(np.sort(order), np.arange(len(members))):
            raise ValueError(f"permutations[{group}] must order the {len(members)} members of its group")
        used = len(members) // world_size // batch_size * batch_size * world_size
        lists.append(members[order[:used][rank::world_size]].tolist())
    if int(labels.max(initial=-1)) >= len(lists):
        raise ValueError(f"permutations are of {len(lists)} groups, labels go up to {labels.max()}")
    out: list[list[int]] = []
    while any(lists):
        for left in lists:
            if left:
                out.append([left.pop() for _ in range(batch_size)])
    return out


class GroupBatches(Batches):
    """Batches within groups, as many as an epoch has otherwise.

    Args:
        groups: [examples] number of the group of each example.
        batch_size: examples in a batch.
    """

    def __init__(self, groups: NDArray[np.int64], batch_size: int) -> None:
        super().__init__(len(groups), batch_size, drop_last=True)
        self.labels = np.unique(groups, return_inverse=True)[1]

    def epoch(self, generator: np.random.Generator) -> Iterator[list[int]]:
        given = 0
        while True:
            orders = [generator.permutation(int(count)) for count in np.bincount(self.labels)]
            for batch in grouped_batches(self.labels, self.batch_size, orders):
                if given == len(self):
                    return
                yield batch
                given += 1
