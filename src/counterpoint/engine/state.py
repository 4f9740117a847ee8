"""Record in a run's folder which process trains it, and how a training ended that did not reach its end.

The file state.json is there from the start of a training. It is removed when the run is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from counterpoint.core.world import processes
from counterpoint.errors import CounterpointError, Diverged, Interrupted, RunError
from counterpoint.files import replacing

STATE = "state.json"
ENDS = ("interrupted", "diverged", "failed")
LINE = 300  # characters of a reason


@dataclass(frozen=True)
class State:
    """The state of an unfinished run, as its folder records it."""

    state: str  # "training", or one of ENDS
    why: str = ""  # the first line of the error
    machine: str = ""  # the machine of the process, since its last start
    pid: int = 0
    born: str = ""  # the start of the process as the system counts it: a later process may have the same number

    @property
    def alive(self) -> bool | None:
        """Whether the process that trains is alive. None where this cannot be known, as for another machine's process."""
        if self.state != "training":
            return False
        if not self.born or self.machine != machine():
            return None
        return born(self.pid) == self.born

    @property
    def said(self) -> str:
        """The state as the second half of a sentence about the run: "its training was interrupted"."""
        words = {
            "training": f"process {self.pid} trains it" if self.alive else "its training has not ended",
            "interrupted": "its training was interrupted",
            "diverged": f"its training diverged ({self.why})",
            "failed": f"its training failed ({self.why})",
        }
        if self.alive is False and self.state == "training":
            return "the process of its training was ended"
        return words[self.state]


def read_state(folder: Path) -> State | None:
    """Read the state of the run in a folder. None where there is no record, or none that can be read."""
    try:
        return state_of((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def state_of(text: str) -> State | None:
    """Read the state of a run from the text of its record. None for a text that is no record."""
    try:
        row = json.loads(text)
        found = State(**row)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = (found.state, found.why, found.machine, found.born)
    valid = all(isinstance(value, str) for value in texts) and type(found.pid) is int
    return found if valid and found.state in ("training", *ENDS) else None


@contextlib.contextmanager
def recorded(folder: Path | None) -> Iterator[None]:
    """Record that this process trains a run, as long as the block lasts, and how the block ended.

    Args:
        folder: The run's folder. None records nothing. Only the first of several processes writes.
    """
    if folder is None or not is_first() or not folder.is_dir():
        yield
        return
    _write(folder, State("training", "", machine(), os.getpid(), born(os.getpid())))
    try:
        yield
    except BaseException as error:
        if folder.is_dir():
            with contextlib.suppress(OSError):  # a full disk must not hide the error
                _write(folder, State(_end(error), _line(error)))
        raise
    (folder / STATE).unlink(missing_ok=True)


def need_idle(folder: Path) -> None:
    """Raise RunError where another process of this machine trains the run in a folder."""
    found = read_state(folder)
    if is_first() and found is not None and found.alive and found.pid != os.getpid():
        raise RunError(f"process {found.pid} is training {folder}; wait for its end, or stop it")


def is_first() -> bool:
    """Return whether this process writes the files of a run, also before the processes have joined."""
    return processes()[0] == 0 and int(os.environ.get("RANK", "0")) == 0


def machine() -> str:
    """Return the name of this machine with the number of its start, where the system counts starts."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        start = ""
    return f"{platform.node()} {start}".strip()


def born(pid: int) -> str:
    """Return the start time of a process as Linux counts it; "" for no process, for a dead one, and on other systems."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if rest[0] in ("Z", "X") else rest[19]


def _write(folder: Path, state: State) -> None:
    with replacing(folder / STATE) as file:
        file.write(json.dumps(asdict(state), indent=1).encode())


def _end(error: BaseException) -> str:
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted"
    return "diverged" if isinstance(error, Diverged) else "failed"


def _line(error: BaseException) -> str:
    text, kind = str(error).strip(), type(error).__name__
    if not isinstance(error, CounterpointError):
        text = f"{kind}: {text}" if text else kind
    return (text or kind).splitlines()[0][:LINE]
