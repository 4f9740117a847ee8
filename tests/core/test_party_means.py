"""One network of several parties: means, votes, and parties that do not count."""

from __future__ import annotations

import math
import re

import pytest
import torch

from counterpoint.core.party_means import mean_of_parties

LIKE = {"w": torch.zeros(2, dtype=torch.float16), "steps": torch.tensor([3, 3]), "mask": torch.tensor([True, False])}


def state(w, steps=(4, 5), mask=(True, True)):
    return {"w": torch.tensor(w, dtype=torch.float16), "steps": torch.tensor(steps), "mask": torch.tensor(mask)}


def test_floats_are_averaged_and_the_rest_is_voted_on_in_its_own_type():
    parties = {"a": state([1.0, 2.0]), "b": state([4.0, 8.0], (6, 5), (False, True)), "c": state([1.0, 2.0], (6, 7))}
    mean, left_out = mean_of_parties(parties, {"a": 2, "b": 1, "c": 1}, LIKE)
    assert not left_out
    assert {name: value.dtype for name, value in mean.items()} == {n: v.dtype for n, v in LIKE.items()}
    assert mean["w"].tolist() == [1.75, 3.5]
    assert mean["steps"].tolist() == [4, 5]  # 4 and 6 have equal votes: the smaller
    assert mean["mask"].tolist() == [True, True]


def test_a_tie_keeps_the_server_s_value():
    mean, _ = mean_of_parties(
        {"a": state([0, 0], (3, 9)), "b": state([0, 0], (1, 3), (False, False))}, {"a": 1, "b": 1}, LIKE
    )
    assert mean["steps"].tolist() == [3, 3]
    assert mean["mask"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "weight", "reason"),
    [
        ({"w": torch.tensor([math.nan, 0], dtype=torch.float16)}, 1, "its w holds NaN or infinite values"),
        ({"w": torch.tensor([math.nan, 0], dtype=torch.float16)}, 0, "it has no examples"),
        ({}, math.nan, "its weight is nan"),
        ({}, -1, "its weight is -1"),
        ({"w": torch.zeros(3, dtype=torch.float16)}, 1, r"its w is \[3\] of float16, the server's \[2\] of float16"),
        ({"steps": torch.zeros(2)}, 1, r"its steps is \[2\] of float32"),
        ({"more": torch.zeros(2)}, 1, "it has other tensors: more"),
    ],
)
def test_a_party_that_does_not_count_is_named_and_changes_nothing(change, weight, reason):
    good = state([1.0, 2.0])
    mean, left_out = mean_of_parties({"good": good, "bad": good | change}, {"good": 5, "bad": weight}, LIKE)
    assert list(left_out) == ["bad"]
    assert re.search(reason, left_out["bad"])
    assert all(torch.equal(mean[name], good[name]) for name in LIKE)


def test_without_a_party_that_counts_there_is_no_mean():
    mean, left_out = mean_of_parties({"a": state([1, 1]), "b": state([2, 2])}, {"a": 0, "b": 0}, LIKE)
    assert mean is None
    assert set(left_out.values()) == {"it has no examples"}


def test_complex_numbers_are_refused():
    with pytest.raises(ValueError, match="like: z has complex numbers"):
        mean_of_parties({}, {}, {"z": torch.zeros(1, dtype=torch.complex64)})
