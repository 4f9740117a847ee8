"""Detect moments while they happen: in streams and in folders that grow, in bounded memory, with alarms as JSON lines.

An alarm is one JSON object on a line. A stream has two for each moment: "start" when a score first exceeds the threshold, and "end"
with the highest score. A file has one for each moment, "moment". All have these fields:

    event        start, end or moment
    source       the address or the file
    start, end   seconds since the stream was first opened, or since the file's beginning; end is null in "start"
    peak, score  time and score of the highest snippet so far
    threshold    what the score exceeds
    calibrated   whether scores are calibrated probabilities
    run          the run, or what the built-in model is
    time         when the line was written, UTC
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.errors import CounterpointError, DataError
from counterpoint.files import walk
from counterpoint.tasks.moments import Alarms, Interval
from counterpoint.use.detect import Detector, Scores
from counterpoint.use.detections import Kept, identity
from counterpoint.use.hand_over import write_beside
from counterpoint.use.video_files import VIDEO_ENDINGS
from counterpoint.words import counted

STEP = 3  # snippets between two scores of a stream: the delay of an alarm
LONGEST_PAUSE = 60.0  # seconds between two attempts to connect again, at most
POLL = 2.0  # seconds between two looks into a folder
SETTLED = 4.0  # seconds without change after which a file counts as complete
Say = Callable[[str], None]


class Rolling:
    """Scores of the newest snippets of a stream, each in the context of those before it.

    Args:
        score: Maps visual rows [T, Dv] and audio rows [T, Da] to scores by name, [T] each.
        length: Number of rows that are held, at most; the context.
    """

    def __init__(self, score: Callable[[NDArray[np.float32], NDArray[np.float32]], Scores], length: int) -> None:
        self.score, self.length = score, max(4, length)
        self.visual: NDArray[np.float32] | None = None
        self.audio: NDArray[np.float32] | None = None

    @property
    def held(self) -> int:
        """Number of rows that are held."""
        return 0 if self.visual is None else len(self.visual)

    def feed(self, visual: NDArray[np.float32], audio: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take the rows of n new snippets, and return their fused scores, [n]."""
        if self.visual is not None and self.audio is not None:
            visual, audio = np.concatenate([self.visual, visual]), np.concatenate([self.audio, audio])
        new = len(visual) - self.held
        keep = max(self.length, new)
        self.visual, self.audio = visual[-keep:].copy(), audio[-keep:].copy()
        found = self.score(self.visual, self.audio)["score"][-new:]
        self.visual, self.audio = self.visual[-self.length :], self.audio[-self.length :]
        return found


class Lines:
    """Alarms as JSON lines, each written at once.

    Args:
        file: The file to write to.
        detector: The detector, for the fields that all lines share.
        threshold: Threshold of the alarms. None: the detector's.
    """

    def __init__(self, file: IO[str], detector: Detector, threshold: float | None = None) -> None:
        self.file = file
        self.threshold = detector.threshold if threshold is None else threshold
        self.calibrated, self.run = detector.calibration is not None, detector.name
        self.count = 0

    def write(self, event: str, source: str, moment: Interval) -> None:
        """Write the line of an event; see the module's text for its fields."""
        fields = {
            "event": event,
            "source": source,
            "start": round(moment.start, 3),
            "end": None if event == "start" else round(moment.end, 3),
            "peak": round(moment.peak, 3),
            "score": round(moment.score, 4),
            "threshold": round(self.threshold, 4),
            "calibrated": self.calibrated,
            "run": self.run,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        }
        print(json.dumps(fields, ensure_ascii=False), file=self.file, flush=True)
        self.count += event != "end"


def follow(
    detector: Detector,
    source: str | Path,
    lines: Lines,
    *,
    say: Say,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Watch a stream until it ends or until Ctrl-C, and write its alarms. Return the number of snippets.

    A lost connection is made again after 1, 2, 4 ... up to 60 seconds. A recording, which has a length, ends at its end.

    Args:
        detector: A trained run.
        source: An address (rtsp, http, ...) or the file of an HLS playlist.
        lines: Where the alarms go.
        say: Called with lines for the user.
        sleep, clock: For tests.

    Raises DataError when the first connection fails.
    """
    began, total, pause = clock(), 0, 1.0
    alarms = Alarms(lines.threshold, detector.snippet_seconds)

    def tell(event: tuple[str, Interval] | None) -> None:
        if event:
            lines.write(event[0], str(source), event[1])

    try:
        while True:
            first = round((clock() - began) / detector.snippet_seconds) if total else 0
            try:
                for number, score in _connected(detector, source):
                    total += 1
                    pause = 1.0
                    tell(alarms.feed(first + number, score))
                return total
            except DataError as error:
                if not total:
                    raise
                tell(alarms.finish())
                say(f"{source}: connection lost ({str(error).removeprefix(f'{source}: ')}); again in {pause:.0f} s")
                sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
    except KeyboardInterrupt:
        say(f"{source}: stopped")
        return total
    finally:
        tell(alarms.finish())


def _connected(detector: Detector, source: str | Path) -> Iterator[tuple[int, float]]:
    """Yield (number, score) of a stream's snippets. Return at the end of a recording; DataError where a connection is lost."""
    from counterpoint.data.media import SnippetReader

    rolling = Rolling(detector.score_rows, detector.window)
    number = 0
    with SnippetReader(
        source, detector.visual, detector.audio, snippet_seconds=detector.snippet_seconds, live=True
    ) as reader:
        recording = reader.info.duration > 0
        for visual, audio in reader.features(STEP):
            raw = rolling.feed(visual, audio)
            for score in detector.calibration(raw) if detector.calibration else raw:
                yield number, float(score)
                number += 1
    if not recording:
        raise DataError(f"{source}: {reader.notes[-1] if reader.notes else 'the stream ended'}")


class Growing:
    """The complete video files of a folder that grows. A file is complete when its size and time stay the same for 4 s.

    Args:
        folder: The folder. Its subfolders and links are followed.
        clock: For tests.

    Raises DataError when it is no folder.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: --watch takes a folder, and there is none of this name")
        self.folder, self.clock = folder, clock
        self.seen: dict[Path, tuple[int, int, float]] = {}  # size, time of change, and since when both are the same
        self.done: dict[Path, tuple[int, int]] = {}

    def look(self) -> list[Path]:
        """Return the files that are complete and were not returned before in this state. Forget files that are gone."""
        now, ready = self.clock(), []
        seen: dict[Path, tuple[int, int, float]] = {}
        for path in walk(self.folder).files:
            if path.suffix.lower() not in VIDEO_ENDINGS:
                continue
            try:
                found = path.stat()
            except OSError:
                continue
            state = (found.st_size, found.st_mtime_ns)
            before = self.seen.get(path)
            since = before[2] if before is not None and before[:2] == state else now
            seen[path] = (*state, since)
            if state[0] and now - since >= SETTLED and self.done.get(path) != state:
                self.done[path] = state
                ready.append(path)
        self.seen = seen
        self.done = {path: state for path, state in self.done.items() if path in seen}
        return ready


def watch(
    detector: Detector,
    folder: Path,
    lines: Lines,
    *,
    say: Say,
    kept: Kept | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Detect in every video file that a folder has or gets, until Ctrl-C. Return the number of files.

    Args:
        detector: A trained run.
        folder: The folder.
        lines: Where the alarms go. Files that `kept` has finished before give none.
        say: Called with lines for the user.
        kept: Folder of results. Default: nothing is kept.
        sleep, clock: For tests.
    """
    growing = Growing(folder, clock)
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    count, away = 0, ""
    say(f"watching {folder}; stop with Ctrl-C")
    try:
        while True:
            try:
                ready, away = growing.look(), ""
            except DataError as error:  # a share that is away comes back
                if str(error) != away:
                    say(f"{error}; looking again")
                ready, away = [], str(error)
            for path in ready:
                try:
                    old = kept.load(path) if kept else None
                    if old is not None and not old[1]:
                        found = old[0]
                    else:
                        seen = identity(path) if kept else None
                        found = detector.detect(path, threshold=lines.threshold)
                        for moment in found.intervals:
                            lines.write("moment", str(path), moment)
                        say(f"{path}: {counted(len(found.intervals), 'moment')}, highest score {found.highest:.2f}")
                        if kept:
                            kept.save(found, write_beside, seen=seen)
                    count += 1
                    failed.pop(str(path), None)
                    if kept:
                        rows[str(path)] = kept.row(found)
                except (CounterpointError, OSError, MemoryError) as error:
                    failed[str(path)] = str(error).removeprefix(f"{path}: ")
                    say(f"{path}: {failed[str(path)]}")
            if kept and ready:
                told = {
                    "warnings": detector.warnings,
                    "failed": [list(pair) for pair in failed.items()],
                    "left_out": [],
                }
                kept.index(list(rows.values()), told)
            sleep(POLL)
    except KeyboardInterrupt:
        say(f"stopped after {counted(count, 'file')}")
    return count
