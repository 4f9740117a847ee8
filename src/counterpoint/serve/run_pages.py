"""Show the list of runs, one run with live curves, and runs side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from counterpoint.engine.run import METRICS, Run
from counterpoint.errors import CounterpointError
from counterpoint.report import page as parts
from counterpoint.report.figures import curves
from counterpoint.report.found import found_sections
from counterpoint.report.run import columns, curve_sections, epochs, outcome, reproduce, values
from counterpoint.serve.runs import Summary, log_of, matching, measured, sorted_by, summarised
from counterpoint.serve.showing import Site, reading, shown
from counterpoint.words import counted

PAGE = 50  # runs on a page
SIDE_BY_SIDE = 8  # maximum number of runs side by side
DRAWN = 6  # maximum number of metrics whose curves are compared
LOG = 16_000  # bytes of a log's end
RESUMED = ("interrupted", "failed", "stopped")  # states from which a checkpoint is continued
COLUMNS = ("name", "system", "data", "seed", "state", "epochs", "time")


def routes(site: Site) -> list[Route]:
    """Make the routes of the pages of runs."""
    return [
        reading(site, "/", lambda request: RedirectResponse("/runs", 303)),
        reading(site, "/runs", lambda request: listed(site, request)),
        reading(site, "/compare", lambda request: compared(site, request)),
        reading(site, "/run/{key:path}", lambda request: one(site, request)),
        reading(site, "/live/{key:path}", lambda request: live(site, request)),
    ]


def listed(site: Site, request: Request) -> Response:
    """Show a page of the list of runs, filtered by words and sorted."""
    asked = request.query_params
    everything, unread = site.index()
    processes = {site.places.key(path): state for path, state in site.jobs.processes().items()}
    for run in everything:
        run.process = processes.get(run.key, "")
    words, sort = asked.get("q", ""), asked.get("sort", "time")
    down = asked.get("down", "1" if sort == "time" else "0") == "1"
    found = matching(everything, words)
    names = site.index.metrics(everything)
    metric = asked.get("metric", names[0] if names else "")
    if sort not in COLUMNS and sort != metric:
        metric = sort if sort in names else metric
    found = sorted_by(found, sort, down=down)
    pages = max(1, -(-len(found) // PAGE))
    number = min(pages, max(1, _whole(asked.get("page"), 1)))
    return shown(
        site,
        request,
        "runs.html",
        runs=found[(number - 1) * PAGE : number * PAGE],
        total=len(everything),
        matched=len(found),
        unread=unread,
        words=words,
        sort=sort,
        down=down,
        metric=metric,
        metrics=names,
        columns=COLUMNS,
        number=number,
        pages=pages,
        left_out=site.walk().left_out,
        folders=[str(folder) for folder in site.places.folders],
    )


def _whole(text: str | None, default: int) -> int:
    return int(text) if text and re.fullmatch(r"\d{1,9}", text) else default


def opened(site: Site, key: str) -> tuple[Run, Summary]:
    """Open a run by its key, with its summary."""
    path = site.places.path(key)
    run = Run.open(path)
    summary = summarised(site.places, str(path), path.stat().st_mtime_ns)
    summary.process = site.jobs.processes().get(str(path), "")
    return run, summary


def one(site: Site, request: Request) -> Response:
    """Show a run: outcome and curves, which follow the training, then figures, settings, environment and log."""
    key = str(request.path_params["key"])
    run, summary = opened(site, key)
    job = site.jobs.of_run(run.path)
    sections: list[tuple[str, Markup]] = list(found_sections(run.figures()))
    sections += [
        ("Settings", parts.pairs(run.config)),
        ("Environment", parts.pairs(run.environment())),
        ("Do it again", parts.command(reproduce(run.config))),
    ]
    stamp, html = _live(site, run, summary)
    return shown(
        site,
        request,
        "run.html",
        run=summary,
        title=str(run.config.get("title") or ""),
        live=html,
        stamp=stamp,
        sections=sections,
        job=job,
        done=summary.complete,
        can_resume=summary.state in RESUMED and summary.resumable and run.path.parent == site.jobs.out,
    )


def live(site: Site, request: Request) -> Response:
    """Return the part of a run's page that changes while it trains. Answer 204 where nothing changed."""
    run, summary = opened(site, str(request.path_params["key"]))
    stamp, html = _live(site, run, summary, request.query_params.get("stamp"))
    headers = {"x-stamp": stamp} | ({"x-done": "1"} if summary.complete else {})
    if html is None:
        return Response(status_code=204, headers=headers)
    return Response(html, media_type="text/html", headers=headers)


def _live(site: Site, run: Run, summary: Summary, seen: str | None = None) -> tuple[str, Markup | None]:
    """Return the stamp of the changing part, and its HTML; None where the stamp was seen."""
    file, log = run.path / METRICS, log_of(site.places, run.path)
    times = [path.stat().st_mtime_ns for path in (file, log) if path is not None and path.is_file()]
    stamp = f"{summary.state}-{'-'.join(map(str, times))}"
    if stamp == seen:
        return stamp, None
    rows = run.metrics(required=False)
    sections = [("Outcome", outcome(rows, file, run.chance())), *curve_sections(rows)]
    html = [Markup("<section><h2>{}</h2>{}</section>").format(heading, part) for heading, part in sections]
    if log is not None:
        text = site.places.read(log, LOG, tail=True)
        html.append(Markup('<section><h2>Log</h2><pre class="log" tabindex="0">{}</pre></section>').format(text))
    head = Markup('<p class="state {}">{}</p>').format(summary.state, _state(summary))
    return stamp, parts.join(head, *html)


def _state(run: Summary) -> str:
    done = counted(run.epochs, "epoch")
    why = f": {run.why}" if run.why else ""
    if run.state in RESUMED and not run.resumable:
        return f"{run.state} after {done}{why}; it has no checkpoint to resume"
    return f"{run.state}, {done}{why}"


def compared(site: Site, request: Request) -> Response:
    """Show runs side by side: settings that differ, metrics, and curves in one frame."""
    keys = list(dict.fromkeys(request.query_params.getlist("run")))
    if not 2 <= len(keys) <= SIDE_BY_SIDE:
        raise CounterpointError(f"choose 2 to {SIDE_BY_SIDE} runs of the list to compare; got {len(keys)}")
    runs = [opened(site, key) for key in keys]
    names = _names([summary for _, summary in runs])
    settings = [dict(parts.flat(run.config)) for run, _ in runs]
    every = list(dict.fromkeys(name for found in settings for name in found))
    rows = [(name, [parts.plain(found.get(name)) for found in settings]) for name in every]
    metrics = measured([summary for _, summary in runs])
    return shown(
        site,
        request,
        "compare.html",
        runs=[summary for _, summary in runs],
        names=names,
        differing=[row for row in rows if len(set(row[1])) > 1],
        same=[row for row in rows if len(set(row[1])) == 1],
        metrics=[(name, [summary.metrics.get(name) for _, summary in runs]) for name in metrics],
        drawn=_drawn(names, [run.metrics(required=False) for run, _ in runs]),
    )


def _names(runs: Sequence[Summary]) -> list[str]:
    """Return a name for each run, with the folder where names repeat."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else run.key for name, run in zip(names, runs, strict=True)]


def _drawn(names: Sequence[str], every: Sequence[Sequence[Mapping[str, float]]]) -> Markup:
    """Draw the curves of the metrics that at least two runs have, a frame for each metric."""
    having: dict[str, list[int]] = {}
    for number, rows in enumerate(every):
        for name in columns(rows):
            if sum(name in row for row in rows) > 1 and name.partition("/")[0] != "lr":
                having.setdefault(name, []).append(number)
    order = sorted((n for n in having if len(having[n]) > 1), key=lambda n: (n.partition("/")[0] == "train", n))
    pictures = []
    for name in order[:DRAWN]:
        series: dict[str, tuple[Any, Any]] = {}
        for number in having[name]:
            rows = [row for row in every[number] if name in row]
            series[names[number]] = (epochs(rows), values(rows, name))
        pictures.append(parts.figure(curves(series, title=name, xlabel="epoch")))
    return parts.figures(*pictures) if pictures else Markup("")
