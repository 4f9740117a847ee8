"""Parts: what a method changes in the step of another, as objects in a list.

A `ContrastiveLearner` names the rows it compares and makes a loss of them. Its parts stand over that loss in the order of the
composed system's name. Each gets a callable, `below`, that is the base's loss and the earlier parts together:

    simclr+hard-contrastive+hallucinator

    hallucinator.loss(compared, ..., below=hard-contrastive)    calls `below` once for each set of rows it makes
        hard-contrastive.loss(compared, ..., below=simclr)      makes a loss of its own; `below` is not called
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
    """The step a part is asked in: the numbers it drew for the rows of the batch, the epoch and the number of the step."""

    drawn: dict[str, Tensor]
    epoch: int = 0
    number: int = 0


class Part(nn.Module):
    """What an addition changes in a contrastive step. A subclass overrides the methods it needs; each default changes nothing.

    Its buffers and networks are the learner's: they are trained, saved and resumed with it.

    Args:
        config: the part's own settings.
        learner: the base, with the earlier parts. It must not be kept: it holds the part.
        data: what the task knows of the data.
        ways: how the base contrasts its rows (see `core.compared`); None for a base that is not contrastive.
    """

    def __init__(self, config: Any, learner: Learner, data: Any, ways: Callable[..., Any] | None) -> None:
        super().__init__()
        self.config = config

    def draw(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw what is random in a step: tensors with one entry for each of the `rows` of the whole batch, over all processes."""
        return {}

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        """Return named scalars of a comparison, of which `loss` is minimised.

        Args:
            compared: the rows. Where items lack a modality, they are fewer than the batch has.
            step: what `draw` drew, this process's rows of it.
            below: the loss of the base and the earlier parts, of these or of other rows.
        """
        return below(compared)

    def begin(self, survey: Survey) -> None:
        """Called before a fit, new or resumed."""

    def end_step(self) -> None:
        """Called after all turns of a step."""

    def end_epoch(self, epoch: int) -> None:
        """Called after an epoch's last step."""

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Return what a run's page shows of the part; see `Learner.figures`."""
        return {}


class ContrastiveLearner(Learner):
    """A learner whose loss falls into the rows it compares and what it makes of them, so that parts can come between.

    `compared` returns the rows of a step: several entries where a step has several comparisons, as of three modalities.
    `objective` makes named scalars of one of them. `loss` takes means over the entries.
    """

    def compared(self, batch: dict[str, Any]) -> list[Compared]:
        """Return the comparisons of a step."""
        raise CounterpointError(f"{type(self).__name__} does not say what it compares")

    def objective(self, compared: Compared) -> Losses:
        """Return the base's own loss of a comparison, and other named scalars."""
        raise CounterpointError(f"{type(self).__name__} has no objective")

    def contrast(self, compared: Compared, batch: dict[str, Any]) -> Losses:
        """Return the loss of a comparison with all parts over the base's own."""
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

    def figures(self, survey: Survey) -> dict[str, Any]:
        found = super().figures(survey)
        for _, part in self._parts():
            found |= part.figures(survey)
        return found

    def _parts(self) -> list[tuple[str, Part]]:
        return [(slug, part) for slug, part in self.parts.items() if isinstance(part, Part)]
