"""Read the pictures, sounds and videos of all rows. Every distinct file or content is examined once.

Where a whole set fits into `KEEP`, it is decoded at the start, so that all damage is found then. Otherwise only headers are
read at the start, and cells are decoded on demand.

Two sources are equal where they are the same file, or hold the same bytes. Sizes are compared first, then the beginning and
the end. Only where these are equal are the whole contents compared.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.images import Indices, Pixels, check_header, decode
from counterpoint.data.own.arrow import codes_of, is_text, pc
from counterpoint.data.own.cells import Source, as_file, opened, path_of, source_of
from counterpoint.data.own.roles import Role
from counterpoint.data.own.table import ArrowCells, Cells, Slice, Table
from counterpoint.data.sounds import Sound, check_sound, decode_sound, sound_of_numbers
from counterpoint.errors import DataError

EDGE = 4096  # bytes of the beginning and of the end that distinguish most files
WHOLE_FILE = 32 << 20  # maximum bytes of a picture's file that is read at once


@dataclass(frozen=True)
class Wanted:
    """The form of decoded data: pictures of `size` x `size` pixels, waves of `samples` at `rate` samples per second."""

    size: int
    rate: int
    samples: int


class Sources:
    """The distinct sources of one column.

    Args:
        table: The table whose rows name the sources.
        role: The column's role.
        cells: The column's cells.
        wanted: The form of decoded pictures and sounds.
    """

    def __init__(self, table: Table, role: Role, cells: Cells, wanted: Wanted) -> None:
        self.table, self.role, self.wanted = table, role, wanted
        self.items: list[Source] = []
        self.bad: dict[int, str] = {}  # rows with an invalid cell, and the reason
        self.at = np.full(len(table), -1, np.int64)  # the source of each row
        self._read(cells)
        count = len(self.items)
        self.reasons: dict[int, str] = {}  # by source: why it cannot be used
        self.rates = np.zeros(count, np.int64)  # samples per second of a source's sound, 0 for none
        self.sounding = np.zeros(count, bool)  # whether a video has a usable sound
        self.group = np.arange(count)  # numbers that are equal where sources are equal
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
        """Read rows of paths as text. A path in several rows is one source."""
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
        codes = codes_of(found)
        self.at[start : start + len(part)] = of[codes]
        for row in np.flatnonzero(np.isin(codes, list(refused))):
            self.bad[start + int(row)] = refused[int(codes[row])]

    # --- examination

    @property
    def bytes_each(self) -> int:
        """Bytes of memory of a decoded source."""
        picture, sound = 3 * self.wanted.size**2, 4 * self.wanted.samples
        return {"image": picture, "audio": sound, "video": picture + sound}[self.role.kind]

    def examine(self, whole: bool, *, sounds: bool = False) -> Iterator[int]:
        """Examine every source, one at each step.

        Args:
            whole: Decode and keep each source. False: read only its header.
            sounds: Also examine the sounds of videos.
        """
        size, count = self.wanted.size, len(self.items)
        if whole and self.role.kind != "audio":
            self.pixels = np.zeros((count, size, size, 3), np.uint8)
        if whole and (self.role.kind == "audio" or sounds):
            self.waves = np.zeros((count, self.wanted.samples), np.float32)
        sizes: dict[Any, list[int]] = {}
        looks = {"image": self._image, "audio": self._audio, "video": self._video}
        look = looks[self.role.kind]
        for n, source in enumerate(self.items):
            try:
                content, size = self._content(source)
                look(n, content, sounds)
                sizes.setdefault(size, []).append(n)
            except DataError as error:
                self.reasons[n] = str(error)
            yield n
        self._compare([alike for alike in sizes.values() if len(alike) > 1])

    def _content(self, source: Source) -> tuple[Any, int]:
        """Return a source in the form that a decoder takes, and its size in bytes; -1 for samples in an array."""
        if isinstance(source, dict):
            return source, -1
        if not isinstance(source, str):
            content = opened(source)
            return content, len(content) if isinstance(content, bytes) else -1
        try:
            found = os.stat(source)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError("no such file") from error
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError("is no file")  # a pipe, say, which would be waited for
        if not found.st_size:
            raise DataError("is empty (0 bytes)")
        if self.role.kind == "image" and self.pixels is not None and found.st_size <= WHOLE_FILE:
            try:
                with open(source, "rb", buffering=0) as file:
                    return file.read(), found.st_size
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror or error})") from error
        return source, found.st_size

    def _compare(self, candidates: list[list[int]]) -> None:
        """Number the sources by their contents. A source with a unique size equals no other."""
        for key in (self._edges, self._digest):
            kept = []
            for alike in candidates:
                found: dict[Any, list[int]] = {}
                for n in alike:
                    found.setdefault(key(n), []).append(n)
                kept += [same for same in found.values() if len(same) > 1]
            candidates = kept
        for alike in candidates:
            self.group[alike] = alike[0]

    def _edges(self, n: int) -> Any:
        """Return the beginning and the end of a source."""
        return self._hashed(
            n, lambda file, size: file.read(EDGE) + (file.seek(max(0, size - EDGE)), file.read(EDGE))[1]
        )

    def _digest(self, n: int) -> Any:
        """Return the digest of the whole content of a source."""

        def digest(file: BinaryIO, size: int) -> bytes:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
            return found.digest()

        return self._hashed(n, digest)

    def _hashed(self, n: int, of: Callable[[BinaryIO, int], bytes]) -> Any:
        source = self.items[n]
        try:
            if isinstance(source, str):
                with open(source, "rb", buffering=0) as file:
                    return hashlib.sha256(of(file, os.fstat(file.fileno()).st_size)).digest()
            if isinstance(source, dict):
                numbers = np.asarray(source["array"], np.float64)
                content = repr((source.get("sampling_rate"), numbers.shape)).encode() + numbers.tobytes()
            else:
                found = opened(source)
                assert isinstance(found, bytes)
                content = found
            return hashlib.sha256(of(io.BytesIO(content), len(content))).digest()
        except (OSError, DataError):
            return n  # deleted since it was examined: it equals no other source

    def _image(self, n: int, content: Any, sounds: bool) -> None:
        if self.pixels is not None:
            self.pixels[n] = self.image(content)
        elif isinstance(content, str):
            try:
                with open(content, "rb") as file:
                    check_header(file)
            except OSError as error:
                raise DataError(f"cannot be read ({error.strerror or error})") from error
        else:
            check_header(opened(content))

    def _audio(self, n: int, content: Any, sounds: bool) -> None:
        if self.waves is not None:
            found = self.sound(content)
            self.waves[n], self.rates[n] = found.wave, found.rate
        elif isinstance(content, dict):
            self.rates[n] = self.sound(content).rate
        else:
            self.rates[n] = check_sound(opened(content))

    def _video(self, n: int, content: Any, sounds: bool) -> None:
        from counterpoint.data.media import probe

        with as_file(self.items[n]) as path:
            if self.pixels is not None:
                self.pixels[n] = self._frame(path)
            elif not probe(path).has_audio:
                return
            if not sounds:
                return
            # A video without sound, or with a silent one, still counts as a picture.
            try:
                if self.waves is not None:
                    found = decode_sound(path, self.wanted.rate, self.wanted.samples)
                    self.waves[n], self.rates[n] = found.wave, found.rate
                else:
                    self.rates[n] = check_sound(path)
                self.sounding[n] = True
            except DataError:
                return

    # --- decoding

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
        """Decode the middle frame of a video as a square."""
        from counterpoint.data.media import frame_at, probe

        size = self.wanted.size
        try:
            info = probe(path)
            # The short side must not be smaller than the square.
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
        """Return the faults of rows, in their cell or their source, by row."""
        found = dict(self.bad)
        if self.reasons:
            wrong = np.isin(self.at, list(self.reasons))
            found |= {int(row): self.reasons[int(self.at[row])] for row in np.flatnonzero(wrong)}
        return found

    def groups(self, has: NDArray[np.bool_], at: Indices) -> Indices:
        """Return numbers of rows that are equal where their sources are equal; -1 where a row has none."""
        return np.where(has, self.group[at] if len(self.group) else -1, -1)

    def file(self, row: int) -> str | None:
        """Return the path of a row's own file; None where it has none."""
        source = self.items[self.at[row]] if self.at[row] >= 0 else None
        return source if isinstance(source, str) else None

    def rates_of(self, rows: Indices) -> Counter[int]:
        """Count these rows by the rate of their sound."""
        at = self.at[rows]
        rates, counts = np.unique(self.rates[at[at >= 0]], return_counts=True)
        return Counter({int(rate): int(count) for rate, count in zip(rates, counts, strict=True) if rate})
