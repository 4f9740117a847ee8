"""Exponentials of a tile, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from counterpoint.core.exponentials import exp_, softplus_sum


def test_exponentials_overwrite_their_argument_and_keep_their_digits() -> None:
    x = torch.linspace(-87, 0, 1001)
    wanted = x.double().exp()
    found = exp_(x)
    assert found.data_ptr() == x.data_ptr()
    error = (found.double() / wanted - 1).abs()
    assert error.max() < 1e-5
    assert error[-100:].max() < 1e-6
    edges = exp_(torch.tensor([-math.inf, -200.0, 0.0, math.inf]))
    assert edges.tolist() == [0.0, 0.0, 1.0, math.inf]
    assert exp_(torch.tensor([math.nan])).isnan()


@pytest.mark.parametrize("centre", [-80.0, -30.0, -16.5, -13.0, -3.0, 0.0, 5.0, 60.0, 1000.0])
def test_sums_of_softplus_keep_their_relative_precision(centre: float) -> None:
    s = centre + torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    before = s.clone()
    x = s.double()
    wanted = (x.clamp(min=0) + (-x.abs()).exp().log1p()).sum(1)
    torch.testing.assert_close(softplus_sum(s).double(), wanted, rtol=1e-5 if centre < -20 else 1e-6, atol=0)
    assert torch.equal(s, before)


def test_no_columns_sum_to_nothing() -> None:
    assert softplus_sum(torch.zeros(3, 0)).tolist() == [0.0, 0.0, 0.0]
