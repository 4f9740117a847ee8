"""The promises of a pipeline: draws, recipes, the same views for the same generator, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

from counterpoint.errors import CounterpointError
from counterpoint.views import images as views
from counterpoint.views.images import Recipe, ViewPipeline


@pytest.mark.parametrize("recipe", sorted(views.RECIPES))
@pytest.mark.parametrize("batch", [1, 3, 130])
def test_every_recipe_makes_views_of_every_batch(recipe, batch):
    x = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pipeline = ViewPipeline(24, 2, recipe, local_crops=2, mean=None, std=None)
    made = pipeline(x, torch.Generator().manual_seed(3))
    assert [v.shape for v in made] == [(batch, 3, 24, 24)] * 2 + [(batch, 3, 10, 10)] * 2
    noisy = any(r.noise or r.gain for r in pipeline.recipes[:2])
    assert all(torch.isfinite(v).all() for v in made)
    assert noisy or all(v.min() >= -1e-6 and v.max() <= 1 + 1e-6 for v in made)
    again = pipeline(x, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    if recipe != "none":
        other = pipeline(x, torch.Generator().manual_seed(4))
        assert not torch.equal(made[0], other[0])
        assert batch == 1 or not torch.equal(made[0], made[1])


def test_gain_noise_and_cut_are_drawn_for_every_image():
    x = torch.full((400, 3, 8, 8), 128, dtype=torch.uint8)
    plain = views.Recipe(scale=None, flip=0.0)

    def made(**changes):
        pipeline = ViewPipeline(8, 1, [replace(plain, **changes)], mean=None, std=None)
        drawn = pipeline.draw(x.shape, torch.Generator().manual_seed(0))
        (whole,) = pipeline.apply(x, drawn)
        (share,) = pipeline.apply(x[1::2], [view.take(slice(1, None, 2)) for view in drawn])
        assert torch.equal(whole[1::2], share)
        return whole / (128 / 255)

    gain = made(gain=0.2)[:, 0, 0, 0]
    assert 0.8 <= gain.min() < 0.82
    assert 1.18 < gain.max() <= 1.2
    noise = made(noise=0.1) - 1
    assert noise.std() * (128 / 255) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noise[:, 0], noise[:, 2])
    black = (made(cut=3, cut_chance=0.5) == 0)[:, 0].sum((1, 2))
    assert set(black.tolist()) == {0, 9}
    assert 150 < int((black == 9).sum()) < 250


def test_none_changes_nothing_but_the_scale():
    x = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    (plain,) = ViewPipeline(32, 1, "none", mean=None, std=None)(x, torch.Generator())
    assert torch.equal(plain, x / 255)
    (normal,) = ViewPipeline(32, 1, "none")(x, torch.Generator())
    torch.testing.assert_close(normal, TF.normalize(x / 255, list(views.MEAN), list(views.STD)))
    assert torch.equal(normal, views.normalise(x))
    torch.testing.assert_close(ViewPipeline(32, 1, "none")(x / 255, torch.Generator())[0], normal)


def test_parameters_are_per_image_and_follow_their_probabilities():
    generator = torch.Generator().manual_seed(0)
    one, two = ViewPipeline(32, 2, "byol").draw((8000, 3, 32, 32), generator)
    assert len(one.jitter.unique(dim=0)) > 6000
    for view, blur, solarise in ((one, 1.0, 0.0), (two, 0.1, 0.2)):
        for found, wanted in (
            ((view.jitter != torch.tensor([1.0, 1, 1, 0])).any(1), 0.8),
            (view.flip, 0.5),
            (view.grey, 0.2),
            (view.sigma > 0, blur),
            (view.solarise, solarise),
        ):
            assert found.float().mean().item() == pytest.approx(wanted, abs=0.02)
    changed = one.jitter[(one.jitter != torch.tensor([1.0, 1, 1, 0])).any(1)]
    low, high = changed.amin(0), changed.amax(0)
    torch.testing.assert_close(low, torch.tensor([0.6, 0.6, 0.8, -0.1]), atol=0.01, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.4, 1.4, 1.2, 0.1]), atol=0.01, rtol=0)
    assert one.sigma.min() >= 0.1
    assert one.sigma.max() <= 2.0
    pipeline = ViewPipeline(32, 1, "byol")
    assert len({pipeline.draw((2, 3, 32, 32), generator)[0].order for _ in range(200)}) > 20  # of 24


def test_a_view_is_what_its_parameters_say():
    # One image's view, made operation by operation with torchvision, whatever stands beside it in the batch.
    x = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    pipeline = ViewPipeline(28, 2, "byol", kernel=5)
    parameters = pipeline.draw(x.shape, torch.Generator().manual_seed(6))
    made = pipeline.apply(x, parameters)
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for view, p in zip(made, parameters, strict=True):
        for i in (0, 13, 63, 64, 69):
            top, left, height, width = p.boxes[i].tolist()
            y = TF.resized_crop(
                x[i] / 255, top, left, height, width, [28, 28], InterpolationMode.BILINEAR, antialias=False
            )
            y = TF.horizontal_flip(y) if p.flip[i] else y
            for step in p.order:
                y = steps[step](y, float(p.jitter[i, step]))
            y = TF.rgb_to_grayscale(y, 3) if p.grey[i] else y
            y = TF.gaussian_blur(y, 5, float(p.sigma[i])) if p.sigma[i] > 0 else y
            # Around the threshold rounding decides; leave those pixels out.
            sure = (y - 0.5).abs() > 1e-3
            y = TF.solarize(y, 0.5) if p.solarise[i] else y
            y = TF.normalize(y, list(views.MEAN), list(views.STD))
            torch.testing.assert_close(view[i][sure], y[sure], atol=5e-4, rtol=0)


def test_a_share_of_a_batch_gets_the_views_the_whole_would_give_it():
    x = torch.randint(0, 256, (150, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    pipeline = ViewPipeline(32, 2, "byol", local_crops=1)
    parameters = pipeline.draw(x.shape, torch.Generator().manual_seed(6))
    whole = pipeline.apply(x, parameters)
    for which in (slice(1, None, 2), torch.tensor([149, 3, 80])):
        part = pipeline.apply(x[which], [p.take(which) for p in parameters])
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a, b[which], atol=1e-5, rtol=0)
    with pytest.raises(CounterpointError, match="150 images were drawn, got 3 images"):
        pipeline.apply(x[:3], parameters)


def test_weak_moves_by_an_eighth_at_most():
    x = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    pipeline = ViewPipeline(32, 1, "weak", mean=None, std=None)
    (p,) = pipeline.draw(x.shape, torch.Generator().manual_seed(0))
    assert set(p.boxes[:, 0].tolist()) == set(range(-4, 5))
    (made,) = pipeline.apply(x, [p])
    lost = 1 - made.mean((1, 2, 3))
    gone = 1 - (32 - p.boxes[:, 0].abs()) * (32 - p.boxes[:, 1].abs()) / 32**2
    torch.testing.assert_close(lost, gone, atol=1e-4, rtol=0)


def test_float64_stays_float64():
    (made,) = ViewPipeline(16, 1, "simclr")(torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.Generator())
    assert made.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ViewPipeline(32, recipe="simclr-cifr"), "did you mean simclr-cifar"),
        (lambda: ViewPipeline(32, crops=0), "crops=0"),
        (lambda: ViewPipeline(32, recipe=[]), "at least one Recipe"),
        (lambda: ViewPipeline(32, mean=None), "belong together"),
        (lambda: Recipe(flip=1.5), "flip"),
        (lambda: Recipe(scale=(0.0, 1.0)), "scale"),
        (lambda: Recipe(hue=0.7), "hue"),
        (lambda: Recipe(sigma=(2.0, 1.0)), "sigma"),
        (lambda: ViewPipeline(8)(torch.zeros(0, 3, 8, 8), torch.Generator()), "batch"),
        (lambda: ViewPipeline(8)(torch.zeros(2, 8, 8, 3), torch.Generator()), "batch"),
        (lambda: ViewPipeline(8)(torch.zeros(2, 3, 8, 8, dtype=torch.int64), torch.Generator()), "uint8"),
        (lambda: views.gaussian_blur(torch.zeros(1, 3, 8, 8), torch.ones(1), 4), "odd"),
        (lambda: views.gaussian_blur(torch.zeros(1, 3, 8, 8), torch.ones(1), 17), "17 taps"),
    ],
)
def test_recipes_and_inputs_out_of_range_raise_an_error(make, says):
    with pytest.raises(CounterpointError, match=says):
        make()
