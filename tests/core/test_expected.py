"""The expected distance of rows to keys against the whole matrix of distances."""

from __future__ import annotations

import math

import pytest
import torch

from counterpoint.core import expected
from counterpoint.core.expected import expected_distance


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9 * right.abs().max().item())


def distances(a, b):
    return (a[:, None] - b[None]).square().sum(2)


@pytest.mark.parametrize("block", [expected.BLOCK, 12])
@pytest.mark.parametrize("tau", [0.0, 0.7, 8.0])
def test_expected_distance_equals_the_whole_matrix(tau, block, monkeypatch):
    monkeypatch.setattr(expected, "BLOCK", block)
    query, key = draw(4, 3).requires_grad_(), draw(2, 5, 3, seed=1).requires_grad_()
    own, weight = torch.tensor([4, 0, 0, 2]), torch.tensor([0.3, 0.0, 2.0, 1.0], dtype=torch.float64)

    def found(q, k, through=True):
        return expected_distance(q, k, tau, own=own, weight=weight, through=through)

    def full(q, k, through=True):
        d = torch.stack([distances(q, keys) for keys in k], 1)
        s = (-tau * d).scatter(2, own[:, None, None].expand(-1, 2, 1), -math.inf).softmax(2)
        return (weight[:, None, None] * (s if through else s.detach()) * d).sum()

    assert torch.autograd.gradcheck(found, (query, key))
    for through in (True, False):
        ours = torch.autograd.grad(value := found(query, key, through), (query, key))
        theirs = torch.autograd.grad(right := full(query, key, through), (query, key))
        close(value.detach(), right.detach())
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)
        # One side alone learns.
        close(torch.autograd.grad(found(query, key.detach(), through), query)[0], theirs[0])
        close(torch.autograd.grad(found(query.detach(), key, through), key)[0], theirs[1])


def test_bad_input_is_named():
    z = draw(3, 5, 4)
    with pytest.raises(ValueError, match=r"query and key must be"):
        expected_distance(z[0], z[0], 1.0)
    with pytest.raises(ValueError, match="a set of at least 2"):
        expected_distance(z[0], z[:, :1], 1.0)
    with pytest.raises(ValueError, match="for each of 5 rows, one of the 4 keys"):
        expected_distance(z[0], z[:, :4], 1.0)
    with pytest.raises(ValueError, match="sharpness must lie"):
        expected_distance(z[0], z, -1.0)
