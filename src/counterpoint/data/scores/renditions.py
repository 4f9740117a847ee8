"""Renditions: pieces engraved and played in either domain, from the cache or made into it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data import cached
from counterpoint.data.images import Pixels, some
from counterpoint.data.scores.engraving import FINE, HEIGHT, engrave, reduced, scan
from counterpoint.data.scores.notes import PACKAGES, Score, candidates, packages
from counterpoint.data.scores.synthesis import expressive, int16, play, recorded, strict
from counterpoint.errors import CounterpointError, DataError
from counterpoint.waiting import patient_track

VERSION = 2  # of the reading, drawing and playing: increase it with every change, or stale caches are read
DOMAINS = ("clean", "real")
FONTS = ("Bravura", "Leland", "Gootville", "Petaluma")  # of the real domain
PROGRAMS = (1, 2, 3, 4, 5, 6)  # of the real domain: bright and electric pianos, honky-tonk, harpsichord


def role_of(number: int, pieces: int) -> str:
    """Return the role of piece `number` of `pieces`: train, test or unpaired."""
    return "train" if number < pieces // 3 else "test" if number < pieces // 3 + pieces // 6 else "unpaired"


@dataclass(frozen=True)
class Rendition:
    """A piece in one domain; the score or the sound may be empty."""

    name: str
    number: int
    domain: int  # of DOMAINS
    strip: Pixels  # [HEIGHT, W], or [HEIGHT, 0]
    x: NDArray[np.float32]  # [onsets] pixels
    wave: NDArray[np.int16]  # [n], or [0]
    at: NDArray[np.float32]  # [onsets] seconds


def render(
    score: Score, number: int, domain: int, seed: int = 0, *, sheet: bool = True, sound: bool = True
) -> Rendition:
    """Engrave and play a piece. The same name, domain and seed give the same bytes.

    Args:
        score: the piece.
        number: its number in the set.
        domain: 0 clean, 1 real.
        seed: seed of the set.
        sheet, sound: false leaves the score or the sound empty.

    Raises DataError as `engrave` does.
    """
    digest = hashlib.sha256(f"{score.name}/{DOMAINS[domain]}/{seed}".encode()).digest()
    page, player = (np.random.default_rng([part, *digest[:16]]) for part in (0, 1))
    strip, x = np.empty((HEIGHT, 0), np.uint8), np.zeros(len(score.onsets))
    wave, at = np.empty(0, np.int16), np.zeros(len(score.onsets))
    if sheet and domain == 0:
        fine, x = engrave(score)
        strip = np.rint(reduced(fine)).astype(np.uint8)
    elif sheet:
        fine, x = engrave(
            score,
            FONTS[page.integers(len(FONTS))],
            spacingLinear=round(page.uniform(0.22, 0.32), 3),
            spacingNonLinear=round(page.uniform(0.55, 0.65), 3),
            staffLineWidth=round(page.uniform(0.13, 0.24), 3),
        )
        strip = scan(fine, page)
    if sound and domain == 0:
        strikes, at = strict(score, player)
        wave = int16(play(strikes), 0.7)
    elif sound:
        strikes, at = expressive(score, player)
        program = PROGRAMS[player.integers(len(PROGRAMS))]
        dry = play(strikes, program, player.uniform(-30, 30))
        wave = int16(recorded(dry, player), player.uniform(0.3, 0.95))
    return Rendition(score.name, number, domain, strip, (x / FINE).astype(np.float32), wave, at.astype(np.float32))


def _build(pieces: int, seed: int) -> tuple[list[Rendition], list[str]]:
    """Return all renditions of the set, and messages on pieces that cannot be read or drawn; other pieces replace these."""
    out: list[Rendition] = []
    left_out: list[str] = []
    found = candidates(seed, left_out)
    ready = list(itertools.islice(found, pieces))
    too_few = "scores has {} pieces of fitting length with different tunes (seed {}), got pieces={}"
    if len(ready) < pieces:
        raise CounterpointError(too_few.format(len(ready), seed, pieces))
    remaining = itertools.chain(ready, found)
    for number in patient_track(range(pieces), "engraving scores"):
        role = role_of(number, pieces)
        for score in remaining:
            try:
                if role == "unpaired":  # score and sound alternate
                    out.append(render(score, number, 1, seed, sheet=number % 2 == 0, sound=number % 2 == 1))
                else:
                    made = [render(score, number, domain, seed) for domain in range(2 if role == "test" else 1)]
                    out += made
            except DataError as error:
                left_out.append(str(error))
                continue
            break
        else:
            raise CounterpointError(too_few.format(number, seed, pieces))
    return out, left_out


def stored(pieces: int, seed: int, notes: list[str]) -> list[Rendition]:
    """Return the renditions of the set, from the cache or built into it; `notes` receives notes for the user."""
    packages()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    key = (VERSION, versions, pieces, seed)
    made, left_out = cached.build_once("scores", key, lambda: _pack(*_build(pieces, seed)), _unpack, notes=notes)
    if left_out:
        notes.append(f"pieces left out ({len(left_out)}): {some(left_out)}")
    return made


def _pack(made: list[Rendition], left_out: list[str]) -> dict[str, NDArray[Any]]:
    return {
        "names": np.array([r.name for r in made]),
        "facts": np.array([(r.number, r.domain, r.strip.shape[1], len(r.wave), len(r.at)) for r in made], np.int64),
        "strips": np.concatenate([r.strip for r in made], axis=1),
        "waves": np.concatenate([r.wave for r in made]),
        "x": np.concatenate([r.x for r in made]),
        "at": np.concatenate([r.at for r in made]),
        "left_out": np.array(left_out, dtype=np.str_),
    }


def _unpack(stored: dict[str, NDArray[Any]]) -> tuple[list[Rendition], list[str]]:
    facts = stored["facts"]
    cuts = np.cumsum(facts[:, 2:], axis=0)[:-1].T
    made = [
        Rendition(str(name), int(number), int(domain), strip, x, wave, at)
        for name, (number, domain), strip, wave, x, at in zip(
            stored["names"],
            facts[:, :2],
            np.split(stored["strips"], cuts[0], axis=1),
            np.split(stored["waves"], cuts[1]),
            np.split(stored["x"], cuts[2]),
            np.split(stored["at"], cuts[2]),
            strict=True,
        )
    ]
    return made, [str(line) for line in stored["left_out"]]
