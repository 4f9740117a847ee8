"""Divide a fit into phases, one after another: the common parts of learners from a stream, for any task.

A phase is a domain of the data, or a group of consecutive domains or training items. `tasks/class_streams.py` has groups of
classes. A phase is a stage of the fit, with a new optimiser. The matrix A[t, p] keeps a measure after phase t on the items of
phase p. Rows and columns are in the order of learning.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.words import counted


def check_phases(phases: int, first_epochs: int) -> None:
    """Raise CounterpointError for negative settings of a stream."""
    if phases < 0 or first_epochs < 0:
        raise CounterpointError(f"phases and first_epochs must not be negative, got {phases} and {first_epochs}")


class PhaseBatches(Batches):
    """Batches of one phase's items, without the last, smaller one.

    Args:
        rows: positions of the items.
        batch_size: number of items in a batch.
    """

    def __init__(self, rows: NDArray[np.int64], batch_size: int) -> None:
        super().__init__(len(rows), batch_size, drop_last=True)
        self.rows = rows

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        return generator.permutation(self.rows)


class Phased(Learner):
    """The phases of a learner. Its constructor calls `set_phases`; its settings have phases, first_epochs, joint, epochs."""

    def set_phases(self, config: Any, domains: list[str]) -> None:
        """Choose number and names of the phases.

        Args:
            config: the settings.
            domains: names of the data's domains, in the order of learning.

        Raises DataError for data without phases, and for more phases than domains.
        """
        self.domains = domains
        self.phases = config.phases or len(domains)
        if not self.phases:
            raise DataError(
                "the data have no domains, which are the phases of a stream; set --phases for that many parts of the items"
            )
        if domains and self.phases > len(domains):
            said = ", ".join(domains)
            raise DataError(
                f"--phases {config.phases} exceeds the {counted(len(domains), 'domain')} of the data ({said})"
            )
        own = self.phases == len(domains)
        self.names = domains if own else [f"phase {p + 1}" for p in range(self.phases)]

    def begin(self, survey: Survey) -> None:
        """Raise DataError where a phase has fewer items than a batch; all phases at once may."""
        super().begin(survey)
        if self.config.joint:
            return
        self.check_counts(np.bincount(self.phase_of(survey, "train")[survey.rows], minlength=self.phases))

    def check_counts(self, counts: NDArray[np.int64]) -> None:
        """Raise DataError for phases with too few training items; `counts` has the number of each."""
        least = self.names[int(counts.argmin())]
        if counts.min() < 2:
            raise DataError(f"{least} has {counted(int(counts.min()), 'training item')}; use fewer --phases")
        if counts.min() < self.config.batch_size:
            raise DataError(
                f"{least} has {counted(int(counts.min()), 'training item')}, fewer than a batch of "
                f"{self.config.batch_size}; use --batch-size {counts.min()} or less"
            )

    def phase_of(self, survey: Survey, split: str) -> NDArray[np.int64]:
        """Return the phase of each item of a split; all valid and test items are of every phase where there are no domains."""
        part = survey.split(split)
        domains = getattr(part, "domains", None)
        if domains is not None and self.domains:
            return np.asarray(domains) * self.phases // len(self.domains)
        return np.arange(len(part)) * self.phases // len(part)

    def stages(self) -> list[Stage]:
        first = self.config.first_epochs or self.config.epochs
        if self.config.joint:
            return [Stage("all phases", first, enter=self.enter_joint)]
        epochs = [first, *[self.config.epochs] * (self.phases - 1)]
        return [
            Stage(name, count, batches=partial(self._batches, phase), enter=partial(self.enter_phase, phase))
            for phase, (name, count) in enumerate(zip(self.names, epochs, strict=True))
        ]

    def _batches(self, phase: int, survey: Survey) -> Batches:
        rows = np.flatnonzero(self.phase_of(survey, "train")[survey.rows] == phase)
        return PhaseBatches(rows, self.config.batch_size)

    def enter_phase(self, phase: int, survey: Survey) -> None:
        """Prepare for a phase, before its optimiser is made."""

    def enter_joint(self, survey: Survey) -> None:
        """Prepare for a training on all phases at once."""

    @property
    def phase(self) -> int:
        """The current phase; 0 where all phases train at once."""
        return 0 if self.config.joint else self.position.stage

    @property
    def last_epoch(self) -> bool:
        """Whether the current epoch is the last of its phase."""
        return self.position.epoch == self.epochs - 1


def heat_map(values: Float[np.ndarray, "after on"], names: list[str], caption: str) -> dict[str, Any]:
    """Return the figure of a matrix of measures after each phase on each phase; unknown ones count as 0."""
    return {
        "kind": "matrix",
        "values": np.round(np.nan_to_num(values), 4).tolist(),
        "names": names,
        "caption": f"{caption} Rows: after the phase. Columns: on the items of the phase.",
    }


def lost(matrix: Float[np.ndarray, "after on"]) -> float:
    """Return forgetting: mean over p < T of max over t of A[t, p] - A[T, p], of at least two phases."""
    return round(float(np.nanmean(np.nanmax(matrix[:, :-1], 0) - matrix[-1, :-1])), 12)


def task_figures(matrix: Float[np.ndarray, "after on"]) -> dict[str, float]:
    """Return the measures of a stream of tasks, as ZSCL's protocol defines them (arXiv 2303.06628), and forgetting.

    Args:
        matrix: A[t, p], the accuracy after phase t on phase p, of at least two phases.

    Returns:
        last: mean over p of A[T, p] after the last phase T.
        average: mean of all A[t, p].
        transfer: mean over p > 0 of the mean over t < p of A[t, p], on phases not yet learned.
        forgetting: mean over p < T of the best A[t, p] minus A[T, p].

    >>> task_figures(np.array([[0.9, 0.1], [0.5, 0.8]]))
    {'last': 0.65, 'average': 0.575, 'transfer': 0.1, 'forgetting': 0.4}
    """
    ahead = [float(np.nanmean(matrix[:p, p])) for p in range(1, len(matrix))]
    found = {"last": np.nanmean(matrix[-1]), "average": np.nanmean(matrix), "transfer": np.mean(ahead)}
    return {name: round(float(value), 12) for name, value in found.items()} | {"forgetting": lost(matrix)}
