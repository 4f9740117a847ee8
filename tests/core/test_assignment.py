"""Even assignments: the bias that gives them, and the cross-entropy towards them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from counterpoint import functional as fn
from counterpoint.core import assignment, kernel


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("keep", [0, kernel.KEEP])
def test_sinkhorn_bias_gives_the_assignments(monkeypatch, iters, keep):
    monkeypatch.setattr(kernel, "KEEP", keep)
    monkeypatch.setattr(kernel, "TILE", (3, 4))
    monkeypatch.setattr(kernel, "SMALL", 0)
    q, k = F.normalize(draw(7, 4)), F.normalize(draw(5, 4, seed=1))
    found = (q @ k.T / 0.1 + fn.sinkhorn_bias(q, k, 0.1, iters)).softmax(1)
    torch.testing.assert_close(found, fn.sinkhorn(q @ k.T, 0.1, iters))
    far = (900 * q @ k.T + fn.sinkhorn_bias(900 * q, k, 1.0, iters)).softmax(1)
    torch.testing.assert_close(far, fn.sinkhorn(900 * q @ k.T, 1.0, iters))


@pytest.mark.parametrize("whole", [0, 1024])
def test_assigned_cross_entropy_is_its_formula(monkeypatch, whole):
    monkeypatch.setattr(assignment, "WHOLE", whole)
    query, key = (draw(6, 4, seed=n).requires_grad_() for n in range(2))
    teachers = [F.normalize(draw(6, 4, seed=2 + n)) for n in range(2)]
    found = assignment.assigned_cross_entropy(query, key, *teachers, 0.1, 2)
    s, t = query @ key.T, teachers[0] @ teachers[1].T
    each = [F.cross_entropy(a, fn.sinkhorn(b, 0.1, 2)) for a, b in ((s, t), (s.T, t.T))]
    torch.testing.assert_close(found, sum(each) / 2)
    gradients = (torch.autograd.grad(x, (query, key), retain_graph=True) for x in (found, sum(each) / 2))
    torch.testing.assert_close(*gradients)


def test_an_epsilon_of_zero_raises_an_error():
    with pytest.raises(ValueError, match="eps"):
        fn.sinkhorn_bias(draw(2, 3), draw(2, 3), 0.0)
