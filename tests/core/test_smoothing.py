"""Contrast with label smoothing against PyTorch's cross-entropy of the whole matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from counterpoint.core import kernel
from counterpoint.core.smoothing import smoothed_cross_entropies


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_rows_and_columns_are_smoothed_cross_entropies(monkeypatch, smoothing):
    monkeypatch.setattr(kernel, "TILE", (3, 4))
    monkeypatch.setattr(kernel, "SMALL", 0)
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(7, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    found = smoothed_cross_entropies(a, b, 5.0, smoothing)
    s, target = 5 * F.normalize(a) @ F.normalize(b).T, torch.arange(7)
    expected = [F.cross_entropy(x, target, label_smoothing=smoothing) for x in (s, s.T)]
    torch.testing.assert_close(list(found), expected)
    gradients = (torch.autograd.grad(x[0] + 2 * x[1], (a, b)) for x in (found, expected))
    torch.testing.assert_close(*gradients)
