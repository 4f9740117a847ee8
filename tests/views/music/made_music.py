"""Windows, tones, and views with all variations off."""

from __future__ import annotations

import math

import torch

from counterpoint.views.music import HOP, RATE, AudioRecipe, AudioViews, SheetRecipe, SheetViews

STILL = {"rescale": 0.0, "shift": 0.0, "vertical": 0.0, "rotate": 0.0, "perlin": 0.0}
STILL |= {"small": 0.0, "large": 0.0, "noise": 0.0, "blur": 0.0}
QUIET = {"shift": 0.0, "polarity": 0.0, "gain": 0.0, "noise": 0.0, "mask": 0.0, "equalise": 0.0}
QUIET |= {"stretch": 0.0, "frequency_mask": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def windows(n: int = 6) -> torch.Tensor:
    """Draw a dark cross off the centre, and dots, on white."""
    x = (torch.rand(n, 1, 120, 120, generator=generator(9)) > 0.05).float()
    x[:, :, 50:53] = 0
    x[:, :, :, 70:72] = 0
    return x


def sheets(**changes) -> SheetViews:
    return SheetViews(SheetRecipe(**(STILL | changes)))


def sounds(frames: int = 20, **changes) -> AudioViews:
    return AudioViews(frames, AudioRecipe(**(QUIET | changes)))


def tones(hertz: list[float], samples: int = 40 * HOP) -> torch.Tensor:
    at = torch.arange(samples, dtype=torch.float64) / RATE
    return torch.stack([0.5 * torch.sin(2 * math.pi * f * at) for f in hertz]).float()
