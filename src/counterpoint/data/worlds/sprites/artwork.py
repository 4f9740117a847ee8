"""Pictures and sounds of the PyPI package `arcade`, by Kenney (kenney.nl), under CC0 by its licence files.

The package must be installed, but is never imported, and its dependencies are not needed: `pip install --no-deps arcade`. Its
music and its backgrounds, by other authors, are not used.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.worlds.sprites.scenes import RATE
from counterpoint.errors import CounterpointError

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


class Sprite(NamedTuple):
    """One picture to paste; centre and height in scene units."""

    name: str
    x: float
    y: float
    height: float
    angle: int = 0
    flip: bool = False
    tint: str = ""  # "red" or "white"
    alpha: float = 1.0


@lru_cache
def assets() -> Path:
    """Return the folder of the arcade package's pictures and sounds. CounterpointError when it is not installed."""
    found = importlib.util.find_spec("arcade")  # not imported: it needs a window system
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / "resources" / "assets"
        if (folder / "sounds" / "explosion1.wav").is_file() and (folder / "images" / "space_shooter").is_dir():
            return folder
    raise CounterpointError(
        "the data sources 'arcade' and 'sprites' draw with the pictures and sounds of the package arcade, which is not installed: "
        "pip install --no-deps arcade"
    )


@lru_cache(maxsize=64)
def picture(name: str) -> Image.Image:
    return Image.open(assets() / "images" / f"{name}.png").convert("RGBA")


@lru_cache
def blast() -> list[Image.Image]:
    """Return the explosion as 24 pictures: frames with visible fire, of the sheet's 16 x 14 frames."""
    sheet = Image.open(assets() / "images/spritesheets/explosion.png")
    places = [(256 * (n % 16), 256 * (n // 16)) for n in np.linspace(24, 160, 24).astype(int)]
    return [sheet.crop((x, y, x + 256, y + 256)).convert("RGBA").resize((160, 160)) for x, y in places]


@lru_cache(maxsize=4096)
def sprite_image(name: str, height: int, angle: int, flip: bool, tint: str, alpha: int) -> Image.Image:
    """Return a picture, edited.

    Args:
        name: name of the picture, or blast#N for frame N of the explosion.
        height: height in pixels.
        angle: rotation in degrees, counterclockwise.
        flip: mirror the picture.
        tint: "red", "white", or "" for none.
        alpha: opacity in eighths, 0 to 8.
    """
    image = blast()[int(name.partition("#")[2])] if name.startswith("blast#") else picture(name)
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
def sound(name: str, pitch: int) -> NDArray[np.float32]:
    """Return a sound effect at 16 kHz, played `pitch` per cent faster."""
    from scipy.io import wavfile
    from scipy.signal import resample

    rate, samples = wavfile.read(assets() / "sounds" / f"{name}.wav")
    wave = samples.astype(np.float32) / np.iinfo(samples.dtype).max
    wave = wave.mean(1) if wave.ndim == 2 else wave
    out = resample(wave, round(len(wave) * RATE / rate / (1 + pitch / 100)))
    return np.asarray(out, np.float32)


def person(name: str, pose: str, frame: int | str = "") -> str:
    """Name the picture of a character in a pose: walk 0..7, jump, fall, idle."""
    first, *rest = name.split("_")
    return f"animated_characters/{name}/{first}{''.join(word.title() for word in rest)}_{pose}{frame}"
