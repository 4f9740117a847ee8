"""CACR: contrast the positives of a query among themselves and its negatives among themselves, then add both costs.

Zheng, Chen, Yao, Yang, Li, Zhang, Zhang, Tsang, Zhou, Zhou: "Contrastive Attraction and Contrastive Repulsion for
Representation Learning", TMLR 2023, arXiv 2105.03746. Symbols: the unit embedding of view v of image i is z_i^v. The squared
Euclidean distance is d2. Factors of distances are t+ and t- (positive and negative sharpness). The weights of the two terms
are alpha and beta.

    attraction    alpha  mean over x, i of  sum_{v != x} pi+_v d2(z_i^x, z_i^v),     pi+ = softmax_v(  t+ d2 )   the farthest most
    repulsion    -beta   mean over x < y, i of  sum_{j != i} pi-_j d2(z_i^x, z_j^y),  pi- = softmax_j( -t- d2 )   the closest most

There is no softmax over positives and negatives together and no logarithm. The gradient flows through both weights. As in the
authors' code, a query's negatives come from one other view at a time. Of two views, the earlier holds the queries.

`cacr` is the form of the paper's small experiments, with its ablations and debiasing. `cacr_momentum` is the form with a
momentum encoder and a predictor (MoCo v3). Its cost is cross-entropy ("rbf") or expected cost ("euclidean"). Expected costs are
computed block by block, without storing all distances (core/expected.py). Weights depend only on the distances, so alpha or beta
may be 0.

Not built:

- The repulsion of kernel values exp(-t d2), an alternative that the authors' code has switched off.
- The form with a queue of the label-shift experiments, whose code caches one view's distances for all.
- Small local crops.
- The small AlexNet of the CIFAR runs and its learning-rate steps; `resnet-s` and a cosine replace them.

The momentum form's projector and predictor have no batch normalisation at their ends. All views pass the network together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, need_within, need_word, stacked
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, mean_of_total, place, world
from counterpoint.core.expected import LARGEST, expected_costs, mean_key
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Diagonal
from counterpoint.core.teacher import EMATeacher, cosine_momentum
from counterpoint.core.transforms import once
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner, mlp
from counterpoint.views.images import ViewPipeline

# --------------------------------------------------------------------------------------------------------------- the losses


class CACROutput(NamedTuple):
    """Both terms; the loss is their sum."""

    attraction: Float[Tensor, ""]  # in 0 .. 4 alpha for unit rows
    repulsion: Float[Tensor, ""]  # in -4 beta .. 0


def _others(views: int, device: torch.device) -> Int[Tensor, "views others"]:
    """Number, for every view, its pairs with each other view; pairs x < y are counted row by row."""
    table = torch.empty(views, views, dtype=torch.long)
    above = torch.triu_indices(views, views, 1)
    table[above[0], above[1]] = table[above[1], above[0]] = torch.arange(above.shape[1])
    return table[~torch.eye(views, dtype=torch.bool)].view(views, views - 1).to(device)


@over_group
@full_precision
def cacr(
    views: Sequence[Float[Tensor, "n dim"]] | Float[Tensor, "views n dim"],
    alpha: float = 1.0,
    beta: float = 1.0,
    positive_sharpness: float = 1.0,
    negative_sharpness: float = 0.9,
    weight_pos: bool = True,
    weight_neg: bool = True,
    positive_prior: float | None = None,
) -> CACROutput:
    r"""Compute contrastive attraction and repulsion of V = K + 1 views, with the squared Euclidean cost.

        attraction   mean over x, i of sum_{v != x} pi+_v alpha d2(z_i^x, z_i^v),    pi+ = softmax_v(  t+ d2 )
        repulsion    mean over x < y, i of r_i
        r_i          -sum_{j != i} pi-_j beta d2(z_i^x, z_j^y),                      pi- = softmax_j( -t- d2 )

    Args:
        views: V >= 2 views, each [n, dim] with unit rows, which this function does not normalise.
        alpha, beta: weights of the terms, in 0..1e30, by default 1.
        positive_sharpness, negative_sharpness: t+ and t-, in 0..1e30; they multiply distances, and 0 gives equal weights.
        weight_pos, weight_neg: False gives positives, negatives, equal weights (the paper's ablations).
        positive_prior: share of supposed negatives that are positives, at least 0 and below 1. The repulsion is then the mean
            of (r_i - prior d2(z_i^x, z_i^y)) / (1 - prior), as in the authors' code. None: no correction.

    With two views the positive's weight is 1, and the attraction is plain alignment. With a large t- the repulsion is minus
    beta times the distance of the nearest negative. If all rows are equal, both terms and the gradient are 0, so a network
    must not start there. Across processes, negatives come from all processes in rank order; each process has its own queries.

    Source: arXiv 2105.03746, as in the code of its small experiments.

    Raises ValueError for one view, fewer than two rows, different shapes, or numbers out of their range.

    >>> cacr(torch.eye(2).expand(2, 2, 2))
    CACROutput(attraction=tensor(0.), repulsion=tensor(-2.))
    """
    z = stacked(views, 2, "views", "a query has no positives")
    need_within(
        0, LARGEST, alpha=alpha, beta=beta, positive_sharpness=positive_sharpness, negative_sharpness=negative_sharpness
    )
    if positive_prior is not None:
        if not 0 <= positive_prior < 1:
            raise ValueError(f"positive_prior must lie in 0..1, 1 not included, got {positive_prior}")
        if not weight_neg:
            raise ValueError("positive_prior needs weighted negatives, but weight_neg is False")
    here = place(z.shape[1], z.device)
    if here.total < 2:
        raise ValueError(f"views must hold at least 2 rows, got {here.total}: a query has no negatives")
    keys = z if world()[1] == 1 else gather_rows(z.transpose(0, 1)).transpose(0, 1).contiguous()

    # Compute distances within a sample, of every pair of views, as differences, which are exact for equal views.
    pairs = torch.cat([(z[x] - z[x + 1 :]).square().sum(2) for x in range(len(z) - 1)])
    positives = pairs[_others(len(z), z.device)]
    weights = (positive_sharpness * positives).softmax(1) if weight_pos else 1 / positives.shape[1]
    attraction = alpha * global_mean((weights * positives).sum(1).mean(0))

    sharpness = negative_sharpness if weight_neg else 0.0
    own = here.offset + torch.arange(here.rows, device=z.device)
    sums = [expected_costs(z[x], keys[x + 1 :], sharpness, own, None, True) for x in range(len(z) - 1)]
    repulsion = -beta * mean_of_total(torch.stack(sums).sum() / len(pairs), here.total)
    if positive_prior is not None:
        repulsion = (repulsion - positive_prior * global_mean(pairs.mean(0))) / (1 - positive_prior)
    return CACROutput(attraction, repulsion)


@over_group
@full_precision
def cacr_momentum(
    queries: Sequence[Float[Tensor, "n dim"]] | Float[Tensor, "views n dim"],
    key: Float[Tensor, "n dim"],
    temperature: float = 1.0,
    cost: Literal["rbf", "euclidean"] = "rbf",
    reduction: Literal["mean", "sum"] | None = None,
) -> Float[Tensor, ""]:
    r"""Compute CACR of several views' predictions with one view's keys from a momentum encoder, as in MoCo v3.

    With c_vij the cosine of q_vi and k_j, and p_vi = softmax_v( (2 - 2 c_vii) / T ), without gradient:

        rbf          sum_v mean_i  2 T p_vi ( -c_vii / T + log sum_j exp(c_vij / T) )
        euclidean    sum_v sum_i   p_vi ( 1 - c_vii - sum_{j != i} w_vij (1 - c_vij) )

    and w_vi = softmax_{j != i}( c_vij / T ), without gradient.

    Args:
        queries: one or more views' predictions, each [n, dim], which this function normalises.
        key: the keys of another view, which this function normalises; no gradient.
        temperature: T, in 1e-30..1e30, by default 1.
        cost: "rbf" (default) or "euclidean".
        reduction: over samples, "mean" or "sum". None: as in the authors' code, the mean for "rbf" and the sum for
            "euclidean", whose steps then grow with the batch.

    Across processes, keys come from all processes, and a sum covers all samples. The cross-entropy of a single sample is 0.

    Source: arXiv 2105.03746, as in the code of its ImageNet runs.

    Raises ValueError for different shapes, no rows, "euclidean" with one row, or unknown options.

    >>> cacr_momentum(torch.eye(2)[None], torch.eye(2))
    tensor(0.6265)
    """
    q = stacked(queries, 1, "queries", "nothing is attracted")
    need_within(1 / LARGEST, LARGEST, temperature=temperature)
    need_word(("rbf", "euclidean"), cost=cost)
    if reduction not in (None, "mean", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or None, got {reduction!r}")
    if key.shape != q.shape[1:]:
        raise ValueError(f"queries and key must be [n, dim] alike, got {list(q.shape[1:])} and {list(key.shape)}")
    here = place(len(key), key.device)
    least = 2 if cost == "euclidean" else 1
    if here.total < least:
        raise ValueError(f"queries must hold at least {least} rows for the cost {cost!r}, got {here.total}")
    q = unit(once(q, "cacr_momentum"))  # its weights p count as constants
    k = unit(key.detach())
    flat = q.flatten(0, 1)
    cosine = (q * k).sum(2)
    p = ((2 - 2 * cosine) / temperature).softmax(0).detach()
    if cost == "rbf":
        logs = batch_logsumexp(scaled(flat, temperature), k).rows.view_as(cosine)
        mean = global_mean((2 * temperature * p * (logs - cosine / temperature)).sum(0))
    else:
        # The weights are constants with sum 1, so the cost is linear in q: towards its own key, away from the mean key.
        away = mean_key(q.detach(), gather_rows(k), temperature, here.offset)
        mean = global_mean((p * positive_similarity(flat, (away - k).flatten(0, 1)).view_as(p)).sum(0))
    if reduction is None:
        reduction = "mean" if cost == "rbf" else "sum"
    return mean if reduction == "mean" else mean * here.total


@over_group
@full_precision
def pairwise_nt_xent(
    views: Sequence[Float[Tensor, "n dim"]] | Float[Tensor, "views n dim"], temperature: float = 0.2
) -> Float[Tensor, ""]:
    r"""Compute the mean of NT-Xent over every pair of views, the baseline of CACR for several views.

    Args:
        views: V >= 2 views, each [n, dim], which this function normalises.
        temperature: > 0, by default 0.2.

    Raises ValueError for one view or different shapes.

    >>> pairwise_nt_xent(torch.eye(3).expand(2, 3, 3), temperature=1.0)
    tensor(0.9048)
    """
    z = unit(stacked(views, 2, "views", "a query has no positives"))
    need_rows(views=z[0])
    need_positive(temperature=temperature)
    z = scaled(z.flatten(0, 1), temperature**0.5).view_as(z)
    return torch.stack(
        [
            global_mean(batch_logsumexp(torch.cat([x, y]), exclude=Diagonal()).rows)
            - global_mean(positive_similarity(x, y))
            for x, y in itertools.combinations(z, 2)
        ]
    ).mean()


# ------------------------------------------------------------------------------------------------------------- the learner


@dataclass
class CACRConfig(ViewsConfig):
    """Settings of CACR. Defaults come from the paper's CIFAR-10 runs, for the momentum form from its ImageNet runs."""

    epochs: int = 200
    batch_size: int = 128
    encoder: str = "resnet-s"
    recipe: str = "moco-v1"
    hidden: int = 4096
    optimizer: str = "momentum"
    lr: float = 0.12
    weight_decay: float = 1e-4
    form: Literal["plain", "momentum", "nt_xent"] = "plain"
    """plain: expected costs of all views; momentum: queries against a momentum encoder's keys; nt_xent: NT-Xent, a baseline."""
    positives: int = 4
    """K, the number of positives of a query; each image gets K + 1 views."""
    alpha: float = 1.0
    """Weight of the attraction."""
    beta: float = 1.0
    """Weight of the repulsion."""
    positive_sharpness: float = 1.0
    """Factor of distances in the weights of positives: 0 gives equal weights, larger values prefer the farthest."""
    negative_sharpness: float = 0.9
    """The same for negatives; larger values prefer the closest. The paper uses 2 on CIFAR-100, STL-10 and ImageNet."""
    weight_pos: bool = True
    """Weight positives by their distance."""
    weight_neg: bool = True
    """Weight negatives by their closeness."""
    positive_prior: float | None = None
    """Share of negatives of the query's class to correct for; the authors' code suggests 0.1. None: no correction."""
    cost: Literal["rbf", "euclidean"] = "rbf"
    """Cost of the momentum form, in either case a mean over the batch."""
    temperature: float = 1.0
    """Temperature of the momentum form (0.2 for vision transformers) and of NT-Xent."""
    keys: int = 2
    """Number of views of the momentum form, from the first, whose keys attract the other views' queries in turn."""
    momentum_teacher: float = 0.996
    """Momentum of the key network at the first step, 0 to 1; it rises to 1 on half a cosine."""

    counts: ClassVar[tuple[str, ...]] = (*ViewsConfig.counts, "positives", "keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "positive_sharpness", "negative_sharpness"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise CounterpointError(f"{name} must lie in 0..{LARGEST:g}, got {getattr(self, name)}")
        self.need_share("momentum_teacher")
        if self.positive_prior is not None and not (0 <= self.positive_prior < 1 and self.weight_neg):
            raise CounterpointError(
                f"positive_prior must be at least 0 and below 1, and needs weight_neg, got {self.positive_prior} and "
                f"{self.weight_neg}"
            )
        if self.form == "momentum" and self.keys > self.positives + 1:
            raise CounterpointError(f"keys ({self.keys}) must not be more than the views ({self.positives + 1})")


class CACR(ViewsLearner):
    """A learner on K + 1 views of every image, each a query whose positives are the others; optionally a momentum encoder."""

    def __init__(self, config: CACRConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        if config.form == "momentum":
            self.predictor = mlp(config.projection, config.hidden, config.projection)
            self.teacher = EMATeacher(self.network)

    def build_views(self) -> ViewPipeline:
        return ViewPipeline(self.size, crops=self.config.positives + 1, recipe=self.config.recipe)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, views = self.config, batch["views"]
        if config.form == "momentum":
            return {"loss": self._to_keys(views)}
        z = torch.stack(self.project(views))
        if config.form == "nt_xent":
            return {"loss": pairwise_nt_xent(z, config.temperature)}
        attraction, repulsion = cacr(
            unit(z),
            config.alpha,
            config.beta,
            config.positive_sharpness,
            config.negative_sharpness,
            config.weight_pos,
            config.weight_neg,
            config.positive_prior,
        )
        return {"loss": attraction + repulsion, "attraction": attraction.detach(), "repulsion": repulsion.detach()}

    def _to_keys(self, views: list[Tensor]) -> Tensor:
        """Average, over the views with keys, the loss of all other views' queries."""
        config = self.config
        # Update the key network before using it, as in the authors' code.
        momentum = cosine_momentum(self.position.step, self.total_steps, config.momentum_teacher)
        self.teacher.update(self.network, momentum)
        keys = [self.teacher(view) for view in views[: config.keys]]
        queries = self.predictor(torch.cat(self.project(views))).chunk(len(views))
        return torch.stack(
            [
                cacr_momentum([*queries[:at], *queries[at + 1 :]], key, config.temperature, config.cost, "mean")
                for at, key in enumerate(keys)
            ]
        ).mean()


SYSTEM = System(
    slug="cacr",
    task="views",
    config=CACRConfig,
    learner=CACR,
    data="cifar10",
    # A view costs as much as an image, so 5 views of each image for half as many epochs.
    recipe=LAPTOP | {"epochs": 10, "recipe": "moco-v1"},
)
