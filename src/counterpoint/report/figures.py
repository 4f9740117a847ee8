"""Draw the pages' figures: matplotlib curves as inline SVG in the page's colours, and the paths of the timelines."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from counterpoint.words import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib cannot use CSS variables, so it draws in these colours, which `svg` then replaces by variables. Thus one
# drawing serves the light, the dark and the printed page.
_STAND_INS = {
    "#010203": "var(--ink)",
    "#010204": "var(--soft)",
    "#010205": "var(--grid)",
    **{f"#01021{i}": f"var(--s{i})" for i in range(1, 7)},
}
INK, SOFT, GRID, *SERIES = _STAND_INS
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_COUNT = itertools.count(1)
MAX_POINTS = 1000  # a curve with more points is drawn as the least and the greatest value of each pixel column
_STYLE: Any = {  # Any: rc_context wants its keys as literals
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "counterpoint",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
}


def svg(figure: Figure, alt: str) -> Markup:
    """Convert a matplotlib figure to an inline SVG element with the text alternative `alt`."""
    out = io.StringIO()
    with warnings.catch_warnings():
        # Text stays text: the browser has the glyphs, and matplotlib only estimates the width.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # `savefig` would draw the whole figure once for its layout and once more for the file.
        layout = figure.get_layout_engine()
        if layout is not None:
            layout.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    drawn = out.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn).replace("xlink:href", "href")
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)  # it would apply to the whole page; see page.css
    # Several drawings share a page, even equal ones; their ids must be unique.
    prefix = f"f{next(_COUNT)}-"
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", drawn)
    for colour, variable in _STAND_INS.items():
        drawn = drawn.replace(colour, variable)
    attributes = Markup('<svg role="img" aria-label="{}" ').format(alt)
    return Markup(attributes + Markup(drawn[len("<svg ") :].strip()))


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _legend(axes: Axes, names: int) -> None:
    """Place a legend of up to 4 names in the frame. Place a longer one beside it, where it covers no curve."""
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend(fontsize=8.5, **(beside if names > 4 else {"loc": "best"}))


def _literal(label: str) -> str:
    # matplotlib leaves labels that begin with "_" out of the legend.
    return f" {label}" if label.startswith("_") else label


def curves(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str,
    xlabel: str,
    families: Mapping[str, str] | None = None,
) -> Markup:
    """Draw curves in one frame. Return an SVG element whose text alternative has first, last and extreme values.

    Args:
        series: Maps names to (x [N], y [N]). NaN makes a gap; a single point between gaps is drawn as a dot.
        title: Title above the frame, and beginning of the text alternative.
        xlabel: Label of the x axis.
        families: Maps names to families. Curves of a family share a colour and differ in their dashes. Default: each curve
            has its own colour.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_STYLE):
        figure, axes = _axes(5.0, 3.0)
        told = []
        colours: dict[str, list[str]] = {}  # family -> its curves so far
        for name, (x, y) in series.items():
            x, y = np.asarray(x, float), np.asarray(y, float)
            y = np.where(np.isfinite(y), y, np.nan)
            finite = y[~np.isnan(y)]
            if len(finite) == 0:
                continue
            told.append(
                f"{name} from {finite[0]:.4g} to {finite[-1]:.4g}, between {finite.min():.4g} and {finite.max():.4g}"
            )
            if len(y) > MAX_POINTS:
                columns, low, high = envelope(y, MAX_POINTS // 2)
                x = np.repeat(np.interp(columns, np.arange(len(x)), x), 2)
                y = np.stack([low, high], 1).ravel()
            family = families[name] if families else name
            members = colours.setdefault(family, [])
            members.append(name)
            number = list(colours).index(family)
            style = _DASHES[(len(members) - 1 + number // len(SERIES)) % len(_DASHES)]
            # A single point between two gaps makes no line.
            padded = np.pad(np.isfinite(y), 1)
            alone = padded[1:-1] & ~padded[:-2] & ~padded[2:]
            axes.plot(
                x,
                y,
                label=_literal(name),
                color=SERIES[number % len(SERIES)],
                linestyle=style,
                marker="o" if alone.any() else None,
                markevery=np.flatnonzero(alone).tolist(),
                markersize=4,
            )
        axes.set_title(_literal(title), loc="left", fontsize=10.5)
        axes.set_xlabel(_literal(xlabel))
        axes.grid(True, linewidth=0.8)
        axes.set_axisbelow(True)
        counts = all(np.all(np.asarray(x, float) % 1 == 0) for x, _ in series.values())  # epochs, steps, seconds
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=counts, steps=[1, 2, 2.5, 5, 10]))
        if len(told) > 1:
            _legend(axes, len(told))
        if not told:
            axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=SOFT)
        return svg(figure, f"{title}, by {xlabel}: " + ("; ".join(told) or "no values"))


def effects(comparisons: Sequence[Mapping[str, Any]], *, metric: str) -> Markup:
    """Draw the paired differences of each comparison: seeds as dots, their mean and interval, a line at zero.

    Args:
        comparisons: Mappings with arm, baseline, differences [seeds], mean, low, high (None: no interval). Optional: label
            (the difference as text), test and margin (see `counterpoint.lab.statistics`).
        metric: Name of the metric, for the text alternative.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, axes = _axes(7.2, 0.95 + 0.55 * max(1, len(comparisons)))
        told = []
        for row, comparison in enumerate(comparisons):
            colour = SERIES[row % len(SERIES)]
            dots = np.asarray([np.nan if d is None else d for d in comparison["differences"]], float)
            # The dots are slightly below the interval, so that neither hides the other.
            axes.plot(
                dots, np.full(len(dots), row + 0.24), "o", markersize=4.5, color=colour, alpha=0.65, linestyle="none"
            )
            mean, low, high = comparison["mean"], comparison["low"], comparison["high"]
            if mean is None:
                continue
            said = f"{comparison['arm']} minus {comparison['baseline']}: mean {mean:+.4f}"
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color=colour, linewidth=2.6, solid_capstyle="butt")
                axes.plot([low, high], [row, row], "|", color=colour, markersize=9, markeredgewidth=1.6)
                said += f", interval {low:+.4f} to {high:+.4f}"
            for margin in margins(comparison):
                axes.plot([margin, margin], [row - 0.36, row + 0.36], color=SOFT, linestyle=":", linewidth=1.4)
            axes.plot([mean], [row], "D", color=colour, markersize=7)
            told.append(said)
        axes.axvline(0, color=INK, linewidth=1.1)
        axes.set_yticks(
            range(len(comparisons)),
            [_literal(c.get("label") or f"{c['arm']} − {c['baseline']}") for c in comparisons],
            color=INK,
        )
        axes.set_ylim(len(comparisons) - 0.45, -0.5)
        axes.set_xlabel(_literal(f"difference in {metric}"))
        axes.grid(True, axis="x", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return svg(figure, f"Paired differences in {metric}. " + "; ".join(told))


def margins(comparison: Mapping[str, Any]) -> list[float]:
    """Return the margins of a comparison's test, other than zero, as bounds to draw."""
    margin = float(comparison.get("margin") or 0.0)
    if not margin:
        return []
    return {"non-inferiority": [-margin], "equivalence": [-margin, margin]}.get(comparison.get("test", ""), [margin])


MOST_CLOUDS = 20  # so many names fit into a legend beside a scatter


def look(number: int) -> tuple[str, str]:
    """Return the colour and the mark of a cloud of points. The first 42 combinations all differ."""
    marks = "osD^vPX"  # one more than the number of colours
    return SERIES[number % len(SERIES)], marks[number % len(marks)]


def scatter(points: Mapping[str, NDArray[np.floating]], *, axes: tuple[str, str]) -> Markup:
    """Draw clouds of points in one frame, each with its own colour and mark. More than 20 have one look, and no legend.

    Args:
        points: Maps names to points [N, 2].
        axes: Labels of x and y.
    """
    import matplotlib as mpl

    if len(points) > MOST_CLOUDS:
        points = {f"{len(points)} groups": np.concatenate([np.asarray(values) for values in points.values()])}
    with mpl.rc_context(_STYLE):
        figure, frame = _axes(6.0, 4.2)
        for number, (name, values) in enumerate(points.items()):
            colour, mark = look(number)
            frame.plot(values[:, 0], values[:, 1], mark, markersize=3.2, alpha=0.6, color=colour, label=_literal(name))
        frame.set_xlabel(_literal(axes[0]))
        frame.set_ylabel(_literal(axes[1]))
        frame.grid(True, linewidth=0.8)
        frame.set_axisbelow(True)
        if len(points) > 1:  # a lone mark in a legend looks like a point
            _legend(frame, len(points))
        told = "; ".join(
            f"{len(values)} of {name} around {values[:, 0].mean():.3g}, {values[:, 1].mean():.3g}"
            for name, values in points.items()
            if len(values)
        )
        return svg(figure, f"{axes[0]} and {axes[1]}: {told}")


def matrix(
    values: NDArray[np.floating], names: Sequence[str], alt: str = "", columns: Sequence[str] | None = None
) -> Markup:
    """Draw a table as shades: counts in shares of their row's sum, other numbers between the least and the largest.

    Args:
        values: Counts, or numbers of which some are not whole, [classes, classes] or [classes, columns].
        names: Names of the classes; the values are then written as numbers, too. Empty: shades without names and numbers.
        alt: Description for readers who do not see it. Default: that of a confusion matrix.
        columns: Names of the columns. Default: `names`.
    """
    import matplotlib as mpl
    from matplotlib.patches import Rectangle

    across = names if columns is None else columns

    with mpl.rc_context(_STYLE):
        side = min(9.0, 1.6 + 0.36 * max(4, len(names)))
        figure, frame = _axes(side if columns is None else min(9.0, 2.6 + 0.5 * len(across)), side)
        counts = np.array_equal(values, values.round())
        share = values / np.maximum(values.sum(1, keepdims=True), 1)
        if not counts:
            share = 0.05 + 0.9 * (values - values.min()) / max(float(np.ptp(values)), 1e-12)
        # One colour of the page in several opacities: the same drawing serves light and dark pages.
        for (row, column), value in np.ndenumerate(share):
            if value > 0:
                frame.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=SERIES[1], alpha=float(value), lw=0))
                if names:
                    said = f"{values[row, column]:.0f}" if counts else f"{values[row, column]:.2f}"
                    frame.text(column, row, said, ha="center", va="center", fontsize=7, color=INK)
        frame.set_xlim(-0.5, values.shape[1] - 0.5)
        frame.set_ylim(len(values) - 0.5, -0.5)
        frame.set_aspect("equal")
        if names:
            short, wide = ([_literal(n if len(n) < 15 else f"{n[:13]}…") for n in side] for side in (names, across))
            frame.set_xticks(range(len(across)), wide, rotation=60, ha="right", rotation_mode="anchor")
            frame.set_yticks(range(len(names)), short)
        frame.tick_params(length=0)
        right = float(np.trace(values) / max(1.0, values.sum()))
        return svg(
            figure,
            alt
            or f"Confusion of {counted(len(values), 'class')}; {right:.0%} of {counted(int(values.sum()), 'item')} on the diagonal",
        )


def overlay(png: str, shades: NDArray[np.floating], *, alt: str) -> Markup:
    """Draw a map over an image. Cells have the page's first colour; their opacity increases with the map's value.

    Args:
        png: The image, PNG in base64.
        shades: The map, [rows, columns], non-negative. The largest value has an opacity of 70 %.
        alt: Text alternative.
    """
    most = float(shades.max()) or 1.0
    cells = Markup("").join(
        Markup('<rect x="{}" y="{}" width="1.02" height="1.02" fill="var(--s1)" fill-opacity="{}"/>').format(
            column, row, f"{0.7 * value / most:.2f}"
        )
        for (row, column), value in np.ndenumerate(shades)
        if value > 0.02 * most
    )
    rows, columns = shades.shape
    return Markup(
        '<div class="overlay" role="img" aria-label="{}"><img src="data:image/png;base64,{}" alt="">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none">{}</svg></div>'
    ).format(alt, png, columns, rows, cells)


def joined(left: str, right: str, lines: Sequence[tuple[float, float, float, float, bool]], *, alt: str) -> Markup:
    """Draw two images side by side with lines between their points.

    Args:
        left, right: The images, PNG in base64, drawn as squares.
        lines: For each line x and y in the left image, x and y in the right one, all 0 to 1, and whether it is right. Wrong
            lines are dashed, in the second colour.
        alt: Text alternative.
    """
    images = Markup("").join(
        Markup(
            '<image x="{}" width="1" height="1" preserveAspectRatio="none" href="data:image/png;base64,{}"/>'
        ).format(x, png)
        for x, png in (("0", left), ("1.5", right))
    )
    stroke = Markup('<path d="M{:.3f} {:.3f}L{:.3f} {:.3f}" fill="none" stroke-width=".014" stroke="var(--{})"{}/>')
    end = Markup('<circle cx="{:.3f}" cy="{:.3f}" r=".02" fill="var(--{})"/>')
    drawn = []
    for x1, y1, x2, y2, fits in lines:
        colour, dashes = ("s1", "") if fits else ("s2", Markup(' stroke-dasharray=".04 .03"'))
        drawn.append(stroke.format(x1, y1, 1.5 + x2, y2, colour, dashes))
        drawn += [end.format(x1, y1, colour), end.format(1.5 + x2, y2, colour)]
    return Markup('<svg class="joined" role="img" aria-label="{}" viewBox="-.03 -.03 2.56 1.06">{}{}</svg>').format(
        alt, images, Markup("").join(drawn)
    )


def envelope(values: NDArray[np.floating], columns: int) -> tuple[NDArray[np.float64], NDArray[Any], NDArray[Any]]:
    """Return the middle index, the least and the greatest value of each of `columns` equal parts, without NaN.

    Each result is [columns]. `columns` must not exceed the number of values.
    """
    edges = np.linspace(0, len(values), columns + 1).astype(int)
    low, high = np.fmin.reduceat(values, edges[:-1]), np.fmax.reduceat(values, edges[:-1])
    return (edges[:-1] + edges[1:] - 1) / 2, low, high


def path(x: ArrayLike, y: ArrayLike) -> str:
    """Return the `d` of an SVG path through the points, interrupted where y is NaN."""
    parts, pen_down = [], False
    for a, b in zip(np.asarray(x, float), np.asarray(y, float), strict=True):
        if np.isnan(b):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{_short(a)} {_short(b)}")
        pen_down = True
    return "".join(parts)


def bars(spans: Sequence[tuple[float, float]], height: float, least: float) -> str:
    """Return the `d` of an SVG path that fills spans (left, right) from 0 to `height`. Each is at least `least` wide."""
    return "".join(
        f"M{_short(left)} 0h{_short(max(right - left, least))}v{_short(height)}h-{_short(max(right - left, least))}z"
        for left, right in spans
    )


def _short(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def ticks(length: float, most: int = 7) -> list[float]:
    """Return at most `most` round times from 0 to `length` seconds, for an axis."""
    if not length > 0:
        return [0.0]
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400)
    step = next((s for s in steps if length / s <= most - 1), math.ceil(length / (most - 1) / 86400) * 86400)
    return [i * step for i in range(int(length / step + 1e-9) + 1)]
