"""Print for the commands, and define types that parse fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from tyro.conf import arg

from counterpoint.errors import CounterpointError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from counterpoint.lab.cluster import Cluster

RUNS = Path("runs")
CLAIMS = Path("results/claims")
COMPARISONS = Path("results/compare")

# tyro imports typeguard (80 ms) to check a default against `X | None`, but not against Optional[X].
Text = Optional[str]  # noqa: UP045
Place = Optional[Path]  # noqa: UP045
Count = Optional[int]  # noqa: UP045
Probability = Optional[float]  # noqa: UP045
Device = Annotated[str, arg(metavar="DEVICE")]


def refuse_torchrun(why: str, instead: str = "") -> None:
    """Raise CounterpointError where torchrun started several processes. `why` and `instead` are parts of the message."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CounterpointError(f"{why}: start it without torchrun{instead}")


@dataclass(frozen=True)
class Machines:
    """The machines that run tasks: trials, runs or shards."""

    on: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: tasks of a Ray cluster, with the same results (extra [cluster])."""
    address: str = "local"
    """With --on ray, the cluster: local (a new one on this machine), auto (the one that runs here, or that $RAY_ADDRESS names),
    or an address such as ray://head:10001."""
    cpus_per_task: float = 1.0
    """With --on ray, CPUs that each task reserves."""
    gpus_per_task: float = 0.0
    """With --on ray, GPUs that each task reserves; a fraction shares one."""

    def cluster(self) -> Cluster | None:
        """Return the Ray cluster; None for this machine alone.

        Raises CounterpointError for options that need --on ray, and under torchrun, where every process would do all of the tasks.
        """
        refuse_torchrun(
            "this command divides its tasks itself", ", with --workers N, or with --on ray for several machines"
        )
        if self.on == "local":
            if self != HERE:
                raise CounterpointError("--address, --cpus-per-task and --gpus-per-task need --on ray")
            return None
        from counterpoint.lab.cluster import Cluster

        return Cluster(self.address, self.cpus_per_task, self.gpus_per_task)

    def jobs(self, given: int | None, default: int) -> int | None:
        """Return the number of tasks at a time: the given one, or `default` here, and None on a cluster."""
        return given if given is not None or self.on == "ray" else default


HERE = Machines()


def unset(**options: Any) -> Any:
    """Describe an option whose help text names its default, so that "(default: None)" is left out."""
    return arg(help_behavior_hint="", **options)


def console() -> Console:
    """Make a console for tables: as wide as the terminal, or 200 columns where the output goes to a file or a pipe."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def say(text: str) -> None:
    """Print a message. Under torchrun only the first process prints."""
    if os.environ.get("RANK", "0") == "0":
        console().print(text, soft_wrap=True, markup=False)


def complain(text: str, style: str = "yellow") -> None:
    """Print a warning to standard error."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """Make a table without borders. `right` names the columns of numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made


def signed(low: float | None, high: float | None, digits: int = 4) -> str:
    """Format an interval [low, high] with signs, or a dash where there is none."""
    return "-" if low is None or high is None else f"{low:+.{digits}f} .. {high:+.{digits}f}"


def settings_said(words: Sequence[str], **options: Any) -> dict[str, Any]:
    """Return settings from options of their own and from `NAME=VALUE` of the option --set.

    Args:
        words: The words of --set; YAML reads their values.
        options: Values of settings that have an option of their own; None: not given.

    Raises CounterpointError for a word of another form, and for a setting that both give.
    """
    from counterpoint.systems.settings import setting_value

    found = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise CounterpointError(f"--set takes NAME=VALUE, got '{word}'")
        found[key.replace("-", "_")] = setting_value(value)
    given = {name: value for name, value in options.items() if value is not None}
    for both in (name for name in given if name in found):
        raise CounterpointError(f"{both} is given by --{both.replace('_', '-')} and by --set; leave out one of them")
    return given | found
