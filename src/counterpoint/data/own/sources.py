"""Pictures, sounds and videos of all rows: every distinct file or content is looked at once, however many rows name it.

Where all of a set fits into `KEEP`, each is decoded at the start, so that all damage is found there; else only headers are
read then, and cells are decoded when asked for.

Two sources are one where they are the same file, or hold the same bytes. Sizes are compared first, then the beginning and
the end, and only where these are equal the whole contents.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.images import Indices, Pixels, check_header, decode
from counterpoint.data.own.arrow import is_text, pc
from counterpoint.data.own.cells import Source, as_file, opened, path_of, source_of
from counterpoint.data.own.roles import Role
from counterpoint.data.own.table import ArrowCells, Cells, Slice, Table
from counterpoint.data.sounds import Sound, check_sound, decode_sound, sound_of_numbers
from counterpoint.errors import DataError

EDGE = 4096  # bytes of the beginning and of the end that tell most files apart
WHOLE_FILE = 32 << 20  # a picture's file of at most so many bytes is read at one go


@dataclass(frozen=True)
class Wanted:
    """What pictures and sounds become: squares of `size` pixels, waves of `samples` at `rate` per second."""

    size: int
    rate: int
    samples: int


class Sources:
    """The distinct sources of one column.

    Args:
        table: whose rows name them.
        role: the column's.
        cells: of the column.
        wanted: what they become.
    """

    def __init__(self, table: Table, role: Role, cells: Cells, wanted: Wanted) -> None:
        self.table, self.role, self.wanted = table, role, wanted
        self.items: list[Source] = []
        self.bad: dict[int, str] = {}  # rows whose cell is none
        self.at = np.full(len(table), -1, np.int64)  # the source of each row
        self._read(cells)
        count = len(self.items)
        self.reasons: dict[int, str] = {}  # by source: why it cannot be used
        self.rates = np.zeros(count, np.int64)  # samples per second of its sound, 0 for none
        self.sounding = np.zeros(count, bool)  # whether a video has a sound that can be used
        self.group = np.arange(count)  # equal where sources are the same
        self.pixels: Pixels | None = None
        self.waves: NDArray[np.float32] | None = None

    # --- which

    def _read(self, cells: Cells) -> None:
        known: dict[str, int] = {}
        for start, part in cells.parts():
            if not isinstance(part, Cells) and is_text(part.type):
                self._paths(start, part, known)
                continue
            part = part if isinstance(part, Cells) else ArrowCells(part)
            for row, cell in enumerate(part, start):
                try:
                    source = source_of(cell, self._folder(row))
                except DataError as error:
                    self.bad[row] = str(error)
                    continue
                if isinstance(source, str):
                    self.at[row] = self._path(source, known)
                elif source is not None:
                    self.at[row] = len(self.items)
                    self.items.append(source)

    def _folder(self, row: int) -> str:
        return self.table.base(row)

    def _path(self, path: str, known: dict[str, int]) -> int:
        found = known.setdefault(path, len(self.items))
        if found == len(self.items):
            self.items.append(path)
        return found

    def _paths(self, start: int, part: Any, known: dict[str, int]) -> None:
        """Rows of paths as text: what stands in several is looked at once."""
        folder = self._folder(start) if len(part) else ""
        found = pc.dictionary_encode(pc.utf8_trim_whitespace(part))
        of = np.full(len(found.dictionary) + 1, -1, np.int64)
        refused: dict[int, str] = {}
        for n, text in enumerate(found.dictionary.to_pylist()):
            if not text:
                continue
            try:
                of[n] = self._path(path_of(text, folder), known)
            except DataError as error:
                refused[n] = str(error)
        codes = pc.fill_null(found.indices, len(found.dictionary)).to_numpy(zero_copy_only=False)
        self.at[start : start + len(part)] = of[codes]
        for row in np.flatnonzero(np.isin(codes, list(refused))):
            self.bad[start + int(row)] = refused[int(codes[row])]

    # --- looked at once

    @property
    def bytes_each(self) -> int:
        """What a decoded source takes in memory."""
        picture, sound = 3 * self.wanted.size**2, 4 * self.wanted.samples
        return {"image": picture, "audio": sound, "video": picture + sound}[self.role.kind]

    def examine(self, whole: bool, *, sounds: bool = False) -> Iterator[int]:
        """Look at every source, one a step.

        Args:
            whole: decode and keep it, else read its header alone.
            sounds: whether the sounds of videos are wanted too.
        """
        size, count = self.wanted.size, len(self.items)
        if whole and self.role.kind != "audio":
            self.pixels = np.zeros((count, size, size, 3), np.uint8)
        if whole and (self.role.kind == "audio" or sounds):
            self.waves = np.zeros((count, self.wanted.samples), np.float32)
        edges: dict[Any, list[int]] = {}
        looks = {"image": self._image, "audio": self._audio, "video": self._video}
        look = looks[self.role.kind]
        for n, source in enumerate(self.items):
            try:
                content, edge = self._edge(source)
                look(n, content, whole, sounds)
                edges.setdefault(edge, []).append(n)
            except DataError as error:
                self.reasons[n] = str(error)
            yield n
        self._compare(edges)

    def _edge(self, source: Source) -> tuple[Any, Any]:
        """What a decoder takes of a source, and a key that sources of the same bytes share."""
        if isinstance(source, dict):
            try:
                numbers = np.asarray(source["array"], np.float64)
            except (TypeError, ValueError, OverflowError):
                return source, id(source)
            key = repr((source.get("sampling_rate"), numbers.shape)).encode() + numbers.tobytes()
            return source, (-1, hashlib.sha256(key).digest())
        if not isinstance(source, str):
            content = opened(source)
            assert isinstance(content, bytes)
            return content, (len(content), hashlib.sha256(_edges(content)).digest())
        try:
            found = os.stat(source)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError("no such file") from error
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError("is no file")
        if not found.st_size:
            raise DataError("is empty (0 bytes)")
        try:
            with open(source, "rb", buffering=0) as file:
                if self.role.kind == "image" and self.pixels is not None and found.st_size <= WHOLE_FILE:
                    content = file.read()
                    return content, (len(content), hashlib.sha256(_edges(content)).digest())
                begin = file.read(EDGE)
                if found.st_size > EDGE:
                    file.seek(max(EDGE, found.st_size - EDGE))
                    begin += file.read(EDGE)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror or error})") from error
        return opened(source), (found.st_size, hashlib.sha256(begin).digest())

    def _compare(self, edges: dict[Any, list[int]]) -> None:
        """Number the sources by their contents."""
        for (size, _), alike in ((key, found) for key, found in edges.items() if isinstance(key, tuple)):
            if len(alike) < 2:
                continue
            if not 0 <= size <= 2 * EDGE:
                alike_by: dict[Any, list[int]] = {}
                for n in alike:
                    alike_by.setdefault(self._digest(n), []).append(n)
                for found in alike_by.values():
                    self.group[found] = found[0]
            else:
                self.group[alike] = alike[0]

    def _digest(self, n: int) -> Any:
        source = self.items[n]
        if isinstance(source, dict):
            return 0  # its key is of the whole contents already
        if not isinstance(source, str):
            return hashlib.sha256(opened(source)).digest()  # type: ignore[arg-type]
        try:
            with open(source, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return n  # gone since: like nothing else

    def _image(self, n: int, content: Any, whole: bool, sounds: bool) -> None:
        if self.pixels is not None:
            self.pixels[n] = self.image(content)
        else:
            check_header(opened(content))

    def _audio(self, n: int, content: Any, whole: bool, sounds: bool) -> None:
        if self.waves is not None:
            found = self.sound(content)
            self.waves[n], self.rates[n] = found.wave, found.rate
        elif isinstance(content, dict):
            self.rates[n] = self.sound(content).rate
        else:
            self.rates[n] = check_sound(content)

    def _video(self, n: int, content: Any, whole: bool, sounds: bool) -> None:
        from counterpoint.data.media import probe

        with as_file(self.items[n]) as path:
            if self.pixels is not None:
                self.pixels[n] = self._frame(path)
            elif not probe(path).has_audio:
                return
            if not sounds:
                return
            # A video without sound, or with a silent one, is a picture all the same.
            try:
                if self.waves is not None:
                    found = decode_sound(path, self.wanted.rate, self.wanted.samples)
                    self.waves[n], self.rates[n] = found.wave, found.rate
                else:
                    self.rates[n] = check_sound(path)
                self.sounding[n] = True
            except DataError:
                return

    # --- decoded

    def image(self, source: Any) -> Pixels:
        """Decode a picture, or the middle frame of a video."""
        if self.role.kind == "video":
            with as_file(source) as path:
                return self._frame(path)
        return decode(source if not isinstance(source, (str, Slice, dict)) else opened(source), self.wanted.size)

    def sound(self, source: Any) -> Sound:
        """Decode a sound, or a video's."""
        if isinstance(source, dict):
            rate = source.get("sampling_rate")
            if not isinstance(rate, int):
                raise DataError("has an array and no sampling_rate")
            return sound_of_numbers(source["array"], rate, self.wanted.rate, self.wanted.samples)
        if self.role.kind == "video":
            with as_file(source) as path:
                return decode_sound(path, self.wanted.rate, self.wanted.samples)
        content = source if not isinstance(source, (str, Slice)) else opened(source)
        return decode_sound(content, self.wanted.rate, self.wanted.samples)

    def _frame(self, path: Any) -> Pixels:
        """The middle frame of a video as a square."""
        from counterpoint.data.media import frame_at, probe

        size = self.wanted.size
        try:
            info = probe(path)
            # The short side is to be no smaller than the square.
            width = max(1, -(-info.width * size // max(1, min(info.width, info.height))))
            frame = frame_at(path, info.duration / 2, width=width)
            frame = frame if frame is not None else frame_at(path, 0.0, width=width)
        except (ValueError, OSError, MemoryError) as error:  # a frame of impossible size or format
            raise DataError("its middle frame cannot be decoded") from error
        if frame is None:
            raise DataError("not a single frame could be decoded")
        side = min(frame.shape[:2])
        top, left = (frame.shape[0] - side) / 2, (frame.shape[1] - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR, box=box))

    # --- by row

    def bad_rows(self) -> dict[int, str]:
        """What is wrong with rows: their cell, or their source."""
        found = dict(self.bad)
        if self.reasons:
            wrong = np.isin(self.at, list(self.reasons))
            found |= {int(row): self.reasons[int(self.at[row])] for row in np.flatnonzero(wrong)}
        return found

    def groups(self, has: NDArray[np.bool_], at: Indices) -> Indices:
        """Numbers of rows that are equal where their sources are; -1 where a row has none."""
        return np.where(has, self.group[at] if len(self.group) else -1, -1)

    def file(self, row: int) -> str | None:
        """The path of a row's file; None where it has none of its own."""
        source = self.items[self.at[row]] if self.at[row] >= 0 else None
        return source if isinstance(source, str) else None

    def rates_of(self, rows: Indices) -> Counter[int]:
        """How many of these rows have a sound of which rate."""
        at = self.at[rows]
        rates, counts = np.unique(self.rates[at[at >= 0]], return_counts=True)
        return Counter({int(rate): int(count) for rate, count in zip(rates, counts, strict=True) if rate})


def _edges(content: bytes) -> bytes:
    return content if len(content) <= 2 * EDGE else content[:EDGE] + content[-EDGE:]
