"""Sums of hinges against the matrix of all pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from counterpoint.core import hinge
from counterpoint.core.hinge import hinge_sum


def rows(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(k, 4, generator=g, dtype=torch.float64), dim=1) for k in (n, m))
    return x.requires_grad_(), y.requires_grad_()


def written(x: torch.Tensor, y: torch.Tensor, margin: float, offset: int) -> torch.Tensor:
    s = x @ y.T
    hinges = F.relu(margin - s.diagonal(offset)[:, None] + s)
    return torch.stack([hinges[i, j] for i in range(len(x)) for j in range(len(y)) if j != i + offset]).sum()


@pytest.mark.parametrize("tile", [1, 30, 2**20])
@pytest.mark.parametrize("offset", [0, 3])
def test_the_sum_and_its_gradients_are_those_of_the_matrix(tile, offset, monkeypatch):
    monkeypatch.setattr(hinge, "TILE", tile)
    x, y = rows(5, 9)
    found, expected = (f(x, y, 0.6, offset) for f in (hinge_sum, written))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, [x, y]), torch.autograd.grad(expected, [x, y]))


@pytest.mark.parametrize("offset", [0, 3])
def test_torch_func_gives_the_same_gradients(offset):
    x, y = rows(5, 9)
    found = torch.func.grad(lambda a, b: hinge_sum(a, b, 0.6, offset), argnums=(0, 1))(x.detach(), y.detach())
    torch.testing.assert_close(found, torch.autograd.grad(hinge_sum(x, y, 0.6, offset), [x, y]))


def test_an_infinite_similarity_gives_no_finite_sum():
    far, near = torch.tensor([[torch.inf], [1.0]]), torch.tensor([[1.0], [-1.0]])
    assert not hinge_sum(far, near, 0.5).isfinite()
    assert not torch.func.vmap(lambda a: hinge_sum(a, near, 0.5))(far[None]).isfinite()
