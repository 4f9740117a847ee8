"""Captions that name the visible objects of a picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from counterpoint.data.worlds.sprites.drawing import Thing

NUMBERS = ("no", "a", "two", "three", "four", "five", "six")
# Words for pictures whose file names do not contain them.
WORDS = {
    "playerShip1_blue": "blue ship",
    "playerShip1_green": "green ship",
    "playerShip1_orange": "orange ship",
    "playerShip2_orange": "orange ship",
    "boxCrate_double": "crate",
    "mushroomRed": "red mushroom",
    "signRight": "sign",
}
EVENTS = {
    "hit": "blow",
    "hurt": "fight",
    "coin": "coin",
    "jump": "jump",
    "upgrade": "prize",
    "meteors": "meteor shower",
}


def word(thing: Thing) -> str:
    """Name an object: "blue ship", "female person", "explosion"."""
    if thing.kind == "event":
        return EVENTS.get(thing.name, thing.name)
    name = thing.name.rpartition("/")[2]
    if name in WORDS:
        return WORDS[name]
    if name.startswith("tank_"):
        return f"{name.removeprefix('tank_')} tank"
    if match := re.fullmatch(r"(slime|worm)(Blue|Green)", name):  # in these names the colour follows the creature
        return f"{match[2].lower()} {match[1]}"
    return name.replace("_", " ")


def caption(things: Iterable[Thing], tile: str | None) -> str:
    """Write a caption of the visible objects: "two bees and a blue tank on grass, an explosion".

    Args:
        things: the visible objects. In the caption events come last, the others in alphabetical order.
        tile: material of the ground, as a `Drawing` names it; None for open space.
    """
    seen = list(things)
    standing = Counter(word(thing) for thing in seen if thing.kind != "event")
    events = Counter(word(thing) for thing in seen if thing.kind == "event")
    place = "in space" if tile is None else f"on {tile.removesuffix('Mid')}"
    said = f"{_listed(standing) or 'nothing'} {place}"
    return f"{said}, {_listed(events)}" if events else said


def _listed(counts: Counter[str]) -> str:
    """List counted words: "two bees, a frog and a red tank"."""
    parts = [_counted(name, count) for name, count in sorted(counts.items())]
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _counted(name: str, count: int) -> str:
    if count == 1:
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    plural = {"fly": "flies", "mouse": "mice", "bush": "bushes", "cactus": "cacti", "ladybug": "ladybugs"}
    irregular = plural.get(name) or (f"{name.removesuffix('person')}people" if name.endswith("person") else f"{name}s")
    return f"{NUMBERS[count] if count < len(NUMBERS) else count} {irregular}"
