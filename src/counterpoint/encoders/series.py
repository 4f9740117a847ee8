"""Build encoders of series and of columns of numbers, by name, with their standardisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.vectors import build_vector_encoder
from counterpoint.errors import unknown

SERIES = {"conv": (32, 64, 128), "conv-s": (16, 32)}


class Standardise(nn.Module):
    """Subtract a mean from each column (the last axis), and divide by a deviation.

    Args:
        mean: mean of each column.
        deviation: deviation of each column, > 0.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, x: Float[Tensor, "*n columns"]) -> Float[Tensor, "*n columns"]:
        return (x - self.mean) / self.deviation


class SeriesEncoder(nn.Module):
    """Convolutions of width 5 with batch normalisation, all but the first with stride 2; then mean and maximum over time.

    Args:
        length: number of steps, at least 1.
        channels: numbers of a step.
        widths: channels of each convolution.
    """

    def __init__(self, length: int, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.length, self.channels, self.dim = length, channels, 2 * widths[-1]
        self.layers = nn.Sequential()
        for number, (a, b) in enumerate(zip([channels, *widths], widths, strict=False)):
            self.layers.extend([nn.Conv1d(a, b, 5, 2 if number else 1, 2), nn.BatchNorm1d(b), nn.ReLU()])

    def forward(self, x: Float[Tensor, "n length channels"]) -> Float[Tensor, "n dim"]:
        maps = self.layers(x.transpose(1, 2))
        return torch.cat([maps.mean(2), maps.amax(2)], 1)


def check_series_encoder(name: str) -> None:
    """Raise CounterpointError, with near matches, for an unknown encoder of series."""
    if name not in SERIES:
        raise unknown("series encoder", name, SERIES)


class _Shaped(nn.Module):
    """Standardisation, and a network of series, on series [n, length, channels] or their numbers in one row."""

    def __init__(self, standardise: Standardise, network: SeriesEncoder) -> None:
        super().__init__()
        self.standardise, self.network, self.dim = standardise, network, network.dim

    def forward(self, x: Tensor) -> Float[Tensor, "n dim"]:
        return self.network(self.standardise(x.reshape(-1, self.network.length, self.network.channels)))


class _Columns(nn.Module):
    """Standardisation, and a network of columns."""

    def __init__(self, standardise: Standardise, network: nn.Module, dim: int) -> None:
        super().__init__()
        self.standardise, self.network, self.dim = standardise, network, dim

    def forward(self, x: Float[Tensor, "n columns"]) -> Float[Tensor, "n dim"]:
        found: Tensor = self.network(self.standardise(x))
        return found


def build_series_encoder(name: str, length: int, mean: Sequence[float], deviation: Sequence[float]) -> nn.Module:
    """Build an encoder of series, [n, length, channels] -> [n, dim], for channels of this mean and deviation.

    Raises CounterpointError for an unknown name.
    """
    check_series_encoder(name)
    return _Shaped(Standardise(mean, deviation), SeriesEncoder(length, len(mean), SERIES[name]))


def build_table_encoder(name: str, mean: Sequence[float], deviation: Sequence[float]) -> nn.Module:
    """Build an encoder of columns, [n, columns] -> [n, dim], by a name of `encoders.vectors`.

    Args:
        name: name of the network.
        mean, deviation: of each column.

    Raises CounterpointError for an unknown name.
    """
    network: Any = build_vector_encoder(name, len(mean))
    return _Columns(Standardise(mean, deviation), network, int(network.dim))
