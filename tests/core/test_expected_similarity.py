"""Weighted mean similarities against the matrix of all pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from counterpoint.core import expected_similarity as room
from counterpoint.core.expected_similarity import expected_similarity
from counterpoint.core.rules import Views


def weights(rows: slice, logs: torch.Tensor, mean: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    return logs.exp() + 0.1 * mean + 0.01 * top


def rows(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 4, dtype=torch.float64, generator=g), dim=1).requires_grad_()


TAU = torch.linspace(0.1, 0.5, 12, dtype=torch.float64)


@pytest.mark.parametrize("whole", [0, 2**22])
def test_a_batch_with_itself_is_a_bank_of_its_own(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "WHOLE", whole)
    monkeypatch.setattr(room, "CHUNK", 5)
    found = []
    for alike in (True, False):
        query = rows(12)
        value = expected_similarity(query, None if alike else query, TAU, weights, (Views(6),))
        found.append((value.detach(), torch.autograd.grad(value, query)[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("chunk", [5, 512])
def test_value_and_gradients_are_those_of_the_matrix(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK", chunk)
    query, bank = rows(12), rows(7, seed=1)
    s = query @ bank.T
    logits = (s / TAU[:, None]).detach()
    p = logits.softmax(1)
    weight = weights(slice(0, 12), logits.logsumexp(1), (p * s).sum(1).detach(), logits.amax(1))
    expected = (weight * (p * s).sum(1)).sum()
    found = expected_similarity(query, bank, TAU, weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, [query, bank]), torch.autograd.grad(expected, [query, bank]))


def test_torch_func_gives_the_same_gradient() -> None:
    query = rows(12)
    (own,) = torch.autograd.grad(expected_similarity(query, None, TAU, weights, (Views(6),)), query)
    found = torch.func.grad(lambda x: expected_similarity(x, None, TAU, weights, (Views(6),)))(query.detach())
    torch.testing.assert_close(found, own)
