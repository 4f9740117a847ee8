"""Pictures that several tests of views change."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def pictures():
    """Return noise, and the places where hue is hard: greys, black, white, pure and equal channels."""
    x = torch.rand(6, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    x[1] = x[1, :1]
    x[2, :, :8], x[2, :, 8:16] = 0.0, 1.0
    x[3] = x[3].round()
    x[4, 0] = x[4, 1]
    x[5, 2] = x[5, 1]
    return x
