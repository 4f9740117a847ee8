"""Dropout keeps the mean, follows the global generator and draws what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from counterpoint.core.dropout import Dropout, dropout, dropping_before


def test_the_share_dropped_and_the_mean_are_those_asked_for():
    x = torch.ones(1_000_000)
    for p in (0.1, 0.5, 0.9):
        torch.manual_seed(0)
        y = dropout(x, p)
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
        assert y.mean().item() == pytest.approx(1, abs=1e-2)
        assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-3)


def test_the_mask_follows_from_the_global_generator():
    x = torch.rand(33, 7)
    torch.manual_seed(5)
    one, other = dropout(x, 0.3), dropout(x, 0.3)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.3), one)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    gone = (dropout(torch.ones(400_000), 0.25) == 0).float().view(-1, 4)
    pairs = torch.cov(gone.T)
    assert pairs.diagonal().mean().item() == pytest.approx(0.1875, abs=2e-3)
    assert (pairs - pairs.diagonal().diag()).abs().max().item() < 3e-3


def test_the_gradient_is_the_mask():
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_evaluation_and_a_rate_of_zero_change_nothing():
    x = torch.rand(10)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    layer = Dropout(0.5).eval()
    assert isinstance(layer, nn.Dropout)
    assert layer(x) is x
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match="p must lie"):
            dropout(x, p)


def test_dropout_before_modules_ends_with_the_block_and_in_evaluation():
    layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    x = torch.ones(1000)
    with dropping_before(layers[:1], 0.5):
        assert set(layers[0](x).tolist()) == {0.0, 2.0}
        assert torch.equal(layers[1](x), x)
        layers.eval()
        assert torch.equal(layers[0](x), x)
        layers.train()
    assert torch.equal(layers[0](x), x)
