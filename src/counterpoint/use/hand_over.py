"""Write what a person takes from a set of detections: the folder of results, clips, and the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoint.errors import CounterpointError
from counterpoint.report.detection import write_detection_report
from counterpoint.tasks.moments import Detection
from counterpoint.use.contact_sheets import write_contact_sheet
from counterpoint.use.cut_lists import load_otio, write_edl, write_otio, write_tables, write_vtt
from counterpoint.use.detections import Kept
from counterpoint.waiting import patient_track
from counterpoint.words import counted

PAGE = "detection.html"


def write_beside(found: Detection, folder: Path) -> Mapping[str, Any]:
    """Write cut lists and the contact sheet of a video into the folder of its result.

    Returns the field `files`, the names of the files, for the result's JSON. Without OpenTimelineIO the EDL and OTIO files are left
    out, and a note reports it.
    """
    files = [write_vtt(found, folder / "moments.vtt").name]
    try:
        load_otio()
    except CounterpointError as error:
        note = str(error)
        if note not in found.notes:
            found.notes.append(note)
    else:
        edl, left_out = write_edl(found, folder / "moments.edl")
        files += [edl.name, write_otio(found, folder / "moments.otio").name]
        if left_out:
            found.notes.append(left_out)
    sheet = write_contact_sheet(found, folder / "contact-sheet.png")
    files += [sheet.name] if sheet else []
    return {"files": files, "notes": found.notes}


def beside(kept: Kept, detections: Sequence[Detection]) -> dict[Path, list[Path]]:
    """Return the files that were written for each video, by video."""
    names = ("moments.vtt", "moments.edl", "moments.otio", "contact-sheet.png")
    found = {}
    for detection in detections:
        folder = kept.folder(detection.video)
        found[detection.video] = [folder / name for name in names if (folder / name).is_file()]
    return found


def write_clips(detections: Sequence[Detection], folder: Path, key: Any) -> tuple[dict[Path, list[Path]], list[str]]:
    """Cut a clip of each moment into a folder, with a progress bar. A clip that is newer than its video stays.

    Args:
        detections: The detections.
        folder: The folder; it is made where it is missing.
        key: Video -> beginning of its clips' names.

    Returns the clips by video, and a line on each new clip: how it was made, or why it failed. A last line counts the
    older clips of these videos that belong to none of their moments.
    """
    from counterpoint.data.media import cut

    jobs = [(found, moment) for found in detections for moment in found.intervals]
    made: dict[Path, list[Path]] = {}
    said = []
    for found, moment in patient_track(jobs, "cutting clips"):
        out = folder / f"{key(found.video)}-{moment.start:08.2f}-{moment.end:08.2f}s"
        there = next((clip for end in ENDINGS if _is_newer(clip := out.with_name(out.name + end), found.video)), None)
        if there is None:
            try:
                there, how = cut(
                    found.video, moment.start, moment.end, out, steady=found.steady, comment=f"found by {found.run}"
                )
                said.append(f"{there}: {how}")
            except (CounterpointError, OSError) as error:
                said.append(f"{out}: failed ({error})")
                continue
        made.setdefault(found.video, []).append(there)
    keys = {key(found.video) for found in detections}
    current = {clip for clips in made.values() for clip in clips}
    others = [clip for clip in folder.glob("*s.m[pk][4v]") if _CLIP.sub("", clip.name) in keys and clip not in current]
    if others:
        what = counted(len(others), "older clip belongs", "older clips belong")
        said.append(
            f"{folder}: {what} to no moment of this result, such as {min(others).name}; remove what you do not need"
        )
    return made, said


ENDINGS = (".mp4", ".mkv")
_CLIP = re.compile(r"-\d+\.\d\d(-\d+\.\d\d)?s\.m(p4|kv)$")


def _is_newer(clip: Path, video: Path) -> bool:
    try:
        return clip.stat().st_mtime_ns >= video.stat().st_mtime_ns
    except OSError:
        return False


def write_all(
    detections: Sequence[Detection],
    page: Path,
    *,
    kept: Kept | None,
    clips: Mapping[Path, Sequence[Path]],
    told: Mapping[str, Any],
) -> Path:
    """Write the page, and with a folder of results its tables and its index. Return the page.

    Args:
        detections: The detections; an empty list writes no page of its own but the failures'.
        page: The page's file.
        kept: The folder of results, or None.
        clips: Clips of each video, by video.
        told: "failed", "left_out", "warnings" and "calibration" (a sentence), for the index and the page.
    """
    links = beside(kept, detections) if kept else {}
    for video, files in clips.items():
        links[video] = [*links.get(video, []), *files]
    if kept:
        write_tables(detections, kept.root)
        kept.index([kept.row(found) for found in detections], _plain(told))
    return write_detection_report(
        detections,
        page,
        failures=told["failed"],
        left_out=told["left_out"],
        warnings=told["warnings"],
        beside=links,
        about=told.get("calibration", ""),
    )


def _plain(told: Mapping[str, Any]) -> dict[str, Any]:
    return {k: [[str(a), b] for a, b in v] if k in ("failed", "left_out") else v for k, v in told.items()}
