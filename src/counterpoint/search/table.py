"""Make the table of a set's embeddings batch by batch, in bounded memory.

The embeddings of a batch depend on nothing outside of it, but for texts that occur more than once. So a table in one file, in
shards, or from several processes is the same, bit for bit.

Equal texts have equal embeddings, bit for bit. Those that occur more than once are embedded first, in the order of their first
occurrence. Their rows are in files, which are mapped into memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from counterpoint.errors import CounterpointError
from counterpoint.files import replacing
from counterpoint.search.encoder import BATCH, Encoder
from counterpoint.search.items import Items
from counterpoint.search.stored import RESERVED, WIDTH, WORDED, arrow, file_column, text_column
from counterpoint.waiting import patient_track

GROUP = 4096  # rows that are held before they are written: a row group of the file


class Batch(NamedTuple):
    """Consecutive items of a split that are encoded together."""

    split: str
    start: int
    stop: int

    @property
    def rows(self) -> NDArray[np.int64]:
        """The positions of the items in their split."""
        return np.arange(self.start, self.stop)


@dataclass(frozen=True)
class Layout:
    """The facts of a set that every process needs to make a part of its table."""

    batches: tuple[Batch, ...]
    files: tuple[str, ...]  # modalities of which at least one item has a path
    widths: dict[str, int]  # modality -> numbers of an embedding
    content: str  # digest of splits, names, labels, texts, and which modalities each item has

    @property
    def rows(self) -> int:
        """Count the items."""
        return sum(len(batch.rows) for batch in self.batches)


class Texts:
    """The texts of a modality that occur more than once in a set, by digest, with their embeddings."""

    def __init__(self, digests: NDArray[np.bytes_], rows: NDArray[np.float32]) -> None:
        self.digests, self.rows = digests, rows  # digests sorted, [n]; rows [n, dim]

    @classmethod
    def read(cls, folder: Path, number: int) -> Texts | None:
        """Map the texts of the modality with this number from their files; None where these are incomplete."""
        digests, rows = _places(folder, number)
        if not digests.is_file():  # written last
            return None
        return cls(np.load(digests), np.load(rows, mmap_mode="r"))

    def find(self, values: Sequence[Any]) -> NDArray[np.int64]:
        """Return the row of each text, -1 for a text that occurs once."""
        asked = digests_of(values)
        if not len(self.digests):
            return np.full(len(values), -1)
        at = np.searchsorted(self.digests, asked).clip(max=len(self.digests) - 1)
        return np.where(self.digests[at] == asked, at, -1)


def _places(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number}-digests.npy", folder / f"{number}-rows.npy"


def digests_of(values: Sequence[Any]) -> NDArray[np.bytes_]:
    """Return a digest of 16 bytes for each text, item or list of items, [n]."""
    found = [
        hashlib.blake2b(repr(value).encode("utf-8", "backslashreplace"), digest_size=16).digest() for value in values
    ]
    return np.array(found, "S16")


def batches_of(items: Items) -> tuple[Batch, ...]:
    """Divide the splits of a set into batches."""
    return tuple(
        Batch(split, at, min(at + BATCH, len(part)))
        for split, part in items.splits.items()
        for at in range(0, len(part), BATCH)
    )


def survey(items: Items, encoder: Encoder, folder: Path) -> Layout:
    """Read the names and texts of a set once, and embed the texts that occur more than once.

    Args:
        items: The set.
        encoder: The run.
        folder: An existing folder for the embeddings of these texts. Those that are there already are not made again.
    """
    batches = batches_of(items)
    worded = [name for name, kind in items.kinds.items() if kind in WORDED]
    digest = hashlib.blake2b(digest_size=16)
    found: dict[str, list[NDArray[np.bytes_]]] = {name: [np.zeros(0, "S16")] for name in worded}
    first: dict[str, tuple[str, str, NDArray[np.int64]]] = {}
    with_files: set[str] = set()
    for number in patient_track(range(len(batches)), "reading names and texts"):
        batch = batches[number]
        split, rows = batch.split, batch.rows
        digest.update(
            repr((batch, items.labels(split, rows), items.names(split, rows))).encode("utf-8", "backslashreplace")
        )
        for name in items.kinds:
            there = np.flatnonzero(items.present(split, name, rows))
            digest.update(there.tobytes())
            if len(there):
                first.setdefault(name, (split, name, rows[there[:1]]))
            if name in worded:
                values = items.column(split, name, rows)
                found[name].append(digests_of([values[n] for n in there]))
                digest.update(found[name][-1].tobytes())
            elif name not in with_files and any(path is not None for path in items.files(split, name, rows)):
                with_files.add(name)
    widths = {
        name: encoder.rows(name, items.column(*first[name])).shape[1] if name in first else 1 for name in items.kinds
    }
    for number, name in enumerate(worded):
        if Texts.read(folder, number) is None:
            _embed_texts(items, encoder, name, batches, found[name][1:], widths[name], _places(folder, number))
    return Layout(batches, tuple(name for name in items.kinds if name in with_files), widths, digest.hexdigest())


def _embed_texts(
    items: Items,
    encoder: Encoder,
    name: str,
    batches: Sequence[Batch],
    found: Sequence[NDArray[np.bytes_]],
    width: int,
    places: tuple[Path, Path],
) -> None:
    """Write the digests and embeddings of the texts that occur more than once.

    Args:
        items: The set.
        encoder: The run.
        name: A modality of texts.
        batches: The batches of the set.
        found: The digests of each batch's texts.
        width: Numbers of an embedding.
        places: The files of the digests and of the embeddings.
    """
    digests, index, counts = np.unique(
        np.concatenate([np.zeros(0, "S16"), *found]), return_index=True, return_counts=True
    )
    digests, index = digests[counts > 1], index[counts > 1]
    ends = np.cumsum([len(part) for part in found])
    order = np.argsort(index)
    home = np.searchsorted(ends, index[order], side="right")  # the batch of each text's first occurrence

    def texts() -> Iterator[Any]:
        for number in np.unique(home):
            batch = batches[number]
            values = items.column(batch.split, name, batch.rows)
            there = np.flatnonzero(items.present(batch.split, name, batch.rows))
            for at in index[order[home == number]] - (ends[number] - len(found[number])):
                yield values[there[at]]

    made = places[1].with_name(f"{places[1].name}.{os.getpid()}")
    with made.open("wb") as file:
        np.save(file, np.zeros((0, width), np.float32))
    if len(digests):
        rows, source = np.lib.format.open_memmap(made, "w+", np.float32, (len(digests), width)), texts()
        for at in patient_track(range(0, len(digests), BATCH), f"embedding each {name} that occurs more than once"):
            part = order[at : at + BATCH]
            rows[part] = encoder.rows(name, [next(source) for _ in part])
        rows.flush()
    os.replace(made, places[1])
    with replacing(places[0]) as out:
        np.save(out, digests)


class Maker:
    """Makes the rows of a set's table.

    Args:
        items: The set.
        encoder: The run.
        layout: What `survey` found.
        folder: The folder where it put texts.
    """

    def __init__(self, items: Items, encoder: Encoder, layout: Layout, folder: Path) -> None:
        self.items, self.encoder, self.layout = items, encoder, layout
        self.texts: dict[str, Texts] = {}
        self.progress: Callable[[int], None] = lambda rows: None  # receives the number of rows of each batch
        for number, name in enumerate(self.worded):
            texts = Texts.read(folder, number)
            if texts is None:
                raise CounterpointError(f"{folder} is gone: another process removed it; give the same command again")
            self.texts[name] = texts

    @property
    def worded(self) -> list[str]:
        """The modalities that a column of texts shows."""
        return [name for name, kind in self.items.kinds.items() if kind in WORDED]

    @cached_property
    def schema(self) -> Any:
        """The columns of the table, with their types."""
        pa, _ = arrow()
        words = [name for name in RESERVED if name != "item"] + [text_column(name) for name in self.worded]
        words += [file_column(name) for name in self.layout.files]
        # Not lists of a fixed size: pyarrow below 25 neither writes nor reads their nulls.
        numbers = pa.list_(pa.float32())
        vectors = [
            pa.field(f"{name}_embedding", numbers, metadata={WIDTH: str(self.layout.widths[name])})
            for name in self.items.kinds
        ]
        return pa.schema([pa.field("item", pa.int64()), *(pa.field(name, pa.string()) for name in words), *vectors])

    def table(self, batch: Batch) -> Any:
        """Return the rows of a batch, a pyarrow Table."""
        pa, _ = arrow()
        items, split, rows = self.items, batch.split, batch.rows
        columns: dict[str, Any] = {
            "item": rows,
            "split": [split] * len(rows),
            "label": items.labels(split, rows),
            "source": items.names(split, rows),
        }
        columns |= {file_column(name): items.files(split, name, rows) for name in self.layout.files}
        for name in items.kinds:
            values, there = items.column(split, name, rows), items.present(split, name, rows)
            width = self.layout.widths[name]
            made = np.zeros((len(rows), width), np.float32)
            if name in self.texts:
                columns[text_column(name)] = items.words(name, values)
                made[there] = self._embedded(name, [values[n] for n in np.flatnonzero(there)], width)
            elif there.any():
                made[there] = self.encoder.rows(name, values if there.all() else values[there])
            starts = width * np.concatenate([[0], np.cumsum(there)])
            columns[f"{name}_embedding"] = pa.ListArray.from_arrays(
                pa.array(starts, pa.int32()), pa.array(made[there].ravel()), mask=pa.array(~there)
            )
        return pa.table(columns, schema=self.schema)

    def _embedded(self, name: str, values: Sequence[Any], width: int) -> NDArray[np.float32]:
        """Return the embeddings of a batch's texts: those that occur more than once are there, the others are encoded."""
        at = self.texts[name].find(values)
        made = np.zeros((len(values), width), np.float32)
        made[at >= 0] = self.texts[name].rows[at[at >= 0]]
        new = np.flatnonzero(at < 0)
        if len(new):
            made[new] = self.encoder.rows(name, [values[int(n)] for n in new])
        return made

    def write(self, batches: Sequence[Batch], path: Path, said: Mapping[bytes, bytes]) -> int:
        """Write batches to a Parquet file, atomically. Return the number of rows. At most GROUP rows and a batch are held."""
        pa, pq = arrow()
        schema = self.schema.with_metadata(said)
        words = [field.name for field in schema if pa.types.is_string(field.type)]
        count, held = 0, []
        with replacing(path) as file, pq.ParquetWriter(file, schema, use_dictionary=words) as writer:
            for number, batch in enumerate(batches):
                held.append(self.table(batch))
                count += len(held[-1])
                self.progress(len(held[-1]))
                if number + 1 == len(batches) or sum(map(len, held)) >= GROUP:
                    writer.write_table(pa.concat_tables(held), row_group_size=GROUP + BATCH)
                    held = []
        return count
