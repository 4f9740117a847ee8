"""Hard contrastive learning: keep only the nearest negatives, as a low temperature does implicitly.

Wang, Liu: "Understanding the Behaviour of Contrastive Loss", CVPR 2021, arXiv 2012.09740. Symbols: the similarity of an anchor with
its positive is s_ii, those with its K negatives are s_ik. The temperature is tau, the share of negatives to keep is alpha.

    contrastive        -log( exp(s_ii/tau) / (exp(s_ii/tau) + sum_k exp(s_ik/tau)) )                         Eq. 1
    simple             -s_ii + lambda sum_k s_ik                                                             Eq. 6
    hard contrastive   contrastive over the kept: those at or above the (1 - alpha) quantile                 Eq. 8
    hard simple        -s_ii + lambda sum of the kept                                                        Eq. 9

Negatives have Boltzmann weights in the gradient, `penalty_distribution`. `uniformity` (core/gap.py) and `tolerance`
(tasks/measures/geometry.py) measure the effect. `counterpoint analyse RUN --temperature-sweep` draws both over the temperature for
a system with a temperature.

This is an addition: `hard-contrastive` alone is SimCLR with these losses, the in-batch form. The paper keeps a memory bank;
`moco-v2+hard-contrastive`, with its queue, is closer to that. The paper leaves these choices open:

- alpha keeps the max(1, floor(alpha K)) nearest negatives.
- lambda is 1 / (number of kept negatives), so the simple losses are means.
- tolerance is normalised by the number of pairs of one class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows
from counterpoint.core.compared import Compared, Direction, Queued, pairs, views
from counterpoint.core.contrast import softplus
from counterpoint.core.distributed import global_mean
from counterpoint.core.gap import uniformity
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.parts import Losses, Part, Step
from counterpoint.systems.settings import PartConfig

COLLAPSED = -0.05  # uniformity above which all embeddings are nearly equal
SEEN = 512  # number of each process's embeddings of which the uniformity is measured


def _checked(positive: Tensor, negatives: Tensor, keep_fraction: float) -> int:
    """Check the arguments of a loss, and return the number of negatives to keep."""
    fits = positive.ndim == 1 and negatives.ndim == 2 and len(negatives) == len(positive)
    if not fits or negatives.shape[1] < 1:
        raise ValueError(
            "positive must be [n] and negatives [n, negatives] with at least one, got "
            f"{list(positive.shape)} and {list(negatives.shape)}"
        )
    if not 0 < keep_fraction <= 1:
        raise ValueError(f"keep_fraction must lie in 0..1, 0 not included, got {keep_fraction}")
    if not len(negatives) or holds((negatives == -torch.inf).all(1).any()):
        raise ValueError("negatives: an anchor has only excluded negatives, or there are no anchors")
    return kept_of(negatives.shape[1], keep_fraction)


def kept_of(count: int, keep_fraction: float) -> int:
    """Return the number of negatives that a share of `count` keeps, rounded down, at least one: .29 of 100 are 29.

    Use the share's decimal form, because 0.29 * 100 is 28.999999999999996 in float64.
    """
    return max(1, int(Decimal(repr(float(keep_fraction))) * count))


@full_precision
def contrastive(
    positive: Float[Tensor, " n"],
    negatives: Float[Tensor, "n negatives"],
    temperature: float,
    keep_fraction: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute the contrastive loss of similarities (Eq. 1), for `keep_fraction` < 1 over the nearest negatives (Eq. 8).

    Args:
        positive: similarity of each anchor with its positive.
        negatives: similarities of each anchor with its negatives; -inf for excluded ones.
        temperature: > 0.
        keep_fraction: alpha, the share of the largest negatives to keep, above 0 and at most 1 (default); at least one stays.

    Returns the mean over anchors. The selection has no gradient. Raises ValueError for no negatives or a share outside 0..1.

    >>> contrastive(torch.tensor([1.0]), torch.tensor([[0.0]]), temperature=0.5)
    tensor(0.1269)
    """
    need_positive(temperature=temperature)
    kept = _checked(positive, negatives, keep_fraction)
    if kept < negatives.shape[1]:
        negatives = negatives.topk(kept, dim=1).values
    return softplus((negatives / temperature).logsumexp(1) - positive / temperature).mean()


@full_precision
def simple_contrastive(
    positive: Float[Tensor, " n"],
    negatives: Float[Tensor, "n negatives"],
    weight: float | None = None,
    keep_fraction: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute the linear loss, the mean of -s+ + weight sum s- (Eq. 6; over the nearest negatives: Eq. 9).

    `weight` is lambda; None: 1 / (number of kept negatives that are not excluded). Other arguments are those of `contrastive`.
    """
    kept = _checked(positive, negatives, keep_fraction)
    if kept < negatives.shape[1]:
        negatives = negatives.topk(kept, dim=1).values
    counts = negatives != -torch.inf  # NaN counts
    total = negatives.masked_fill(~counts, 0.0).sum(1)
    return ((total / counts.sum(1) if weight is None else weight * total) - positive).mean()


@full_precision
def penalty_distribution(negatives: Float[Tensor, "*n negatives"], temperature: float) -> Float[Tensor, "*n negatives"]:
    """Compute each negative's share of the repulsion (Eq. 5): exp(s_ik/tau) / sum_k exp(s_ik/tau).

    The entropy of the shares rises with tau. `negatives` holds similarities, `temperature` is tau > 0.

    >>> penalty_distribution(torch.tensor([0.0, 0.0]), 0.1)
    tensor([0.5000, 0.5000])
    """
    need_positive(temperature=temperature)
    need_rows(negatives=negatives)
    return (negatives / temperature).softmax(-1)


@dataclass
class HardContrastiveConfig(PartConfig):
    """Settings of hard contrastive learning."""

    keep_fraction: float = 0.0819
    """Share of the nearest negatives to keep, above 0 and at most 1; the paper keeps 4,095 of 50,000. 1: all."""
    push: Literal["softmax", "linear"] = "softmax"
    """Weights of negatives: softmax, at the temperature, or linear, all equal (the simple loss)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep_fraction <= 1:
            raise CounterpointError(f"keep_fraction must lie in 0..1, 0 not included, got {self.keep_fraction}")


@dataclass(frozen=True)
class Below:
    """Exclude from row i all entries below its threshold."""

    thresholds: Float[Tensor, " rows"]  # divided by the temperature, like the entries of a tile
    symmetric = False

    def exclude(self, tile: Tensor, rows: slice, columns: slice) -> None:
        tile.masked_fill_(tile < self.thresholds[rows][:, None], -torch.inf)


def nearest(way: Direction, keep_fraction: float) -> tuple[Int[Tensor, "m kept"], Float[Tensor, " m"]]:
    """Select the nearest `keep_fraction` of each anchor's admitted negatives, with their thresholds.

    Returns their positions in the bank, padded with -1, and the cosine between the last kept and the next negative. Half of
    the way between both, it does not depend on rounding.
    """
    indices, thresholds = [], []
    for _, s in way.parts():
        admitted = (s > -torch.inf).sum(1)
        sizes, inverse = admitted.unique(return_inverse=True)
        kept = admitted.new_tensor([kept_of(int(size), keep_fraction) for size in sizes])[inverse]
        if int(admitted.min()) < 1:
            raise CounterpointError("an anchor has no negatives; use a larger batch or queue")
        most = min(int(kept.max()) + 1, s.shape[1])
        values, index = s.topk(most, dim=1)
        last = values.gather(1, kept[:, None] - 1)[:, 0]
        after = values.gather(1, kept.clamp(max=most - 1)[:, None])[:, 0]
        thresholds.append(torch.where(kept < admitted, (last + after) / 2, -torch.inf))
        indices.append(index.masked_fill(torch.arange(most, device=s.device) >= kept[:, None], -1))
    widest = max(part.shape[1] for part in indices)
    return torch.cat([F.pad(part, (0, widest - part.shape[1]), value=-1) for part in indices]), torch.cat(thresholds)


def thresholds(way: Direction, keep_fraction: float) -> Float[Tensor, " m"]:
    """Compute the thresholds of `nearest` without sorting."""
    found = []
    for _, s in way.parts():
        admitted = (s > -torch.inf).sum(1)
        least = int(admitted.min())
        kept = kept_of(least, keep_fraction)
        if not 0 < kept < least == int(admitted.max()):  # numbers of negatives differ, or all are kept
            return nearest(way, keep_fraction)[1]
        found.append(s.topk(kept + 1, dim=1, sorted=False).values.topk(2, dim=1, largest=False).values.mean(1))
    return torch.cat(found)


@full_precision
def hard_losses(way: Direction, temperature: float | Tensor, keep_fraction: float) -> Float[Tensor, " m"]:
    """Compute the hard contrastive loss (Eq. 8) of every anchor.

    Hold a matrix of moderate size. Compute a larger one twice, for the thresholds and for the loss, in memory linear in
    anchors and bank.
    """
    positive, s = way.positives(temperature), way.whole(temperature)
    if s is not None:
        admitted = (s.detach() > -torch.inf).sum(1)
        if int(admitted.min()) == int(admitted.max()) > 0:
            kept = s.topk(kept_of(int(admitted[0]), keep_fraction), dim=1, sorted=False).values
            return softplus(kept.logsumexp(1) - positive)
    least = thresholds(way, keep_fraction)
    return softplus(way.negatives(temperature, Below(least / temperature)) - positive)


class HardContrastive(Part):
    """The base's comparison with only the nearest negatives, with softmax or equal weights."""

    config: HardContrastiveConfig
    spread: float | Tensor = -1.0  # uniformity of the last batch

    def end_epoch(self, epoch: int) -> None:
        if float(self.spread) > COLLAPSED:
            raise CounterpointError(
                f"all embeddings have become nearly the same (uniformity {float(self.spread):.3f} in the last batch): the nearest "
                "negatives are nearer than the positives. Keep more negatives (--hard-contrastive.keep-fraction), or use "
                "weaker views"
            )

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        with torch.no_grad():
            spread = uniformity(unit(compared.query)[:SEEN])  # over the rows of all processes
        self.spread = spread  # read at the end of the epoch, so that no step waits for a GPU
        config, t = self.config, compared.temperature
        if config.push == "softmax" and config.keep_fraction == 1:
            return below(compared) | {"batch_uniformity": spread}
        losses = []
        for way in compared.directions(apart=True):
            if config.push == "softmax":
                found = hard_losses(way, t, config.keep_fraction)
            else:
                index, _ = nearest(way, config.keep_fraction)
                there = index >= 0
                mean = F.embedding_bag(
                    index[there], way.bank, torch.cat([index.new_zeros(1), there.sum(1).cumsum(0)[:-1]]), mode="mean"
                )
                found = (way.query * mean).sum(1) - way.positives(1.0)
            losses.append(global_mean(found))
        return {"loss": torch.stack(losses).mean(), "batch_uniformity": spread}


SYSTEM = Addition(
    slug="hard-contrastive",
    over="simclr",
    config=HardContrastiveConfig,
    part=HardContrastive,
    fits=(views, Queued, pairs),
    loss="own",
    recipe={"hard-contrastive.keep_fraction": 0.3},
)
