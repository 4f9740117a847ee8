"""Judged labels: each rule, its order, several labels, soft labels of a queue, means over kept rows, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from counterpoint.core.distributed import mean_where
from counterpoint.core.noisy_labels import bootstrap_target, judged_labels, judged_tags

SCORE = torch.tensor([[0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [0.5, 0.3, 0.2], [0.35, 0.61, 0.04]])


def test_rules_keep_correct_and_remove_labels():
    found = judged_labels(SCORE, torch.tensor([0, 0, 2, 0]), 0.6)
    assert found.kept.tolist() == [True, True, False, True]
    # The last label is clean, and a score above the threshold still corrects it.
    assert found.label.tolist() == [0, 1, -1, 1]


def test_trusted_rows_keep_their_labels():
    found = judged_labels(SCORE, torch.tensor([0, 0, 2, 0]), 0.6, torch.ones(4, dtype=torch.bool))
    assert found.label.tolist() == [0, 0, 2, 0]
    assert found.kept.all()


def test_several_labels_are_kept_flipped_or_ignored():
    score = torch.tensor([[0.95, 0.02, 0.4, 0.2], [0.95, 0.02, 0.9, 0.2]])
    tags = torch.tensor([[0, 1, 1, 1], [-1, -1, 0, 0]])
    assert judged_tags(score, tags, 0.9).tolist() == [[1, 0, 1, -1], [1, 0, 1, 0]]
    assert judged_tags(score, tags, 0.9, torch.tensor([True, False])).tolist()[0] == [0, 1, 1, 1]


def test_one_key_gives_every_row_its_soft_label():
    rows = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    soft = torch.tensor([[0.2, 0.7, 0.1]])
    torch.testing.assert_close(bootstrap_target(rows, rows[:1], soft), soft.expand(5, 3))


def test_a_mean_of_no_row_is_zero_and_has_a_gradient_of_zero():
    values = torch.tensor([1.0, float("inf")], requires_grad=True)
    loss = mean_where(values, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0
    assert values.grad.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: judged_labels(SCORE, torch.tensor([0, 1, 2])), r"label and trusted \[n\]"),
        (lambda: judged_labels(SCORE, torch.tensor([0, 1, 2, 3])), "label must lie in 0..2"),
        (lambda: judged_labels(SCORE, torch.tensor([0, 1, 2, -1])), "label must lie in 0..2"),
        (lambda: judged_labels(SCORE, torch.tensor([0, 1, 2, 1]), 1.5), "threshold must lie in 0..1"),
        (lambda: judged_tags(SCORE, torch.zeros(2, 3).long()), "score and tags"),
        (lambda: judged_tags(SCORE, torch.full((4, 3), 2)), "tags must be -1, 0 or 1"),
        (lambda: bootstrap_target(torch.ones(2, 3), torch.ones(4, 2), torch.ones(4, 2)), "queue"),
    ],
)
def test_bad_arguments_are_named(call: Any, said: str):
    with pytest.raises(ValueError, match=said):
        call()
