"""Start, watch and stop trainings as child processes. A training goes on when the server ends.

A job is two files in the hidden folder `.serve` beside the run: NAME.json, with the command and the process, and NAME.log, with
its output. The command is a list of arguments; no shell reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from counterpoint.engine.state import born
from counterpoint.errors import CounterpointError
from counterpoint.files import replacing
from counterpoint.serve.places import OutsideError, Places

FOLDER = ".serve"
MOST = 8  # trainings at the same time
TAIL = 16_000  # bytes of a log's end that a page shows


@dataclass(frozen=True)
class Job:
    """One training that the server started."""

    name: str
    run: str  # the path of its run
    command: tuple[str, ...]
    pid: int
    born: str  # the start of the process as the system counts it: a later process may have the same number
    started: float  # seconds since 1970
    asked: int = 0  # how often it was asked to stop
    code: int | None = None  # its exit code, where the server saw its end

    @property
    def log(self) -> Path:
        """Its output."""
        return Path(self.run).parent / FOLDER / f"{self.name}.log"

    @property
    def words(self) -> list[str]:
        """Its command as the user would type it."""
        return ["counterpoint", *self.command[3:]]


class Jobs:
    """The trainings of a folder of runs.

    Args:
        places: The folders of the server.
        out: The folder in which runs are made; made at the first start.
    """

    def __init__(self, places: Places, out: Path) -> None:
        self.places, self.out = places, out
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Job]:
        """List the trainings, the newest first."""
        found = [job for file in self._folder.glob("*.json") if (job := self._read(file)) is not None]
        return sorted(found, key=lambda job: -job.started)

    def get(self, name: str) -> Job:
        """Return a training by its name. OutsideError when there is none."""
        for job in self.all():
            if job.name == name:
                return job
        raise OutsideError(f"the server started no training '{name}'")

    def of_run(self, run: Path) -> Job | None:
        """Return the training of a run, or None."""
        return next((job for job in self.all() if Path(job.run) == run), None)

    def running(self, job: Job) -> bool:
        """Return whether a training's process is alive."""
        child = self._children.get(job.pid)
        if child is not None:
            code = child.poll()
            if code is None:
                return True
            del self._children[job.pid]
            self._write(replace(job, code=code))
            return False
        return job.code is None and bool(job.born) and born(job.pid) == job.born

    def processes(self) -> dict[str, str]:
        """Return "alive" or "ended" for each training, by the path of its run."""
        return {job.run: "alive" if self.running(job) else "ended" for job in self.all()}

    def start(self, name: str, words: Sequence[str], run: Path) -> Job:
        """Start `counterpoint WORDS` and return its job.

        Args:
            name: The name of the run, also that of the job.
            words: The command's words, such as train, simclr, --data, digits.
            run: The path of its run.

        Raises CounterpointError when the name is running, or too many trainings are.
        """
        with self._lock:
            running = [job for job in self.all() if self.running(job)]
            if any(job.name == name for job in running):
                raise CounterpointError(f"{name} is training already")
            if len(running) >= MOST:
                raise CounterpointError(f"{MOST} trainings are running; stop one, or wait for its end")
            self._folder.mkdir(parents=True, exist_ok=True)
            self.places.inside(self._folder)
            command = (sys.executable, "-m", "counterpoint", *words)
            with (self._folder / f"{name}.log").open("ab") as log:
                log.write(f"$ counterpoint {' '.join(words)}\n".encode())
                log.flush()
                child = subprocess.Popen(  # a list of arguments, and no shell
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.places.folders[0],
                    env=environment(),
                    start_new_session=True,  # Ctrl-C at the server is not for its trainings
                )
            self._children[child.pid] = child
            job = Job(name, str(run), command, child.pid, born(child.pid), time.time())
            self._write(job)
            return job

    def stop(self, name: str) -> Job:
        """Ask a training to stop as Ctrl-C does: it finishes its step and saves. The third time, end its process."""
        job = self.get(name)
        if not self.running(job):
            raise CounterpointError(f"{name} is not running")
        job = replace(job, asked=job.asked + 1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGINT if job.asked < 3 else signal.SIGTERM)
        self._write(job)
        return job

    def tail(self, job: Job) -> str:
        """Return the end of a training's log."""
        return self.places.read(job.log, TAIL, tail=True) if job.log.is_file() else ""

    @property
    def _folder(self) -> Path:
        return self.out / FOLDER

    def _write(self, job: Job) -> None:
        with replacing(self._folder / f"{job.name}.json") as file:
            file.write(json.dumps(asdict(job), indent=1).encode())

    def _read(self, file: Path) -> Job | None:
        try:
            row = json.loads(self.places.read(file))
            job = Job(**{**row, "command": tuple(row["command"])})
        except (ValueError, TypeError, KeyError, OSError, CounterpointError):
            return None
        return job if job.name == file.stem and Path(job.run).parent == self.out else None


def environment() -> dict[str, str]:
    """Return the environment of a training: the server's own, without its token."""
    kept = {name: value for name, value in os.environ.items() if name != "COUNTERPOINT_TOKEN"}
    return {**kept, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
