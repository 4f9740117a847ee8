"""Write detections in the forms that players, editing programs and tables read: WebVTT, EDL, OpenTimelineIO, CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterpoint.errors import CounterpointError
from counterpoint.files import replacing
from counterpoint.tasks.moments import Detection, ranked
from counterpoint.words import counted

MOST_EVENTS = 999  # of a CMX3600 list: event numbers have three digits
RATES = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 48.0, 50.0, 60000 / 1001, 60.0)  # of time codes


def write_vtt(found: Detection, path: Path) -> Path:
    """Write the moments of a video as WebVTT cues, for players. Return `path`."""
    lines = ["WEBVTT", "", f"NOTE found by {found.run}".replace("-->", "->"), ""]
    for number, moment in enumerate(found.intervals, 1):
        lines += [
            str(number),
            f"{_stamp(moment.start)} --> {_stamp(moment.end)}",
            f"violence {moment.score:.2f}, highest at {_stamp(moment.peak)}",
            "",
        ]
    return _text(path, "\n".join(lines))


def _stamp(seconds: float) -> str:
    thousandths = round(seconds * 1000)
    hours, rest = divmod(thousandths, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}.{rest % 1000:03d}"


def load_otio() -> Any:
    """Import OpenTimelineIO. CounterpointError when it or its reader of CMX3600 is not installed."""
    try:
        import opentimelineio

        if "cmx_3600" in opentimelineio.adapters.available_adapter_names():
            return opentimelineio
    except ImportError:
        pass
    raise CounterpointError("EDL and OTIO files need OpenTimelineIO: pip install 'counterpoint[video]'")


def time_line(found: Detection) -> Any:
    """Make an OpenTimelineIO time line of a video's moments: one clip after another, a marker at each highest score.

    Times are whole frames at the nearest rate that time codes have. CounterpointError without OpenTimelineIO.
    """
    otio = load_otio()
    rate = min(RATES, key=lambda known: abs(known - (found.fps or 25.0)))
    frames = max(1, round(found.duration * rate))

    def at(seconds: float) -> int:
        return min(frames - 1, max(0, round(seconds * rate)))

    def span(first: int, length: int) -> Any:
        return otio.opentime.TimeRange(
            otio.opentime.RationalTime(first, rate), otio.opentime.RationalTime(length, rate)
        )

    made = otio.schema.Timeline(f"Moments of {found.video.name}")
    made.global_start_time = otio.opentime.RationalTime(0, rate)
    made.metadata["counterpoint"] = {"run": found.run, "threshold": float(found.threshold)}
    kinds = ["Video", "Audio"] if found.has_audio else ["Video"]
    for kind in kinds:
        track = otio.schema.Track(kind, kind=kind)
        for moment in found.intervals:
            first = at(moment.start)
            clip = otio.schema.Clip(
                found.video.name,
                media_reference=otio.schema.ExternalReference(found.video.resolve().as_uri(), span(0, frames)),
                source_range=span(first, max(1, round(moment.end * rate) - first)),
                metadata={
                    "counterpoint": {"score": round(moment.score, 4)},
                    "cmx_3600": {"comments": [f"FOUND BY {found.run}"]},
                },
            )
            clip.markers.append(
                otio.schema.Marker(
                    f"score {moment.score:.2f}", span(at(moment.peak), 0), color=otio.schema.MarkerColor.RED
                )
            )
            track.append(clip)
        made.tracks.append(track)
    return made


def write_otio(found: Detection, path: Path) -> Path:
    """Write the time line of a video's moments as an .otio file. Return `path`."""
    otio = load_otio()
    return _text(path, otio.adapters.write_to_string(time_line(found), "otio_json"))


def write_edl(found: Detection, path: Path) -> tuple[Path, str | None]:
    """Write a video's moments as an edit decision list (CMX3600). Return `path`, and a note where moments are left out.

    A list holds 999 events; of more moments, those with the highest scores are written.
    """
    otio = load_otio()
    line = time_line(found)
    video = line.tracks[0]
    note = None
    if len(video) > MOST_EVENTS:
        order = sorted(range(len(video)), key=lambda n: -found.intervals[n].score)
        for n in sorted(order[MOST_EVENTS:], reverse=True):
            del video[n]
        note = f"{path.name} holds the {MOST_EVENTS} highest of {counted(len(found.intervals), 'moment')}: the form has no more"
    del line.tracks[1:]
    if not len(video):  # the adapter fails on a track without events
        return _text(path, f"TITLE: {line.name}\n"), note
    return _text(path, otio.adapters.write_to_string(line, "cmx_3600")), note


def write_tables(detections: Sequence[Detection], folder: Path) -> list[Path]:
    """Write videos.csv, a row for each video, and moments.csv, a row for each moment; highest videos first."""
    order = ranked(detections)
    videos = [
        (
            *(n, found.video, f"{found.duration:.3f}", len(found.intervals), f"{found.highest:.4f}"),
            *(f"{found.peak:.3f}", found.run),
        )
        for n, found in enumerate(order, 1)
    ]
    moments = [
        (found.video, f"{i.start:.3f}", f"{i.end:.3f}", f"{i.peak:.3f}", f"{i.score:.4f}", found.run)
        for found in order
        for i in found.intervals
    ]
    return [
        _table(folder / "videos.csv", ("rank", "video", "duration", "moments", "highest", "peak", "run"), videos),
        _table(folder / "moments.csv", ("video", "start", "end", "peak", "score", "run"), moments),
    ]


def _table(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    lines = io.StringIO(newline="")
    out = csv.writer(lines, lineterminator="\n")
    out.writerow(head)
    out.writerows([os.fspath(cell) if isinstance(cell, Path) else cell for cell in row] for row in rows)
    return _text(path, lines.getvalue())


def _text(path: Path, text: str) -> Path:
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))
    return path
