"""`counterpoint detect VIDEO ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from counterpoint.commands.common import RUNS, Place, Probability, complain, console, say, table, unset
from counterpoint.errors import CounterpointError, RunError
from counterpoint.files import check_writable

if TYPE_CHECKING:
    from counterpoint.tasks.moments import Detection
    from counterpoint.use.detect import Detector


def main(
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="VIDEO [VIDEO ...]")] = (),
    *,
    run: Annotated[Place, unset(metavar="RUN")] = None,
    threshold: Annotated[Probability, unset(metavar="P")] = None,
    html: Annotated[Place, unset(metavar="FILE")] = None,
    out: Annotated[Place, unset(metavar="DIR")] = None,
    clips: Annotated[Place, unset(metavar="DIR")] = None,
    watch: Annotated[Place, unset(metavar="DIR")] = None,
    alarms: Annotated[Place, unset(metavar="FILE")] = None,
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Find the violent moments in video files with a trained run.

    Read any container and codec that FFmpeg supports, with or without sound, of any length. Print the moments found and
    write a page with the score curves beside the playable video, the highest-scoring video first. Where a file cannot be read,
    report it, process the others, and exit with code 2.

    With --out, each video's result is kept in a folder: JSON, CSV, WebVTT, EDL, OpenTimelineIO and a contact sheet. The same
    command then continues where it stopped: a finished file is not read again.

    An address (rtsp://, http://, ...) or an HLS playlist (.m3u8) is a stream. Its alarms are printed as JSON lines while they
    happen. So are those of new files in the folder of --watch. Ctrl-C ends both.

    Example: counterpoint detect film.mp4 --run runs/first --html film.html

    Example: counterpoint detect recordings/ --run runs/first --out found --clips found/clips

    Example: counterpoint detect rtsp://camera/1 --run runs/first --alarms alarms.jsonl

    Args:
        videos: Video files, and folders of them. Links are followed. Files that are not videos are reported. Or one stream.
        run: The run to detect with. Default: the newest run under runs/ that can detect. Where there is none, the built-in model
            arcade-small, which was trained on drawn clips alone.
        threshold: Probability above which a snippet counts as violent; above 0, below 1. Default: the one that
            `counterpoint calibrate` chose for the run, else 0.5.
        html: The page to write. Default: detection.html, in the folder of --out if that is given.
        out: Folder of the results, for resuming, for editing programs and for other tools.
        clips: Folder for a clip of each moment: copied where possible, else encoded again.
        watch: Folder whose new files are read once they are complete, until Ctrl-C.
        alarms: File to which the alarms of streams and of --watch are appended. Default: standard output.
        json_: Print JSON instead of a table.
    """
    streams = [name for name in videos if "://" in name or name.lower().endswith((".m3u8", ".m3u"))]
    if watch or streams:
        _check_live(watch, videos, streams, (html, clips, json_ or None))
    elif alarms:
        raise CounterpointError("--alarms is for streams and --watch; results of files go to --out or --json")
    elif not videos:
        raise CounterpointError("counterpoint detect needs a video; name at least one video file or folder")
    if threshold is not None and not 0 < threshold < 1:
        raise CounterpointError(f"--threshold must be a probability above 0 and below 1, got {threshold}")
    page = html or (out / "detection.html" if out else Path("detection.html"))
    for file in [page, *(folder / "name" for folder in (out, clips) if folder)]:
        check_writable(file)
    if watch or streams:
        return _live(watch or streams[0], run, threshold, out, alarms)
    from counterpoint.use.hand_over import write_all, write_beside, write_clips
    from counterpoint.use.video_files import find_videos

    detector = _detector(run, quiet=json_)
    listed = find_videos(videos)
    from counterpoint.use.detections import Kept, detect_files

    kept = Kept(out, detector, threshold) if out else None
    found, unread = detect_files(detector, listed.videos, threshold=threshold, kept=kept, finished=write_beside)
    failures = [*listed.failures, *unread]
    for name, reason in failures:
        complain(f"{name}: {reason}", "red")
    made, said = write_clips(found, clips, Kept.name) if clips else ({}, [])
    told: dict[str, Any] = {"failed": failures, "left_out": listed.left_out, "warnings": detector.warnings}
    if found:
        write_all(found, page, kept=kept, clips=made, told=told)
    if listed.left_out:
        where = f"listed in {page}" if found else ", ".join(f"{p}: {r}" for p, r in listed.left_out)
        complain(f"{len(listed.left_out)} files of the folders are not videos and were left out ({where})")
    if json_:
        pairs = {k: [[str(p), r] for p, r in told[k]] for k in ("failed", "left_out")}
        about = {"run": detector.name, "warnings": detector.warnings}
        print(json.dumps(about | {"videos": [d.as_dict() for d in found]} | pairs, indent=2))
        return 2 if failures else 0
    _show(found, [*said, *([f"Results: {out}"] if out and found else []), *([f"Page: {page}"] if found else [])])
    return 2 if failures else 0


def _detector(run: Path | None, *, quiet: bool) -> Detector:
    """Load the run that was named, or the newest that can detect; say which it is, and its warnings."""
    from counterpoint.engine.run import Run
    from counterpoint.use import detect as room
    from counterpoint.use.built_in import NAME, built_in, is_built_in

    skipped: list[tuple[Path, str]] = []
    if run is None:
        try:
            chosen, skipped = room.choose_run(RUNS)
        except RunError as error:
            if RUNS.is_dir():
                complain(f"{error}. The built-in model is used")
            chosen = built_in()
    else:
        chosen = built_in() if str(run) == NAME and not run.exists() else Run.open(run)
    detector = room.Detector(chosen)
    if not quiet:
        own = not is_built_in(chosen)
        say(f"Run: {detector.name}" + (" (the newest that can detect)" if run is None and own else ""))
        if detector.calibration:
            say(f"Calibrated: {detector.calibration.facts.get('said', '')}")
    for path, reason in skipped:
        complain(f"skipped the newer run {path}: it {reason}")
    for warning in detector.warnings:
        complain(f"warning: {warning}")
    return detector


def _check_live(watch: Path | None, videos: tuple[str, ...], streams: list[str], others: tuple[object, ...]) -> None:
    """Raise CounterpointError for arguments that do not fit a stream or a watched folder."""
    if watch and videos:
        raise CounterpointError(f"--watch {watch} reads one folder until Ctrl-C; leave out {videos[0]}, or --watch")
    if len(videos) > 1:
        raise CounterpointError(f"{streams[0]} is a stream; name one stream alone, and start one command for each")
    if any(other is not None for other in others):
        raise CounterpointError("streams and --watch give JSON lines; leave out --html, --clips and --json")


def _live(source: Path | str, run: Path | None, threshold: float | None, out: Path | None, alarms: Path | None) -> int:
    """Follow a stream, or watch a folder, and write alarms until it ends or Ctrl-C. Return the exit code."""
    import contextlib
    import sys

    from counterpoint.use import live
    from counterpoint.use.detections import Kept

    stream = isinstance(source, str)
    if stream and out:
        raise CounterpointError("--out is for files; a stream's alarms go to --alarms FILE or to standard output")
    detector = _detector(run, quiet=True)
    complain(f"run: {detector.name}", "dim")
    with contextlib.ExitStack() as open_files:
        file = open_files.enter_context(check_writable(alarms).open("a", encoding="utf-8")) if alarms else sys.stdout
        lines = live.Lines(file, detector, threshold)
        if isinstance(source, str):
            place = source if "://" in source else Path(source)
            live.follow(detector, place, lines, say=lambda text: complain(text, "dim"))
        else:
            kept = Kept(out, detector, threshold) if out else None
            live.watch(detector, source, lines, say=lambda text: complain(text, "dim"), kept=kept)
    return 0


MANY = 20  # videos that are printed with their moments; of more, a ranking is printed


def _show(found: list[Detection], lines: list[str]) -> None:
    """Print the moments of each video; of many videos, a table of the highest."""
    from counterpoint.tasks.moments import ranked

    if len(found) <= MANY:
        for detection in found:
            _print(detection)
    else:
        columns: Any = ("rank", "video", "moments", "highest", "at")
        shown = table(*columns, right=("rank", "moments", "highest", "at"), title=f"The {MANY} highest of {len(found)}")
        for n, d in enumerate(ranked(found)[:MANY], 1):
            shown.add_row(str(n), str(d.video), str(len(d.intervals)), f"{d.highest:.2f}", _clock(d.peak))
        console().print(shown)
    for line in lines:
        say(line)


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
