"""`counterpoint detect VIDEO ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from counterpoint.commands.common import RUNS, Place, complain, console, say, table, unset
from counterpoint.errors import CounterpointError
from counterpoint.files import check_writable

if TYPE_CHECKING:
    from counterpoint.tasks.moments import Detection


def main(
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="VIDEO [VIDEO ...]")],
    *,
    run: Annotated[Place, unset(metavar="RUN")] = None,
    threshold: float = 0.5,
    html: Annotated[Path, arg(metavar="FILE")] = Path("detection.html"),
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Find the violent moments in video files with a trained run.

    Read any container and codec that FFmpeg supports, with or without sound, of any length. Print the moments found and
    write a page with the score curves beside the playable video. Where a file cannot be read, report it, process the
    others, and exit with code 2.

    Example: counterpoint detect film.mp4 --run runs/first --html film.html

    Args:
        videos: Video files, and folders of them. Links are followed. Files that are not videos are reported.
        run: The run to detect with. Default: the newest run under runs/ that can detect.
        threshold: Probability above which a snippet counts as violent; above 0, below 1.
        html: The page to write.
        json_: Print JSON instead of a table.
    """
    if not videos:
        raise CounterpointError("counterpoint detect needs a video; name at least one video file or folder")
    if not 0 < threshold < 1:
        raise CounterpointError(f"--threshold must be a probability above 0 and below 1, got {threshold}")
    check_writable(html)
    from counterpoint.engine.run import Run
    from counterpoint.report.detection import write_detection_report
    from counterpoint.use import detect as room

    chosen, skipped = (Run.open(run), []) if run else room.choose_run(RUNS)
    detector = room.Detector(chosen)
    listed = room.find_videos(videos)
    if not json_:
        say(f"Run: {chosen.path}" + ("" if run else " (the newest that can detect)"))
    for path, reason in skipped:
        complain(f"skipped the newer run {path}: it {reason}")
    for warning in detector.warnings:
        complain(f"warning: {warning}")
    found, unread = room.detect_files(detector, listed.videos, threshold=threshold)
    failures = [*listed.failures, *unread]
    for name, reason in failures:
        complain(f"{name}: {reason}", "red")
    if found:
        page = write_detection_report(
            found, html, failures=failures, left_out=listed.left_out, warnings=detector.warnings
        )
    if listed.left_out:
        where = f"listed in {page}" if found else ", ".join(f"{p}: {r}" for p, r in listed.left_out)
        complain(f"{len(listed.left_out)} files of the folders are not videos and were left out ({where})")
    if json_:
        print(
            json.dumps(
                {
                    "run": str(chosen.path),
                    "warnings": detector.warnings,
                    "videos": [d.as_dict() for d in found],
                    "failed": [[str(p), r] for p, r in failures],
                    "left_out": [[str(p), r] for p, r in listed.left_out],
                },
                indent=2,
            )
        )
        return 2 if failures else 0
    for detection in found:
        _print(detection)
    if found:
        say(f"Page: {page}")
    return 2 if failures else 0


def _print(detection: Detection) -> None:
    """Print the moments found in one video."""
    say(f"\n{detection.video}  {_clock(detection.duration)}, read at {detection.speed:.0f} x real time")
    for note in detection.notes:
        say(f"  note: {note}")
    if not detection.intervals:
        say(f"  no moment above {detection.threshold:.2f}; the highest score is {detection.score.max():.2f}")
        return
    columns = ("from", "to", "peak at", "score")
    shown = table(*columns, right=columns)
    for interval in detection.intervals:
        times = (_clock(at) for at in (interval.start, interval.end, interval.peak))
        shown.add_row(*times, f"{interval.score:.2f}")
    console().print(shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}"
