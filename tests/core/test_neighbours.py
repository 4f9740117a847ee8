"""Neighbours: exact search, re-ranking and smoothing against definitions written out, the authors' numbers, and edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.core import neighbours as file
from counterpoint.core.approximate_neighbours import approximate_rows
from counterpoint.core.neighbours import graph_smooth, k_reciprocal_rerank, nearest_rows, rerank_lists

PARITY = np.load(Path(__file__).parents[1] / "parity" / "capro.npz")


def given(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(PARITY[name]))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_re_ranked_distances_equal_the_authors():
    params = [PARITY[f"case2/param/{name}"].item() for name in ("k1", "k2", "lam")]
    found = k_reciprocal_rerank(given("case2/in/probe"), given("case2/in/gallery"), *params)
    # The authors' code computes in half precision.
    torch.testing.assert_close(found, given("case2/out/distance"), rtol=0, atol=5e-3)


def test_smoothed_rows_equal_the_authors():
    text = given("case3/in/text")
    found = graph_smooth(given("case3/in/neighbours"), given("case3/in/similarity"), text, 0.0, 1)
    torch.testing.assert_close(found.float(), given("case3/out/smoothed"), rtol=1e-5, atol=1e-6)


def written_out(rows: Tensor, k1: int, k2: int, lam: float) -> Tensor:
    """Compute the re-ranked distances row by row, with sets."""
    m = len(rows)
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    distance = distance / distance.amax(1, keepdim=True)
    order = distance.argsort(dim=1, stable=True)

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in order[i, : k + 1].tolist() if i in order[j, : k + 1].tolist()}

    weight = torch.zeros_like(distance)
    for i in range(m):
        members = reciprocal(i, k1)
        for j in reciprocal(i, k1):
            near = reciprocal(j, round(k1 / 2))
            if len(near & reciprocal(i, k1)) > 2 / 3 * len(near):
                members |= near
        chosen = sorted(members)
        weight[i, chosen] = (-distance[i, chosen]).exp()
    weight = weight / weight.sum(1, keepdim=True)
    if k2 > 1:
        weight = torch.stack([weight[order[i, :k2]].mean(0) for i in range(m)])
    least = torch.stack([torch.minimum(weight[i], weight).sum(1) for i in range(m)])
    return (1 - lam) * (1 - least / (2 - least)) + lam * distance


@pytest.mark.parametrize(("k1", "k2", "lam"), [(5, 3, 0.3), (4, 1, 0.0), (9, 2, 1.0)])
def test_re_ranking_equals_its_definition_with_sets(k1, k2, lam):
    rows = draw(0, 16, 4)
    found = k_reciprocal_rerank(rows[:3], rows[3:], k1, k2, lam)
    torch.testing.assert_close(found, written_out(rows, k1, k2, lam)[:3, 3:], rtol=1e-9, atol=1e-12)


def test_the_nearest_rows_are_those_of_a_sort_in_blocks_of_any_size(monkeypatch):
    rows = draw(1, 40, 5).float()
    wanted = (F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T).argsort(dim=1, descending=True)[:, :6]
    for cells in (1 << 24, 100, 1):
        monkeypatch.setattr(file, "CELLS", cells)
        assert torch.equal(nearest_rows(rows, 6).rows, wanted)
    assert nearest_rows(rows, 90).rows.shape == (40, 40)


def test_each_row_is_its_own_first_neighbour_among_equal_rows():
    found = nearest_rows(torch.ones(5, 2), 3)
    assert found.rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(found.similarity, torch.ones(5, 3))


def test_lists_are_ranked_again_as_their_own_gallery():
    rows = F.normalize(draw(2, 30, 4), dim=1)
    near = nearest_rows(rows, 10)
    found = rerank_lists(rows, near.rows, 4, 6, 3)
    for i in (0, 17):
        distance = k_reciprocal_rerank(rows[i : i + 1], rows[near.rows[i]], 6, 3)[0]
        others = distance[1:].argsort()[:3] + 1
        assert found.rows[i].tolist() == [i, *near.rows[i, others].tolist()]
        torch.testing.assert_close(found.similarity[i, 1:], 1 - distance[others])


def dense(neighbours: Tensor, similarity: Tensor, text: Tensor, self_weight: float, degree: int) -> Tensor:
    n = len(text)
    graph = torch.zeros(n, n, dtype=text.dtype)
    for i in range(n):
        for j, weight in zip(neighbours[i, 1:].tolist(), similarity[i, 1:].tolist(), strict=True):
            if i != j:
                graph[i, j] = max(float(graph[i, j]), min(max(weight, 0.0), 1.0))
    graph = torch.maximum(graph, graph.T)
    for own in (0.0, self_weight):
        graph = graph + own * torch.eye(n, dtype=text.dtype)
        total = graph.sum(1, keepdim=True)
        graph = torch.where(total > 0, graph / total.clamp(min=1e-12), graph)
    for _ in range(degree):
        text = graph @ text
    return text


@pytest.mark.parametrize(("self_weight", "degree"), [(0.0, 1), (0.5, 1), (2.0, 3)])
def test_smoothing_equals_the_dense_graph(self_weight, degree):
    neighbours = torch.randint(12, (12, 4), generator=torch.Generator().manual_seed(0))
    neighbours[:, 0] = torch.arange(12)
    similarity, text = draw(3, 12, 4), draw(4, 12, 3)
    found = graph_smooth(neighbours, similarity, text, self_weight, degree)
    torch.testing.assert_close(found, dense(neighbours, similarity, text, self_weight, degree), rtol=1e-9, atol=1e-12)


def test_an_isolated_row_stays_zero():
    found = graph_smooth(torch.tensor([[0, 1], [1, 0], [2, 2]]), torch.ones(3, 2), torch.ones(3, 2))
    assert found.tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: nearest_rows(torch.full((2, 2), torch.nan), 1), "rows must be finite"),
        (lambda: nearest_rows(torch.ones(2, 2), 0), "k must be positive"),
        (lambda: nearest_rows(torch.ones(0, 2), 1), "rows is an empty batch"),
        (lambda: k_reciprocal_rerank(torch.ones(1, 2), torch.ones(3, 4)), "rows of one width"),
        (lambda: k_reciprocal_rerank(torch.ones(1, 2), torch.ones(3, 2), lam=2.0), "lam must lie in 0..1"),
        (lambda: rerank_lists(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.long), 3), "keep must lie in 1..2"),
        (lambda: graph_smooth(torch.zeros(2, 2).long(), torch.ones(2, 3), torch.ones(2, 1)), "must be .n, k. alike"),
        (lambda: graph_smooth(torch.full((2, 2), 5), torch.ones(2, 2), torch.ones(2, 1)), "neighbours must lie in 0..1"),
        (lambda: graph_smooth(torch.zeros(2, 2).long(), torch.ones(2, 2), torch.ones(2, 1), -1.0), "self_weight"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call: Any, said: str):
    with pytest.raises(ValueError, match=said):
        call()


# ------------------------------------------------------------------------------------------------- approximate neighbours


def clustered(n: int, dim: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, dim, generator=generator)
    return centres[torch.randint(40, (n,), generator=generator)] + 0.5 * torch.randn(n, dim, generator=generator)


def test_approximate_neighbours_have_the_recall_that_they_report():
    rows = clustered(3000)
    found, exact = approximate_rows(rows, 10), nearest_rows(rows, 10)
    same = [len(set(a) & set(b)) for a, b in zip(found.neighbours.rows.tolist(), exact.rows.tolist(), strict=True)]
    share = sum(same) / exact.rows.numel()
    assert found.visited < found.clusters
    assert share == pytest.approx(found.recall, abs=0.03)
    assert found.recall >= 0.95
    assert torch.equal(found.neighbours.rows[:, 0], torch.arange(3000))


def test_with_all_clusters_they_are_exact():
    rows = clustered(500)
    found, exact = approximate_rows(rows, 5, recall=1.0, clusters=500), nearest_rows(rows, 5)
    assert found.recall == 1
    torch.testing.assert_close(found.neighbours.similarity.sort(1).values, exact.similarity.sort(1).values)


def test_equal_rows_are_their_own_first_neighbours():
    found = approximate_rows(torch.ones(40, 3), 4).neighbours
    assert torch.equal(found.rows[:, 0], torch.arange(40))
    torch.testing.assert_close(found.similarity, torch.ones(40, 4))


def test_neighbours_that_are_not_found_are_the_row_itself():
    rows = torch.eye(32) + 0.01 * clustered(32, 32)
    found = approximate_rows(rows, 4, recall=0.0, clusters=32).neighbours
    assert torch.equal(found.rows[:, 0], torch.arange(32))
    missing = (found.rows == torch.arange(32)[:, None]) & (torch.arange(4) > 0)
    assert (found.similarity[missing] == 0).all()


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (torch.zeros(0, 3), {"k": 2}, "rows"),
        (torch.full((4, 2), torch.nan), {"k": 2}, "finite"),
        (torch.ones(4, 2), {"k": 0}, "k must"),
        (torch.ones(4, 2), {"k": 2, "recall": 1.5}, "recall"),
        (torch.ones(4, 2), {"k": 2, "clusters": 5}, "clusters"),
    ],
)
def test_bad_arguments_of_approximate_neighbours_are_named(rows, options, said):
    with pytest.raises(ValueError, match=said):
        approximate_rows(rows, **options)
