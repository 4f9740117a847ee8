"""`manifest:PLACE`: the user's own items in any number of modalities, one row each, from a table or from archives.

    manifest:items.csv      .csv, .tsv, .jsonl, .json (a list of records) or .parquet; a column for every modality
    manifest:DIR            all such files of one kind in DIR and in DIR/train, DIR/test, DIR/validation
    manifest:'d/*.parquet'  a pattern
    manifest:'s/*.tar'      WebDataset archives: 0001.jpg, 0001.txt, 0001.wav, 0001.npy, 0001.cls, 0001.json are one item

A column's kind is told by its name (see KINDS): `image`, `jpg`, `image_left`, `caption`, `wav`, `video`, `vector_gyro`. Or
it is said: `?columns=photo:image,title:text,imu:vector`, and then only those columns count. Kinds beside the modalities
are `label`, `split` (train, test, validation) and `id`. In archives, members with one ending are a modality named by its
kind, `0001.left.jpg` is `image_left`, and fields of the records are `json.FIELD`.

A cell is a path, absolute or from the file's folder (for a text: the text itself); bytes; a record {"bytes", "path"} or
{"array", "sampling_rate"} as `datasets` writes it; for a vector a list of numbers, also written out, or a .npy file. An
empty cell means that the row lacks this modality, which any row may.

    image   the largest centred square, scaled to `size` (data/images.py)
    audio   mono at `rate`, the centre `seconds` of it, or zeros after a shorter one (data/sounds.py)
    video   its middle frame as an image, and, when no column is audio, its sound as a further modality NAME_sound
    text    as it stands; how much of it a model reads is the task's affair
    vector  float32, all of one length: that which most rows have

The test split is the rows that say so in a split column, or that come from files or folders named test (validation where
there is no test); else a fifth made here, the same every time, each class in proportion. `?test=0.1` makes another,
`?test=NAME` takes another split. Rows with one modality only go to `unpaired`, unless they are test rows.

A damaged cell, a duplicate id, a line that cannot be read or a row without anything makes a bad row: it is left out. Ids are
compared within a split's files: `train.csv` and `test.csv` may both count from 1. All bad rows are listed with their reason
in a CSV file in the cache folder, `reports/`, and with them what is used all the same: rows with an empty caption (missing),
sounds of another rate (resampled), captions of which a model does not read the end (cut). More bad rows than `max_bad` (a
count, or a fraction of the rows below 1) are an error. What fits in memory is decoded whole at the start; of
larger sets only headers are read then, and cells are decoded when asked for. Nothing is ever fetched from the net.

Not here: more than one frame of a video, groups, domains, and tables of more rows than fit in memory as paths and texts.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import lzma
import os
import re
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.images import (
    KEEP,
    Indices,
    Pixels,
    check_header,
    checked_size,
    decode,
    some,
    split_positions,
)
from counterpoint.data.pairs import AlignedColumns, AlignedData, Kind, Modality
from counterpoint.data.sounds import (
    Sound,
    check_sound,
    checked_rate,
    decode_sound,
    resampled_note,
    sound_of_numbers,
)
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.files import cache_folder, replacing

# A column's kind by a word of its name; the first of these kinds that fits counts.
KINDS: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "text": ("text", "txt", "caption", "captions", "title", "description", "sentence", "transcript"),
    "audio": ("audio", "sound", "wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "speech"),
    "video": ("video", "mp4", "clip", "movie", "mov", "avi", "mkv", "webm"),
    "vector": ("vector", "embedding", "embeddings", "features", "feature", "npy", "sensor"),
}
WHOLE = {  # these must be the whole name
    "label": ("label", "labels", "class", "cls", "category", "target"),
    "split": ("split",),
    "id": ("id", "item_id"),
}
# What a name such as `image_id` or `audio_rate` ends in is about the modality, not the modality.
ABOUT = ("id", "ids", "url", "width", "height", "size", "length", "len", "rate", "count", "hash", "seconds", "duration")
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
ENDINGS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tgz": "tar",
    ".gz": "tar",
    ".bz2": "tar",
    ".xz": "tar",
}
FRACTION = 0.2
# Names that a network's dictionary of modules has for itself.
TAKEN = frozenset(
    ("keys", "values", "items", "pop", "clear", "update", "train", "eval", "type", "float", "half", "double")
)


def load_manifest(
    place: str,
    *,
    task: str = "aligned",
    size: int = 64,
    rate: int = 16000,
    seconds: float = 2.0,
    test: str = "",
    max_bad: float = 0.1,
    columns: str = "",
) -> AlignedData:
    """Open the set (see the module): on the command line `manifest:items.csv?size=32`.

    Args:
        place: a file, folder or pattern.
        size: pixels of images and frames, height and width.
        rate: samples per second of sounds.
        seconds: length of sounds.
        test: the fraction to test on, or the name of the split.
        max_bad: bad rows that are put up with, as a fraction of all below 1 or as a count.
        columns: `NAME:KIND` separated by commas; default: by their names.

    Raises DataError when files cannot be read, columns are missing, too many rows are bad, nothing usable is left, or a
    modality is nowhere; CounterpointError when an option makes no sense or a library is missing.
    """
    checked_size(size)
    samples = checked_rate(rate, seconds)
    if not max_bad >= 0:
        raise CounterpointError(f"max_bad is a number of rows, or a fraction of them below 1; got {max_bad}")
    if not place:
        raise CounterpointError("manifest needs a place: manifest:FILE")
    table = _table(place)
    cast = _cast(place, table, columns)
    reader = _Reader(place, table, cast, size, rate, samples)
    reader.read()
    report = reader.report(columns)
    reader.judge(max_bad, report)
    return _aligned(place, reader, test, report)


# ---------------------------------------------------------------------------------------------------- rows, from files


class Slice(NamedTuple):
    """Bytes that stay on disk: a stretch of a file."""

    file: int | Path  # a descriptor, or a file
    offset: int
    size: int

    def read(self) -> bytes:
        """All of it. DataError when it is no longer there."""
        try:
            if isinstance(self.file, int):
                # Has no position of its own, so processes and threads do not disturb each other.
                found = os.pread(self.file, self.size, self.offset)
            else:
                with self.file.open("rb") as file:
                    file.seek(self.offset)
                    found = file.read(self.size)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from error
        if len(found) != self.size:
            raise DataError("has been cut short since it was opened")
        return found


class _Spool:
    """Bytes of cells: in memory while there are few, then in a file without a name that vanishes with the process."""

    def __init__(self) -> None:
        self.held = 0
        self.file: Any = None

    def keep(self, content: bytes) -> bytes | Slice:
        self.held += len(content)
        if self.held <= KEEP:
            return content
        if self.file is None:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the data
        offset = self.file.seek(0, io.SEEK_END)
        self.file.write(content)
        self.file.flush()
        return Slice(self.file.fileno(), offset, len(content))


@dataclass(slots=True, eq=False)
class _Row:
    """A row as its file has it."""

    file: Path
    number: int  # from 1, in its file
    cells: dict[str, Any]
    broken: str = ""  # why it is none
    split: str = ""  # which its file stands for


@dataclass
class _Table:
    rows: list[_Row] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    usual: dict[str, str] = field(default_factory=dict)  # kinds that are known without their names
    classes: dict[str, list[str]] = field(default_factory=dict)  # names of numbered classes, by column
    spool: _Spool = field(default_factory=_Spool)

    def add_columns(self, names: Sequence[str]) -> None:
        known = set(self.columns)
        self.columns += [name for name in dict.fromkeys(names) if name not in known]


def _table(place: str) -> _Table:
    """All rows of all files of a place."""
    table = _Table()
    for path, kind in _files(place):
        before = len(table.rows)
        try:
            _FORMATS[kind](path, table)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except MemoryError as error:
            raise DataError(f"{path}: asks for more memory than there is; it may be damaged") from error
        split = _file_split(path, place)
        for row in table.rows[before:]:
            row.split = split
    if not table.rows:
        raise DataError(f"{place}: holds no rows; it should have one for every item")
    if not table.columns:
        raise DataError(
            f"{place}: none of its rows can be read: {_row_name(table.rows[0], place)}: {table.rows[0].broken}"
        )
    return table


def _files(place: str) -> list[tuple[Path, str]]:
    """The files of a place with their kinds."""
    try:
        root = Path(place)
        if root.is_dir():
            folders = [
                root,
                *(child for child in sorted(root.iterdir()) if child.is_dir() and child.name.lower() in SPLITS),
            ]
            found = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
            # A folder's lone .json or .gz is more often about the data than the data.
            found = [path for path in found if path.suffix.lower() in ENDINGS and _kind(path) not in ("json", "")]
            kinds = sorted({_kind(path) for path in found})
            if len(kinds) > 1:
                raise DataError(f"{place}: holds files of several kinds ({', '.join(kinds)}); name one, or a pattern")
        elif root.is_file():
            found = [root]
        else:
            found = [Path(name) for name in sorted(glob.glob(place, recursive=True)) if Path(name).is_file()]
    except (OSError, ValueError, re.error) as error:
        raise DataError(f"{place}: cannot be opened ({error})") from error
    if not found:
        what = "holds no table or archive" if root.is_dir() else "no such file, folder or pattern"
        raise DataError(f"{place}: {what}; it should name .csv, .tsv, .jsonl, .parquet or .tar files")
    for path in found:
        if not _kind(path):
            raise DataError(
                f"{path}: its ending says no kind that can be read: .csv, .tsv, .jsonl, .json, .parquet, .tar"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes)")
    return [(path, _kind(path)) for path in found]


def _kind(path: Path) -> str:
    kind = ENDINGS.get(path.suffix.lower(), "")
    packed = path.suffix.lower() in (".gz", ".bz2", ".xz")
    return "" if packed and Path(path.stem).suffix.lower() != ".tar" else kind


def _file_split(path: Path, place: str) -> str:
    """The split that a file's name, or its folder's within the place, stands for."""
    first = re.split(r"[-_. 0-9]", path.name.lower(), maxsplit=1)[0]
    if first in SPLITS:
        return SPLITS[first]
    inside = path.parent != Path(place).parent and path.parent.name.lower()
    return SPLITS.get(inside, "") if inside and path.parent != Path(place) else ""


def _read_csv(path: Path, table: _Table) -> None:
    text = _text(path)
    header, _, _ = text.partition("\n")
    tabs = path.suffix.lower() == ".tsv" or ("\t" in header and not {",", ";"} & set(header))
    between = "\t" if tabs else ";" if ";" in header and "," not in header else ","
    limit = csv.field_size_limit(1 << 27)  # vectors written out are long
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=between)
        names = [name.strip() for name in next(lines, [])]
        if not any(names):
            raise DataError(f"{path}: has no header; its first line should name the columns")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or "" in names:
            what = f"names the column '{twice[0]}' twice" if twice and twice[0] else "has a column without a name"
            raise DataError(f"{path}: {what}; mend its first line")
        table.add_columns(names)
        for cells in lines:
            if not cells:
                continue
            number = _next(table, path)
            if len(cells) != len(names):
                broken = f"has {len(cells)} fields where the header has {len(names)}"
                table.rows.append(_Row(path, number, {}, broken))
            else:
                table.rows.append(_Row(path, number, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path}: not a table that can be read ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _next(table: _Table, path: Path) -> int:
    """The number of the next row of a file that is being read."""
    last = table.rows[-1] if table.rows else None
    return last.number + 1 if last is not None and last.file == path else 1


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error


def _parsed(text: str | bytes) -> Any:
    """JSON, or DataError with what is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError("is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise DataError(f"is not JSON ({str(error)[:120]})") from error


def _read_jsonl(path: Path, table: _Table) -> None:
    number = 0
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            number += 1
            try:
                _add_record(path, table, number, _parsed(line.removeprefix(b"\xef\xbb\xbf")))
            except DataError as error:
                table.rows.append(_Row(path, number, {}, str(error)))


def _read_json(path: Path, table: _Table) -> None:
    try:
        records = _parsed(path.read_bytes())
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: should be a list of records; one record a line belongs in a .jsonl file")
    for number, record in enumerate(records, 1):
        _add_record(path, table, number, record)


def _add_record(path: Path, table: _Table, number: int, record: Any) -> None:
    if isinstance(record, dict):
        table.add_columns(list(record))
        table.rows.append(_Row(path, number, record))
    else:
        table.rows.append(_Row(path, number, {}, f"is a {type(record).__name__}, not a record"))


def _read_parquet(path: Path, table: _Table) -> None:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]
    except ImportError as error:
        raise CounterpointError(
            "reading Parquet needs the extra [datasets]: pip install 'counterpoint[datasets]'"
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = list(schema.names)
            if len(set(names)) != len(names):
                raise DataError(f"{path}: has two columns of one name")
            table.add_columns(names)
            table.classes |= _known_classes(schema.metadata)
            number = 0
            for batch in file.iter_batches(batch_size=64):
                parts = [_cells(pa, column, table.spool) for column in batch.columns]
                for row in range(batch.num_rows):
                    number += 1
                    cells = {name: part[row] for name, part in zip(names, parts, strict=True)}
                    table.rows.append(_Row(path, number, cells))
    except DataError:
        raise
    except Exception as error:  # pyarrow raises kinds of its own, and Python's, on damaged files
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a Parquet file that can be read ({said})") from error


def _cells(pa: Any, column: Any, spool: _Spool) -> list[Any]:
    """A column's values: lists of numbers as arrays (as Python's lists they take ten times the memory), bytes spooled."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        if pa.types.is_floating(inner) or pa.types.is_integer(inner):
            return [
                np.asarray(cell.values.to_numpy(zero_copy_only=False), np.float64) if cell.is_valid else None
                for cell in column
            ]
    found = column.to_pylist()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [value if value is None else spool.keep(value) for value in found]
    if pa.types.is_struct(kind):
        for value in found:
            if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
                value["bytes"] = spool.keep(value["bytes"])
    return list(found)


def _known_classes(metadata: Any) -> dict[str, list[str]]:
    """Names of numbered classes as `datasets` writes them into a Parquet file."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {name: what.get("names") for name, what in features.items() if isinstance(what, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: [str(n) for n in names] for name, names in found.items() if isinstance(names, list)}


def _read_tar(path: Path, table: _Table) -> None:
    """WebDataset: members of one name are one item, in the order in which the names first come."""
    samples: dict[str, _Row] = {}
    try:
        with path.open("rb") as file:
            packed = file.read(6)
        plain = not packed.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        end = path.stat().st_size
        with tarfile.open(path, "r:" if plain else "r:*") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not member.isreg() or not stem or not ending or stem.startswith("__"):
                    continue
                if plain and member.offset_data + member.size > end:
                    raise DataError(f"{path}: is cut short: {member.name} goes beyond its end")
                key = f"{folder}/{stem}" if folder else stem
                if key not in samples:
                    samples[key] = _Row(path, len(samples) + 1, {"__key__": key})
                column, kind = _member(ending.lower())
                content: Any
                if plain and not member.issparse() and kind not in ("text", "label", ""):
                    content = Slice(path, member.offset_data, member.size)
                else:
                    opened = archive.extractfile(member)
                    content = opened.read() if opened is not None else b""
                    content = content if kind in ("text", "label", "") else table.spool.keep(content)
                _add_member(table, samples[key], column, kind, content, member.name)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not a tar file that can be read ({str(error)[:200]}); damaged or cut short?"
        ) from error
    except OSError as error:  # of bz2 and gzip too
        raise DataError(f"{path}: cannot be read ({error})") from error
    table.rows += samples.values()
    if samples:
        table.add_columns(["__key__"])
        table.usual["__key__"] = "id"


def _member(ending: str) -> tuple[str, str]:
    """The column and kind of a member by its ending: jpg is the image, left.jpg another."""
    *before, last = ending.split(".")
    kind = next((kind for kind, words in (KINDS | {"label": WHOLE["label"]}).items() if last in words), "")
    if not kind:
        return ending, ""
    return "_".join([kind, *(word for word in before if word != kind)]), kind


def _add_member(table: _Table, row: _Row, column: str, kind: str, content: Any, name: str) -> None:
    if kind in ("text", "label"):
        try:
            content = content.decode("utf-8")
        except UnicodeDecodeError:
            content = _Bad("is not text in UTF-8")
        content = content.strip() if kind == "label" else content
    elif column == "json":
        try:
            record = _parsed(content)
        except DataError as error:
            row.broken = f"{name} {error}"
            return
        if isinstance(record, dict):
            record = {f"json.{name}": value for name, value in record.items()}
            table.add_columns(list(record))
            row.cells |= record
        return
    elif not kind:
        return  # a member of a kind that is none of ours
    if column in row.cells:
        row.broken = f"has two members that are its {column}"
        return
    table.add_columns([column])
    table.usual[column] = kind
    row.cells[column] = content


_FORMATS: dict[str, Callable[[Path, _Table], None]] = {
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "tar": _read_tar,
}


# ------------------------------------------------------------------------------------------------ what the columns are


class _Bad(str):
    """In a cell's place: why it cannot be used."""


@dataclass
class _Column:
    """One modality: where its cells stand and what became of them."""

    name: str
    column: str
    kind: str  # of KINDS
    cells: list[Any] = field(default_factory=list)  # one a row: what `_Reader` decodes; None where there is nothing

    @property
    def gives(self) -> Kind:
        return "image" if self.kind == "video" else self.kind  # type: ignore[return-value]


@dataclass
class _Cast:
    """Which column plays what."""

    modalities: list[_Column]
    label: str = ""
    split: str = ""
    id: str = ""


def _cast(place: str, table: _Table, columns: str) -> _Cast:
    said = _said(place, table, columns)
    roles = {name: role for name in table.columns if (role := said.get(name, "") if said else _usual(name, table))}
    if not said:
        have = {kind for name, kind in roles.items() if not name.startswith("json.")}
        # A record beside an archive's members mostly says the same again.
        roles = {n: k for n, k in roles.items() if not (n.startswith("json.") and k in have)}
    cast = _Cast([])
    for name, role in roles.items():
        if role in KINDS:
            cast.modalities.append(_Column(_modality_name(name, cast.modalities), name, role))
        elif getattr(cast, role) and said:
            raise CounterpointError(f"columns names two columns as {role}: '{getattr(cast, role)}' and '{name}'")
        elif not getattr(cast, role):
            setattr(cast, role, name)
    kinds = [column.kind for column in cast.modalities]
    if len(kinds) < 2 and kinds != ["video"]:
        found = f"only '{cast.modalities[0].column}'" if kinds else "none"
        raise DataError(
            f"{place}: needs at least two columns that are modalities, and has {found} among {some(table.columns, ', ')}; say "
            f"what they are with ?columns=NAME:KIND,NAME:KIND (kinds: {', '.join(KINDS)})"
        )
    return cast


def _said(place: str, table: _Table, columns: str) -> dict[str, str]:
    """The option `columns`: column -> kind."""
    said: dict[str, str] = {}
    for part in filter(None, columns.split(",")):
        name, colon, kind = part.rpartition(":")
        if not colon or not name:
            raise CounterpointError(
                f"columns={columns}: '{part}' is not NAME:KIND (kinds: {', '.join([*KINDS, *WHOLE])})"
            )
        if kind not in KINDS and kind not in WHOLE:
            raise unknown(f"kind of the column '{name}'", kind, [*KINDS, *WHOLE])
        if name not in table.columns:
            raise DataError(f"{place}: no column '{name}'; it has {some(table.columns, ', ')}")
        said[name] = kind
    return said


def _usual(name: str, table: _Table) -> str:
    """What a column is by its name; empty when that says nothing."""
    if name in table.usual:
        return table.usual[name]
    lower = name.lower().removeprefix("json.")
    for role, names in WHOLE.items():
        if lower in names:
            return role
    words = [word for word in re.split(r"[^a-z0-9]+", lower) if word]
    if not words or words[-1] in ABOUT:
        return ""
    for word in (words[-1], words[0]):  # `image_embedding` is a vector, `image_left` an image
        for kind, names in KINDS.items():
            if word in names or word.rstrip("0123456789") in names:  # mp4, but image2
                return kind
    return ""


def _modality_name(column: str, others: Sequence[_Column]) -> str:
    """A name that modules and measures can have."""
    name = re.sub(r"\W+", "_", column.removeprefix("json.")).strip("_") or "column"
    name = f"{name}_" if name in TAKEN else name
    used = {other.name for other in others}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(used) + 3))) if n not in used)


# ------------------------------------------------------------------------------------------------------------ reading


class _Finding(NamedTuple):
    """One line of the report."""

    row: _Row
    column: str
    what: str  # "bad row", or of a row that is used "missing", "resampled" or "cut"
    value: str
    reason: str


@dataclass
class _Video:
    """A video's cell."""

    source: Path | bytes | Slice


class _Reader:
    """Reads the cells of every row once, and keeps what was decoded when all of it fits.

    `kept[name]` are arrays over all rows; without them `decoded` reads a cell again.
    """

    def __init__(self, place: str, table: _Table, cast: _Cast, size: int, rate: int, samples: int) -> None:
        self.place, self.rows, self.cast = place, table.rows, cast
        self.size, self.rate, self.samples = size, rate, samples
        self.classes = table.classes.get(cast.label)
        self.spool = table.spool  # its file lives as long as this
        self.columns = list(cast.modalities)
        self.sound_of: dict[str, _Column] = {}
        if not any(column.kind == "audio" for column in self.columns):
            for column in cast.modalities:
                if column.kind == "video":
                    sound = _Column(_modality_name(f"{column.name}_sound", self.columns), column.column, "audio")
                    self.sound_of[column.name] = sound
                    self.columns.append(sound)
        for column in self.columns:
            column.cells = [None] * len(self.rows)
        self.good = np.zeros(len(self.rows), bool)
        self.path = Path()  # the report's
        self.findings: list[_Finding] = []
        self.later: dict[tuple[str, str, str], list[_Finding]] = {}  # by split, column and what was found
        self.rates: Counter[int] = Counter()
        self.silent_videos = 0
        self.kept: dict[str, NDArray[Any]] = {}
        self.dims: dict[str, int] = {}

    # --- all rows

    def read(self) -> None:
        from rich.console import Console
        from rich.progress import track

        each = {"image": 3 * self.size**2, "audio": 4 * self.samples}
        wanted = {c.name: each[c.gives] for c in self.columns if c.gives in each}
        self.whole = len(self.rows) * sum(wanted.values()) <= KEEP
        if self.whole:
            for column in self.columns:
                shape, kind = (
                    ((self.size, self.size, 3), np.uint8) if column.gives == "image" else ((self.samples,), np.float32)
                )
                if column.gives in each:
                    self.kept[column.name] = np.zeros((len(self.rows), *shape), kind)
        self._vectors()
        seen: dict[Any, int] = {}
        console = Console(stderr=True)
        what = "reading items" if self.whole else "checking items"
        for i in track(range(len(self.rows)), what, console=console, transient=True, disable=len(self.rows) < 2000):
            self.good[i] = self._row(i, seen)

    def _row(self, i: int, seen: dict[Any, int]) -> bool:
        """Whether a row can be used; what it lacks is written down."""
        row = self.rows[i]
        if row.broken:
            return self._bad(i, "", None, row.broken)
        key = _id(row, self.cast.id)
        if key is not None and (row.split, key) in seen:
            first = self._name(seen[row.split, key])
            return self._bad(i, self.cast.id, key, f"the id is that of {first} too, which counts")
        if self.cast.split:
            value = row.cells.get(self.cast.split)
            if value is not None and not (isinstance(value, str) and len(value) < 100):
                return self._bad(i, self.cast.split, value, "is not the name of a split")
        good, before = True, len(self.findings)
        rates, silent = Counter(self.rates), self.silent_videos
        for column in self.cast.modalities:
            cell = column.cells[i] if column.kind == "vector" else row.cells.get(column.column)
            try:
                if isinstance(cell, _Bad):
                    raise DataError(str(cell))
                column.cells[i] = self._cell(i, column, cell)
            except DataError as error:
                column.cells[i] = None
                good = self._bad(i, column.column, row.cells.get(column.column), str(error))
        if good and not any(column.cells[i] is not None for column in self.columns):
            good = self._bad(i, "", None, "has no modality")
        if not good:
            self.rates, self.silent_videos = rates, silent
            self.findings[before:] = [found for found in self.findings[before:] if found.what == "bad row"]
        elif key is not None:  # the first row that can be used is the one that counts
            seen[row.split, key] = i
        return good

    def _bad(self, i: int, column: str, value: Any, reason: str) -> bool:
        self.findings.append(_Finding(self.rows[i], column, "bad row", _shown(value), reason))
        return False

    def _name(self, i: int) -> str:
        return _row_name(self.rows[i], self.place)

    # --- one cell

    def _cell(self, i: int, column: _Column, cell: Any) -> Any:
        """What a cell comes to, its decoded form put away; None when there is nothing in it."""
        if column.kind == "text":
            return self._text(i, column, cell)
        if column.kind == "vector":
            return cell
        source = self._source(i, cell)
        if source is None:
            return None
        if column.kind == "image":
            if self.whole:
                self.kept[column.name][i] = self.image(source)
            else:
                check_header(_opened(_file(source)))
            return source
        if column.kind == "audio":
            if self.whole or isinstance(source, dict):
                sound = self.sound(source)
                if self.whole:
                    self.kept[column.name][i] = sound.wave
                self._rated(i, column, sound.rate)
            else:
                self._rated(i, column, check_sound(_opened(_file(source))))
            return source
        return self._video(i, column, _Video(_file(source)))

    def _rated(self, i: int, column: _Column, rate: int) -> None:
        """Count the rate of a sound, and list the row where it is not the one that was asked for."""
        self.rates[rate] += 1
        if rate != self.rate:
            reason = f"resampled to {self.rate} Hz"
            self.findings.append(_Finding(self.rows[i], column.column, "resampled", f"{rate} Hz", reason))

    def _video(self, i: int, column: _Column, video: _Video) -> _Video:
        from counterpoint.data.media import probe

        with _as_file(video.source) as path:
            if self.whole:
                self.kept[column.name][i] = self._frame(path)
                sounds = True
            else:
                sounds = probe(path).has_audio
            sound = self.sound_of.get(column.name)
            if sound is not None and sounds:
                # A video without sound, or with a silent one, is a picture all the same.
                try:
                    found = decode_sound(path, self.rate, self.samples) if self.whole else None
                    self._rated(i, column, found.rate if found is not None else check_sound(path))
                    if found is not None:
                        self.kept[sound.name][i] = found.wave
                    sound.cells[i] = video
                except DataError:
                    self.silent_videos += 1
            elif sound is not None:
                self.silent_videos += 1
        return video

    def _text(self, i: int, column: _Column, cell: Any) -> str | None:
        if isinstance(cell, (list, tuple, np.ndarray)):
            cell = next((t for t in cell if isinstance(t, str) and t.strip()), None if not len(cell) else cell[0])
        cell = _opened(cell) if isinstance(cell, Slice) else cell
        if isinstance(cell, (bytes, bytearray)):
            try:
                cell = bytes(cell).decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError("is not text in UTF-8") from error
        if isinstance(cell, (int, float)) and cell == cell:
            cell = str(cell)
        if cell is None or cell != cell:  # as tables of numbers write what is missing
            return None
        if isinstance(cell, str) and not cell.strip():
            self.findings.append(_Finding(self.rows[i], column.column, "missing", _shown(cell), "empty text"))
            return None
        if not isinstance(cell, str):
            raise DataError(f"is a {type(cell).__name__}, not a text")
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write
            raise DataError("holds characters that are none") from error
        return cell

    def _source(self, i: int, cell: Any) -> Path | bytes | Slice | dict[str, Any] | None:
        """The file or bytes in a cell; None when it is empty."""
        if isinstance(cell, dict):
            if cell.get("array") is not None:
                return cell
            cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
        if cell is None or (isinstance(cell, float) and cell != cell):
            return None
        if isinstance(cell, (bytes, bytearray)):
            return bytes(cell)
        if isinstance(cell, Slice):
            return cell
        if not isinstance(cell, str):
            raise DataError(f"is no path and no bytes, but of type {type(cell).__name__}")
        text = cell.strip()
        if not text:
            return None
        if "://" in text:
            raise DataError("is on the net; download it and name the file")
        return Path(text) if Path(text).is_absolute() else self.rows[i].file.parent / text

    def image(self, source: Any) -> Pixels:
        """A decoded image or middle frame."""
        if isinstance(source, _Video):
            with _as_file(source.source) as path:
                return self._frame(path)
        return decode(_opened(_file(source)), self.size)

    def sound(self, source: Any) -> Sound:
        """A decoded sound, or a video's."""
        if isinstance(source, dict):
            rate = source.get("sampling_rate")
            if not isinstance(rate, int):
                raise DataError("has an array and no sampling_rate")
            return sound_of_numbers(source["array"], rate, self.rate, self.samples)
        if isinstance(source, _Video):
            with _as_file(source.source) as path:
                return decode_sound(path, self.rate, self.samples)
        return decode_sound(_opened(_file(source)), self.rate, self.samples)

    def _frame(self, path: Path) -> Pixels:
        """The middle frame of a video as a square."""
        from counterpoint.data.media import frame_at, probe

        try:
            info = probe(path)
            # The short side is to be no smaller than the square.
            width = max(1, -(-info.width * self.size // max(1, min(info.width, info.height))))
            frame = frame_at(path, info.duration / 2, width=width)
            frame = frame if frame is not None else frame_at(path, 0.0, width=width)
        except (ValueError, OSError, MemoryError) as error:  # a frame of impossible size or format
            raise DataError("its middle frame cannot be decoded") from error
        if frame is None:
            raise DataError("not a single frame could be decoded")
        side = min(frame.shape[:2])
        top, left = (frame.shape[0] - side) / 2, (frame.shape[1] - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(Image.fromarray(frame).resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))

    # --- vectors

    def _vectors(self) -> None:
        """Read all vectors; the length that most have is right, and others are marked as bad."""
        for column in self.cast.modalities:
            if column.kind != "vector":
                continue
            for i, row in enumerate(self.rows):
                try:
                    column.cells[i] = self._vector(i, row.cells.get(column.column))
                except DataError as error:
                    column.cells[i] = _Bad(error)
            lengths = Counter(len(cell) for cell in column.cells if isinstance(cell, np.ndarray))
            # Where two lengths are as frequent, the first to come counts: most_common keeps that order.
            self.dims[column.name] = dim = lengths.most_common(1)[0][0] if lengths else 0
            for i, cell in enumerate(column.cells):
                if isinstance(cell, np.ndarray) and len(cell) != dim:
                    column.cells[i] = _Bad(f"has {len(cell)} numbers where most rows have {dim}")

    def _vector(self, i: int, cell: Any) -> NDArray[np.float32] | None:
        if isinstance(cell, str) and (text := cell.strip()) and not text.lower().endswith(".npy"):
            cell = _numbers(text)
        if isinstance(cell, (list, tuple, np.ndarray)) and not isinstance(cell, Slice):
            if not len(cell):
                return None
            values: Any = cell
        elif isinstance(cell, (int, float)) and not isinstance(cell, bool) and cell == cell:
            values = [cell]
        else:
            source = self._source(i, cell)
            if source is None:
                return None
            values = _array(source)
        return checked_vector(values)

    # --- what was found

    def report(self, columns: str) -> Path | None:
        """Write all findings, if there are any, and say where."""
        # One name for one set, so that reports do not pile up.
        given = f"{os.path.abspath(self.place)}?{columns}"
        stem = re.sub(r"\W+", "-", Path(self.place).stem).strip("-")[:40] or "manifest"
        name = f"{stem}-{hashlib.sha256(given.encode('utf-8', 'replace')).hexdigest()[:8]}.csv"
        self.path = cache_folder() / "reports" / name
        return self._write()

    def list_rows(self, split: str, column: _Column, rows: Indices, what: str, reason: str) -> Path | None:
        """List these rows of a split in the report too, in place of what was said of it before, and say where that is."""
        found = [
            _Finding(self.rows[i], column.column, what, _shown(self.rows[i].cells.get(column.column)), reason)
            for i in rows
        ]
        if self.later.get((split, column.name, what), []) != found:
            self.later[split, column.name, what] = found
            self._write()
        return self.path

    def _write(self) -> Path | None:
        findings = [*self.findings, *(found for part in self.later.values() for found in part)]
        if not findings:
            self.path.unlink(missing_ok=True)
            return None
        text = io.StringIO()
        out = csv.writer(text)
        out.writerow(["file", "row", "id", "column", "what", "value", "reason"])
        for found in findings:
            key = _id(found.row, self.cast.id)
            where = [found.row.file, found.row.number, "" if key is None else _shown(key)]
            out.writerow([*where, found.column, found.what, found.value, found.reason])
        with replacing(self.path) as file:
            file.write(text.getvalue().encode("utf-8", "replace"))
        return self.path

    def judge(self, max_bad: float, report: Path | None) -> None:
        """DataError when too many rows are bad, or nothing is left."""
        count, bad = len(self.rows), int((~self.good).sum())
        allowed = max_bad * count if max_bad < 1 else max_bad
        if bad == count:
            raise DataError(f"{self.place}: none of its {count} rows can be used: {self.lines(report)}")
        if bad > allowed + 1e-9:  # 0.29 of 100 is a little less than 29
            said = f"{max_bad:g} of {count}" if max_bad < 1 else f"{max_bad:g}"
            raise DataError(
                f"{self.place}: {bad} of {count} rows are bad, more than max_bad={said}: {self.lines(report)}. Mend them, or "
                "put up with more: --max-bad N, or ?max_bad=N behind the place"
            )

    def lines(self, report: Path | None) -> str:
        """The first bad rows, and where the others are."""
        found = [
            " ".join(filter(None, [_row_name(f.row, self.place), f.column, f.value and f"({f.value})"]))
            + f": {f.reason}"
            for f in self.findings
            if f.what == "bad row"
        ]
        return some(found) + (f" (all in {report})" if report is not None else "")

    def notes(self, report: Path | None) -> list[str]:
        count, bad = len(self.rows), int((~self.good).sum())
        notes = [f"{self.place}: {bad} of {count} rows left out: {self.lines(report)}"] if bad else []
        empty = Counter(f.column for f in self.findings if f.what == "missing")
        notes += [
            f"{self.place}: the text of {column} is empty in {n} of {count} rows, which are used without it (all in {report})"
            for column, n in empty.items()
        ]
        where = f" (all in {report})" if report is not None else ""
        notes += [f"{self.place}: {note}{where}" for note in resampled_note(self.rates, self.rate)]
        if self.silent_videos:
            notes.append(f"{self.place}: {self.silent_videos} videos have no sound that can be used")
        return notes


def _id(row: _Row, column: str) -> str | int | float | bytes | None:
    """What names a row; None when nothing does."""
    key = row.cells.get(column) if column else None
    key = key.strip() if isinstance(key, str) else key
    return key if isinstance(key, (str, int, float, bytes)) and key != "" and key == key else None


def _row_name(row: _Row, place: str) -> str:
    return f"row {row.number}" if str(row.file) == place else f"{row.file.name} row {row.number}"


def _shown(value: Any) -> str:
    """A cell for the report, short."""
    if isinstance(value, Slice):
        return f"{value.size} bytes"
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    if isinstance(value, np.ndarray):
        return f"{len(value)} numbers"
    if isinstance(value, dict) and (value.get("path") or value.get("bytes") is not None):
        return _shown(value.get("path") or value.get("bytes"))
    text = "" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _file(source: Any) -> Path | bytes | Slice:
    if isinstance(source, dict):
        raise DataError("has an array, where a path or bytes were expected")
    found: Path | bytes | Slice = source
    return found


def _opened(source: Path | bytes | Slice) -> Path | bytes:
    return source.read() if isinstance(source, Slice) else source


@contextmanager
def _as_file(source: Path | bytes | Slice) -> Iterator[Path]:
    """A file with these bytes, for the library that reads nothing else; gone when the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = source if isinstance(source, Path) else Path(folder) / "video"
        if not isinstance(source, Path):
            path.write_bytes(_opened(source))  # type: ignore[arg-type]
        try:
            yield path
        except DataError as error:  # rows are named by who asks
            raise DataError(str(error).removeprefix(f"{path}: ")) from error


def _numbers(text: str) -> list[float]:
    """Numbers written out: "[0.1, 2]" or "0.1 2"."""
    words = re.split(r"[,;\s]+", text.strip().strip("[]()").strip())
    try:
        return [float(word) for word in words if word]
    except ValueError as error:
        raise DataError("is neither a list of numbers nor the name of a .npy file") from error


def _array(source: Any) -> NDArray[Any]:
    """What a .npy file holds."""
    content = _opened(_file(source))
    try:
        if isinstance(content, Path) and not content.is_file():
            raise DataError("no such file")
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # a damaged header is parsed as Python, and can raise what that can
        raise DataError("is not a .npy file that can be read") from error
    return np.asarray(found)


def checked_vector(values: Any) -> NDArray[np.float32]:
    """Numbers as one vector [dim] of float32; DataError when they are something else, or not finite."""
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
        raise DataError(f"holds {len(wrong)} values that are not finite numbers, the first at position {wrong[0] + 1}")
    return found


def read_vector(path: Path) -> NDArray[np.float32]:
    """The vector [dim] of a .npy file. DataError when it holds anything else, or cannot be read."""
    return checked_vector(_array(path))


# ------------------------------------------------------------------------------------------------------------- splits


class _Images:
    """Images of some of the rows, kept or decoded when asked for; zeros where a row has none (an `ImageSplit`)."""

    labels: Indices | None = None

    def __init__(self, reader: _Reader, column: _Column, rows: Indices) -> None:
        self.reader, self.column, self.rows = reader, column, rows

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Indices) -> Pixels:
        return np.asarray(self._read(indices, (self.reader.size, self.reader.size, 3), self.reader.image), np.uint8)

    def _read(self, indices: Indices, shape: tuple[int, ...], decoded: Callable[[Any], Any]) -> NDArray[Any]:
        rows = self.rows[indices]
        if self.reader.whole:
            return self.reader.kept[self.column.name][rows]
        out = np.zeros((len(rows), *shape), np.float32 if len(shape) == 1 else np.uint8)
        for n, row in enumerate(rows):
            cell = self.column.cells[row]
            if cell is None:
                continue
            try:
                out[n] = decoded(cell)
            except DataError as error:
                raise DataError(
                    f"{self.reader.place}: {self.reader._name(int(row))} {self.column.column}: {error}. Its header was good "
                    "when the set was opened; mend it and go on with --resume, or remove the row and start again"
                ) from error
        return out


class _Items(AlignedColumns):
    """One split, whose items can be listed in the report by the rows they are of."""

    def __init__(self, reader: _Reader, name: str, rows: Indices, *columns: Any) -> None:
        super().__init__(*columns)
        self.reader, self.name, self.rows = reader, name, rows

    def row_names(self, positions: Indices) -> list[str]:
        """File, row and, where there is one, id of each of these items."""
        rows = [self.reader.rows[i] for i in self.rows[positions]]
        keys = [_id(row, self.reader.cast.id) for row in rows]
        return [
            f"{row.file.name} row {row.number}" + ("" if key is None else f" ({_shown(key)})")
            for row, key in zip(rows, keys, strict=True)
        ]

    def list_items(self, modality: str, positions: Indices, what: str, reason: str) -> Path | None:
        """List the rows of these items with what there is to say of them; returns the report, None when it holds nothing."""
        column = next(c for c in self.reader.columns if c.name == modality)
        return self.reader.list_rows(self.name, column, self.rows[positions], what, reason)


class _Sounds(_Images):
    """Likewise for sounds (a `WaveSplit`)."""

    def waves(self, indices: Indices) -> NDArray[np.float32]:
        return self._read(indices, (self.reader.samples,), lambda cell: self.reader.sound(cell).wave)


def _aligned(place: str, reader: _Reader, test: str, report: Path | None) -> AlignedData:
    notes = reader.notes(report)
    rows = np.flatnonzero(reader.good)
    reader.columns = [
        c for c in reader.columns if c not in reader.sound_of.values() or any(v is not None for v in c.cells)
    ]
    has = {c.name: np.array([cell is not None for cell in c.cells]) & reader.good for c in reader.columns}
    for column in reader.columns:
        if not has[column.name].any():
            raise DataError(
                f"{place}: no usable row has the modality '{column.name}'; mend its column '{column.column}', or name the "
                "others with ?columns=NAME:KIND,..."
            )
    if len(reader.columns) < 2:
        raise DataError(
            f"{place}: '{reader.columns[0].name}' is the only modality; its videos have no sound, so add another"
        )
    labels, classes = _labels(place, reader, rows)
    paired = np.sum(list(has.values()), 0) > 1
    train, held, more = _split(place, reader, rows, paired, labels, test)
    notes += more
    single = train[~paired[train]]
    train = train[paired[train]]
    for name, mask in has.items():
        if not mask[train].any():
            raise DataError(
                f"{place}: the modality '{name}' is in no training row beside another; there is nothing to align it by"
            )
        if not mask[held].any():
            notes.append(f"{place}: no test row has the modality '{name}'")
        lacking = int((~mask[np.concatenate([train, held])]).sum())
        if lacking:
            notes.append(f"{place}: {lacking} of {len(train) + len(held)} items lack the modality '{name}'")
    if len(single):
        notes.append(f"{place}: {len(single)} rows have one modality only, and are kept apart as unpaired")

    def columns(split: str, rows: Indices) -> AlignedColumns:
        found: dict[str, Any] = {}
        for column in reader.columns:
            if column.gives == "image":
                found[column.name] = _Images(reader, column, rows)
            elif column.gives == "audio":
                found[column.name] = _Sounds(reader, column, rows)
            elif column.gives == "text":
                found[column.name] = [column.cells[i] or "" for i in rows]
            else:
                zeros = np.zeros(reader.dims[column.name], np.float32)
                found[column.name] = np.stack([zeros if column.cells[i] is None else column.cells[i] for i in rows])
        presence = {name: mask[rows] for name, mask in has.items() if not mask[rows].all()}
        return _Items(reader, split, rows, found, None if labels is None else labels[rows], presence)

    facts = {
        "image": lambda name: Modality("image", size=reader.size),
        "text": lambda name: Modality("text"),
        "audio": lambda name: Modality("audio", rate=reader.rate, samples=reader.samples),
        "vector": lambda name: Modality("vector", dim=reader.dims[name]),
    }
    return AlignedData(
        name=f"manifest:{place}",
        train=columns("train", train),
        test=columns("test", held),
        modalities={column.name: facts[column.gives](column.name) for column in reader.columns},
        classes=classes,
        notes=notes,
        unpaired=columns("unpaired", single) if len(single) else None,
    )


def _labels(place: str, reader: _Reader, rows: Indices) -> tuple[Indices | None, tuple[str, ...] | None]:
    """[all rows] class numbers, -1 where there is none, and the classes' names."""
    name = reader.cast.label
    if not name:
        return None, None
    found: dict[int, str | int] = {}
    for i in rows:
        value = reader.rows[i].cells.get(name)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if value is None or isinstance(value, _Bad) or (isinstance(value, float) and value != value):
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, (str, int)):
            raise DataError(
                f"{place}: {reader._name(int(i))}: the label column '{name}' holds {_shown(value)}; labels are names or whole "
                "numbers"
            )
        value = value.strip() if isinstance(value, str) else int(value)
        if value not in ("", "-1", -1):
            found[int(i)] = value
    if not found:
        return None, None
    known = reader.classes
    if known and all(isinstance(v, int) and 0 <= v < len(known) for v in found.values()):
        number: dict[str | int, int] = {n: n for n in range(len(known))}
        names = tuple(known)
    else:
        # Numbers in a table of text are in the order of numbers.
        if all(isinstance(v, int) or v.lstrip("-").isdecimal() for v in found.values()):
            found = {i: int(v) for i, v in found.items()}
        values = sorted(set(found.values()), key=lambda v: (isinstance(v, str), v))
        number = {value: n for n, value in enumerate(values)}
        names = tuple(str(value) for value in values)
    labels = np.full(len(reader.rows), -1, np.int64)
    for i, value in found.items():
        labels[i] = number[value]
    return labels, names


def _split(
    place: str, reader: _Reader, rows: Indices, paired: NDArray[np.bool_], labels: Indices | None, test: str
) -> tuple[Indices, Indices, list[str]]:
    """Row numbers of the training and test splits, and notes."""
    of = np.array([_row_split(reader, int(i)) for i in range(len(reader.rows))], dtype=object)
    try:
        fraction: float | None = float(test)
    except ValueError:
        fraction = None
    names = list(dict.fromkeys(of[rows]))
    wanted = SPLITS.get(test.lower(), test) if test and fraction is None else ""
    if wanted and wanted not in names:
        raise CounterpointError(
            f"{place} has no split '{test}'; it has {', '.join(n or 'no named split' for n in names)}"
        )
    if not wanted and fraction is None:
        wanted = next((name for name in ("test", "validation") if name in names), "")
    inside = np.isin(of[rows], ["train", ""]) if {"train", ""} & set(names) else of[rows] != wanted
    if wanted and (of[rows] == wanted).all():  # all there is is called "test", say because the folder is
        wanted, inside = "", np.ones(len(rows), bool)
    notes = []
    if wanted and wanted != "train":
        train, held = rows[inside & (of[rows] != wanted)], rows[of[rows] == wanted]
        if not paired[held].any():
            raise DataError(f"{place}: no row of its split '{wanted}' has two modalities; there is nothing to test on")
        if not paired[train].any():
            raise DataError(
                f"{place}: no row outside its split '{wanted}' has two modalities; there is nothing to train on"
            )
    elif wanted:
        raise CounterpointError(
            f"{place}: test={test} would leave nothing to train on; name another split or a fraction"
        )
    else:
        mine = rows[inside]
        both = mine[paired[mine]]
        if not len(both):
            raise DataError(f"{place}: no usable row has two modalities; there is nothing to align")
        by = None if labels is None else labels[both]
        share = FRACTION if fraction is None else fraction
        if by is not None:
            counts = np.unique(by, return_counts=True)[1]
            # Of classes so small that most would give nothing, no proportions can be kept.
            if 2 * np.minimum(np.round(share * counts), counts - 1).sum() < share * len(by):
                by = None
        first, second = split_positions(len(both), share, by)
        held = both[second]
        train = np.sort(np.concatenate([both[first], mine[~paired[mine]]]))
        notes.append(f"{place}: the test split is made here, {len(held)} of {len(both)} items")
    unused = len(rows) - len(train) - len(held)
    if unused:
        left = ", ".join(n for n in names if n not in ("train", "", wanted))
        notes.append(f"{place}: {unused} rows of the split {left} are not used")
    return train, held, notes


def _row_split(reader: _Reader, i: int) -> str:
    row = reader.rows[i]
    said = row.cells.get(reader.cast.split) if reader.cast.split else None
    said = said.strip().lower() if isinstance(said, str) else ""
    return SPLITS.get(said, said) or row.split
