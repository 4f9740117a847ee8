"""Open a place: all its tables, archives or folders of pictures as one `Table`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.own.archives import read_archives
from counterpoint.data.own.delimited import read_delimited
from counterpoint.data.own.lance_tables import read_lance
from counterpoint.data.own.litdata_folders import read_litdata
from counterpoint.data.own.parquet import read_parquet
from counterpoint.data.own.places import file_splits, files_of
from counterpoint.data.own.records import read_json, read_jsonl
from counterpoint.data.own.table import Segment, Spool, Table
from counterpoint.errors import DataError


def open_table(
    place: str, kind: str, wanted: Callable[[str], bool], accounts: Accounts, prefer: str = ""
) -> tuple[Table, list[str]]:
    """Read all rows of all files of a place.

    Args:
        place: A file, folder or pattern.
        kind: csv, jsonl, json, parquet, tar, lance or litdata. Empty: from the files' endings and contents.
        wanted: Returns whether a column of this name is read. Of other columns only the names are kept.
        accounts: Counts files and members of archives.
        prefer: Preferred ending of a member, for samples with two members of one kind.

    Returns the table and notes. Of several files, one that cannot be read is left out. Raises DataError when none can be read.
    """
    found = files_of(place, kind, accounts)
    spool = Spool()
    paths = [path for path, _ in found]
    segments: list[Segment] = []
    if found[0][1] == "tar":
        segments = read_archives(paths, spool, accounts, prefer)
    for path, what in found:
        if what == "tar":
            continue
        try:
            segments.append(_read(path, what, wanted, spool))
        except DataError as error:
            if len(found) == 1:
                raise
            accounts.leave(Line(str(path), None, str(error).removeprefix(f"{path}: "), unit="files"))
    accounts.read("files", len(segments))
    splits, notes = file_splits(place, paths)
    by_path = dict(zip(paths, splits, strict=True))
    for segment in segments:
        segment.split = by_path[segment.path]
    table = Table(place, segments, spool)
    broken = [(segment, row) for segment in segments for row in segment.broken]
    if not segments:
        raise DataError(f"{place}: none of its files can be read: {accounts.examples()}")
    if not len(table) and not broken:
        raise DataError(f"{place}: holds no rows; add one for every item")
    if not table.columns:
        segment, row = broken[0]
        raise DataError(f"{place}: none of its rows can be read: row {row.number} of {segment.path.name} {row.reason}")
    return table, notes


def _read(path: Path, kind: str, wanted: Callable[[str], bool], spool: Spool) -> Segment:
    """Read one file. DataError when it cannot be read."""
    try:
        if kind == "csv":
            return read_delimited(path, wanted)
        if kind == "parquet":
            return read_parquet(path, wanted, spool)
        if kind == "lance":
            return read_lance(path, wanted, spool)
        if kind == "litdata":
            return read_litdata(path, wanted, spool)
        return read_jsonl(path, wanted) if kind == "jsonl" else read_json(path, wanted)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise DataError(f"{path}: needs more memory than there is; it may be damaged") from error
