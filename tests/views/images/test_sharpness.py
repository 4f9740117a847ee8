"""Sharper and softer copies, and pairs of small and large patches, against torchvision and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from counterpoint.errors import CounterpointError
from counterpoint.views.images.degraded import PatchPairs, downscaled, enlarged, upscaled
from counterpoint.views.images.resampling import blur_across
from counterpoint.views.images.sharpness import Samples, sharpen


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_sharpening_equals_torchvision_s_with_a_factor_for_each_image() -> None:
    x, factors = images(3, 3, 9, 12), torch.tensor([0.5, 1.0, 3.0])
    found = sharpen(x, factors)
    for number, factor in enumerate(factors.tolist()):
        torch.testing.assert_close(found[number], tv.adjust_sharpness(x[number], factor))
    torch.testing.assert_close(found[1], x[1])


def test_blurring_equals_torchvision_s_with_windows_of_its_own_down_and_across() -> None:
    x = images(2, 3, 9, 12)
    torch.testing.assert_close(blur_across(x, (5, 9), (0.7, 1.5)), tv.gaussian_blur(x, [9, 5], [1.5, 0.7]))


def test_scaling_down_equals_pillow_s_to_a_level() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).resize((12, 8), Image.Resampling.BICUBIC), int)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    found = (downscaled(x, 3)[0].permute(1, 2, 0) * 255).round().numpy().astype(int)
    assert np.abs(found - wanted).max() <= 1
    assert upscaled(x, 2).shape == (1, 3, 48, 72)
    assert torch.equal(enlarged(x, (24, 36)), x)
    big = enlarged(x, (47, 71))
    torch.testing.assert_close(big[..., ::2, ::2], x)  # corners fall on corners


def test_samples_are_the_original_and_sharper_copies_against_the_input_and_softer_copies() -> None:
    high, low = images(4, 3, 16, 16), images(4, 3, 8, 8)
    samples = Samples(copies=2, noisy=True)
    drawn = samples.draw((4, 3, 16, 16), torch.Generator().manual_seed(1))
    positives, negatives = samples.apply(high, low, drawn)
    assert len(positives) == 4
    assert len(negatives) == 3
    assert torch.equal(positives[0], high)
    torch.testing.assert_close(negatives[0], enlarged(low, (16, 16)))
    assert all(x.shape == high.shape for x in positives + negatives)
    for copy in positives[1:] + negatives[1:]:
        torch.testing.assert_close(copy * 255, (copy * 255).round())
    assert drawn.factors.min() >= 0.5
    assert drawn.factors.max() <= 3
    assert float((positives[-1] - high).std()) == pytest.approx(2 / 255, rel=0.2)
    mine = drawn.take(slice(1, None, 2))
    assert torch.equal(samples.apply(high[1::2], low[1::2], mine)[0][1], positives[1][1::2])


def test_pictures_below_a_blur_s_window_are_refused() -> None:
    samples = Samples(copies=3, kernels=(11,))
    drawn = samples.draw((1, 3, 5, 5), torch.Generator())
    with pytest.raises(CounterpointError, match="11 taps"):
        samples.apply(images(1, 3, 5, 5), images(1, 3, 5, 5), drawn)


def test_pairs_show_the_same_place_in_all_orientations() -> None:
    whole = images(64, 3, 13, 16)
    pairs = PatchPairs(scale=3, patch=6)
    drawn = pairs.draw(tuple(whole.shape), torch.Generator().manual_seed(0))
    low, high = pairs.apply(whole, drawn)
    assert low.shape == (64, 3, 2, 2)
    assert high.shape == (64, 3, 6, 6)
    assert drawn.turned.unique(dim=0).shape[0] == 8
    assert set(drawn.corners[:, 0].tolist()) == {0, 1, 2}
    small = downscaled(whole[..., :12, :15], 3)
    for number in range(8):
        (top, left), (mirror, upset, turn) = drawn.corners[number].tolist(), drawn.turned[number].tolist()
        for picture, found, unit in ((small, low, 1), (whole, high, 3)):
            cut = picture[number, :, top * unit : (top + 2) * unit, left * unit : (left + 2) * unit]
            cut = cut.flip(2) if mirror else cut
            cut = cut.flip(1) if upset else cut
            assert torch.equal(cut.transpose(1, 2) if turn else cut, found[number])
