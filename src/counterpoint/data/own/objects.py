"""Read the user's own data from objects in memory: the columns of a `Table`, and a digest of the contents.

    pandas.DataFrame      columns as `manifest:` takes them
    datasets.Dataset      columns; its features Image, Audio and ClassLabel are recognised
    torch Dataset         one pass over its items: a picture, a tuple (picture, label), or a dictionary of modalities
    arrays                pictures uint8 [N, H, W, 3] or [N, H, W]; (pictures, labels); a dictionary of arrays or lists
    list                  pictures, as paths or Pillow images; or records, a dictionary for each row
    {"train": ..., ...}   one of these for each split, also a `datasets.DatasetDict`

Libraries are imported only where an object comes from them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.own.places import SPLITS
from counterpoint.data.own.roles import known_by_name
from counterpoint.data.own.table import Cells, Joined, ListCells, Segment, Slice, Spool, Table
from counterpoint.data.pictures import as_pixels, is_image, is_tensor, ppm
from counterpoint.errors import DataError
from counterpoint.words import counted

AT_ONCE = 1000  # number of rows of a `datasets.Dataset` that are read together
PLAIN = ("RGB", "L")  # modes of a Pillow image that a PPM file supports
PNG = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")  # modes that a PNG file supports
ORIENTATION = 0x0112  # EXIF's tag


class Held(Slice):
    """A picture in memory. It is encoded as bytes only when a decoder reads it."""

    value: Any

    def __new__(cls, value: Any) -> Held:
        size = value.width * value.height if is_image(value) else int(np.prod(value.shape))
        made = super().__new__(cls, 0, 0, size)
        made.value = value
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, (self.value,)

    def read(self) -> bytes:
        """Return the picture as the bytes of a file."""
        return file_of(self.value)


class HeldCells(Cells):
    """Pictures of one array [N, H, W, 3] or [N, H, W], uint8."""

    def __init__(self, pictures: NDArray[np.uint8]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> Any:
        return Held(self.pictures[row])


class SoundCells(Cells):
    """Sounds of one array [N, samples] at one rate."""

    def __init__(self, waves: NDArray[Any], rate: int) -> None:
        self.waves, self.rate = waves, rate

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, row: int) -> Any:
        return {"array": self.waves[row], "sampling_rate": self.rate}


def file_of(value: Any) -> bytes:
    """Return a picture (see `counterpoint.data.pictures.as_picture`) as the bytes of a file, without loss."""
    if not is_image(value):
        pixels = as_pixels(value)
        if pixels.ndim == 2 or pixels.shape[2] == 3:
            return ppm(pixels)
        from PIL import Image

        value = Image.fromarray(pixels)
    exif = value.getexif()
    if value.mode == "YCbCr":  # Pillow below 13 cannot read its own TIFF files of it
        value = value.convert("RGB")
    if value.mode in PLAIN and exif.get(ORIENTATION, 1) == 1 and "transparency" not in value.info:
        return ppm(np.asarray(value))
    file = io.BytesIO()
    value.save(file, "PNG" if value.mode in PNG else "TIFF", exif=exif)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- digest


class Digest:
    """A digest of cells, the same for the same contents in every process."""

    def __init__(self, kind: str) -> None:
        self.hash = hashlib.blake2b(kind.encode(), digest_size=8)

    def name(self, text: str) -> None:
        """Add the name of a split or a column to the digest."""
        self._tagged("name", text.encode("utf-8", "surrogatepass"))

    def array(self, values: NDArray[Any]) -> None:
        """Add a whole array to the digest."""
        found = np.ascontiguousarray(values)
        self._tagged(f"{found.dtype.str}{found.shape}", found.tobytes() if found.dtype == object else found.data)

    def cell(self, value: Any) -> None:
        """Add one cell to the digest. Of a path, only the text is included, not the file."""
        if isinstance(value, Slice):
            self._tagged("bytes", value.read())
        elif isinstance(value, (bytes, bytearray)):
            self._tagged("bytes", bytes(value))
        elif isinstance(value, np.ndarray):
            self.array(value)
        elif isinstance(value, Mapping):
            self._tagged("record", str(sorted(map(str, value))).encode())
            for key in sorted(value, key=str):
                self.cell(value[key])
        elif isinstance(value, (list, tuple)):
            self._tagged("list", str(len(value)).encode())
            for part in value:
                self.cell(part)
        else:
            self._tagged(type(value).__name__, str(value).encode("utf-8", "surrogatepass"))

    def cells(self, cells: Cells) -> None:
        """Add a column to the digest."""
        if isinstance(cells, HeldCells):
            self.array(cells.pictures)
        elif isinstance(cells, SoundCells):
            self.array(cells.waves)
        else:
            for value in cells:
                self.cell(value)

    def _tagged(self, tag: str, content: Any) -> None:
        self.hash.update(f"{tag}:{len(content)}:".encode())
        self.hash.update(content)

    def text(self) -> str:
        """Return the digest as 16 hexadecimal digits."""
        return self.hash.hexdigest()


# ------------------------------------------------------------------------------------------------------------- objects


def module_of(value: Any) -> str:
    """Return the library of an object; for a subclass of a torch Dataset, torch."""
    kinds = [kind.__module__ for kind in type(value).__mro__]
    if any(kind.startswith("torch.utils.data") for kind in kinds):
        return "torch"
    return type(value).__module__.partition(".")[0]


def kind_of(value: Any) -> str:
    """Return the kind of an object for config.yaml and messages: "pandas.DataFrame", "arrays". DataError for any other."""
    library = module_of(value)
    name = type(value).__name__
    if library == "pandas" and name == "DataFrame":
        return "pandas.DataFrame"
    if library == "datasets" and name in ("Dataset", "DatasetDict"):
        return f"datasets.{name}"
    if library == "torch" and not is_tensor(value):
        if not hasattr(value, "__len__") or not hasattr(type(value), "__getitem__"):
            raise DataError(f"{name} is a torch dataset without length; give one that has __len__ and __getitem__")
        return f"torch Dataset {name}"
    if isinstance(value, Mapping) and by_split(value):
        return "splits of " + kind_of(next(iter(value.values())))
    if isinstance(value, (np.ndarray, tuple, Mapping)) or is_tensor(value):
        return "arrays"
    if isinstance(value, list) and value and (isinstance(value[0], (str, bytes, Path, Mapping)) or is_image(value[0])):
        return "list"
    raise DataError(
        f"data is a {type(value).__name__}, which is not supported; give a source's name, a pandas DataFrame, a "
        "datasets.Dataset, a torch Dataset or arrays: see help(counterpoint.own)"
    )


def by_split(value: Mapping[Any, Any]) -> bool:
    """Return whether a dictionary holds data by the names of splits, such as "train" and "test"."""
    return bool(value) and all(isinstance(name, str) and name.lower() in SPLITS for name in value)


def table_of(value: Any, kind: str, rate: int, groups: Any = None) -> tuple[Table, str]:
    """Return the rows of an object as a table, and the digest of their contents.

    Args:
        value: An object of a kind that the module's docstring lists.
        kind: The result of `kind_of` for it.
        rate: Samples per second of sounds that are arrays.
        groups: [rows] values, which become the column GROUP. Rows with equal values are never separated. Default: none.

    Raises DataError for rows of an unsupported form.
    """
    spool, digest = Spool(), Digest(kind)
    parts = {str(name).lower(): part for name, part in value.items()} if _split(value) else {"": value}
    segments = []
    for name, part in parts.items():
        segment = _segment(part, f"{kind} {name}".strip(), rate, spool)
        segment.split = SPLITS.get(name, "")
        segment.folder = os.getcwd()
        segments.append(segment)
    count = sum(segment.count for segment in segments)
    if groups is not None:
        if len(groups) != count:
            raise DataError(
                f"{kind}: {counted(count, 'row has', 'rows have')} {counted(len(groups), 'group')}; give one group for each row"
            )
        at = 0
        for segment in segments:
            segment.columns[GROUP] = ListCells([plain(group) for group in groups[at : at + segment.count]])
            segment.names = [*segment.names, GROUP]
            at += segment.count
    for segment in segments:
        digest.name(segment.split)
        for column, cells in segment.columns.items():
            digest.name(column)
            digest.cells(cells)
    if not count:
        raise DataError(f"{kind}: has no rows")
    return Table(kind, segments, spool), digest.text()


GROUP = "__group__"


def _split(value: Any) -> bool:
    return isinstance(value, Mapping) and by_split(value)


def _segment(value: Any, name: str, rate: int, spool: Spool) -> Segment:
    library = module_of(value)
    if library == "pandas":
        return _of_frame(value, name)
    if library == "datasets":
        return _of_datasets(value, name, spool)
    if library == "torch" and not is_tensor(value):
        return _of_items(value, name, spool)
    if isinstance(value, tuple):
        if len(value) != 2:
            raise DataError(
                f"{name}: a tuple must be (pictures, labels), got {counted(len(value), 'part')}; use a dictionary for more columns"
            )
        value = {"image": value[0], "label": value[1]}
    elif isinstance(value, list) and isinstance(value[0], Mapping):
        names = dict.fromkeys(key for row in value for key in row)
        value = {key: [row.get(key) for row in value] for key in names}
    elif not isinstance(value, Mapping):
        value = {"image": value}
    return _of_columns(value, name, rate)


def _of_frame(frame: Any, name: str) -> Segment:
    columns: dict[str, Cells] = {}
    usual: dict[str, str] = {}
    for label in frame.columns:
        series = frame[label]
        there = series.notna()
        values = [plain(cell) if here else None for cell, here in zip(series.tolist(), there.tolist(), strict=True)]
        columns[str(label)] = ListCells(values)
        if any(isinstance(cell, Held) for cell in values):
            usual[str(label)] = "image"
    if len(columns) < len(frame.columns):
        raise DataError(f"{name}: has two columns of one name")
    return Segment(Path(name), len(frame), columns, names=list(columns), usual=usual)


def _of_datasets(data: Any, name: str, spool: Spool) -> Segment:
    import json

    from counterpoint.data.own.parquet import cells_of, known_columns

    names = list(data.column_names)
    metadata = {b"huggingface": json.dumps({"info": {"features": data.features.to_dict()}}).encode()}
    usual, classes = known_columns(metadata, names)
    parts: dict[str, list[Cells]] = {column: [] for column in names}
    raw = data.with_format("arrow")
    for start in range(0, len(data), AT_ONCE):
        rows = raw[start : start + AT_ONCE]
        for column in names:
            parts[column] += [cells_of(chunk, spool) for chunk in rows[column].chunks]
    usual |= {column: "label" for column in classes if not known_by_name(column, usual)}
    cells: dict[str, Cells] = {column: Joined(found) for column, found in parts.items()}
    return Segment(Path(name), len(data), cells, names=names, usual=usual, classes=classes)


def _of_items(data: Any, name: str, spool: Spool) -> Segment:
    """Read a torch Dataset once, item by item."""
    columns: dict[str, list[Any]] = {}
    count = len(data)
    usual: dict[str, str] = {}
    for row in range(count):
        try:
            for column, (value, role) in _fields(data[row]):
                cells = columns.setdefault(column, [None] * row)
                cells.append(spool.keep(file_of(value)) if role == "image" else plain(value))
                if role:
                    usual.setdefault(column, role)
        except DataError as error:
            raise DataError(f"{name}: item {row}: {error}") from error
        for cells in columns.values():
            cells += [None] * (row + 1 - len(cells))
    source = data
    while not hasattr(source, "classes") and hasattr(source, "dataset"):  # a Subset of it
        source = source.dataset
    names = getattr(source, "classes", None)
    known = isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names) and "label" in columns
    made: dict[str, Cells] = {column: ListCells(cells) for column, cells in columns.items()}
    classes = {"label": list(names)} if known and names is not None else {}
    return Segment(Path(name), count, made, names=list(made), usual=usual, classes=classes)


def _fields(item: Any) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Yield the name, the value and the role of each part of a torch Dataset's item. "" is no role."""
    if isinstance(item, Mapping):
        for key, value in item.items():
            yield str(key), (value, _role(value, str(key)))
        return
    used: dict[str, int] = {}
    for value in item if isinstance(item, (tuple, list)) else (item,):
        if isinstance(value, Mapping):
            yield from _fields(value)
            continue
        role = _role(value, "")
        if not role:
            raise DataError(
                f"holds a {type(value).__name__}, which shows no role; return a dictionary of named values from the dataset"
            )
        used[role] = used.get(role, 0) + 1
        yield (role if used[role] == 1 else f"{role}_{used[role]}"), (value, role)


def _role(value: Any, name: str) -> str:
    """Return the role of a value by its type, where its name implies no other role."""
    if is_image(value):
        return "image"
    said = known_by_name(name, {}) if name else ""
    if is_tensor(value) or isinstance(value, np.ndarray):
        if value.ndim in (2, 3) and said in ("", "image"):
            return "image"
        if value.ndim == 1 and not said:
            return "vector"
        return said or ("label" if value.ndim == 0 else "")
    if isinstance(value, str):
        return said or "text"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return said or ("" if name else "label")
    return said


def _of_columns(value: Mapping[Any, Any], name: str, rate: int) -> Segment:
    """Read a dictionary of arrays or lists."""
    columns: dict[str, Cells] = {}
    usual: dict[str, str] = {}
    counts: dict[str, int] = {}
    for key, values in value.items():
        key = str(key)
        cells, role = _column(key, values, name, rate)
        columns[key], counts[key] = cells, len(cells)
        if role:
            usual[key] = role
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{key} {count}" for key, count in counts.items())
        raise DataError(f"{name}: the columns differ in length: {said}")
    return Segment(Path(name), next(iter(counts.values()), 0), columns, names=list(columns), usual=usual)


def _column(key: str, values: Any, name: str, rate: int) -> tuple[Cells, str]:
    """Return the cells of an array or a list, and the role of its contents."""
    said = known_by_name(key, {})
    if is_tensor(values):
        values = values.detach().cpu().numpy()
        if values.ndim == 4 and values.shape[1] in (1, 3):
            raise DataError(
                f"{name}: '{key}' is a tensor {list(values.shape)}; give pictures as uint8 [N, H, W, 3], such as "
                "x.permute(0, 2, 3, 1).numpy()"
            )
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise DataError(f"{name}: '{key}' is a {type(values).__name__}; give an array or a list, one entry a row")
    if isinstance(values, np.ndarray):
        if values.ndim == 4 and values.shape[-1] == 1:
            values = values[..., 0]
        if values.ndim in (3, 4):
            if values.dtype != np.uint8 or (values.ndim == 4 and values.shape[3] != 3):
                raise DataError(
                    f"{name}: '{key}' is {values.dtype} {list(values.shape)}; pictures are uint8 [N, H, W, 3] or [N, H, W]"
                )
            return HeldCells(values), "image"
        if values.ndim == 2 and values.dtype.kind in "fiu":
            if said == "audio":
                return SoundCells(values, rate), "audio"
            # A table of numbers is a vector for each row, even if its name suggests pictures or texts.
            return ListCells(list(np.asarray(values, np.float32))), "vector"
        if values.ndim != 1:
            raise DataError(f"{name}: '{key}' has the shape {list(values.shape)}, which is no column of rows")
    cells = [plain(cell) for cell in values]
    first = next((cell for cell in cells if cell is not None), None)
    if isinstance(first, Held):
        return ListCells(cells), "image"
    if isinstance(first, str):
        return ListCells(cells), said or "text"
    if isinstance(first, np.ndarray) and first.ndim == 1:
        if said == "audio":
            return ListCells([c if c is None else {"array": c, "sampling_rate": rate} for c in cells]), "audio"
        return ListCells(cells), "vector"
    return ListCells(cells), said


def plain(value: Any) -> Any:
    """Convert a cell for the readers of tables: pictures to `Held`, tensors to arrays, numbers to Python's numbers."""
    if is_image(value):
        return Held(value)
    if is_tensor(value):
        if value.ndim == 0:
            return value.item()
        return Held(value) if value.ndim in (2, 3) else value.detach().cpu().numpy()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        return Held(value)
    if isinstance(value, Path):
        return str(value)
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' missing values
        return None
    return value
