"""Transforms in parts are those of all images, in value and gradient."""

from __future__ import annotations

import torch

from counterpoint.core import spectra
from counterpoint.core.spectra import low_columns, with_columns_added


def test_parts_change_neither_values_nor_gradients(monkeypatch):
    images = torch.randn(5, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(5, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for part in (2**20, 1, 2 * images[0].numel()):  # all at a time, one by one, in twos with one left over
        monkeypatch.setattr(spectra, "PART", part)
        columns = low_columns(images, 2)
        made = with_columns_added(images, columns * columns.abs())
        found.append((columns, made, torch.autograd.grad((made * weight).sum(), images)[0]))
    torch.testing.assert_close(found[0][0], torch.fft.fft2(images)[..., :3])
    for others in found[1:]:
        for first, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(first, other, rtol=1e-12, atol=1e-12)


def test_the_images_themselves_are_not_changed():
    images = torch.ones(2, 1, 4, 4)
    with_columns_added(images, low_columns(images, 1))
    assert (images == 1).all()
