"""Means of classes over the sizes of the classes."""

from __future__ import annotations

import pytest
import torch

from counterpoint.tasks.measures import means_by_class

LABELS = torch.tensor([0, 0, 0, 3, 3, 1, -1])
VALUES = torch.tensor([9.0, 9.0, 6.0, 4.0, 6.0, 2.0, 99.0])


def test_means_leave_unknown_items_out() -> None:
    found = means_by_class(VALUES, LABELS)
    assert found is not None
    assert found.classes.tolist() == [0, 1, 3]
    assert found.sizes.tolist() == [3, 1, 2]
    assert found.means.tolist() == [8, 2, 5]
    assert means_by_class(VALUES, None) is None
    assert means_by_class(VALUES, torch.tensor([1, 1, 1, 1, 1, -1, -1])) is None


def test_larger_means_of_larger_classes_correlate() -> None:
    found = means_by_class(VALUES, LABELS)
    assert found is not None
    assert found.rank_correlation() == pytest.approx(1)
    assert found._replace(means=-found.means).rank_correlation() == pytest.approx(-1)
    assert found._replace(means=torch.ones(3)).rank_correlation() == 0
    tail, head = found.tail_and_head()
    assert (tail.item(), head.item()) == (2, 8)


def test_a_figure_has_a_point_for_each_class() -> None:
    found = means_by_class(VALUES, LABELS)
    assert found is not None
    figure = found.points(("a", "b"), ("size", "mean"), "Caption.")
    assert figure["points"] == {"a": [[3, 8.0]], "b": [[1, 2.0]], "3": [[2, 5.0]]}
    assert figure["axes"] == ["size", "mean"]
