"""MCL, multistage contrastive learning: each stage's negatives share the features that earlier stages have learned.

Zhang, Lan, Qu, Cheng, Feng, Hooi: "Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning", ECCV
2024, arXiv 2402.11816.

A contrastive model learns the few features that discriminate its negatives, and suppresses the others. MCL trains in stages.
After a stage it embeds the training set and clusters it (k-means). In the next stage, a batch comes from one group of images
that shared a cluster in every stage. Learned features no longer discriminate these images, so the model must
learn others. The representation is the concatenation of all stages, normalised once.

This is an addition over any system that learns from views of images; `mcl` alone changes SimCLR. Only the batches change, not
the loss, encoder and views. Stages start from fresh weights; the authors' CLIP runs start from the pretrained ones. `epochs`
is the number of epochs of one stage, and each stage restarts the schedule of the learning rate.

Differences from the authors' code:

- Pseudo-labels are composed of all stages' clusters, as in the paper. Their script reads the current stage's for each digit.
- All processes share one permutation per epoch. Theirs differ, so shares overlap.
- k-means is seeded.
- If a schedule is shorter than an ordinary epoch, another with new permutations follows. Every stage has the same number of
  steps.

`never_drawn` records the number of images in groups too small for a batch. Schedules over the whole run do not restart with a
stage: a teacher's rising momentum, a changing weight decay, an addition's first epochs. Not built: the MMVP evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.checks import need_rows
from counterpoint.core.memory import kmeans
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.engine.grouped import GroupBatches
from counterpoint.engine.learner import Learner
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.settings import PartConfig
from counterpoint.tasks.images import ImageLearner
from counterpoint.words import counted


def compose(
    labels_by_stage: Sequence[Int[Tensor, " n"] | Int[NDArray[np.int64], " n"]], clusters: int
) -> Int[Tensor, " n"]:
    """Compose the pseudo-labels of all stages, numbers whose digits are the clusters: [c0, c1] -> c0 C + c1.

    Two examples have the same label exactly if they shared a cluster in every stage.

    Args:
        labels_by_stage: clusters of n examples, 0..C - 1, one array per stage.
        clusters: C, the number of clusters of each stage.

    Raises ValueError for clusters out of range, stages of different lengths, no stage, or numbers above 64 bits.

    >>> compose([torch.tensor([0, 1]), torch.tensor([2, 2])], 3)
    tensor([2, 5])
    """
    if not labels_by_stage or any(len(labels) != len(labels_by_stage[0]) for labels in labels_by_stage):
        raise ValueError("labels_by_stage must hold at least one stage, all of one length")
    if clusters ** len(labels_by_stage) > 2**63:
        raise ValueError(
            f"labels_by_stage: {clusters} clusters in {counted(len(labels_by_stage), 'stage')} exceed 64 bits; use fewer of either"
        )
    stages = [torch.as_tensor(labels).long() for labels in labels_by_stage]  # narrow integers would overflow
    found = torch.zeros_like(stages[0])
    for labels in stages:
        if bool(((labels < 0) | (labels >= clusters)).any()):
            raise ValueError(f"labels_by_stage must lie in 0..{clusters - 1}")
        found = found * clusters + labels
    return found


@dataclass
class MCLConfig(PartConfig):
    """Settings of MCL."""

    stages: int = 2
    """Number of stages after the first, ordinary one."""
    clusters: int = 10
    """Number of clusters of each stage; batches of stage t come from up to clusters^t groups."""
    restrict: Literal["clusters", "shuffled", "none"] = "clusters"
    """Source of later stages' batches: clusters, shuffled (random groups of the same sizes) or none (all images, an ensemble)."""
    stage_norm: bool = False
    """Normalise each stage's features before their concatenation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 0 or self.clusters < 1:
            raise CounterpointError(
                f"stages must not be negative and clusters must be at least 1, got {self.stages} and {self.clusters}"
            )


class MCL(Learner):
    """A base learner in stages.

    `base` is the learner of the current stage. `earlier` holds the frozen encoders of earlier stages.

    Args:
        settings: settings of MCL.
        make: builds the base learner from a seed.
        data: the task's facts of the data.
        seed: seed of the first stage.
    """

    base: Any
    assigned: Int[Tensor, "stages n"]
    stage: Int[Tensor, ""]
    unseen: Int[Tensor, ""]  # images of groups too small for a batch, which this stage never draws

    def __init__(self, settings: MCLConfig, make: Callable[[int], Learner], data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.settings, self.make = settings, make
        base: Any = make(seed)
        if (many := len(base.stages())) != 1:
            raise CounterpointError(
                f"mcl trains a system of one stage several times, and this one has {many} stages; use another base"
            )
        self.base, self.config = base, base.config
        base.position = self.position
        # Modules for the weights of finished encoders, unused before their stage is complete.
        self.earlier = nn.ModuleList(self._copy() for _ in range(settings.stages))
        self.earlier.requires_grad_(False)
        self.register_buffer("stage", torch.tensor(0))
        self.register_buffer("unseen", torch.tensor(0))
        self.register_buffer("assigned", torch.zeros(settings.stages, data.examples, dtype=torch.long))

    # --- the base's

    def turns(self) -> list[Turn]:
        base = self.base
        base.epochs, base.total_steps, base.steps_per_epoch = self.epochs, self.total_steps, self.steps_per_epoch
        turns: list[Turn] = base.turns()
        return turns

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.base.loss(batch)
        return losses | {"never_drawn": self.unseen.float()}

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        prepared: dict[str, Any] = self.base.prepare(batch, generator)
        return prepared

    def begin(self, survey: Survey) -> None:
        self.base.survey = survey
        self.base.begin(survey)

    def before_step(self) -> None:
        self.base.before_step()

    def end_step(self) -> None:
        super().end_step()
        self.base.end_step()

    def end_epoch(self, epoch: int) -> None:
        self.base.end_epoch(epoch)

    def begin_evaluation(self, survey: Survey) -> None:
        self.base.begin_evaluation(survey)

    def figures(self, survey: Survey) -> dict[str, Any]:
        found: dict[str, Any] = self.base.figures(survey)
        return found

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        found: dict[str, float] = self.base.measures(survey, split)
        return found

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        found: Sequence[tuple[nn.Module, str]] = self.base.row_wise()
        return found

    # --- stages

    def stages(self) -> list[Stage]:
        (plain,) = self.base.stages()
        batches = None if self.settings.restrict == "none" else self._batches
        later = [
            replace(plain, name=f"stage {t}", enter=self._next_stage, batches=batches)
            for t in range(1, self.settings.stages + 1)
        ]
        return [replace(plain, name="stage 0"), *later]

    def _batches(self, survey: Survey) -> GroupBatches:
        groups = self.groups()
        assert groups is not None
        return GroupBatches(groups[survey.rows], self.config.batch_size)

    def groups(self) -> NDArray[np.int64] | None:
        """Return the group of every training example for this stage's batches, or None without groups."""
        stage = int(self.stage)
        if stage == 0 or self.settings.restrict == "none":
            return None
        groups = compose(list(self.assigned[:stage]), self.settings.clusters).cpu().numpy()
        if self.settings.restrict == "shuffled":
            groups = np.random.default_rng([self.seed, stage]).permutation(groups)
        return groups

    @torch.no_grad()
    def _next_stage(self, survey: Survey) -> None:
        """Cluster the embeddings, keep the encoder, and restart with fresh weights."""
        stage = int(self.stage)
        if self.settings.restrict != "none":
            self.assigned[stage] = self._clusters(survey, stage)
        self.earlier[stage].load_state_dict(self.base.encoder.state_dict())
        self.earlier[stage].eval()
        state = torch.random.get_rng_state()
        fresh = self.make(self.seed * 1009 + stage + 1)
        torch.random.set_rng_state(state)
        if isinstance(fresh, ImageLearner):
            fresh.take_start()
        self.base.load_state_dict(fresh.state_dict())
        (plain,) = self.base.stages()
        if plain.enter is not None:  # such as MLCD's labels, which the fresh weights lack
            plain.enter(survey)
        self.stage.add_(1)

    def _clusters(self, survey: Survey, stage: int) -> Tensor:
        """Cluster the normalised projections of all training images, without augmentation, by k-means.

        If the base compares no projections (MAE), cluster the features.
        """
        base = self.base

        def rows(batch: dict[str, Any]) -> Tensor:
            found = base.embed(batch["image"])
            return unit(base.projector(found) if base.compares else found)

        embedded = survey.over("train", rows)
        labels = kmeans(embedded, min(self.settings.clusters, len(embedded)), seed=self.seed + stage).labels
        groups = compose([*self.assigned[:stage].cpu(), labels], self.settings.clusters)
        sizes = groups.unique(return_counts=True)[1]
        batch = self.config.batch_size
        if int(sizes.max()) < batch:
            raise CounterpointError(
                f"after stage {stage} the largest group of {len(sizes)} has {counted(int(sizes.max()), 'image')}, fewer than a "
                "batch of "
                f"{batch}; lower --mcl.clusters, --mcl.stages or --batch-size"
            )
        self.unseen.fill_(int(sizes[sizes < batch].sum()))
        return labels.to(self.assigned.device)

    def _copy(self) -> nn.Module:
        encoder: nn.Module = copy.deepcopy(self.base.encoder)
        return encoder

    def train(self, mode: bool = True) -> MCL:
        super().train(mode)
        self.earlier.eval()  # frozen, running statistics too
        return self

    # --- the representation

    def features_by_stage(self, images: Tensor) -> list[Tensor]:
        """Compute the features [n, dim] of each stage so far with the base's `embed`."""
        own, found = self.base.encoder, []
        try:
            for encoder in (*self.earlier[: int(self.stage)], own):
                self.base.encoder = encoder
                found.append(self.base.embed(images))
        finally:
            self.base.encoder = own
        return found

    def _together(self, stages: list[Tensor]) -> Tensor:
        return torch.cat([unit(x) for x in stages] if self.settings.stage_norm else stages, 1)

    def embed(self, images: Tensor) -> Tensor:
        """Concatenate the features of all stages so far."""
        return self._together(self.features_by_stage(images))

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        stages = self.features_by_stage(batch["image"])
        found: dict[str, Any] = {"feature": self._together(stages)}
        if len(stages) > 1:
            found["parts"] = {f"stage {t}": part for t, part in enumerate(stages)}
        if batch.get("part") == "test" and self.base.compares:
            found["embedding"] = self.base.projector(stages[-1])
        if "views" in batch:
            found["pair"] = [self.embed(view) for view in batch["views"]]
        return found


@full_precision
def integrated(stages: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n dims"]:
    """Concatenate the features of all stages and normalise them once, as in the authors' evaluation.

    A stage of longer vectors therefore has more weight. `stages` holds the features [n, dim] of each stage. Raises ValueError
    for no stage and for no rows.

    >>> integrated([torch.tensor([[3.0]]), torch.tensor([[4.0]])])
    tensor([[0.6000, 0.8000]])
    """
    if not len(stages):
        raise ValueError("stages must hold the features of at least one stage, got none")
    found = torch.cat(list(stages), 1)
    need_rows(stages=found)
    return unit(found)


SYSTEM = Addition(
    slug="mcl",
    over="simclr",
    config=MCLConfig,
    around=MCL,
    task="views",
    recipe={"mcl.stages": 1, "mcl.clusters": 5},
)
