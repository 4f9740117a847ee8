"""Compose clips of two sounds: one after the other, or both at once.

A batch of sounds is [n, samples], mono in [-1, 1]. Silence before and after a sound is left out: samples at 1 % of its peak
or below. A clip has as many samples as a sound; zeros follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

QUIET = 0.01  # of the peak


class Sounds(NamedTuple):
    """Sounds, where each begins to sound, and for how many samples."""

    waves: Float[Tensor, "n samples"]
    start: Int[Tensor, " n"]
    length: Int[Tensor, " n"]

    def at(self, index: Int[Tensor, " m"] | slice) -> Sounds:
        """Take some of the sounds."""
        return Sounds(*(part[index] for part in self))


def sounding(waves: Float[Tensor, "n samples"]) -> Sounds:
    """Find the silence before and after each sound. A silent one begins at 0 and lasts 0.

    >>> sounding(torch.tensor([[0.0, 0.5, 0.0, 1.0, 0.001], [0.0, 0.0, 0.0, 0.0, 0.0]]))[1:]
    (tensor([1, 0]), tensor([3, 0]))
    """
    level = waves.abs()
    loud = level > (QUIET * level.amax(1, keepdim=True))
    first = loud.byte().argmax(1)
    last = waves.shape[1] - loud.flip(1).byte().argmax(1)
    return Sounds(waves, first, torch.where(loud.any(1), last - first, 0))


def in_a_row(first: Sounds, second: Sounds) -> Float[Tensor, "n samples"]:
    """Concatenate sounds without their silence. Of a sound that is longer than half of the clip, the beginning is kept.

    >>> one, other = sounding(torch.tensor([[0.0, 1.0, 0.0, 0.0]])), sounding(torch.tensor([[0.5, 0.5, 0.5, 0.0]]))
    >>> in_a_row(one, other)
    tensor([[1.0000, 0.5000, 0.5000, 0.0000]])
    """
    half = first.waves.shape[1] // 2
    one, other = (sounds._replace(length=sounds.length.clamp(max=half)) for sounds in (first, second))
    return _moved(one, 0 * one.length) + _moved(other, one.length)


def at_once(first: Sounds, second: Sounds) -> Float[Tensor, "n samples"]:
    """Add sounds without their silence, both from the beginning of the clip. Sums over 1 are scaled down to 1.

    >>> at_once(sounding(torch.tensor([[0.0, 1.0, 0.0]])), sounding(torch.tensor([[1.0, 0.5, 0.0]])))
    tensor([[1.0000, 0.2500, 0.0000]])
    """
    mixed = sum((_moved(sounds, 0 * sounds.length) for sounds in (first, second)), torch.zeros_like(first.waves))
    return mixed / mixed.abs().amax(1, keepdim=True).clamp(min=1)


def _moved(sounds: Sounds, to: Int[Tensor, " n"]) -> Float[Tensor, "n samples"]:
    """Move the sounding part of each sound to a place; zeros elsewhere."""
    waves, start, length = sounds
    numbers = torch.arange(waves.shape[1], device=waves.device, dtype=torch.int32)
    at = numbers - to[:, None].int()
    inside = (at >= 0) & (at < length[:, None])
    from_ = (numbers + (start - to)[:, None]).clamp_(0, waves.shape[1] - 1)
    return waves.gather(1, from_) * inside


def other_kind(kinds: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, " n"]:
    """Draw for each item a partner of another kind, uniformly among all such items; memory is linear in n.

    Args:
        kinds: number of each item's kind; on the CPU, as the generator.
        generator: the source of randomness.

    Returns [n] positions. Raises ValueError where all items are of one kind.

    >>> other_kind(torch.tensor([3, 3, 8]), torch.Generator().manual_seed(0)).tolist()[:2]
    [2, 2]
    """
    n = len(kinds)
    order = kinds.argsort(stable=True)
    _, inverse, counts = kinds.unique(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise ValueError(f"kinds: all {n} items are of one kind, and none has a partner of another")
    start, own = (counts.cumsum(0) - counts)[inverse], counts[inverse]
    drawn = (torch.rand(n, generator=generator, dtype=torch.float64) * (n - own)).long()
    return order[torch.where(drawn < start, drawn, drawn + own)]
