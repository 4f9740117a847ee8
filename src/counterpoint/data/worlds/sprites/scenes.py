"""Scenes: the events, and when each is seen and heard. A scene depends only on a seed, and is the same on every machine.

A scene lasts 16 to 32 s, at 24 frames per second. It has a landscape, sprites that roam it, and *events*, each a burst of 2 to
5 s. Explosions, hits, hurts and lasers are violent; coins, jumps, upgrades and music are not. Half of the events sound 1 to 5
snippets after they are seen. Some are only heard or only seen. Every violent scene has one violent event that is both seen and
heard. Every scene also holds confusers, Poisson(0.5) of them: sounds alone or sights alone that resemble violence but are not
violent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERSION = 1  # of the scenes and the drawing: increase it with every change to either, or stale caches are read
FPS = 24
FRAMES = 16  # a snippet
SNIPPET = FRAMES / FPS  # seconds
WIDTH, HEIGHT = 320, 180  # the units of a scene
RATE = 16000

VIOLENT = ("explosion", "hit", "hurt", "laser")
HARMLESS = ("coin", "jump", "upgrade", "music")
LOUD = ("error", "fall", "lose", "gameover")  # confusers for the ear
BRIGHT = ("meteors", "torch", "flash")  # confusers for the eye
BEATS = {  # seconds between the beats of an event: least, greatest
    "explosion": (0.45, 0.9),
    "hit": (0.3, 0.6),
    "hurt": (0.35, 0.7),
    "laser": (0.22, 0.5),
    "coin": (0.3, 0.6),
    "jump": (0.5, 0.9),
    "upgrade": (0.7, 1.2),
    "music": (0.18, 0.3),
    "error": (0.3, 0.7),
    "fall": (0.6, 1.0),
    "lose": (0.8, 1.2),
    "gameover": (1.0, 1.4),
    "meteors": (0.4, 0.9),
    "torch": (0.5, 0.9),
    "flash": (0.5, 1.2),
}


@dataclass(frozen=True)
class Event:
    """An event: the windows, in seconds, in which it is seen and heard; None for never."""

    kind: str
    violent: bool
    visible: tuple[float, float] | None
    audible: tuple[float, float] | None
    beats: tuple[float, ...]  # seconds after the start of either window: the times of a blast, a shot, a coin
    seed: int  # of places, sprites and sounds

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Scene:
    """The truth of a scene."""

    name: str
    label: int  # 1: a violent event happens
    snippets: int
    events: tuple[Event, ...]
    seed: int  # of the landscape and of the roaming sprites
    gain: float
    noise: float  # standard deviation of the sound's noise floor

    @property
    def duration(self) -> float:
        """Duration in seconds."""
        return self.snippets * SNIPPET


def scene(seed: Sequence[int], name: str = "") -> Scene:
    """Draw a scene.

    Args:
        seed: whole numbers from 0. Equal numbers give equal scenes.
        name: name of the scene; it has no other effect.
    """
    rng = np.random.default_rng(list(seed))
    snippets = int(rng.integers(24, 49))
    length = snippets * SNIPPET
    label = int(rng.random() < 0.5)
    events = [_event(rng, str(rng.choice(HARMLESS)), length) for _ in range(rng.integers(1, 4))]
    events += [_confuser(rng, length) for _ in range(rng.poisson(0.5))]
    if label:
        kinds = [str(rng.choice(VIOLENT)) for _ in range(rng.integers(1, 3))]
        # The first is both seen and heard, so that the label never rests on one modality alone.
        events += [_event(rng, kind, length, both=number == 0) for number, kind in enumerate(kinds)]
    return Scene(
        name=name,
        label=label,
        snippets=snippets,
        events=tuple(events),
        seed=int(rng.integers(2**31)),
        gain=float(rng.uniform(0.5, 1.0)),
        noise=float(10 ** rng.uniform(-3.3, -2.0)),
    )


def _event(rng: np.random.Generator, kind: str, length: float, *, both: bool = False) -> Event:
    span = rng.uniform(2.0, 5.0)
    lag = SNIPPET * rng.uniform(1, 5) if rng.random() < 0.5 else 0.0
    start = rng.uniform(0.0, length - span - (lag if both else 0.0))
    seen, heard = (start, start + span), (start + lag, min(start + lag + span, length))
    missing = "none" if both else str(rng.choice(["none", "sight", "sound"], p=[0.7, 0.15, 0.15]))
    if kind == "music":
        missing = "sight"
    visible = None if missing == "sight" else seen
    audible = None if missing == "sound" or heard[0] > length - 0.5 else heard
    if visible is None and audible is None:
        audible = (start, start + span)
    return Event(kind, kind in VIOLENT, visible, audible, _beats(rng, kind, span), int(rng.integers(2**31)))


def _confuser(rng: np.random.Generator, length: float) -> Event:
    span = rng.uniform(2.0, 4.0)
    start = rng.uniform(0.0, length - span)
    window = (start, start + span)
    if rng.random() < 0.5:
        kind = str(rng.choice(LOUD))
        return Event(kind, False, None, window, _beats(rng, kind, span), int(rng.integers(2**31)))
    kind = str(rng.choice(BRIGHT))
    return Event(kind, False, window, None, _beats(rng, kind, span), int(rng.integers(2**31)))


def _beats(rng: np.random.Generator, kind: str, span: float) -> tuple[float, ...]:
    """Draw the times of the beats in seconds; at least 0.7 s remain after the last one for its effect."""
    beats: list[float] = []
    at = 0.0
    while not beats or at < span - 0.7:
        beats.append(round(at, 3))
        at += rng.uniform(*BEATS[kind])
    return tuple(beats)


def spans(scene: Scene) -> list[tuple[float, float]]:
    """Return the windows, in seconds, in which violence is seen or heard: their union, in order."""
    windows = sorted(w for e in scene.events if e.violent for w in (e.visible, e.audible) if w is not None)
    merged: list[tuple[float, float]] = []
    for start, end in windows:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def truth(scene: Scene) -> NDArray[np.int8]:
    """Mark violent frames: [snippets * 16], 1 for frames whose middle lies in one of the `spans`."""
    middle = (np.arange(scene.snippets * FRAMES) + 0.5) / FPS
    out = np.zeros(len(middle), np.int8)
    for start, end in spans(scene):
        out[(middle >= start) & (middle < end)] = 1
    return out
