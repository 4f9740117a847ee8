"""Blurs and crops against torchvision's functional transforms, and the boxes that are drawn."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

from counterpoint.views import images as views


@pytest.mark.parametrize("kernel", [1, 3, 7, 11])
def test_blur_is_torchvision_s_for_every_sigma(pictures, kernel):
    sigma = torch.tensor([0.1, 0.4, 0.9, 1.3, 2.0, 5.0])
    wanted = torch.stack([TF.gaussian_blur(x, kernel, float(s)) for x, s in zip(pictures, sigma, strict=True)])
    torch.testing.assert_close(views.gaussian_blur(pictures, sigma, kernel), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [16, 24, 40])
def test_crop_is_torchvision_s(pictures, size, antialias):
    boxes = torch.tensor(
        [[0, 0, 24, 32], [3, 5, 1, 1], [2, 4, 11, 17], [10, 0, 14, 32], [0, 30, 24, 2], [5, 5, 16, 16]]
    )
    flip = torch.tensor([False, True, False, True, False, True])
    found = views.resized_crop(pictures, boxes, size, flip, antialias)
    wanted = []
    for x, (top, left, height, width), mirrored in zip(pictures, boxes.tolist(), flip, strict=True):
        cut = TF.resized_crop(
            x, top, left, height, width, [size, size], InterpolationMode.BILINEAR, antialias=antialias
        )
        wanted.append(TF.horizontal_flip(cut) if mirrored else cut)
    torch.testing.assert_close(found, torch.stack(wanted), atol=5e-5, rtol=0)


def test_a_box_beyond_the_edge_is_black_there(pictures):
    found = views.resized_crop(pictures[:, :, :, :24], torch.tensor([[-3, 2, 24, 24]]).expand(6, 4), 24)
    assert found[:, :, :3].abs().max() < 1e-5
    assert found[:, :, :, 22:].abs().max() < 1e-5
    torch.testing.assert_close(found[:, :, 3:, :22], pictures[:, :, :21, 2:24], atol=1e-5, rtol=0)


def test_boxes_have_torchvision_s_distribution():
    count, high, wide = 20000, 48, 32
    ours = views.random_boxes(count, high, wide, (0.2, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(0)).float()
    torch.manual_seed(0)
    crop = T.RandomResizedCrop(8, (0.2, 1.0), (3 / 4, 4 / 3))
    picture = torch.zeros(3, high, wide)
    names = ("top", "left", "height", "width")
    theirs = torch.tensor([[crop.make_params([picture])[n] for n in names] for _ in range(4000)]).float()
    for column in range(4):
        spread = theirs[:, column].std().item()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.08 * spread
        assert ours[:, column].std().item() == pytest.approx(spread, rel=0.06)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= high).all()
    assert (ours[:, 1] + ours[:, 3] <= wide).all()
    assert (ours[:, 2:] >= 1).all()


@pytest.mark.parametrize(("high", "wide"), [(4, 400), (400, 4), (1, 1)])
def test_images_no_crop_fits_in_fall_back_to_the_middle(high, wide):
    boxes = views.random_boxes(50, high, wide, (0.9, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(0))
    top, left, height, width = boxes.unbind(1)
    assert ((top >= 0) & (left >= 0) & (top + height <= high) & (left + width <= wide)).all()
    assert (width <= torch.ceil(height * 4 / 3)).all()
    assert (height <= torch.ceil(width * 4 / 3)).all()


def test_ratio_is_log_uniform():
    boxes = views.random_boxes(20000, 512, 512, (0.1, 0.2), (0.5, 2.0), torch.Generator().manual_seed(0)).float()
    logs = torch.log(boxes[:, 3] / boxes[:, 2])
    assert logs.mean().abs() < 0.01
    assert logs.std().item() == pytest.approx(2 * math.log(2) / math.sqrt(12), rel=0.02)
