"""Learn from a stream of phases, of which each has its own items: the common parts of continual learners of the task `aligned`.

Phases are those of tasks/phases.py. A learner keeps no items of earlier phases, unless it has a memory of its own.

After each phase the recalls at 1 of every phase's valid items are kept: R[t, p], after phase t on phase p, with the items of p as
candidates. The measures of the last phase T:

    last_...       R[T, T]                          first_...     R[T, 0]
    mean_...       mean over p of R[T, p]           forgetting    mean over p < T of max_t R[t, p] - R[T, p]
    average        mean over t of the mean over p <= t of R[t, p]
    transfer       mean over p > t of R[t, p]

The split test has the first three alone, as it is measured once. `..._rotation` is a mean angle in degrees, on items of the first
phase: between an embedding after that phase and now. `rotation_gap` is the difference of two modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.operands import EPS
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, snapshot
from counterpoint.tasks.aligned import AlignedConfig, AlignedLearner, first_two
from counterpoint.tasks.measures import retrieval
from counterpoint.tasks.phases import Phased, check_phases, heat_map, lost


@dataclass
class StreamConfig(AlignedConfig):
    """Settings of every learner from a stream."""

    phases: int = 0
    """Number of phases: consecutive groups of domains or, without domains, of training items. 0: one for each domain."""
    first_epochs: int = 0
    """Passes over the items of the first phase; 0: as many as over the others' (`epochs`)."""
    joint: bool = False
    """Train on the items of all phases at once, with `first_epochs` passes: the upper bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_phases(self.phases, self.first_epochs)


class Space(nn.Module):
    """The encoders and heads of a learner, which a teacher copies."""

    def __init__(self, encoders: nn.ModuleDict, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.encoders, self.heads = encoders, heads

    def forward(self, inputs: Mapping[str, Any]) -> dict[str, Float[Tensor, "n embedding"]]:
        """Project the inputs of each modality."""
        found = {}
        for name, values in inputs.items():
            encoder = self.encoders[name]
            features = encoder(*values) if isinstance(values, tuple | list) else encoder(values)
            found[name] = self.heads[name](features)
        return found


class StreamLearner(Phased, AlignedLearner):
    """A learner of two modalities in phases. `previous` and `origin` are frozen copies after the last and the first phase."""

    history: Tensor

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.first, self.second = first_two(data.modalities)
        self.previous = snapshot(Space(self.encoders, self.heads))
        self.origin = snapshot(Space(self.encoders, self.heads))
        self.set_phases(config, list(getattr(data, "domains", ())))
        self.register_buffer("history", torch.full((self.phases, self.phases, 2), -1.0))

    def enter_phase(self, phase: int, survey: Survey) -> None:
        if phase == 1:
            self.origin = snapshot(Space(self.encoders, self.heads))
        if phase:
            self.previous = snapshot(Space(self.encoders, self.heads))

    def taught(self, batch: dict[str, Any], teacher: Frozen | None = None) -> dict[str, Float[Tensor, "n embedding"]]:
        """Project a batch by the network at the end of the phase before, or by another copy."""
        found: dict[str, Tensor] = (teacher or self.previous)(batch["inputs"])
        return found

    # --- measures

    def end_epoch(self, epoch: int) -> None:
        super().end_epoch(epoch)
        if self.survey is not None and self.last_epoch:
            row = self.phase if not self.config.joint else self.phases - 1
            self.history[row] = torch.from_numpy(self.recalls(self.survey, "valid")).nan_to_num(-1.0).to(self.history)

    def embedded(self, survey: Survey, split: str, teacher: Frozen | None = None) -> tuple[Tensor, Tensor]:
        """Return unit embeddings [n, embedding] of all items of a split in both modalities, on the CPU."""

        def both(batch: dict[str, Any]) -> Tensor:
            found = self.embed(batch) if teacher is None else self.taught(batch, teacher)
            return torch.cat(
                [F.normalize(found[name].float(), dim=1, eps=EPS) for name in (self.first, self.second)], 1
            )

        one, other = survey.over(split, both).chunk(2, 1)
        return one, other

    def recalls(self, survey: Survey, split: str) -> NDArray[np.float64]:
        """Return recalls at 1 [phases, 2] among the items of each phase, from the first modality and the second."""
        rows = self.embedded(survey, split)
        phase, part = self.phase_of(survey, split), survey.split(split)
        whole = part.domains is None or not self.domains
        found = np.full((self.phases, 2), np.nan)
        for p in range(self.phases):
            at = np.arange(len(part)) if whole else np.flatnonzero(phase == p)
            if len(at) < 2:
                continue
            same = torch.from_numpy(_numbers(part.column(self.second, at)))
            for way, (query, key) in enumerate((rows, rows[::-1])):
                found[p, way] = retrieval(query[at], key[at], same, same)["r1"]
            if whole:
                found[:] = found[p]
                break
        return found

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        now, ways = self.recalls(survey, split), self._ways()
        found = {
            f"{where}_{way}_r1": float(now[at, n])
            for where, at in (("first", 0), ("last", -1))
            for n, way in enumerate(ways)
        }
        found |= {f"mean_{way}_r1": float(np.nanmean(now[:, n])) for n, way in enumerate(ways)}
        if not self.config.joint and self.survey is not None and self.phase:
            found |= self._rotations(survey, split)
        history = self.history[:, :, 0].cpu().double().numpy()
        history[history < 0] = np.nan  # not measured yet
        if split == "valid" and not np.isnan(history).all(1).any() and self.phases > 1:
            found |= stream_figures(history)
        return found

    def _ways(self) -> tuple[str, str]:
        return f"{self.first}_to_{self.second}", f"{self.second}_to_{self.first}"

    def _rotations(self, survey: Survey, split: str) -> dict[str, float]:
        at = np.flatnonzero(self.phase_of(survey, split) == 0)
        found = {}
        for name, now, then in zip(
            (self.first, self.second),
            self.embedded(survey, split),
            self.embedded(survey, split, self.origin),
            strict=True,
        ):
            cosine = (now[at] * then[at]).sum(1).clamp(-1, 1)
            found[f"{name}_rotation"] = float(torch.rad2deg(cosine.arccos()).mean())
        one, other = found.values()
        return found | {"rotation_gap": abs(one - other)}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the recalls after each phase on each phase."""
        shown = super().figures(survey)
        if self.config.joint or self.phases < 2:
            return shown
        values = self.history[:, :, 0].cpu().clamp(min=0).double().numpy()
        said = f"Recall at 1 from {self.first} to {self.second} on valid items."
        return shown | {"Recall after each phase": heat_map(values, self.names, said)}


def _numbers(column: Any) -> NDArray[np.int64]:
    """Number items so that those with equal texts or vectors have equal numbers; others are all different."""
    if isinstance(column, list):
        return np.unique(np.array(column, object).astype(str), return_inverse=True)[1].reshape(-1)
    if column.ndim == 2 and column.dtype == np.float32 and column.shape[1] <= 4096:
        return np.unique(column, axis=0, return_inverse=True)[1].reshape(-1)
    return np.arange(len(column))


def stream_figures(history: Float[np.ndarray, "after on"]) -> dict[str, float]:
    """Return average, transfer and forgetting of a stream (see the module).

    Args:
        history: R[t, p], the measure after phase t on phase p, of at least two phases.

    >>> stream_figures(np.array([[0.9, 0.1], [0.5, 0.8]]))["forgetting"]
    0.4
    """
    count = len(history)
    below = np.tril(np.ones((count, count), bool))
    means = [float(np.nanmean(history[t, : t + 1])) for t in range(count)]
    return {
        "average": float(np.mean(means)),
        "transfer": float(np.nanmean(history[~below])),
        "forgetting": lost(history),
    }
