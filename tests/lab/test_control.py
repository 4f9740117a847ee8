"""A positive control of the whole machinery: a planted effect is found, shuffled labels find none."""

from __future__ import annotations

import numpy as np
import pytest

from counterpoint import data
from counterpoint.lab import runner
from counterpoint.lab import verify as room
from counterpoint.lab.protocol import read

PROTOCOL = """
sentence = "b beats a by more than 1 point and costs no evenness."
kind = "outcome"
data = "digits?train=100"
[arms.a]
temperature = 0.1
[arms.b]
temperature = 0.2
[metrics.m]
unit = "accuracy"
bounds = [0.0, 1.0]
[metrics.even]
unit = "evenness"
[[conjuncts]]
says = "b beats a"
arm = "b"
baseline = "a"
metric = "m"
margin = 0.01
[[conjuncts]]
says = "it costs no evenness"
arm = "b"
baseline = "a"
metric = "even"
direction = "lower"
test = "non-inferiority"
margin = 0.5
"""


def planted(size: float, number: int):
    """Make a runner whose arms differ by `size`; seeds have their own level, which pairing removes."""

    def one(slug, source, options, settings, seed, recipe):
        arm = int(settings["temperature"] == 0.2)
        level = np.random.default_rng([number, seed]).normal(0.6, 0.05)
        noise = np.random.default_rng([number, seed, arm + 1]).normal(0, 0.01)
        return {"m": level + size * arm + noise, "even": 0.1 * noise, "data": seed}

    return one


def verdicts(tmp_path, size, experiments):
    found = []
    for number in range(experiments):
        record = room.verify(
            "simclr", jobs=1, out=tmp_path / f"{size}-{number}", protocol=read(PROTOCOL, "simclr"),
            run_one=planted(size, number),
        )  # fmt: skip
        found.append([row["verdict"] for row in record["conjuncts"]])
    return found


def test_a_planted_effect_is_found_and_no_effect_is_not(tmp_path):
    found = verdicts(tmp_path, 0.08, 12)
    assert sum(first == "holds" for first, _ in found) == 12
    none = verdicts(tmp_path, 0.0, 12)
    assert sum(first == "holds" for first, _ in none) == 0
    assert all(second == "holds" for _, second in none + found)


def test_an_effect_within_its_margin_is_not_said_to_hold(tmp_path):
    """The true gain is 1 point, the margin 1 point: "holds" at the error of the test, whatever the mean."""
    found = verdicts(tmp_path, 0.01, 40)
    assert sum(first == "holds" for first, _ in found) <= 4


REAL = """
sentence = "Training with labels retrieves digits of a class better than training with shuffled labels."
kind = "outcome"
data = "digits?size=8&train=200"
[setting]
encoder = "mlp-s"
recipe = "digits-plain"
hidden = 32
projection = 16
batch_size = 50
epochs = 6
evaluate_every = 6
lr = 0.2
warmup_epochs = 0
[arms.shuffled]
temperature = 0.1001
[arms.labels]
temperature = 0.1
[metrics.recall_at_1]
unit = "recall"
bounds = [0.0, 1.0]
[[conjuncts]]
says = "labels beat shuffled labels"
arm = "labels"
baseline = "shuffled"
metric = "recall_at_1"
"""


@pytest.mark.parametrize("informative", [True, False])
def test_a_real_system_learns_from_labels_and_not_from_shuffled_ones(tmp_path, monkeypatch, informative):
    """SupCon on digits through the real runner; measured among test digits, whose labels are true in every arm."""
    load = data.load
    shuffled: list[int] = []

    def changed(*words, **options):
        found = load(*words, **options)
        if shuffled:
            found.train.labels = np.random.default_rng(shuffled).permutation(found.train.labels)
        return found

    def one(slug, source, options, settings, seed, recipe):
        arm = settings["temperature"] == 0.1
        shuffled[:] = [] if arm and informative else [seed, arm]
        return runner.run_one(slug, source, options, settings, seed, recipe) | {"data": seed}

    monkeypatch.setattr(data, "load", changed)
    record = room.verify("supcon", jobs=1, out=tmp_path, protocol=read(REAL, "supcon"), run_one=one)
    (row,) = record["conjuncts"]
    assert row["verdict"] == ("holds" if informative else "no difference"), row["differences"]
