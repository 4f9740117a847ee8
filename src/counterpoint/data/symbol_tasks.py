"""`symbol-tasks`: each task is a random map from symbols to labels. No map of the valid or test split is in training.

    demonstrations   "ba alpha", "ke gamma", ...   each symbol once, with its label
    query            "ke"                          one of the symbols; the options are all labels

A hash of the map chooses its split. Plain texts write out the examples of one training map, in random order and some of them again.
"""

from __future__ import annotations

import zlib

import numpy as np

from counterpoint.data.demonstrations import DemonstrationData, DemonstrationSplit, Example
from counterpoint.data.images import Indices
from counterpoint.errors import CounterpointError

SYMBOLS = ("ba", "ke", "mi", "no", "pu", "ra", "si", "to", "du", "fe", "gi", "ho", "ja", "lu", "ve", "wo")
LABELS = ("alpha", "beta", "gamma", "delta", "kappa", "sigma", "omega", "theta")
SHARES = 5  # parts of the hash: one for test, one for valid, the others for training


def load(
    argument: None = None,
    *,
    symbols: int = 8,
    labels: int = 4,
    train: int = 3000,
    valid: int = 100,
    test: int = 200,
    queries: int = 4,
    texts: int = 6000,
    again: int = 2,
    seed: int = 0,
) -> DemonstrationData:
    """Draw the set (in a moment).

    Args:
        argument: not used; sources share a signature.
        symbols: number of symbols, 2 to 16.
        labels: number of labels, 2 to 8.
        train, valid, test: number of tasks in each split, at least 2.
        queries: number of queries of a task, 1 to `symbols`.
        texts: number of plain texts; 0 for none.
        again: number of examples that a plain text repeats, at least 1.
        seed: seed of maps, queries and texts, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range, and for more tasks than a sixteenth of all maps.
    """
    if not 2 <= symbols <= len(SYMBOLS) or not 2 <= labels <= len(LABELS) or not 1 <= queries <= symbols:
        raise CounterpointError(
            f"symbol-tasks: symbols lies in 2..{len(SYMBOLS)}, labels in 2..{len(LABELS)} and queries in 1..symbols, got "
            f"{symbols}, {labels} and {queries}"
        )
    if min(train, valid, test) < 2 or min(texts, seed) < 0 or again < 1:
        raise CounterpointError(
            "symbol-tasks: train, valid and test are at least 2, again at least 1, texts and seed at least 0; got "
            f"{train}, {valid}, {test}, {again}, {texts} and {seed}"
        )
    if 16 * (train + valid + test) > labels**symbols:
        raise CounterpointError(
            f"symbol-tasks: {train + valid + test} tasks are more than a sixteenth of the {labels**symbols} maps; raise symbols or "
            "labels, or lower train"
        )
    rng = np.random.default_rng([2403_06914, seed])
    parts = {"test": test, "valid": valid, "train": train}
    maps: dict[str, dict[bytes, Indices]] = {name: {} for name in parts}
    while any(len(maps[name]) < many for name, many in parts.items()):
        drawn = rng.integers(labels, size=symbols)
        key = drawn.astype(np.uint8).tobytes()
        name = ("test", "valid", *("train",) * (SHARES - 2))[zlib.crc32(key) % SHARES]
        if len(maps[name]) < parts[name]:
            maps[name][key] = drawn

    def split(name: str) -> DemonstrationSplit:
        examples = []
        for number, drawn in enumerate(maps[name].values()):
            task = f"{name} {number}"
            for symbol in range(symbols):
                examples.append(_example(task, symbol, drawn, labels, "demonstration"))
            for symbol in rng.permutation(symbols)[:queries].tolist():
                examples.append(_example(task, symbol, drawn, labels, "query"))
        return DemonstrationSplit(examples)

    splits = {name: split(name) for name in parts}
    known = list(maps["train"].values())
    written = []
    for number in range(texts):
        drawn = known[number % len(known)]
        order = np.concatenate([rng.permutation(symbols), rng.integers(symbols, size=again)]).tolist()
        written.append(" ".join(f"{SYMBOLS[n]} {LABELS[drawn[n]]}" for n in order))
    return DemonstrationData("symbol-tasks", splits["train"], splits["valid"], splits["test"], written)


def _example(task: str, symbol: int, drawn: Indices, labels: int, role: str) -> Example:
    return Example(task, SYMBOLS[symbol], LABELS[drawn[symbol]], LABELS[:labels], role)
