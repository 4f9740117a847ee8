"""Changes of values against torchvision's functional transforms."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as TF

from counterpoint.views import images as views


def each(operation, images, amounts):
    return torch.stack([operation(x, float(a)) for x, a in zip(images, amounts, strict=True)])


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts"),
    [
        (views.adjust_brightness, TF.adjust_brightness, [0.0, 0.3, 1.0, 1.2, 1.8, 0.7]),
        (views.adjust_contrast, TF.adjust_contrast, [0.0, 0.3, 1.0, 1.2, 1.8, 0.7]),
        (views.adjust_saturation, TF.adjust_saturation, [0.0, 0.3, 1.0, 1.2, 1.8, 0.7]),
        (views.adjust_hue, TF.adjust_hue, [-0.5, -0.2, 0.0, 0.1, 0.33, 0.5]),
    ],
)
def test_colour_operations_are_torchvision_s(pictures, ours, theirs, amounts):
    torch.testing.assert_close(
        ours(pictures, torch.tensor(amounts)), each(theirs, pictures, amounts), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_jitter_follows_its_order(pictures, order):
    draw = torch.Generator().manual_seed(1)
    factors = 0.5 + torch.rand(6, 3, generator=draw)
    hue = torch.rand(6, generator=draw) - 0.5
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    wanted = pictures
    for step in order:
        wanted = each(steps[step], wanted, [*factors.unbind(1), hue][step])
    found = views.colour_jitter(pictures, *factors.unbind(1), hue, order=order)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_grey_and_solarise_are_torchvision_s(pictures):
    wanted = TF.rgb_to_grayscale(pictures, num_output_channels=1)
    torch.testing.assert_close(views.grey(pictures), wanted, atol=1e-5, rtol=0)
    assert torch.equal(views.solarise(pictures), TF.solarize(pictures, 0.5))


def test_denormalise_inverts_normalise_and_clamps(pictures):
    torch.testing.assert_close(views.denormalise(views.normalise(pictures)), pictures, atol=1e-6, rtol=0)
    assert bool((views.denormalise(torch.full((1, 3, 2, 2), 9.0)) == 1).all())
