"""A world of sound events in time: short motifs with invented names, one or several in a scene, rendered as waves.

A motif is a kind of sound, distinct from the others: three gliding tones under one envelope, and a share of noise. Each of its
events has a length, a pitch and a level of its own. The names are imitations of sounds, such as "clang" or "whoom".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

ONSETS = ("b", "cl", "d", "f", "k", "p", "r", "t", "wh", "z")
ENDS = ("ang", "eep", "ick", "ock", "oom", "uzz")
NAMES = tuple(onset + end for onset, end in product(ONSETS, ENDS))
LOWEST, HIGHEST = 200.0, 3200.0  # hertz of a tone's ends
TONES, KNOTS = 3, 6


@dataclass(frozen=True)
class Motif:
    """The kind of a sound: hertz of its tones at both ends, their levels, an envelope, and the share of noise."""

    starts: tuple[float, ...]
    ends: tuple[float, ...]
    levels: tuple[float, ...]
    envelope: tuple[float, ...]
    noise: float


@dataclass(frozen=True)
class Event:
    """One sound of a scene: its motif, where it begins and how long it lasts in seconds, its pitch and its level."""

    kind: int
    onset: float
    seconds: float
    pitch: float
    level: float


Scene = tuple[Event, ...]


def motifs(rng: np.random.Generator, count: int) -> list[Motif]:
    """Draw the motifs of a world, at most as many as there are names."""

    def numbers(low: float, high: float, many: int) -> tuple[float, ...]:
        return tuple(map(float, rng.uniform(low, high, many)))

    def hertz() -> tuple[float, ...]:
        return tuple(LOWEST * (HIGHEST / LOWEST) ** share for share in numbers(0, 1, TONES))

    return [
        Motif(hertz(), hertz(), numbers(0.3, 1.0, TONES), numbers(0.1, 1.0, KNOTS), numbers(0.0, 0.3, 1)[0])
        for _ in range(count)
    ]


def event(rng: np.random.Generator, kind: int, seconds: tuple[float, float], onset: float = 0.0) -> Event:
    """Draw an event of a kind: its length within `seconds`, a pitch within 5 % of the motif's, a level of 0.4 to 0.9."""
    return Event(
        kind, onset, float(rng.uniform(*seconds)), float(rng.uniform(0.95, 1.05)), float(rng.uniform(0.4, 0.9))
    )


def scene(rng: np.random.Generator, kinds: Sequence[int], seconds: tuple[float, float]) -> Scene:
    """Draw events of these kinds, one after another without a gap."""
    found = list[Event]()
    for kind in kinds:
        found.append(event(rng, kind, seconds, found[-1].onset + found[-1].seconds if found else 0.0))
    return tuple(found)


def render(
    rng: np.random.Generator, truth: Scene, world: Sequence[Motif], rate: int, samples: int, noise: float = 0.0
) -> Float[np.ndarray, " samples"]:
    """Render a scene as a wave in [-1, 1], zeros where nothing sounds.

    Args:
        rng: the source of the noise.
        truth: its events.
        world: the motifs, by kind.
        rate: samples per second.
        samples: length of the wave; what lies behind it is cut off.
        noise: standard deviation of noise in every event, beside the motif's own, against a level of 1.
    """
    wave = np.zeros(samples)
    for one in truth:
        start = min(samples, round(one.onset * rate))
        sound = _sound(rng, one, world[one.kind], rate, noise)[: samples - start]
        wave[start : start + len(sound)] += sound
    return (wave / max(1.0, float(np.abs(wave).max(initial=0.0)))).astype(np.float32)


def _sound(rng: np.random.Generator, one: Event, motif: Motif, rate: int, noise: float) -> NDArray[np.float64]:
    count = max(1, round(one.seconds * rate))
    share = np.linspace(0, 1, count)
    wave = np.zeros(count)
    for start, end, level in zip(motif.starts, motif.ends, motif.levels, strict=True):
        hertz = one.pitch * start * (end / start) ** share
        wave += level * np.sin(2 * np.pi * (np.cumsum(hertz) / rate + rng.uniform()))
    wave = wave / TONES + motif.noise * rng.standard_normal(count) / 3
    wave *= np.interp(share, np.linspace(0, 1, KNOTS), motif.envelope)
    edge = np.minimum(1.0, np.minimum(np.arange(count), np.arange(count)[::-1]) / (0.005 * rate))  # 5 ms against clicks
    return one.level * edge * (wave + noise * rng.standard_normal(count))
