"""Summarise runs for a list, and keep the summaries: by the time of the run's folder, in memory and on disk."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from counterpoint.engine.run import CHECKPOINT, CONFIG, LOADER, METRICS, WEIGHTS
from counterpoint.engine.state import STATE, State, state_of
from counterpoint.errors import CounterpointError
from counterpoint.files import cache_folder, replacing
from counterpoint.serve.places import OutsideError, Places
from counterpoint.serve.walking import Walk

TEXT = 8192  # characters of the settings that words are looked for in
ALIVE = 900.0  # seconds: a run of another machine that wrote more recently is taken to be training; it saves every few minutes
MANY = 200  # summaries that are worth keeping on disk
STATES = ("finished", "training", "interrupted", "diverged", "failed", "stopped")


@dataclass
class Summary:
    """A row of the list of runs."""

    key: str
    stamp: int  # time of change of its folder, nanoseconds
    name: str
    slug: str = ""
    data: str = ""
    seed: Any = None
    complete: bool = False
    resumable: bool = False
    epochs: int = 0  # rows of metrics
    metrics: dict[str, float] = field(default_factory=dict)  # the last finite value of each
    text: str = ""  # the name and the settings in lower case, for words
    damaged: str = ""
    process: str = ""  # "alive" or "ended", where the server started its training
    record: dict[str, Any] = field(default_factory=dict)  # the fields of its state.json; {}: there is none

    @property
    def time(self) -> float:
        """The time of its last change, seconds since 1970."""
        return self.stamp / 1e9

    @property
    def state(self) -> str:
        """One of STATES. "stopped": its process ended without a word, as at `kill`."""
        record = State(**self.record) if self.record else None
        if self.complete:
            return "finished"
        if self.process == "alive":
            return "training"
        if record is not None and record.state != "training":
            return record.state
        alive = record.alive if record is not None else None
        if alive is None:
            alive = not self.process and time.time() - self.time < ALIVE
        return "training" if alive else "stopped"

    @property
    def why(self) -> str:
        """The reason why its training diverged or failed; "" for others."""
        return str(self.record.get("why", "")) if self.state in ("diverged", "failed") else ""


def last_values(text: str) -> tuple[int, dict[str, float]]:
    """Return the number of rows of a metrics file, and the last finite value of each column."""
    lines = text.splitlines()
    found: dict[str, float] = {}
    if len(lines) < 2:
        return 0, found
    names = next(csv.reader(lines[:1]))
    wanted = {n: name for n, name in enumerate(names) if name not in ("epoch", "step")}
    for row in csv.reader(reversed(lines[1:])):  # the last row often has every column
        for n in list(wanted):
            if n < len(row) and row[n]:
                value = float(row[n])
                if math.isfinite(value):
                    found[wanted.pop(n)] = value
        if not wanted:
            break
    return len(lines) - 1, {name: found[name] for name in names if name in found}


def summarised(places: Places, path: str, stamp: int) -> Summary:
    """Read the summary of the run at `path`. A damaged run gets a summary that names the fault."""
    made = Summary(places.key(path), stamp, os.path.basename(path))
    try:
        text = places.read(os.path.join(path, CONFIG))
        config = yaml.load(text, LOADER)  # a safe loader: it makes plain values only
        if not isinstance(config, dict):
            raise CounterpointError(f"{CONFIG} holds no settings")
        # Nothing else is kept: by aliases, a short text can hold a value of any size.
        made.slug, made.data = (value if isinstance(value, str) else "" for value in map(config.get, ("slug", "data")))
        made.seed = seed if isinstance(seed := config.get("seed"), int) else None
        made.text = f"{made.name} {text[:TEXT]}".lower()
        names = set(os.listdir(path))
        made.resumable = CHECKPOINT in names
        made.complete = WEIGHTS in names and not made.resumable
        if STATE in names:
            with contextlib.suppress(OutsideError):  # the training has ended meanwhile
                record = state_of(places.read(os.path.join(path, STATE)))
                made.record = asdict(record) if record else {}
        if METRICS in names:
            made.epochs, made.metrics = last_values(places.read(os.path.join(path, METRICS)))
    except (CounterpointError, OSError, ValueError, yaml.YAMLError, csv.Error, RecursionError) as error:
        made.damaged = str(error).splitlines()[0][:200]
        made.text = made.text or made.name.lower()
    return made


class Index:
    """Summaries of all runs under the folders. A thread reads them, the newest run first."""

    def __init__(self, places: Places, walk: Walk) -> None:
        self.places, self.walk = places, walk
        self._kept: dict[str, Summary] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._metrics: tuple[int, list[str]] = (-1, [])
        self._reads = 0  # how many summaries were read
        digest = hashlib.sha256("\0".join(map(str, places.folders)).encode()).hexdigest()[:16]
        self.file = cache_folder() / "serve" / f"{digest}.json"
        try:
            rows = json.loads(self.file.read_text(encoding="utf-8"))
            self._kept = {path: Summary(**row) for path, row in rows.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # absent, or of another version

    def __call__(self, patience: float = 0.5) -> tuple[list[Summary], int]:
        """Return the summaries that are read, the newest run first, and the number of runs still to read.

        Args:
            patience: Time to wait for the thread that reads, in seconds, >= 0.
        """
        runs = self.walk().runs
        unread = self._unread(runs)
        if unread:
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._read, args=(unread,), daemon=True)
                    self._thread.start()
            self._thread.join(patience)
            runs = self.walk().runs
        kept = self._kept
        found = [kept[path] for path in runs if path in kept]
        found.sort(key=lambda run: -run.stamp)
        return found, len(self._unread(runs))

    def metrics(self, runs: Sequence[Summary]) -> list[str]:
        """Return `measured(runs)` of all runs, and keep it until a summary is read."""
        if self._metrics[0] != self._reads:
            self._metrics = self._reads, measured(runs)
        return self._metrics[1]

    def _unread(self, runs: dict[str, int]) -> list[str]:
        kept = self._kept
        unread = [path for path, stamp in runs.items() if path not in kept or kept[path].stamp != stamp]
        return sorted(unread, key=lambda path: -runs[path])

    def _read(self, unread: Sequence[str]) -> None:
        for path in unread:
            try:
                stamp = os.stat(path).st_mtime_ns
            except OSError:
                continue
            self._kept[path] = summarised(self.places, path, stamp)
            self._reads += 1
        self.walk.forget()
        if len(unread) >= MANY:
            there = self.walk().runs
            rows = {path: asdict(run) for path, run in list(self._kept.items()) if path in there}
            self._kept = {path: run for path, run in self._kept.items() if path in there}
            try:
                with replacing(self.file) as file:
                    file.write(json.dumps(rows).encode())
            except OSError:
                pass  # a cache that cannot be written costs time only


def matching(runs: Iterable[Summary], words: str) -> list[Summary]:
    """Return the runs whose name, state or settings have all the words."""
    wanted = words.lower().split()
    return [run for run in runs if all(word in run.text or word == run.state for word in wanted)]


def measured(runs: Iterable[Summary]) -> list[str]:
    """Return the names of the metrics that runs have: of test first, then of valid; among these, what most runs have first."""
    counts: dict[str, int] = {}
    for run in runs:
        for name in run.metrics:
            counts[name] = counts.get(name, 0) + 1
    order = ("test", "valid", "train")
    places = {name: name.partition("/")[0] for name in counts}
    return sorted(counts, key=lambda n: (order.index(places[n]) if places[n] in order else len(order), -counts[n]))


def sorted_by(runs: Sequence[Summary], column: str, *, down: bool) -> list[Summary]:
    """Sort runs by a column: name, system, data, seed, state, epochs, time, or a metric. Runs without a value come last."""
    values = {
        "name": lambda run: run.name,
        "system": lambda run: run.slug,
        "data": lambda run: run.data,
        "seed": lambda run: run.seed if isinstance(run.seed, int) else None,
        "state": lambda run: STATES.index(run.state),
        "epochs": lambda run: run.epochs,
        "time": lambda run: run.stamp,
    }
    value = values.get(column, lambda run: run.metrics.get(column))
    there = [run for run in runs if value(run) is not None]
    return [
        *sorted(there, key=value, reverse=down),
        *(run for run in runs if value(run) is None),
    ]


def log_of(places: Places, run: Path) -> Path | None:
    """Return the log of a run that the server started; None where there is none."""
    file = run.parent / ".serve" / f"{run.name}.log"
    return file if places.holds(file) else None
