"""Each change of a snippet of sheet music against a known result."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from made_music import generator, sheets, windows

from counterpoint.views.music import perlin, sheet, snippet


def test_without_anything_a_view_is_the_snippet():
    x = windows()
    one, two = sheets().pair(6, generator())
    for view in (one, two):
        torch.testing.assert_close(sheets().apply(x, view), x[:, :, 20:100, 10:110], atol=2e-4, rtol=0)
    torch.testing.assert_close(snippet(x), x[:, :, 20:100, 10:110])


def test_views_are_apart_as_the_recipe_says():
    views = sheets(shift=1.0)
    one, two = views.pair(4000, generator())
    apart = two.across - one.across
    torch.testing.assert_close(one.across, -two.across)
    assert apart.min() >= 0
    assert 19.5 < apart.max() <= 20
    assert abs(float(apart.mean()) - 10) < 0.3
    # Whole pixels move the picture by whole pixels.
    x = windows()
    moved = views.apply(
        x, replace(views.draw(6, generator()), across=torch.full((6,), 7.0), down=torch.full((6,), -4.0))
    )
    torch.testing.assert_close(moved, x[:, :, 16:96, 17:117], atol=2e-4, rtol=0)


def test_beyond_the_window_is_paper():
    x = torch.zeros(1, 1, 120, 120)  # all ink
    view = replace(sheets().draw(1, generator()), down=torch.tensor([30.0]))
    out = sheets().apply(x, view)
    torch.testing.assert_close(out[0, 0, :, 0], (torch.arange(80) >= 70).float(), atol=1e-4, rtol=0)


def test_scale_and_rotation_turn_about_the_centre():
    y, x = torch.meshgrid(torch.arange(120.0) - 59.5, torch.arange(120.0) - 59.5, indexing="ij")
    picture = (0.5 + 0.004 * x + 0.002 * y)[None, None]  # linear, which bilinear sampling reproduces
    angle, scale = 0.06, 1.1
    plain = sheets().draw(1, generator())
    out = sheets().apply(picture, replace(plain, angle=torch.tensor([angle]), scale=torch.tensor([scale])))
    v, u = torch.meshgrid(torch.arange(80.0) - 39.5, torch.arange(100.0) - 49.5, indexing="ij")
    at_x = (math.cos(angle) * u - math.sin(angle) * v) / scale
    at_y = (math.sin(angle) * u + math.cos(angle) * v) / scale
    torch.testing.assert_close(out[0, 0], 0.5 + 0.004 * at_x + 0.002 * at_y, atol=1e-5, rtol=0)


def test_perlin_noise_is_smooth_and_zero_at_the_corners_of_cells():
    turn = 2 * math.pi * torch.rand(3, 6, 7, generator=generator())
    gradients = torch.stack([turn.cos(), turn.sin()], 1)
    fine = perlin(gradients, cell=40, size=(200, 240))
    assert 0 <= fine.min() < 0.3
    assert 0.7 < fine.max() <= 1
    assert fine.diff(dim=1).abs().max() < 0.08
    assert fine.diff(dim=2).abs().max() < 0.08
    # At a corner, half a pixel away from the nearest ones, nothing is left but the middle value.
    for row, column in ((40, 80), (120, 40)):
        corner = fine[:, row - 1 : row + 1, column - 1 : column + 1].mean((1, 2))
        torch.testing.assert_close(corner, torch.full((3,), 0.5), atol=2e-3, rtol=0)
    with pytest.raises(ValueError, match="too few"):
        perlin(gradients, cell=40, size=(300, 240))


def test_stains_darken_noise_brightens_and_blur_keeps_the_sum():
    x = torch.full((8, 1, 120, 120), 0.6)
    stained = sheets(perlin=1.0).apply(x, sheets(perlin=1.0).draw(8, generator()))
    assert bool((stained <= 0.6 + 1e-6).all())
    assert bool((stained.mean((1, 2, 3)) < 0.6).all())
    recipe = {"noise": 1.0, "noise_mean": 0.2, "noise_deviation": 0.1}
    view = sheets(**recipe).draw(8, generator())
    noisy = sheets(**recipe).apply(x, view)
    torch.testing.assert_close(noisy.mean((1, 2, 3)) - 0.6, view.mean, atol=2e-3, rtol=0)
    torch.testing.assert_close(noisy.std((1, 2, 3)), view.deviation / 2, atol=2e-3, rtol=0.03)
    blurred = sheets(blur=1.0).apply(windows(8), sheets(blur=1.0).draw(8, generator()))
    assert float((blurred.mean() - snippet(windows(8)).mean()).abs()) < 2e-3
    assert blurred.var() < snippet(windows(8)).var()


def test_elastic_deformation_moves_points_a_little():
    _y, x = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    ramp = (x / 150)[None, None].expand(5, 1, 120, 120)
    out = sheets(large=1.0).apply(ramp, sheets(large=1.0).draw(5, generator()))
    moved = (out - snippet(ramp))[:, :, 8:72, 8:92] * 150  # pixels; the edges see paper
    assert 0.5 < moved.abs().max() < 4
    assert moved.diff(dim=3).abs().max() < 0.7


@pytest.mark.parametrize("step", [1, 8, 25, 100])
def test_the_curve_through_the_points_of_a_field_is_torch_s(step):
    rows, columns = (-(-extent // step) + 3 for extent in sheet.SHEET)
    field = torch.randn(2, 2, rows, columns, generator=generator())
    expected = F.interpolate(field, scale_factor=step, mode="bicubic")[:, :, step : step + 80, step : step + 100]
    down, across = (sheet._cubic(step, extent) for extent in sheet.SHEET)
    torch.testing.assert_close(down @ field @ across.T, expected, atol=1e-5, rtol=0)


def test_sheet_views_are_linear_interpolation_where_they_only_move():
    # A shift by half a pixel averages neighbours.
    x = windows(2)
    out = sheets().apply(x, replace(sheets().draw(2, generator()), across=torch.full((2,), 0.5)))
    expected = F.avg_pool2d(x[:, :, 20:100, 10:111], (1, 2), 1)
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=0)
