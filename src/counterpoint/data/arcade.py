"""`arcade`: audio-visual game clips, violent or not, with the truth of every frame known and sound that often lags.

A clip (16 to 32 s, 24 frames a second) is a script drawn at random from (seed, split, number): a landscape, things that
roam it, and one to five *events*, each a burst of 2 to 5 s. Explosions, hits, hurts and lasers are violent; coins,
jumps, upgrades and music are not. As in Figure 1a of MACIL-SD, sight and sound disagree in part: of the violent events
half sound 1 to 5 snippets after they are seen, some are off-screen (heard only) or silent (seen only), though every
violent clip has one that is both seen and heard. Every clip also holds confusers, Poisson(0.5) of them: sounds or
sights alone that resemble violence and are not. A frame is violent while a violent event is seen or heard.

Pictures and sounds are those of the PyPI package `arcade`, by Kenney (kenney.nl), which its licence files put under
CC0; its music and its backgrounds by others are left alone, and the music heard here is synthesised. The package is
found, never imported, and need not be complete: `pip install --no-deps arcade`. The splits share sprites
and sounds, not clips: a model that does well here has learned these sprites.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from counterpoint.data import cached
from counterpoint.data.bags import Bag, BagData, TestVideo
from counterpoint.data.pairs import AlignedColumns, AlignedData, Modality
from counterpoint.data.valid import checked_count
from counterpoint.errors import CounterpointError

VERSION = 1  # of the scripts and the drawing: a change to either must change it, or stale caches are read
FPS = 24
FRAMES = 16  # a snippet
SNIPPET = FRAMES / FPS  # seconds
WIDTH, HEIGHT = 320, 180  # the units of a scene
RATE = 16000
SPLITS = ("train", "test", "valid")  # a clip's script depends on the place of its split here

VIOLENT = ("explosion", "hit", "hurt", "laser")
HARMLESS = ("coin", "jump", "upgrade", "music")
LOUD = ("error", "fall", "lose", "gameover")  # confusers for the ear
BRIGHT = ("meteors", "torch", "flash")  # confusers for the eye

PEOPLE = ("female_adventurer", "female_person", "male_adventurer", "male_person")
SHIPS = tuple(
    f"space_shooter/{s}" for s in ("playerShip1_blue", "playerShip1_green", "playerShip1_orange", "playerShip2_orange")
)
TANKS = tuple(f"topdown_tanks/tank_{c}" for c in ("blue", "dark", "green", "red", "sand"))
CREATURES = tuple(
    f"enemies/{c}" for c in ("bee", "fly", "ladybug", "mouse", "slimeBlue", "slimeGreen", "wormGreen", "frog")
)
METEORS = tuple(f"space_shooter/meteorGrey_{m}" for m in ("big1", "big3", "med1", "med2", "small1"))
PRIZES = tuple(f"items/{p}" for p in ("gemBlue", "gemGreen", "gemRed", "gemYellow", "star", "keyYellow"))
COINS = tuple(f"items/coin{c}" for c in ("Bronze", "Gold", "Silver"))
GROUNDS = ("grassMid", "sandMid", "snowMid", "stoneMid", "dirtMid", "planetMid", None)
THINGS = tuple(f"tiles/{t}" for t in ("bush", "cactus", "rock", "boxCrate_double", "mushroomRed", "signRight"))
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
    """Something that happens: when it is seen and when it is heard, in seconds, None for never."""

    kind: str
    violent: bool
    visible: tuple[float, float] | None
    audible: tuple[float, float] | None
    beats: tuple[float, ...]  # seconds after the start of either window: a blast, a shot, a coin
    seed: int  # of places, sprites and sounds

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Clip:
    """The script of a clip; the same (split, index, seed) gives the same script on any machine."""

    name: str
    label: int  # 1: something violent happens
    snippets: int
    events: tuple[Event, ...]
    seed: int  # of the landscape and of what roams it
    gain: float
    noise: float  # standard deviation of the sound's noise floor

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.snippets * SNIPPET


class Sprite(NamedTuple):
    """One picture to paste: centre and height in scene units."""

    name: str
    x: float
    y: float
    height: float
    angle: int = 0
    flip: bool = False
    tint: str = ""  # "red" or "white"
    alpha: float = 1.0


# --- scripts ----------------------------------------------------------------------------------------------------------


def script(split: str, index: int, seed: int = 0) -> Clip:
    """The clip number `index` of a split."""
    rng = np.random.default_rng([VERSION, seed, SPLITS.index(split), index])
    snippets = int(rng.integers(24, 49))
    length = snippets * SNIPPET
    label = int(rng.random() < 0.5)
    events = [_event(rng, str(rng.choice(HARMLESS)), length) for _ in range(rng.integers(1, 4))]
    events += [_confuser(rng, length) for _ in range(rng.poisson(0.5))]
    if label:
        kinds = [str(rng.choice(VIOLENT)) for _ in range(rng.integers(1, 3))]
        # The first is both seen and heard, so that the label never rests on one modality alone.
        events += [_event(rng, kind, length, both=number == 0) for number, kind in enumerate(kinds)]
    return Clip(
        name=f"{split}-{index:04d}",
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
    """Times of the beats; the last leaves room for what it starts."""
    beats: list[float] = []
    at = 0.0
    while not beats or at < span - 0.7:
        beats.append(round(at, 3))
        at += rng.uniform(*BEATS[kind])
    return tuple(beats)


def spans(clip: Clip) -> list[tuple[float, float]]:
    """When violence is seen or heard, in seconds: the union of the windows, in order."""
    windows = sorted(w for e in clip.events if e.violent for w in (e.visible, e.audible) if w is not None)
    merged: list[tuple[float, float]] = []
    for start, end in windows:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def truth(clip: Clip) -> NDArray[np.int8]:
    """[snippets * 16] 1 for frames whose middle lies in one of the `spans`."""
    middle = (np.arange(clip.snippets * FRAMES) + 0.5) / FPS
    out = np.zeros(len(middle), np.int8)
    for start, end in spans(clip):
        out[(middle >= start) & (middle < end)] = 1
    return out


# --- the package's files ----------------------------------------------------------------------------------------------


@lru_cache
def assets() -> Path:
    """Where the arcade package keeps its pictures and sounds; CounterpointError when it is not installed."""
    found = importlib.util.find_spec("arcade")  # not imported: it wants a window system
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / "resources" / "assets"
        if (folder / "sounds" / "explosion1.wav").is_file() and (folder / "images" / "space_shooter").is_dir():
            return folder
    raise CounterpointError(
        "the data source 'arcade' draws with the sprites and sounds of the package arcade, which is not installed: "
        "pip install --no-deps arcade"
    )


@lru_cache(maxsize=64)
def _picture(name: str) -> Image.Image:
    return Image.open(assets() / "images" / f"{name}.png").convert("RGBA")


@lru_cache
def _blast() -> list[Image.Image]:
    """The explosion as 24 pictures: the sheet's frames where fire is seen, of 16 x 14 in all."""
    sheet = Image.open(assets() / "images/spritesheets/explosion.png")
    places = [(256 * (n % 16), 256 * (n // 16)) for n in np.linspace(24, 160, 24).astype(int)]
    return [sheet.crop((x, y, x + 256, y + 256)).convert("RGBA").resize((160, 160)) for x, y in places]


@lru_cache(maxsize=4096)
def _sprite(name: str, height: int, angle: int, flip: bool, tint: str, alpha: int) -> Image.Image:
    """A picture scaled to `height` pixels, mirrored, tinted, turned, made transparent (alpha of 8)."""
    image = _blast()[int(name.partition("#")[2])] if name.startswith("blast#") else _picture(name)
    image = image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.BILINEAR)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if tint:
        colour = {"red": (255, 40, 30), "white": (255, 255, 255)}[tint]
        over = Image.new("RGB", image.size, colour)
        mixed = Image.blend(image.convert("RGB"), over, 0.65)
        mixed.putalpha(image.getchannel("A"))
        image = mixed
    if angle:
        image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    if alpha < 8:
        image.putalpha(image.getchannel("A").point([v * alpha // 8 for v in range(256)]))
    return image


@lru_cache(maxsize=512)
def _sound(name: str, pitch: int) -> NDArray[np.float32]:
    """A sound effect at 16 kHz, played `pitch` per cent faster."""
    from scipy.io import wavfile
    from scipy.signal import resample

    rate, samples = wavfile.read(assets() / "sounds" / f"{name}.wav")
    wave = samples.astype(np.float32) / np.iinfo(samples.dtype).max
    wave = wave.mean(1) if wave.ndim == 2 else wave
    out = resample(wave, round(len(wave) * RATE / rate / (1 + pitch / 100)))
    return np.asarray(out, np.float32)


# --- pictures ---------------------------------------------------------------------------------------------------------


class _Scene:
    """Draws a clip at any time."""

    def __init__(self, clip: Clip, size: tuple[int, int]) -> None:
        self.clip = clip
        self.size = size
        self.unit = size[1] / HEIGHT
        rng = np.random.default_rng(clip.seed)
        self.ground = HEIGHT - 26.0
        self.base = self._landscape(rng)
        self.roamers = [self._roamer(rng) for _ in range(rng.integers(2, 5))]
        self.actors = [(event, _cast(event, self.ground)) for event in clip.events if event.visible]
        self.flicker = float(rng.uniform(0.0, 0.08))

    def _landscape(self, rng: np.random.Generator) -> Image.Image:
        width, height = self.size
        top, bottom = rng.integers(10, 200, 3), rng.integers(40, 240, 3)
        ramp = np.linspace(0, 1, height)[:, None, None]
        sky = ((1 - ramp) * top + ramp * bottom) * np.ones((1, width, 1))
        tile = GROUNDS[rng.integers(len(GROUNDS))]
        if tile is None:  # open space
            sky *= 0.25
            self.ground = HEIGHT - 8.0
            for x, y in zip(rng.integers(0, width, 60), rng.integers(0, height, 60), strict=True):
                sky[y, x] = rng.integers(120, 255)
        image = Image.fromarray(sky.astype(np.uint8)).convert("RGBA")
        if tile is not None:
            for x in range(13, WIDTH + 26, 26):
                self._paste(image, Sprite(f"tiles/{tile}", x, self.ground + 13, 26))
            for _ in range(rng.integers(0, 4)):
                thing = str(rng.choice(THINGS))
                size = rng.uniform(18, 34)
                self._paste(image, Sprite(thing, rng.uniform(10, 310), self.ground - size / 2 + 1, size))
        return image

    def _roamer(self, rng: np.random.Generator) -> tuple[str, float, float, float, float, float]:
        """Kind, height, place, speed (units a second), bobbing and its phase."""
        pool = (SHIPS, TANKS, CREATURES, PEOPLE)[rng.choice(4, p=[0.25, 0.15, 0.35, 0.25])]
        name = str(rng.choice(pool))
        speed = rng.uniform(8, 45) * (1 if rng.random() < 0.5 else -1)
        if pool is PEOPLE or pool is TANKS:
            size = rng.uniform(26, 40) if pool is PEOPLE else rng.uniform(16, 26)
            return name, size, self.ground - size / 2 + 2, speed, 0.0, rng.uniform(0, 400)
        return (
            name,
            rng.uniform(14, 30),
            rng.uniform(20, self.ground - 20),
            speed,
            rng.uniform(0, 14),
            rng.uniform(0, 400),
        )

    def _paste(self, image: Image.Image, sprite: Sprite) -> None:
        height = max(1, round(sprite.height * self.unit))
        alpha = max(0, min(8, round(sprite.alpha * 8)))
        picture = _sprite(sprite.name, height, sprite.angle % 360, sprite.flip, sprite.tint, alpha)
        x, y = round(sprite.x * self.unit - picture.width / 2), round(sprite.y * self.unit - picture.height / 2)
        if x < -picture.width or y < -picture.height or x >= image.width or y >= image.height:
            return
        image.paste(picture, (x, y), picture)

    def draw(self, time: float) -> NDArray[np.uint8]:
        """The picture at a time in seconds: [H, W, 3]."""
        image = self.base.copy()
        for name, size, y, speed, bob, phase in self.roamers:
            x = (phase + speed * time) % (WIDTH + 60) - 30
            if name in PEOPLE:
                name = person(name, "walk", int(time * 10 + phase) % 8)
            angle = -90 if speed > 0 else 90
            turned = angle if name in SHIPS or name in TANKS else 0
            self._paste(
                image, Sprite(name, x, y + bob * np.sin(time + phase), size, turned, flip=speed < 0 and not turned)
            )
        light = 1.0 + self.flicker * np.sin(1.3 * time)
        for event, cast in self.actors:
            assert event.visible is not None
            start, end = event.visible
            if start <= time < end:
                for sprite in cast.sprites(time - start):
                    self._paste(image, sprite)
                light *= cast.light(time - start)
        rgb = image.convert("RGB")
        if light > 1:
            rgb = ImageChops.add(rgb, Image.new("RGB", rgb.size, (round(160 * (light - 1)),) * 3))
        return np.asarray(rgb)


def person(name: str, pose: str, frame: int | str = "") -> str:
    """The picture of a character in a pose: walk 0..7, jump, fall, idle."""
    first, *rest = name.split("_")
    return f"animated_characters/{name}/{first}{''.join(word.title() for word in rest)}_{pose}{frame}"


class _Cast:
    """What an event shows. `t` is seconds since it came into sight; `beats` are when its blows fall."""

    def __init__(self, event: Event, ground: float) -> None:
        self.beats = np.array(event.beats)
        self.ground = ground
        self.rng = event.rng()
        # Not too near the edges; each beat has a place of its own about it.
        self.x, self.y = self.rng.uniform(60, 260), self.rng.uniform(40, ground - 30)
        self.places = self.rng.normal(0, 24, (len(self.beats), 2))
        self.size = self.rng.uniform(0.75, 1.35)
        self.side = 1 if self.rng.random() < 0.5 else -1
        self.cast()

    def cast(self) -> None:
        """Choose sprites."""

    def past(self, t: float) -> Iterator[tuple[int, float]]:
        """(beat, seconds since it) for the beats that have fallen."""
        return ((n, t - b) for n, b in enumerate(self.beats) if t >= b)

    def since(self, t: float) -> float:
        """Seconds since the last beat."""
        return t - float(self.beats[self.beats <= t].max())

    def sprites(self, t: float) -> Iterator[Sprite]:
        raise NotImplementedError

    def light(self, t: float) -> float:
        return 1.0


class _Explosion(_Cast):
    def cast(self) -> None:
        self.victims = self.rng.choice([*TANKS, *SHIPS, "tiles/bomb", "tiles/boxCrate_double"], len(self.beats))

    def sprites(self, t: float) -> Iterator[Sprite]:
        for n, victim in enumerate(self.victims):
            if t < self.beats[n] + 0.15:
                yield Sprite(str(victim), self.x + self.places[n, 0], self.y + self.places[n, 1], 22 * self.size)
        for n, since in self.past(t):
            frame = int(since / 0.9 * 24)
            if frame < 24:
                x, y = self.x + self.places[n, 0], self.y + self.places[n, 1]
                yield Sprite(f"blast#{frame}", x, y, 96 * self.size, flip=n % 2 == 1)

    def light(self, t: float) -> float:
        since = self.since(t)
        return 1.0 + 0.5 * max(0.0, 1 - since / 0.15)


class _Hit(_Cast):
    def cast(self) -> None:
        self.victim = str(self.rng.choice([*SHIPS, *TANKS, "robot"]))
        if self.victim == "robot":
            self.y = self.ground - 20
        self.sparks = self.rng.normal(0, 1, (len(self.beats), 7, 2))

    def sprites(self, t: float) -> Iterator[Sprite]:
        since = self.since(t)
        shake = 4 * np.sin(70 * t) * max(0.0, 1 - since / 0.25)
        fresh = since < 0.1
        pose = "fall" if since < 0.2 else "idle"
        name = person("robot", pose) if self.victim == "robot" else self.victim
        yield Sprite(name, self.x + shake, self.y, 34 * self.size, tint="white" if fresh else "")
        for n, since in self.past(t):
            if since < 0.4:
                for k, (u, v) in enumerate(self.sparks[n]):
                    far = 70 * since
                    x, y = self.x + u * far, self.y + v * far + 60 * since**2
                    shard = "items/star" if k < 3 else "space_shooter/meteorGrey_tiny1"
                    yield Sprite(shard, x, y, 9 * self.size, angle=int(900 * since) // 30 * 30)


class _Hurt(_Cast):
    def cast(self) -> None:
        self.victim = str(self.rng.choice(PEOPLE))
        self.attacker = "zombie" if self.rng.random() < 0.6 else "saw"
        self.x = self.rng.uniform(90, 230)
        self.tall = 38 * self.size

    def sprites(self, t: float) -> Iterator[Sprite]:
        since = self.since(t)
        pushed = sum(9 * min(1.0, s / 0.2) for _, s in self.past(t))
        floor = self.ground - self.tall / 2 + 2
        x = self.x + self.side * pushed
        fresh = since < 0.25
        hop = 8 * np.sin(np.pi * min(1.0, since / 0.25))
        name = person(self.victim, "fall" if fresh else "idle")
        yield Sprite(name, x, floor - hop, self.tall, flip=self.side > 0, tint="red" if fresh else "")
        near = x - self.side * (14 + 10 * min(1.0, since / 0.3)) * self.size
        if self.attacker == "zombie":
            yield Sprite(person("zombie", "walk", int(t * 10) % 8), near, floor, self.tall, flip=self.side < 0)
        else:
            yield Sprite("enemies/saw", near, floor + 4, 0.8 * self.tall, angle=int(t * 720) // 15 * 15)


class _Laser(_Cast):
    def cast(self) -> None:
        self.ship = str(self.rng.choice(SHIPS))
        # One picture stands upright, the other lies; both become 27 long.
        self.bolt, self.height, self.angle = (("laserRed01", 27.0, 90), ("laserBlue01", 27 / 54 * 9, 0))[
            self.rng.integers(2)
        ]
        self.x = 60 if self.side > 0 else 260

    def sprites(self, t: float) -> Iterator[Sprite]:
        y = self.y + 14 * np.sin(1.7 * t)
        yield Sprite(self.ship, self.x, y, 26 * self.size, angle=-90 * self.side)
        for n, since in self.past(t):
            start = self.y + 14 * np.sin(1.7 * self.beats[n])
            x = self.x + self.side * (16 + 260 * since)
            if -20 < x < WIDTH + 20:
                yield Sprite(f"space_shooter/{self.bolt}", x, start, self.height * self.size, angle=self.angle)


class _Coin(_Cast):
    def cast(self) -> None:
        self.who, self.coin = str(self.rng.choice(PEOPLE)), str(self.rng.choice(COINS))

    def sprites(self, t: float) -> Iterator[Sprite]:
        tall = 36 * self.size
        speed = 34.0
        left = self.x - 60 * self.side
        yield Sprite(
            person(self.who, "walk", int(10 * t) % 8),
            left + self.side * speed * t,
            self.ground - tall / 2 + 2,
            tall,
            flip=self.side < 0,
        )
        for beat in self.beats:
            rise = max(0.0, t - beat)
            if rise < 0.3:
                x = left + self.side * (speed * beat + 12)
                yield Sprite(self.coin, x, self.ground - 14 - 70 * rise, 15 * self.size, alpha=1 - rise / 0.3)


class _Jump(_Cast):
    def cast(self) -> None:
        self.who = str(self.rng.choice(PEOPLE))

    def sprites(self, t: float) -> Iterator[Sprite]:
        tall = 36 * self.size
        up = 34 * np.sin(np.pi * min(1.0, self.since(t) / 0.45))
        name = person(self.who, "jump") if up > 2 else person(self.who, "walk", int(10 * t) % 8)
        yield Sprite(name, self.x + 14 * self.side * t, self.ground - tall / 2 + 2 - up, tall, flip=self.side < 0)


class _Upgrade(_Cast):
    def cast(self) -> None:
        self.prizes = self.rng.choice(PRIZES, len(self.beats))

    def sprites(self, t: float) -> Iterator[Sprite]:
        for n, since in self.past(t):
            if since < 0.8:
                x, y = self.x + self.places[n, 0], self.y + self.places[n, 1] - 20 * since
                yield Sprite(str(self.prizes[n]), x, y, (12 + 22 * since) * self.size, alpha=1 - since)
                for k in range(4):
                    turn = k * np.pi / 2 + 3 * since
                    r = 12 + 22 * since
                    yield Sprite("items/star", x + r * np.cos(turn), y + r * np.sin(turn), 7, alpha=1 - since)


class _Meteors(_Cast):
    def cast(self) -> None:
        self.rocks = self.rng.choice(METEORS, len(self.beats))

    def sprites(self, t: float) -> Iterator[Sprite]:
        for n, since in self.past(t):
            x = self.x + 3 * self.places[n, 0] + 60 * self.side * since
            yield Sprite(str(self.rocks[n]), x, -15 + 75 * since, 24 * self.size, angle=int(80 * since) // 10 * 10)


class _Torch(_Cast):
    def sprites(self, t: float) -> Iterator[Sprite]:
        flame = 1 + int(9 * t) % 2
        for n in range(2):
            yield Sprite(f"tiles/torch{flame}", self.x + 40 * n, self.ground - 16, 40 * self.size)


class _Flash(_Cast):
    def sprites(self, t: float) -> Iterator[Sprite]:
        return iter(())

    def light(self, t: float) -> float:
        return 1.0 + 0.6 * max(0.0, 1 - self.since(t) / 0.3)


_CASTS: dict[str, type[_Cast]] = {
    "explosion": _Explosion,
    "hit": _Hit,
    "hurt": _Hurt,
    "laser": _Laser,
    "coin": _Coin,
    "jump": _Jump,
    "upgrade": _Upgrade,
    "meteors": _Meteors,
    "torch": _Torch,
    "flash": _Flash,
}


def _cast(event: Event, ground: float) -> _Cast:
    return _CASTS[event.kind](event, ground)


def render_frames(
    clip: Clip, times: Sequence[float] | NDArray[np.floating], size: tuple[int, int] = (WIDTH, HEIGHT)
) -> NDArray[np.uint8]:
    """The pictures at the given times (seconds, any order): [n, H, W, 3] RGB for size = (W, H), 16:9 to look right."""
    scene = _Scene(clip, size)
    return np.stack([scene.draw(float(time)) for time in times])


# --- sound ------------------------------------------------------------------------------------------------------------

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


def render_audio(clip: Clip) -> NDArray[np.float32]:
    """The clip's sound, mono at 16 kHz in (-1, 1): [snippets * 16 / 24 * 16000]."""
    wave = np.zeros(round(clip.duration * RATE), np.float32)
    for event in clip.events:
        if event.audible is None:
            continue
        rng = event.rng()
        start, end = event.audible
        stop = min(len(wave), round(end * RATE))  # nothing of it is heard after the window the truth gives it
        gain = rng.uniform(0.2, 0.6)
        chosen = rng.choice(_VOICES[event.kind], 2) if event.kind in _VOICES else None
        root = 110 * 2 ** (rng.integers(0, 12) / 12)
        for beat in event.beats:
            at = round((start + beat) * RATE)
            if chosen is None:
                part = _note(root * 2 ** (rng.choice(_SCALE) / 12), 0.4)
            else:
                part = _sound(str(rng.choice(chosen)), int(rng.choice([-12, -6, 0, 6, 12])))
            part = part[: max(0, stop - at)]
            wave[at : at + len(part)] += np.float32(gain) * part
    noise = np.random.default_rng(clip.seed).standard_normal(len(wave)).astype(np.float32)
    wave = clip.gain * wave + clip.noise * noise
    loudest = float(np.abs(wave).max())
    return (wave * min(1.0, 0.98 / loudest)).astype(np.float32)


def _note(hertz: float, seconds: float) -> NDArray[np.float32]:
    """A plucked tone."""
    t = np.arange(round(seconds * RATE)) / RATE
    tone = np.sin(2 * np.pi * hertz * t) + 0.4 * np.sin(4 * np.pi * hertz * t) + 0.2 * np.sin(6 * np.pi * hertz * t)
    return (0.5 * tone * np.exp(-6 * t) * np.minimum(1, t / 0.01)).astype(np.float32)


# --- files ------------------------------------------------------------------------------------------------------------


def write_clip(clip: Clip, path: Path | str, *, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write a clip as a video file with a sound track (H.264 and AAC in .mp4)."""
    from counterpoint.data.media import write_video

    scene = _Scene(clip, size)
    frames = (scene.draw(n / FPS) for n in range(clip.snippets * FRAMES))
    write_video(path, frames, render_audio(clip), fps=FPS, sample_rate=RATE)


def export(
    directory: Path | str, *, split: str = "test", count: int, seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> list[Path]:
    """Write the first `count` clips of a split as .mp4, laid out as the source `videos:DIR` reads them.

    DIR/SPLIT/{violent,normal}/NAME.mp4 and, for the test split, DIR/truth.csv (video, start, end; seconds).
    Returns the files in order.
    """
    import csv

    from rich.progress import track

    directory = Path(directory)
    paths, rows = [], []
    for index in track(range(count), "writing clips", transient=True, disable=count < 4):
        clip = script(split, index, seed)
        path = directory / split / ("violent" if clip.label else "normal") / f"{clip.name}.mp4"
        write_clip(clip, path, size=size)
        paths.append(path)
        rows += [(path.name, f"{start:.3f}", f"{end:.3f}") for start, end in spans(clip)]
    if split == "test":
        with (directory / "truth.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(("video", "start", "end"))
            out.writerows(rows)
    return paths


# --- features ---------------------------------------------------------------------------------------------------------

Row = tuple[str, int, NDArray[np.float32], NDArray[np.float32], NDArray[np.int8]]  # name, label, visual, audio, truth


def features(split: str, index: int, seed: int, visual: dict[str, Any], audio: dict[str, Any]) -> Row:
    """A clip's feature rows, computed from the pictures and the sound that its video file would hold."""
    import torch

    torch.set_num_threads(1)
    eye, ear = _backbones(json.dumps(visual), json.dumps(audio))
    from counterpoint.data.media import sample_times

    clip = script(split, index, seed)
    scene = _Scene(clip, (WIDTH, HEIGHT))
    times = sample_times(clip.snippets, eye.frames_per_snippet, SNIPPET)
    shown = np.floor(times * FPS) / FPS  # the frame of the file that is on at that time
    frames = np.stack([_scaled(scene.draw(float(time)), eye.frame_size) for time in shown])
    frames = frames.reshape(clip.snippets, eye.frames_per_snippet, *frames.shape[1:])
    length = round(ear.window_seconds * RATE)
    wave = np.concatenate([np.zeros(length, np.float32), render_audio(clip)])
    stops = length + np.rint((np.arange(clip.snippets) + 1) * SNIPPET * RATE).astype(int)
    windows = np.stack([wave[stop - length : stop] for stop in stops])
    if ear.sample_rate != RATE:
        from scipy.signal import resample

        windows = np.asarray(resample(windows, round(ear.window_seconds * ear.sample_rate), axis=1), np.float32)
    return clip.name, clip.label, eye(frames), ear(windows), truth(clip)


@lru_cache(maxsize=2)
def _backbones(visual: str, audio: str) -> tuple[Any, Any]:
    from counterpoint import encoders

    return encoders.build_visual(json.loads(visual)), encoders.build_audio(json.loads(audio))


def _scaled(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


@overload
def load(
    argument: str | None = ...,
    *,
    task: Literal["bags"] = ...,
    train: int = ...,
    valid: int = ...,
    test: int = ...,
    seed: int = ...,
    visual: str = ...,
    audio: str = ...,
) -> BagData: ...
@overload
def load(
    argument: str | None = ...,
    *,
    task: str,
    train: int = ...,
    valid: int = ...,
    test: int = ...,
    seed: int = ...,
    visual: str = ...,
    audio: str = ...,
) -> BagData | AlignedData: ...
def load(
    argument: str | None = None,
    *,
    task: str = "bags",
    train: int = 320,
    valid: int = -1,
    test: int = 200,
    seed: int = 0,
    visual: str = "light",
    audio: str = "logmel",
) -> BagData | AlignedData:
    """Snippet features of the clips; built once (about a minute on 2 cores), then read from the cache.

    Args:
        argument: not used; sources share a signature.
        task: "bags" for snippets with a label for each clip; "aligned" for clips as items of two modalities, `video` and
            `audio`, a vector each: the mean and the largest of their snippets' features. The classes are normal and violent.
        train: number of training clips.
        valid: number of valid clips; -1 for half as many as test clips, at least 2.
        test: number of test clips.
        seed: of the scripts; another seed is another set.
        visual: backbone, `NAME` or `NAME@WEIGHTS-FILE` (see `counterpoint.encoders`).
        audio: backbone, likewise.
    """
    from counterpoint import encoders

    backbones = {
        "visual": encoders.build_visual(encoders.parse(visual)).describe(),
        "audio": encoders.build_audio(encoders.parse(audio)).describe(),
    }
    assets()
    valid = checked_count("arcade", valid, max(2, test // 2))
    notes: list[str] = []
    # The valid clips are kept apart: what is kept of the others does not depend on their number.
    rows = _stored([("train", n) for n in range(train)] + [("test", n) for n in range(test)], seed, backbones, notes)
    watched = _stored([("valid", n) for n in range(valid)], seed, backbones, notes)
    if task == "aligned":
        return _aligned(rows[:train], watched, rows[train:], notes)
    return BagData(
        name="arcade",
        train=[Bag(name, v, a, label) for name, label, v, a, _ in rows[:train]],
        valid=[TestVideo(name, v[None], a, label, t) for name, label, v, a, t in watched],
        test=[TestVideo(name, v[None], a, label, t) for name, label, v, a, t in rows[train:]],
        visual_dim=rows[0][2].shape[1],
        audio_dim=rows[0][3].shape[1],
        frames_per_snippet=FRAMES,
        snippet_seconds=SNIPPET,
        backbones=backbones,
        notes=notes,
    )


def _stored(jobs: list[tuple[str, int]], seed: int, backbones: dict[str, Any], notes: list[str]) -> list[Row]:
    """Clips by split and number, from the cache or built into it."""
    counts = Counter(split for split, _ in jobs)
    key = (VERSION, importlib.metadata.version("arcade"), counts, seed, backbones)
    return cached.build_once("arcade", key, lambda: _pack(_build(jobs, seed, backbones)), _unpack, notes=notes)


def _aligned(train: list[Row], valid: list[Row], test: list[Row], notes: list[str]) -> AlignedData:
    """Clips as items, each modality one vector."""

    def pooled(features: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([features.mean(0), features.max(0)]).astype(np.float32)

    def columns(rows: list[Row]) -> AlignedColumns:
        video = np.stack([pooled(visual) for _, _, visual, _, _ in rows])
        audio = np.stack([pooled(sound) for _, _, _, sound, _ in rows])
        labels = np.array([label for _, label, *_ in rows], np.int64)
        return AlignedColumns({"video": video, "audio": audio}, labels=labels)

    _, _, visual, sound, _ = train[0]
    kinds = {
        "video": Modality("vector", dim=2 * visual.shape[1]),
        "audio": Modality("vector", dim=2 * sound.shape[1]),
    }
    splits = columns(train), columns(valid), columns(test)
    return AlignedData("arcade", *splits, kinds, classes=("normal", "violent"), notes=notes)


def _build(jobs: list[tuple[str, int]], seed: int, backbones: dict[str, Any]) -> list[Row]:
    from joblib import Parallel, delayed
    from rich.console import Console
    from rich.progress import track

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Starting workers costs more than a few clips do.
    parallel = Parallel(n_jobs=min(workers, 8) if len(jobs) > 40 else 1, return_as="generator", batch_size=4)
    made = parallel(delayed(features)(split, n, seed, backbones["visual"], backbones["audio"]) for split, n in jobs)
    console = Console(stderr=True)
    quiet = os.environ.get("RANK", "0") != "0"
    return list(track(made, "drawing arcade clips", len(jobs), console=console, transient=True, disable=quiet))


def _pack(rows: list[Row]) -> dict[str, NDArray[Any]]:
    return {
        "names": np.array([row[0] for row in rows]),
        "labels": np.array([row[1] for row in rows], np.int8),
        "lengths": np.array([len(row[2]) for row in rows]),
        "visual": np.concatenate([row[2] for row in rows]),
        "audio": np.concatenate([row[3] for row in rows]),
        "truth": np.concatenate([row[4] for row in rows]),
    }


def _unpack(stored: dict[str, NDArray[Any]]) -> list[Row]:
    cuts = np.cumsum(stored["lengths"])[:-1]
    return [
        (str(name), int(label), v, a, t)
        for name, label, v, a, t in zip(
            stored["names"],
            stored["labels"],
            np.split(stored["visual"], cuts),
            np.split(stored["audio"], cuts),
            np.split(stored["truth"], FRAMES * cuts),
            strict=True,
        )
    ]
