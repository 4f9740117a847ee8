"""The sound: key strokes, played strictly or with simulated expression, and a simulated recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.scores.notes import Score, packages

RATE = 22050
LEAD, TAIL = 0.5, 1.5  # seconds of sound before the first onset and after the last note

Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Strike:
    """A key stroke; times in seconds."""

    start: float
    stop: float
    pitch: int
    velocity: int  # of MIDI, 1 to 127
    voice: int


def play(strikes: Sequence[Strike], program: int = 0, cents: float = 0.0) -> Wave:
    """Synthesise key strokes with an instrument of the soundfont.

    Args:
        strikes: the key strokes.
        program: number of the instrument, 0 for the piano.
        cents: detuning in hundredths of a semitone.

    Returns a mono wave at RATE, from time zero to TAIL seconds after the last key is up.
    """
    import tinysoundfont

    synth = tinysoundfont.Synth(gain=-6, samplerate=RATE)
    font = synth.sfload(str(packages()[1]))
    for voice in range(4):  # one channel for each voice, because two voices may hold the same key
        synth.program_select(voice, font, 0, program)
        synth.set_tuning(voice, cents / 100)
    events = [(round(s.stop * RATE), 0, s.voice, s.pitch, 0) for s in strikes]
    events += [(round(s.start * RATE), 1, s.voice, s.pitch, s.velocity) for s in strikes]
    end = max(event[0] for event in events) + round(TAIL * RATE)
    now, out = 0, []
    for at, down, voice, pitch, velocity in [*sorted(events), (end, 2, 0, 0, 0)]:
        if at > now:
            out.append(np.frombuffer(synth.generate(at - now), np.float32).copy())
            now = at
        if down == 1:
            synth.noteon(voice, pitch, velocity)
        elif down == 0:
            synth.noteoff(voice, pitch)
    return np.concatenate(out).reshape(-1, 2).mean(1)


def strict(score: Score, rng: np.random.Generator) -> tuple[list[Strike], NDArray[np.float64]]:
    """Play every note exactly at its time, at a random tempo; return the key strokes and [onsets] in seconds."""
    beat = 60 / rng.uniform(88, 116)
    strikes = [
        Strike(LEAD + n.onset * beat, LEAD + (n.onset + n.length) * beat - 0.02, n.pitch, 80, n.voice)
        for n in score.notes
    ]
    return strikes, LEAD + score.onsets * beat


def expressive(score: Score, rng: np.random.Generator) -> tuple[list[Strike], NDArray[np.float64]]:
    """Play with simulated expression: tempo, loudness, touch and the hands' timing vary.

    Returns the key strokes and [onsets] in seconds. The onsets are those of the beat; each note is struck near it.
    """
    grid = np.arange(0, score.quarters + 0.125, 0.125)
    knots = np.arange(0, score.quarters + 4, 4)
    pace = np.exp(np.interp(grid, knots, rng.normal(0, 0.09, len(knots)))) * 60 / rng.uniform(72, 120)
    for start, stop in score.holds:
        pace[(grid >= start) & (grid < stop)] *= rng.uniform(1.05, 1.6)
    clock = LEAD + np.concatenate([[0], np.cumsum(pace[:-1] * 0.125)])

    swell = rng.normal(0, 9, len(knots))
    base, melody, legato = rng.uniform(62, 96), rng.uniform(0, 12), rng.uniform(0.75, 0.98)
    late = rng.normal(0, 0.012)  # the left hand
    strikes = []
    for n in score.notes:
        at = np.interp(n.onset, grid, clock)
        until = at + (np.interp(n.onset + n.length, grid, clock) - at) * legato * rng.uniform(0.9, 1.0)
        start = max(0.0, at + late * (n.voice >= 2) + float(np.clip(rng.normal(0, 0.010), -0.03, 0.03)))
        touch = base + melody * (n.voice == 0) + np.interp(n.onset, knots, swell) + rng.normal(0, 6)
        velocity = int(np.clip(round(touch), 25, 120))
        strikes.append(Strike(start, max(float(until), start + 0.05), n.pitch, velocity, n.voice))
    return strikes, np.interp(score.onsets, grid, clock)


def recorded(wave: Wave, rng: np.random.Generator) -> Wave:
    """Simulate the recording of a wave in a room: reverberation, noise and a narrow band. The length stays the same."""
    from scipy.signal import butter, fftconvolve, sosfilt

    # The room: noise that decays by 60 dB in `decay` seconds.
    decay = rng.uniform(0.25, 1.2)
    time = np.arange(round(decay * RATE)) / RATE
    room = rng.standard_normal(len(time)) * np.exp(-6.9 * time / decay)
    room *= 10 ** (rng.uniform(-16, -5) / 20) / np.sqrt((room**2).sum())
    room[0] = 1
    out = fftconvolve(wave, room)[: len(wave)]
    # Noise between white and brown: its power is the frequency to the power of -`tilt`.
    spectrum = np.fft.rfft(rng.standard_normal(len(out)))
    tilt = rng.uniform(0, 1.3)
    spectrum *= np.maximum(np.arange(len(spectrum)), len(spectrum) / 500) ** (-tilt / 2)
    noise = np.fft.irfft(spectrum, len(out))
    level = np.sqrt((out**2).mean()) * 10 ** (-rng.uniform(14, 36) / 20)
    out = out + noise * level / noise.std()
    band = [rng.uniform(50, 160), rng.uniform(3500, 9500)]
    return np.asarray(sosfilt(butter(2, band, "bandpass", fs=RATE, output="sos"), out), np.float32)


def int16(wave: Wave, peak: float) -> NDArray[np.int16]:
    return np.rint(wave * (peak * 32767 / max(float(np.abs(wave).max()), 1e-9))).astype(np.int16)
