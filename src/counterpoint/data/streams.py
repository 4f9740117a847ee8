"""`stream:SOURCE`: another source's items in phases, which are learned one after another.

    stream:digits?by=class&phases=5                           groups of classes
    stream:digit-domains?order=rolled,plain                   domains, in an order of one's own
    stream:imagefolder:old,imagefolder:new                    sources, with their classes together

A question mark or an ampersand of a source is written %3F or %26, and a comma %2C: `stream:digits%3Fsize=8?by=class`. The phases
are the `domains` of the result, and `stream` is true. Learners of phases (mod-x, mulki) take them as they are. Every other trained
system of the tasks `labelled` and `aligned` is fine-tuned phase after phase (tasks/sequential.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import ImageData, Indices, Listed, Pixels
from counterpoint.data.pairs import AlignedData, Column
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.words import counted

WAYS = ("class", "domain", "group", "source")
SPLITS = ("train", "valid", "test")


class Chosen:
    """Some items of one or several splits, an `ImageSplit` and an `AlignedSplit`.

    Args:
        parts: the splits.
        part, rows: [n] number of each item's split, and position in it.
        labels, domains: [n] numbers; None: none.
    """

    def __init__(
        self, parts: Sequence[Any], part: Indices, rows: Indices, labels: Indices | None, domains: Indices
    ) -> None:
        self.parts, self.part, self.rows, self.labels, self.domains = list(parts), part, rows, labels, domains
        groups = [getattr(one, "groups", None) for one in parts]
        self.groups = groups[0][rows] if len(parts) == 1 and groups[0] is not None else None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Indices) -> Chosen:
        """Return these items as a split."""
        labels = None if self.labels is None else self.labels[chosen]
        return Chosen(self.parts, self.part[chosen], self.rows[chosen], labels, self.domains[chosen])

    def _read(self, indices: Indices, read: Callable[[Any, Indices], Any]) -> list[Any]:
        """Read items split by split, and return them one by one in order."""
        indices = np.asarray(indices, np.int64)
        found: list[Any] = [None] * len(indices)
        part, rows = self.part[indices], self.rows[indices]
        for number in np.unique(part):
            at = np.flatnonzero(part == number)
            for place, value in zip(at.tolist(), read(self.parts[number], rows[at]), strict=True):
                found[place] = value
        return found

    def images(self, indices: Indices) -> Pixels:
        if len(self.parts) == 1:
            pixels: Pixels = self.parts[0].images(self.rows[indices])
            return pixels
        return np.stack(self._read(indices, lambda part, rows: part.images(rows)))

    def column(self, modality: str, indices: Indices) -> Column:
        if len(self.parts) == 1:
            column: Column = self.parts[0].column(modality, self.rows[indices])
            return column
        found = self._read(indices, lambda part, rows: part.column(modality, rows))
        return found if isinstance(found[0], str) else np.stack(found)

    def present(self, modality: str, indices: Indices) -> NDArray[np.bool_]:
        return np.array(self._read(indices, lambda part, rows: part.present(modality, rows)), bool)

    def row_names(self, positions: Indices) -> list[str]:
        return self._read(
            positions,
            lambda part, rows: part.row_names(rows) if isinstance(part, Listed) else [f"item {n}" for n in rows],
        )

    def files(self, positions: Indices, modality: str) -> list[str | None]:
        return self._read(
            positions, lambda part, rows: part.files(rows, modality) if isinstance(part, Listed) else [None] * len(rows)
        )


def load(
    argument: str,
    *,
    task: str = "views",
    by: str = "",
    phases: int = 0,
    order: str = "",
    disjoint: int = 0,
    seed: int = -1,
) -> ImageData | AlignedData:
    """Divide a source, or several, into phases.

    Args:
        argument: the source, or several with commas between them.
        task: "views" for pictures, or "aligned".
        by: class, domain, group or source. Default: source where there are several, domain where the data have domains, class
            where they have none.
        phases: number of consecutive groups of classes, domains, groups or sources. 0: 5 groups of classes, or as many as there
            are classes for two each; one for each domain, group or source.
        order: names or numbers of all phases, from 0 and with commas between them, in the order of learning. Default: the data's.
        disjoint: 1 raises an error for a class in two phases, which a class-incremental stream must not have. By class it never
            has one.
        seed: seed of the sources that draw their items; -1: their own.

    Raises CounterpointError for an option that does not fit. Raises DataError for one phase, a phase without items in a split,
    and sources of different kinds.
    """
    if by and by not in WAYS:
        raise unknown("way to divide a stream (by)", by, WAYS)
    loaded = [_loaded(unquote(spec.strip()), task, seed) for spec in argument.split(",")]
    name = f"stream of {', '.join(data.name for data in loaded)}"
    by = by or ("source" if len(loaded) > 1 else "domain" if loaded[0].domains else "class")
    classes = _classes(loaded)
    whole = {split: _joined(loaded, split, classes) for split in SPLITS}
    numbers, names = _numbers(name, by, loaded, whole, classes)
    several = phases or (min(5, len(names) // 2) if by == "class" else len(names))
    if not 2 <= several <= len(names):
        raise DataError(
            f"{name}: {several} phases of {len(names)} {by if len(names) == 1 else by + ('es' if by == 'class' else 's')}; a "
            f"stream needs at least two, and at most one for each: set ?phases=N, or divide by another of {', '.join(WAYS)}"
        )
    phase = {split: np.where(found < 0, -1, found * several // len(names)) for split, found in numbers.items()}
    groups = [[n for at, n in enumerate(names) if at * several // len(names) == p] for p in range(several)]
    called = [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups]
    called = called if len(set(called)) == several else [f"phase {p + 1}" for p in range(several)]
    sequence = _sequence(name, order, called)
    place = np.full(several + 1, -1)  # the last for items of no phase
    place[sequence] = np.arange(several)
    made: dict[str, Any] = {}
    notes = [note for data in loaded for note in data.notes]
    for split, items in whole.items():
        items.domains = place[phase[split]]
        kept = np.flatnonzero(items.domains >= 0)
        if left := len(items) - len(kept):
            notes.append(f"{name}: left out of {split}, without {by} and so without phase: {counted(left, 'item')}")
        made[split] = items.take(kept)
        counts = np.bincount(made[split].domains, minlength=several)
        if not counts.all():
            empty = called[sequence[int(counts.argmin())]]
            raise DataError(
                f"{name}: phase '{empty}' has no item in the {split} split; use fewer ?phases=N, or give it items there"
            )
    ordered = tuple(called[p] for p in sequence)
    if disjoint or by == "class":
        _need_disjoint(name, made["train"], ordered, classes)
    notes.append(f"{name}: {several} phases in the order {', '.join(ordered)}")
    shared: dict[str, Any] = {
        "name": name,
        "notes": notes,
        "domains": ordered,
        "stream": True,
        "shifts": {},
        "accounts": None,
    }
    if isinstance(loaded[0], ImageData):
        more: dict[str, Any] = {"attributes": {}, "factors": {}, "tags": None, "bank": None, "web": None}
        return replace(loaded[0], **made, **shared, **more, classes=classes)
    return replace(loaded[0], **made, **shared, classes=classes or None, unpaired=None)


def _loaded(spec: str, task: str, seed: int) -> Any:
    """Load one source of a stream. Raises CounterpointError for one that is a stream itself."""
    sources = importlib.import_module("counterpoint.data")
    if spec.partition("?")[0].partition(":")[0] == "stream":
        raise CounterpointError("a stream cannot be part of a stream; name its sources")
    more = {} if seed < 0 else {"seed": seed}
    found = sources.load(spec, task=task, **more)
    if not isinstance(found, ImageData | AlignedData):
        raise CounterpointError(f"{spec} has no items of pictures or pairs, which a stream needs")
    return found


def _classes(loaded: Sequence[Any]) -> tuple[str, ...]:
    """Return the names of the classes of all sources, each once. DataError for sources of different kinds."""
    first = loaded[0]
    for other in loaded[1:]:
        mine, its = ({k: v for k, v in data.spec.items() if k != "classes"} for data in (first, other))
        if type(other) is not type(first) or mine != its:
            raise DataError(
                f"the sources {first.name} and {other.name} of a stream differ: {mine} and {its}; give both the same sizes, such "
                "as %3Fsize=32 after each name"
            )
    return tuple(dict.fromkeys(name for data in loaded for name in data.classes or ()))


def _joined(loaded: Sequence[Any], split: str, classes: tuple[str, ...]) -> Chosen:
    """Join one split of all sources, with class numbers of all classes together."""
    parts = [getattr(data, split) for data in loaded]
    labels = []
    for data, one in zip(loaded, parts, strict=True):
        own = np.full(len(one), -1) if one.labels is None else np.asarray(one.labels)
        number = np.array([*(classes.index(name) for name in data.classes or ()), -1], np.int64)
        labels.append(number[own])
    part = np.repeat(np.arange(len(parts)), [len(one) for one in parts])
    rows = np.concatenate([np.arange(len(one)) for one in parts])
    return Chosen(parts, part, rows, np.concatenate(labels) if classes else None, np.zeros(len(rows), np.int64))


def _numbers(
    name: str, by: str, loaded: Sequence[Any], whole: dict[str, Chosen], classes: tuple[str, ...]
) -> tuple[dict[str, Indices], list[str]]:
    """Return the number of each item's class, domain, group or source, -1 for none, and their names in order."""
    if by == "source":
        names = [data.name for data in loaded]
        names = names if len(set(names)) == len(names) else [f"{n + 1}. {one}" for n, one in enumerate(names)]
        return {split: items.part for split, items in whole.items()}, names
    if by == "class":
        if not classes:
            raise DataError(f"{name}: has no classes to divide by; set ?by=domain or ?by=source")
        return {split: np.asarray(items.labels) for split, items in whole.items()}, list(classes)
    if len(loaded) > 1:
        raise CounterpointError(f"{name}: several sources cannot be divided by {by}; set ?by=source or ?by=class")
    own = {split: getattr(items.parts[0], f"{by}s", None) for split, items in whole.items()}
    found = {split: np.asarray(values)[whole[split].rows] for split, values in own.items() if values is not None}
    if len(found) < len(SPLITS):
        raise DataError(f"{name}: has no {by}s in each of its splits; set ?by=class, or give the items a column '{by}'")
    if by == "domain":
        return found, list(loaded[0].domains)
    every = np.unique(np.concatenate(list(found.values())))
    every = every[every >= 0]
    numbered = {split: np.where(values < 0, -1, np.searchsorted(every, values)) for split, values in found.items()}
    return numbered, [f"group {n}" for n in every]


def _sequence(name: str, order: str, called: Sequence[str]) -> list[int]:
    """Return the numbers of the phases in the order of learning. CounterpointError for an order that is none of all phases."""
    if not order:
        return list(range(len(called)))
    given = [part.strip() for part in unquote(order).split(",")]
    at = [called.index(part) if part in called else int(part) if part.isdecimal() else -1 for part in given]
    if sorted(at) != list(range(len(called))):
        raise CounterpointError(
            f"{name}: order must hold each phase once, by name or number from 0, got '{order}'; the phases are "
            f"{', '.join(called)}"
        )
    return at


def _need_disjoint(name: str, items: Chosen, called: Sequence[str], classes: tuple[str, ...]) -> None:
    """Raise DataError for a class with training items in two phases."""
    if items.labels is None:
        raise DataError(f"{name}: has no classes, so ?disjoint=1 has nothing to compare; leave it out")
    known = items.labels >= 0
    pairs = np.unique(np.stack([items.labels[known], items.domains[known]], 1), axis=0)
    twice = np.flatnonzero(np.bincount(pairs[:, 0]) > 1)
    if len(twice):
        phases = [called[p] for p in pairs[pairs[:, 0] == twice[0], 1]]
        raise DataError(
            f"{name}: class '{classes[twice[0]]}' is in the phases {' and '.join(phases[:2])}, but a class-incremental stream "
            "has each class once; set ?by=class, or leave out ?disjoint=1"
        )
