"""Write the page of a run: headline metrics, curves, settings, environment, and the command that repeats it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from markupsafe import Markup

from counterpoint import catalog
from counterpoint.engine.run import METRICS, REPORT, Run
from counterpoint.errors import CounterpointError
from counterpoint.files import quoted
from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.found import found_sections
from counterpoint.report.page import Page, number
from counterpoint.words import counted

AXES = ("epoch", "step")  # columns of the position, not of a metric
GROUPS = {"train": "Training", "test": "Test metrics", "valid": "Validation metrics", "lr": "Learning rates"}
PER_FRAME = 6  # maximum number of curves in a frame
SMALLER_IS_BETTER = ("loss", "error", "err", "perplexity", "mae", "mse", "rmse", "nll", "eer", "fid")


def write_run_report(run: Run) -> Path:
    """Write `report.html` into the directory of an open run and return its path.

    Metrics, figures and environment may be missing. Raises RunError, naming the file, when one cannot be read.
    """
    config = run.config
    rows = run.metrics(required=False)
    page = Page(f"{run.slug} on {config.get('data', 'unknown data')}", str(config.get("title") or ""))
    page.section("Outcome", outcome(rows, run.path / METRICS, run.chance()), anchor="outcome")
    for heading, html in found_sections(run.figures()):
        page.section(heading, html)
    for heading, html in curve_sections(rows):
        page.section(heading, html)
    page.section(
        "Do it again", parts.join(parts.command(reproduce(config)), parts.text(_where(run.path))), anchor="again"
    )
    page.section("Settings", parts.pairs(config), anchor="settings")
    if speed := run.speed():
        page.section("Speed", parts.pairs(speed), anchor="speed")
    page.section("Environment", parts.pairs(run.environment()), anchor="environment")
    return page.write(run.path / REPORT)


def _where(run_dir: Path) -> str:
    return f"Measure these weights again: counterpoint evaluate {quoted(run_dir)}"


def reproduce(config: Mapping[str, Any]) -> str:
    """Return the command that trains this run again. It has every setting, so it does not depend on later defaults."""
    if str(config.get("data", "")).startswith("memory:"):
        return _in_python(config)
    parent = config.get("parent")
    start = f"--continue {quoted(str(parent['run']))}" if isinstance(parent, Mapping) and parent.get("run") else None
    head = f"counterpoint train {start or quoted(str(config.get('slug', '')))}"
    lines = [f"--{name} {quoted(str(config[name]))}" for name in ("data", "seed") if config.get(name) is not None]
    settings = config.get("config")
    lines += options(settings if isinstance(settings, Mapping) else {}, str(config.get("slug", "")))
    return " \\\n  ".join([head, *lines])


def option_names(slug: str) -> dict[str, str | None]:
    """Return the options of a system's settings that are not named like the setting, None for no option at all.

    The names are empty for a system that this version does not know.

    >>> option_names("finetune")["start"]
    'from'
    """
    try:
        kind = type(catalog.load_system(slug).config())
    except CounterpointError:
        return {}
    found: dict[str, str | None] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if name != "parts" and "Suppress" in map(str, marks):
            found[name] = None
        elif named := next((mark.name for mark in marks if getattr(mark, "name", None)), None):
            found[name] = named
    return found


def _in_python(config: Mapping[str, Any]) -> str:
    """Return the Python call that trains this run again, on the same object in memory."""
    settings = config.get("config")
    flat: dict[str, Any] = {}
    for name, value in (settings if isinstance(settings, Mapping) else {}).items():
        flat |= {f"{name}.{below}": v for below, v in value.items()} if isinstance(value, Mapping) else {name: value}
    lines = [f"    {name}={value!r}," for name, value in flat.items() if "." not in name]
    parts = {name: value for name, value in flat.items() if "." in name}
    if parts:
        lines.append(f"    **{parts!r},")
    head = [f"# OBJECT is the data: {config['data']}", "import counterpoint as cp", ""]
    call = [f"cp.train(\n    {config.get('slug', '')!r},", f"    data=OBJECT,\n    seed={config.get('seed', 0)!r},"]
    return "\n".join([*head, *call, *lines, ")"])


def options(settings: Mapping[str, Any], slug: str = "", prefix: str = "") -> list[str]:
    """Format settings as options of `train`, quoted for a shell. A part's settings begin with its name: --mochi.hardest 64.

    Args:
        settings: Settings by name. Those that the system's command has no option for are left out.
        slug: The system. Default: each setting has an option of its name.
        prefix: The part's name with a point.
    """
    names = option_names(slug)
    lines: list[str] = []
    for name, value in settings.items():
        if (named := names.get(name, name)) is None:
            continue
        option = f"{prefix}{str(named).replace('_', '-')}"
        if isinstance(value, Mapping):  # "parts" holds the parts by name
            lines += options(value, prefix="" if name == "parts" and not prefix else f"{option}.")
        elif isinstance(value, bool):
            lines.append(f"--{option}" if value else f"--{prefix}no-{option.removeprefix(prefix)}")
        elif isinstance(value, list | tuple):
            lines.append(" ".join([f"--{option}", *(quoted(str(v)) for v in value)]))
        else:
            lines.append(f"--{option} {quoted(str(value))}")
    return lines


def columns(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the names of the metrics, in order of appearance, without epoch and step."""
    return [name for name in dict.fromkeys(key for row in rows for key in row) if name not in AXES]


def values(rows: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    """Return one column [epochs], with NaN where a row lacks it."""
    return np.array([row.get(name, math.nan) for row in rows], float)


def epochs(rows: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Return the epoch of every row [epochs], from 1 as the progress bar counts; the file counts from 0.

    A row without the column has its own number.
    """
    found = values(rows, "epoch")
    return np.where(np.isnan(found), np.arange(len(rows)), found) + 1


def group(name: str) -> str:
    """Return the group of a metric, the part before the slash; "" for a name without one.

    >>> group("test/accuracy"), group("lr"), group("seconds")
    ('test', 'lr', '')
    """
    return name.partition("/")[0] if "/" in name or name in GROUPS else ""


def best(name: str, column: np.ndarray) -> int | None:
    """Return the index of the best value: the smallest for losses and errors, else the largest. None without a value."""
    if not np.isfinite(column).any():
        return None
    column = np.where(np.isfinite(column), column, np.nan)
    return int(np.nanargmin(column) if smaller_is_better(name) else np.nanargmax(column))


def smaller_is_better(name: str) -> bool:
    """Return whether a metric's name has a word of losses and errors, such as "loss" or "mae"."""
    words = name.rpartition("/")[2].lower().replace("-", "_").split("_")
    return bool(set(words) & set(SMALLER_IS_BETTER))


def last_mean(column: np.ndarray, count: int = 3) -> float:
    """Return the mean of the last `count` finite values; NaN when there are none."""
    there = column[np.isfinite(column)]
    return float(there[-count:].mean()) if len(there) else math.nan


def _last(column: np.ndarray) -> float:
    there = column[np.isfinite(column)]
    return float(there[-1]) if len(there) else math.nan


def outcome(rows: Sequence[Mapping[str, float]], file: Path, chance: Mapping[str, float]) -> Markup:
    """Render a run's headline metrics and their table.

    Args:
        rows: The rows of its metrics, one for each epoch.
        file: The file of metrics, for the message where there is no row.
        chance: The chance level of each test metric that has one.
    """
    if not rows:
        state = "holds no epoch yet" if file.is_file() else "does not exist yet"
        return parts.text(f"{file.name} {state}: the run stopped before its first epoch ended, or is still in it.")
    names = columns(rows)
    for prefix in ("test", "valid", "train"):
        headline = [name for name in names if group(name) == prefix]
        if headline:
            break
    else:
        headline = names
    when = epochs(rows)
    cards, lines, most = [], [], 0
    for name in headline:
        column = values(rows, name)
        index = best(name, column)
        label = name.partition("/")[2] or name
        at = parts.DASH if index is None else f"{when[index]:g}"
        measured = int(np.isfinite(column).sum())
        most = max(most, measured)
        top = column[index] if index is not None else None
        level = chance.get(label)
        # A mean and a best value need more than one measurement.
        several = [last_mean(column), top, at] if measured > 1 else [None, None, parts.DASH]
        lines.append((label, _last(column), *several, *([level] if chance else [])))
        how = (
            f"mean of the last {min(3, measured)} · best {number(top)} at epoch {at}" if measured > 1 else f"epoch {at}"
        )
        cards.append(
            (label, number(last_mean(column)), how + (f" · chance {number(level)}" if level is not None else ""))
        )
    judged = (
        "The best epoch is chosen on the same data that it is measured on, so compare runs by the mean of the last "
        f"{min(3, most)}."
        if most > 1
        else "Measured once."
    )
    heads = ["metric", "last", f"mean of last {min(3, max(2, most))}", "best", "at epoch"]
    if most < 2:
        lines = [(line[0], line[1], *line[5:]) for line in lines]
        heads = heads[:2]
    return parts.join(
        parts.stats(cards[:4]),
        parts.table(
            [*heads, *(["chance"] if chance else [])],
            lines,
            caption=f"After {counted(len(rows), 'epoch')}. {judged}",
        ),
    )


def curve_sections(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, Markup]]:
    """Return (heading, figures) for every group of columns with a value. The part before the slash names the group.

    A single row has tables in place of figures: its curves would be dots. `outcome` shows its headline group.
    """
    if not rows:
        return []
    when = epochs(rows)
    grouped: dict[str, list[str]] = {}
    for name in columns(rows):
        # A column with one value among many epochs is only in the table of outcomes: its curve would be a dot.
        if np.isfinite(values(rows, name)).sum() >= min(2, len(rows)):
            grouped.setdefault(group(name), []).append(name)
    # The metrics that judge the run come first, then those that explain it.
    order = ["test", "valid", "train"]
    sections = []
    shown = next((prefix for prefix in order if prefix in grouped), None)
    for prefix in sorted(grouped, key=lambda p: (order.index(p) if p in order else len(order), p == "", p)):
        heading = GROUPS.get(prefix, prefix or "Other curves")
        if len(rows) == 1:
            if prefix != shown:
                lines = [(name.removeprefix(f"{prefix}/"), values(rows, name)[0]) for name in grouped[prefix]]
                sections.append((heading, parts.table(["metric", "value"], lines)))
            continue
        pictures = []
        for frame in frames(grouped[prefix], rows):
            # "lr" and "lr/1" keep their whole names.
            series = {
                name if prefix in frame else name.removeprefix(f"{prefix}/"): _measured(when, rows, name)
                for name in frame
            }
            pictures.append(parts.figure(figures.curves(series, title=_frame_title(heading, frame), xlabel="epoch")))
        sections.append((heading, parts.figures(*pictures)))
    return sections


def _measured(when: np.ndarray, rows: Sequence[Mapping[str, float]], name: str) -> tuple[Any, Any]:
    """Return the epochs that have a column, and its values. Epochs without it make no gap in the curve; NaN does."""
    there = np.array([name in row for row in rows])
    return when[there], values(rows, name)[there]


def _frame_title(heading: str, frame: Sequence[str]) -> str:
    return frame[0].partition("/")[2] or frame[0] if len(frame) == 1 else heading


def frames(names: Sequence[str], rows: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Group columns into frames: at most six a frame, of magnitudes within a factor of 20 of each other."""
    out: list[list[str]] = []
    room: dict[int, float] = {}
    for name in names:
        column = values(rows, name)
        size = float(np.abs(column[np.isfinite(column)]).max()) or 1.0
        for index, frame in enumerate(out):
            if len(frame) < PER_FRAME and 1 / 20 <= size / room[index] <= 20:
                frame.append(name)
                break
        else:
            room[len(out)] = size
            out.append([name])
    return out
