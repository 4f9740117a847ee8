"""MIL-NCE: its edges and its mask."""

from __future__ import annotations

import math

import pytest
import torch

from counterpoint import functional as fn


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mil_nce_of_one_and_of_few():
    assert fn.mil_nce(draw(1, 4), draw(1, 4, seed=1)).item() == pytest.approx(math.log(2))
    video, text = (draw(*shape, seed=n).requires_grad_() for n, shape in enumerate(((4, 3), (8, 3))))
    mask = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(fn.mil_nce, (video, text))
    assert torch.autograd.gradcheck(lambda v, t: fn.mil_nce(v, t, mask), (video, text))


@pytest.mark.parametrize("candidates", [1, 3])
def test_masked_texts_are_the_published_minus_infinity(candidates):
    n = 6
    video, text = (draw(n * k, 4, seed=k).requires_grad_() for k in (1, candidates))
    mask = torch.tensor([True, False, True, True, False, True])
    s = (video @ text.T).view(n, n, candidates).masked_fill(~mask[:, None], -1e9)
    own = s.diagonal(dim1=0, dim2=1).T.logsumexp(1)
    everything = torch.cat([s.flatten(1), s.transpose(0, 1).flatten(1)], 1).logsumexp(1)
    expected = ((everything - own) * mask * (n / mask.sum())).mean()
    found = fn.mil_nce(video, text, mask)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, (video, text)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    nobody = fn.mil_nce(video, text, mask & False)
    assert nobody == 0
    assert all((g == 0).all() for g in torch.autograd.grad(nobody, (video, text)))
    assert fn.mil_nce(video * math.nan, text).isnan()
    # Values at masked texts have no effect.
    rubbish = text.detach().masked_fill(~mask.repeat_interleave(candidates)[:, None], math.nan).requires_grad_()
    unmoved = fn.mil_nce(video, rubbish, mask)
    assert torch.equal(unmoved, found)
    assert all(g.isfinite().all() for g in torch.autograd.grad(unmoved, (video, rubbish)))
    for same in (mask.long(), mask.double()):
        assert torch.equal(fn.mil_nce(video, text, same), found)
    for wrong in (mask.long() * 2, mask.double() * 0.5, mask[1:]):
        with pytest.raises(ValueError, match="mask must be True or False"):
            fn.mil_nce(video, text, wrong)
    with pytest.raises(ValueError, match=r"text \[n L, dim\]"):
        fn.mil_nce(video, text[:0])


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: fn.mil_nce(draw(2, 3), draw(3, 3)), "video must be"),
        (lambda: fn.mil_nce(draw(2, 3), draw(2, 4)), "video must be"),
        (lambda: fn.mil_nce(draw(0, 3), draw(0, 3)), "empty batch"),
        (lambda: fn.mil_nce(draw(2, 3), draw(4, 3), torch.ones(4, dtype=torch.bool)), "mask"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, names):
    with pytest.raises(ValueError, match=names):
        call()
