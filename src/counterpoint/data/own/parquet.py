"""Read Parquet files: only the wanted columns, vectors as float32, and bytes beyond `KEEP` to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.own.arrow import is_numbers, pa, pc, pq, valid
from counterpoint.data.own.table import ArrowCells, Cells, Joined, RecordCells, Segment, Spool, SpooledCells
from counterpoint.errors import DataError

ROWS = 65_536  # maximum number of rows read at a time
HELD = 64 << 20  # approximate bytes of a batch
Wanted = Callable[[str], bool]


def read_parquet(path: Path, wanted: Wanted, spool: Spool) -> Segment:
    """Read a Parquet file.

    Args:
        path: The file.
        wanted: Returns whether a column of this name is read.
        spool: Stores the bytes of cells.

    Raises DataError when the file cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = list(schema.names)
            if len(set(names)) != len(names):
                raise DataError(f"{path}: has two columns of one name")
            usual, classes = known_columns(schema.metadata, names)
            read = [name for name in names if wanted(name) or name in usual]
            parts: dict[str, list[Cells]] = {name: [] for name in read}
            size = sum(file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups))
            rows = max(64, min(ROWS, HELD * max(1, file.metadata.num_rows) // max(1, size)))
            for batch in file.iter_batches(batch_size=rows, columns=read):
                for name in read:
                    parts[name].append(cells_of(batch.column(batch.schema.get_field_index(name)), spool))
            count = file.metadata.num_rows
    except DataError:
        raise
    except Exception as error:  # on damaged files pyarrow raises its own and Python's exceptions
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a Parquet file that can be read ({said})") from error
    columns: dict[str, Cells] = {name: Joined(found) for name, found in parts.items()}
    return Segment(path, count, columns, names=names, usual=usual, classes=classes)


def cells_of(array: Any, spool: Spool) -> Cells:
    """Return the cells of an Arrow array: vectors as float32, bytes in memory or in the spool."""
    kind = array.type
    if is_numbers(kind) and pa.types.is_floating(kind.value_type) and kind.value_type != pa.float32():
        # Values beyond float32 become infinite, which a later check reports.
        if pa.types.is_fixed_size_list(kind):
            array = array.cast(pa.list_(kind.value_type))
        return ArrowCells(array.cast(pa.large_list(pa.float32())))
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _bytes(array, spool)
    if pa.types.is_struct(kind):
        fields = [kind.field(n).name for n in range(kind.num_fields)]
        if "bytes" in fields and set(fields) <= {"bytes", "path"}:
            inner = pc.struct_field(array, "bytes")
            if pa.types.is_binary(inner.type) or pa.types.is_large_binary(inner.type):
                paths = ArrowCells(pc.struct_field(array, "path")) if "path" in fields else None
                return RecordCells(_bytes(inner, spool), paths)
    return ArrowCells(array)


def _bytes(array: Any, spool: Spool) -> Cells:
    array = array.cast(pa.large_binary())
    _, offsets, data = array.buffers()
    at = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    if data is None or spool.has_room(int(at[-1] - at[0])):
        return ArrowCells(array)
    descriptor, start = spool.write(data.slice(int(at[0]), int(at[-1] - at[0])))
    sizes = np.where(valid(array), np.diff(at), -1)
    return SpooledCells(descriptor, start + at[:-1] - at[0], sizes)


def known_columns(metadata: Any, names: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the columns' roles and the classes' names that `datasets` writes into a Parquet file."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {name: what for name, what in features.items() if isinstance(what, dict) and name in names}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, {}
    roles = {"Image": "image", "Audio": "audio", "Video": "video"}
    classes = {name: what["names"] for name, what in found.items() if isinstance(what.get("names"), list)}
    usual = {name: roles[kind] for name, what in found.items() if (kind := what.get("_type")) in roles}
    return usual, {name: [str(n) for n in labels] for name, labels in classes.items()}
