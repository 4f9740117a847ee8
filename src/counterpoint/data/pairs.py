"""The contract of aligned data: items seen in several modalities at once, for the task `aligned` (numpy only, no torch).

An item is one row of every modality's column: a picture and its caption, a name and its sound. There can be any number of
modalities, and an item may lack some of them (`present`).

    kind    values of a column at n positions               facts of its Modality
    image   uint8 [n, size, size, 3] RGB                    size
    text    list of n strings, "" where missing
    audio   float32 [n, samples], mono in [-1, 1]           rate, samples
    vector  float32 [n, dim]                                dim

Items may be parts of a larger whole, such as a page of a score or a recording (`groups`). Retrieval can also look for the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts
from counterpoint.data.images import ImageSplit, Indices, checked_labels
from counterpoint.errors import DataError, unknown

Kind = Literal["image", "text", "audio", "vector"]
Column = NDArray[np.uint8] | NDArray[np.float32] | list[str]


@dataclass(frozen=True)
class Modality:
    """The kind of a column's values, and their sizes; facts that do not apply to the kind are None."""

    kind: Kind
    size: int | None = None  # pixels of an image, height and width
    rate: int | None = None  # samples per second of audio
    samples: int | None = None  # of every audio item
    dim: int | None = None  # of a vector

    @property
    def spec(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@runtime_checkable
class WaveSplit(Protocol):
    """Sounds that are read on access, as `ImageSplit` is for pictures."""

    def __len__(self) -> int: ...

    def waves(self, indices: Indices) -> NDArray[np.float32]:
        """Return the sounds at [n] positions: [n, samples], mono in [-1, 1]."""
        ...


@runtime_checkable
class TextSplit(Protocol):
    """Texts that are read many at a time, which is faster than one by one where arrays hold them."""

    def __len__(self) -> int: ...

    def texts(self, indices: Indices) -> list[str]:
        """Return the texts at [n] positions, "" where an item has none."""
        ...


class AlignedSplit(Protocol):
    """One split of an aligned set. Positions are stable: the same number is the same item in every process and run."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Indices | None:
        """[len] class numbers, -1 for an item without a class; None without labels."""
        ...

    @property
    def domains(self) -> Indices | None:
        """[len] numbers of `AlignedData.domains`; None without domains."""
        ...

    @property
    def groups(self) -> Indices | None:
        """[len] numbers of the whole that each item is part of, the same in every split; None for independent items."""
        ...

    def column(self, modality: str, indices: Indices) -> Column:
        """Return one modality of the items at [n] positions: zeros, or an empty string, where an item lacks it."""
        ...

    def present(self, modality: str, indices: Indices) -> NDArray[np.bool_]:
        """Return [n], true for items that have this modality."""
        ...


def rows_with(split: AlignedSplit, *modalities: str) -> Indices:
    """Return the positions of the items that have all of these modalities."""
    rows = np.arange(len(split))
    return rows[np.logical_and.reduce([split.present(name, rows) for name in modalities])]


@dataclass(frozen=True)
class AlignedData:
    """A source's three splits, and the facts needed to read them."""

    name: str
    train: AlignedSplit
    valid: AlignedSplit  # to monitor training and to choose settings
    test: AlignedSplit  # evaluated once, at the end
    modalities: dict[str, Modality]  # in the order of reports
    classes: tuple[str, ...] | None = None
    # Remarks for the user on this data: items left out, splits made.
    notes: list[str] = field(default_factory=list)
    # Names of the items' origins (drawing styles, voices), as opposed to their subjects.
    domains: tuple[str, ...] = ()
    # Whether the domains are phases, to be learned one after another (see data/streams.py).
    stream: bool = False
    # More test splits by name, from other domains than the training split.
    shifts: dict[str, AlignedSplit] = field(default_factory=dict)
    # Items in one modality each, to train on one modality alone: many, and often of a domain without pairs.
    unpaired: AlignedSplit | None = None
    # Numbers found, read and left out, of sources that read the user's own files.
    accounts: Accounts | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {
            "modalities": {name: modality.spec for name, modality in self.modalities.items()},
            "classes": len(self.classes or ()),
        }


class ArrayWaves:
    """Sounds in memory: a `WaveSplit`.

    Args:
        sounds: int16 [N, samples].
    """

    def __init__(self, sounds: NDArray[np.int16]) -> None:
        self.sounds = sounds

    def __len__(self) -> int:
        return len(self.sounds)

    def waves(self, indices: Indices) -> NDArray[np.float32]:
        """Return the sounds at [n] positions: [n, samples] in [-1, 1]."""
        return self.sounds[indices].astype(np.float32) / np.float32(32768)


class AlignedColumns:
    """A split made of columns of one length: an `AlignedSplit`.

    Args:
        columns: modality -> an `ImageSplit` for images, a sequence of strings for text, a float32 array [N, dim or
            samples] for vectors and audio, or a `WaveSplit` for audio.
        labels: [N] class numbers. Default: no labels.
        presence: modality -> [N] bool; every item has a modality that is not named here.
        domains: [N] domain numbers. Default: no domains.
        groups: [N] numbers of the whole that each item is part of. Default: items are independent.
        same: modality -> [N] numbers, equal where items have the same picture, sound, text or vector; -1 where an item
            lacks it. Default: not known.

    Raises DataError when the columns differ in length.
    """

    def __init__(
        self,
        columns: Mapping[str, ImageSplit | WaveSplit | Sequence[str] | NDArray[np.float32]],
        labels: Indices | None = None,
        presence: Mapping[str, NDArray[np.bool_]] | None = None,
        domains: Indices | None = None,
        groups: Indices | None = None,
        same: Mapping[str, Indices] | None = None,
    ) -> None:
        if not columns:
            raise DataError("aligned data needs at least one modality")
        lengths = {name: len(column) for name, column in columns.items()}
        lengths |= {f"presence of {name}": len(mask) for name, mask in (presence or {}).items()}
        lengths |= {f"numbers of {name}": len(numbers) for name, numbers in (same or {}).items()}
        if len(set(lengths.values())) > 1:
            raise DataError("columns differ in length: " + ", ".join(f"{k} {v}" for k, v in lengths.items()))
        self.columns = dict(columns)
        self.presence = {name: np.asarray(mask, bool) for name, mask in (presence or {}).items()}
        self.count = next(iter(lengths.values()))
        self.labels = checked_labels(labels, self.count)
        self.domains = checked_labels(domains, self.count)
        self.groups = checked_labels(groups, self.count)
        self._same = {name: np.asarray(numbers, np.int64) for name, numbers in (same or {}).items()}

    def same(self, modality: str) -> Indices | None:
        """Return [N] numbers that are equal where items have equal content in a modality, -1 where they lack it.

        None where this is not known.
        """
        self._known(modality)
        return self._same.get(modality)

    def __len__(self) -> int:
        return self.count

    def column(self, modality: str, indices: Indices) -> Column:
        column = self._known(modality)
        if isinstance(column, np.ndarray):
            return np.asarray(column[indices], np.float32)
        if isinstance(column, TextSplit):
            return column.texts(indices)
        if isinstance(column, Sequence):
            return [column[int(index)] for index in indices]
        return column.waves(indices) if isinstance(column, WaveSplit) else column.images(indices)

    def present(self, modality: str, indices: Indices) -> NDArray[np.bool_]:
        self._known(modality)
        mask = self.presence.get(modality)
        return np.ones(len(indices), bool) if mask is None else mask[indices]

    def _known(self, modality: str) -> ImageSplit | WaveSplit | Sequence[str] | NDArray[np.float32]:
        if modality not in self.columns:
            raise unknown("modality", modality, self.columns)
        return self.columns[modality]
