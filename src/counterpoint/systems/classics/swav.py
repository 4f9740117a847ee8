"""SwAV: predict one view's cluster assignment from another view.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020, arXiv 2006.09882.

The loss with multi-crop (Eqs. 2 and 6) uses assignments by Sinkhorn's algorithm (Eqs. 3 to 5, `core.assignment`). They cover
the batch of all processes and, optionally, a queue of earlier scores. Scores are the dot products of normalised projections
and prototypes. The learner's queue keeps projections and scores them with the current prototypes. The loss uses the queue
once it is full. Not built: batch normalisation over all processes. Each process normalises over its own share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.alignment import swapped_entropy
from counterpoint.core.assignment import sinkhorn
from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.compared import by_view
from counterpoint.core.distributed import gather_rows, place
from counterpoint.core.memory import Queue
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import once
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.views import LAPTOP, MultiCropConfig, MultiCropLearner
from counterpoint.words import counted


class SwAVOutput(NamedTuple):
    loss: Float[Tensor, ""]
    codes_first_crop: Float[Tensor, "n prototypes"]


@over_group
@full_precision(keep=("queue",))
def swav(
    high: Float[Tensor, "full n prototypes"],
    low: Float[Tensor, "small n prototypes"] | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    queue: Float[Tensor, "full stored prototypes"] | None = None,
) -> SwAVOutput:
    r"""Compute the loss of swapped prediction (Eqs. 2 and 6).

    It is the mean over full-size crops i and all other crops v of

        -sum_k q_i,k log softmax_k(scores_v / temperature)

    Args:
        high: scores of the full-size crops, which all get codes q.
        low: scores of the small crops, which only predict; None: no small crops.
        temperature: > 0, by default 0.1.
        epsilon, iterations: of `sinkhorn`, which computes the codes; by default 0.05 and 3.
        queue: scores of earlier samples with the current prototypes, for the assignment only; None: no queue.

    Returns the loss and the codes of the first crop. A batch of one has the codes 1 / prototypes. Raises ValueError for
    shapes that do not fit and for a single crop.

    >>> swav(torch.eye(2).expand(2, 2, 2)).loss.item() < swav(torch.zeros(2, 2, 2)).loss.item()
    True
    """
    small = high[:0] if low is None else low
    stored = high[:, :0] if queue is None else queue
    if high.ndim != 3 or small.ndim != 3 or small.shape[1:] != high.shape[1:]:
        raise ValueError(f"high and low must be [crops, n, prototypes] alike, got {shapes(high=high, low=small)}")
    if stored.ndim != 3 or (len(stored), stored.shape[2]) != (len(high), high.shape[2]):
        raise ValueError(f"queue must be [full, stored, prototypes], got {shapes(queue=stored, high=high)}")
    if len(high) + len(small) < 2:
        raise ValueError(
            f"high holds {counted(len(high), 'crop')} and low {len(small)}; swapped prediction needs at least two crops"
        )
    need_rows(high=high[0] if len(high) else high)
    need_positive(temperature=temperature)
    high = once(high, "swav")  # its codes are constants
    here = place(high.shape[1], high.device)
    everybody = gather_rows(high.detach().transpose(0, 1)).transpose(0, 1)
    codes = sinkhorn(torch.cat([everybody, stored.detach()], 1), epsilon, iterations)
    codes = codes[:, here.offset : here.offset + here.rows]
    loss = swapped_entropy(codes, *(wide(crops) / temperature for crops in (high, small)))
    return SwAVOutput(loss, codes[0])


@dataclass
class SwAVConfig(MultiCropConfig):
    """Settings of SwAV. Defaults are the paper's for ImageNet with large batches (Sec. 4 and Appendix A)."""

    epochs: int = 800
    batch_size: int = 4096
    recipe: str = "swav"
    optimizer: str = "lars"
    lr: float = 0.3
    weight_decay: float = 1e-6
    warmup_epochs: int = 10
    local_crops: int = 6
    prototypes: int = 3000
    """Number of clusters over which a batch is spread, at least 1."""
    temperature: float = 0.1
    """Temperature of the prediction, > 0."""
    epsilon: float = 0.05
    """Softness of the codes, > 0; larger values give softer codes."""
    iterations: int = 3
    """Number of iterations of Sinkhorn's algorithm, at least 1."""
    freeze_epochs: int = 1
    """Number of first epochs in which the prototypes are frozen, at least 0."""
    late: ClassVar = {"freeze_epochs": ("the training of the prototypes", 0)}
    queue: int = 0
    """Number of earlier projections of each large crop for the assignment; 0: none. With batches of 256 the paper uses 3840."""
    queue_from: int = 15
    """First epoch, from 0, in which the assignment uses the queue."""

    counts: ClassVar[tuple[str, ...]] = (*MultiCropConfig.counts, "prototypes", "iterations")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("epsilon")
        if min(self.freeze_epochs, self.queue, self.queue_from) < 0:
            raise CounterpointError(
                f"freeze_epochs, queue and queue_from must not be negative, got {self.freeze_epochs}, {self.queue} and "
                f"{self.queue_from}"
            )


class SwAV(MultiCropLearner):
    """An assignment of crops to prototypes, even over the batch; each crop predicts the assignments of the other crops."""

    def __init__(self, config: SwAVConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.prototypes = nn.Linear(config.projection, config.prototypes, bias=False)
        queues = range(self.crops if config.queue else 0)
        held = nn.ModuleList(Queue(config.queue, config.projection, seed=seed + crop) for crop in queues)
        self.queues: Sequence[Queue] = cast(Any, held)
        self.end_step()  # makes the prototypes unit vectors

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        z = unit(torch.stack(self.project(batch["views"])))
        scores = self.prototypes(z)
        high, low = scores[: self.crops], scores[self.crops :]
        loss = swav(high, low, config.temperature, config.epsilon, config.iterations, queue=self.stored()).loss
        for queue, crop in zip(self.queues, z, strict=False):
            queue.write(crop)
        return {"loss": loss}

    def stored(self) -> Tensor | None:
        """Compute the scores of earlier samples, [crops, queue, prototypes]; None while the assignment does not use them."""
        written = self.position.step * self.config.batch_size
        if not self.queues or self.position.epoch < self.config.queue_from or written < self.config.queue:
            return None
        with torch.no_grad():
            return torch.stack([self.prototypes(queue.read()) for queue in self.queues])

    def before_step(self) -> None:
        if self.position.epoch < self.config.freeze_epochs:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def end_step(self) -> None:
        self.prototypes.weight.copy_(unit(self.prototypes.weight))


SYSTEM = System(
    slug="swav",
    task="views",
    config=SwAVConfig,
    learner=SwAV,
    data="cifar10",
    compares=by_view,  # each crop has its own codes
    recipe=LAPTOP | {"epochs": 20, "local_crops": 2, "prototypes": 512, "queue": 1024, "queue_from": 5},
)
