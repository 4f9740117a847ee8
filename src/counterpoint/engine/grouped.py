"""Draw batches from one group of examples each (MCL, arXiv 2402.11816)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.engine.loading import Batches
from counterpoint.words import counted


def grouped_batches(
    labels: Int[NDArray[np.int64], " n"] | Int[Tensor, " n"],
    batch_size: int,
    permutations: Sequence[Sequence[int] | NDArray[np.int64] | Tensor],
    world_size: int = 1,
    rank: int = 0,
) -> list[list[int]]:
    """Order examples into batches of one group each, the groups in turn, as the authors of MCL do.

    Args:
        labels: Group of each example, [n], from 0.
        batch_size: Number of examples in a batch on one process, b; at least 1.
        permutations: For each group the order of its members, as positions in their ascending list, then padding of -1.
        world_size: Number of processes, W.
        rank: Number of this process, in 0..W - 1. It takes every W-th member from `rank` on, so that all processes use the
            same group at a time.

    Of a group of n members the first floor(floor(n / W) / b) b W are used. Groups smaller than a batch of all processes are
    therefore left out. Batches are taken from a group's end.

    Raises ValueError for permutations that do not fit, labels below 0, an empty batch, or a rank outside 0..W - 1.
    """
    labels = np.asarray(labels, np.int64)
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            "batch_size must be at least 1 and rank in 0..world_size - 1; "
            f"got batch_size {batch_size}, rank {rank} and world_size {world_size}"
        )
    if int(labels.min(initial=0)) < 0:
        raise ValueError(f"labels must be numbers from 0 on, got {labels.min()}")
    # One sort finds the members of all groups: the number of groups may be a power of the number of clusters.
    by_group = np.split(labels.argsort(kind="stable"), np.bincount(labels).cumsum()[:-1])
    empty = np.empty(0, np.int64)
    lists: list[list[int]] = []
    for group, order in enumerate(permutations):
        members = by_group[group] if group < len(by_group) else empty
        order = np.asarray(order, np.int64)
        order = order[order >= 0]
        if len(order) != len(members) or not np.array_equal(np.sort(order), np.arange(len(members))):
            raise ValueError(f"permutations[{group}] must order the {counted(len(members), 'member')} of its group")
        used = len(members) // world_size // batch_size * batch_size * world_size
        lists.append(members[order[:used][rank::world_size]].tolist())
    if int(labels.max(initial=-1)) >= len(lists):
        raise ValueError(f"permutations cover {counted(len(lists), 'group')}, but labels go up to {labels.max()}")
    out: list[list[int]] = []
    while any(lists):
        for left in lists:
            if left:
                out.append([left.pop() for _ in range(batch_size)])
    return out


class GroupBatches(Batches):
    """Batches within groups, as many as an epoch without groups has.

    Args:
        groups: [examples] number of the group of each example, from 0.
        batch_size: Number of examples in a batch, over all processes together.
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
