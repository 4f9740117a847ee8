"""Define parts: objects in a list, each of which changes a contrastive step of another method.

A `ContrastiveLearner` returns the rows it compares, and computes a loss from them. Its parts change that loss in the order of
the composed system's name. Each part gets a callable `below`, which computes the base's loss with the earlier parts:

    simclr+hard-contrastive+hallucinator

    hallucinator.loss(compared, ..., below=hard-contrastive)    calls `below` once for each set of rows it generates
        hard-contrastive.loss(compared, ..., below=simclr)      computes its own loss and does not call `below`
            simclr.objective(compared)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.core.compared import Compared
from counterpoint.engine.learner import Learner
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """The current step of a part: its random numbers for the rows of the batch, the epoch and the number of the step."""

    drawn: dict[str, Tensor]
    epoch: int = 0
    number: int = 0


class Part(nn.Module):
    """A change of a contrastive step by an addition.

    A subclass overrides the methods it needs; the defaults change nothing. The learner trains, saves and resumes the part's
    buffers and networks.

    Args:
        config: the part's own settings.
        learner: the base, with the earlier parts. The part must not keep it, because the learner holds the part.
        data: the task's facts of the data.
        ways: the way the base contrasts its rows (see `core.compared`); None for a base that is not contrastive.
    """

    def __init__(self, config: Any, learner: Learner, data: Any, ways: Callable[..., Any] | None) -> None:
        super().__init__()
        self.config = config

    def draw(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the random numbers of a step: tensors with one entry per row of the whole batch, over all processes."""
        return {}

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        """Compute named scalars of a comparison; training minimises `loss`.

        Args:
            compared: the rows, fewer than the batch if items lack a modality.
            step: the random numbers of `draw` for this process's rows.
            below: computes the loss of the base and the earlier parts for these or other rows.
        """
        return below(compared)

    def begin(self, survey: Survey) -> None:
        """Prepare the part before a fit, new or resumed."""

    def end_step(self) -> None:
        """Update the part after all turns of a step."""

    def end_epoch(self, epoch: int) -> None:
        """Update the part after an epoch's last step."""

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Return the part's figures for a run's page; see `Learner.figures`."""
        return {}


class ContrastiveLearner(Learner):
    """A learner with separate methods for the rows to compare and for their loss, so that parts can change either.

    `compared` returns the rows of a step, with several entries for several comparisons, as with three modalities.
    `objective` computes named scalars from one entry. `loss` averages over the entries.
    """

    def compared(self, batch: dict[str, Any]) -> list[Compared]:
        """Return the comparisons of a step."""
        raise CounterpointError(f"{type(self).__name__} must override `compared`")

    def objective(self, compared: Compared) -> Losses:
        """Compute the base's own loss of a comparison, and other named scalars."""
        raise CounterpointError(f"{type(self).__name__} must override `objective`")

    def contrast(self, compared: Compared, batch: dict[str, Any]) -> Losses:
        """Compute the loss of a comparison, changed by all parts."""
        drawn: dict[str, dict[str, Tensor]] = batch.get("drawn", {})
        below: Callable[[Compared], Losses] = self.objective
        for slug, part in self._parts():
            step = Step(drawn.get(slug, {}), self.position.epoch, self.position.step)
            below = partial(part.loss, step=step, below=below)
        return below(compared)

    def loss(self, batch: dict[str, Any]) -> Losses:
        found = [self.contrast(compared, batch) for compared in self.compared(batch)]
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        if not self.parts:
            return batch
        rows, mine = self.share(len(batch["index"]))
        drawn = {
            slug: {name: values[mine] for name, values in part.draw(rows, generator).items()}
            for slug, part in self._parts()
        }
        return batch | {"drawn": drawn}

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        for _, part in self._parts():
            part.begin(survey)

    def end_step(self) -> None:
        super().end_step()
        for _, part in self._parts():
            part.end_step()

    def end_epoch(self, epoch: int) -> None:
        super().end_epoch(epoch)
        for _, part in self._parts():
            part.end_epoch(epoch)

    def _parts(self) -> list[tuple[str, Part]]:
        return [(slug, part) for slug, part in self.parts.items() if isinstance(part, Part)]
