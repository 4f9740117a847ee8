"""Built-in sources with a real-valued target, one of each kind of input.

- `digit-numbers`: two handwritten digits side by side, and the number that they write. Data of SupReMix's claim.
- `diabetes`: ten numbers of a patient, and the progression of the disease after a year.
- `pulses`: a noisy series of beats of varying form, and their number a minute.
"""

from __future__ import annotations

import csv
import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import Indices, split_positions
from counterpoint.data.targets import TargetData, Targets
from counterpoint.data.valid import SHARE, carve, checked_count
from counterpoint.data.worlds import digits as world
from counterpoint.errors import DataError
from counterpoint.words import counted

SECONDS = 4  # of a series of pulses
RATE = 16  # its samples per second
SLOW, FAST = 50, 180  # pulses a minute


def load_numbers(
    argument: None = None,
    *,
    train: int = 600,
    test: int = 1500,
    watched: int = 300,
    imbalance: float = 1.0,
    held_out: float = 0.3,
    valid: float = SHARE,
    seed: int = 0,
) -> TargetData:
    """Return `digit-numbers`: pictures of 16 x 16 pixels with two digits, whose target is the number 10 a + b, 0 to 99.

    The digits are in the middle rows. No digit of a split is in another split. Numbers of the valid and of the test split are
    all equally frequent.

    Args:
        argument: not used; sources share a signature.
        train: number of training pictures, at least 2.
        test: number of test pictures, at least 2.
        watched: number of valid pictures, at least 2.
        imbalance: ratio of the frequencies of training numbers 0 and 99, at least 1; those between fall geometrically.
        held_out: share of the digits that test pictures are made of, between 0 and 1.
        valid: share of the other digits that valid pictures are made of, between 0 and 1.
        seed: seed of the choice of digits of all splits.

    Raises DataError for a number or share out of range.
    """
    if min(train, test, watched) < 2 or not 0 < held_out < 1 or not 1 <= imbalance < float("inf"):
        raise DataError(
            "digit-numbers: train, test and watched must be at least 2, and imbalance at least 1; held_out is a share between 0 "
            f"and 1; got {train=}, {test=}, {watched=}, {held_out=}, {imbalance=}"
        )
    parts = world.parts("digit-numbers", held_out, valid)
    labels = world.inventory()[1]
    rng = np.random.default_rng([2309_16633, seed])

    def pictures(pool: Indices, count: int, ratio: float) -> Targets:
        chance = ratio ** (-np.arange(100) / 99)
        numbers = rng.choice(100, count, p=chance / chance.sum())
        of_digit = [pool[labels[pool] == digit] for digit in range(10)]
        if not all(map(len, of_digit)):
            raise DataError(
                f"digit-numbers: {counted(len(pool), 'digit')} of a split without a class; set a larger share"
            )
        chosen = np.array(
            [[rng.choice(of_digit[digit]) for digit in divmod(number, 10)] for number in numbers.tolist()]
        )
        return Targets(np.pad(world.grey(world.scene(chosen)), ((0, 0), (4, 4), (0, 0))), numbers)

    trained = pictures(parts.train, train, imbalance)
    tested = pictures(parts.test, test, 1.0)
    return TargetData(
        name="digit-numbers",
        train=trained,
        valid=pictures(parts.valid, watched, 1.0),
        test=tested,
        kind="image",
        target="number",
        size=2 * world.SIDE,
    )


def load_diabetes(
    argument: None = None, *, train: int = 0, held_out: float = 0.25, valid: float = 0.2, seed: int = 0
) -> TargetData:
    """Return `diabetes`: ten numbers of each of 442 patients, and a measure of the disease's progression, 25 to 346.

    The numbers are age, sex, body mass index, blood pressure and six blood values. Source: Efron et al. 2004, in scikit-learn.

    Args:
        argument: not used; sources share a signature.
        train: number of training patients, at least 2; 0: all that remain.
        held_out: share of the patients in the test split, between 0 and 1.
        valid: share of the other patients in the valid split, between 0 and 1.
        seed: seed of all splits.

    Raises DataError for a number or share out of range, and when scikit-learn lacks the file.
    """
    rows, targets, names = _diabetes()
    order = np.random.default_rng([2004, seed]).permutation(len(rows))
    rest, tested = (order[part] for part in split_positions(len(rows), held_out))
    kept, watched = carve("diabetes", rest, valid)
    if train and not 2 <= train <= len(kept):
        raise DataError(f"diabetes: train must be 2 to {len(kept)} patients, got {train}")
    trained, held, unseen = (Targets(rows[at], targets[at]) for at in (kept[: train or None], watched, tested))
    return TargetData("diabetes", trained, held, unseen, "table", target="progression", columns=names)


def _diabetes() -> tuple[NDArray[np.float32], NDArray[np.float64], tuple[str, ...]]:
    """Read scikit-learn's files, because importing scikit-learn takes a second."""
    package = find_spec("sklearn")
    folder = Path(str(package.origin)).parent / "datasets" / "data" if package else Path()
    found = []
    for name in ("diabetes_data_raw.csv.gz", "diabetes_target.csv.gz"):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / name}: no such file; reinstall scikit-learn: pip install --force-reinstall scikit-learn"
            )
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            found.append(np.array([[float(cell) for cell in row] for row in csv.reader(file, delimiter=" ")]))
    names = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
    return found[0].astype(np.float32), found[1][:, 0], names


def load_pulses(
    argument: None = None, *, train: int = 600, test: int = 500, valid: int = -1, noise: float = 1.0, seed: int = 0
) -> TargetData:
    """Return `pulses`: noisy signals of 4 seconds, 16 samples a second, whose target is the beats per minute, 50 to 180.

    A beat is a wave with random phase and strengths of two harmonics, on a slow drift. Rates are whole numbers.

    Args:
        argument: not used; sources share a signature.
        train: number of training series, at least 2.
        test: number of test series, at least 2.
        valid: number of valid series, at least 1; -1 for as many as test.
        noise: standard deviation of the noise, at least 0; the main wave has amplitude 1.
        seed: seed of all splits.

    Raises DataError for a number out of range.
    """
    if min(train, test) < 2 or not 0 <= noise < float("inf"):
        raise DataError(
            f"pulses: train and test must be at least 2 and noise at least 0; got {train=}, {test=}, {noise=}"
        )
    rng = np.random.default_rng([2309, 16633, seed])
    time = np.arange(SECONDS * RATE) / RATE

    def series(count: int) -> Targets:
        rates = rng.integers(SLOW, FAST + 1, count)
        phase, drift = rng.uniform(0, 2 * np.pi, (3, count, 1)), rng.standard_normal((2, count, 1))
        turns = 2 * np.pi * rates[:, None] / 60 * time
        wave = np.cos(turns + phase[0]) + rng.uniform(0, 0.8, (count, 1)) * np.cos(2 * turns + phase[1])
        wave += drift[0] + drift[1] * np.cos(2 * np.pi * time / (2 * SECONDS) + phase[2])
        wave += noise * rng.standard_normal(wave.shape)
        return Targets(wave.astype(np.float32)[..., None], rates)

    trained, tested, watched = (series(n) for n in (train, test, checked_count("pulses", valid, test)))
    return TargetData("pulses", trained, watched, tested, "series", target="beats per minute", columns=("signal",))
