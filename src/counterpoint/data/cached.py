"""Keep slow results in the cache: build an entry once, find it again by a key of everything that it depends on.

An entry is one file below the cache folder (`counterpoint doctor` prints it; `COUNTERPOINT_CACHE` moves it):

    ROOM/NAME-KEY.npz    ROOM names the maker; NAME is for people and may be empty; KEY is `digest(...)`

Five rules hold for every entry:

    key      The key covers everything that the content depends on: version of the code, options, packages, inputs.
    lock     One process builds; other processes that want the same entry wait, then read it.
    once     An entry is built only where it is missing or unreadable.
    whole    A file is written under another name and then renamed, so that no process reads half of it.
    damage   A file that cannot be read, or that does not hold the expected content, is built again.

`build_once` follows all five for arrays. Makers of other content (a run, a memory map) combine the small functions.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from counterpoint.errors import DataError
from counterpoint.files import cache_folder, replacing

Arrays = dict[str, NDArray[Any]]
T = TypeVar("T")
PATIENCE = 10.0  # seconds, after which a process that waits for another one reports that


def digest(*parts: Any) -> str:
    """Return 24 hexadecimal digits that identify the parts of a key, in order.

    Args:
        parts: arrays (type, shape and numbers count), bytes, and values that JSON can write. The order of a dict's keys
            does not matter.

    Raises TypeError for any other value, because its text might differ between two runs.
    """
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            content = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            found.update(f"array {part.dtype} {part.shape}:".encode())
        elif isinstance(part, bytes):
            content = memoryview(part)
            found.update(f"bytes {len(part)}:".encode())
        else:
            content = memoryview(json.dumps(part, sort_keys=True).encode())
            found.update(f"json {len(content)}:".encode())
        found.update(content)
    return found.hexdigest()[:24]


def place(room: str, *key: Any, name: str = "", suffix: str = ".npz") -> Path:
    """Return the path of an entry. Its folder need not exist yet.

    Args:
        room: folder of the maker, such as "arcade".
        key: parts of the key (see `digest`).
        name: precedes the key in the file's name. Default: no name.
        suffix: end of the file's name.
    """
    return cache_folder() / room / f"{name}{'-' if name else ''}{digest(*key)}{suffix}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of an entry, or of a whole room where `path` is the room's folder. Other processes wait for it.

    A process that waits for more than ten seconds reports that on standard error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        print(f"waiting for another process, which is making {path}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def save(path: Path, arrays: Mapping[str, NDArray[Any]], *, compress: bool = False) -> None:
    """Write arrays by name into one file, whole or not at all.

    Args:
        path: path of the entry.
        arrays: name -> array.
        compress: write a smaller file in more time.
    """
    write: Any = np.savez_compressed if compress else np.savez
    with replacing(path) as out:
        write(out, **arrays)


def load(path: Path, *names: str) -> Arrays:
    """Read arrays by name.

    Args:
        path: path of the entry.
        names: names of the arrays to read. Default: all.

    Raises FileNotFoundError where there is no file. Raises DataError with file and reason where the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in names or stored.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged in any way: numpy, zipfile and zlib each have errors of their own
        raise DataError(f"{path} was damaged ({error})") from error


def build_once(
    room: str,
    key: tuple[Any, ...],
    build: Callable[[], Arrays],
    read: Callable[[Arrays], T],
    *,
    name: str = "",
    compress: bool = False,
    notes: list[str] | None = None,
) -> T:
    """Return `read(arrays)` of an entry's arrays; `build` makes the arrays where the cache has no usable ones.

    Args:
        room, key, name: identify the entry, as for `place`.
        build: makes the arrays. Called by one process, which holds the entry's lock.
        read: turns the arrays into the result. If it raises, the arrays are not as expected and are built again. It must
            accept everything that `build` makes.
        compress: write a smaller file in more time.
        notes: receives a line where a damaged file was replaced. Default: the file is replaced without a note.

    >>> def squares():
    ...     return {"squares": np.arange(4) ** 2}
    >>> build_once("example", (1, "squares", 4), squares, lambda arrays: arrays["squares"].tolist())  # doctest: +SKIP
    [0, 1, 4, 9]
    """
    path = place(room, *key, name=name)
    with locked(path):
        try:
            return read(load(path))
        except FileNotFoundError:
            pass
        except Exception as error:
            if notes is not None:
                reason = str(error) if isinstance(error, DataError) else f"{path} was damaged ({error})"
                notes.append(f"{reason} and has been built again")
        arrays = build()
        save(path, arrays, compress=compress)
    return read(arrays)
