"""Read the texts and vectors of all rows at once. These columns stay in memory as a whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import Indices
from counterpoint.data.own.arrow import codes_of, is_text, nulled, numbers, of_numbers, of_texts, pa, pa_csv, pc, valid
from counterpoint.data.own.cells import not_finite, text_of, vector_of
from counterpoint.data.own.table import ArrowCells, Cells, Table, is_blank
from counterpoint.errors import DataError

_AT_ONCE = 65_536


class Texts(Sequence[str]):
    """Texts of some rows, held as Arrow arrays; an empty string where a row has none.

    Args:
        chunks: Consecutive arrays of text.
        rows: [n] positions in them, -1 for a row without text.
    """

    def __init__(self, chunks: Sequence[Any], rows: Indices) -> None:
        self.chunks, self.rows = list(chunks), rows
        self.starts = np.cumsum([0, *(len(chunk) for chunk in self.chunks)])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.texts(np.arange(len(self))[index])
        return self.texts(np.array([range(len(self))[index]]))[0]

    def texts(self, indices: Indices) -> list[str]:
        """Return the texts of n positions."""
        rows = self.rows[np.asarray(indices, np.int64)]
        out = np.full(len(rows), "", object)
        of = np.searchsorted(self.starts, rows, "right") - 1
        for chunk in np.flatnonzero(np.bincount(of[rows >= 0], minlength=1)):
            at = np.flatnonzero((of == chunk) & (rows >= 0))
            found = self.chunks[chunk].take(of_numbers(rows[at] - self.starts[chunk]))
            out[at] = np.array(found.to_pylist(), object)
        return [text or "" for text in out]


def read_texts(table: Table, cells: Cells) -> tuple[list[Any], NDArray[np.bool_], Indices, Indices, dict[int, str]]:
    """Read a column of texts.

    Returns five values:

    - its Arrow arrays;
    - the mask of the rows that have a text;
    - numbers that are equal where texts are equal, without the whitespace around them; -1 for a row without text;
    - the rows with an empty text;
    - the faults of other rows.
    """
    chunks: list[Any] = []
    trimmed: list[Any] = []
    empty: list[Indices] = []
    bad: dict[int, str] = {}
    for start, part in cells.parts():
        for array in _texts_of(start, part, bad):
            bare = pc.utf8_trim_whitespace(array)
            no = (numbers(pc.binary_length(bare)) == 0) & valid(bare)
            at = sum(len(chunk) for chunk in chunks)
            if no.any():
                empty.append(at + np.flatnonzero(no))
                array, bare = nulled(array, no), nulled(bare, no)
            same = bare.equals(array)
            chunks.append(array)
            trimmed.append(array if same else bare)
    if len({str(chunk.type) for chunk in chunks}) > 1:
        chunks, trimmed = ([c.cast(pa.large_string()) for c in part] for part in (chunks, trimmed))
    has = np.concatenate([valid(c) for c in chunks]) if chunks else np.zeros(0, bool)
    group = np.full(len(has), -1, np.int64)
    if has.any():
        at = 0
        for encoded in pc.dictionary_encode(pa.chunked_array(trimmed)).chunks:
            group[at : at + len(encoded)] = codes_of(encoded)
            at += len(encoded)
    return chunks, has, group, np.concatenate([np.zeros(0, np.int64), *empty]), bad


def _texts_of(start: int, part: Any, bad: dict[int, str]) -> Iterator[Any]:
    """Yield a part of a column as Arrow arrays of text."""
    if not isinstance(part, Cells) and is_text(part.type):
        yield part
        return
    cells = part if isinstance(part, Cells) else ArrowCells(part)
    for at in range(0, len(cells), _AT_ONCE):
        yield _written(start, at, min(at + _AT_ONCE, len(cells)), cells, bad)


def _written(start: int, first: int, stop: int, part: Cells, bad: dict[int, str]) -> Any:
    """Convert rows of a part to an Arrow array, with null for empty cells."""
    texts: list[str | None] = []
    for row in range(first, stop):
        try:
            texts.append(text_of(part[row]))
        except DataError as error:
            bad[start + row] = str(error)
            texts.append(None)
    return of_texts(texts)


# -------------------------------------------------------------------------------------------------------------- vectors


def read_numbers(columns: Sequence[tuple[str, Cells]]) -> tuple[NDArray[np.float64], dict[int, str]]:
    """Read columns of one number in each row.

    Returns the numbers [rows, columns], NaN where a cell is empty, and the faults of other rows.
    """
    count = len(columns[0][1])
    found, bad = np.full((count, len(columns)), np.nan), dict[int, str]()
    for at, (name, cells) in enumerate(columns):
        for row, cell in enumerate(cells):
            if is_blank(cell):
                continue
            try:
                value = math.nan if isinstance(cell, bool) else float(cell)
            except (TypeError, ValueError):
                value = math.nan
            if math.isfinite(value):
                found[row, at] = value
            else:
                bad.setdefault(row, f"'{name}' is no finite number")
    return found, bad


class _Block:
    """Vectors of one length: their rows and values [n, length]."""

    def __init__(self, rows: Indices, values: NDArray[np.float32]) -> None:
        self.rows, self.values = rows, values


def read_vectors(table: Table, cells: Cells) -> tuple[NDArray[np.float32], Indices, dict[int, str]]:
    """Read a column of vectors.

    The most frequent length is dim; of two equally frequent lengths, the first one. Vectors of other lengths are faults.

    Returns the vectors [n, dim], the position of each row's vector (-1 without one), and the faults of other rows.
    """
    bad: dict[int, str] = {}
    blocks = [block for start, part in cells.parts() for block in _blocks(table, start, part, bad)]
    lengths: Counter[int] = Counter()
    first: dict[int, int] = {}
    for block in blocks:
        length = block.values.shape[1]
        lengths[length] += len(block.rows)
        first[length] = min(first.get(length, len(table)), int(block.rows[0]))
    dim = min(lengths, key=lambda length: (-lengths[length], first[length])) if lengths else 0
    for block in blocks:
        if block.values.shape[1] != dim:
            reason = f"has {block.values.shape[1]} numbers, but most rows have {dim}"
            bad |= dict.fromkeys(block.rows.tolist(), reason)
    right = [block for block in blocks if block.values.shape[1] == dim]
    at = np.full(len(table), -1, np.int64)
    rows = np.concatenate([np.zeros(0, np.int64), *(block.rows for block in right)])
    at[rows] = np.arange(len(rows))
    values = np.zeros((len(rows), dim), np.float32)
    done = 0
    for block in right:
        values[done : done + len(block.rows)] = block.values
        done += len(block.rows)
        block.values = block.values[:0]
    for row in bad:
        at[row] = -1
    return values, at, bad


def _blocks(table: Table, start: int, part: Any, bad: dict[int, str]) -> Iterator[_Block]:
    if not isinstance(part, Cells):
        for at in range(0, len(part), _AT_ONCE):
            piece = part[at : at + _AT_ONCE]
            found = _parsed(piece) if is_text(piece.type) else piece
            if found is not None:
                yield from _ragged(start + at, found, bad)
            else:
                yield from _one_by_one(table, start + at, ArrowCells(piece), bad)
    else:
        yield from _one_by_one(table, start, part, bad)


def _one_by_one(table: Table, start: int, part: Cells, bad: dict[int, str]) -> Iterator[_Block]:
    rows: dict[int, list[int]] = {}
    values: dict[int, list[NDArray[np.float32]]] = {}
    folder, until = "", -1
    for row, cell in enumerate(part, start):
        if row > until:  # the next file
            segment = table.where(row)[0]
            folder, until = table.segments[segment].base, int(table.starts[segment + 1]) - 1
        try:
            found = vector_of(cell, folder)
        except DataError as error:
            bad[row] = str(error)
            continue
        if found is not None:
            rows.setdefault(len(found), []).append(row)
            values.setdefault(len(found), []).append(found)
    for length, of in rows.items():
        yield _Block(np.array(of, np.int64), np.stack(values[length]))


def _parsed(texts: Any) -> Any:
    """Parse numbers as text, "[0.1, 2]" or "0.1 2", to Arrow lists. Return None where a row has another form."""
    bare = pc.utf8_trim(pc.utf8_trim_whitespace(texts), "[]()")
    if texts.null_count:
        return None
    spaced = pc.replace_substring(pc.utf8_trim_whitespace(bare), ", ", ",")
    if any(pc.any(pc.match_substring(spaced, mark)).as_py() for mark in " ;\t"):
        spaced = pc.replace_substring_regex(spaced, r"[,;\s]+", ",")
    counts = numbers(pc.count_substring(spaced, ",")).astype(np.int64) + 1
    filled = numbers(pc.binary_length(spaced)) > 0
    width = np.flatnonzero(np.bincount(counts[filled])) if filled.any() else np.array([0])
    if len(width) != 1:
        return None
    lines = "\n".join(spaced.filter(of_numbers(filled)).to_pylist()).encode()
    names = [str(n) for n in range(int(width[0]))]
    try:
        found = pa_csv.read_csv(
            pa.BufferReader(lines),
            pa_csv.ReadOptions(column_names=names, block_size=max(1 << 20, len(lines) + 1)),
            pa_csv.ParseOptions(quote_char=False),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.float64()), null_values=[]),
        )
    except pa.ArrowInvalid:
        return None
    if found.num_rows != filled.sum():
        return None
    values = np.empty((found.num_rows, len(names)), np.float32)
    with np.errstate(over="ignore"):
        for n, name in enumerate(names):
            values[:, n] = np.concatenate([numbers(chunk) for chunk in found[name].chunks])
    offsets = np.concatenate([[0], np.cumsum(filled * len(names))])
    return pa.LargeListArray.from_arrays(of_numbers(offsets.astype(np.int64)), of_numbers(values.reshape(-1)))


def _ragged(start: int, lists: Any, bad: dict[int, str]) -> Iterator[_Block]:
    """Yield the vectors of an Arrow array of lists of numbers, in blocks of equal length."""
    if pa.types.is_fixed_size_list(lists.type):
        lists = lists.cast(pa.large_list(lists.type.value_type))
    counts = np.where(valid(lists), numbers(pc.list_value_length(lists)), 0).astype(np.int64)
    flat = lists.flatten()  # without the values of null rows
    with np.errstate(over="ignore"):
        values = np.asarray(numbers(flat), np.float32)
    if flat.null_count:
        values = np.where(valid(flat), values, np.float32(np.nan))
    begins = np.cumsum(counts) - counts
    for length in np.flatnonzero(np.bincount(counts))[0 if counts.all() else 1 :] if len(counts) else ():
        rows = np.flatnonzero(counts == length)
        if len(rows) * length == len(values):
            found = values.reshape(-1, length)
        else:
            found = values[begins[rows][:, None] + np.arange(length)]
        finite = np.isfinite(found)
        whole = finite.all(1)
        for n in np.flatnonzero(~whole):
            wrong = np.flatnonzero(~finite[n])
            bad[start + int(rows[n])] = not_finite(len(wrong), int(wrong[0]))
        if whole.any():
            yield _Block(start + rows[whole], found[whole] if not whole.all() else found)


def same_vectors(values: NDArray[np.float32], at: Indices) -> Indices:
    """Return numbers of rows that are equal where their vectors are, -1 without one. One sort; otherwise linear time."""
    group = np.full(len(at), -1, np.int64)
    if not len(values):
        return group
    bits = (values + np.float32(0)).view(np.uint32)  # -0 and 0 are one number
    weights = np.random.default_rng(0).integers(1, 1 << 63, bits.shape[1], np.uint64) | np.uint64(1)
    key = np.zeros(len(bits), np.uint64)
    for n in range(0, len(bits), _AT_ONCE):
        part = bits[n : n + _AT_ONCE].astype(np.uint64)
        key[n : n + _AT_ONCE] = (part * weights).sum(1, dtype=np.uint64)
    _, first, of = np.unique(key, return_index=True, return_inverse=True)
    alike = all(
        np.array_equal(values[n : n + _AT_ONCE], values[first[of[n : n + _AT_ONCE]]])
        for n in range(0, len(values), _AT_ONCE)
    )
    if not alike:  # different vectors with one key, which almost never happens
        of = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
    group[at >= 0] = of[at[at >= 0]]
    return group
