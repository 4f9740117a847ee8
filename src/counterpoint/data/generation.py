"""The contract of conditions and pictures: the form that every source for the task `generation` returns (numpy only, no torch).

An item is a picture with its caption. It may have a class, and a subject: one object that several pictures show. A condition is
what a learner makes a picture of: a text, with or without pictures of a subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import ImageSplit, Indices, Pixels, checked_labels
from counterpoint.data.pairs import AlignedData, AlignedSplit
from counterpoint.errors import DataError
from counterpoint.words import counted

PLACEHOLDER = "subject"  # the word of a caption that stands for the subject


@dataclass(frozen=True)
class Condition:
    """What a picture is made of: a text, and pictures of a subject."""

    text: str
    subject: Sequence[NDArray[np.uint8]] = ()  # [size, size, 3] each


class GenerationSplit:
    """Pictures with captions in order. Positions are stable: the same number is the same item in every process and run.

    Args:
        images: [n] pictures.
        captions: [n] texts, none of them empty.
        labels: [n] class numbers, -1 for an item without a class. Default: no item has one.
        subjects: [n] numbers of subjects, -1 for none: pictures of one number show one subject. Default: none.

    Raises DataError for captions, labels or subjects that are not n, and for an empty caption.
    """

    def __init__(
        self,
        images: ImageSplit,
        captions: Sequence[str],
        labels: Indices | None = None,
        subjects: Indices | None = None,
    ) -> None:
        if len(captions) != len(images):
            raise DataError(
                f"{counted(len(images), 'picture has', 'pictures have')} {counted(len(captions), 'caption')}; give one for each"
            )
        empty = [n for n, text in enumerate(captions) if not text.strip()]
        if empty:
            raise DataError(
                f"{counted(len(empty), 'caption is', 'captions are')} empty, the first is number {empty[0]}; leave out their "
                "pictures"
            )
        self.pictures, self.captions = images, list(captions)
        found = checked_labels(labels, len(images))
        self.labels: Indices = np.full(len(images), -1, np.int64) if found is None else found
        self.subjects = checked_labels(subjects, len(images))

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Indices) -> Pixels:
        """Return the pictures at [n] positions: uint8 [n, size, size, 3]."""
        return self.pictures.images(indices)


@dataclass(frozen=True)
class GenerationData:
    """A source's splits, and the facts needed to read them."""

    name: str
    train: GenerationSplit
    valid: GenerationSplit  # to monitor training and to choose settings
    test: GenerationSplit  # evaluated once, at the end
    size: int  # pixels, height and width
    classes: tuple[str, ...] = ()  # empty without labels
    subjects: tuple[str, ...] = ()  # names of the subjects; empty without subjects
    # Remarks for the user on this data: rows left out, splits made.
    notes: list[str] = field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {
            "size": self.size,
            "examples": len(self.train),
            "classes": len(self.classes),
            "class_names": list(self.classes),
        }


def unknown_notes(source: str, *splits: GenerationSplit) -> list[str]:
    """Count the captions without a known class, in a note for each of train, valid and test that has any; name the first."""
    without = [np.flatnonzero(split.labels < 0) for split in splits]
    return [
        f"{source}: {len(rows)} of {len(split)} {name} captions have no known class, the first is number {rows[0]}, "
        f"'{split.captions[rows[0]][:40]}'; each counts as a class of its own"
        for name, rows, split in zip(("train", "valid", "test"), without, splits, strict=True)
        if len(rows)
    ]


class _Column:
    """The pictures of some rows of aligned data (an `ImageSplit`)."""

    labels = features = domains = None

    def __init__(self, split: AlignedSplit, modality: str, rows: Indices) -> None:
        self.split, self.modality, self.rows = split, modality, rows

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Pixels:
        """Return the pictures at [n] positions."""
        return np.asarray(self.split.column(self.modality, self.rows[indices]), np.uint8)


def of_aligned(data: AlignedData) -> GenerationData:
    """Take pictures and captions of aligned data. Rows that lack one of them are left out and counted.

    Raises DataError for data without a modality of pictures or of texts, and for a split that would be empty.
    """
    names: dict[str, str] = {}
    for name, modality in data.modalities.items():
        names.setdefault(modality.kind, name)
    for kind, what in (("image", "pictures"), ("text", "captions")):
        if kind not in names:
            raise DataError(
                f"{data.name} has no {what}, which generation needs; its modalities: {', '.join(data.modalities)}"
            )
    size = data.modalities[names["image"]].size
    assert size is not None
    notes, splits = list(data.notes), []
    for name in ("train", "valid", "test"):
        split: AlignedSplit = getattr(data, name)
        every = np.arange(len(split))
        texts = [str(text) for text in split.column(names["text"], every)]
        both = split.present(names["image"], every) & np.array([bool(text.strip()) for text in texts], bool)
        rows = np.flatnonzero(both)
        if not len(rows):
            raise DataError(f"{data.name}: no {name} row has a picture and a caption; add such rows")
        if len(rows) < len(split):
            notes.append(
                f"{data.name}: {len(split) - len(rows)} {name} rows lack a picture or a caption and are left out"
            )
        labels = None if split.labels is None else split.labels[rows]
        splits.append(GenerationSplit(_Column(split, names["image"], rows), [texts[row] for row in rows], labels))
    if data.classes:
        notes += unknown_notes(data.name, *splits)
    train, valid, test = splits
    return GenerationData(data.name, train, valid, test, size, tuple(data.classes or ()), notes=notes)
