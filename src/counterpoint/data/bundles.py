"""Sources of sets: `bundles:PLACE`, the user's own; `themed-bundles`, made on the spot.

A bundle is a set of items, such as a playlist or an outfit. In a bundle for valid or test, half of the items are known. The
others are to be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.accounts import Accounts
from counterpoint.data.histories import HistoryData, HistorySplit, Lists
from counterpoint.data.interactions import ITEM, column_of, numbered
from counterpoint.data.own.opening import open_table
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted

BUNDLE = ("bundle", "bundle_id", "playlist", "playlist_id", "outfit", "outfit_id", "basket", "order", "order_id", "set")
FEATURES = ("content", "text", "cf")


def load(
    place: str,
    *,
    bundle: str = "",
    item: str = "",
    features: str = "",
    valid: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> HistoryData:
    """Read bundles, a row for each item of a bundle, from CSV, TSV, JSON lines or Parquet.

    Args:
        place: a file, folder or pattern.
        bundle: name of the column of bundles. Default: bundle, playlist, outfit, basket, order, set or a name alike.
        item: name of the column of items. Default: item, item_id, product, track or a name alike.
        features: a file .npz with vectors of items: "item" has their names, "content", "text" and "cf" [items, width] any of the
            features. A row of zeros, and an item that is missing, has none. Default: none.
        valid, test: share of the bundles for the valid and for the test split, above 0, together below 1.
        seed: seed of the split, and of the known half of a bundle.

    Bundles of one item are for training alone. Equal rows count once. Raises DataError for unreadable files, a missing
    column and too few bundles, CounterpointError for shares out of range.
    """
    if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
        raise CounterpointError(
            f"bundles: valid and test must be shares above 0, together below 1, got {valid=}, {test=}"
        )
    accounts = Accounts(place)
    table, notes = open_table(place, "", lambda name: True, accounts)
    sets, names = numbered(table, column_of(place, table, bundle, BUNDLE, "bundle"))
    items, item_names = numbered(table, column_of(place, table, item, ITEM, "item"))
    fine = (sets >= 0) & (items >= 0)
    if not fine.all():
        notes.append(
            f"{place}: {int((~fine).sum())} of {counted(len(fine), 'row has', 'rows have')} no bundle or no item and are left out"
        )
    pairs = np.unique(np.stack([sets[fine], items[fine]], 1), axis=0)
    if len(pairs) < int(fine.sum()):
        notes.append(
            f"{place}: {int(fine.sum()) - len(pairs)} of {counted(int(fine.sum()), 'row occurs', 'rows occur')} twice and count "
            "once"
        )
    lists = Lists(pairs[:, 1], np.bincount(pairs[:, 0], minlength=len(names)))
    found = _features(features, item_names, notes) if features else {}
    return _divided(f"bundles:{place}", lists, item_names, found, notes, names, valid, test, seed)


def _features(place: str, items: Sequence[str], notes: list[str]) -> dict[str, NDArray[np.float32]]:
    """Read the vectors of items from a file. DataError for an unreadable one and for other shapes."""
    try:
        with np.load(Path(place), allow_pickle=False) as held:
            tables = dict(held)
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: is no readable .npz file: {error}") from error
    if "item" not in tables or not set(tables) & set(FEATURES):
        raise DataError(
            f"{place}: needs 'item' and any of {', '.join(FEATURES)}; it has {', '.join(tables) or 'nothing'}"
        )
    row = {str(name): n for n, name in enumerate(tables["item"].tolist())}
    at = np.array([row.get(name, -1) for name in items])
    if (missing := int((at < 0).sum())) == len(items):
        raise DataError(
            f"{place}: has none of the {counted(len(items), 'item')}, such as {items[0]}; 'item' needs the names in the bundles"
        )
    if missing:
        notes.append(f"{place}: {missing} of {counted(len(items), 'item has', 'items have')} no features")
    found = {}
    for name in FEATURES:
        if name in tables:
            rows = np.asarray(tables[name], np.float32)
            if rows.ndim != 2 or len(rows) != len(row) or not np.isfinite(rows).all():
                raise DataError(f"{place}: '{name}' must be finite numbers [{len(row)}, width], got {list(rows.shape)}")
            found[name] = np.where((at >= 0)[:, None], rows[at], 0).astype(np.float32)
    return found


def _divided(
    name: str,
    lists: Lists,
    items: Sequence[str],
    features: dict[str, NDArray[np.float32]],
    notes: list[str],
    names: Sequence[str],
    valid: float,
    test: float,
    seed: int,
) -> HistoryData:
    """Divide bundles at random, and each one for valid or test into known items and items to find."""
    rng = np.random.default_rng([2310, 18770, seed])
    asked = rng.permutation(np.flatnonzero(lists.lengths > 1))
    counts = [max(1, round(share * len(lists))) for share in (valid, test)]
    if len(asked) < sum(counts) + 1:
        raise DataError(
            f"{name}: has {counted(len(asked), 'bundle')} of at least 2 items, too few for {sum(counts)} to evaluate and 1 to train"
        )
    parts = np.split(asked, np.cumsum(counts))

    def question(rows: NDArray[np.int64]) -> HistorySplit:
        orders = [rng.permutation(lists[int(n)]) for n in rows]
        halves = [
            (np.sort(order[: (len(order) + 1) // 2]), np.sort(order[(len(order) + 1) // 2 :])) for order in orders
        ]
        known, wanted = (Lists.of([half[side] for half in halves]) for side in range(2))
        return HistorySplit(known, wanted, [names[n] for n in rows] if len(names) else ())

    rest = np.setdiff1d(np.arange(len(lists)), np.concatenate(parts[:2]))
    rest = rest[lists.lengths[rest] > 0]
    train = HistorySplit(lists.take(rest), Lists.of([[]] * len(rest)), [names[n] for n in rest] if len(names) else ())
    return HistoryData(
        name, items, train, question(parts[0]), question(parts[1]), ordered=False, features=features, notes=notes
    )


def load_themed(
    argument: None = None,
    *,
    items: int = 400,
    train: int = 500,
    test: int = 300,
    size: int = 8,
    cold: float = 0.2,
    unseen: float = 0.3,
    seed: int = 0,
) -> HistoryData:
    """Return `themed-bundles`: sets of items near a random theme, with noisy features of the items, made on the spot.

    Items have latent unit vectors in 8 dimensions. `content` (40 numbers), `text` (30) and `cf` (64) are noisy functions of them.

    Args:
        argument: not used; sources share a signature.
        items: number of items, at least 4 times `size`.
        train: number of training bundles; test: of test bundles, and a third as many for valid. Each at least 3.
        size: items of a bundle, at least 2; of a question half are known.
        cold: share of the items without user feedback, 0 to 1.
        unseen: share of the items that occur in no training bundle, 0 to 0.6.
        seed: seed of everything.

    Raises DataError for a number out of range.
    """
    if items < 4 * size or min(train, test) < 3 or size < 2 or not 0 <= cold <= 1 or not 0 <= unseen <= 0.6:
        raise DataError(
            "themed-bundles: items must be at least 4 times size, size at least 2, train and test at least 3. The share cold lies "
            f"in 0..1 and unseen in 0..0.6; got {items=}, {train=}, {test=}, {size=}, {cold=}, {unseen=}"
        )
    rng = np.random.default_rng([2310, 18770, 1, seed])

    def directions(n: int) -> NDArray[Any]:
        found = rng.normal(size=(n, 8))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    latent = directions(items)
    features = {
        "content": np.tanh(latent @ rng.normal(size=(8, 40))) + 0.5 * rng.normal(size=(items, 40)),
        "text": np.tanh(latent @ rng.normal(size=(8, 30))) + 0.8 * rng.normal(size=(items, 30)),
        "cf": latent @ rng.normal(size=(8, 64)) + 1.5 * rng.normal(size=(items, 64)),
    }
    features["cf"][rng.permutation(items)[: round(cold * items)]] = 0
    seen = np.ones(items, bool)
    seen[rng.permutation(items)[: round(unseen * items)]] = False

    def bundles(n: int, allowed: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
        chance = np.exp(8 * directions(n) @ latent.T) * allowed
        return [rng.choice(items, size, replace=False, p=row / row.sum()) for row in chance]

    def question(n: int) -> HistorySplit:
        drawn, half = bundles(n, np.ones(items, bool)), (size + 1) // 2
        return HistorySplit(Lists.of([row[:half] for row in drawn]), Lists.of([row[half:] for row in drawn]))

    learnt = HistorySplit(Lists.of(bundles(train, seen)), Lists.of([[]] * train))
    named = [f"item {n}" for n in range(items)]
    tables = {name: rows.astype(np.float32) for name, rows in features.items()}
    return HistoryData(
        "themed-bundles", named, learnt, question(max(1, test // 3)), question(test), ordered=False, features=tables
    )
