"""Casts: the sprites that each kind of event shows, at any time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from counterpoint.data.worlds.sprites.artwork import COINS, METEORS, PEOPLE, PRIZES, SHIPS, TANKS, Sprite, person
from counterpoint.data.worlds.sprites.scenes import WIDTH, Event


class Cast:
    """The sprites of one event. Times `t`, and the times of its beats, are seconds since it became visible."""

    def __init__(self, event: Event, ground: float) -> None:
        self.beats = np.array(event.beats)
        self.ground = ground
        self.rng = event.rng()
        # Not too near the edges; each beat has a random position near the event.
        self.x, self.y = self.rng.uniform(60, 260), self.rng.uniform(40, ground - 30)
        self.places = self.rng.normal(0, 24, (len(self.beats), 2))
        self.size = self.rng.uniform(0.75, 1.35)
        self.side = 1 if self.rng.random() < 0.5 else -1
        self.cast()

    def cast(self) -> None:
        """Choose sprites."""

    def past(self, t: float) -> Iterator[tuple[int, float]]:
        """Yield (beat, seconds since it) for the beats up to now."""
        return ((n, t - b) for n, b in enumerate(self.beats) if t >= b)

    def since(self, t: float) -> float:
        """Return the seconds since the last beat."""
        return t - float(self.beats[self.beats <= t].max())

    def sprites(self, t: float) -> Iterator[Sprite]:
        raise NotImplementedError

    def light(self, t: float) -> float:
        return 1.0


class _Explosion(Cast):
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


class _Hit(Cast):
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


class _Hurt(Cast):
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


class _Laser(Cast):
    def cast(self) -> None:
        self.ship = str(self.rng.choice(SHIPS))
        # One picture is upright, the other horizontal; both become 27 units long.
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


class _Coin(Cast):
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


class _Jump(Cast):
    def cast(self) -> None:
        self.who = str(self.rng.choice(PEOPLE))

    def sprites(self, t: float) -> Iterator[Sprite]:
        tall = 36 * self.size
        up = 34 * np.sin(np.pi * min(1.0, self.since(t) / 0.45))
        name = person(self.who, "jump") if up > 2 else person(self.who, "walk", int(10 * t) % 8)
        yield Sprite(name, self.x + 14 * self.side * t, self.ground - tall / 2 + 2 - up, tall, flip=self.side < 0)


class _Upgrade(Cast):
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


class _Meteors(Cast):
    def cast(self) -> None:
        self.rocks = self.rng.choice(METEORS, len(self.beats))

    def sprites(self, t: float) -> Iterator[Sprite]:
        for n, since in self.past(t):
            x = self.x + 3 * self.places[n, 0] + 60 * self.side * since
            yield Sprite(str(self.rocks[n]), x, -15 + 75 * since, 24 * self.size, angle=int(80 * since) // 10 * 10)


class _Torch(Cast):
    def sprites(self, t: float) -> Iterator[Sprite]:
        flame = 1 + int(9 * t) % 2
        for n in range(2):
            yield Sprite(f"tiles/torch{flame}", self.x + 40 * n, self.ground - 16, 40 * self.size)


class _Flash(Cast):
    def sprites(self, t: float) -> Iterator[Sprite]:
        return iter(())

    def light(self, t: float) -> float:
        return 1.0 + 0.6 * max(0.0, 1 - self.since(t) / 0.3)


CASTS: dict[str, type[Cast]] = {
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


def cast_of(event: Event, ground: float) -> Cast:
    return CASTS[event.kind](event, ground)
