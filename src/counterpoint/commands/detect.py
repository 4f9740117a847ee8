"""`counterpoint detect VIDEO ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from counterpoint.commands.common import Device, Place, Probability, complain, console, say, table, unset
from counterpoint.commands.detecting import check_live, chosen_detector, run_live
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.files import check_writable
from counterpoint.words import counted

if TYPE_CHECKING:
    from counterpoint.tasks.moments import Detection


def main(
    videos: Annotated[Positional[tuple[str, ...]], unset(metavar="VIDEO [VIDEO ...]")] = (),
    *,
    run: Annotated[Place, unset(metavar="RUN")] = None,
    threshold: Annotated[Probability, unset(metavar="P")] = None,
    html: Annotated[Place, unset(metavar="FILE")] = None,
    out: Annotated[Place, unset(metavar="DIR")] = None,
    clips: Annotated[Place, unset(metavar="DIR")] = None,
    watch: Annotated[Place, unset(metavar="DIR")] = None,
    alarms: Annotated[Place, unset(metavar="FILE")] = None,
    device: Device = "auto",
    json_: Annotated[bool, arg(name="json")] = False,
) -> int:
    """Find the violent moments in video files, folders and streams.

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
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        json_: Print JSON instead of a table.
    """
    streams = [name for name in videos if "://" in name or name.lower().endswith((".m3u8", ".m3u"))]
    if threshold is not None and not 0 < threshold < 1:
        raise CounterpointError(f"--threshold must be a probability above 0 and below 1, got {threshold}")
    if watch or streams:
        check_live(watch, videos, streams, out, (html, clips, json_ or None))
        return run_live(watch or streams[0], run, threshold, out, alarms, device)
    if alarms:
        raise CounterpointError("--alarms is for streams and --watch; results of files go to --out or --json")
    if not videos:
        raise CounterpointError("counterpoint detect needs a video; name at least one video file or folder")
    page = html or (out / "detection.html" if out else Path("detection.html"))
    for file in [page, *(folder / "name" for folder in (out, clips) if folder)]:
        check_writable(file)
    from counterpoint.use.detections import Kept, detect_files
    from counterpoint.use.hand_over import write_all, write_beside, write_clips
    from counterpoint.use.video_files import find_videos

    listed = find_videos(videos)
    if not listed.videos:  # known before the run is loaded, which takes seconds
        for name, reason in listed.failures:
            complain(f"{name}: {reason}", "red")
        if json_:
            failed = [[str(name), reason] for name, reason in listed.failures]
            left_out = [[str(name), reason] for name, reason in listed.left_out]
            print(
                json.dumps(
                    {"run": None, "warnings": [], "videos": [], "failed": failed, "left_out": left_out}, indent=2
                )
            )
        return 2
    detector = chosen_detector(run, quiet=json_, device=device)
    kept = Kept(out, detector, threshold) if out else None
    try:
        found, unread = detect_files(detector, listed.videos, threshold=threshold, kept=kept, finished=write_beside)
        failures = [*listed.failures, *unread]
        for name, reason in failures:
            complain(f"{name}: {reason}", "red")
        made, said = write_clips(found, clips, Kept.name) if clips else ({}, [])
    except KeyboardInterrupt as error:
        how = "type the same command again to continue" if out else "with --out DIR, finished files are kept"
        raise Interrupted(f"stopped; {how}") from error
    told: dict[str, Any] = {"failed": failures, "left_out": listed.left_out, "warnings": detector.warnings}
    if detector.calibration:
        told["calibration"] = f"Scores are calibrated: {detector.calibration.facts.get('said', '')}."
    if found:
        write_all(found, page, kept=kept, clips=made, told=told)
    if listed.left_out:
        few = ", ".join(f"{p}: {r}" for p, r in listed.left_out[:3]) + (", ..." if len(listed.left_out) > 3 else "")
        one, several = "file of the folders is no video and was", "files of the folders are no videos and were"
        what = counted(len(listed.left_out), one, several)
        complain(f"{what} left out ({f'listed in {page}' if found else few})")
    if json_:
        pairs = {k: [[str(p), r] for p, r in told[k]] for k in ("failed", "left_out")}
        about = {"run": detector.name, "warnings": detector.warnings}
        print(json.dumps(about | {"videos": [d.as_dict() for d in found]} | pairs, indent=2))
        return 2 if failures else 0
    _show(found, [*said, *([f"Results: {out}"] if out and found else []), *([f"Page: {page}"] if found else [])])
    return 2 if failures else 0


MANY = 20  # videos that are printed with their moments; of more, a ranking is printed


def _show(found: list[Detection], lines: list[str]) -> None:
    """Print the moments of each video; of many videos, a table of the highest."""
    from counterpoint.report.page import clock
    from counterpoint.tasks.moments import ranked

    if len(found) <= MANY:
        for detection in found:
            _print(detection)
    else:
        columns: Any = ("rank", "video", "moments", "highest", "at")
        shown = table(*columns, right=("rank", "moments", "highest", "at"), title=f"The {MANY} highest of {len(found)}")
        for n, d in enumerate(ranked(found)[:MANY], 1):
            shown.add_row(str(n), str(d.video), str(len(d.intervals)), f"{d.highest:.2f}", clock(d.peak))
        console().print(shown)
    for line in lines:
        say(line)


def _print(detection: Detection) -> None:
    """Print the moments found in one video."""
    from counterpoint.report.page import clock

    say(f"\n{detection.video}  {clock(detection.duration)}, read at {detection.speed:.0f} x real time")
    for note in detection.notes:
        say(f"  note: {note}")
    if not detection.intervals:
        say(f"  no moment above {detection.threshold:.2f}; the highest score is {detection.score.max():.2f}")
        return
    columns = ("from", "to", "peak at", "score")
    shown = table(*columns, right=columns)
    for interval in detection.intervals:
        times = (clock(at) for at in (interval.start, interval.end, interval.peak))
        shown.add_row(*times, f"{interval.score:.2f}")
    console().print(shown)
