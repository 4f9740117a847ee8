"""Pictures of a scene at any time, and the object at each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from counterpoint.data.worlds.sprites.artwork import (
    CREATURES,
    GROUNDS,
    PEOPLE,
    SHIPS,
    TANKS,
    THINGS,
    Sprite,
    person,
    sprite_image,
)
from counterpoint.data.worlds.sprites.casts import cast_of
from counterpoint.data.worlds.sprites.scenes import HEIGHT, WIDTH, Event, Scene


@dataclass(frozen=True)
class Thing:
    """A visible object of a scene."""

    identity: int  # from 1, constant over the scene
    kind: str  # "fixture" (fixed on the ground), "roamer" or "event"
    name: str  # the picture's name; for an event its kind, which covers all its sprites


@dataclass(frozen=True)
class Look:
    """A picture of a scene, and the object at each pixel."""

    pixels: NDArray[np.uint8]  # [H, W, 3]
    owner: NDArray[np.int64]  # [H, W] identity of the object in front, 0 for the landscape
    things: dict[int, Thing]  # by identity: the objects with at least one visible pixel

    def mask(self, identity: int) -> NDArray[np.bool_]:
        """Return [H, W], true at the visible pixels of an object."""
        return self.owner == identity

    def box(self, identity: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of an object's visible pixels; right and bottom are exclusive."""
        rows, columns = (np.flatnonzero(self.mask(identity).any(axis)) for axis in (1, 0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class Drawing:
    """Draw a scene at any time.

    Args:
        scene: the truth.
        size: width and height of the pictures in pixels; other ratios than 16:9 look distorted.
    """

    def __init__(self, scene: Scene, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
        self.scene = scene
        self.size = size
        self.unit = size[1] / HEIGHT
        rng = np.random.default_rng(scene.seed)
        self.ground = HEIGHT - 26.0  # height of the ground's surface, in units from the top
        self.tile: str | None = None  # material of the ground; None in open space
        self.fixtures: list[Sprite] = []
        self.base = self._landscape(rng)
        self.roamers = [self._roamer(rng) for _ in range(rng.integers(2, 5))]
        self.actors = [(event, cast_of(event, self.ground)) for event in scene.events if event.visible]
        self.flicker = float(rng.uniform(0.0, 0.08))

    def _landscape(self, rng: np.random.Generator) -> Image.Image:
        width, height = self.size
        top, bottom = rng.integers(10, 200, 3), rng.integers(40, 240, 3)
        ramp = np.linspace(0, 1, height)[:, None, None]
        sky = ((1 - ramp) * top + ramp * bottom) * np.ones((1, width, 1))
        tile = self.tile = GROUNDS[rng.integers(len(GROUNDS))]
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
                self.fixtures.append(Sprite(thing, rng.uniform(10, 310), self.ground - size / 2 + 1, size))
                self._paste(image, self.fixtures[-1])
        return image

    def _roamer(self, rng: np.random.Generator) -> tuple[str, float, float, float, float, float]:
        """Draw a roamer at random: its picture, height, vertical position, speed (units per second), bobbing and phase."""
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

    def _placed(self, sprite: Sprite) -> tuple[Image.Image, int, int] | None:
        """Return a sprite's pixels and the position of their upper left corner; None outside the picture."""
        height = max(1, round(sprite.height * self.unit))
        alpha = max(0, min(8, round(sprite.alpha * 8)))
        picture = sprite_image(sprite.name, height, sprite.angle % 360, sprite.flip, sprite.tint, alpha)
        x, y = round(sprite.x * self.unit - picture.width / 2), round(sprite.y * self.unit - picture.height / 2)
        if x < -picture.width or y < -picture.height or x >= self.size[0] or y >= self.size[1]:
            return None
        return picture, x, y

    def _paste(self, image: Image.Image, sprite: Sprite) -> None:
        if placed := self._placed(sprite):
            picture, x, y = placed
            image.paste(picture, (x, y), picture)

    def sprites(self, time: float) -> Iterator[tuple[int, Sprite]]:
        """Yield (identity, sprite) for all moving sprites at a time in seconds, from back to front."""
        first = 1 + len(self.fixtures)
        for identity, (name, size, y, speed, bob, phase) in enumerate(self.roamers, first):
            x = (phase + speed * time) % (WIDTH + 60) - 30
            if name in PEOPLE:
                name = person(name, "walk", int(time * 10 + phase) % 8)
            angle = -90 if speed > 0 else 90
            turned = angle if name in SHIPS or name in TANKS else 0
            flip = speed < 0 and not turned
            yield identity, Sprite(name, x, y + bob * np.sin(time + phase), size, turned, flip=flip)
        for identity, (event, cast) in enumerate(self.actors, first + len(self.roamers)):
            assert event.visible is not None
            start, end = event.visible
            if start <= time < end:
                yield from ((identity, sprite) for sprite in cast.sprites(time - start))

    def light(self, time: float) -> float:
        """Return the brightness of the scene at a time in seconds; 1 leaves the picture unchanged."""
        light = 1.0 + self.flicker * np.sin(1.3 * time)
        for event, cast in self.actors:
            assert event.visible is not None
            start, end = event.visible
            if start <= time < end:
                light *= cast.light(time - start)
        return float(light)

    def draw(self, time: float) -> NDArray[np.uint8]:
        """Draw the picture at a time in seconds: [H, W, 3] uint8."""
        image = self.base.copy()
        for _, sprite in self.sprites(time):
            self._paste(image, sprite)
        light = self.light(time)
        rgb = image.convert("RGB")
        if light > 1:
            rgb = ImageChops.add(rgb, Image.new("RGB", rgb.size, (round(160 * (light - 1)),) * 3))
        return np.asarray(rgb)

    @property
    def things(self) -> dict[int, Thing]:
        """Return all objects that are visible at any time of the scene, by identity."""
        named = [("fixture", sprite.name) for sprite in self.fixtures]
        named += [("roamer", name) for name, *_ in self.roamers]
        named += [("event", event.kind) for event, _ in self.actors]
        return {number: Thing(number, kind, name) for number, (kind, name) in enumerate(named, 1)}

    def identity(self, event: Event) -> int:
        """Return the identity of a visible event. ValueError for an event that is only heard."""
        return 1 + len(self.fixtures) + len(self.roamers) + [actor for actor, _ in self.actors].index(event)

    def look(self, time: float) -> Look:
        """Draw the picture at a time in seconds, with the object at each pixel.

        A pixel belongs to the frontmost object whose sprite covers at least half of it.
        """
        owner = Image.new("I", self.size, 0)
        for identity, sprite in [*enumerate(self.fixtures, 1), *self.sprites(time)]:
            if placed := self._placed(sprite):
                picture, x, y = placed
                owner.paste(identity, (x, y), picture.getchannel("A").point([255 * (v > 127) for v in range(256)], "1"))
        numbers = np.asarray(owner).astype(np.int64)
        seen = np.unique(numbers)
        return Look(self.draw(time), numbers, {n: thing for n, thing in self.things.items() if n in seen})


def render_frames(
    scene: Scene, times: Sequence[float] | NDArray[np.floating], size: tuple[int, int] = (WIDTH, HEIGHT)
) -> NDArray[np.uint8]:
    """Draw the pictures of a scene at given times: [n, H, W, 3] RGB.

    Args:
        scene: the truth.
        times: n times in seconds, in any order.
        size: (W, H) in pixels; other ratios than 16:9 look distorted.
    """
    drawing = Drawing(scene, size)
    return np.stack([drawing.draw(float(time)) for time in times])
