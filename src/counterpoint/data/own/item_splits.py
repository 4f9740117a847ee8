"""Split items that files or folders define, such as pictures with masks, into training, valid and test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import Indices, split_positions
from counterpoint.data.own.places import SPLITS
from counterpoint.data.own.splits import FRACTION
from counterpoint.data.valid import SHARE, carve
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted


def item_splits(
    place: str,
    names: list[str],
    labelled: NDArray[np.bool_],
    together: Indices,
    test: str = "",
    valid: str = "",
) -> tuple[Indices, Indices, Indices, list[str]]:
    """Return the rows of training, valid and test, and notes. The rule is that of all own data (`own.splits`).

    Args:
        place: name of the data, for messages.
        names: split of each item, "train", "validation", "test" or "" for none.
        labelled: whether an item has labels. Items without labels are for training.
        together: numbers that are equal where items must stay in one split.
        test, valid: fraction, or name of a split; "": the split of that name, else a fifth and a tenth.

    Raises DataError where a split would be empty, CounterpointError for an invalid option.
    """
    of, rows = np.array(names), np.arange(len(names))
    there = set(names) - {""}
    wanted, share = _asked(place, "test", test, there)
    if not wanted and share is None:
        wanted = next((name for name in ("test", "validation") if name in there), "")
        if wanted and (of == wanted).all():
            wanted = ""
    watched, part = _asked(place, "valid", valid, there)
    if not watched and part is None and "validation" in there and wanted != "validation":
        watched = "validation"
    if "train" in (wanted, watched) or (wanted and wanted == watched):
        raise CounterpointError(
            f"{place}: test={test} and valid={valid} leave nothing to train on, or name one split twice"
        )
    notes = []
    if wanted:
        held = rows[(of == wanted) & labelled]
        rest = rows[of != wanted]
    else:
        among = rows[labelled & (of != watched) if watched else labelled]
        try:
            _, cut = split_positions(len(among), FRACTION if share is None else share, None, together[among])
        except CounterpointError as error:
            raise type(error)(f"{place}: {error}") from error
        held = among[cut]
        rest = np.setdiff1d(rows, held)
        notes.append(f"{place}: the test split is made here, {len(held)} of {counted(len(among), 'item')} with labels")
    if watched:
        seen = rest[(of[rest] == watched) & labelled[rest]]
        train = rest[of[rest] != watched]
    else:
        among = rest[labelled[rest]]
        if len(among) < 2:
            raise DataError(
                f"{place}: {counted(len(among), 'item')} with labels are left for training and the valid split; add more"
            )
        _, seen = carve(place, among, SHARE if part is None else part, None, together[among])
        train = np.setdiff1d(rest, seen)
        notes.append(
            f"{place}: the valid split is made here, {len(seen)} of {counted(len(among), 'training item')} with labels"
        )
    for name, found in (("test", held), ("valid", seen), ("training", train)):
        if not len(found):
            raise DataError(f"{place}: the {name} split has no item with labels; name another (?test=, ?valid=)")
    return train, seen, held, notes


def _asked(place: str, option: str, said: str, there: set[str]) -> tuple[str, float | None]:
    """Return (name, None) or ("", share) of an option; ("", None) without it."""
    if not said:
        return "", None
    try:
        share = float(said)
    except ValueError:
        name = SPLITS.get(said.lower(), said)
        if name not in there:
            raise CounterpointError(
                f"{place} has no split '{said}'; it has {', '.join(sorted(there)) or 'no named split'}"
            ) from None
        return name, None
    if not 0 < share < 1:
        raise CounterpointError(f"{place}: {option}={said} must be a fraction between 0 and 1, or the name of a split")
    return "", share
