"""Choose the detector of `counterpoint detect`, and run it over streams and folders that grow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from counterpoint.commands.common import RUNS, complain, say
from counterpoint.errors import CounterpointError, RunError
from counterpoint.files import check_writable

if TYPE_CHECKING:
    from counterpoint.use.detect import Detector

SKIPPED = 3  # skipped runs that are named


def chosen_detector(run: Path | None, *, quiet: bool, device: str) -> Detector:
    """Load the run that was named, or the newest that can detect; say which it is, and its warnings."""
    from counterpoint.use import detect as room
    from counterpoint.use import hub
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
        chosen = built_in() if str(run) == NAME and not run.exists() else hub.opened(run)
    detector = room.Detector(chosen, device)
    if not quiet:
        own = not is_built_in(chosen)
        say(f"Run: {detector.name}" + (" (the newest that can detect)" if run is None and own else ""))
        if detector.calibration:
            say(f"Calibrated: {detector.calibration.facts.get('said', '')}")
    for path, reason in skipped[:SKIPPED]:
        complain(f"skipped the newer run {path}: it {reason}")
    if len(skipped) > SKIPPED:
        complain(f"also skipped: {len(skipped) - SKIPPED} of the newer runs; choose a run with --run")
    for warning in detector.warnings:
        complain(f"warning: {warning}")
    return detector


def check_live(
    watch: Path | None, videos: tuple[str, ...], streams: list[str], out: Path | None, others: tuple[object, ...]
) -> None:
    """Raise CounterpointError for arguments that do not fit a stream or a watched folder."""
    if watch and videos:
        raise CounterpointError(f"--watch {watch} reads one folder until Ctrl-C; leave out {videos[0]}, or --watch")
    if len(videos) > 1:
        raise CounterpointError(f"{streams[0]} is a stream; name one stream alone, and start one command for each")
    if any(other is not None for other in others):
        raise CounterpointError("streams and --watch give JSON lines; leave out --html, --clips and --json")
    if streams and out:
        raise CounterpointError("--out is for files; a stream's alarms go to --alarms FILE or to standard output")
    if out:
        check_writable(out / "name")


def run_live(
    source: Path | str,
    run: Path | None,
    threshold: float | None,
    out: Path | None,
    alarms: Path | None,
    device: str,
) -> int:
    """Follow a stream, or watch a folder, and write alarms until it ends or Ctrl-C. Return the exit code."""
    import contextlib
    import sys

    from counterpoint.use import live
    from counterpoint.use.detections import Kept

    detector = chosen_detector(run, quiet=True, device=device)
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
