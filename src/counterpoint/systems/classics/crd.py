"""CRD: student and teacher embeddings of the same image are to be told from those of other images.

Tian, Krishnan, Isola: "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.

The loss (Eqs. 10 to 19) with its memories, one row of each side per training image, is `counterpoint.core.distil.CRD`;
both embeddings are learnt with the student. Left out: drawing the one positive from the whole class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from counterpoint.core import distil
from counterpoint.core.distributed import gather_rows, row_counts
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, Seen, TaughtConfig, TaughtLearner


@dataclass
class CRDConfig(TaughtConfig):
    """Settings of CRD. Defaults are the paper's for CIFAR-100, of its best form, CRD with KD."""

    kd_weight: float = 1.0
    weight: float = 0.8
    """Weight of the contrast."""
    temperature: float = 0.07
    """Temperature of the contrast."""
    negatives: int = 16384
    """Images that each one is contrasted with (the paper's N)."""
    dim: int = 128
    """Width of the embeddings."""
    memory_momentum: float = 0.5
    """How much of a memory's row stays when its image comes."""
    other_classes: bool = True
    """Draw the negatives from other classes only, as the authors' scripts do; else from all images."""

    weights: ClassVar[tuple[str, ...]] = (*TaughtConfig.weights, "weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives < 1 or self.dim < 1 or not self.temperature > 0 or not 0 <= self.memory_momentum <= 1:
            raise CounterpointError(
                "negatives and dim must be at least 1, temperature > 0 and memory_momentum in 0..1, got "
                f"{self.negatives}, {self.dim}, {self.temperature} and {self.memory_momentum}"
            )


class CRD(TaughtLearner):
    """Cross-entropy, KD and the contrast of embeddings."""

    def __init__(self, config: CRDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.contrast = distil.CRD(
            self.encoder.dim,
            cast(Any, self.instructing).encoder.dim,
            data.examples,
            dim=config.dim,
            K=config.negatives,
            temperature=config.temperature,
            momentum=config.memory_momentum,
            seed=seed,
        )

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.config.other_classes:
            assert survey.labels is not None
            self.contrast.draw_by_class(survey.labels)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        if self.at_teacher:
            return batch
        # Drawn for the whole batch and cut, as the views are; the processes took its images in turn.
        _, mine = self.share(len(batch["index"]))
        counts = row_counts(len(batch["index"]), self.device)
        parts = gather_rows(batch["index"]).split(counts)
        whole = torch.empty(sum(counts), dtype=torch.long, device=self.device)
        for number, part in enumerate(parts):
            whole[number :: len(parts)] = part
        return batch | {"contrast": self.contrast.draw(whole, generator)[mine]}

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        loss = self.contrast(student.feature, teacher.feature, batch["index"], batch["contrast"])
        return {"contrast": self.config.weight * loss}


SYSTEM = System(
    slug="crd",
    task="labelled",
    config=CRDConfig,
    learner=CRD,
    data="cifar10",
    recipe=LAPTOP | {"negatives": 1024},
)
