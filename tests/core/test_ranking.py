"""Full ranking: equal to sorting all scores, hidden items, ties, memory, errors."""

from __future__ import annotations

import pytest
import torch

from counterpoint.core import ranking
from counterpoint.core.ranking import ranks_of_wanted
from counterpoint.tasks.measures.ranking import ranking_measures


def drawn(n: int = 9, items: int = 30, w: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, table = torch.randn(n, 4, generator=generator), torch.randn(items, 4, generator=generator)
    order = torch.rand(n, items, generator=generator).argsort(1)
    wanted, hidden = order[:, :w].clone(), order[:, w : w + 5].clone()
    wanted[2, 1:] = -1
    hidden[3] = -1
    return query, table, wanted, hidden


@pytest.mark.parametrize("width", [3, 20])  # counted one by one, and by sorting
@pytest.mark.parametrize("scores", [31, 2**24])  # a query at a time, and all at once
def test_ranks_are_places_in_the_sorted_list_without_hidden_items(width, scores, monkeypatch):
    monkeypatch.setattr(ranking, "SCORES", scores)
    query, table, wanted, hidden = drawn(w=width)
    found = ranks_of_wanted(query, table, wanted, hidden)
    for row in range(len(query)):
        out = {n for n in hidden[row].tolist() if n >= 0}
        order = [n for n in (query[row] @ table.T).argsort(descending=True).tolist() if n not in out]
        for n, rank in zip(wanted[row].tolist(), found[row].tolist(), strict=True):
            assert rank == (order.index(n) + 1 if n >= 0 else 31)


def test_equal_items_find_nothing_and_a_nan_is_last():
    none = torch.full((1, 1), -1)
    assert ranks_of_wanted(torch.ones(1, 2), torch.ones(7, 2), torch.tensor([[3]]), none).item() == 7
    table = torch.tensor([[1.0], [torch.nan], [2.0]])
    assert ranks_of_wanted(torch.ones(1, 1), table, torch.tensor([[1]]), none).item() == 3


def test_a_wanted_item_that_is_hidden_stays_a_candidate():
    assert (
        ranks_of_wanted(torch.ones(1, 1), torch.tensor([[3.0], [2.0]]), torch.tensor([[1]]), torch.tensor([[0, 1]]))
        == 1
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, t, w, h: (q[:, :2], t, w, h), "query and items"),
        (lambda q, t, w, h: (q, t, w[:2], h), "wanted must be"),
        (lambda q, t, w, h: (q, t, w, h + 30), "hidden must have item numbers below 30"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        ranks_of_wanted(*change(*drawn()))


def test_measures_of_several_wanted_items_follow_their_definitions():
    found = ranking_measures(torch.tensor([[1, 3, 40], [6, 99, 99]]), torch.tensor([3, 1]), [5])
    best = 1 + 1 / torch.log2(torch.tensor(3.0)) + 0.5
    assert found["recall_5"].tolist() == pytest.approx([2 / 3, 0])
    assert found["ndcg_5"].tolist() == pytest.approx([float(1.5 / best), 0])
    assert found["mrr_5"].tolist() == [1, 0]
