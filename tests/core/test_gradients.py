"""Gradients of two losses: cosine and realignment, gradients of units on weights, a gradient added to a loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from counterpoint import functional as fn
from counterpoint.core.gradients import Products, weight_gradients, with_gradient


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(2, 8), st.integers(0, 1000))
def test_realigned_gradients_have_nothing_along_the_other(units, size, seed):
    g1, g2 = draw(units, size, seed=seed), draw(units, size, seed=seed + 1)
    h1, h2 = fn.realigned(g1, g2)
    dot, cosine = (g1 * g2).sum(1), F.cosine_similarity(g1, g2)
    conflict = dot < 0
    torch.testing.assert_close(fn.gradient_cosine(g1, g2), cosine)
    assert ((h1 * g2).sum(1)[conflict].abs() < 1e-9).all()
    assert ((h2 * g1).sum(1)[conflict].abs() < 1e-9).all()
    expected = -cosine * g1.norm(dim=1) * g2.norm(dim=1) * (1 - cosine**2)
    torch.testing.assert_close((h1 * h2).sum(1)[conflict], expected[conflict])
    torch.testing.assert_close(h1[~conflict], g1[~conflict])
    torch.testing.assert_close(fn.realign(g1, g2)[~conflict], ((g1 + g2) / 2)[~conflict])
    torch.testing.assert_close(fn.realign(g2, g1), fn.realign(g1, g2))


def test_opposite_gradients_vanish_and_zero_ones_change_nothing():
    g = draw(5)
    assert fn.realign(g, -3 * g).abs().max() < 1e-12
    assert torch.equal(fn.realign(g, 0 * g, "sum"), g)
    assert fn.gradient_cosine(g, 0 * g) == 0
    assert fn.gradient_cosine(0 * g, 0 * g) == 0


def test_factors_give_the_sum_of_the_realigned_gradients():
    g1, g2 = draw(20, 3), draw(20, 3, seed=1)
    g1[0] = 0
    products = Products.of(g1, g2)
    first, second = products.factors
    assert 0 < (first > 1).sum() < 20
    torch.testing.assert_close(first[:, None] * g1 + second[:, None] * g2, fn.realign(g1, g2, "sum"))
    assert products.nonzero.tolist() == [False] + [True] * 19


def test_cosine_is_finite_at_extremes():
    g = torch.full((3,), 1e100, dtype=torch.float64)
    assert fn.gradient_cosine(g, -g).item() == pytest.approx(-1)
    assert fn.gradient_cosine(1e-200 * g, -1e-200 * g).item() == pytest.approx(-1)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: fn.realign(draw(3), draw(4)), "g1 and g2"),
        (lambda: fn.realign(draw(3), draw(3), "none"), "reduction"),
        (lambda: fn.gradient_cosine(torch.arange(3), torch.arange(3)), "g1 and g2"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, names):
    with pytest.raises(ValueError, match=names):
        call()


def test_weight_gradients_are_those_of_each_unit_alone():
    layer = nn.Linear(3, 2).double()
    outputs = [layer(draw(5, 3, seed=n)).tanh() for n in range(2)]
    pulled = [draw(4, 5, 2, seed=10 + n) for n in range(2)]
    found = weight_gradients(outputs, pulled, list(layer.parameters()))
    assert found.shape == (4, 8)
    for unit in range(4):
        value = sum((output * part[unit]).sum() for output, part in zip(outputs, pulled, strict=True))
        expected = torch.autograd.grad(value, list(layer.parameters()), retain_graph=True)
        torch.testing.assert_close(found[unit], torch.cat([part.flatten() for part in expected]))


def test_an_added_gradient_leaves_the_value():
    layer = nn.Linear(3, 2)
    weights = list(layer.parameters())
    loss = layer(torch.ones(1, 3)).square().sum()
    plain = torch.autograd.grad(loss, weights, retain_graph=True)
    more = torch.arange(8.0)
    changed = with_gradient(loss, weights, more.double())
    torch.testing.assert_close(changed, loss)
    found = torch.autograd.grad(changed, weights)
    expected = [g + extra.view_as(g) for g, extra in zip(plain, more.split([6, 2]), strict=True)]
    torch.testing.assert_close(list(found), expected)
