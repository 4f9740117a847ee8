"""MCL, multistage contrastive learning: each stage's negatives agree on what the stages before have learned.

Zhang, Lan, Qu, Cheng, Feng, Hooi: "Learning the Unlearned: Mitigating Feature Suppression in Contrastive Learning", ECCV
2024, arXiv 2402.11816.

A contrastive model learns the few features that tell its negatives apart and suppresses the rest. MCL trains in stages. After
a stage the training set is embedded and clustered (k-means); in the next, a batch comes from one group of images that shared
a cluster in every stage so far, so what was learned no longer tells them apart and something else must. The representation
is that of all stages side by side, normalised once.

An addition over any system that learns from views of images (SimCLR when named alone): its loss, encoder and views stay as
they are, only the batches change. Stages start from fresh weights (the authors' CLIP runs from the pretrained ones).
`epochs` counts those of one stage, and the learning rate's schedule starts anew with each.

Otherwise than in the authors' code: pseudo-labels are composed of all stages' clusters, as the paper has it (their script
re-reads the current stage's for each digit); one permutation an epoch is shared by all processes (theirs differ, so shares
overlap); k-means is seeded; a schedule shorter than an ordinary epoch is followed by another with new permutations, so that
every stage takes as many steps. How many images stand in groups too small for a batch is recorded (`never_drawn`). What
counts steps or epochs of the whole run does not begin anew with a stage: a teacher's rising momentum, a changing weight decay,
an addition's first epochs. Not here: the MMVP evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.settings import PartConfig


def compose(
    labels_by_stage: Sequence[Int[Tensor, " n"] | Int[NDArray[np.int64], " n"]], clusters: int
) -> Int[Tensor, " n"]:
    """Pseudo-labels of all stages so far, a number whose digits are their clusters: [c0, c1] -> c0 C + c1.

    Two examples have the same one exactly if they shared a cluster in every stage. Raises ValueError for a cluster outside
    0..C - 1, stages of different lengths, none, or so many that the number leaves 64 bits.

    >>> compose([torch.tensor([0, 1]), torch.tensor([2, 2])], 3)
    tensor([2, 5])
    """
    if not labels_by_stage or any(len(labels) != len(labels_by_stage[0]) for labels in labels_by_stage):
        raise ValueError("labels_by_stage must hold at least one stage, all of one length")
    if clusters ** len(labels_by_stage) > 2**63:
        raise ValueError(
            f"labels_by_stage: {clusters} clusters in {len(labels_by_stage)} stages are too many to number"
        )
    stages = [torch.as_tensor(labels).long() for labels in labels_by_stage]  # narrow integers would overflow
    found = torch.zeros_like(stages[0])
    for labels in stages:
        if bool(((labels < 0) | (labels >= clusters)).any()):
            raise ValueError(f"labels_by_stage must lie in 0..{clusters - 1}")
        found = found * clusters + labels
    return found


def grouped_batches(
    labels: Int[NDArray[np.int64], " n"] | Int[Tensor, " n"],
    batch_size: int,
    permutations: Sequence[Sequence[int] | NDArray[np.int64] | Tensor],
    world_size: int = 1,
    rank: int = 0,
) -> list[list[int]]:
    """The authors' schedule: batches that lie within one group each, the groups in turn.

    Args:
        labels: group of each example, from 0.
        batch_size: examples of a batch on one process.
        permutations: for each group the order of its members, as places in the ascending list of them; padding of -1 after.
        world_size, rank: a process takes every world_size-th member from its rank on, so that all are at the same group.

    Of a group of n members the first floor(floor(n / W) / b) b W are used, so groups smaller than a batch of all processes
    are left out. Batches are taken from a group's end. Raises ValueError for permutations that do not fit, labels below 0, a
    batch of none or a rank that is no process's.
    """
    labels = np.asarray(labels, np.int64)
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size must be at least 1 and rank lie in 0..world_size - 1, got {batch_size}, {rank} and {world_size}"
        )
    if int(labels.min(initial=0)) < 0:
        raise ValueError(f"labels must be numbers from 0 on, got {labels.min()}")
    # One sort finds the members of all groups: there may be as many groups as a power of the clusters.
    by_group = np.split(labels.argsort(kind="stable"), np.bincount(labels).cumsum()[:-1])
    nobody = np.empty(0, np.int64)
    lists: list[list[int]] = []
    for group, order in enumerate(permutations):
        members = by_group[group] if group < len(by_group) else nobody
        order = np.asarray(order, np.int64)
        order = order[order >= 0]
        if len(order) != len(members) or not np.array_equal(np.sort(order), np.arange(len(members))):
            raise ValueError(f"permutations[{group}] must order the {len(members)} members of its group")
        used = len(members) // world_size // batch_size * batch_size * world_size
        lists.append(members[order[:used][rank::world_size]].tolist())
    if int(labels.max(initial=-1)) >= len(lists):
        raise ValueError(f"permutations are of {len(lists)} groups, labels go up to {labels.max()}")
    out: list[list[int]] = []
    while any(lists):
        for left in lists:
            if left:
                out.append([left.pop() for _ in range(batch_size)])
    return out


class GroupBatches(Batches):
    """Batches within groups, as many as an epoch has otherwise.

    Args:
        groups: [examples] number of the group of each example.
        batch_size: examples in a batch.
    """

    def __init__(self, groups: NDArray[np.int64], batch_size: int) -> None:
        super().__init__(len(groups), batch_size, drop_last=True)
        self.labels = np.unique(groups, return_inverse=True)[1]

    def epoch(self, generator: np.random.Generator) -> Iterator[list[int]]:
        given = 0
        while True:
            orders = [generator.permutation(int(count)) for count in np.bincount(self.labels)]
            for batch in grouped_batches(self.labels, self.batch_size, orders):
                if given == len(self):
                    return
                yield batch
                given += 1


@dataclass
class MCLConfig(PartConfig):
    """Settings of MCL."""

    stages: int = 2
    """Stages after the first, ordinary one."""
    clusters: int = 10
    """Clusters of each stage; batches of stage t come from up to clusters^t groups."""
    restrict: Literal["clusters", "shuffled", "none"] = "clusters"
    """What batches of later stages come from: the clusters, groups as large but at random, or everything (an ensemble)."""
    stage_norm: bool = False
    """Normalise each stage's features before they are put side by side."""

    def __post_init__(self) -> None:
        if self.stages < 0 or self.clusters < 1:
            raise CounterpointError("stages must not be negative and clusters be at least 1")
        if self.restrict not in ("clusters", "shuffled", "none"):
            raise CounterpointError(f"restrict is 'clusters', 'shuffled' or 'none', got {self.restrict!r}")


class MCL(Learner):
    """A base learner in stages. `base` is that of the stage at hand; `earlier` holds the frozen encoders of the stages before.

    Args:
        settings: of MCL.
        make: builds the base learner from a seed.
        data: what the task knows of the data.
        seed: of the first stage.
    """

    base: Any
    assigned: Int[Tensor, "stages n"]
    stage: Int[Tensor, ""]
    unseen: Int[Tensor, ""]  # images of groups too small for a batch, which this stage never draws

    def __init__(self, settings: MCLConfig, make: Callable[[int], Learner], data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.settings, self.make = settings, make
        base: Any = make(seed)
        self.base, self.config = base, base.config
        base.position = self.position
        # A place for each finished encoder's weights; nothing looks at one before they are there.
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
        """Return the pseudo-label of every training example that batches of this stage keep to, or None."""
        stage = int(self.stage)
        if stage == 0 or self.settings.restrict == "none":
            return None
        groups = compose(list(self.assigned[:stage]), self.settings.clusters).cpu().numpy()
        if self.settings.restrict == "shuffled":
            groups = np.random.default_rng([self.seed, stage]).permutation(groups)
        return groups

    @torch.no_grad()
    def _next_stage(self, survey: Survey) -> None:
        """Cluster the embeddings, keep the encoder, and begin anew."""
        stage = int(self.stage)
        if self.settings.restrict != "none":
            self.assigned[stage] = self._clusters(survey, stage)
        self.earlier[stage].load_state_dict(self.base.encoder.state_dict())
        self.earlier[stage].eval()
        state = torch.random.get_rng_state()
        fresh = self.make(self.seed * 1009 + stage + 1)
        torch.random.set_rng_state(state)
        self.base.load_state_dict(fresh.state_dict())
        self.stage.add_(1)

    def _clusters(self, survey: Survey, stage: int) -> Tensor:
        """Cluster the normalised projections of all training images, without augmentation, by k-means; the features where the
        base compares no projections (MAE)."""
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
                f"after stage {stage} the largest group of {len(sizes)} has {int(sizes.max())} images, fewer than a batch of "
                f"{batch}: use fewer --mcl.clusters or --mcl.stages, or a smaller --batch-size"
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
        """Return [n, dim] features of each stage so far, as the base's `embed` has them."""
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
        """Return the features of all stages so far, side by side."""
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
    """The representation of all stages: their features side by side, normalised once, so that a stage of longer vectors
    counts for more (the authors' evaluation).

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
