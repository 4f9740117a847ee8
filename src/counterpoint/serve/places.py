"""Confine every path to the folders that the server was given."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from counterpoint.errors import CounterpointError

SMALL = 64 * 2**20  # maximum bytes of a text file that is read whole


class OutsideError(CounterpointError):
    """A path leads out of the given folders, or does not exist in them."""


class Places:
    """The folders that the server may read, in the order in which they were given.

    A key names a file or folder inside them: "0/runs/first" is runs/first in the first folder.
    """

    def __init__(self, folders: Sequence[Path | str]) -> None:
        self.folders = [Path(os.path.realpath(folder)) for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise CounterpointError(f"{folder} is not a folder; name a folder with runs")

    def inside(self, path: Path | str) -> Path:
        """Return the real path of a file or folder that exists in the folders. OutsideError otherwise."""
        try:
            real = Path(os.path.realpath(path, strict=True))
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise OutsideError(f"{path}: no such file in the folders of this server") from error
        if not any(real.is_relative_to(folder) for folder in self.folders):
            raise OutsideError(f"{path} is outside the folders of this server; start it with that folder, too")
        return real

    def holds(self, path: Path | str) -> bool:
        """Return whether a path exists and lies in the folders."""
        try:
            self.inside(path)
        except OutsideError:
            return False
        return True

    def key(self, path: Path | str) -> str:
        """Return the key of a path in the folders."""
        for number, folder in enumerate(self.folders):
            if Path(path).is_relative_to(folder):
                return f"{number}/{Path(path).relative_to(folder).as_posix()}"
        raise OutsideError(f"{path} is outside the folders of this server")

    def path(self, key: str) -> Path:
        """Return the real path that a key names. OutsideError for a key that leads out of the folders."""
        number, _, rest = key.partition("/")
        if not re.fullmatch(r"\d{1,4}", number) or int(number) >= len(self.folders):
            raise OutsideError(f"'{key}' names no folder of this server")
        folder = self.folders[int(number)]
        # Joining an absolute name would replace the folder.
        if os.path.isabs(rest) or ".." in Path(rest).parts:
            raise OutsideError(f"'{key}' leads out of the folders of this server")
        real = self.inside(folder / rest)
        if not real.is_relative_to(folder):
            raise OutsideError(f"'{key}' leads out of its folder")
        return real

    def read(self, path: Path | str, limit: int = SMALL, *, tail: bool = False) -> str:
        """Read a text file in the folders, at most `limit` bytes from its beginning or its end.

        Raises OutsideError for a link that leads out of the folders, and for anything but a regular file.
        """
        with open(self.inside(path), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OutsideError(f"{path} is not a regular file")
            if tail and found.st_size > limit:
                file.seek(found.st_size - limit)
            return file.read(limit).decode("utf-8", errors="replace")

    def check_words(self, words: str) -> None:
        """Raise OutsideError when a setting or a data source names a path outside the folders.

        A word is a path when it is absolute, begins with "~", or has a component "..".
        """
        if "\0" in words:  # no process takes one as an argument
            raise OutsideError("a setting or data source holds a zero byte; remove it")
        for word in re.split(r"[\s:,;=?&|\"']+", words):
            parts = re.split(r"[/\\]+", word)
            if word.startswith(("/", "\\", "~")) or ".." in parts:
                self.inside(os.path.expanduser(word))
