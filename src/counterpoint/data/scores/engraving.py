"""The printed page: a strip engraved from the notes, and its simulated scan."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from counterpoint.data.images import Pixels
from counterpoint.data.scores.notes import Score
from counterpoint.errors import DataError
from counterpoint.words import counted

HEIGHT = 120  # pixels of a strip and of a window, which is square
FINE = 2  # strips are drawn at this many times their size and then reduced
SPACE = 3.6  # pixels between two staff lines: a grand staff with its ledger lines fills 80 pixels

Ink = NDArray[np.float32]


def engrave(score: Score, font: str = "Leipzig", **options: Any) -> tuple[Pixels, NDArray[np.float64]]:
    """Engrave a strip at FINE times its size.

    Args:
        score: the chorale.
        font: verovio's font.
        options: further options of verovio.

    Returns grey [FINE * HEIGHT, W], and [onsets] their positions in pixels from the left. Raises DataError when verovio
    cannot read or draw the piece.
    """
    import resvg_py
    import verovio

    verovio.enableLog(verovio.LOG_OFF)  # it writes many warnings about layout
    toolkit = verovio.toolkit()
    toolkit.setOptions(
        {
            "inputFrom": "musicxml",
            "breaks": "none",
            "header": "none",
            "footer": "none",
            "adjustPageWidth": True,
            "adjustPageHeight": True,
            "pageWidth": 100000,
            "mnumInterval": 0,
            "xmlIdSeed": 1,  # ids of elements that have none; random otherwise
            "font": font,
            **options,
        }
    )
    if not toolkit.loadData(score.xml):
        raise DataError(f"{score.name}: verovio cannot read it")
    svg = toolkit.renderToSVG(1)
    try:
        left, top, bottom, space, width, heads = _places(svg)
    except (ET.ParseError, ValueError, IndexError, StopIteration) as error:
        raise DataError(f"{score.name}: verovio's drawing does not have the expected form ({error})") from error
    missing = sum(note.head not in heads for note in score.notes)
    if missing:
        raise DataError(
            f"{score.name}: {missing} of {counted(len(score.notes), 'note is', 'notes are')} not in the engraving"
        )
    zoom = FINE * SPACE / space  # pixels per unit of the drawing
    png = resvg_py.svg_to_bytes(
        svg_string=svg, background="white", skip_system_fonts=True, width=max(1, round(width * zoom))
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("L")
    zoom = drawn.width / width
    # The grand staff is centred in the strip. The margins at both ends hold the outermost windows.
    margin = FINE * HEIGHT // 2
    strip = Image.new("L", (drawn.width + 2 * margin, FINE * HEIGHT), 255)
    strip.paste(drawn, (margin, round(FINE * HEIGHT / 2 - (top + bottom) / 2 * zoom)))
    middle = 0.59 * space  # from a head's left edge, which verovio gives, to its middle
    places: dict[float, list[float]] = {}
    for note in score.notes:
        places.setdefault(note.onset, []).append((left + heads[note.head] + middle) * zoom + margin)
    return np.asarray(strip), np.array([np.median(places[onset]) for onset in score.onsets])


def _places(svg: str) -> tuple[float, float, float, float, float, dict[str, float]]:
    """Return left margin, first and last staff line, space between lines, width, and heads by id, in the drawing's units."""
    space = "{http://www.w3.org/2000/svg}"
    inner = next(e for e in ET.fromstring(svg).iter(f"{space}svg") if e.get("viewBox") and e.get("class"))
    width = float(inner.get("viewBox", "").split()[2])
    page = next(e for e in inner.iter(f"{space}g") if e.get("class") == "page-margin")
    left, above = _translation(page)
    heads: dict[str, float] = {}
    lines: list[float] = []
    for group in page.iter(f"{space}g"):
        kind = (group.get("class") or "").split()
        if "note" in kind:
            head = next(e for e in group.iter(f"{space}g") if e.get("class") == "notehead")
            heads[group.get("id", "")] = _translation(next(head.iter(f"{space}use")))[0]
        elif "staff" in kind and len(lines) < 10:
            lines += [float(e.get("d", "").split()[1]) for e in group.findall(f"{space}path")[:5]]
    if len(lines) != 10:
        raise ValueError("no grand staff")
    return left, above + lines[0], above + lines[9], (lines[4] - lines[0]) / 4, width, heads


def _translation(element: ET.Element) -> tuple[float, float]:
    inside = element.get("transform", "").partition("translate(")[2].partition(")")[0].replace(",", " ").split()
    return float(inside[0]), float(inside[1])


def reduced(strip: NDArray[Any]) -> Ink:
    """Reduce a strip by the factor FINE: [FINE * HEIGHT, W] -> [HEIGHT, W // FINE], means of the blocks."""
    width = strip.shape[1] // FINE * FINE
    blocks = strip[:, :width].reshape(HEIGHT, FINE, width // FINE, FINE)
    return np.asarray(blocks.mean((1, 3)), np.float32)


def scan(strip: Pixels, rng: np.random.Generator) -> Pixels:
    """Simulate a scan from old paper, and reduce it: [FINE * HEIGHT, W] -> [HEIGHT, W // FINE]."""
    from scipy.ndimage import gaussian_filter

    fine = _turned(np.asarray(1 - strip / 255, np.float32), rng)
    # The print is bold or thin, and varies over the page.
    fine = np.clip(gaussian_filter(fine, rng.uniform(0.3, 0.8)) * rng.uniform(1.1, 2.4), 0, 1)
    fine *= 1 - rng.uniform(0.1, 0.4) * np.clip(0.5 + 0.5 * _clouds(rng, fine.shape, FINE * 12), 0, 1)
    ink = reduced(gaussian_filter(fine, rng.uniform(0.3, 1.1)))

    shape = ink.shape
    paper = rng.uniform(190, 240) + rng.uniform(3, 9) * _clouds(rng, shape, 80)
    grey = paper * (1 - ink) + rng.uniform(20, 75) * ink
    down, across = np.arange(shape[0])[:, None], np.arange(shape[1])
    for _ in range(rng.poisson(shape[1] / 150)):
        # A stain: an ellipse that fades outward, rarely strong.
        cy, cx = rng.uniform(0, HEIGHT), rng.uniform(0, shape[1])
        radius, long = rng.uniform(3, 25), rng.uniform(0.6, 1.6)
        near = slice(max(0, int(cx - 4 * radius * long)), int(cx + 4 * radius * long) + 1)
        distance = ((down - cy) / radius) ** 2 + ((across[near] - cx) / (radius * long)) ** 2
        grey[:, near] -= rng.exponential(14) * np.exp(-distance)
    specks = rng.integers(0, grey.size, rng.poisson(grey.size / 2500))
    grey.reshape(-1)[specks] -= rng.uniform(30, 120, len(specks))
    grey += rng.uniform(2, 7) * gaussian_filter(rng.standard_normal(shape), 0.5) * 2
    grey = 128 + (grey - 128) * rng.uniform(0.85, 1.1)
    return np.rint(np.clip(grey, 0, 255)).astype(np.uint8)


def _turned(ink: Ink, rng: np.random.Generator) -> Ink:
    """Rotate the strip by at most 1.5 degrees in both directions along the line: the slope is a sum of two waves.

    The middle of the strip moves only up and down, so that the onsets keep their positions.
    """
    from scipy.ndimage import map_coordinates

    high, wide = ink.shape
    x, y = np.arange(wide, dtype=np.float32), np.arange(high, dtype=np.float32)[:, None] - high / 2
    slope, drift = np.zeros(wide, np.float32), np.zeros(wide, np.float32)
    for share in (0.6, 0.4):
        turn = 2 * np.pi / (FINE * rng.uniform(250, 700))
        phase, steep = rng.uniform(0, 2 * np.pi), math.tan(math.radians(1.5)) * share * rng.uniform(0.3, 1)
        slope += steep * np.cos(turn * x + phase)
        drift += steep / turn * np.sin(turn * x + phase)
    return np.asarray(map_coordinates(ink, [y + high / 2 + drift, x - slope * y], order=1, mode="constant"), np.float32)


def _clouds(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> Ink:
    """Draw smooth noise of unit scale, with hills of `size` pixels in width."""
    small = rng.standard_normal((shape[0] // size + 2, shape[1] // size + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
