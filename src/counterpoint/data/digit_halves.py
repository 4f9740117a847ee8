"""`digit-halves`: the upper and the lower half of a handwritten digit, two views that share what the digit is.

Each of scikit-learn's 1,797 digits is cut between its fourth and fifth row of pixels: `top` and `bottom`, 32 greys in 0..1
each. With `whole=1` both modalities, `first` and `second`, are the whole digit: two encoders of one and the same thing.

With `labelled=N` the top halves come as a frozen tower sees them: a small network is trained to name the digit from N top
halves, which are not among the pairs, and `top` is its last layer before the names, 32 numbers. That is the setting of a
model that exists and is to be copied into another modality.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import SHARE, checked_share
from counterpoint.errors import CounterpointError

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WIDTH = 32  # of the tower's features
STEPS = 150  # of its training, on all of its digits at once


def load(
    argument: None = None,
    *,
    train: int = 0,
    valid: float = SHARE,
    test: int = 397,
    labelled: int = 0,
    whole: int = 0,
    seed: int = 0,
) -> AlignedData:
    """`train` pairs and `test` pairs drawn with `seed`, and `labelled` more digits that the tower learns from.

    Of the digits that are left, a share `valid` of each class is the valid split. 0 trains on all others.
    """
    from counterpoint.data.optical import load_digits

    found = load_digits()
    checked_share("digit-halves", valid)
    if test < 1 or min(train, labelled) < 0 or train + test + labelled > len(found.target):
        raise CounterpointError(
            f"digit-halves has {len(found.target)} digits; train {train} + test {test} + labelled {labelled} must be at "
            "least 0 + 1 + 0 and no more than that"
        )
    if whole and labelled:
        raise CounterpointError("digit-halves: the tower of labelled=N sees top halves; leave whole=1 away")
    pixels = (found.data / 16).astype(np.float32)
    labels = found.target.astype(np.int64)
    order = np.random.default_rng([2405_18570, seed]).permutation(len(labels))
    test_rows, rest = np.split(order, [test])
    tower_rows, rest = np.split(rest, [labelled])
    # The last ones of each class: training digits come from the front.
    of_class = [np.flatnonzero(labels[rest] == digit) for digit in range(len(CLASSES))]
    last = np.sort(np.concatenate([rows[len(rows) - round(valid * len(rows)) :] for rows in of_class]))
    watched, rest = rest[last], np.delete(rest, last)
    if not len(watched) or not len(rest) or train > len(rest):
        raise CounterpointError(
            f"digit-halves has {len(watched)} digits for the valid split (?valid={valid:g}) and {len(rest)} more to train "
            f"on, asked for {train or 'at least 1'}; ask for fewer training, test or labelled digits or another share"
        )
    notes = []
    columns = {"first": pixels, "second": pixels} if whole else {"top": pixels[:, :32], "bottom": pixels[:, 32:]}
    if labelled:
        columns["top"], right = _tower(columns["top"], labels, tower_rows, test_rows, seed)
        notes.append(f"the tower names {right:.0%} of the test digits from their top halves")

    def split(rows: NDArray[np.int64]) -> AlignedColumns:
        return AlignedColumns({name: values[rows] for name, values in columns.items()}, labels[rows])

    return AlignedData(
        "digit-halves",
        split(rest[: train or None]),
        split(watched),
        split(test_rows),
        {name: Modality("vector", dim=values.shape[1]) for name, values in columns.items()},
        classes=CLASSES,
        notes=notes,
    )


def _tower(
    halves: NDArray[np.float32],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    test: NDArray[np.int64],
    seed: int,
) -> tuple[NDArray[np.float32], float]:
    """Features of all halves from a network 32-128-128-32 trained to name those in `rows`, and how many of `test` it names."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):  # the run's own draws do not depend on the tower's
        torch.manual_seed(int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]))
        body = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, WIDTH))
        names = nn.Linear(WIDTH, len(CLASSES))
    optimizer = torch.optim.AdamW([*body.parameters(), *names.parameters()], lr=3e-3)
    everything, known = torch.from_numpy(halves), torch.from_numpy(labels)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(names(body(everything[rows])), known[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        features = body(everything)
        right = (names(features[test]).argmax(1) == known[test]).float().mean()
    return features.numpy(), float(right)
