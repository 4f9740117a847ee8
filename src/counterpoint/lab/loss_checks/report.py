"""Define the result of a check and the report of all checks of a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Verdict: TypeAlias = Literal["holds", "fails", "not applicable", "error"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "fails"
NOT_APPLICABLE: Verdict = "not applicable"
ERROR: Verdict = "error"

JSON = str | int | float | bool | None


@dataclass(frozen=True)
class Check:
    """The result of one check of a loss."""

    name: str
    """Name of the check, such as "2 processes: gradient"."""
    verdict: Verdict
    """"error" means that the loss, or a process, raised an exception or ended; `found` has its message."""
    error: float | None
    """Largest relative error of the loss and its gradients, at least 0. None where nothing was compared."""
    found: str
    """The observation in words; empty where no word is needed."""
    meaning: str
    """The effect of a failure on training, in one sentence."""
    convention: str | None = None
    """For checks of several processes: the convention that value or gradient follows, such as "mean" or "sum"."""


@dataclass(frozen=True)
class Report:
    """All checks of one loss."""

    loss: str
    """The loss as it was named."""
    settings: dict[str, Any]
    """Arguments of its constructor, or keyword arguments of the function."""
    inputs: str
    """Description of its inputs."""
    size: int
    """Items of a process's batch."""
    dim: int
    """Width of a row."""
    normalize: bool
    """Whether rows have length 1."""
    reference: str
    """Number type of the comparisons between one and several processes: "float64" or "float32"."""
    checks: tuple[Check, ...]
    versions: dict[str, str]
    """Versions of Python, torch and the package of the loss."""
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether no check fails or ends in an error."""
        return all(check.verdict in (HOLDS, NOT_APPLICABLE) for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """Return the check of this name. Raise KeyError for an unknown name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r}; the checks are: {', '.join(check.name for check in self.checks)}")

    def record(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold. An error that is not finite becomes the text "inf" or "nan"."""
        checks = [
            asdict(check)
            if check.error is None or math.isfinite(check.error)
            else {**asdict(check), "error": str(check.error)}
            for check in self.checks
        ]
        settings = {name: value if isinstance(value, JSON) else repr(value) for name, value in self.settings.items()}
        return {**asdict(self), "settings": settings, "checks": checks, "holds": self.holds}


def markdown(losses: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of recorded losses: the gradient over processes, uneven batches, and faults in one process.

    Args:
        losses: Records as `Report.record` makes them, each with `library`, `version` and `title`.
    """
    lines = [
        "| library | loss | value | gradient | uneven batches | does not hold in one process |",
        "|---|---|---|---|---|---|",
    ]
    for loss in losses:
        checks = {check["name"]: check for check in loss["checks"]}
        cells = [
            _cells([check for name, check in checks.items() if name.endswith(ending) and ("uneven" in name) == uneven])
            for ending, uneven in ((": value", False), (": gradient", False), (": gradient", True))
        ]
        alone = [
            f"{name}{' (error)' if check['verdict'] == ERROR else ''}"
            for name, check in checks.items()
            if "process" not in name and check["verdict"] in (FAILS, ERROR)
        ]
        lines.append(
            f"| {loss['library']} {loss['version']} | {loss['title']} | {' | '.join(cells)} | {', '.join(alone)} |"
        )
    return "\n".join(lines)


def _cells(checks: Sequence[Mapping[str, Any]]) -> str:
    """Describe checks over 2, 3, ... processes: the first one of each convention."""
    first: dict[Any, Mapping[str, Any]] = {}
    for check in checks:
        first.setdefault((check["verdict"], check["convention"]), check)
    return " / ".join(_cell(check) for check in first.values())


def _cell(check: Mapping[str, Any]) -> str:
    """Describe a check over processes in a few words."""
    if check["verdict"] == HOLDS:
        return "holds"
    if check["verdict"] == ERROR:
        return "a process ends" if "ended by" in check["found"] else "error"
    words = {
        "own batch": "own batch alone",
        "sum": "W times too small",
        "W times": "W times too large",
        "mixed": check["found"],
        "scaled": check["found"],
        "neither": f"wrong, relative error {check['error']:.2g}" if isinstance(check["error"], float) else "not finite",
    }
    return words.get(check["convention"], check["convention"])
