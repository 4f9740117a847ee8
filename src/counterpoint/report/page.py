"""Build a self-contained HTML page and its parts.

A page loads no other file: style, scripts and images are in it. Text is escaped. Only `Markup`, which the functions here
return, is inserted without escaping.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from counterpoint import __version__
from counterpoint.files import replacing

DASH = "–"  # the text of a missing value


@functools.cache
def environment(folder: str = "report") -> Environment:
    """Return the environment of a folder's templates in this package, with escaping and the filters of pages."""
    found = Environment(
        loader=PackageLoader("counterpoint", folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(DASH=DASH)
    found.filters.update(clock=clock, number=number)
    return found


def packaged(name: str) -> Markup:
    """Return a style sheet or script of this package without escaping."""
    loader = environment().loader
    assert loader is not None
    return Markup(loader.get_source(environment(), name)[0])


@dataclass
class Page:
    """A page under construction; `write` makes the file."""

    title: str
    subtitle: str = ""
    sections: list[tuple[str, str, Markup]] = field(default_factory=list)  # (anchor, heading, html)
    scripts: list[str] = field(default_factory=list)  # names of packaged scripts, each included once

    def section(self, heading: str, html: Markup | str, *, anchor: str | None = None) -> str:
        """Add a section and return its anchor. A plain `str` is escaped, `Markup` is not."""
        anchor = anchor or f"section-{len(self.sections) + 1}"
        self.sections.append((anchor, heading, Markup.escape(html)))
        return anchor

    def script(self, name: str) -> None:
        """Include a script of this package in the page."""
        if name not in self.scripts:
            self.scripts.append(name)

    def html(self) -> str:
        """Return the complete page as HTML."""
        return (
            environment()
            .get_template("page.html")
            .render(
                page=self,
                css=packaged("page.css"),
                scripts=[packaged(name) for name in self.scripts],
                version=__version__,
            )
        )

    def write(self, path: Path) -> Path:
        """Write the page atomically, over an older one. Return `path`."""
        html = self.html()
        with replacing(Path(path)) as file:
            file.write(html.encode("utf-8", errors="replace"))  # file names may hold bytes that are not text
        return Path(path)


def part(name: str, *args: Any, **kwargs: Any) -> Markup:
    """Render a macro of parts.html."""
    return Markup(getattr(environment().get_template("parts.html").module, name)(*args, **kwargs))


def join(*parts: Markup | str) -> Markup:
    """Concatenate parts."""
    return Markup("\n").join(parts)


def text(*paragraphs: str) -> Markup:
    """Render paragraphs of plain text."""
    return Markup("\n").join(Markup("<p>{}</p>").format(paragraph) for paragraph in paragraphs)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    caption: str = "",
    foot: Sequence[Any] | None = None,
) -> Markup:
    """Render a table. Numbers are aligned to the right, and the first cell of a row is its heading.

    Numbers are formatted with `number`; None and NaN become a dash. `foot` is a separate last row, such as a mean.
    """
    cells = [list(row) for row in rows]
    numeric = {i for row in cells for i, value in enumerate(row) if i and _is_number(value)}
    return part("table", columns, cells, caption, foot, numeric, _is_number)


def pairs(values: Mapping[str, Any], *, caption: str = "") -> Markup:
    """Render a table of names and values. The names of nested mappings become `outer.inner`."""
    return part("pairs", [(name, plain(value)) for name, value in flat(values)], caption)


def figures(*pictures: Markup) -> Markup:
    """Render figures side by side where the page is wide enough."""
    return Markup('<div class="figures">{}</div>').format(Markup("\n").join(pictures))


def figure(picture: Markup, caption: str = "") -> Markup:
    """Render a figure with its caption."""
    return part("figure", picture, caption)


def stats(items: Sequence[tuple[str, str, str]]) -> Markup:
    """Render headline numbers: (label, value, remark)."""
    return part("stats", items)


def notes(lines: Sequence[str]) -> Markup:
    """Render remarks as a list; empty when there are none."""
    return part("notes", lines) if lines else Markup("")


def details(summary: str, html: Markup) -> Markup:
    """Render a part that is collapsed until the reader opens it."""
    return part("details", summary, html)


def command(lines: str) -> Markup:
    """Render a command to copy."""
    return Markup("<pre><code>{}</code></pre>").format(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any, *, sign: bool = False) -> str:
    """Format a number: 4 digits after the point, fewer for large numbers, exponents for tiny ones (not with `sign`).

    >>> number(0.53241), number(1234.5), number(0.00004), number(None), number(0.05, sign=True)
    ('0.5324', '1234', '4.0e-05', '–', '+0.0500')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if not _is_number(value):
        return value if isinstance(value, str) else str(value)  # Markup stays Markup
    plus = "+" if sign else ""
    if isinstance(value, int) or math.isinf(value):
        return format(value, plus)
    size = abs(value)
    kind = ".1e" if 0 < size < 5e-4 and not sign else ".4f" if size < 10 else ".2f" if size < 1000 else ".0f"
    return format(value, plus + kind).replace("-", "−") if sign else format(value, kind)


def clock(seconds: float) -> str:
    """Format a time in a video, in seconds, as m:ss.s, from one hour on as h:mm:ss.s.

    >>> clock(59.96), clock(3725.04)
    ('1:00.0', '1:02:05.0')
    """
    tenths = round(max(0.0, seconds) * 10)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{minutes:02d}:{rest}" if hours else f"{minutes}:{rest}"


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested mappings to a list of (dotted name, value)."""
    out: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            out += flat(value, f"{prefix}{name}.")
        else:
            out.append((f"{prefix}{name}", value))
    return out


def plain(value: Any) -> str:
    """Format a setting as text."""
    if value is None or value in ({}, ""):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value) or DASH
    return str(value)
