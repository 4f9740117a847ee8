"""The contract of aligned data: items seen in several modalities at once, for the task `aligned` (numpy only, no torch).

An item is one row of every modality's column: a picture and its caption, a name and its sound. Any number of modalities
can stand side by side, and an item may lack some of them (`present`).

    kind    what a column hands over for n positions        facts of its Modality
    image   uint8 [n, size, size, 3] RGB                    size
    text    list of n strings, "" where missing
    audio   float32 [n, samples], mono in [-1, 1]           rate, samples
    vector  float32 [n, dim]                                dim

Items may be cut from something larger, a page of a score or a recording (`groups`), by which they can be sought too.
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
    """What kind of thing a column holds; facts that do not apply to its kind are None."""

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
    """Sounds that are read when asked for: what `ImageSplit` is for pictures."""

    def __len__(self) -> int: ...

    def waves(self, indices: Indices) -> NDArray[np.float32]:
        """[n] positions -> [n, samples], mono in [-1, 1]."""
        ...


@runtime_checkable
class TextSplit(Protocol):
    """Texts that are read many at a time: faster than one by one where they are held in arrays."""

    def __len__(self) -> int: ...

    def texts(self, indices: Indices) -> list[str]:
        """[n] positions -> n texts, "" where an item has none."""
        ...


class AlignedSplit(Protocol):
    """One split of an aligned set. Positions are stable: the same number is the same item in every process and run."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Indices | None:
        """[len] class numbers, -1 for an item of no class; None when nothing is labelled."""
        ...

    @property
    def domains(self) -> Indices | None:
        """[len] numbers of `AlignedData.domains`; None when there are none."""
        ...

    @property
    def groups(self) -> Indices | None:
        """[len] numbers of what an item was cut from, the same in every split; None when items stand for themselves."""
        ...

    def column(self, modality: str, indices: Indices) -> Column:
        """One modality of the items at n positions; what stands where it is missing is zeros or an empty string."""
        ...

    def present(self, modality: str, indices: Indices) -> NDArray[np.bool_]:
        """[n] whether each of the items has this modality."""
        ...


@dataclass(frozen=True)
class AlignedData:
    """A source's three splits and what is needed to read them."""

    name: str
    train: AlignedSplit
    valid: AlignedSplit  # training is watched on it, and settings are chosen on it
    test: AlignedSplit  # measured once, at the end
    modalities: dict[str, Modality]  # in the order in which reports name them
    classes: tuple[str, ...] | None = None
    # What the user should know about this data: items left out, splits made.
    notes: list[str] = field(default_factory=list)
    # Where items come from (drawing styles, voices): not what they are about.
    domains: tuple[str, ...] = ()
    # More test splits by name, from other domains than the training split.
    shifts: dict[str, AlignedSplit] = field(default_factory=dict)
    # Items in one modality each, to learn a modality from by itself: many, and often of a domain that has no pairs.
    unpaired: AlignedSplit | None = None
    # What was found, read and left out, of sources that read the user's own files.
    accounts: Accounts | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The facts a learner is built from, fit for JSON."""
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
        """[n] positions -> [n, samples] in [-1, 1]."""
        return self.sounds[indices].astype(np.float32) / np.float32(32768)


class AlignedColumns:
    """A split made of columns of one length.

    Args:
        columns: modality -> an `ImageSplit` for images, a sequence of strings for text, a float32 array [N, dim or
            samples] for vectors and audio, or a `WaveSplit` for audio.
        labels: [N] class numbers.
        presence: modality -> [N] bool; a modality that is not named is never missing.
        domains: [N] domain numbers.
        groups: [N] numbers of what items were cut from.
        same: modality -> [N] numbers that are equal where items are one thing in it: the same picture, sound, text or
            vector; -1 where an item lacks it. Default: nothing is known of that.

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
        """Numbers of all items that are equal where items are one thing in a modality, -1 where they lack it.

        None where nothing is known of that.
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
