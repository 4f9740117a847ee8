"""`texts:PLACE`: the user's own texts, a line each or a row each, some of them with a video.

    texts:corpus.txt      a text on each line that is not empty
    texts:DIR             all .txt files below DIR; train.txt, valid.txt and test.txt name their split
    texts:items.csv       .csv, .tsv, .jsonl, .json or .parquet: a column `text`, and `video` or `split` if you like

`?videos=items.csv` adds a table of texts with videos, which teach a grounded language model. A row with a video in its cell
is one, too. A cell of `video` is a path: a video file, or a .npy file with a row for each second. Features of
video files come from the backbone `?visual=NAME` and are kept in the cache.

`?words=words.csv` names words to probe: a column `word`, and a column of levels for each attribute. Half of them are probed in the
valid split, half in the test split.

Splits follow the rule of all own data: given names, else a fifth and a tenth. Equal texts stay in one split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data import cached
from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.bags import LazyItems
from counterpoint.data.own.cells import path_of, text_of
from counterpoint.data.own.item_splits import item_splits
from counterpoint.data.own.opening import open_table
from counterpoint.data.own.places import SPLITS
from counterpoint.data.own.table import Table
from counterpoint.data.tokens import FloatArray, TokenData, TokenSplit
from counterpoint.errors import DataError
from counterpoint.words import counted

TEXT = ("text", "sentence", "caption", "content")
VIDEO = ("video", "clip", "features")
LINES = (".txt", ".text")


def load(
    place: str,
    *,
    videos: str = "",
    words: str = "",
    visual: str = "light",
    seconds: float = 1.0,
    test: str = "",
    valid: str = "",
) -> TokenData:
    """Read the texts (see the module).

    Args:
        place: a file or folder.
        videos: a further table of texts with videos, for the split `grounded`. Default: none.
        words: a table of words with attributes to probe. Default: none.
        visual: visual backbone for video files, `NAME` or `NAME@WEIGHTS-FILE` (see `counterpoint.encoders`).
        seconds: length of video that a row of features stands for, above 0.
        test: fraction of the texts in the test split, or the name of a split. Default: as for all own data.
        valid: fraction of the training texts in the valid split, or the name of a split. Default: as for all own data.

    Raises DataError for unreadable files, a missing column, no usable text, and clips that are damaged or of several widths.
    """
    notes: list[str] = []
    rows = _read(place, notes)
    number: dict[str, int] = {}
    together = np.array([number.setdefault(text, len(number)) for text, _, _ in rows], np.int64)
    parts = item_splits(place, [split for _, _, split in rows], np.ones(len(rows), bool), together, test, valid)
    train, watched, held, said = parts
    notes += [note.replace(" with labels", "") for note in said]
    paired = [rows[n] for n in train.tolist() if rows[n][1]]
    paired += [row for row in _rows(videos, notes) if row[1]] if videos else []
    if videos and not paired:
        raise DataError(f"{videos}: has no row with a text and a video; name its columns 'text' and 'video'")
    grounded = None
    if paired:
        kept, clips = _clips([str(path) for _, path, _ in paired], visual, seconds, notes)
        grounded = TokenSplit([paired[n][0] for n in kept], clips)
    probed = _attributes(words) if words else ({}, {})
    return TokenData(
        f"texts:{place}",
        train=TokenSplit([rows[n][0] for n in train.tolist()]),
        valid=TokenSplit([rows[n][0] for n in watched.tolist()], None, probed[0]),
        test=TokenSplit([rows[n][0] for n in held.tolist()], None, probed[1]),
        grounded=grounded,
        notes=notes,
    )


Row = tuple[str, str, str]  # text, path of its video or "", split or ""


def plain_texts(place: str, notes: list[str]) -> list[str]:
    """Read all texts of a place, without splits. DataError where there is none."""
    return [text for text, _, _ in _read(place, notes)]


def _read(place: str, notes: list[str]) -> list[Row]:
    rows = _lines(place) if _is_plain(place) else _rows(place, notes)
    if not rows:
        raise DataError(f"{place}: has no text; put one on each line, or in a column 'text'")
    return rows


def _is_plain(place: str) -> bool:
    path = Path(place)
    return path.suffix.lower() in LINES or (path.is_dir() and any(path.rglob("*.txt")))


def _lines(place: str) -> list[Row]:
    """Read files of lines. DataError for a file that is missing or no text."""
    root = Path(place)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in LINES) if root.is_dir() else [root]
    found: list[Row] = []
    for path in files:
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
        split = SPLITS.get(path.stem.lower(), "")
        found += [(line.strip(), "", split) for line in lines if line.strip()]
    return found


def _rows(place: str, notes: list[str]) -> list[Row]:
    """Read a table. DataError where it has no column of texts."""
    accounts = Accounts(place)
    table, said = open_table(place, "", lambda name: name.lower() in (*TEXT, *VIDEO, "split"), accounts)
    notes += said
    text, video = _column(table, TEXT), _column(table, VIDEO)
    if not text:
        raise DataError(f"{place}: has no column of texts; name one of its columns {' or '.join(TEXT)}")
    split = _column(table, ("split",))
    broken = [(segment.path, row) for segment in table.segments for row in segment.broken]
    accounts.find("rows", len(table) + len(broken))
    for file, row in broken:
        accounts.leave(Line(str(file), row.number, row.reason))
    found: list[Row] = []
    for n in range(len(table)):
        value = text_of(table.cells(text)[n])
        if not value or not value.strip():
            accounts.leave(Line(place, n + 1, "has no text", column=text))
            continue
        path = text_of(table.cells(video)[n]) if video else None
        name = text_of(table.cells(split)[n]) if split else table.segments[table.where(n)[0]].split
        found.append((value.strip(), path_of(path, table.base(n)) if path else "", SPLITS.get(str(name).lower(), "")))
    accounts.read("rows", len(found))
    accounts.check()
    accounts.write()
    notes += accounts.notes()
    return found


def _column(table: Table, names: Sequence[str]) -> str:
    """Return the first column with one of these names, in any case; "" where there is none."""
    by_name = {column.lower(): column for column in reversed(table.columns)}
    return next((by_name[name] for name in names if name in by_name), "")


def _clips(paths: list[str], visual: str, seconds: float, notes: list[str]) -> tuple[list[int], LazyItems[FloatArray]]:
    """Return the positions of the readable clips, and the clips. DataError where none is readable or widths differ."""
    arrays = {path: Path(path) for path in dict.fromkeys(paths) if path.lower().endswith(".npy")}
    files = [Path(path) for path in dict.fromkeys(paths) if path not in arrays]
    left_out: list[tuple[Path, str]] = []
    kept: dict[Path, Path] = {}
    if files:
        from counterpoint import encoders
        from counterpoint.data.videos import extract

        eye, ear = encoders.build_visual(encoders.parse(visual)), encoders.build_audio(encoders.parse("logmel"))
        backbones = {"visual": eye.describe(), "audio": ear.describe()}
        kept = extract(files, eye, ear, backbones, seconds, notes, left_out)

    def read(path: str) -> FloatArray:
        found: Any = np.load(arrays[path], allow_pickle=False) if path in arrays else None
        if found is None:
            found = cached.load(kept[Path(path)], "visual")["visual"]
        found = np.asarray(found, np.float32)
        if found.ndim != 2 or not len(found):
            raise DataError(f"{path}: must hold numbers [seconds, width], has the shape {list(found.shape)}")
        if not np.isfinite(found).all():
            raise DataError(f"{path}: holds NaN or infinite numbers; write it again, or leave out its row")
        return found

    widths: dict[int, str] = {}
    for path, file in arrays.items():
        try:
            widths.setdefault(read(path).shape[1], path)
        except (OSError, ValueError) as error:
            left_out.append((file, str(error)))
    bad = {str(path) for path, _ in left_out}
    for path in [str(file) for file in files if str(file) not in bad][:1]:  # those of one backbone have one width
        widths.setdefault(read(path).shape[1], path)
    if len(widths) > 1:
        said = ", ".join(f"{path} {width}" for width, path in widths.items())
        raise DataError(f"clips must have rows of one width, have {said}; make all features with one network")
    rows = [n for n, path in enumerate(paths) if path not in bad]
    if not rows:
        raise DataError(
            f"none of {counted(len(paths), 'video can be', 'videos can be')} read: {left_out[0][0]}: {left_out[0][1]}"
        )
    if left_out:
        notes.append(
            f"{len(paths) - len(rows)} of {counted(len(paths), 'text')} with a video are left out, because it cannot be read, "
            "such as "
            f"{left_out[0][0]}: {left_out[0][1]}"
        )
    return rows, LazyItems(len(rows), lambda n: read(paths[rows[n]]))


Attributes = dict[str, dict[str, str]]


def _attributes(place: str) -> tuple[Attributes, Attributes]:
    """Return the attributes of every second word, for valid, and of the others, for test."""
    table, _ = open_table(place, "", lambda name: True, Accounts(place))
    word = _column(table, ("word", "words"))
    if not word or len(table.columns) < 2:
        raise DataError(
            f"{place}: needs a column 'word' and a column for each attribute, has {', '.join(table.columns)}"
        )
    halves: tuple[Attributes, Attributes] = ({}, {})
    for name in table.columns:
        if name == word:
            continue
        for n in range(len(table)):
            key, level = text_of(table.cells(word)[n]), text_of(table.cells(name)[n])
            if key and level:
                halves[n % 2].setdefault(name, {})[key.strip().lower()] = level.strip()
    return halves
