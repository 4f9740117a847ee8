"""Read WebDataset archives: members with the same name form one sample, wherever in the archives they are.

    x/0001.jpg, x/0001.txt, x/0001.cls     one sample with the key x/0001, even with other members between its own
    .jpg .png .webp ...                    endings of one kind are alternatives for the same column
    0001.left.jpg                          another column of that kind, `image_left`

Archives without a common kind (one of pictures, one of texts) hold parts of the same samples. Equal keys match these parts.
Other archives may each count from 0001. A damaged archive is read up to the damage. The rest of it counts as one row, which
is left out.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.own.records import compact, parsed
from counterpoint.data.own.roles import KINDS, WHOLE
from counterpoint.data.own.table import KEY, BadCell, Broken, Cells, ListCells, Segment, Slice, Spool
from counterpoint.errors import DataError

_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, OSError)


@dataclass
class _Sample:
    key: str
    cells: dict[str, Any] = field(default_factory=dict)
    endings: dict[str, str] = field(default_factory=dict)  # by column, the ending of the member that the cell came from
    broken: str = ""


def member_column(ending: str) -> tuple[str, str]:
    """Return the column and the kind of a member by its ending. The kind is empty for an unsupported member.

    >>> member_column("left.jpg")
    ('image_left', 'image')
    """
    *before, last = ending.lower().split(".")
    kind = next((kind for kind, words in (KINDS | {"label": WHOLE["label"]}).items() if last in words), "")
    if not kind:
        return ending.lower(), ""
    return "_".join([kind, *(word for word in before if word != kind)]), kind


def read_archives(paths: Sequence[Path], spool: Spool, accounts: Accounts, prefer: str = "") -> list[Segment]:
    """Read archives, one segment each.

    Args:
        paths: Paths of tar files, compressed or not.
        spool: Stores the bytes of compressed members.
        accounts: Counts members, and archives that cannot be read at all.
        prefer: Preferred ending ("jpg"). Where a sample has two members of one kind, the one with this ending is used.
            Empty: such a sample is left out.
    """
    found: list[tuple[Path, list[_Sample], str]] = []
    for path in paths:
        samples, damage = _samples(path, spool, accounts, prefer)
        if not samples and damage:
            reason = f"not a tar file that can be read ({damage}); damaged or cut short?"
            if len(paths) == 1:
                raise DataError(f"{path}: {reason}")
            accounts.leave(Line(str(path), None, reason, unit="files"))
            continue
        found.append((path, samples, damage))
    _merge(found)
    return [_segment(path, samples, damage) for path, samples, damage in found]


def _samples(path: Path, spool: Spool, accounts: Accounts, prefer: str) -> tuple[list[_Sample], str]:
    """Return an archive's samples in the order of their first members, and the damage of its rest, "" for none."""
    samples: dict[str, _Sample] = {}
    try:
        with path.open("rb") as file:
            packed = file.read(6)
        plain = not packed.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        end = path.stat().st_size
        with tarfile.open(path, "r:" if plain else "r:*") as archive:
            for member in archive:
                if member.isdir():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                column, kind = member_column(ending)
                accounts.find("members")
                reason = _unfit(member, stem, ending, column, kind)
                if reason:
                    accounts.leave(Line(str(path), None, reason, key=member.name, unit="members"))
                    continue
                if plain and member.offset_data + (0 if member.issym() or member.islnk() else member.size) > end:
                    accounts.leave(Line(str(path), None, "is cut short", key=member.name, unit="members"))
                    return list(samples.values()), f"it is cut short: {member.name} goes beyond its end"
                try:
                    content = _content(path, archive, member, plain, kind, spool)
                except KeyError:
                    accounts.leave(Line(str(path), None, "a link to nothing", key=member.name, unit="members"))
                    continue
                key = f"{folder}/{stem}" if folder else stem
                sample = samples.setdefault(key, _Sample(key))
                reason = _add(sample, column, kind, content, ending.lower(), member.name, prefer)
                if reason:
                    accounts.leave(Line(str(path), None, reason, key=member.name, unit="members"))
                else:
                    accounts.read("members")
            damage = _rest(archive)
    except _DAMAGE as error:
        # A member that was found but not read is the damaged one.
        missing = accounts.missing().get("members", 0)
        for _ in range(missing):
            accounts.leave(Line(str(path), None, "cannot be read: the archive is damaged", unit="members"))
        damage = str(error)[:200] or type(error).__name__
    return list(samples.values()), damage


def _unfit(member: tarfile.TarInfo, stem: str, ending: str, column: str, kind: str) -> str:
    """Return the reason why a member is not part of a sample; empty if it is."""
    if not stem or not ending:
        return "hidden" if not stem else "its name has no ending"
    if stem.startswith("__"):
        return "a note of the archive"
    if not (member.isreg() or member.issym() or member.islnk()):
        return "no regular file"
    return "" if kind or column == "json" else f"its ending .{ending.rpartition('.')[2]} says no kind that is read"


def _content(path: Path, archive: Any, member: Any, plain: bool, kind: str, spool: Spool) -> Any:
    linked = member.issym() or member.islnk()
    if plain and not linked and not member.issparse() and kind not in ("text", "label", ""):
        return Slice(path, member.offset_data, member.size)
    opened = archive.extractfile(member)
    if opened is None:
        raise KeyError(member.name)
    content = opened.read()
    return content if kind in ("text", "label", "") else spool.keep(content)


def _rest(archive: Any) -> str:
    """Return the damage after the last readable member, "" for none: tarfile silently ends at a damaged header."""
    if not hasattr(archive, "offset"):
        return ""
    archive.fileobj.seek(archive.offset)
    empty = True
    while block := archive.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            empty = False
            break
    return "" if empty else "what follows its last readable member is no member"


def _add(sample: _Sample, column: str, kind: str, content: Any, ending: str, name: str, prefer: str) -> str:
    """Add a member to its sample. Return the reason why it does not fit, or an empty string."""
    if kind in ("text", "label"):
        try:
            content = content.decode("utf-8")
        except UnicodeDecodeError:
            content = BadCell("is not text in UTF-8")
        content = type(content)(content.strip()) if kind == "label" else content
    elif column == "json":
        try:
            record = parsed(content)
        except DataError as error:
            sample.broken = f"{name} {error}"
            return ""
        if isinstance(record, dict):
            sample.cells |= {f"json.{k}": compact(v) if isinstance(v, list) else v for k, v in record.items()}
        return ""
    before = sample.endings.get(column)
    if column in sample.cells and prefer in (ending, before) and before != ending:
        if before == prefer:
            return f"stands beside a member .{prefer} that was chosen"
    elif column in sample.cells:
        sample.broken = f"has two members that are its {column} (.{before}, .{ending})"
        return ""
    sample.cells[column], sample.endings[column] = content, ending
    return ""


def _merge(found: Sequence[tuple[Path, list[_Sample], str]]) -> None:
    """Merge the parts of each sample across archives without a common kind."""
    if len(found) < 2:
        return
    kinds = [frozenset(name for sample in samples for name in sample.cells) for _, samples, _ in found]
    if all(kinds[0] & other for other in kinds[1:]) and len(set(kinds)) == 1:
        return
    seen: dict[str, list[tuple[int, _Sample]]] = {}
    for at, (_, samples, _) in enumerate(found):
        kept = []
        for sample in samples:
            others = seen.setdefault(sample.key, [])
            home = next(
                (s for n, s in others if not kinds[n] & kinds[at] and not s.cells.keys() & sample.cells.keys()), None
            )
            if home is None:
                kept.append(sample)
                others.append((at, sample))
            else:
                home.cells |= sample.cells
                home.endings |= sample.endings
                home.broken = home.broken or sample.broken
        samples[:] = kept


def _segment(path: Path, samples: list[_Sample], damage: str) -> Segment:
    numbered = list(enumerate(samples, 1))
    broken = [Broken(number, sample.broken, sample.key) for number, sample in numbered if sample.broken]
    if damage:
        broken.append(Broken(len(samples) + 1, f"the archive is damaged ({damage}): what lies behind is lost"))
    good = [(number, sample) for number, sample in numbered if not sample.broken]
    names = dict.fromkeys([KEY, *(name for sample in samples for name in sample.cells)])
    cells: dict[str, Cells] = {
        name: ListCells([sample.key if name == KEY else sample.cells.get(name) for _, sample in good]) for name in names
    }
    usual = {name: kind for name in names for kind in [_kind(name)] if kind}
    numbers = np.array([number for number, _ in good], np.int64) if broken else None
    return Segment(path, len(good), cells, numbers, broken, usual=usual)


def _kind(column: str) -> str:
    """Return the kind in a column's name, which `member_column` made."""
    kind = column.partition("_")[0]
    return kind if (kind in KINDS or kind == "label") and not column.startswith("json.") else ""
