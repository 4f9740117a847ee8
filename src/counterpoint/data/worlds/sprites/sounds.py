"""The sound of a scene: effects of the package `arcade`, and music that is synthesised."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.worlds.sprites.artwork import sound
from counterpoint.data.worlds.sprites.scenes import RATE, Scene

_VOICES = {
    "explosion": ("explosion1", "explosion2"),
    "hit": ("hit1", "hit2", "hit3", "hit4", "hit5"),
    "hurt": ("hurt1", "hurt2", "hurt3", "hurt4", "hurt5"),
    "laser": ("laser1", "laser2", "laser3", "laser4", "laser5"),
    "coin": ("coin1", "coin2", "coin3", "coin4", "coin5"),
    "jump": ("jump1", "jump2", "jump3", "jump4", "jump5"),
    "upgrade": ("upgrade1", "upgrade2", "upgrade3", "upgrade4", "upgrade5"),
    "error": ("error1", "error2", "error3", "error4", "error5"),
    "fall": ("fall1", "fall2", "fall3", "fall4"),
    "lose": ("lose1", "lose2", "lose3", "lose4", "lose5"),
    "gameover": ("gameover1", "gameover2", "gameover3", "gameover4", "gameover5"),
}
_SCALE = (0, 2, 4, 7, 9, 12)


def render_audio(scene: Scene) -> NDArray[np.float32]:
    """Render the scene's sound, mono at 16 kHz in (-1, 1): [snippets * 16 / 24 * 16000]."""
    wave = np.zeros(round(scene.duration * RATE), np.float32)
    for event in scene.events:
        if event.audible is None:
            continue
        rng = event.rng()
        start, end = event.audible
        stop = min(len(wave), round(end * RATE))  # the sound ends with the window in the truth
        gain = rng.uniform(0.2, 0.6)
        chosen = rng.choice(_VOICES[event.kind], 2) if event.kind in _VOICES else None
        root = 110 * 2 ** (rng.integers(0, 12) / 12)
        for beat in event.beats:
            at = round((start + beat) * RATE)
            if chosen is None:
                part = _note(root * 2 ** (rng.choice(_SCALE) / 12), 0.4)
            else:
                part = sound(str(rng.choice(chosen)), int(rng.choice([-12, -6, 0, 6, 12])))
            part = part[: max(0, stop - at)]
            wave[at : at + len(part)] += np.float32(gain) * part
    noise = np.random.default_rng(scene.seed).standard_normal(len(wave)).astype(np.float32)
    wave = scene.gain * wave + scene.noise * noise
    loudest = float(np.abs(wave).max())
    return (wave * min(1.0, 0.98 / loudest)).astype(np.float32)


def _note(hertz: float, seconds: float) -> NDArray[np.float32]:
    """Synthesise a plucked tone."""
    t = np.arange(round(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * hertz * t) + 0.4 * np.sin(4 * np.pi * hertz * t) + 0.2 * np.sin(6 * np.pi * hertz * t)
    return (0.5 * tone * np.exp(-6 * t) * np.minimum(1, t / 0.01)).astype(np.float32)
