"""Read the file of embeddings: a Parquet table, one row for each item."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.errors import DataError

WORDED = ("text", "history", "set", "item")  # kinds of modalities that a column of texts shows
RESERVED = ("item", "split", "label", "source")  # columns that are not texts of a modality


@dataclass(frozen=True, repr=False)
class Embeddings:
    """A file that `embed` wrote."""

    path: Path
    run: str
    key: str  # digest of the run's weights: embeddings of other weights cannot be compared with a query's
    modalities: dict[str, str]  # name -> kind
    item: NDArray[np.int64]
    split: list[str]
    label: list[str | None]
    texts: dict[str, list[str | None]]
    vectors: dict[str, NDArray[np.float32]]  # name -> [n, dim], zeros where the item lacks the modality
    present: dict[str, NDArray[np.bool_]]
    source: list[str | None]  # the item's own file, or its row of a table
    files: dict[str, list[str | None]] = field(default_factory=dict)  # modality -> path of its picture, sound or video
    data: str = ""  # the data source
    notes: list[str] = field(default_factory=list)
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:
        of = ", ".join(f"{name} ({rows.shape[1]} numbers)" for name, rows in self.vectors.items())
        return f"<embeddings of {len(self.item):,} items in {self.path}: {of}; by {self.run}>"

    def stamp(self, modality: str) -> str:
        """Return a digest of a graph's content: the weights' key, the presence of rows, and their values."""
        name = f"stamp of {modality}"
        if name not in self.memo:
            vectors = self.vectors[modality]
            digest = hashlib.blake2b(f"{self.key} {vectors.shape}".encode(), digest_size=16)
            digest.update(self.present[modality].tobytes())
            digest.update(np.ascontiguousarray(vectors).data)
            self.memo[name] = digest.hexdigest()
        return str(self.memo[name])

    def largest(self, modality: str) -> float:
        """Return the largest norm of a row."""
        name = f"largest of {modality}"
        if name not in self.memo:
            vectors = self.vectors[modality]
            squares = np.einsum("ij,ij->i", vectors, vectors)
            self.memo[name] = float(np.sqrt(squares.max(initial=0.0)))
        return float(self.memo[name])


def text_column(name: str) -> str:
    """Return the column name of a text modality."""
    return f"{name}_text" if name in RESERVED else name


def file_column(name: str) -> str:
    """Return the name of the column with a modality's paths."""
    return f"{name}_file"


def arrow() -> tuple[Any, Any]:
    """Import pyarrow, which is slow to import, only when a file is read or written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa, pq


def check_local(name: Path | str, what: str) -> None:
    """Raise DataError when a name is a URL, even one without the slash that `Path` drops."""
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])", str(name)):
        url = f"{match[1]}://{str(name)[match.end() :]}"
        raise DataError(f"{url} is a URL; {what} on this machine: download it and give its path")


def check_embeddings(path: Path | str) -> Path:
    """Return the path of a file of embeddings. DataError when the file is missing."""
    check_local(path, "embeddings are a file")
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            raise DataError(f"{path} is a folder; name the file that counterpoint embed wrote")
        raise DataError(f"{path}: no such file; make it: counterpoint embed RUN -o {path}")
    return path


def read_embeddings(path: Path | str) -> Embeddings:
    """Read a file that `embed` wrote.

    Search excludes rows that are not finite, and `notes` counts them. Raises DataError when `embed` did not write the file,
    or when it is damaged.
    """
    pa, pq = arrow()
    path = check_embeddings(path)
    try:
        table = pq.read_table(path)
        said = json.loads((table.schema.metadata or {})[b"counterpoint"])
        modalities = dict(said["modalities"])
        vectors, present, notes = {}, {}, []
        for name in modalities:
            values, there = _rows(table[f"{name}_embedding"].combine_chunks())
            finite = np.isfinite(values).all(1)
            if not finite.all():
                notes.append(f"{path}: {int((~finite).sum())} embeddings of {name} are not finite and are not searched")
                values[~finite], there = 0, there & finite
            vectors[name], present[name] = values, there
        names = set(table.column_names)
        return Embeddings(
            path,
            str(said["run"]),
            str(said["key"]),
            modalities,
            table["item"].to_numpy(),
            table["split"].to_pylist(),
            table["label"].to_pylist(),
            {name: table[text_column(name)].to_pylist() for name, kind in modalities.items() if kind in WORDED},
            vectors,
            present,
            table["source"].to_pylist() if "source" in names else [None] * len(table),
            {name: table[file_column(name)].to_pylist() for name in modalities if file_column(name) in names},
            str(said.get("data", "")),
            notes,
        )
    except (KeyError, ValueError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: not a file that counterpoint embed wrote, or damaged ({str(error).splitlines()[0][:160]})"
        ) from error


def _rows(column: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a column's vectors [n, dim], with zeros for nulls, and the mask [n] of its other rows."""
    dim = column.type.list_size
    if not column.null_count:
        flat = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
        return np.require(flat, np.float32, ["C", "W"]), np.ones(len(column), bool)
    there = np.asarray(column.is_valid())
    values = np.zeros((len(column), dim), np.float32)
    values[there] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return values, there


@dataclass(frozen=True)
class Hit:
    """One hit of a search."""

    rank: int  # from 1
    similarity: float  # dot product of the embeddings; their cosine where these are unit rows
    item: int  # position in its split
    split: str
    label: str | None
    texts: dict[str, str]  # the item's texts, by modality
    source: str | None = None  # the item's own file, or its row of a table
    files: dict[str, str] = field(default_factory=dict)  # modality -> path of its picture, sound or video
    count: int = 1  # number of items with the same text or file in the searched modality; they are one hit
    others: list[str] = field(default_factory=list)  # names of the other items of the hit

    @property
    def name(self) -> str:
        """The item's name for a reader: its source, or its split and position."""
        return self.source or f"{self.split} {self.item}"
