"""Make the clips that `pretrain_detector.py` trains and measures with: arcade scenes, alone or over photographs, and calm clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint import encoders
from counterpoint.data import arcade
from counterpoint.data.media import sample_times
from counterpoint.data.worlds.sprites.drawing import Drawing
from counterpoint.data.worlds.sprites.scenes import FPS, FRAMES, HEIGHT, RATE, SNIPPET, WIDTH, Scene, scene, truth
from counterpoint.data.worlds.sprites.sounds import render_audio

VOICES = (
    ("en-us", "en-us+f2", "en-gb-scotland", "en-gb-scotland+m5", "de+f2", "de+m7", "it+m3", "es+f4", "sv+f5", "nl"),
    ("fr+f3", "pl+m1"),
)
WORDS = (
    "Good evening and welcome to the programme.",
    "The train to the coast leaves from platform four.",
    "Please close the door and take a seat at the table.",
    "Yesterday the weather was warm, but rain is expected tomorrow.",
    "Could you tell me where the nearest station is?",
    "We planted three apple trees in the garden last spring.",
)
COUNTS = {"train": (200, 350, 350), "valid": (30, 60, 60), "test": (100, 100, 60)}  # arcade, over photographs, calm
SEED = 2026


class Filmed(Drawing):
    """A scene whose landscape is a part of photographs, under a camera that pans, zooms, shakes and cuts."""

    def __init__(self, drawn: Scene, photographs: Sequence[Image.Image], *, calm: bool) -> None:
        super().__init__(drawn)
        rng = np.random.default_rng([SEED, drawn.seed])
        cuts = [0.0, *np.sort(rng.uniform(1, drawn.duration, rng.poisson(drawn.duration / 9)))]
        self.shots = []
        for at in cuts:
            picture = photographs[rng.integers(len(photographs))]
            if rng.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            gains = rng.uniform(0.5, 1.3) * rng.uniform(0.8, 1.2, 3)
            levels = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.5)
            tables = [min(255, round(float(level * gain))) for gain in gains for level in levels]
            self.shots.append((float(at), picture, tables, *rng.uniform(0, 1, 6)))
        self.shake = float(rng.exponential(0.006))
        if calm and rng.random() < 0.7:
            self.roamers = []

    def draw(self, time: float) -> NDArray[np.uint8]:
        at, picture, tables, x, y, dx, dy, zoom, rate = max((s for s in self.shots if s[0] <= time), key=lambda s: s[0])
        t = (time - at) / 12
        size = (0.35 + 0.5 * zoom) * (1 + 0.3 * (rate - 0.5) * t)
        wide = min(picture.width, picture.height * WIDTH / HEIGHT) * min(1.0, size)
        high = wide * HEIGHT / WIDTH
        shake = self.shake * picture.width * np.sin([7.1 * time, 9.7 * time + 1])
        left = np.clip((x + (dx - 0.5) * t) * (picture.width - wide) + shake[0], 0, picture.width - wide)
        top = np.clip((y + (dy - 0.5) * t) * (picture.height - high) + shake[1], 0, picture.height - high)
        box = (float(left), float(top), float(left + wide), float(top + high))
        self.base = picture.resize(self.size, Image.Resampling.BILINEAR, box=box).point(tables).convert("RGBA")
        return super().draw(time)


# --- sound ------------------------------------------------------------------------------------------------------------


def speech(voices: Sequence[str]) -> list[NDArray[np.float32]]:
    """Speak every sentence in every voice: waves at 16 kHz in [-1, 1]."""
    from counterpoint.data.espeak import sounds_of

    jobs = [(voice, 150, 50, text) for voice in voices for text in WORDS]
    sounds, _ = sounds_of(jobs, 5 * RATE, RATE)
    return [wave.astype(np.float32) / 32768 for wave in sounds]


def bed(rng: np.random.Generator, length: int, spoken: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Make calm sound: speech, chords, coloured noise, or silence, and sums of them."""
    wave = np.zeros(length, np.float32)
    kinds = rng.random(3) < (0.5, 0.35, 0.6)
    if kinds[0]:
        at = 0
        while at < length:
            part = spoken[rng.integers(len(spoken))][: length - at]
            wave[at : at + len(part)] += part * rng.uniform(0.3, 0.9)
            at += len(part) + round(rng.uniform(0.1, 2.0) * RATE)
    if kinds[1]:
        beat = round(rng.uniform(0.3, 1.2) * RATE)
        t = np.arange(beat) / RATE
        for at in range(0, length, beat):
            tones = 110 * 2 ** (rng.choice((0, 3, 5, 7, 10, 12, 15, 19), 3) / 12)
            part = sum(np.sin(2 * np.pi * tone * t) for tone in tones) * np.exp(-rng.uniform(1, 6) * t) / 6
            wave[at : at + beat] += part[: length - at].astype(np.float32)
    if kinds[2]:
        white = np.fft.rfft(rng.standard_normal(length))
        slope = rng.uniform(0, 2)  # from white noise to a rumble
        shaped = np.fft.irfft(white / np.maximum(1, np.arange(len(white))) ** (slope / 2), length)
        swell = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.05, 0.5) * np.arange(length) / RATE)
        wave += (shaped / np.abs(shaped).max() * swell * 10 ** rng.uniform(-2.5, -0.7)).astype(np.float32)
    return wave


def loudness(rng: np.random.Generator, wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale a wave to a random level of at most full scale."""
    top = float(np.abs(wave).max())
    return wave * np.float32(10 ** rng.uniform(-0.9, 0) * min(1.0, 0.98 / top) if top else 1.0)


def recorded(extra: Path) -> dict[str, NDArray[np.float32]]:
    """Read the recordings of pygame's examples at 16 kHz."""
    import av

    found = {}
    for name in ("boom", "punch", "car_door", "whiff", "house_lo"):
        sampler = av.AudioResampler(format="fltp", layout="mono", rate=RATE)
        with av.open(str(extra / "pygame/examples/data" / f"{name}.wav")) as file:
            parts = [out.to_ndarray()[0] for frame in file.decode(audio=0) for out in sampler.resample(frame)]
            parts += [out.to_ndarray()[0] for out in sampler.resample(None)]
        found[name] = np.concatenate(parts)
    return found


# --- clips ------------------------------------------------------------------------------------------------------------

Made = tuple[str, int, NDArray[np.float32], NDArray[np.float32], NDArray[np.int8]]


def rows(drawing: Drawing, wave: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the feature rows of a drawn clip and its sound."""
    eye, ear = encoders.build_visual({"name": "light"}), encoders.build_audio({"name": "logmel"})
    snippets = drawing.scene.snippets
    shown = np.floor(sample_times(snippets, eye.frames_per_snippet, SNIPPET) * FPS) / FPS
    frames = np.stack(
        [
            np.asarray(Image.fromarray(drawing.draw(float(t))).resize(eye.frame_size, Image.Resampling.BOX))
            for t in shown
        ]
    )
    length = round(ear.window_seconds * RATE)
    padded = np.concatenate([np.zeros(length, np.float32), wave])
    stops = length + np.rint((np.arange(snippets) + 1) * SNIPPET * RATE).astype(int)
    windows = np.stack([padded[stop - length : stop] for stop in stops])
    return eye(frames.reshape(snippets, eye.frames_per_snippet, *frames.shape[1:])), ear(windows)


def clips(split: str, photographs: Sequence[Image.Image], spoken: Sequence[NDArray[np.float32]]) -> Iterator[Made]:
    """Make the clips of a split: arcade scenes, scenes over photographs, calm clips."""
    drawn, filmed, calm = COUNTS[split]
    number = arcade.SPLITS.index(split)
    for index in range(drawn):
        clip = arcade.script(split, index)
        yield (clip.name, clip.label, *rows(Drawing(clip), render_audio(clip)), truth(clip))
    for index in range(filmed + calm):
        rng = np.random.default_rng([SEED, number, index])
        clip = scene((SEED, number, index), f"{split}-{'filmed' if index < filmed else 'calm'}-{index}")
        own = np.zeros(0, np.float32)
        if index < filmed:
            own = render_audio(clip)
        else:
            clip = replace(clip, label=0, events=())
        wave = bed(rng, round(clip.duration * RATE), spoken)
        if index < filmed:
            wave = 0.7 * wave * (rng.random() < 0.7) + own
        wave = loudness(rng, wave.astype(np.float32))
        made = Filmed(clip, photographs, calm=index >= filmed)
        yield (clip.name, clip.label, *rows(made, wave), truth(clip))


def struck(
    photographs: Sequence[Image.Image], spoken: Sequence[NDArray[np.float32]], sounds: dict[str, NDArray[np.float32]]
) -> Iterator[Made]:
    """Make calm held-out clips that play one recorded sound three times; the truth marks each time."""
    for name, effect in sounds.items():
        for index in range(12):
            rng = np.random.default_rng([SEED, 9, index])
            clip = replace(scene((SEED, 9, index), f"{name}-{index}"), label=1, events=(), snippets=30)
            wave = 0.3 * bed(rng, round(clip.duration * RATE), spoken)
            marks = np.zeros(clip.snippets * FRAMES, np.int8)
            for beat in range(3):
                at = round((8.0 + 0.8 * beat) * RATE)
                part = effect[: 6 * RATE if beat == 0 else RATE]
                wave[at : at + len(part)] += 0.8 * part[: len(wave) - at]
            marks[round(8.0 * FPS) : round((9.6 + min(1.2, len(effect) / RATE)) * FPS)] = 1
            top = max(1.0, float(np.abs(wave).max()))
            yield (clip.name, 1, *rows(Filmed(clip, photographs, calm=True), wave / np.float32(top)), marks)
