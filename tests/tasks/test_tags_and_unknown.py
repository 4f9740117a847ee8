"""Measures of several labels a picture and of open sets: values by hand, ties, edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from counterpoint.tasks.measures.multilabel import tag_measures
from counterpoint.tasks.measures.unknown import open_set_f1


def test_average_precision_is_that_of_the_library():
    generator = torch.Generator().manual_seed(0)
    scores, tags = torch.randn(50, 4, generator=generator), torch.randint(0, 2, (50, 4), generator=generator)
    tags[:, 3] = 0  # no picture has it
    found = tag_measures(scores, tags)
    each = [average_precision_score(tags[:, n].numpy(), scores[:, n].numpy()) for n in range(3)]
    assert found["mean_ap"] == pytest.approx(np.mean(each))
    assert found["overall_ap"] == pytest.approx(average_precision_score(tags.numpy().ravel(), scores.numpy().ravel()))


def test_f1_counts_the_three_highest_scores():
    scores, tags = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1, 0, 0, 1]])
    found = tag_measures(scores, tags)
    # One of three is right, and one of two is found.
    assert found["overall_f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert found["class_f1"] == pytest.approx(2 * 0.25 * 0.25 / 0.5)


def test_without_a_label_precision_is_nan():
    assert math.isnan(tag_measures(torch.randn(3, 2), torch.zeros(3, 2, dtype=torch.long))["mean_ap"])


def test_an_open_set_is_right_where_unknown_pictures_have_low_confidence():
    probability = torch.tensor([[0.99, 0.0], [0.0, 0.99], [0.01, 0.0], [0.6, 0.4]])
    labels = torch.tensor([0, 1, -1, -1])
    found = []
    for threshold in np.linspace(0.01, 0.99, 100):
        known = [threshold < 0.99, threshold < 0.99, threshold < 0.01, threshold < 0.6]
        said = [guess if sure else 2 for guess, sure in zip([0, 1, 0, 0], known, strict=True)]
        truth = [0, 1, 2, 2]
        p, r = [], []
        for c in range(3):
            hit = sum(a == b == c for a, b in zip(said, truth, strict=True))
            p.append(hit / max(1, said.count(c)))
            r.append(hit / max(1, truth.count(c)))
        p, r = np.mean(p), np.mean(r)
        found.append(2 * p * r / max(p + r, 1e-12))
    assert open_set_f1(probability, labels) == pytest.approx(np.mean(found), abs=1e-6)


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match="scores and tags"):
        tag_measures(torch.ones(2, 3), torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="scores"):
        tag_measures(torch.full((2, 2), torch.nan), torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="probability must be"):
        open_set_f1(torch.ones(2, 3), torch.tensor([1]))
