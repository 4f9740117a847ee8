"""The splits of a task's data: train, valid, test and, of some aligned data, unpaired."""

from __future__ import annotations

from typing import Any

from counterpoint.errors import DataError, unknown

SPLITS = ("train", "valid", "test", "unpaired")
WATCHED = 2  # items that a valid split needs at least


def named_split(data: Any, name: str) -> Any:
    """Return the split of data of this name, None where it has no unpaired items; CounterpointError for another name."""
    if name == "unpaired" and getattr(data, name, None) is None:
        return None
    names = [known for known in SPLITS if getattr(data, known, None) is not None]
    if name not in names:
        raise unknown("split", name, names)
    return getattr(data, name)


def check_watched(name: str, count: int, what: str) -> None:
    """DataError where the valid split of the data `name` has fewer than two items to watch training on."""
    if count < WATCHED:
        has = "is empty" if not count else f"has {count}"
        raise DataError(
            f"{name}: needs at least {WATCHED} {what} in its valid split, on which training is watched, and it {has}: name a "
            "larger share of the training items (?valid=0.2), or name a split of your own (a folder or a split column "
            "'valid', or ?valid=NAME)"
        )
