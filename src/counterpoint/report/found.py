"""Convert the figures of a run to sections of its page.

The figures are plots of the shared space, galleries of retrievals, confusion matrices, maps over images, curves and tables.
A run's `figures.json` holds them: heading -> {"kind": ..., ...}.

    kind     holds
    points   "points" {name: [[x, y], ...]}, "axes" (two labels), "caption"
    gallery  "parts" [{"query", "key" (modalities), "rows" [{"query" (item), "found" [{"item", "similarity", "right"}]}]}],
             "items" {"<modality>/<item>": {"text"} or {"png"} or {"wav"} or {"numbers"}}
    matrix   "values" [[...]], "names", "columns" (default: "names"), "caption"; without it rows are true classes, columns predicted
    pictures "columns" [headings], "rows" [[PNG in base64, ...]], "caption"
    maps     "rows" [{"png", "maps" [{"text", "map" [[...]]}]}]: the position of each text in an image; "caption"
    joined   "rows" [{"left", "right" (png), "lines" [[x, y, x, y, right]], "text"}], "caption": lines between two images
    captioned "rows" [{"cells": [{"png", "text"}]}], "caption": pictures side by side, each with its own text
    curves   "series" {name: [[x...], [y...]]}, "xlabel", "caption"
    table    "columns" [...], "rows" [[...]], "caption"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from counterpoint.report import figures, page

LARGEST_MATRIX = 40  # maximum number of classes whose names and counts are legible


def found_sections(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """Return (heading, html) of every figure of a known kind. Figures of unknown kinds are left out."""
    draw = {
        "points": _points,
        "gallery": _gallery,
        "matrix": _matrix,
        "maps": _maps,
        "joined": _joined,
        "pictures": _pictures,
        "captioned": _captioned,
        "curves": _curves,
        "table": _table,
    }
    return [(heading, draw[part["kind"]](part)) for heading, part in found.items() if part.get("kind") in draw]


def _points(part: Mapping[str, Any]) -> Markup:
    drawn = figures.scatter(
        {name: np.asarray(points, float).reshape(-1, 2) for name, points in part["points"].items()},
        axes=(part["axes"][0], part["axes"][1]),
    )
    return page.figure(drawn, part.get("caption", ""))


def _curves(part: Mapping[str, Any]) -> Markup:
    series = {name: (np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in part["series"].items()}
    return page.figure(
        figures.curves(series, title=part.get("title", ""), xlabel=part["xlabel"]), part.get("caption", "")
    )


def _table(part: Mapping[str, Any]) -> Markup:
    return page.table(part["columns"], part["rows"], caption=part.get("caption", ""))


def _matrix(part: Mapping[str, Any]) -> Markup:
    values = np.asarray(part["values"], float)
    names = [str(name) for name in part["names"]]
    if "caption" in part:
        shown = names if len(values) <= LARGEST_MATRIX else []
        columns = [str(name) for name in part["columns"]] if "columns" in part else None
        return page.figure(figures.matrix(values, shown, alt=part["caption"], columns=columns), part["caption"])
    caption = "Rows: true classes. Columns: predicted classes. A row's shades are shares of its items."
    if len(values) > LARGEST_MATRIX:
        return page.join(page.figure(figures.matrix(values, []), caption), _confused(values, names))
    return page.join(page.figure(figures.matrix(values, names), caption), _confused(values, names))


def _confused(values: np.ndarray, names: Sequence[str]) -> Markup:
    """Return a table of the pairs of classes that are confused most often."""
    off = values.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:8]
    pairs = [divmod(int(n), len(names)) for n in order if off.flat[n] > 0]
    lines = [(names[a], names[b], int(off[a, b]), float(off[a, b] / max(1.0, values[a].sum()))) for a, b in pairs]
    return page.table(["true", "predicted", "items", "share of its class"], lines, caption="Most often confused.")


def _gallery(part: Mapping[str, Any]) -> Markup:
    items = part["items"]
    sections = []
    for block in part["parts"]:
        rows = []
        for row in block["rows"]:
            cells = [(items[f"{block['query']}/{row['query']}"], "", "asked")]
            for cell in row["found"]:
                state = "right" if cell["right"] else "wrong"
                cells.append((items[f"{block['key']}/{cell['item']}"], page.number(cell["similarity"]), state))
            rows.append(cells)
        sections.append((f"{block['query']} → {block['key']}", rows))
    return page.part("gallery", sections)


def _pictures(part: Mapping[str, Any]) -> Markup:
    return page.figure(page.part("pictures", part["columns"], part["rows"]), part.get("caption", ""))


def _maps(part: Mapping[str, Any]) -> Markup:
    pictures = []
    for row in part["rows"]:
        for found in row["maps"]:
            drawn = figures.overlay(
                row["png"], np.asarray(found["map"], float), alt=f"where '{found['text']}' is found"
            )
            pictures.append(page.figure(drawn, found["text"]))
    return page.join(page.text(part["caption"]) if "caption" in part else "", page.figures(*pictures))


def _joined(part: Mapping[str, Any]) -> Markup:
    pictures = []
    for row in part["rows"]:
        right = sum(bool(line[4]) for line in row["lines"])
        said = f"{row['text']}: {right} of {len(row['lines'])} right"
        pictures.append(page.figure(figures.joined(row["left"], row["right"], row["lines"], alt=said), said))
    return page.join(page.text(part["caption"]), page.figures(*pictures))


def _captioned(part: Mapping[str, Any]) -> Markup:
    """Show rows of pictures in a table, with the caption below."""
    cell = '<td><img src="data:image/png;base64,{}" alt="{}"><span class="remark">{}</span></td>'
    rows = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(Markup(cell).format(one["png"], one["text"], one["text"]) for one in row["cells"])
        )
        for row in part["rows"]
    )
    drawn = Markup('<div class="scroll"><table class="gallery captioned"><tbody>{}</tbody></table></div>').format(rows)
    return page.figure(drawn, part.get("caption", ""))
