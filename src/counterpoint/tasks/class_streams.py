"""Learn from a stream of classes, of which each phase brings new ones: the common parts of such learners of the task `aligned`.

A phase is a group of classes, and a stage of the fit with a new optimiser. Before a phase, the memory takes a few items of each
class of the phase before; its items join the batches of all later phases (`tasks/rehearsal.py`). The memory holds positions of
training items, so an item is rehearsed with all of its content. A learner classifies among the classes seen so far.

After each phase the accuracies on every phase's valid items are kept: R[t, p], after phase t on classes of phase p. Measures:

    seen_accuracy    share of right items among those of the classes seen so far; after the last phase, of all classes
    first_accuracy   the same on classes of the first phase, new_accuracy on those of the current one
    average          mean over t of the mean over p <= t of R[t, p]
    forgetting       mean over p < T of max_t R[t, p] - R[T, p]

`average` and `forgetting` are of valid items alone, as the split test is measured once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from counterpoint.engine.loading import Batches
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import snapshot
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.aligned import AlignedConfig, AlignedLearner
from counterpoint.tasks.phases import Phased, check_phases, heat_map
from counterpoint.tasks.rehearsal import RehearsalBatches, exemplars, herded, need_memory
from counterpoint.tasks.streams import Space, stream_figures
from counterpoint.words import counted

LISTED = 8  # kept items that the table names for a class


@dataclass
class ClassStreamConfig(AlignedConfig):
    """Settings of every learner from a stream of classes."""

    phases: int = 6
    """Number of phases; each brings a group of classes, as equal in number as possible."""
    class_order: Literal["random", "data"] = "random"
    """Order of the classes over the phases: random, by the seed of the run, or that of the data."""
    memory: float = 0.01
    """Items of each class that are kept: below 1 a share of its training items, at least one; from 1 on a number; 0: none."""
    selection: Literal["herding", "random"] = "herding"
    """Choose kept items by herding, near the class's mean feature, or at random."""
    rehearsal_share: float = 0.2
    """Share of kept items in a batch; less where the memory has fewer, as no item is twice in a batch."""
    first_epochs: int = 0
    """Passes over the items of the first phase; 0: as many as over the others' (`epochs`)."""
    joint: bool = False
    """Train on all classes at once, with `first_epochs` passes: the upper bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count("phases")
        check_phases(self.phases, self.first_epochs)
        need_memory(self.memory, self.rehearsal_share, self.selection)


class ClassStreamLearner(Phased, AlignedLearner):
    """A learner of classes in phases. `previous` is a frozen copy of the encoder of sounds and its head after the last phase.

    Subclasses write `loss`, and `classified(batch)`: the class of each item among those seen so far.
    """

    phase_of_class: Tensor
    reached: Tensor
    kept: Tensor
    history: Tensor

    def __init__(self, config: Any, data: Any, first: str, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.first = first  # the modality that is classified
        names = list(data.class_names)
        if not names:
            raise DataError("the data have no classes, which are what the phases of this stream differ in")
        if config.phases > len(names):
            raise DataError(
                f"--phases {config.phases} exceeds the {counted(len(names), 'class')} of the data; use fewer"
            )
        self.class_names = names
        self.set_phases(config, [])
        order = np.arange(len(names))
        if config.class_order == "random":
            order = np.random.default_rng([seed, 2310]).permutation(order)
        groups = np.empty(len(names), np.int64)
        groups[order] = np.arange(len(names)) * self.phases // len(names)
        self.register_buffer("phase_of_class", torch.from_numpy(groups))
        self.register_buffer("reached", torch.tensor(self.phases - 1 if config.joint else 0))
        self.register_buffer("kept", torch.zeros(data.examples, dtype=torch.bool))
        self.register_buffer("history", torch.full((self.phases, self.phases), -1.0))
        self.previous = snapshot(self.space())

    def space(self) -> Space:
        """Return the networks that a teacher copies."""
        return Space(*(torch.nn.ModuleDict({self.first: of[self.first]}) for of in (self.encoders, self.heads)))

    # --- phases

    @property
    def phase(self) -> int:
        """The current phase; the last where all classes train at once."""
        return int(self.reached)

    @property
    def seen(self) -> Bool[Tensor, " classes"]:
        """Which classes were seen so far."""
        return self.phase_of_class <= self.reached

    def is_rehearsal(self, labels: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Tell of each item of a batch whether it comes from the memory. No class is in two phases."""
        if self.config.joint:
            return torch.zeros_like(labels, dtype=torch.bool)
        return self.phase_of_class[labels] < self.reached

    def begin(self, survey: Survey) -> None:
        """Raise DataError for items without a class or without the first modality, and for classes without an item."""
        super().begin(survey)
        labels, part = self._labels(survey, "train"), survey.split("train")
        if unknown := int((labels < 0).sum()):
            raise DataError(
                f"{unknown} of {counted(len(labels), 'training item has', 'training items have')} no class; give each a class, "
                "or leave them out"
            )
        counts = np.bincount(labels, minlength=len(self.class_names))
        if not counts.min():
            raise DataError(
                f"the class '{self.class_names[int(counts.argmin())]}' has no training item; remove its name"
            )
        if missing := int((~part.present(self.first, np.arange(len(labels)))).sum()):
            raise DataError(
                f"{missing} of {counted(len(labels), 'training item lacks', 'training items lack')} {self.first}, which is to be "
                "classified"
            )

    def _labels(self, survey: Survey, split: str) -> NDArray[np.int64]:
        labels = survey.split(split).labels
        if labels is None:
            raise DataError("the data have no classes, which are what the phases of this stream differ in")
        return np.asarray(labels)

    def check_counts(self, counts: NDArray[np.int64]) -> None:
        """Accept phases of any size: their batches are as small as they must."""

    def phase_of(self, survey: Survey, split: str) -> NDArray[np.int64]:
        """Return the phase of each item's class; the number of phases for items without a class."""
        labels = self._labels(survey, split)
        return np.where(labels >= 0, self.phase_of_class.cpu().numpy()[labels], self.phases)

    def _batches(self, phase: int, survey: Survey) -> Batches:
        new = np.flatnonzero(self.phase_of(survey, "train") == phase)
        kept = np.flatnonzero(self.kept.cpu().numpy())
        return RehearsalBatches(new, kept, self.config.batch_size, self.config.rehearsal_share)

    def enter_phase(self, phase: int, survey: Survey) -> None:
        if phase:
            self._keep(phase - 1, survey)
            self.previous = snapshot(self.space())
        self.reached.fill_(phase)

    def _keep(self, phase: int, survey: Survey) -> None:
        """Add items of each class of a phase to the memory, chosen by the features of the current network."""
        labels = self._labels(survey, "train")
        for number in np.flatnonzero(self.phase_of_class.cpu().numpy() == phase):
            rows = np.flatnonzero(labels == number)
            count = exemplars(self.config.memory, len(rows))
            if self.config.selection == "herding":
                found = survey.over("train", lambda batch: F.normalize(self.sound_features(batch), dim=1), rows)
                chosen = rows[herded(found, count).numpy()]
            else:
                chosen = np.random.default_rng([self.seed, int(number)]).permutation(rows)[:count]
            self.kept[torch.from_numpy(chosen).to(self.kept.device)] = True

    def sound_features(self, batch: dict[str, Any]) -> Tensor:
        """Return the features [n, dim] of a batch in the first modality."""
        return self.features(self.first, batch["inputs"][self.first])

    def taught(self, batch: dict[str, Any]) -> Tensor:
        """Project a batch in the first modality by the network at the end of the phase before."""
        found: Tensor = self.previous({self.first: batch["inputs"][self.first]})[self.first]
        return found

    def classified(self, batch: dict[str, Any]) -> Int[Tensor, " n"]:
        """Return the class of each item among those seen so far."""
        raise CounterpointError(f"{type(self).__name__} classifies nothing; write its method `classified`")

    # --- measures

    def end_epoch(self, epoch: int) -> None:
        super().end_epoch(epoch)
        if self.survey is not None and self.last_epoch:
            found = self.accuracies(self.survey, "valid")[0]
            self.history[self.phase] = torch.from_numpy(found).nan_to_num(-1.0).to(self.history)

    def accuracies(self, survey: Survey, split: str) -> tuple[NDArray[np.float64], float]:
        """Return the accuracy on the classes of each phase [phases], NaN without an item, and that on all seen classes."""
        labels, phases = self._labels(survey, split), self.phase_of(survey, split)
        right = survey.over(split, self.classified).numpy() == labels
        each = [right[phases == p].mean() if (phases == p).any() else np.nan for p in range(self.phases)]
        now = phases <= self.phase
        return np.array(each, np.float64), float(right[now].mean()) if now.any() else np.nan

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        each, seen = self.accuracies(survey, split)
        found = {"seen_accuracy": seen, "first_accuracy": float(each[0]), "new_accuracy": float(each[self.phase])}
        history = self.history.cpu().double().numpy()
        if split == "valid" and self.phases > 1 and not self.config.joint and (history >= 0).all():
            found |= {name: value for name, value in stream_figures(history).items() if name != "transfer"}
        return {name: value for name, value in found.items() if value == value}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the accuracy after each phase on each phase, and list the classes of each phase and the memory."""
        shown = super().figures(survey)
        if self.config.joint:
            return shown
        labels, groups = self._labels(survey, "train"), self.phase_of_class.cpu().numpy()
        memory = np.flatnonzero(self.kept.cpu().numpy())
        rows = []
        for number in np.argsort(groups, kind="stable"):
            kept = memory[labels[memory] == number]
            more = " ..." if len(kept) > LISTED else ""
            rows.append(
                [int(groups[number]) + 1, self.class_names[number], len(kept), " ".join(map(str, kept[:LISTED])) + more]
            )
        return shown | {
            "Accuracy after each phase": heat_map(
                self.history.cpu().clamp(min=0).double().numpy(),
                self.names,
                "Accuracy on valid items among the classes seen so far.",
            ),
            "Order of classes and memory": {
                "kind": "table",
                "columns": ["phase", "class", "kept items", "their positions in the training split"],
                "rows": rows,
                "caption": f"{len(memory)} of {counted(len(labels), 'training item was', 'training items were')} kept by "
                f"{self.config.selection}; classes of the "
                "last phase have none.",
            },
        }
