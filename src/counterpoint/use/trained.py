"""Open a finished run with its trained learner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.experiment import load_learner


@dataclass
class TrainedRun:
    """A finished run and its learner. Subclasses add one use of it."""

    run: Run
    learner: Any

    @classmethod
    def load(cls, path: Run | Path | str, learner: Any = None, device: str | None = None) -> Self:
        """Load a finished run.

        Args:
            path: An open run, or the path of its directory.
            learner: Its trained learner, where it is loaded already. Default: load it.
            device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps. Default: the learner's.

        Raises RunError for a folder that is no finished run.
        """
        run = path if isinstance(path, Run) else Run.open(path)
        learner = load_learner(run) if learner is None else learner
        return cls(run, learner if device is None else learner.to(Loop(device=device).on()))
