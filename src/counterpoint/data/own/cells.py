"""Convert a cell to a text, a vector, or the file or bytes of a picture, sound or video. DataError names the fault."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.own.table import BadCell, Slice, is_blank
from counterpoint.errors import DataError
from counterpoint.words import counted

Source = str | bytes | Slice | dict[str, Any]  # a path, bytes, bytes on disk, or samples {"array", "sampling_rate"}


def text_of(cell: Any) -> str | None:
    """Return the text in a cell, None where it is null. Of several texts in a cell, return the first that is not empty."""
    if isinstance(cell, BadCell):
        raise DataError(str(cell))
    if isinstance(cell, (list, tuple, np.ndarray)):
        cell = next((t for t in cell if isinstance(t, str) and t.strip()), None if not len(cell) else cell[0])
    cell = opened(cell) if isinstance(cell, Slice) else cell
    if isinstance(cell, (bytes, bytearray)):
        try:
            cell = bytes(cell).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("is not text in UTF-8") from error
    if isinstance(cell, (int, float)) and cell == cell:
        cell = str(cell)
    if cell is None or cell != cell:  # NaN marks missing cells in tables of numbers
        return None
    if not isinstance(cell, str):
        raise DataError(f"is a {type(cell).__name__}, not a text")
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write
        raise DataError("holds characters that are not valid Unicode") from error
    return cell


def source_of(cell: Any, folder: str) -> Source | None:
    """Return the file or bytes in a cell; None where it is empty.

    Args:
        cell: The cell's value in the table.
        folder: Base of relative paths: the folder of the table's file.
    """
    if isinstance(cell, BadCell):
        raise DataError(str(cell))
    if isinstance(cell, dict):
        if cell.get("array") is not None:
            return cell
        cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    if is_blank(cell):
        return None
    if isinstance(cell, (bytes, bytearray)):
        return bytes(cell)
    if isinstance(cell, Slice):
        return cell
    if not isinstance(cell, str):
        raise DataError(f"is neither a path nor bytes, but of type {type(cell).__name__}")
    return path_of(cell.strip(), folder)


def path_of(text: str, folder: str) -> str:
    """Return the path that a cell names. DataError for a web address."""
    if "://" in text:
        raise DataError("is on the net; download it and name the file")
    return os.path.join(folder, text)


def opened(source: Source) -> Path | bytes:
    """Return a file or bytes for a decoder. DataError for an array."""
    if isinstance(source, dict):
        raise DataError("has an array, where a path or bytes were expected")
    if isinstance(source, str):
        return Path(source)
    return source.read() if isinstance(source, Slice) else source


@contextmanager
def as_file(source: Source) -> Iterator[Path]:
    """Yield a temporary file with these bytes, for a library that only reads files. It is deleted after the block."""
    with tempfile.TemporaryDirectory() as folder:
        found = opened(source)
        path = found if isinstance(found, Path) else Path(folder) / "video"
        if isinstance(found, bytes):
            path.write_bytes(found)
        try:
            yield path
        except DataError as error:  # the caller adds the row to the message
            raise DataError(str(error).removeprefix(f"{path}: ")) from error


# -------------------------------------------------------------------------------------------------------------- vectors


def vector_of(cell: Any, folder: str) -> NDArray[np.float32] | None:
    """Return the vector in a cell: numbers, numbers as text, or a .npy file. None where the cell is empty."""
    if isinstance(cell, str) and (text := cell.strip()) and not text.lower().endswith(".npy"):
        cell = _numbers(text)
    if isinstance(cell, (list, tuple, np.ndarray)) and not isinstance(cell, Slice):
        return checked_vector(cell) if len(cell) else None
    if isinstance(cell, (int, float)) and not isinstance(cell, bool) and cell == cell:
        return checked_vector([cell])
    source = source_of(cell, folder)
    return None if source is None else checked_vector(_array(source))


def _numbers(text: str) -> list[float]:
    """Parse numbers as text: "[0.1, 2]" or "0.1 2"."""
    words = re.split(r"[,;\s]+", text.strip().strip("[]()").strip())
    try:
        return [float(word) for word in words if word]
    except ValueError as error:
        raise DataError("is neither a list of numbers nor the name of a .npy file") from error


def _array(source: Source) -> NDArray[Any]:
    """Read the array of a .npy file."""
    content = opened(source)
    try:
        if isinstance(content, Path) and not content.is_file():
            raise DataError("no such file")
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # NumPy parses a damaged header as Python, which may raise any exception
        raise DataError("is not a .npy file that can be read") from error
    return np.asarray(found)


def checked_vector(values: Any) -> NDArray[np.float32]:
    """Convert numbers to one vector [dim] of float32. DataError for other values, and for values that are not finite."""
    try:
        found = np.asarray(values)
        if found.dtype.kind == "O":
            found = np.array([np.nan if v is None else float(v) for v in values])
        if found.dtype.kind not in "fiu":
            raise DataError("is not a list of numbers")
        with np.errstate(over="ignore"):
            found = found.astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError("is not a list of numbers") from error
    found = found.reshape(-1) if found.ndim == 2 and 1 in found.shape else found
    if found.ndim != 1 or not len(found):
        raise DataError(f"has the shape {list(found.shape)}; a vector is one list of numbers")
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        raise DataError(not_finite(len(wrong), int(wrong[0])))
    return found


def not_finite(count: int, first: int) -> str:
    """Return the message for a vector with `count` values that are not finite, the first at position `first` from 0."""
    return f"holds {counted(count, 'value')} other than finite numbers, the first at position {first + 1}"


def read_vector(path: Path) -> NDArray[np.float32]:
    """Read the vector [dim] of a .npy file. DataError when it holds another value, or cannot be read."""
    return checked_vector(_array(str(path)))
