"""Read tables of Lance, which are folders (`items.lance`), batch by batch as Parquet files are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from counterpoint.data.own.arrow import pa
from counterpoint.data.own.parquet import HELD, ROWS, cells_of, known_columns
from counterpoint.data.own.table import Cells, Joined, Segment, Spool
from counterpoint.errors import DataError, needs_extra

Wanted = Callable[[str], bool]


def read_lance(path: Path, wanted: Wanted, spool: Spool) -> Segment:
    """Read the newest version of a table. Deleted rows are not rows; the others are numbered from 1.

    Args:
        path: The table's folder.
        wanted: Returns whether a column of this name is read.
        spool: Stores the bytes of cells.

    Raises CounterpointError without the package pylance, DataError when the table cannot be read.
    """
    try:
        import lance
    except ImportError as error:
        raise needs_extra("lance:", "lance") from error
    try:
        table = lance.dataset(str(path))
        schema = table.schema
        names = list(schema.names)
        usual, classes = known_columns(schema.metadata, names)
        read = [name for name in names if wanted(name) or name in usual]
        parts: dict[str, list[Cells]] = {name: [] for name in read}
        # Blobs are stored beside the table. Without `all_binary` a scan returns only their places.
        batches = table.scanner(
            columns=read, batch_size=ROWS, batch_size_bytes=HELD, blob_handling="all_binary", scan_in_order=True
        ).to_batches()
        for batch in batches if read else ():
            for name in read:
                parts[name].append(_cells(batch.column(batch.schema.get_field_index(name)), spool))
        count = table.count_rows()
    except Exception as error:  # on damaged tables lance raises OSError, ValueError and errors of its own
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a table of Lance that can be read ({said})") from error
    columns: dict[str, Cells] = {name: Joined(found) for name, found in parts.items()}
    return Segment(path, count, columns, names=names, usual=usual, classes=classes)


def _cells(array: Any, spool: Spool) -> Cells:
    """Return the cells of an array; of one with a type of Lance's own, such as an encoded picture, of what it stores."""
    return cells_of(array.storage if isinstance(array, pa.ExtensionArray) else array, spool)
