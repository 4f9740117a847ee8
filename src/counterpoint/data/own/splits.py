"""Split the rows that were read into training, valid and test. Number their classes, and report items that are equal.

The test split is chosen first, so it does not depend on the valid split. It is the split named "test", else "validation", else
a fifth of the items. The valid split is then the split named "validation", unless that is the test split. Otherwise it is a
tenth of the training items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import BAD
from counterpoint.data.images import Indices, split_positions
from counterpoint.data.own.places import SPLITS
from counterpoint.data.own.reader import Column, Reader
from counterpoint.data.own.table import BadCell, factorise, shown
from counterpoint.data.valid import FEWEST, SHARE, linked
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

FRACTION = 0.2
FEW = 30  # number of training items below which a note warns
OFTEN = 1 / 256  # probability that two items are equal in a modality, from which on a batch of 256 has many equal items


@dataclass
class Parts:
    """The rows of the training, valid and test splits, and of no split."""

    train: Indices
    valid: Indices  # empty where there are too few training items for a valid split
    test: Indices
    single: Indices  # training rows with only one modality
    notes: list[str]


def labels_of(reader: Reader, *, odd: str = "", what: str = "label") -> tuple[Indices | None, tuple[str, ...] | None]:
    """Return the class numbers of all rows, -1 where a row has none, and the classes' names; None without any class.

    A class is a value as text, so "01" and "1" are two classes. Numbers come first in their order, then words in theirs.
    An empty cell and -1 are no class.

    With `what` "domain", these are the numbers and names of domains. Raises DataError when a label is neither a name nor a
    whole number.
    """
    name = reader.roles.domain if what == "domain" else reader.roles.label
    if not name:
        return None, None
    cells = reader.table.cells(name)
    codes, values = factorise(cells)
    known = reader.table.classes.get(name)
    numbered = known and all(
        isinstance(value, int) and -1 <= value < len(known) for value in values if value not in ("", -1)
    )
    written: list[str] = []
    for n, value in enumerate(values):
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace").strip()
        if (
            isinstance(value, tuple) and value[0] is bool
        ):  # of a truth value `factorise` gives the type, too: True is not 1
            value = str(value[1])
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, BadCell) or value in ("", -1, "-1") or value != value:
            written.append("")
        elif isinstance(value, (str, int)):
            written.append(str(value))
        else:
            rows = np.flatnonzero((codes == n) & reader.good)
            if len(rows):
                where, cell = reader.table.short(int(rows[0])), shown(cells[int(rows[0])])
                raise DataError(
                    f"{reader.place}: {where}: the {what} column '{name}' holds {cell}; {what}s are names or whole "
                    "numbers"
                )
            written.append("")
    used = np.bincount(codes[reader.good & (codes >= 0)], minlength=len(values))
    there = {written[n] for n in np.flatnonzero(used).tolist()} - {""}
    if not there:
        return None, None
    if numbered:
        assert known is not None
        names = tuple(known)
        of = np.array([int(text) if text else -1 for text in written] + [-1], np.int64)
    else:
        names = tuple(sorted(there, key=_order))
        number = {text: n for n, text in enumerate(names)}
        of = np.array([number.get(text, -1) for text in written] + [-1], np.int64)
    labels = of[codes]
    labels[~reader.good] = -1
    return labels, names


def _order(name: str) -> tuple[bool, int, str]:
    whole = name.lstrip("-").isascii() and name.lstrip("-").isdecimal()
    return (not whole, int(name) if whole else 0, name)


# --------------------------------------------------------------------------------------------------------------- shares


def components(columns: list[Column], rows: Indices, *, but: tuple[str, ...] = ()) -> Indices:
    """Return the connected components of rows, as numbers [rows] from 0.

    Two rows are linked where they have equal content in any modality. Linked rows have equal numbers, also when the link leads
    over other rows.

    Args:
        columns: The modalities.
        rows: The rows to compare.
        but: Kinds of modalities to ignore.
    """
    return linked([column.same[rows] for column in columns if column.gives not in but], len(rows))


def sharing_notes(reader: Reader, train: Indices, across: list[tuple[str, Indices, str, Indices]]) -> list[str]:
    """Return notes on items that are equal in some modality, between given splits and within training.

    Args:
        reader: The reader of the rows.
        train: Training rows.
        across: Pairs of splits, each with its name, that the user gave. Items of the second split may be equal to items of
            the first.
    """
    notes = []
    for called, rows, known, others in across:
        shared = []
        for column in [*reader.columns, *reader.linked]:
            seen = np.zeros(int(column.same.max(initial=0)) + 1, bool)
            seen[column.same[others][column.has[others]]] = True
            common = seen[column.same[rows]] & column.has[rows]
            if common.any():
                shared.append(f"{int(common.sum())} the {column.name}")
        if shared:
            notes.append(
                f"{reader.place}: of {counted(len(rows), f'{called} item')} {' and '.join(shared)} is that of a {known} item "
                "too; figures on "
                "them are too good"
            )
    for column in reader.columns:
        same = column.same[train][column.has[train]]
        if len(same) < 2:
            continue
        counts = np.bincount(same)
        counts = counts[counts > 0].astype(np.float64)
        chance = float((counts * (counts - 1)).sum() / (len(same) * (len(same) - 1)))
        if chance >= OFTEN:
            notes.append(
                f"{reader.place}: {counted(len(counts), 'different value')} of {column.name} stand in "
                f"{counted(len(same), 'training item')}, so two "
                f"items are the same in it with a probability of {chance:.1%}; a batch will hold such pairs, which a contrastive "
                "loss treats as different"
            )
    if len(train) < FEW:
        notes.append(
            f"{reader.place}: {counted(len(train), 'training item is', 'training items are')} too few to learn from; do not rely "
            "on any metric"
        )
    return notes


# --------------------------------------------------------------------------------------------------------------- splits


def split_rows(reader: Reader, needed: NDArray[np.bool_], labels: Indices | None, test: str, valid: str = "") -> Parts:
    """Split the rows into training, valid and test.

    Args:
        reader: The reader; its good rows are split.
        needed: [rows] whether a row is complete for an item: two modalities, or a picture.
        labels: [rows] class numbers. None: no classes.
        test: Fraction of the items for the test split, or the name of a split. Empty: the split "test", else "validation",
            else a fifth.
        valid: Fraction of the training items for the valid split, or the name of a split. Empty: the split "validation"
            where it is not the test split, else a tenth.

    Raises DataError when a split would be empty, CounterpointError for an invalid `test` or `valid`.
    """
    rows = np.flatnonzero(reader.good)
    of = reader.split
    names = list(dict.fromkeys(of[rows].tolist()))
    asked, fraction = _asked(reader, "test", test, names)
    watched, share = _asked(reader, "valid", valid, names)
    wanted = asked
    if not wanted and fraction is None:
        wanted = next((name for name in ("test", "validation") if name in names and name != watched), "")
    if wanted and (of[rows] == wanted).all():  # all there is is called "test", say because the folder is
        wanted = ""
    # Rows named validation are trained on where nothing else is left for that.
    if not watched and share is None and "validation" in names and set(names) - {"validation", "test", wanted}:
        watched = "" if wanted == "validation" else "validation"
    _checked_names(reader, wanted, watched, test, valid)
    training = {"train", ""} & set(names)
    inside = np.isin(of[rows], list(training)) if training else ~np.isin(of[rows], [*filter(None, (wanted, watched))])
    what = "two modalities"
    if len(reader.columns) == 1:
        what = "a picture" if reader.columns[0].gives == "image" else "its numbers"
    notes: list[str] = []
    mine = rows[inside]
    if wanted:
        train, held = mine, rows[of[rows] == wanted]
        if not needed[held].any():
            raise DataError(f"{reader.place}: no row of its split '{wanted}' has {what}; there is nothing to test on")
        if not needed[train].any():
            raise DataError(
                f"{reader.place}: no row outside its split '{wanted}' has {what}; there is nothing to train on"
            )
        if wanted == "validation" and not asked:
            notes.append(f"{reader.place}: there is no split 'test', so the split 'validation' is tested on")
    else:
        whole = mine[needed[mine]]
        if not len(whole):
            raise DataError(f"{reader.place}: no usable row has {what}; there is nothing to align")
        share_of_test = FRACTION if fraction is None else fraction
        kept, cut, notes = _cut(reader, whole, None if labels is None else labels[whole], share_of_test, "test")
        train, held = np.sort(np.concatenate([whole[kept], mine[~needed[mine]]])), whole[cut]
    if watched:
        kept_apart = rows[of[rows] == watched]
        if not needed[kept_apart].any():
            raise DataError(
                f"{reader.place}: the valid split would be empty: no row of its split '{watched}' has {what}; correct it, or take "
                f"a share of the training items (?valid={SHARE:g})"
            )
    else:
        train, kept_apart, more = _carved(reader, train, needed, labels, share)
        notes += more
    taken = np.concatenate([train, kept_apart, held])
    left = np.zeros(len(reader.good), bool)
    left[rows] = True
    left[taken] = False
    unused = np.flatnonzero(left)
    for row in unused.tolist():
        reason = f"is of the split '{of[row] or 'without a name'}', which is not used"
        reader.accounts.leave(reader.line(row, reader.roles.split, of[row], BAD, reason))
    single = train[~needed[train]]
    reader.accounts.read(reader.table.unit, len(taken))
    train = train[needed[train]]
    across = []
    if wanted:
        across.append(("test", held, "training", train))
    if wanted or watched:
        across.append(("test", held, "valid", kept_apart))
    if watched:
        across.append(("valid", kept_apart, "training", train))
    return Parts(train, kept_apart, held, single, notes + sharing_notes(reader, train, across))


def _asked(reader: Reader, option: str, said: str, names: list[str]) -> tuple[str, float | None]:
    """Return (name, None) or ("", fraction) of an option that names a split or gives a fraction; ("", None) without it."""
    if not said:
        return "", None
    try:
        fraction = float(said)
    except ValueError:
        wanted = SPLITS.get(said.lower(), said)
        if wanted not in names:
            raise CounterpointError(
                f"{reader.place} has no split '{said}'; it has {', '.join(n or 'no named split' for n in names)}"
            ) from None
        return wanted, None
    if option == "valid" and not 0 < fraction < 1:
        raise CounterpointError(
            f"{reader.place}: valid={said}{' leaves a valid split that is empty' if fraction == 0 else ''}; give a fraction of "
            f"the training items between 0 and 1 (?valid={SHARE:g}), or the name of a split"
        )
    return "", fraction


def _checked_names(reader: Reader, wanted: str, watched: str, test: str, valid: str) -> None:
    """Raise CounterpointError when one split would have two purposes."""
    if wanted == "train":
        raise CounterpointError(
            f"{reader.place}: test={test} would leave nothing to train on; name another split or a fraction"
        )
    if watched == "train":
        raise CounterpointError(
            f"{reader.place}: valid={valid} would leave nothing to train on; name another split or a fraction"
        )
    if watched and watched == wanted:
        raise CounterpointError(
            f"{reader.place}: the split '{watched}' cannot be both tested on and watched; name another with ?valid= or ?test="
        )


def _carved(
    reader: Reader, train: Indices, needed: NDArray[np.bool_], labels: Indices | None, share: float | None
) -> tuple[Indices, Indices, list[str]]:
    """Split the valid rows from the training rows. Return training rows, valid rows and notes.

    With too few training items the valid split is empty: such a set can be embedded, but not trained on. Raises DataError
    when a share that the user gave leaves it empty.
    """
    whole = train[needed[train]]
    used = SHARE if share is None else share
    few = max(used, min(0.5, FEWEST / max(1, len(whole))))
    try:
        kept, cut, notes = _cut(
            reader, whole, None if labels is None else labels[whole], few if share is None else used, "valid"
        )
    except DataError as error:
        if share is not None:
            raise DataError(
                f"{reader.place}: the valid split would be empty: {used:g} of {counted(len(whole), 'training item')} is none "
                "that can be "
                "set apart; ask for a larger share (?valid=0.2), or name a split"
            ) from error
        note = (
            f"{reader.place}: {counted(len(whole), 'training item is', 'training items are')} too few to set a valid split "
            "apart, which is empty"
        )
        return train, np.zeros(0, np.int64), [note]
    return np.sort(np.concatenate([whole[kept], train[~needed[train]]])), whole[cut], notes


def _cut(
    reader: Reader, rows: Indices, labels: Indices | None, share: float, name: str
) -> tuple[Indices, Indices, list[str]]:
    """Draw the split `name` from `rows`. Return the positions in `rows` of the training split and of `name`, and notes."""
    if labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        # Proportions cannot be kept for classes so small that most would give no item.
        if 2 * np.minimum(np.round(share * counts), counts - 1).sum() < share * len(labels):
            labels = None
    notes = []
    columns = [*reader.columns, *reader.linked]
    together = components(columns, rows)
    # Where common captions link all items, equal pictures and sounds are still kept together.
    for but in (("text",), ("text", "vector"), ("text", "vector", "audio", "image")):
        if together.max(initial=0) > 0 or len(rows) < 2:
            break
        together = components(columns, rows, but=but)
        if together.max() > 0:
            notes.append(
                f"{reader.place}: all items are linked by what they share, so the {name} split that is made here separates "
                f"items of the same {' or '.join(but)}; name your own split where that matters"
            )
    kept, cut = split_positions(len(rows), share, labels, together)
    of = "items" if name == "test" else "training items"
    notes.append(f"{reader.place}: the {name} split is made here, {len(cut)} of {len(rows)} {of}")
    return kept, cut, notes
