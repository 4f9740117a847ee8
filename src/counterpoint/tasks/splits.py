"""Select the splits of a task's data: train, valid, test and, in some aligned data, unpaired."""

from __future__ import annotations

from typing import Any

from counterpoint.errors import DataError, unknown

SPLITS = ("train", "valid", "test", "unpaired")
WATCHED = 2  # minimum number of items of a valid split


def named_split(data: Any, name: str) -> Any:
    """Return the split of this name; None for `unpaired` if the data have no such items.

    Raises CounterpointError for another name.
    """
    if name == "unpaired" and getattr(data, name, None) is None:
        return None
    names = [known for known in SPLITS if getattr(data, known, None) is not None]
    if name not in names:
        raise unknown("split", name, names)
    return getattr(data, name)


def check_watched(name: str, count: int, what: str) -> None:
    """Raise DataError if the valid split of the data `name` has fewer than two items to monitor training.

    Args:
        name: name of the data, for the message.
        count: number of items of the valid split.
        what: noun for the items, for the message.
    """
    if count < WATCHED:
        has = "is empty" if not count else f"has {count}"
        raise DataError(
            f"{name}: needs at least {WATCHED} {what} in its valid split, which {has} and on which training is monitored. "
            "Set a larger share of the training items (?valid=0.2). Or name a split: ?valid=NAME, a folder or a split "
            "column 'valid'"
        )
