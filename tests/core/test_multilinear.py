"""Log-sum-exps of multilinear inner products against the array of all of them."""

from __future__ import annotations

import pytest
import torch

from counterpoint.core import multilinear
from counterpoint.core.multilinear import combined_logsumexp, outer, product


def factors(m, n=3, dim=5):
    g = torch.Generator().manual_seed(m)
    return [torch.randn(n, dim, generator=g, dtype=torch.float64).requires_grad_() for _ in range(m)]


def every(rows):
    """Return the array of the inner products of all combinations of rows."""
    letters = "abcdefg"[: len(rows)]
    return torch.einsum(",".join(f"{letter}z" for letter in letters) + f"->{letters}", *rows)


@pytest.mark.parametrize("block", [multilinear.BLOCK, 60, 1])
@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_log_z_in_blocks_is_that_of_the_whole_array(m, block, monkeypatch):
    monkeypatch.setattr(multilinear, "BLOCK", block)
    mine, theirs = factors(m), factors(m)
    array = every(theirs)
    found = torch.stack(combined_logsumexp(mine))
    right = torch.stack([array.movedim(d, 0).flatten(1).logsumexp(1) for d in range(m)])
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    weight = torch.arange(right.numel(), dtype=right.dtype).view_as(right)
    slopes = [torch.autograd.grad((x * weight).sum(), over) for x, over in ((found, mine), (right, theirs))]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


def test_the_last_factor_varies_fastest():
    a, b, c = factors(3)
    torch.testing.assert_close(outer([a, b, c])[2 * 9 + 1 * 3 + 0], a[2] * b[1] * c[0])


def test_a_product_leaves_its_factors_unchanged():
    rows = [x.detach() for x in factors(3)]
    before = [x.clone() for x in rows]
    torch.testing.assert_close(product(rows), rows[0] * rows[1] * rows[2])
    assert all(torch.equal(x, y) for x, y in zip(rows, before, strict=True))
