"""Write the page of detected objects: counts of the classes, and the pictures with their boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.data.coco_files import square
from counterpoint.data.shown import PALETTE, with_boxes
from counterpoint.errors import DataError
from counterpoint.report import page as parts
from counterpoint.report.found import found_sections
from counterpoint.report.page import Page
from counterpoint.words import counted

SHOWN, SIDE, ACROSS = 48, 256, 4  # pictures, pixels of their longer side, and pictures in a row
NAMED = 3  # objects that are named below a picture


def write_objects_report(
    path: Path, run: str, classes: Sequence[str], found: Sequence[Any], faults: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write the page and return its path.

    Args:
        path: The page to write.
        run: Name of the run.
        classes: Names of the classes.
        found: A `counterpoint.use.objects.Seen` of each picture.
        faults: Name and fault of each file that could not be read.
    """
    counts = Counter(of.label for one in found for of in one.objects)
    page = Page(
        "Detected objects",
        f"{counted(counts.total(), 'object')} in {counted(len(found), 'picture')} by {run}. The number beside a class is its "
        "score.",
    )
    holding = {name: sum(any(of.label == name for of in one.objects) for one in found) for name in classes}
    colours = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(classes)}
    rows = [(name, colours[name], counts[name], holding[name]) for name in sorted(classes, key=lambda n: -counts[n])]
    page.section("Classes", parts.table(["class", "colour", "objects", "pictures with one"], rows), anchor="classes")
    cells = [_cell(one, classes) for one in found[:SHOWN]]
    lines = [{"cells": cells[n : n + ACROSS]} for n in range(0, len(cells), ACROSS)]
    more = f" The first {SHOWN} of {len(found)}." if len(found) > SHOWN else ""
    figure = {"kind": "captioned", "rows": lines, "caption": f"Boxes in the colours of their classes.{more}"}
    (_, drawn), *_ = found_sections({"Pictures": figure})
    page.section("Pictures", drawn, anchor="pictures")
    if faults:
        page.section("Not read", parts.table(["file", "fault"], [list(one) for one in faults]), anchor="faults")
    return page.write(path)


def _cell(one: Any, classes: Sequence[str]) -> dict[str, str]:
    names = ", ".join(f"{of.label} {of.score:.2f}" for of in one.objects[:NAMED]) or "no object"
    name = Path(one.picture).name
    try:
        picture = square(Path(one.picture), SIDE)
    except DataError as error:  # it was read before
        return {"png": "", "text": f"{name}: {error}"}
    wide, high = picture.shown
    corners = np.array([[of.left, of.top, of.right, of.bottom] for of in one.objects], np.float32).reshape(-1, 4)
    labels = [classes.index(of.label) for of in one.objects]
    factor = SIDE / max(one.width, one.height)
    return {"png": with_boxes(picture.pixels[:high, :wide], corners * factor, labels, 1), "text": f"{name}: {names}"}
