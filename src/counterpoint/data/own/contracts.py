"""Convert rows to the contracts of image data and aligned data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import ImageData, Indices, Pixels, some
from counterpoint.data.own.reader import Column, Reader
from counterpoint.data.own.splits import labels_of, split_rows
from counterpoint.data.pairs import AlignedColumns, AlignedData
from counterpoint.data.targets import Kind as TargetKind
from counterpoint.data.targets import TargetData, Targets
from counterpoint.errors import DataError
from counterpoint.words import counted


class OwnImages:
    """Pictures of some rows, decoded in advance or on demand; zeros where a row has none (an `ImageSplit`).

    Args:
        reader: The reader of the rows.
        column: The modality.
        rows: [n] rows of the table.
        labels: [n] class numbers, -1 for none. None: no row has a label.
        domains: [n] numbers of domains, -1 for none. None: no row has one.
    """

    def __init__(
        self,
        reader: Reader,
        column: Column,
        rows: Indices,
        labels: Indices | None = None,
        domains: Indices | None = None,
    ) -> None:
        assert column.sources is not None
        self.reader, self.column, self.rows, self.labels, self.domains = reader, column, rows, labels, domains
        self.sources = column.sources
        self.at = np.where(column.has[rows], column.sources.at[rows], -1)
        self.lacking = bool((self.at < 0).any())

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Pixels:
        """Return RGB pictures [n, size, size, 3] of n positions."""
        size = self.reader.wanted.size
        return np.asarray(self._get(indices, self.sources.pixels, (size, size, 3), self.sources.image), np.uint8)

    @property
    def same(self) -> Indices:
        """[len] numbers that are equal where pictures are the same."""
        return self.column.same[self.rows]

    def row_names(self, positions: Indices) -> list[str]:
        """Name items for a reader (see `counterpoint.data.images.Listed`)."""
        return self.reader.row_names(self.rows[positions])

    def files(self, positions: Indices, modality: str = "image") -> list[str | None]:
        """Return the path of each item's picture (see `counterpoint.data.images.Listed`)."""
        return self.reader.files(self.rows[positions], self.column.name)

    def _get(
        self, indices: Indices, kept: NDArray[Any] | None, shape: tuple[int, ...], decoded: Callable[[Any], Any]
    ) -> NDArray[Any]:
        at = self.at[indices]
        if kept is not None and not self.lacking:
            return kept[at]
        out = np.zeros((len(at), *shape), np.float32 if len(shape) == 1 else np.uint8)
        if kept is not None:
            out[at >= 0] = kept[at[at >= 0]]
            return out
        for n, (index, source) in enumerate(zip(np.asarray(indices), at, strict=True)):
            if source < 0:
                continue
            try:
                out[n] = decoded(self.sources.items[source])
            except DataError as error:
                row, table = int(self.rows[index]), self.reader.table
                what = "" if table.own_files else f" {self.column.role.column}"
                raise DataError(
                    f"{self.reader.place}: {table.short(row)}{what}: {error}. Its header was valid when the set was opened; "
                    "repair it and continue with --resume, or remove the row and start again"
                ) from error
        return out


class OwnWaves(OwnImages):
    """Sounds of some rows, decoded in advance or on demand; zeros where a row has none (a `WaveSplit`)."""

    def waves(self, indices: Indices) -> NDArray[np.float32]:
        """Return waves [n, samples] of n positions, mono in [-1, 1]."""
        shape = (self.reader.wanted.samples,)
        return self._get(indices, self.sources.waves, shape, lambda source: self.sources.sound(source).wave)


class OwnItems(AlignedColumns):
    """One split of rows in several modalities. Its items can be listed with their rows.

    Args:
        reader: The reader of the rows.
        name: Name of the split.
        rows: [n] rows of the table.
        labels: [all rows] class numbers. None: no row has a label.
        domains: [all rows] numbers of domains. None: there are none.
    """

    def __init__(
        self, reader: Reader, name: str, rows: Indices, labels: Indices | None, domains: Indices | None = None
    ) -> None:
        found: dict[str, Any] = {}
        for column in reader.columns:
            if column.gives == "image":
                found[column.name] = OwnImages(reader, column, rows)
            elif column.gives == "audio":
                found[column.name] = OwnWaves(reader, column, rows)
            else:
                found[column.name] = column.texts(rows) if column.gives == "text" else column.rows_of(rows)
        presence = {c.name: c.has[rows] for c in reader.columns if not c.has[rows].all()}
        super().__init__(
            found,
            None if labels is None else labels[rows],
            presence,
            None if domains is None else domains[rows],
            same={c.name: c.same[rows] for c in reader.columns},
        )
        self.reader, self.name, self.rows = reader, name, rows

    def row_names(self, positions: Indices) -> list[str]:
        """Name items for a reader (see `counterpoint.data.images.Listed`)."""
        return self.reader.row_names(self.rows[positions])

    def files(self, positions: Indices, modality: str) -> list[str | None]:
        """Return the path of each item's file in a modality (see `counterpoint.data.images.Listed`)."""
        return self.reader.files(self.rows[positions], modality)

    def list_items(self, modality: str, positions: Indices, what: str, reason: str) -> Path | None:
        """Write these items to the data's list, replacing earlier ones. Return its file, None if the list is empty."""
        return self.reader.list_rows(self.name, modality, self.rows[positions], what, reason)


def aligned_data(reader: Reader, name: str, test: str, valid: str, notes: list[str], least: int = 2) -> AlignedData:
    """Convert the rows to items of several modalities.

    Args:
        reader: The reader of the rows.
        name: Name of the data.
        test: The fraction of the items for the test split, or the name of that split.
        valid: The fraction of the training items for the valid split, or the name of that split.
        notes: Notes on how the place was read.
        least: Minimum number of modalities of the data and of an item of the splits, 1 or 2.

    Raises DataError when no row has a modality, or when a split would be empty.
    """
    place = reader.place
    # A column of videos without any sound counts as a column of pictures.
    reader.columns = [
        c for c in reader.columns if not (c.gives == "audio" and c.role.kind == "video") or (c.has & reader.good).any()
    ]
    for column in reader.columns:
        if not (column.has & reader.good).any():
            raise DataError(
                f"{place}: no usable row has the modality '{column.name}'; correct its column '{column.role.column}', or name "
                "another in the options (?columns=NAME:KIND,... of a manifest; ?image=, ?text= of other sources)"
            )
    if len(reader.columns) < least:
        raise DataError(
            f"{place}: '{reader.columns[0].name}' is the only modality; its videos have no sound, so add another"
        )
    labels, classes = labels_of(reader)
    domains, styles = labels_of(reader, what="domain")
    paired = np.sum([column.has for column in reader.columns], 0) >= least
    parts = split_rows(reader, paired, labels, test, valid)
    train, held = parts.train, parts.test
    lacks = []
    for column in reader.columns:
        if not column.has[train].any():
            raise DataError(
                f"{place}: the modality '{column.name}' is in no training row beside another, so it cannot be aligned; add rows "
                "with both"
            )
        if not column.has[held].any():
            lacks.append(f"{place}: no test row has the modality '{column.name}'")
        if len(parts.valid) and not column.has[parts.valid].any():
            lacks.append(f"{place}: no valid row has the modality '{column.name}'")
        every = np.concatenate([train, parts.valid, held])
        lacking = int((~column.has[every]).sum())
        if lacking:
            lacks.append(
                f"{place}: {lacking} of {counted(len(every), 'item lacks', 'items lack')} the modality '{column.name}'"
            )
    if len(parts.single):
        lacks.append(
            f"{place}: {counted(len(parts.single), 'row has', 'rows have')} only one modality, and form the split unpaired"
        )
    return AlignedData(
        name=name,
        train=OwnItems(reader, "train", train, labels, domains),
        valid=OwnItems(reader, "valid", parts.valid, labels, domains),
        test=OwnItems(reader, "test", held, labels, domains),
        modalities={column.name: reader.modality(column) for column in reader.columns},
        classes=classes,
        notes=_notes(reader, [*notes, *reader.notes, *parts.notes, *lacks]),
        domains=styles or (),
        unpaired=OwnItems(reader, "unpaired", parts.single, labels, domains) if len(parts.single) else None,
        accounts=reader.accounts,
    )


def image_data(reader: Reader, name: str, test: str, valid: str, notes: list[str], unseen: str = "") -> ImageData:
    """Convert the rows to pictures, with classes and domains where there are some (see `aligned_data` for the arguments).

    The rows of the domains in `unseen`, joined by commas, are in no split. They form `shifts["unseen"]`.
    """
    (column,) = reader.columns
    labels, classes = labels_of(reader)
    domains, styles = labels_of(reader, what="domain")
    usable, apart = column.has, None
    if words := [word.strip() for word in unseen.split(",") if word.strip()]:
        if domains is None or styles is None:
            raise DataError(f"{reader.place}: unseen: there are no domains; name their column with ?domain=COLUMN")
        if odd := [word for word in words if word not in styles]:
            raise DataError(f"{reader.place}: unseen: no domain '{odd[0]}'; its domains: {some(styles)}")
        apart = usable & reader.good & np.isin(domains, [styles.index(word) for word in words])
        usable = usable & ~apart
    parts = split_rows(reader, usable, labels, test, valid)
    three = tuple(rows if apart is None else rows[~apart[rows]] for rows in (parts.train, parts.valid, parts.test))
    if labels is not None:
        without = int((labels[np.concatenate(three)] < 0).sum())
        if without:
            notes = [
                *notes,
                f"{reader.place}: {counted(without, 'picture has', 'pictures have')} no class in '{reader.roles.label}'; systems "
                "that need classes leave "
                "them out",
            ]

    def images(rows: Indices) -> OwnImages:
        return OwnImages(reader, column, rows, *(None if of is None else of[rows] for of in (labels, domains)))

    train, watched, held = map(images, three)
    return ImageData(
        name,
        train,
        watched,
        held,
        classes or (),
        reader.wanted.size,
        _notes(reader, [*notes, *reader.notes, *parts.notes]),
        shifts={} if apart is None else {"unseen": images(np.flatnonzero(apart))},
        domains=styles or (),
        accounts=reader.accounts,
    )


def target_data(reader: Reader, name: str, test: str, valid: str, notes: list[str], channels: int = 1) -> TargetData:
    """Convert the rows to pictures, tables or series with their targets (see `aligned_data` for the other arguments).

    A row's series of length x channels numbers has all channels of its first step first.
    """
    (column,) = reader.columns
    role, place = column.role, reader.place
    if not (reader.good & column.has).any():
        raise DataError(f"{place}: no row has both its inputs and a number in the target '{reader.roles.target}'")
    parts = split_rows(reader, column.has, None, test, valid)
    kinds: dict[str, TargetKind] = {"image": "image", "vector": "series", "numbers": "table"}
    kind = kinds[role.kind]
    if kind == "series":
        assert column.vectors is not None
        numbers = column.vectors.shape[1]
        if channels < 1 or numbers % channels:
            raise DataError(f"{place}: series of {numbers} numbers cannot have channels={channels}; channels divide it")

    def split(rows: Indices) -> Targets:
        if kind == "image":
            pictures = OwnImages(reader, column, rows)
            return Targets(pictures, reader.targets[rows], pictures.row_names, pictures.files)
        values = column.rows_of(rows)
        values = values.reshape(len(rows), -1, channels) if kind == "series" else values
        return Targets(values, reader.targets[rows], lambda at: reader.row_names(rows[at]))

    names = role.columns if kind == "table" else [f"channel {n + 1}" for n in range(channels)]
    return TargetData(
        name,
        split(parts.train),
        split(parts.valid),
        split(parts.test),
        kind=kind,
        target=reader.roles.target,
        size=reader.wanted.size if kind == "image" else 0,
        columns=() if kind == "image" else tuple(names),
        notes=_notes(reader, [*notes, *reader.notes, *parts.notes]),
        accounts=reader.accounts,
    )


def _notes(reader: Reader, notes: list[str]) -> list[str]:
    """Return all notes, those on left-out rows first. Write the list, and check that the accounts balance."""
    reader.accounts.check()
    reader.accounts.write()
    guessed = [f"{reader.place}: {reader.roles.guessed}"] if reader.roles.guessed else []
    return [*reader.accounts.notes(), *guessed, *notes]
