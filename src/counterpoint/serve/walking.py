"""Find runs, embeddings and detections under the given folders, again by the times of the folders."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from counterpoint.engine.run import CONFIG
from counterpoint.serve.places import Places

DEPTH = 3  # levels of folders below a given one
FRESH = 2.0  # seconds: a folder that changed this recently is listed again, since its time may be coarse
KEPT = 0.5  # seconds that a finding stays valid, so that a page's requests share it
ENDINGS = (".parquet", ".json")


@dataclass
class _Folder:
    stamp: int  # its time of change, nanoseconds
    run: bool  # whether it holds a run's config.yaml
    below: list[str]  # paths of its folders
    files: list[str]  # paths of its files with the wanted endings
    left_out: list[str]  # links that lead out of the given folders


@dataclass
class Found:
    """What the folders hold."""

    runs: dict[str, int] = field(default_factory=dict)  # real path -> time of change, nanoseconds
    files: list[str] = field(default_factory=list)  # embeddings and records, as real paths
    left_out: list[str] = field(default_factory=list)  # links that lead out of the folders

    def ending(self, ending: str) -> list[str]:
        """Return the files with an ending such as ".parquet", sorted."""
        return sorted(file for file in self.files if file.endswith(ending))


class Walk:
    """Runs and files under the folders.

    Adding, removing or replacing a file changes the time of its folder. A folder whose time is the same is not listed again;
    only its folders' times are read. So ten thousand runs take a fraction of a second.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self._known: dict[str, _Folder] = {}
        self._found, self._at = Found(), 0.0
        self._lock = threading.Lock()

    def __call__(self) -> Found:
        """Return what the folders hold now."""
        with self._lock:
            if not self._at or time.monotonic() - self._at > KEPT:
                self._found = Found()
                for folder in self.places.folders:
                    self._visit(str(folder), DEPTH)
                self._at = time.monotonic()
            return self._found

    def forget(self) -> None:
        """Look again at the next call, whatever the time."""
        self._at = 0.0

    def _visit(self, folder: str, depth: int) -> None:
        if folder in self._found.runs:  # one given folder may lie in another
            return
        try:
            stamp = os.stat(folder).st_mtime_ns
            known = self._known.get(folder)
            if known is None or known.stamp != stamp or time.time() - stamp / 1e9 < FRESH:
                known = self._known[folder] = self._listed(folder, stamp)
        except OSError:  # removed meanwhile, or not readable
            self._known.pop(folder, None)
            return
        self._found.left_out += known.left_out
        if known.run:  # the records of a run itself are no files to list
            self._found.runs[folder] = stamp
            self._found.files += [file for file in known.files if file.endswith(".parquet")]
            return
        self._found.files += known.files
        if depth:
            for below in known.below:
                self._visit(below, depth - 1)

    def _listed(self, folder: str, stamp: int) -> _Folder:
        found = _Folder(stamp, False, [], [], [])
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name == CONFIG:
                    found.run = True
                elif entry.is_dir():
                    found.below += self._real(entry, found)
                elif entry.name.endswith(ENDINGS):
                    found.files += self._real(entry, found)
        return found

    def _real(self, entry: os.DirEntry[str], found: _Folder) -> Iterator[str]:
        """Yield the real path of an entry. Note links that lead out of the folders as left out."""
        if not entry.is_symlink():
            yield entry.path
        elif self.places.holds(entry.path):
            yield os.path.realpath(entry.path)
        else:
            found.left_out.append(entry.path)
