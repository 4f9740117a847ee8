"""Read optimised folders of litdata: `index.json` and its chunks, item by item through litdata's own reader.

Pictures, sounds and videos stay as the bytes that litdata stored. A pickle is never opened, because it could run code; its cell is
bad. An item is a dictionary of named values. Parts of a tuple are named by their kinds: image, audio, text, vector, label.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.own.objects import file_of, plain
from counterpoint.data.own.roles import known_by_name
from counterpoint.data.own.table import BadCell, Broken, Cells, ListCells, Segment, Spool
from counterpoint.data.pictures import is_image, is_tensor
from counterpoint.errors import DataError, needs_extra

Wanted = Callable[[str], bool]
# Kinds of stored values that stay as they are, by litdata's name. Others than these and OPEN become bad cells.
MEDIA = {"jpeg": "image", "image": "image", "tifffile": "image", "audio": "audio", "video": "video", "file": ""}
OPEN = {"str", "text", "bool", "int", "float", "bytes", "json", "pil", "jpeg_array"}
OPEN |= {"numpy", "no_header_numpy", "tensor", "no_header_tensor"}


class Stored(bytes):
    """Bytes of a file, with the role that litdata's kind gives them."""

    role: str = ""


def read_litdata(path: Path, wanted: Wanted, spool: Spool) -> Segment:
    """Read an optimised folder. Items are rows, numbered from 1 in the order of the chunks.

    Args:
        path: The folder with `index.json`.
        wanted: Returns whether a column of this name is read.
        spool: Stores the bytes of cells.

    Raises CounterpointError without the package litdata, DataError when the folder cannot be read.
    """
    # litdata asks the net for a newer version of itself when a set is opened; the variable turns that off.
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    try:
        import litdata
    except ImportError as error:
        raise needs_extra("litdata:", "litdata") from error
    try:
        config, chunks = _index(path)
        items = litdata.StreamingDataset(str(path), serializers=_serializers(config), batch_decode=0)
        count = len(items) if chunks else 0
    except DataError:
        raise
    except Exception as error:  # litdata raises its own and Python's exceptions
        raise DataError(f"{path}: not a folder of litdata that can be read ({_said(error)})") from error
    gone = _gone(path, chunks, count)
    columns: dict[str, list[Any]] = {}
    usual: dict[str, str] = {}
    names: dict[str, None] = {}
    numbers: list[int] = []
    broken: list[Broken] = []
    for row in range(count):
        reason = gone.get(row, "")
        try:
            found = [] if reason else list(_named(items[row]))
        except Exception as error:
            reason = f"cannot be read ({_said(error)})"
        if reason:
            broken.append(Broken(row + 1, reason))
            continue
        for name, value, role in found:
            names.setdefault(name)
            if role and known_by_name(name, {}) != role:
                usual.setdefault(name, role)
            if wanted(name) or name in usual:
                cells = columns.setdefault(name, [])
                cells += [None] * (len(numbers) - len(cells))
                cells.append(_cell(value, role, spool))
        numbers.append(row + 1)
    held: dict[str, Cells] = {
        name: ListCells(cells + [None] * (len(numbers) - len(cells))) for name, cells in columns.items()
    }
    at = np.array(numbers, np.int64) if broken else None
    return Segment(path, len(numbers), held, at, broken, names=list(names), usual=usual)


def _said(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _index(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings and the chunks of `index.json`. DataError for settings that are not read here."""
    try:
        index = json.loads((path / "index.json").read_bytes())
        config, chunks = index["config"], list(index["chunks"])
        formats = list(config["data_format"])
        files = [str(chunk["filename"]) for chunk in chunks]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: index.json cannot be read; was the folder written by litdata.optimize?") from error
    if config.get("encryption"):
        raise DataError(f"{path}: is encrypted; write it without encryption")
    if any(os.path.basename(file) != file for file in files):
        raise DataError(f"{path}: index.json names chunks outside the folder")
    config["data_format"] = [str(name) for name in formats]
    return config, chunks


def _gone(path: Path, chunks: list[dict[str, Any]], count: int) -> dict[int, str]:
    """Return the rows whose chunk is missing or cut short. litdata would wait for such a chunk for minutes."""
    reasons: dict[int, str] = {}
    start = 0
    for chunk in chunks:
        file, rows = path / str(chunk["filename"]), int(chunk["chunk_size"])
        size = file.stat().st_size if file.is_file() else -1
        reason = f"its chunk {file.name} is missing" if size < 0 else ""
        if size >= 0 and not chunk.get("compressed") and size < int(chunk.get("chunk_bytes") or 0):
            reason = f"its chunk {file.name} is cut short"
        if reason:
            reasons |= dict.fromkeys(range(start, min(start + rows, count)), reason)
        start += rows
    return reasons


def _serializers(config: dict[str, Any]) -> dict[str, Any]:
    """Return readers that keep files as bytes, and that open nothing else than OPEN."""
    from litdata.streaming.serializers import Serializer

    class Keep(Serializer):
        def __init__(self, role: str) -> None:
            self.role = role

        def serialize(self, data: Any) -> Any:
            raise NotImplementedError

        def can_serialize(self, data: Any) -> bool:
            return False

        def deserialize(self, data: Any) -> Any:
            kept = Stored(data)
            kept.role = self.role
            return kept

    class Refuse(Keep):
        def deserialize(self, data: Any) -> Any:
            return BadCell(self.role)

    made: dict[str, Any] = {name: Keep(role) for name, role in MEDIA.items()}
    for name in {name.partition(":")[0] for name in config["data_format"]} - OPEN - MEDIA.keys():
        why = "is a pickle, which could run code" if name == "pickle" else f"is of litdata's kind {name}"
        made[name] = Refuse(f"{why}; it is not read")
    return made


def _named(item: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield the name, the value and the role of each part of an item. An empty role is decided by the name."""
    if isinstance(item, Mapping):
        for name, value in item.items():
            said = known_by_name(str(name), {})
            yield str(name), value, _role(value) if not said or isinstance(value, Stored) else ""
        return
    used: dict[str, int] = {}
    for value in item if isinstance(item, (tuple, list)) else (item,):
        role = _role(value) or ("text" if isinstance(value, str) else "label")
        used[role] = used.get(role, 0) + 1
        yield (role if used[role] == 1 else f"{role}_{used[role]}"), value, role


def _role(value: Any) -> str:
    """Return the role that a value's type gives, empty where it gives none."""
    if isinstance(value, Stored):
        return value.role
    if is_image(value) or ((is_tensor(value) or isinstance(value, np.ndarray)) and value.ndim in (2, 3)):
        return "image"
    return "vector" if (is_tensor(value) or isinstance(value, np.ndarray)) and value.ndim == 1 else ""


def _cell(value: Any, role: str, spool: Spool) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return spool.keep(bytes(value))
    if is_image(value) or (role == "image" and (is_tensor(value) or isinstance(value, np.ndarray))):
        return spool.keep(file_of(value))
    return plain(value)
