"""Sources of histories: `interactions:PLACE`, the user's own; `movielens`; `visits`, made on the spot.

An interaction is a row: a user, an item and, if you like, a time. The history of a user are the items in order of time.

**Ties.** Times are often equal: in MovieLens-100K, 44 of 100 users have a last item whose time others share. Then the order is
not determined, and neither is the item to find. The order among equal times is defined here, and a note tells how many users it
concerns. `?ties=file` keeps the order of the rows, `?ties=item` sorts by the item's name, and `?ties=random&seed=1` draws one.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts, Line
from counterpoint.data.histories import HistoryData, Lists, leave_one_out
from counterpoint.data.own.cells import text_of
from counterpoint.data.own.opening import open_table
from counterpoint.data.own.table import Table, factorise
from counterpoint.errors import CounterpointError, DataError, unknown
from counterpoint.words import counted

USER = ("user", "user_id", "userid", "session", "session_id", "customer", "customer_id")
ITEM = ("item", "item_id", "itemid", "product", "product_id", "movie", "movie_id", "track", "track_id")
TIME = ("time", "timestamp", "date", "datetime", "created_at")
TIES = ("file", "item", "random")


def load(
    place: str,
    *,
    user: str = "",
    item: str = "",
    time: str = "",
    least: int = 1,
    last: int = 0,
    ties: str = "file",
    seed: int = 0,
) -> HistoryData:
    """Read interactions, a row each, from CSV, TSV, JSON lines or Parquet.

    Args:
        place: a file, folder or pattern.
        user: name of the column of users. Default: user, user_id, session, customer or a name alike.
        item: name of the column of items. Default: item, item_id, product, movie, track or a name alike.
        time: name of the column of times: numbers, or dates as 2026-01-31T12:00. Default: time, timestamp, date or a name alike;
            without such a column rows are in order.
        least: leave out users and items with fewer interactions than this, until none is left; at least 1. Papers often take 5.
        last: keep this number of the last items of each user; 0: all.
        ties: order of a user's items of equal time: file, item or random (see the module).
        seed: seed of the random order.

    Equal rows count once. Raises DataError for unreadable files, a missing column, no readable row, and where no user is left.
    """
    accounts = Accounts(place)
    table, notes = open_table(place, "", lambda name: True, accounts)
    names = {
        what: column_of(place, table, said, usual, what)
        for what, said, usual in (("user", user, USER), ("item", item, ITEM), ("time", time, TIME))
    }
    broken = [(segment.path, row) for segment in table.segments for row in segment.broken]
    accounts.find("rows", len(table) + len(broken))
    for file, bad in broken:
        accounts.leave(Line(str(file), bad.number, bad.reason))
    users, user_names = numbered(table, names["user"])
    items, item_names = numbered(table, names["item"])
    times, when = _times(table, names["time"])
    fine = np.ones(len(table), bool)
    for column, here in ((names["user"], users >= 0), (names["item"], items >= 0), (names["time"], when)):
        for n in np.flatnonzero(fine & ~here).tolist():
            accounts.leave(
                Line(place, n + 1, "is empty or no time" if column == names["time"] else "is empty", column=column)
            )
        fine &= here
    accounts.read("rows", int(fine.sum()))
    accounts.check()
    accounts.write()
    notes += accounts.notes()
    if not fine.any():
        raise DataError(f"{place}: none of {counted(len(table), 'row')} has a user and an item: {accounts.examples()}")
    if not names["time"]:
        notes.append(f"{place}: no column of times, so rows are in order; ?time=COLUMN names one")
    rows = np.flatnonzero(fine)
    return histories(
        f"interactions:{place}",
        users[rows],
        items[rows],
        times[rows],
        user_names,
        item_names,
        notes,
        least=least,
        last=last,
        ties=ties,
        seed=seed,
    )


def histories(
    name: str,
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    times: NDArray[np.float64],
    user_names: Sequence[str],
    item_names: Sequence[str],
    notes: Sequence[str] = (),
    *,
    least: int = 1,
    last: int = 0,
    ties: str = "file",
    seed: int = 0,
) -> HistoryData:
    """Make histories of interactions, and split them by `leave_one_out`.

    Args:
        name: name of the data.
        users, items: [n] numbers of the user and of the item of each interaction.
        times: [n] their times.
        user_names, item_names: names by number.
        notes: remarks for the reader.
        least, last, ties, seed: see `load`.

    Raises CounterpointError for an option out of range, DataError where no user is left.
    """
    if ties not in TIES:
        raise unknown("order of ties", ties, TIES)
    if least < 1 or last < 0 or 0 < last < 3:
        raise CounterpointError(
            f"{name}: least must be at least 1, and last 0 or at least 3; got least={least} and last={last}"
        )
    said = list(notes)
    at = np.unique(np.stack([users, items, times]), axis=1, return_index=True)[1]
    at.sort()
    if len(at) < len(users):
        said.append(
            f"{name}: {len(users) - len(at)} of {counted(len(users), 'interaction occurs', 'interactions occur')} twice and "
            "count once"
        )
    users, items, times = users[at], items[at], times[at]
    while len(users):
        many = [np.bincount(of, minlength=1)[of] >= least for of in (users, items)]
        if many[0].all() and many[1].all():
            break
        kept_rows = many[0] & many[1]
        users, items, times = users[kept_rows], items[kept_rows], times[kept_rows]
    if not len(users):
        raise DataError(f"{name}: no user and item have {least} interactions; set a lower ?least=")
    order = _order(users, items, times, item_names, ties, seed)
    users, items, times = users[order], items[order], times[order]
    kept, lengths = np.unique(users, return_counts=True)
    ends = np.cumsum(lengths)
    tied = [n for n, end in enumerate(ends.tolist()) if lengths[n] > 2 and times[end - 1] == times[end - 2]]
    if tied:
        said.append(
            f"{name}: {len(tied)} of {counted(len(kept), 'user has', 'users have')} a last item whose time others share; its "
            f"order is ?ties={ties}" + (f"&seed={seed}" if ties == "random" else "")
        )
    if last:
        items = items[np.repeat(ends, lengths) - np.arange(len(users)) <= last]
        lengths = np.minimum(lengths, last)
    numbers, again = np.unique(items, return_inverse=True)
    found = Lists(again.reshape(-1).astype(np.int64), lengths)
    return leave_one_out(name, found, [item_names[n] for n in numbers], [user_names[n] for n in kept], said)


def _order(
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    times: NDArray[np.float64],
    names: Sequence[str],
    ties: str,
    seed: int,
) -> NDArray[np.int64]:
    """Return the order of interactions: by user, by time, and by the rule for ties."""
    if ties == "item":
        rank = np.empty(len(names), np.int64)
        rank[sorted(range(len(names)), key=lambda n: names[n])] = np.arange(len(names))
        last = rank[items]
    else:
        last = np.arange(len(users))
        if ties == "random":
            last = np.random.default_rng([2304_07763, seed]).permutation(len(users))
    return np.lexsort((last, times, users))


def column_of(place: str, table: Table, said: str, usual: Sequence[str], what: str) -> str:
    """Return the name of a column; "" where there are no times. DataError where it is missing."""
    bare = {
        name.partition(":")[0].lower(): name for name in reversed(table.columns)
    }  # `user_id:token` of RecBole's files
    if said:
        if said in table.columns or said.lower() in bare:
            return said if said in table.columns else bare[said.lower()]
        raise DataError(f"{place}: no column '{said}'; it has {', '.join(table.columns)}")
    found = next((bare[name] for name in usual if name in bare), "")
    if not found and what != "time":
        raise DataError(f"{place}: no column of {what}s among {', '.join(table.columns)}; name it with ?{what}=COLUMN")
    return found


def numbered(table: Table, column: str) -> tuple[NDArray[np.int64], list[str]]:
    """Number the cells of a column, -1 where empty. Return the numbers and the name of each."""
    codes, cells = factorise(table.cells(column))
    names = [(text_of(cell) or "").strip() for cell in cells]
    known = {name: n for n, name in enumerate(dict.fromkeys(filter(None, names)))}
    return np.array([known.get(name, -1) for name in [*names, ""]], np.int64)[codes], list(known)


def _times(table: Table, column: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the times of all rows, and which are times. Without a column the number of the row is its time."""
    if not column:
        return np.arange(len(table), dtype=np.float64), np.ones(len(table), bool)
    codes, cells = factorise(table.cells(column))
    values = np.array([*(_seconds(cell) for cell in cells), np.nan])[codes]
    return values, np.isfinite(values)


def _seconds(cell: Any) -> float:
    """Return a time as a number; NaN where it is none."""
    if isinstance(cell, datetime):
        return cell.replace(tzinfo=cell.tzinfo or UTC).timestamp()
    text = (text_of(cell) or "").strip()
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return float("nan")
    return found.replace(tzinfo=found.tzinfo or UTC).timestamp()


# -------------------------------------------------------------------------------------------------------------- movielens

FILE = Path("dataset_example") / "ml-100k"  # in the package recbole


def load_movielens(
    place: str | None = None, *, least: int = 1, last: int = 0, ties: str = "file", seed: int = 0
) -> HistoryData:
    """Return MovieLens-100K: 100,000 ratings of 1,682 films by 943 users. Films have their titles.

    Args:
        place: a folder with ml-100k.inter (RecBole's file) or u.data (GroupLens'). Default: the file in the package recbole.
        least, last, ties, seed: see `load`.

    Raises DataError when there is no such file.
    """
    folder = Path(place) if place else _bundled()
    files = (("ml-100k.inter", "ml-100k.item"), ("u.data", "u.item"))
    name, titles = next(((name, titles) for name, titles in files if (folder / name).is_file()), ("", ""))
    if not name:
        raise DataError(f"{folder}: has neither ml-100k.inter nor u.data; name a folder with one of them")
    with open(folder / name, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row and row[0].isdigit()]
    numbers = np.array([[row[0], row[1], row[3]] for row in rows]).astype(np.float64)
    users, items = numbers[:, 0].astype(np.int64), numbers[:, 1].astype(np.int64)
    return histories(
        "movielens",
        users,
        items,
        numbers[:, 2],
        [str(n) for n in range(users.max() + 1)],
        _titles(folder / titles, int(items.max())),
        least=least,
        last=last,
        ties=ties,
        seed=seed,
    )


def _bundled() -> Path:
    """Return the folder in the package recbole, without its import. DataError where it is not installed."""
    package = find_spec("recbole")
    if package is None or package.origin is None:
        raise DataError(
            "movielens: reads the file that the package recbole brings: pip install --no-deps recbole==1.2.1. Or name a folder "
            "with u.data: movielens:DIR"
        )
    return Path(package.origin).parent / FILE


def _titles(path: Path, largest: int) -> list[str]:
    """Return the titles of films by number; the number itself where a title is missing."""
    found = [str(n) for n in range(largest + 1)]
    if path.is_file():
        between = "|" if path.name == "u.item" else "\t"
        for line in path.read_text("latin-1" if between == "|" else "utf-8").splitlines():
            number, title = (*line.split(between), "")[:2]
            if number.isdigit() and int(number) <= largest and title:
                found[int(number)] = title
    return found


# ----------------------------------------------------------------------------------------------------------------- visits


def load_visits(
    argument: None = None,
    *,
    users: int = 600,
    items: int = 200,
    groups: int = 10,
    shortest: int = 5,
    longest: int = 15,
    noise: float = 0.3,
    seed: int = 0,
) -> HistoryData:
    """Return `visits`: histories of users who follow chains of items, made on the spot.

    Items lie on rings, one for each group. A user starts in a group of their own. The next item is the following one on the ring,
    or the one after it. With the probability `noise` it is any item instead, and popular items are more likely.

    Args:
        argument: not used; sources share a signature.
        users: number of users, at least 2.
        items: number of items, at least 4 for each group.
        groups: number of rings, at least 1.
        shortest, longest: numbers of items of a history, at least 3.
        noise: probability of an item that does not follow, 0 to 1.
        seed: seed of all histories.

    Raises DataError for a number out of range.
    """
    if users < 2 or groups < 1 or items < 4 * groups or not 3 <= shortest <= longest or not 0 <= noise <= 1:
        raise DataError(
            "visits: users must be at least 2 and items 4 for each group; noise lies in 0..1, and shortest and longest are at "
            f"least 3; got {users=}, {items=}, {groups=}, {shortest=}, {longest=}, {noise=}"
        )
    rng = np.random.default_rng([2304, 7763, seed])
    size = items // groups
    chance = 1 / np.arange(1, items + 1)
    chance = rng.permutation(chance / chance.sum())
    found = []
    for _ in range(users):
        group, place = int(rng.integers(groups)), int(rng.integers(size))
        history = []
        for _ in range(int(rng.integers(shortest, longest + 1))):
            place = (place + int(rng.integers(1, 3))) % size
            other = rng.random() < noise
            history.append(int(rng.choice(items, p=chance)) if other else group * size + place)
        found.append(history)
    return leave_one_out("visits", Lists.of(found), [f"item {n}" for n in range(items)])
