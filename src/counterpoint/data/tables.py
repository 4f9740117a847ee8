"""The user's own images, labels and captions, read by Hugging Face `datasets`.

    imagefolder:DIR      DIR/CLASS/*.jpg, or DIR/train/CLASS/* and DIR/test/CLASS/*; a metadata.csv (or .jsonl) with a
                         column file_name brings captions and other columns
    parquet:PATH         a file, a folder of them or a pattern ('data/*.parquet')
    csv:PATH             likewise; the image column holds paths, absolute or from the file's folder
    webdataset:PATTERN   tar files ('shards/*.tar')

For the task `views` an image and, if there is one, a label; for the task `aligned` an image and a text. Columns are
found by their usual names or named with `?image=`, `?label=`, `?text=` (`json.caption` reaches into a column of records).
An image is a path, encoded bytes, or an Image of `datasets`. A cell with several captions counts with its first.

The test split is the one called "test", else "validation", else one made here: the same fifth of the items every time,
each class in proportion. `?test=0.1` makes another, `?test=NAME` takes the split of that name.

Rows that cannot be used (a damaged picture, no caption, no label) are left out, counted and named in the notes; pictures
that fit in memory are decoded once, at the start, so that all damage is found there. `datasets` keeps a copy of tables and
archives in the cache folder.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from counterpoint.data.images import (
    KEEP,
    ArrayImages,
    EncodedImages,
    ImageData,
    ImageSplit,
    Indices,
    checked_size,
    left_out,
    scan,
    split_positions,
)
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import cache_folder

IMAGE = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_path", "file_name", "filename", "path", "file")
TEXT = ("caption", "text", "txt", "title", "description", "sentence", "captions")
LABEL = ("label", "labels", "class", "cls", "category", "target", "fine_label")
TEST = ("test", "validation", "valid", "val")
FRACTION = 0.2

Read = Callable[[int], Path | bytes]


def load_imagefolder(
    place: str, *, task: str = "views", size: int = 64, image: str = "", label: str = "", text: str = "", test: str = ""
) -> ImageData | AlignedData:
    """Folders of images (see the module)."""
    if not Path(place).is_dir():
        raise DataError(f"{place}: no such directory; it should hold a folder of images for every class")
    return _load("imagefolder", place, {"data_dir": place}, task, size, image, label, text, test)


def load_parquet(
    place: str, *, task: str = "views", size: int = 64, image: str = "", label: str = "", text: str = "", test: str = ""
) -> ImageData | AlignedData:
    """Parquet files (see the module)."""
    return _load("parquet", place, _files(place, "parquet"), task, size, image, label, text, test)


def load_csv(
    place: str, *, task: str = "views", size: int = 64, image: str = "", label: str = "", text: str = "", test: str = ""
) -> ImageData | AlignedData:
    """CSV files (see the module)."""
    return _load("csv", place, _files(place, "csv"), task, size, image, label, text, test)


def load_webdataset(
    place: str, *, task: str = "views", size: int = 64, image: str = "", label: str = "", text: str = "", test: str = ""
) -> ImageData | AlignedData:
    """WebDataset archives (see the module)."""
    return _load("webdataset", place, _files(place, "tar"), task, size, image, label, text, test)


def _files(place: str, ending: str) -> dict[str, Any]:
    """What `load_dataset` is to read: a file, a folder (its names make the splits) or a pattern."""
    if Path(place).is_dir():
        return {"data_dir": place}
    found = [place] if Path(place).is_file() else sorted(glob.glob(place, recursive=True))
    if not found:
        raise DataError(f"{place}: no such file, folder or pattern; it should name .{ending} files")
    return {"data_files": found}


def _load(
    kind: str,
    place: str,
    files: dict[str, Any],
    task: str,
    size: int,
    image: str,
    label: str,
    text: str,
    test: str,
) -> ImageData | AlignedData:
    """Open the set.

    Raises DataError when it cannot be read, a column is missing or nothing usable is left; CounterpointError when an
    option makes no sense or `datasets` is not installed.
    """
    checked_size(size)
    splits = _open(kind, place, files)
    names = _split_names(place, splits, test)
    base = Path(place) if Path(place).is_dir() else Path(place).parent
    features = splits[names[0]].features
    wanted = {
        "image": _columns(place, features, image, IMAGE, "image", several=True),
        "label": _columns(place, features, label, LABEL, "label", needed=bool(label)),
        "text": _columns(place, features, text, TEXT, "text") if task == "aligned" else [],
    }
    notes: list[str] = []
    parts = [_Part(kind, place, name, splits[name], wanted, base, size, notes) for name in names]
    classes = _classes(place, wanted["label"], parts)
    if kind == "imagefolder" and not wanted["label"]:
        notes += _loose(Path(place))
    cut: list[tuple[_Part, Indices]]
    if len(parts) == 2:
        cut = [(part, np.arange(len(part.rows))) for part in parts]
    else:
        fraction = _fraction(test)
        train, rest = split_positions(len(parts[0].rows), FRACTION if fraction is None else fraction, parts[0].labels)
        cut = [(parts[0], train), (parts[0], rest)]
        notes.append(f"{place}: the test split is made here, {len(rest)} of {len(train) + len(rest)} items")
    name = f"{kind}:{place}"
    if task == "aligned":
        columns = [
            AlignedColumns({"image": part.images(rows), "text": [part.texts[i] for i in rows]}, part.label_of(rows))
            for part, rows in cut
        ]
        modalities = {"image": Modality("image", size=size), "text": Modality("text")}
        return AlignedData(name, columns[0], columns[1], modalities, classes or None, notes)
    pictures = [part.images(rows) for part, rows in cut]
    return ImageData(name, pictures[0], pictures[1], classes, size, notes)


def _open(kind: str, place: str, files: dict[str, Any]) -> Any:
    """The `DatasetDict` of these files."""
    try:
        import datasets
    except ImportError as error:
        raise CounterpointError(
            f"the data source '{kind}' needs the extra [datasets]: pip install 'counterpoint[datasets]'"
        ) from error
    quiet = not sys.stderr.isatty() and not datasets.utils.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, cache_dir=str(cache_folder() / "datasets"), **files)
    except Exception as error:  # pandas, pyarrow, tarfile and datasets raise kinds of their own
        cause = error.__cause__ or error
        said = str(cause).splitlines()[0][:300] if str(cause) else type(cause).__name__
        raise DataError(f"{place}: cannot be read as {kind} ({said}); mend the file or name another") from error
    finally:
        if quiet:
            datasets.enable_progress_bars()


def _loose(folder: Path) -> list[str]:
    """Pictures beside the folders of classes, for which `datasets` drops every label without a word."""
    known = Image.registered_extensions()
    level = next((part for part in (folder / "train", folder) if part.is_dir()), folder)
    entries = sorted(level.iterdir())
    loose = [entry.name for entry in entries if entry.is_file() and entry.suffix.lower() in known]
    inside = any(file.suffix.lower() in known for part in entries if part.is_dir() for file in part.iterdir())
    if not loose or not inside or any(entry.name.startswith("metadata.") for entry in entries):
        return []
    said = ", ".join(loose[:3]) + (", ..." if len(loose) > 3 else "")
    return [f"{level}: {len(loose)} pictures beside the folders ({said}), so none has a label; move them into classes"]


def _fraction(test: str) -> float | None:
    try:
        return float(test)
    except ValueError:
        return None


def _split_names(place: str, splits: Any, test: str) -> list[str]:
    """The training split's name, and the test split's where there is one."""
    names = list(splits)
    fraction = _fraction(test)
    if test and fraction is None and test not in names:
        raise CounterpointError(f"{place} has no split '{test}'; it has {', '.join(names)}")
    chosen = test if fraction is None else ""
    if not chosen and fraction is None:
        chosen = next((name for name in TEST if name in names), "")
    train = "train" if "train" in names else next((name for name in names if name != chosen), "")
    if not train or train == chosen:
        # All there is is called "test", say because the folder is.
        return [chosen or names[0]]
    return [train, chosen] if chosen else [train]


def _columns(
    place: str,
    features: Any,
    named: str,
    usual: Iterable[str],
    what: str,
    *,
    needed: bool = True,
    several: bool = False,
) -> list[str]:
    """The column called `named`, or what has a usual name; several when they stand in for each other (jpg, png)."""
    if named:
        if _top(features, named) not in features:
            raise DataError(f"{place}: no column '{named}'; it has {', '.join(features)}. Name one with ?{what}=COLUMN")
        return [named]
    found = [name for name in features if what == "image" and type(features[name]).__name__ == "Image"]
    lower = {name.lower(): name for name in features}
    found = found or [lower[name] for name in usual if name in lower]
    if not found and needed:
        raise DataError(f"{place}: no {what} column among {', '.join(features)}; name it with ?{what}=COLUMN")
    return found if several else found[:1]


def _top(features: Any, column: str) -> str:
    """The column of the table in which `column` is found."""
    return column if column in features else column.partition(".")[0]


def _value(row: dict[str, Any], column: str) -> Any:
    """A cell; `json.caption` is the caption in the records of column json."""
    name, *inner = column.split(".") if column not in row else [column]
    value = row.get(name)
    for key in inner:
        value = value.get(key) if isinstance(value, dict) else None
    return value


class _Part:
    """One split as it is on disk: the rows that can be used, their pictures, texts and labels.

    `rows` are row numbers of the table, and positions everywhere else count in `rows`.
    """

    def __init__(
        self,
        kind: str,
        place: str,
        split: str,
        table: Any,
        wanted: dict[str, list[str]],
        base: Path,
        size: int,
        notes: list[str],
    ) -> None:
        import datasets

        self.place, self.split, self.size, self.base = place, split, size, base
        self.image_columns = wanted["image"]
        columns = {what: [_top(table.features, name) for name in names] for what, names in wanted.items()}
        for column in {name for names in columns.values() for name in names}:
            if isinstance(table.features[column], datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        self.pictures = table.select_columns(list(dict.fromkeys(columns["image"])))
        others = list(dict.fromkeys(columns["label"] + columns["text"]))
        count = len(table)
        if not count:
            raise DataError(f"{place}: its split {split} is empty")
        cells = self._cells(table.select_columns(others), wanted) if others else ([""] * count, [None] * count, {})
        texts, labels, lacking = cells
        candidates = [row for row in range(count) if row not in lacking]
        good, self.pixels, bad = scan(
            len(candidates), lambda i: self._read(candidates[i]), lambda i: self._name(candidates[i]), size, keep=KEEP
        )
        bad = [f"{self._name(row)}: {reason}" for row, reason in lacking.items()] + bad
        if not len(good):
            raise DataError(
                f"{place}: none of the {count} rows of its split {split} can be used: {left_out(bad, count)}"
            )
        if bad:
            notes.append(f"{place}, split {split}: {left_out(bad, count)}")
        self.rows = [candidates[i] for i in good]
        self.texts = [texts[row] for row in self.rows]
        self.raw = [labels[row] for row in self.rows]
        self.labels: Indices | None = None  # set by _classes, which sees both splits
        # What `datasets` knows of the label column: the names of numbered classes.
        self.feature = table.features.get(wanted["label"][0]) if wanted["label"] else None

    def _cells(self, table: Any, wanted: dict[str, list[str]]) -> tuple[list[str], list[Any], dict[int, str]]:
        """Texts and labels of every row, and the rows that lack one with the reason."""
        texts, labels, lacking = [], [], {}
        for number, row in enumerate(table):
            text: Any = ""
            if wanted["text"]:
                text = _value(row, wanted["text"][0])
                if isinstance(text, list):
                    text = next((t for t in text if isinstance(t, str) and t.strip()), None)
                text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
                if not isinstance(text, str) or not text.strip():
                    lacking[number] = f"no text in {wanted['text'][0]}"
            label = _value(row, wanted["label"][0]) if wanted["label"] else None
            if wanted["label"] and (label is None or label == "" or label != label or label == -1):
                lacking.setdefault(number, f"no label in {wanted['label'][0]}")
            texts.append(text if isinstance(text, str) else "")
            labels.append(label)
        return texts, labels, lacking

    def _picture(self, row: int) -> Path | bytes | None:
        found = self.pictures[row]
        for column in self.image_columns:
            value = _value(found, column)
            if isinstance(value, dict):  # an Image of datasets
                value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
            if isinstance(value, (bytes, bytearray)):
                return bytes(value)
            if isinstance(value, str) and value:
                if "://" in value:
                    raise DataError(f"is on the net ({value[:80]}); download it and name the file")
                return Path(value) if Path(value).is_absolute() else self.base / value
        return None

    def _read(self, row: int) -> Path | bytes:
        found = self._picture(row)
        if found is None:
            raise DataError(f"no picture in {' or '.join(self.image_columns)}")
        return found

    def _name(self, row: int) -> str:
        try:
            found = self._picture(row)
        except DataError:
            found = None
        where = f"{self.split} row {row + 1}"
        return f"{found} ({where})" if isinstance(found, Path) else where

    def images(self, positions: Indices) -> ImageSplit:
        labels = self.label_of(positions)
        if self.pixels is not None:
            return ArrayImages(self.pixels[positions], labels)
        rows = [self.rows[i] for i in positions]
        return EncodedImages(
            len(rows),
            lambda i: self._read(rows[i]),
            lambda i: f"{self.place}: {self._name(rows[i])}",
            self.size,
            labels,
        )

    def label_of(self, positions: Indices) -> Indices | None:
        return None if self.labels is None else self.labels[positions]


def _whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _classes(place: str, column: list[str], parts: list[_Part]) -> tuple[str, ...]:
    """Names of the classes; numbers the labels of all parts."""
    if not column:
        return ()
    known = getattr(parts[0].feature, "names", None)
    raw = [value for part in parts for value in part.raw]
    if known:  # labels that `datasets` has numbered
        numbers: dict[Any, int] = {n: n for n in range(len(known))}
        names = tuple(known)
    else:
        odd = next((v for v in raw if not isinstance(v, (str, int, bytes)) and not _whole(v)), None)
        if odd is not None:
            raise DataError(f"{place}: the label column '{column[0]}' holds {odd!r}; labels are names or whole numbers")
        values = sorted({v.decode() if isinstance(v, bytes) else v for v in raw}, key=lambda v: (isinstance(v, str), v))
        numbers = {value: n for n, value in enumerate(values)}
        names = tuple(str(int(v)) if not isinstance(v, str) else v for v in values)
    for part in parts:
        part.labels = np.array([numbers[v.decode() if isinstance(v, bytes) else v] for v in part.raw], np.int64)
    return names
