"""Read embeddings: a Parquet table with one row for each item, in a file or in a folder of shards."""

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
from counterpoint.files import quoted
from counterpoint.words import counted

WORDED = ("text", "history", "set", "item")  # kinds of modalities that a column of texts shows
RESERVED = ("item", "split", "label", "source")  # columns that are not texts of a modality
WIDTH = b"width"  # key of the numbers in a row, in the metadata of a column of embeddings


@dataclass(frozen=True, repr=False)
class Embeddings:
    """The table of a file or folder that `embed` wrote."""

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
        return f"<embeddings of {counted(len(self.item), 'item', commas=True)} in {self.path}: {of}; by {self.run}>"

    def stamp(self, modality: str) -> str:
        """Return a digest of an index's content: the weights' key, the presence of rows, and their values."""
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


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"part-{number:05d}.parquet"


def is_shard(name: str) -> bool:
    """Return whether a file's name is that of a shard."""
    return re.fullmatch(r"part-\d{5,}\.parquet", name) is not None


def shards_of(folder: Path) -> list[Path]:
    """List the shards in a folder, in order; empty for a folder without shards, and for a file."""
    return sorted(file for file in folder.glob("part-*.parquet") if is_shard(file.name))


def check_embeddings(path: Path | str) -> Path:
    """Return the path of a file of embeddings, or of a folder of shards. DataError when it is missing."""
    check_local(path, "embeddings are a file")
    path = Path(path)
    if path.is_dir():
        if not shards_of(path):
            raise DataError(f"{path} is a folder without shards; name the file or folder that counterpoint embed wrote")
    elif not path.is_file():
        raise DataError(f"{path}: no such file; make it: counterpoint embed RUN -o {quoted(path)}")
    return path


def facts_of(path: Path) -> tuple[dict[str, Any], int]:
    """Return what a file or folder of embeddings says about itself, and its number of rows. Read no rows.

    Raises DataError when `embed` did not write it, when it is damaged, and when shards are missing.
    """
    pa, pq = arrow()
    try:
        about = [pq.read_metadata(file) for file in shards_of(path) or [path]]
        said = [json.loads((one.metadata or {})[b"counterpoint"]) for one in about]
        first = dict(said[0])
        first["modalities"] = {str(name): str(kind) for name, kind in dict(first["modalities"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    if path.is_dir():
        if any(one.get("key") != first["key"] or one.get("content") != first.get("content") for one in said):
            raise DataError(f"{path} mixes shards of different tables; remove it, and embed again")
        if [one.get("shard") for one in said] != list(range(int(first.get("shards", 0)))):
            raise DataError(
                f"{path} has {len(said)} of {first.get('shards')} shards; the command that wrote them continues: "
                f"counterpoint embed {first.get('run')} -o {path}/"
            )
    return first, sum(int(one.num_rows) for one in about)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: not a file that counterpoint embed wrote, or damaged ({str(error).splitlines()[0][:160]})"
    )


def read_embeddings(path: Path | str) -> Embeddings:
    """Read a file or a folder of shards that `embed` wrote.

    Search excludes rows that are not finite, and `notes` counts them. Raises DataError when `embed` did not write the file,
    when it is damaged, and when shards are missing.
    """
    pa, pq = arrow()
    path = check_embeddings(path)
    said, rows = facts_of(path)
    modalities: dict[str, str] = said["modalities"]
    words: dict[str, list[str | None]] = {}
    item = np.empty(rows, np.int64)
    vectors: dict[str, NDArray[np.float32]] = {}
    present = {name: np.zeros(rows, bool) for name in modalities}
    numbers = {f"{name}_embedding" for name in modalities} | {"item"}
    try:
        at = 0
        for file in shards_of(path) or [path]:
            with pq.ParquetFile(file) as opened:
                for group in range(opened.num_row_groups):  # so that few rows are in memory twice
                    table = opened.read_row_group(group)
                    here = slice(at, at + len(table))
                    for name in modalities:
                        column = f"{name}_embedding"
                        values, present[name][here] = _rows(table[column].combine_chunks(), table.field(column))
                        vectors.setdefault(name, np.zeros((rows, values.shape[1]), np.float32))[here] = values
                    item[here] = table["item"].to_numpy()
                    for name in table.column_names:
                        if name not in numbers:
                            words.setdefault(name, []).extend(table[name].to_pylist())
                    at += len(table)
        notes = []
        for name in modalities:
            values = vectors.setdefault(name, np.zeros((rows, 1), np.float32))
            if (bad := ~np.isfinite(values).all(1)).any():
                notes.append(
                    f"{path}: the search leaves out {counted(int(bad.sum()), 'embedding')} of {name} with NaN or infinite values"
                )
                values[bad], present[name][bad] = 0, False
        for name in ("split", "label", *(text_column(name) for name, kind in modalities.items() if kind in WORDED)):
            if rows and name not in words:
                raise KeyError(name)
            words.setdefault(name, [])
        return Embeddings(
            path,
            str(said["run"]),
            str(said["key"]),
            modalities,
            item,
            [str(name) for name in words["split"]],
            words["label"],
            {name: words[text_column(name)] for name, kind in modalities.items() if kind in WORDED},
            vectors,
            present,
            words.get("source", [None] * rows),
            {name: words[file_column(name)] for name in modalities if file_column(name) in words},
            str(said.get("data", "")),
            notes,
        )
    except (KeyError, ValueError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _rows(column: Any, about: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a column's vectors [n, dim], with zeros for nulls, and the mask [n] of its other rows. Read them only."""
    pa, _ = arrow()
    there = np.asarray(column.is_valid())
    found = column.drop_null() if column.null_count else column
    if pa.types.is_fixed_size_list(column.type):  # as earlier versions wrote it
        width = column.type.list_size
    else:
        width = int((about.metadata or {})[WIDTH])
        if (np.diff(found.offsets) != width).any():
            raise ValueError(f"{about.name} has a row that does not have {width} numbers")
    rows = found.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    if not column.null_count:
        return rows, there
    values = np.zeros((len(column), width), np.float32)
    values[there] = rows
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
