"""Sums over the regions of a mask, and sums over modalities."""

import pytest
import torch

from counterpoint.core.map_sums import class_means, class_sums, inverse_length, mean_weights, weighted_sum


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_class_sums_equal_loops_over_images_and_classes():
    features = draw(0, 2, 5, 3, 4)
    masks = (draw(1, 2, 3, 4) * 100).long().remainder(3).to(torch.uint8)
    masks[0, 0] = 255
    masks[1][masks[1] == 2] = 0  # an absent class
    sums, counts = class_sums(features, masks, 4)
    for n in range(2):
        for k in range(4):
            own = masks[n] == k
            torch.testing.assert_close(sums[n, k], features[n][:, own].sum(1))
            assert counts[n, k] == own.sum()
    assert counts[1, 2] == counts[:, 3].sum() == 0


def test_means_are_of_each_image_or_of_the_batch():
    features = draw(0, 2, 5, 3, 3)
    masks = torch.tensor([0, 1, 255], dtype=torch.uint8).repeat(2, 3, 1)
    masks[1, :, 1] = 0
    means, shown = class_means(features, masks, 3)
    torch.testing.assert_close(means[1, 0], features[1][:, :, :2].mean((1, 2)))
    assert shown.tolist() == [[True, True, False], [True, False, False]]
    means, shown = class_means(features, masks, 3, whole=True)
    own = torch.cat([features[0][:, :, :1], features[1][:, :, :2]], 2)
    torch.testing.assert_close(means[0], own.mean((1, 2)))
    assert shown.tolist() == [True, True, False]
    assert not means[2].any()


def test_larger_masks_are_scaled_by_the_nearest_pixel():
    masks = torch.tensor([[0, 1], [1, 255]], dtype=torch.uint8).repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    sums, counts = class_sums(torch.ones(1, 1, 2, 2), masks, 2)
    assert sums.flatten().tolist() == counts.flatten().tolist() == [1, 2]
    centre = torch.tensor([[[0, 0, 0], [0, 1, 0], [0, 0, 0]]], dtype=torch.uint8)
    assert class_sums(torch.ones(1, 1, 1, 1), centre, 2)[1].tolist() == [[0, 1]]


def test_weighted_sums_have_the_gradient_of_the_formula():
    x = draw(0, 3, 2, 4, 2, 2).requires_grad_()
    for weight in (draw(1, 3, 2).requires_grad_(), draw(1, 3, 2, 2, 2).requires_grad_()):
        whole = weight[..., None, None, None] if weight.ndim == 2 else weight[:, :, None]
        for ours, theirs in zip(*(torch.autograd.grad(y.sin().sum(), (x, weight))
                                  for y in (weighted_sum(x, weight), (x * whole).sum(0))), strict=True):  # fmt: skip
            torch.testing.assert_close(ours, theirs)


def test_weights_of_a_mean_leave_out_what_is_absent():
    present = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_weights(present, torch.float32).tolist() == [[0.5, 1.0, 0.0], [0.5, 0.0, 0.0]]


def test_inverse_length_of_zeros_is_zero_with_zero_gradient():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    found = inverse_length(x, (1,))
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([0.2, 0.0]))
    assert x.grad[1].tolist() == [0.0, 0.0]


def test_maps_and_masks_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="masks"):
        class_sums(draw(0, 2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), 2)
