"""The valid split of built-in sources: it monitors training, so that the test split is evaluated only once.

Generated sources draw it in addition to training and test. Finite sources cut a share off the training items (`carve`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import Indices, split_positions
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

SHARE = 0.1  # of the training items, by default
FEWEST = 2  # items of a valid split that is cut here, where there are enough


def checked_share(source: str, valid: float) -> float:
    """Return `valid`, the share of the training items for the valid split; CounterpointError outside (0, 1)."""
    if not 0 < valid < 1:
        empty = " leaves a valid split that is empty;" if valid == 0 else ":"
        raise CounterpointError(
            f"{source}: valid={valid:g}{empty} valid is a share of the training items, between 0 and 1 (?valid={SHARE:g})"
        )
    return valid


def checked_count(source: str, valid: int, test: int) -> int:
    """Return the number of items that a generated source draws for its valid split: `valid`, or `test` where it is -1.

    Raises CounterpointError for 0 and for less than -1.
    """
    if valid == -1:
        return test
    if valid < 1:
        empty = " leaves a valid split that is empty" if valid == 0 else ""
        raise CounterpointError(
            f"{source}: valid={valid}{empty}; valid is a number of items of at least 1, or -1 for as many as test"
        )
    return valid


def carve(
    source: str, rows: Indices, share: float, labels: Indices | None = None, together: Indices | None = None
) -> tuple[Indices, Indices]:
    """Cut a share off the rows that a source trains on, the same on every machine, each class in proportion.

    Args:
        source: name of the source, for messages.
        rows: [n] rows.
        share: share of the rows to cut, between 0 and 1 (see `checked_share`). At least two rows are cut, or half of
            fewer than four.
        labels: [n] class numbers; default: one class.
        together: [n] numbers; rows of one number stay in one split. Default: rows are independent.

    Returns the training rows and the valid rows, each in order. Raises CounterpointError where a split would be empty.

    >>> train, valid = carve("digits", np.arange(20), 0.1)
    >>> len(train), len(valid)
    (18, 2)
    """
    checked_share(source, share)
    share = max(share, min(0.5, FEWEST / max(1, len(rows))))
    if labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        # Classes so small that most would give no row allow no proportions.
        if 2 * np.minimum(np.round(share * counts), counts - 1).sum() < share * len(labels):
            labels = None
    try:
        kept, cut = split_positions(len(rows), share, labels, together)
    except DataError as error:
        if together is not None and len(set(together.tolist())) > 1:  # all groups are large: cut the smallest one
            names, sizes = np.unique(together, return_counts=True)
            cut_group = together == names[sizes.argmin()]
            return rows[~cut_group], rows[cut_group]
        raise CounterpointError(
            f"{source}: the valid split would be empty: {counted(len(rows), 'training item')} cannot be divided with "
            f"valid={share:g}; ask for more items, or another share (?valid={SHARE:g})"
        ) from error
    return rows[kept], rows[cut]


def by_content(items: NDArray[np.generic]) -> Indices:
    """Return [n] numbers that are equal where items, [n, ...], are equal in every bit.

    >>> by_content(np.array([[1, 2], [3, 4], [1, 2]])).tolist()
    [0, 1, 0]
    """
    number: dict[bytes, int] = {}
    found = [
        number.setdefault(hashlib.blake2b(np.ascontiguousarray(item).tobytes(), digest_size=16).digest(), len(number))
        for item in items
    ]
    return np.array(found, np.int64)


def linked(numberings: Sequence[Indices], count: int) -> Indices:
    """Return the connected components of items, as numbers [count] from 0.

    Two items are linked where any numbering gives both the same number. Linked items have equal numbers, also when the link
    leads over other items.

    Args:
        numberings: Arrays [count] of numbers >= 0; -1 links an item to no other item.
        count: Number of items.

    >>> linked([np.array([0, 0, 1, -1]), np.array([5, 7, 7, -1])], 4).tolist()
    [0, 0, 0, 1]
    """
    starts, ends, nodes = [], [], count
    for same in numberings:
        here = np.flatnonzero(same >= 0)
        number = same[here]
        often = np.bincount(number) if len(here) else number
        shared = often[number] > 1
        starts.append(here[shared])
        ends.append(nodes + number[shared])
        nodes += len(often)
    if not starts or not sum(map(len, starts)):
        return np.arange(count)
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    at, to = np.concatenate(starts), np.concatenate(ends)
    graph = coo_matrix((np.ones(len(at), bool), (at, to)), shape=(nodes, nodes))
    return np.asarray(connected_components(graph, directed=False)[1][:count], np.int64)
