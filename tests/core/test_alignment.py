"""Terms that align two views or modalities without negatives."""

from __future__ import annotations

import pytest
import torch

from counterpoint import functional as fn


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_barlow_cross_is_its_formula_for_one_row_too():
    for n in (1, 5):
        a, b = draw(n, 4), draw(n, 4, seed=1)
        c = a.T @ b / n
        expected = 0.025 * ((c.diagonal() - 1).square().sum() + 5e-3 * (c.square().sum() - c.diagonal().square().sum()))
        torch.testing.assert_close(fn.barlow_cross(a, b), expected)


def test_gradients_are_right_and_stop_at_the_target():
    x = [draw(4, 3, seed=n).requires_grad_() for n in range(2)]
    assert torch.autograd.gradcheck(fn.barlow_cross, x)
    assert torch.autograd.gradcheck(lambda p: fn.byol_cross(p, x[1].detach()), x[:1])
    fn.byol_cross(x[0], x[1]).backward()
    assert x[1].grad is None
    # Equal projections have nothing left to do; opposite ones are as far apart as can be.
    assert fn.byol_cross(x[0], 3 * x[0]).item() == pytest.approx(0)
    assert fn.byol_cross(x[0], -x[0]).item() == pytest.approx(4)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: fn.barlow_cross(draw(2, 3), draw(3, 3)), "z1 and z2"),
        (lambda: fn.byol_cross(draw(2, 3), draw(3, 3)), "prediction and target"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, names):
    with pytest.raises(ValueError, match=names):
        call()
