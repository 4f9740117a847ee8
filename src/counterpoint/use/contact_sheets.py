"""Draw contact sheets: a row of pictures of each moment in one PNG file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from counterpoint.files import replacing
from counterpoint.report.page import clock
from counterpoint.tasks.moments import Detection, Interval

ACROSS, MOST_ROWS = 6, 24
WIDTH, GAP, LABEL = 240, 6, 20  # pixels: of a picture, between pictures, and of the line above a row


def write_contact_sheet(found: Detection, path: Path) -> Path | None:
    """Write six pictures of each moment of a video, at even steps; of the 24 highest moments, in order of time.

    Return `path`; None where there is no moment or no picture can be decoded.
    """
    from counterpoint.data.media import frames_at

    moments = sorted(sorted(found.intervals, key=lambda i: -i.score)[:MOST_ROWS], key=lambda i: i.start)
    times = [float(t) for m in moments for t in _times(m)]
    pictures = frames_at(found.video, times, width=WIDTH, steady=found.steady) if times else []
    height = max((len(p) for p in pictures if p is not None), default=0)
    if not height:
        return None
    row = LABEL + height + GAP
    sheet = Image.new("RGB", (ACROSS * (WIDTH + GAP) + GAP, LABEL + len(moments) * row + GAP), (24, 24, 27))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    pen.text((GAP, GAP), f"{found.video.name}   found by {found.run}", (170, 170, 180), font)
    for number, moment in enumerate(moments):
        top = GAP + LABEL + number * row
        text = f"{clock(moment.start)} to {clock(moment.end)}   score {moment.score:.2f}"
        pen.text((GAP, top + 2), text, (235, 235, 240), font)
        for column in range(ACROSS):
            picture = pictures[number * ACROSS + column]
            if picture is not None:
                sheet.paste(Image.fromarray(picture), (GAP + column * (WIDTH + GAP), top + LABEL))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    with replacing(path) as file:
        file.write(out.getvalue())
    return path


def _times(moment: Interval) -> np.ndarray:
    """Return six times inside a moment, at the middles of six equal parts."""
    return moment.start + (np.arange(ACROSS) + 0.5) * (moment.end - moment.start) / ACROSS
