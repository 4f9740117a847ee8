"""Write files atomically, check outputs, walk folders through links, locate the cache, let idle threads sleep."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from counterpoint.errors import CounterpointError, DataError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file that replaces `path` when the block succeeds and is removed when the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp makes private files; give a run's files the mode of the user's other files.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_folder(folder: Path | str) -> None:
    """Raise CounterpointError, before any work, where no file can be written in a folder, or where it cannot be made."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CounterpointError(f"{folder} is a file; name another folder with --out")
    try:
        check_writable(folder / "name")
    except CounterpointError as error:
        raise CounterpointError(
            f"{str(error).replace(str(folder / 'name'), str(folder)).partition(';')[0]}; name another folder with --out"
        ) from error


def check_empty(folder: Path | str) -> Path:
    """Return a folder that is empty or absent, as a Path. Raise CounterpointError, before any work, for any other."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CounterpointError(f"{folder} exists and is not an empty folder; name another one with --out")
    return folder


def check_there(paths: Iterable[Path | str]) -> None:
    """Raise DataError, before any work, for the first path at which there is no file and no folder."""
    for path in paths:
        try:
            there = Path(path).exists()
        except (OSError, ValueError):  # a name that is too long, or has a zero byte
            there = False
        if not there:
            raise DataError(f"{path}: no such file or folder")


def quoted(path: Path | str) -> str:
    """Quote a file name for a shell."""
    return shlex.quote(str(path))


def check_writable(path: Path | str) -> Path:
    """Check, before any work, that a file can be written at `path`; return it as a Path.

    The check makes the missing folders and writes and removes an empty file beside `path`. It never touches a file that is
    already there.

    Raises CounterpointError that names `path` and the reason.
    """
    path = Path(path)
    if path.is_dir():
        raise CounterpointError(f"{path} is a folder; name a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A trial file takes the same way as `replacing`: the folder must take a new name of this length.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise CounterpointError(f"{path} cannot be written ({error.strerror or error}); name another file") from error
    return path


class Walk(NamedTuple):
    """The files below a folder, and every entry that was left out.

    `files` and `left_out` together account for every entry but folders that could be read.
    """

    files: list[Path]  # regular files, sorted by path; links are followed
    left_out: list[tuple[Path, str]]  # path and reason, sorted: hidden, broken link, link loop, unreadable, no file


@contextlib.contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder for one process at a time.

    Args:
        folder: the folder; it gets a file `.lock`.
        doing: what a process does with it, such as "embeds into", for the message.

    Raises CounterpointError when another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CounterpointError(f"another process {doing} {folder}; wait for it, or use --jobs") from None
    try:
        yield
    finally:
        lock.release()


def walk(folder: Path | str) -> Walk:
    """List every file below `folder`, through links to files and to folders.

    A link to one of its own ancestors is a loop and is left out. Names that begin with a dot are left out as hidden.

    Raises DataError when `folder` itself cannot be read.
    """
    files: list[Path] = []
    left_out: list[tuple[Path, str]] = []

    def visit(place: Path, ancestors: frozenset[tuple[int, int]]) -> None:
        found = os.stat(place)
        here = (found.st_dev, found.st_ino)
        if here in ancestors:
            left_out.append((place, "a link to a folder that holds it"))
            return
        with os.scandir(place) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            path = place / name
            if name.startswith("."):
                left_out.append((path, "hidden"))
                continue
            try:
                mode = os.stat(path).st_mode
                if stat.S_ISDIR(mode):
                    visit(path, ancestors | {here})
                elif stat.S_ISREG(mode):
                    files.append(path)
                else:
                    left_out.append((path, "no regular file"))
            except OSError as error:
                broken = path.is_symlink() and not path.exists()
                left_out.append((path, "a broken link" if broken else f"cannot be read ({error.strerror or error})"))

    try:
        visit(Path(folder), frozenset())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror or error})") from error
    return Walk(sorted(files), sorted(left_out))


def fingerprint(path: Path, expected: str | None) -> str:
    """Return the SHA-256 of a weights file; raise CounterpointError when it is missing or not the one expected."""
    if not path.is_file():
        raise CounterpointError(f"{path}: no such weights file; put it there, or name another")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and found != expected:
        raise CounterpointError(
            f"{path} is not the file this run was trained with: its SHA-256 is {found[:12]}..., expected {expected[:12]}...; put "
            "that file in its place"
        )
    return found


def cache_folder() -> Path:
    """Return the folder of built features: $COUNTERPOINT_CACHE, or `counterpoint` in the user's cache directory."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("COUNTERPOINT_CACHE") or user_cache_dir("counterpoint"))


def patient_threads() -> None:
    """Let idle OpenMP threads sleep instead of spin; call it before torch is imported.

    Where another program uses the same cores, threads that spin between a small network's steps starve the working ones.
    Measured on 2 shared cores: with spinning threads an epoch of MACIL-SD took 20 times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
