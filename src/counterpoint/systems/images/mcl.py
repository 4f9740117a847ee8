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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.checks import need_rows
from counterpoint.core.contrast import unit
from counterpoint.core.memory import kmeans
from counterpoint.core.precision import full_precision
from counterpoint.engine.loading import EpochBatches
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition, AdditionConfig
from counterpoint.tasks.images import BATCH
from counterpoint.views.images import normalise


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


class _Batches(EpochBatches):
    """The batches of an epoch; within groups once there are any."""

    def __init__(self, plain: EpochBatches, rows: NDArray[np.int64], learner: MCL) -> None:
        p = plain
        super().__init__(p.examples, p.batch_size, p.seed, p.position, p.rank, p.size, drop_last=True, items=p.counted)
        self.rows, self.learner = rows, learner

    def __iter__(self) -> Iterator[list[int]]:
        groups = self.learner.groups()
        if groups is None:
            yield from super().__iter__()
            return
        _, labels = np.unique(groups[self.rows], return_inverse=True)
        rng = np.random.default_rng([self.seed, self.position.epoch])
        done, given = self.position.batch, 0
        while True:
            orders = [rng.permutation(int(count)) for count in np.bincount(labels)]
            # Of the whole batch, cut to this process's share as in any other epoch.
            for batch in grouped_batches(labels, self.batch_size, orders):
                if given == len(self):
                    return
                yield batch[self.rank :: self.size] if given >= done else []
                given += 1


@dataclass
class MCLConfig(AdditionConfig):
    """What MCL adds to the settings of the system it goes over."""

    stages: int = 2
    """Stages after the first, ordinary one."""
    clusters: int = 10
    """Clusters of each stage; batches of stage t come from up to clusters^t groups."""
    restrict: Literal["clusters", "shuffled", "none"] = "clusters"
    """What batches of later stages come from: the clusters, groups as large but at random, or everything (an ensemble)."""
    stage_norm: bool = False
    """Normalise each stage's features before they are put side by side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 0 or self.clusters < 1:
            raise CounterpointError("stages must not be negative and clusters be at least 1")
        if self.restrict not in ("clusters", "shuffled", "none"):
            raise CounterpointError(f"restrict is 'clusters', 'shuffled' or 'none', got {self.restrict!r}")


class MCL:
    """The base in stages. `encoder`, `projector` and whatever else it has are those of the stage at hand; `earlier` holds the
    frozen encoders of the stages before."""

    config: Any
    assigned: Int[Tensor, "stages n"]
    stage: Int[Tensor, ""]
    unseen: Int[Tensor, ""]  # images of groups too small for a batch, which this stage never draws

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)  # type: ignore[call-arg]
        self.given: SimpleNamespace = data
        module: Any = self
        # A place for each finished encoder's weights; nothing looks at one before they are there.
        module.earlier = nn.ModuleList(copy.deepcopy(module.encoder) for _ in range(config.stages))
        module.earlier.requires_grad_(False)
        module.register_buffer("stage", torch.tensor(0))
        module.register_buffer("unseen", torch.tensor(0))
        module.register_buffer("assigned", torch.zeros(config.stages, data.examples, dtype=torch.long))
        self.earlier_epochs = config.epochs * config.stages

    def _fresh(self, stage: int) -> Any:
        """The base learner as it begins a stage."""
        base: Any = type(self).__mro__[type(self).__mro__.index(MCL) + 1]
        state = torch.random.get_rng_state()
        found = base(self.config, self.given, self.seed * 1009 + stage)  # type: ignore[attr-defined]
        torch.random.set_rng_state(state)
        return found

    def begin(self, task: Any) -> None:
        super().begin(task)  # type: ignore[misc]
        self.task = task
        task.regroup = lambda plain: _Batches(plain, task.rows, self)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return super().loss(batch) | {"never_drawn": self.unseen.float()}  # type: ignore[misc]

    def groups(self) -> NDArray[np.int64] | None:
        """The pseudo-label of every training example that batches of this stage keep to, or None."""
        stage = int(self.stage)
        if stage == 0 or self.config.restrict == "none":
            return None
        groups = compose(list(self.assigned[:stage]), self.config.clusters).cpu().numpy()
        if self.config.restrict == "shuffled":
            groups = np.random.default_rng([self.seed, stage]).permutation(groups)  # type: ignore[attr-defined]
        return groups

    def features_by_stage(self, images: Tensor) -> list[Tensor]:
        """[n, dim] of each stage so far, as the base's `embed` has them."""
        module: Any = self
        own, found = module.encoder, []
        try:
            for encoder in (*module.earlier[: int(self.stage)], own):
                module.encoder = encoder
                found.append(super().embed(images))  # type: ignore[misc]
        finally:
            module.encoder = own
        return found

    def _together(self, stages: list[Tensor]) -> Tensor:
        return torch.cat([unit(x) for x in stages] if self.config.stage_norm else stages, 1)

    def embed(self, images: Tensor) -> Tensor:
        return self._together(self.features_by_stage(images))

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        module: Any = self
        stages = self.features_by_stage(batch["image"])
        found: dict[str, Any] = {"feature": self._together(stages)}
        if len(stages) > 1:
            found["parts"] = {f"stage {t}": part for t, part in enumerate(stages)}
        if batch.get("part") == "test" and module.compares:
            found["embedding"] = module.projector(stages[-1])
        if "views" in batch:
            found["pair"] = [self.embed(view) for view in batch["views"]]
        return found

    def configure_optimizers(self) -> Any:
        found: Any = super().configure_optimizers()  # type: ignore[misc]
        epochs = self.config.epochs
        for schedule in found[1]:
            # The schedule of the stage at hand.
            schedule.lr_lambdas = [lambda e, f=f: f(e % epochs) for f in schedule.lr_lambdas]
        return found

    def end_epoch(self, epoch: int) -> None:
        super().end_epoch(epoch)  # type: ignore[misc]
        if (epoch + 1) % self.config.epochs == 0 and int(self.stage) < self.config.stages:
            self._next_stage()

    @torch.no_grad()
    def _next_stage(self) -> None:
        module: Any = self
        stage = int(self.stage)
        if self.config.restrict != "none":
            self.assigned[stage] = self._clusters(stage)
        module.earlier[stage].load_state_dict(module.encoder.state_dict())
        module.earlier[stage].eval()
        fresh = self._fresh(stage + 1)
        own = module.state_dict()
        for name, value in fresh.state_dict().items():
            own[name].copy_(value)
        for optimizer in module.optimizers:
            optimizer.state.clear()
        self.stage.add_(1)

    def _clusters(self, stage: int) -> Tensor:
        """k-means on the normalised projections of all training images, without augmentation; on their features where the
        base compares no projections (MAE)."""
        module: Any = self
        split, training, parts = self.task.data.train, module.training, []
        module.eval()
        for start in range(0, len(split), BATCH):
            images = split.images(np.arange(start, min(start + BATCH, len(split))))
            x = normalise(torch.from_numpy(images).permute(0, 3, 1, 2).to(module.device))
            rows = super().embed(x)  # type: ignore[misc]
            parts.append(unit(module.projector(rows) if module.compares else rows).cpu())
        module.train(training)
        labels = kmeans(torch.cat(parts), min(self.config.clusters, len(split)), seed=module.seed + stage).labels
        groups = compose([*self.assigned[:stage].cpu(), labels], self.config.clusters)
        sizes = groups.unique(return_counts=True)[1]
        batch = self.config.batch_size
        if int(sizes.max()) < batch:
            raise CounterpointError(
                f"after stage {stage} the largest group of {len(sizes)} has {int(sizes.max())} images, fewer than a batch of "
                f"{batch}: use fewer --clusters or --stages, or a smaller --batch-size"
            )
        self.unseen.fill_(int(sizes[sizes < batch].sum()))
        return labels.to(self.assigned.device)

    def train(self, mode: bool = True) -> Any:
        found: Any = super().train(mode)  # type: ignore[misc]
        for encoder in getattr(self, "earlier", ()):
            encoder.eval()  # frozen, running statistics too
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
    learner=MCL,
    fits=("task:views",),
    recipe={"stages": 1, "clusters": 5},
)
