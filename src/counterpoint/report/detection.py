"""Write pages of detections: each video beside its score curves, the moments found, and their images."""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from counterpoint.report import figures
from counterpoint.report import page as parts
from counterpoint.report.page import Page, clock
from counterpoint.tasks.moments import Detection, ranked
from counterpoint.words import counted

EMBED_BYTES = 20 * 2**20  # a larger video is linked, not embedded
PAGE_BYTES = 60 * 2**20  # maximum size of all embedded videos of a page, so that browsers still open it
MAX_SECTIONS = 50  # maximum number of videos with a timeline on a page: those with the highest scores
MAX_ROWS = 200  # maximum number of moments listed: those with the highest scores
TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".webm": "video/webm", ".ogg": "video/ogg", ".ogv": "video/ogg"}
WIDTH, HEIGHT = 1000, 200  # size of the drawing, in its own units
STREAMS = (("fused", "fused"), ("audio", "audio"), ("visual", "visual"))


def write_detection_report(
    detections: Sequence[Detection],
    path: Path,
    *,
    failures: Sequence[tuple[Path | str, str]] = (),
    left_out: Sequence[tuple[Path, str]] = (),
    warnings: Sequence[str] = (),
    beside: Mapping[Path, Sequence[Path]] | None = None,
    about: str = "",
) -> Path:
    """Write one page for all videos, the one with the highest score first. Return `path`.

    Large videos, and containers that no browser plays, are linked relative to the page.

    Args:
        detections: The detections, one section each.
        path: The page to write.
        failures: (file, reason) of videos that could not be read.
        left_out: (file, reason) of files in folders that are not videos.
        warnings: Warnings about the scores, shown first.
        beside: Files written for a video (cut lists, clips), by video; its section links to them.
        about: A sentence on the scores, such as how they were calibrated.
    """
    path = Path(path)
    if len(detections) == 1:
        title = f"Moments found in {detections[0].video.name}"
    else:
        title = f"Moments found in {counted(len(detections), 'video')}"
    runs = sorted({d.run for d in detections})
    named = ", ".join(run if run.startswith("the ") else f"the run {run}" for run in runs)
    page = Page(title, f"Found by {named} from picture and sound. {about}".rstrip() if runs else "")
    if warnings:
        page.section("Before you read the scores", parts.notes(warnings), anchor="warnings")
    detection_sections(page, detections, folder=path.parent, failures=failures, beside=beside)
    if left_out:
        rows = [(str(file), reason) for file, reason in left_out]
        page.section("Files left out", parts.table(["file", "why"], rows), anchor="left-out")
    return page.write(path)


def detection_sections(
    page: Page,
    detections: Sequence[Detection],
    *,
    folder: Path,
    failures: Sequence[tuple[Path | str, str]] = (),
    beside: Mapping[Path, Sequence[Path]] | None = None,
) -> None:
    """Add an index (for several videos), a section for each video, and one for the files that failed.

    Videos are ranked by their highest score. The 50 highest have a section.

    Args:
        page: The page to add to.
        detections: The detections, one section each.
        folder: The folder of the page. Links to videos are relative to it.
        failures: (file, reason) of videos that could not be read.
        beside: Files written for a video, by video.
    """
    detections = ranked(detections)
    names = dict(zip([d.video for d in detections], distinct_names([d.video for d in detections]), strict=True))
    anchors = [f"video-{i + 1}" if i < MAX_SECTIONS else None for i in range(len(detections))]
    if len(detections) > 1:
        page.section("All videos", _index(detections, anchors, names), anchor="videos")
    budget = PAGE_BYTES
    for detection, anchor in zip(detections[:MAX_SECTIONS], anchors, strict=False):
        video = _video(detection.video, folder, budget)
        budget -= len(video["source"] or "") * 3 // 4 if video["embedded"] else 0
        name = names[detection.video]
        heading = name if len(detections) > 1 else f"Timeline of {name}"
        links = _files((beside or {}).get(detection.video, ()), folder)
        page.section(heading, parts.join(timeline(detection, video), links), anchor=anchor)
    if detections:
        page.script("timeline.js")
    if failures:
        rows = [(str(file), reason) for file, reason in failures]
        page.section("Files that failed", parts.table(["file", "what went wrong"], rows), anchor="failures")
    if not detections and not failures:
        page.section("Nothing watched", parts.text("No video was given."))


def _files(files: Sequence[Path], folder: Path) -> Markup:
    """Return links to the files that were written for a video."""
    links = [Markup('<a href="{}">{}</a>').format(_link(file, folder), file.name) for file in files]
    return Markup('<p class="meta">Files: {}</p>').format(Markup(", ").join(links)) if links else Markup("")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of files for people. Files of one name have as many of their folders before it as tell them apart."""
    found = [path.name for path in paths]
    for depth in range(2, 1 + max((len(path.parts) for path in paths), default=0)):
        same = {name for name, times in Counter(found).items() if times > 1}
        if not same:
            break
        found = [
            Path(*path.parts[-depth:]).as_posix() if name in same else name
            for path, name in zip(paths, found, strict=True)
        ]
    return found


def _index(detections: Sequence[Detection], anchors: Sequence[str | None], names: Mapping[Path, str]) -> Markup:
    rows = []
    for rank, (detection, anchor) in enumerate(zip(detections, anchors, strict=True), 1):
        name = names[detection.video]
        high = float(np.nanmax(detection.score)) if np.isfinite(detection.score).any() else None
        rows.append(
            (
                rank,
                Markup('<a href="#{}">{}</a>').format(anchor, name) if anchor else name,
                clock(detection.duration),
                len(detection.intervals),
                high,
                clock(detection.peak) if high is not None else parts.DASH,
                "yes" if detection.has_audio else "no",
            )
        )
    caption = f"The {MAX_SECTIONS} with the highest scores are shown below." if len(rows) > MAX_SECTIONS else ""
    heads = ["rank", "video", "length", "moments", "highest score", "at", "sound"]
    return parts.table(heads, rows, caption=caption)


def _video(path: Path, folder: Path, budget: int) -> dict[str, Any]:
    """Return how the page shows a video: a source for the player or none, and a remark."""
    shown: dict[str, Any] = {"source": None, "embedded": False, "link": None, "remark": ""}
    kind = TYPES.get(path.suffix.lower())
    if not path.is_file():
        return shown | {"remark": f"{path} no longer exists; the timeline works without it."}
    size = path.stat().st_size
    if kind and size <= min(EMBED_BYTES, budget):
        data = base64.b64encode(path.read_bytes()).decode()
        return shown | {"source": f"data:{kind};base64,{data}", "embedded": True}
    link = _link(path, folder)
    if kind:
        remark = f"The video ({size / 2**20:.0f} MB) is not part of this page; keep it at its place to play it."
        return shown | {"source": link, "remark": remark, "link": link}
    remark = f"Browsers do not play {path.suffix or 'such'} files; the timeline works without the video."
    return shown | {"remark": remark, "link": link}


def _link(path: Path, folder: Path) -> str:
    try:
        relative = os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:  # another drive
        return path.resolve().as_uri()
    # "./" prevents a browser from reading a name with a colon as a scheme.
    return "./" + quote(os.fsencode(relative.replace(os.sep, "/")), safe="/")


def timeline(detection: Detection, video: dict[str, Any]) -> Markup:
    """Render the section of one video: player, score curves, moments and pictures.

    Args:
        detection: The detection.
        video: How to show the video: "source" of the player or None, "embedded", "link" or None, and "remark".
    """
    name = detection.video.name
    duration = detection.duration if detection.duration > 0 else len(detection.score) * detection.snippet_seconds
    duration = max(duration, 1e-3)
    curves = {"fused": detection.score, "audio": detection.audio, "visual": detection.visual}
    streams = [(key, label) for key, label in STREAMS if key != "audio" or detection.has_audio]
    if detection.raw is not None:  # a calibration maps the fused score alone
        streams = [(key, label if key == "fused" else f"{label}, not calibrated") for key, label in streams]
    paths = {key: _curve(np.asarray(curves[key], float), detection.snippet_seconds, duration) for key, _ in streams}

    def spans(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        clipped = [(min(max(0.0, a), duration), min(duration, b)) for a, b in pairs]
        return [(WIDTH * a / duration, WIDTH * b / duration) for a, b in clipped if b >= a]

    shown = detection.intervals
    if len(shown) > MAX_ROWS:
        kept = sorted(shown, key=lambda i: -i.score)[:MAX_ROWS]
        shown = sorted(kept, key=lambda i: i.start)
    facts = [clock(detection.duration), f"{detection.width} × {detection.height}"]
    facts += ["with sound" if detection.has_audio else "no sound: scored from the picture alone"]
    facts += [f"snippets of {detection.snippet_seconds:.2f} s", f"read at {detection.speed:.1f} × real time"]
    precision = detection.precision()
    if precision is not None:
        facts.append(f"average precision {precision[0]:.2f}, by chance {precision[1]:.2f}")
    pictures = {thumbnail.time: base64.b64encode(thumbnail.jpeg).decode() for thumbnail in detection.thumbnails}
    # Times in files are rounded to a ten-thousandth of a second.
    near = [(t.time, i) for t in detection.thumbnails for i in detection.intervals if abs(i.peak - t.time) < 1e-3]
    peaks, highest = dict(near), max(detection.intervals, key=lambda i: i.score, default=None)
    html = (
        parts.environment()
        .get_template("detection.html")
        .render(
            name=name,
            meta=" · ".join(facts),
            notes=parts.notes(detection.notes),
            **video,
            streams=streams,
            threshold=detection.threshold,
            duration=duration,
            width=WIDTH,
            height=HEIGHT,
            alt=_told(detection),
            found_path=figures.bars(spans([(i.start, i.end) for i in detection.intervals]), HEIGHT, 1),
            area=_area(np.asarray(detection.score, float), detection.snippet_seconds, duration),
            dense=len(detection.score) > 2 * WIDTH,
            paths=[(key, paths[key]) for key, _ in reversed(streams)],  # the fused curve on top
            truth=detection.truth,
            truth_path=figures.bars(spans(detection.truth or []), 10, 1),
            truth_alt="True moments: "
            + (", ".join(f"{clock(a)} to {clock(b)}" for a, b in detection.truth or []) or "none"),
            ticks=[(_tick(t, duration), 100 * t / duration) for t in figures.ticks(duration)],
            # The player's image before it starts: the highest peak, not the first frame, which is often black.
            poster=next((pictures[t] for t, i in peaks.items() if i is highest), None),
            thumbnails=[
                {
                    "time": thumbnail.time,
                    "data": pictures[thumbnail.time],
                    "score": i.score if (i := peaks.get(thumbnail.time)) else None,
                }
                for thumbnail in detection.thumbnails
            ],
            intervals=shown,
            caption=_caption(detection, len(shown)),
            data={
                "duration": duration,
                "snippet": detection.snippet_seconds,
                "streams": streams,
                **{key: _thousandths(curves[key]) for key, _ in streams},
            },
        )
    )
    return Markup(html)


def _told(detection: Detection) -> str:
    if not np.isfinite(detection.score).any():
        return f"Score curves of {detection.video.name}; no score is a number"
    best = int(np.nanargmax(detection.score))
    return (
        f"Score curves of {detection.video.name}. The fused score is highest, {detection.score[best]:.2f}, at "
        f"{clock((best + 0.5) * detection.snippet_seconds)}; {counted(len(detection.intervals), 'moment lies', 'moments lie')} "
        "above the "
        f"threshold {detection.threshold:.2f}"
    )


def _caption(detection: Detection, shown: int) -> str:
    total = len(detection.intervals)
    if total == 0:
        high = f"{np.nanmax(detection.score):.2f}" if np.isfinite(detection.score).any() else parts.DASH
        return f"No moment scores above {detection.threshold:.2f}; the highest score is {high}."
    return f"{counted(total, 'moment', commas=True)} above {detection.threshold:.2f}" + (
        f"; the {shown} highest-scoring are listed" if shown < total else ""
    )


def _points(
    values: NDArray[np.float64], snippet: float, duration: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return x, low and high of a curve in drawing units. Low equals high unless snippets exceed pixel columns."""
    if len(values) > 2 * WIDTH:
        index, low, high = figures.envelope(values, WIDTH)
    else:
        index, low, high = np.arange(len(values), dtype=float), values, values
    x = np.clip(WIDTH * (index + 0.5) * snippet / duration, 0, WIDTH)
    if len(x):  # the first and last snippet reach the ends
        x = np.concatenate([[0.0], x, [min(WIDTH, WIDTH * len(values) * snippet / duration)]])
        low, high = (np.concatenate([v[:1], v, v[-1:]]) for v in (low, high))
    return x, HEIGHT * (1 - low), HEIGHT * (1 - high)


def _curve(values: NDArray[np.float64], snippet: float, duration: float) -> str:
    x, low, high = _points(values, snippet, duration)
    if len(values) <= 2 * WIDTH:
        return figures.path(x, high)
    return figures.path(np.repeat(x, 2), np.stack([low, high], 1).ravel())


def _area(values: NDArray[np.float64], snippet: float, duration: float) -> str:
    """Return the outline of the area under a curve. Where values are missing, the outline follows the axis."""
    x, _, high = _points(values, snippet, duration)
    if len(x) == 0:
        return ""
    top = np.where(np.isnan(high), HEIGHT, high)
    return figures.path([x[0], *x, x[-1]], [HEIGHT, *top, HEIGHT]) + "z"


def _tick(seconds: float, duration: float) -> str:
    """Return the label of a tick: its time, with tenths of a second only on axes below 5 seconds."""
    label = clock(seconds)
    return label if duration < 5 else label[: label.rindex(".")]


def _thousandths(values: NDArray[np.floating]) -> list[int | None]:
    """Return scores as whole thousandths, NaN as None, to keep the page small."""
    return [None if np.isnan(v) else round(1000 * float(v)) for v in values]
