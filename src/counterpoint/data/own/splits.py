"""From the rows that were read to splits: classes, training and test, and what items of the two share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import BAD
from counterpoint.data.images import Indices, split_positions
from counterpoint.data.own.places import SPLITS
from counterpoint.data.own.reader import Column, Reader
from counterpoint.data.own.table import BadCell, factorise, shown
from counterpoint.errors import CounterpointError, DataError

FRACTION = 0.2
FEW = 30  # training items, below which a note warns
OFTEN = 1 / 256  # chance that two items are the same in a modality: from here on a batch of 256 is full of them


@dataclass
class Parts:
    """Rows of the training and test splits, and of neither."""

    train: Indices
    test: Indices
    single: Indices  # training rows of one modality
    notes: list[str]


def labels_of(reader: Reader, *, odd: str = "") -> tuple[Indices | None, tuple[str, ...] | None]:
    """Class numbers of all rows, -1 where there is none, and the classes' names; None where there are none.

    Classes are the values as they are written ("01" and "1" are two), in the order of numbers and then of letters. An empty
    cell and -1 are no class.

    Raises DataError where a label is neither a name nor a whole number.
    """
    name = reader.roles.label
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
                    f"{reader.place}: {where}: the label column '{name}' holds {cell}; labels are names or whole "
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
    """[rows] numbers from 0 that are equal where rows are linked by what they share in any modality, directly or over others.

    Args:
        columns: the modalities.
        rows: that are compared.
        but: kinds of modalities that do not count.
    """
    starts, ends, count = [], [], len(rows)
    for column in columns:
        if column.gives in but:
            continue
        same = column.same[rows]
        here = np.flatnonzero(same >= 0)
        number = same[here]
        often = np.bincount(number) if len(here) else number
        shared = often[number] > 1
        starts.append(here[shared])
        ends.append(count + number[shared])
        count += len(often)
    if not starts or not sum(map(len, starts)):
        return np.arange(len(rows))
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    at, to = np.concatenate(starts), np.concatenate(ends)
    graph = coo_matrix((np.ones(len(at), bool), (at, to)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1][: len(rows)], np.int64)


def sharing_notes(reader: Reader, train: Indices, test: Indices, *, made: bool) -> list[str]:
    """Notes on items that are the same in some modality: between the splits, and within training."""
    notes = []
    if not made:
        across = []
        for column in reader.columns:
            trained = np.zeros(int(column.same.max(initial=0)) + 1, bool)
            trained[column.same[train][column.has[train]]] = True
            common = trained[column.same[test]] & column.has[test]
            if common.any():
                across.append(f"{int(common.sum())} the {column.name}")
        if across:
            notes.append(
                f"{reader.place}: of {len(test)} test items {' and '.join(across)} is that of a training item too; figures on "
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
                f"{reader.place}: {len(counts)} different values of {column.name} stand in {len(same)} training items, so two "
                f"items are the same in it with a chance of {chance:.1%}; a batch will hold such pairs, which a contrastive "
                "loss takes for different"
            )
    if len(train) < FEW:
        notes.append(f"{reader.place}: {len(train)} training items are too few to learn from; expect no figure to hold")
    return notes


# --------------------------------------------------------------------------------------------------------------- splits


def split_rows(reader: Reader, needed: NDArray[np.bool_], labels: Indices | None, test: str) -> Parts:
    """Cut the rows into training and test.

    Args:
        reader: whose good rows are cut.
        needed: [rows] whether a row has what an item needs: two modalities, or a picture.
        labels: [rows] class numbers.
        test: the fraction to test on, or the name of a split; empty: the split "test", else "validation", else a fifth.

    Raises DataError where a split would be empty, CounterpointError where `test` makes no sense.
    """
    rows = np.flatnonzero(reader.good)
    of = reader.split
    try:
        fraction: float | None = float(test)
    except ValueError:
        fraction = None
    names = list(dict.fromkeys(of[rows].tolist()))
    wanted = SPLITS.get(test.lower(), test) if test and fraction is None else ""
    if wanted and wanted not in names:
        raise CounterpointError(
            f"{reader.place} has no split '{test}'; it has {', '.join(n or 'no named split' for n in names)}"
        )
    if not wanted and fraction is None:
        wanted = next((name for name in ("test", "validation") if name in names), "")
    inside = np.isin(of[rows], ["train", ""]) if {"train", ""} & set(names) else of[rows] != wanted
    if wanted and (of[rows] == wanted).all():  # all there is is called "test", say because the folder is
        wanted, inside = "", np.ones(len(rows), bool)
    if wanted == "train":
        raise CounterpointError(
            f"{reader.place}: test={test} would leave nothing to train on; name another split or a fraction"
        )
    what = "a picture" if len(reader.columns) == 1 else "two modalities"
    notes: list[str] = []
    if wanted:
        train, held = rows[inside & (of[rows] != wanted)], rows[of[rows] == wanted]
        if not needed[held].any():
            raise DataError(f"{reader.place}: no row of its split '{wanted}' has {what}; there is nothing to test on")
        if not needed[train].any():
            raise DataError(
                f"{reader.place}: no row outside its split '{wanted}' has {what}; there is nothing to train on"
            )
    else:
        mine = rows[inside]
        whole = mine[needed[mine]]
        if not len(whole):
            raise DataError(f"{reader.place}: no usable row has {what}; there is nothing to align")
        share = FRACTION if fraction is None else fraction
        kept, cut, notes = _cut(reader, whole, None if labels is None else labels[whole], share)
        train, held = np.sort(np.concatenate([whole[kept], mine[~needed[mine]]])), whole[cut]
    taken = np.concatenate([train, held])
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
    return Parts(train, held, single, notes + sharing_notes(reader, train, held, made=not wanted))


def _cut(reader: Reader, rows: Indices, labels: Indices | None, share: float) -> tuple[Indices, Indices, list[str]]:
    """Positions in `rows` of a training and a test split that is made here, and notes."""
    if labels is not None:
        counts = np.unique(labels, return_counts=True)[1]
        # Of classes so small that most would give nothing, no proportions can be kept.
        if 2 * np.minimum(np.round(share * counts), counts - 1).sum() < share * len(labels):
            labels = None
    notes = []
    together = components(reader.columns, rows)
    # Where all is linked to all by captions that many items share, pictures and sounds are still kept together.
    for but in (("text",), ("text", "vector"), ("text", "vector", "audio", "image")):
        if together.max() > 0 or len(rows) < 2:
            break
        together = components(reader.columns, rows, but=but)
        if together.max() > 0:
            notes.append(
                f"{reader.place}: all items are linked by what they share, so the test split that is made here separates "
                f"items of the same {' or '.join(but)}; name a split of your own where that matters"
            )
    kept, cut = split_positions(len(rows), share, labels, together)
    notes.append(f"{reader.place}: the test split is made here, {len(cut)} of {len(rows)} items")
    return kept, cut, notes
