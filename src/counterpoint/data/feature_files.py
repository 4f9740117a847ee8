"""`features:PLACE`: the user's own items with features of frozen encoders, and classes by name or captions.

    features:items.npz        arrays "features" [items, slots, width] or [items, width], and "label" [items], texts
    features:emb.parquet      a file that `counterpoint embed` wrote: each column NAME_embedding is a slot
    features:items.jsonl      rows with "features", a list of numbers; also .json and .parquet, or a folder of them

`?slots=image,text` names other columns or arrays, each a slot. All slots have one width. A slot that is empty or NaN is missing.

In place of "label" there may be "caption". Then each of the caption's frequent words gives an item, whose class is that word, as in
SINC. A slot of text features should not have read that word; compute it from the caption without it, or leave it out.

Of the classes with at least two items, shares are held out as unseen. Of the other classes, shares of the items are.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts
from counterpoint.data.episodes import EpisodeData, EpisodeSplit
from counterpoint.data.own.cells import text_of
from counterpoint.data.own.opening import open_table
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

LABELS = ("label", "class", "word")
CAPTIONS = ("caption", "text")
ENDING = "_embedding"
NAMED = 3  # captions that a note names
LONGEST = 3  # frequent words of a caption that give an item, the rarest first


def load(
    place: str,
    *,
    slots: str = "",
    label: str = "",
    caption: str = "",
    least: int = 8,
    valid: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
) -> EpisodeData:
    """Read the items (see the module).

    Args:
        place: a file; of tables also a folder or pattern.
        slots: columns or arrays of the slots, joined by commas. Default: those that end in _embedding, else "features".
        label: column of the classes' names. Default: label, class or word.
        caption: column of captions, used where there are no labels. Default: caption or text.
        least: fewest captions of a word that is a class, at least 2.
        valid, test: share of the classes that are unseen, and of the items of the others, each above 0, together below 1.
        seed: seed of the splits.

    Raises DataError for unreadable files, missing columns, slots of several widths and too few classes. Raises CounterpointError
    for an option out of range.
    """
    if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
        raise CounterpointError(
            f"features: valid and test must be shares above 0, together below 1, got {valid=} and {test=}"
        )
    if least < 2:
        raise CounterpointError(f"features: least must be at least 2 captions, got {least}")
    notes: list[str] = []
    columns = _arrays(place) if place.endswith(".npz") else _table(place, notes)
    chosen = [name.strip() for name in slots.split(",") if name.strip()]
    chosen = chosen or [name for name in columns if name.endswith(ENDING)] or ["features"]
    for name in chosen:
        if name not in columns:
            raise DataError(
                f"{place}: has no '{name}', but {', '.join(columns) or 'nothing'}; name the slots: ?slots=A,B"
            )
    features, present = _slots(place, {name: columns[name] for name in chosen})
    named = _column(columns, label, LABELS)
    words: list[str | None]
    if named is not None:
        words, rows = [text_of(value) for value in named], np.arange(len(named))
    else:
        said = _column(columns, caption, CAPTIONS)
        if said is None:
            raise DataError(
                f"{place}: has neither labels nor captions, but {', '.join(columns)}; name a column: ?label=NAME or ?caption=NAME"
            )
        words, rows = _concepts([text_of(value) or "" for value in said], least, notes, place)
    if named is not None and len(words) != len(features):
        raise DataError(
            f"{place}: has {counted(len(features), 'item')} with features and {counted(len(words), 'label')}"
        )
    some: NDArray[np.bool_] = np.asarray(present[rows].any(1))
    fine = np.array([bool(name and name.strip()) for name in words], bool) & some
    if not fine.all():
        left = np.flatnonzero(~fine)
        faults = ", ".join(f"item {rows[n]}: no {'label' if some[n] else 'slot'}" for n in left[:NAMED].tolist())
        notes.append(
            f"{place}: {len(left)} of {counted(len(fine), 'item has', 'items have')} no label or no slot and are left out "
            f"({faults}{', ...' if len(left) > NAMED else ''})"
        )
    names = sorted({str(word).strip() for word, ok in zip(words, fine, strict=True) if ok})
    number = {name: n for n, name in enumerate(names)}
    kept = np.flatnonzero(fine)
    labels = np.array([number[str(words[n]).strip()] for n in kept.tolist()], np.int64)
    items = EpisodeSplit(features[rows[kept]], labels, present[rows[kept]])
    return _divided(f"features:{place}", names, items, valid, test, seed, notes)


def _arrays(place: str) -> dict[str, Any]:
    """Read the arrays of a .npz file. DataError for another file."""
    try:
        with np.load(Path(place), allow_pickle=False) as held:
            return dict(held)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{place}: is no readable .npz file: {error}. Texts must be an array of strings, no objects"
        ) from error


def _table(place: str, notes: list[str]) -> dict[str, Any]:
    """Read the columns of tables."""
    table, said = open_table(place, "", lambda name: True, Accounts(place))
    notes += said
    cells = {name: table.cells(name) for name in table.columns}
    return {name: [of[n] for n in range(len(table))] for name, of in cells.items()}


def _column(columns: dict[str, Any], name: str, usual: tuple[str, ...]) -> Any:
    """Return a column by its name, or the first with a usual name; None without one."""
    if name and name not in columns:
        raise DataError(f"there is no column '{name}', but {', '.join(columns)}")
    return next((columns[one] for one in ([name] if name else usual) if one in columns), None)


def _slots(place: str, columns: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return features [items, slots, width] with zeros in missing slots, and the presence of slots."""
    found: list[NDArray[np.float32]] = []
    for name, cells in columns.items():
        try:
            if isinstance(cells, np.ndarray) and cells.dtype != object:
                rows = np.asarray(cells, np.float32)
            else:
                lists = [np.empty(0, np.float32) if cell is None else np.asarray(cell, np.float32) for cell in cells]
                size = max((row.size for row in lists), default=0)
                other = next((n for n, row in enumerate(lists) if row.size not in (0, size)), None)
                if other is not None:
                    raise DataError(f"{place}: item {other} has {lists[other].size} numbers in '{name}', others {size}")
                rows = np.stack([row if row.size else np.full(size, np.nan, np.float32) for row in lists])
        except (TypeError, ValueError) as error:
            raise DataError(f"{place}: '{name}' is no list of numbers in each item: {str(error)[:120]}") from error
        if rows.ndim not in (2, 3):
            raise DataError(
                f"{place}: '{name}' must be [items, width] or [items, slots, width], got {list(rows.shape)}"
            )
        found.append(rows[:, None] if rows.ndim == 2 else rows)
    if len({(len(rows), rows.shape[2]) for rows in found}) > 1:
        sizes = ", ".join(f"{name} {list(rows.shape)}" for name, rows in zip(columns, found, strict=True))
        raise DataError(
            f"{place}: slots must have as many items and the same width, got {sizes}; choose some: ?slots=A,B"
        )
    features = np.concatenate(found, 1)
    if np.isinf(features).any():
        raise DataError(f"{place}: item {int(np.argwhere(np.isinf(features))[0, 0])} has infinite features")
    present = np.asarray(~np.isnan(features).any(2), np.bool_)
    return np.where(present[..., None], features, 0).astype(np.float32), present


def _concepts(
    captions: list[str], least: int, notes: list[str], place: str
) -> tuple[list[str | None], NDArray[np.int64]]:
    """Return the class and the row of each item that captions give: their frequent words, the rarest first."""
    words = [list(dict.fromkeys(re.findall(r"[^\W\d_]{3,}", text.lower()))) for text in captions]
    often = Counter(word for of in words for word in of)
    pairs = [
        (word, row)
        for row, of in enumerate(words)
        for word in sorted((w for w in of if often[w] >= least), key=lambda w: (often[w], w))[:LONGEST]
    ]
    if not pairs:
        raise DataError(f"{place}: no word occurs in {least} captions; lower ?least=, or give labels")
    notes.append(
        f"{place}: {counted(len(captions), 'caption gives', 'captions give')} {counted(len(pairs), 'item')} of "
        f"{counted(len({w for w, _ in pairs}), 'word')}"
    )
    missed = sorted(set(range(len(captions))) - {row for _, row in pairs})
    if missed:
        shown = ", ".join(f"item {row}: '{captions[row][:40]}'" for row in missed[:NAMED])
        notes.append(
            f"{place}: {len(missed)} of {counted(len(captions), 'caption has', 'captions have')} no word that occurs in {least} "
            "captions and are left out "
            f"({shown}{', ...' if len(missed) > NAMED else ''}); a lower ?least= keeps more"
        )
    return [word for word, _ in pairs], np.array([row for _, row in pairs], np.int64)


def _divided(
    name: str, names: list[str], items: EpisodeSplit, valid: float, test: float, seed: int, notes: list[str]
) -> EpisodeData:
    """Hold out classes as unseen, and items of the others. DataError for too few classes."""
    rng = np.random.default_rng([2307_07742, 1, seed])
    frequent = rng.permutation([n for n, count in items.counts.items() if count >= 2])
    counts = [max(2, round(share * len(names))) for share in (valid, test)]
    if len(frequent) < sum(counts) or len(names) < sum(counts) + 2:
        raise DataError(
            f"{name}: has {counted(len(names), 'class')}, {len(frequent)} of them with at least 2 items; it "
            f"needs {counted(sum(counts), 'such class')} that training does not see, and 2 others. "
            "Add classes, or lower ?valid= and ?test="
        )
    unseen = np.split(frequent[: sum(counts)], [counts[0]])
    rest = np.flatnonzero(~np.isin(items.labels, frequent[: sum(counts)]))
    rest = rng.permutation(rest)
    first = np.unique(items.labels[rest], return_index=True)[1]  # every class keeps an item for training
    free = np.setdiff1d(np.arange(len(rest)), first)
    many = [round(share * len(free)) for share in (valid, test)]
    cut = np.split(rng.permutation(free), np.cumsum(many))
    parts = [np.concatenate([np.flatnonzero(np.isin(items.labels, unseen[n])), np.sort(rest[cut[n]])]) for n in (0, 1)]
    train = np.sort(np.concatenate([rest[first], rest[cut[2]]]))
    notes.append(
        f"{name}: {counts[0]} and {counts[1]} of {counted(len(names), 'class is', 'classes are')} unseen, for valid and test"
    )
    return EpisodeData(name, names, items.take(train), items.take(parts[0]), items.take(parts[1]), notes)
