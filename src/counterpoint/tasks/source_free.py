"""Adapt a classifier of regions without source data: train it on the source, then follow a mean teacher on the target.

Stage `source` trains encoder and classifier on labelled regions. In stage `adapt` the teacher, a moving average of the student,
begins as the source network; the learner's loss on the target is its own. The teacher is the network that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint.core.distributed import global_mean
from counterpoint.core.teacher import EMATeacher
from counterpoint.data.regions import SOURCE, TARGET, UNKNOWN
from counterpoint.encoders.regions import RegionEncoder, RegionNetwork
from counterpoint.engine.loading import Batches, RowBatches
from counterpoint.engine.optim import constant_rate, optimisers
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.tasks.regions import RegionsConfig, RegionsLearner, regions_figure

SHOWN = 4  # pictures on the page


@dataclass
class SourceFreeConfig(RegionsConfig):
    """Settings of both stages."""

    lr: float = 0.256
    source_epochs: int = 20
    """Passes over the labelled pictures of the source, at least 1."""
    source_batch: int = 8
    """Pictures of the source in a batch."""
    source_lr: float = 0.256
    """Learning rate on the source at a batch of 256."""
    teacher_momentum: float = 0.9
    """Share of the teacher that an update keeps, 0 to 1."""
    teacher_every: int = 0
    """Steps between updates of the teacher; 0: after each epoch."""
    hidden: int = 1024
    """Channels of the mapping network's convolutions."""
    projection: int = 512
    """Width of z."""

    counts = (*RegionsConfig.counts, "source_epochs", "source_batch", "hidden", "projection")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("source_lr")
        self.need_share("teacher_momentum")
        self.need_weight("teacher_every")


class SourceFreeLearner(RegionsLearner):
    """A student and its teacher. Subclasses write `on_target`.

    Attributes:
        student, teacher: networks, of which the teacher is a moving average.
    """

    adapted: Tensor
    before: Tensor
    kept = "student"  # the network to use, by name

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        config = self.config
        encoder = RegionEncoder(config.encoder, config.layer, config.crop, config.pretrained)
        self.student = RegionNetwork(encoder, self.classes, config.hidden, config.projection)
        self.teacher = EMATeacher(self.student, buffers="copy", mode="eval")
        self.register_buffer("adapted", torch.zeros((), dtype=torch.bool))  # whether the teacher is the network to use
        self.register_buffer("before", torch.zeros(SHOWN, self.count, self.classes + 1))  # logits before adaptation

    def stages(self) -> list[Stage]:
        config, student = self.config, self.student
        found = [Stage("source", config.source_epochs, self.detector, turns=self.of_source, batches=self._sources)]
        if config.epochs:
            found.append(Stage("adapt", config.epochs, lambda: [student], batches=self._targets, enter=self.enter))
        return found

    def detector(self) -> list[nn.Module]:
        """Return what the first stage trains."""
        return [self.student.classifier] if self.config.frozen else [self.student.encoder, self.student.classifier]

    def _sources(self, survey: Survey) -> Batches:
        return RowBatches(np.flatnonzero(survey.split().domains == SOURCE), self.config.source_batch)

    def _targets(self, survey: Survey) -> Batches:
        return RowBatches(np.flatnonzero(survey.split().domains == TARGET), self.config.batch_size)

    def of_source(self) -> list[Turn]:
        config = replace(self.config, lr=self.config.source_lr)
        return [
            optimisers(config, self.detector(), self.epochs, config.source_batch, steps_per_epoch=self.steps_per_epoch)
        ]

    def turns(self) -> list[Turn]:
        """Return an optimiser of the student with a constant learning rate."""
        return [self.turn_of([self.student], curve=constant_rate)]

    def enter(self, survey: Survey) -> None:
        """Begin the adaptation: the teacher is the source network; keep its predictions for the page."""
        self.teacher.update(self.student, 0.0)
        self.adapted.fill_(True)
        rows = np.arange(min(SHOWN, len(survey.split("valid"))))
        self.before[: len(rows)] = survey.over("valid", lambda batch: self.predict(batch)["logits"], rows).to(
            self.device
        )

    @property
    def taught(self) -> RegionNetwork:
        """The teacher's network."""
        return cast(RegionNetwork, self.teacher.module)

    @property
    def strong(self) -> bool:
        return bool(self.adapted)

    def end_step(self) -> None:
        every = self.config.teacher_every
        if self.adapted and every and (self.position.step + 1) % every == 0:
            self.teacher.update(self.student, self.config.teacher_momentum)

    def end_epoch(self, epoch: int) -> None:
        if self.adapted and not self.config.teacher_every:
            self.teacher.update(self.student, self.config.teacher_momentum)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.on_target(batch) if self.adapted else self.on_source(batch)

    def on_source(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the cross-entropy of labelled regions."""
        labels = batch["label"].flatten()
        if self.config.frozen:
            self.student.encoder.eval()
        rows = F.cross_entropy(
            self.student.logits(self.student.encoder(batch["views"][0])), labels, ignore_index=UNKNOWN, reduction="none"
        )
        return {"loss": global_mean(rows)}

    def on_target(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the loss of the adaptation."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        # Read here, because an export cannot read it while it traces `embed`.
        self.kept = "taught" if self.adapted else "student"
        return super().train(mode)

    def classify(self, regions: Tensor) -> Tensor:
        network = self.taught if self.adapted else self.student
        return network.logits(network.encoder(regions))

    def embed(self, regions: Tensor) -> Tensor:
        network = getattr(self, self.kept)
        found: Tensor = network.pooled(network.encoder(regions))
        return found

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the predicted classes of some valid pictures before and after the adaptation."""
        if not self.adapted:
            return {}
        shown = np.arange(min(SHOWN, len(survey.split("valid"))))
        after = survey.over("valid", lambda batch: self.predict(batch)["logits"], shown)
        logits = {"before": self.before.cpu(), "after": after}
        return {"Regions of the target": regions_figure(survey.split("valid"), survey.classes, shown, logits)}
