"""What a program owes the machine it runs on: files that are whole or not there, a place for what can be made again,
threads that do not fight."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp makes private files; a run is as readable as anything else the user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """Where built features are kept: $COUNTERPOINT_CACHE, or the user's cache directory."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("COUNTERPOINT_CACHE") or user_cache_dir("counterpoint"))


def patient_threads() -> None:
    """Let idle OpenMP threads sleep instead of spin; call it before torch is imported.

    Where another program wants the same cores, threads that spin between a small network's steps starve the ones that
    work: measured on 2 shared cores, an epoch of MACIL-SD took 20 times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
