"""Mixtures of a batch with itself and their targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from counterpoint.core.mixing import (
    Boxes,
    cutmix,
    cutmix_boxes,
    draw_mix,
    mix,
    mix_labels,
    mixed_targets,
    mixing_at,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.sampled_from([0.01, 0.15, 1.0, (2.0, 8.0)]), st.booleans())
def test_targets_judge_a_mixture_as_the_mixture_of_its_parts(n, alpha, per_sample):
    permutation, lam = draw_mix(n, alpha, generator(n), per_sample=per_sample)
    assert permutation.sort().values.tolist() == list(range(n))
    assert lam.shape == (n,)
    assert ((lam >= 0) & (lam <= 1)).all()
    assert per_sample or (lam == lam[0]).all()
    x = torch.randn(n, 3, generator=generator())
    targets = mixed_targets(permutation, lam)
    torch.testing.assert_close(targets.sum(1), torch.ones(n))
    torch.testing.assert_close(targets @ x, mix(x, permutation, lam))
    labels = torch.arange(n) % 2
    torch.testing.assert_close(targets @ F.one_hot(labels, 2).float(), mix_labels(labels, permutation, lam, 2))


def test_draws_depend_on_the_generator_and_have_their_distribution():
    first, second = draw_mix(9, 0.4, generator(3)), draw_mix(9, 0.4, generator(3))
    assert torch.equal(first.lam, second.lam)
    assert torch.equal(first.permutation, second.permutation)
    assert draw_mix(9, 0.4, generator(4)).lam[0] != first.lam[0]
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    lam = draw_mix(20_000, (2.0, 8.0), generator(), per_sample=True).lam
    assert lam.mean().item() == pytest.approx(0.2, abs=0.005)
    assert lam.var().item() == pytest.approx(2 * 8 / (100 * 11), rel=0.05)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)
    half = draw_mix(20_000, 1.0, generator(), per_sample=True, probability=0.5).lam
    assert (half == 1).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (draw_mix(5, 0.0, generator()).lam == 1).all()
    assert draw_mix(0, 1.0, generator()).lam.shape == (0,)


def test_mixing_is_exact_at_its_ends_and_carries_gradients_to_both():
    x, permutation = torch.randn(4, 2, 3, requires_grad=True), torch.tensor([1, 2, 3, 0])
    assert torch.equal(mix(x, permutation, 1.0), x)
    assert torch.equal(mix(x, permutation, 0.0), x[permutation])
    lam = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: mix(y, permutation, lam), x.double())
    assert mix(x.bfloat16(), permutation, lam).dtype == torch.bfloat16


def test_fixed_points_add_up_or_are_replaced():
    permutation, lam = torch.tensor([0, 2, 1]), torch.tensor([0.7, 0.6, 0.5])
    added, replaced = mixed_targets(permutation, lam), mixed_targets(permutation, lam, accumulate=False)
    assert added[0].tolist() == [1, 0, 0]
    torch.testing.assert_close(replaced[0], torch.tensor([0.3, 0, 0]))
    assert torch.equal(added[1:], replaced[1:])
    assert mixed_targets(permutation, 0.75)[1].tolist() == [0, 0.75, 0.25]
    assert mixed_targets(permutation, lam.double()).dtype == torch.float64


def test_hidden_layers_are_mixed_inside_the_block_only():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 3)
    permutation, lam = torch.tensor([2, 0, 1]), torch.tensor([0.9, 0.5, 0.1])
    with mixing_at(net[1], permutation, lam):
        mixed = net(x)
    torch.testing.assert_close(mixed, net[2](mix(net[:2](x), permutation, lam)))
    torch.testing.assert_close(net(x), net[2](net[:2](x)))
    with pytest.raises(RuntimeError, match="stop"), mixing_at(net[1], permutation, lam):
        raise RuntimeError("stop")
    torch.testing.assert_close(net(x), net[2](net[:2](x)))


def test_soft_labels_are_mixed_as_they_are():
    labels, permutation = torch.eye(3)[:2], torch.tensor([1, 0])
    assert torch.equal(mix_labels(labels, permutation, 0.75), mix(labels, permutation, 0.75))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_cutmix_pastes_the_share_it_reports(height, width, lam):
    n = 5
    boxes = cutmix_boxes(height, width, torch.full((n,), lam), generator(height))
    images = torch.arange(float(n)).reshape(n, 1, 1, 1).expand(n, 2, height, width)
    permutation = torch.arange(n).roll(1)
    pasted = cutmix(images, permutation, boxes)
    left = (pasted == images).float().mean((1, 2, 3))
    torch.testing.assert_close(left, boxes.lam)
    assert (boxes.lam >= lam - 1e-6).all()  # sides are rounded down and cut at the edges
    assert ((pasted == images) | (pasted == images[permutation])).all()


def test_cutmix_boxes_lie_anywhere():
    boxes = cutmix_boxes(32, 16, torch.full((2000,), 0.75), generator())
    inside = (boxes.top > 0) & (boxes.bottom < 32) & (boxes.left > 0) & (boxes.right < 16)
    assert ((boxes.bottom - boxes.top)[inside] == 16).all()
    assert ((boxes.right - boxes.left)[inside] == 8).all()
    assert set(((boxes.top + boxes.bottom) // 2)[inside].tolist()) >= set(range(10, 23))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_mix(3, -1.0, generator()), "alpha"),
        (lambda: draw_mix(3, (0.0, 1.0), generator()), "alpha"),
        (lambda: draw_mix(3, 1.0, generator(), probability=1.5), "probability"),
        (lambda: mix(torch.ones(3, dtype=torch.uint8), torch.arange(3), 0.5), "uint8"),
        (lambda: mix(torch.ones(3), torch.arange(2), 0.5), "permutation"),
        (lambda: mix(torch.ones(3), torch.arange(3), torch.ones(2)), "lam"),
        (lambda: mixed_targets(torch.arange(3), torch.ones(2)), "lam"),
        (lambda: mix_labels(torch.arange(3), torch.arange(3), 0.5), "classes"),
        (lambda: cutmix_boxes(0, 3, torch.ones(2), generator()), "height"),
        (lambda: cutmix_boxes(3, 3, torch.tensor([math.nan]), generator()), "lam"),
        (lambda: cutmix(torch.ones(3, 1, 2, 2), torch.arange(3), Boxes(*torch.zeros(5, 2))), "images"),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_negative_permutation_is_not_read_from_the_end():
    with pytest.raises((IndexError, RuntimeError)):
        mix(torch.ones(3), torch.tensor([-1, 0, 1]), 0.5)
