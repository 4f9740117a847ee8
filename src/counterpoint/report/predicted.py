"""Write the page of predicted classes: counts, the confusion where classes are known, the surest and the least sure pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.shown import png
from counterpoint.report import page as parts
from counterpoint.report.found import found_sections
from counterpoint.report.page import Page, number
from counterpoint.words import counted

SHOWN = 30  # pictures in each gallery


def write_predicted_report(
    path: Path,
    run: str,
    score: str,
    classes: Sequence[str],
    found: Sequence[Any],
    read: Callable[[Sequence[int]], NDArray[np.uint8]],
    faults: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the page and return its path.

    Args:
        path: The page to write.
        run: Name of the run.
        score: What the scores are, such as "probability".
        classes: Names of the classes.
        found: A `counterpoint.use.predict.Prediction` of each picture.
        read: Function from positions to pixels [n, H, W, 3].
        faults: Name and fault of each file that could not be read.
    """
    page = Page(
        "Predicted classes", f"{counted(len(found), 'picture')} by {run}. The number beside a class is its {score}."
    )
    known = [one for one in found if one.true is not None]
    counts = Counter(one.label for one in found)
    rows = [(name, counts[name], counts[name] / len(found)) for name in sorted(counts, key=lambda n: -counts[n])]
    page.section("Classes", parts.table(["class", "pictures", "share"], rows), anchor="classes")
    if known:
        numbers = {name: n for n, name in enumerate(classes)}
        table = np.zeros((len(classes), len(classes)), int)
        for one in known:
            if one.true in numbers:
                table[numbers[one.true], numbers[one.label]] += 1
        right = sum(one.true == one.label for one in known) / len(known)
        (_, drawn), *_ = found_sections(
            {"confusion": {"kind": "matrix", "values": table.tolist(), "names": list(classes)}}
        )
        said = parts.text(
            f"The class is known for {counted(len(known), 'picture')}; {100 * right:.1f} % are classified right."
        )
        page.section("Known classes", parts.join(said, drawn), anchor="known")
    order = np.argsort([one.score for one in found], kind="stable")
    groups = [("Least sure", order[:SHOWN], "lowest"), ("Surest", order[SHOWN:][::-1][:SHOWN], "highest")]
    if len(order) <= SHOWN:
        groups = [("All pictures", order, "")]
    for heading, at, end in groups:
        rows_of_six = [at[n : n + 6].tolist() for n in range(0, len(at), 6)]
        cells = [{"cells": [_cell(found[n], read([n])[0]) for n in row]} for row in rows_of_six]
        caption = (
            f"The {counted(len(at), 'picture')} whose best class has the {end} score."
            if end
            else "The least sure come first."
        )
        (_, drawn), *_ = found_sections({heading: {"kind": "captioned", "rows": cells, "caption": caption}})
        page.section(heading, drawn, anchor=heading.lower().replace(" ", "-"))
    if faults:
        page.section("Not read", parts.table(["file", "fault"], [list(one) for one in faults]), anchor="faults")
    return page.write(path)


def _cell(one: Any, pixels: NDArray[np.uint8]) -> dict[str, str]:
    true = f", in the data {one.true}" if one.true not in (None, one.label) else ""
    return {"png": png(pixels), "text": f"{one.label} {number(one.score)}{true}"}
