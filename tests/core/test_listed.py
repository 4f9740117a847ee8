"""Products with listed rows, their sums, and draws of other classes, against their direct forms."""

from __future__ import annotations

import pytest
import torch

from counterpoint.core import listed
from counterpoint.core.listed import OtherClasses, listed_products, listed_sums


def inputs(samples):
    g = torch.Generator().manual_seed(0)
    query, memory = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (3, samples))
    return query, memory, torch.randint(samples, (3, 5), generator=g), torch.randn(3, 5, generator=g).double()


@pytest.mark.parametrize("samples", [11, 400])  # with the whole memory at once, or with the rows that are listed
@pytest.mark.parametrize("block", [1, 2**20])
def test_products_and_sums_are_those_of_the_listed_rows(samples, block, monkeypatch):
    monkeypatch.setattr(listed, "BLOCK", block)
    query, memory, index, weight = inputs(samples)
    assert listed._fetched(memory, index) == (samples == 400)
    torch.testing.assert_close(listed_products(query, memory, index), (query[:, None] * memory[index]).sum(2))
    torch.testing.assert_close(listed_sums(weight, memory, index), (weight[..., None] * memory[index]).sum(1))


@pytest.mark.parametrize("samples", [11, 400])
def test_no_rows_have_empty_products(samples):
    query, memory, index, _ = inputs(samples)
    assert listed_products(query[:0], memory, index[:0]).shape == (0, 5)


def test_sums_repeat_a_row_that_is_listed_twice():
    memory = torch.eye(2)
    assert listed_sums(torch.tensor([[1.0, 2.0]]), memory, torch.tensor([[1, 1]])).tolist() == [[0.0, 3.0]]


def test_every_example_of_the_other_classes_is_drawn_and_none_of_the_own():
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    index = torch.arange(7)
    drawn = OtherClasses(labels).draw(index, 500, torch.Generator().manual_seed(0))
    for i, row in enumerate(drawn):
        assert set(row.tolist()) == set(index[labels != labels[i]].tolist())


def test_one_class_has_no_others():
    with pytest.raises(ValueError, match="labels holds one class"):
        OtherClasses(torch.zeros(3, dtype=torch.long))


def test_the_state_dict_lacks_the_order_of_the_classes():
    assert not OtherClasses(torch.tensor([0, 1])).state_dict()
