"""CACR: contrast the positives of a query among themselves and its negatives among themselves, then add both costs.

Zheng, Chen, Yao, Yang, Li, Zhang, Zhang, Tsang, Zhou, Zhou: "Contrastive Attraction and Contrastive Repulsion for
Representation Learning", TMLR 2023, arXiv 2105.03746. Symbols: z_i^v the unit embedding of view v of image i, d2 the squared
Euclidean distance, t+ and t- (positive and negative sharpness) factors of distances, alpha and beta the weights of the two terms.

    attraction    alpha  mean over x, i of  sum_{v != x} pi+_v d2(z_i^x, z_i^v),     pi+ = softmax_v(  t+ d2 )   the farthest most
    repulsion    -beta   mean over x < y, i of  sum_{j != i} pi-_j d2(z_i^x, z_j^y),  pi- = softmax_j( -t- d2 )   the closest most

There is no softmax over positives and negatives together and no logarithm. The gradient flows through both weights. As in the
authors' code a query's negatives come from one other view at a time, and of two views the earlier holds the queries.

Here are `cacr`, the form of the paper's small experiments, with its ablations and debiasing, and `cacr_momentum`, the form
with a momentum encoder and a predictor (MoCo v3), by cross-entropy ("rbf") or by expected costs ("euclidean"). The expected
cost goes block by block through distances that are never all there, see `expected_distance`; weights are made of the distances
themselves, so alpha or beta may be 0.

Left out: the repulsion of kernel values exp(-t d2), an alternative that the authors' code has switched off; the form with a
queue of the label-shift experiments, whose code caches one view's distances for all; small local crops; the small AlexNet of
the CIFAR runs (`resnet-s` stands in) and its learning-rate steps (it falls on a cosine here). The momentum form's projector
and predictor have no batch normalisation at their ends, and views go through the network in one pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, need_within
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, mean_of_total, place, world
from counterpoint.core.expected import LARGEST, expected_costs, mean_key
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Diagonal
from counterpoint.core.teacher import EMATeacher, cosine_momentum
from counterpoint.core.transforms import holds, once
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.views import LAPTOP, ViewsConfig, ViewsLearner, mlp
from counterpoint.views.images import ViewPipeline

# --------------------------------------------------------------------------------------------------- the expected distance


@full_precision
def expected_distance(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "sets n dim"],
    sharpness: float,
    *,
    own: Int[Tensor, " rows"] | None = None,
    weight: Float[Tensor, " rows"] | None = None,
    through: bool = True,
) -> Float[Tensor, ""]:
    r"""Expected squared distance of rows to keys, of which the closest count most: what the repulsion pushes up.

        sum_i w_i sum_s sum_{j != own_i} p_isj d2(q_i, k_sj),      p_is = softmax_{j != own_i}( -sharpness d2(q_i, k_sj) )

    Args:
        query: any rows; nothing is normalised here.
        key: sets of keys, each with a softmax of its own.
        sharpness: in 0..1e30; 0 weighs all keys alike.
        own: the key of each set that a row does not see; default: row i's is i.
        weight: w_i, without gradient; default: 1.
        through: whether the gradient flows through the weights p.

    Returns the sum, a number: of no rows 0. The gradients are made in the forward pass, so memory grows with rows and keys, not
    with their product; it cannot be differentiated twice.

    Raises ValueError for shapes that do not fit, for rows without keys, or a sharpness out of its range.

    Source: arXiv 2105.03746, the cost of the negatives under their conditional distribution.

    >>> x = torch.eye(3)
    >>> expected_distance(x, x[None], sharpness=1.0)
    tensor(6.)
    """
    if query.ndim != 2 or key.ndim != 3 or query.shape[1] != key.shape[2]:
        raise ValueError(
            f"query and key must be [rows, dim] and [sets, n, dim], got {list(query.shape)} and {list(key.shape)}"
        )
    if not len(key) or key.shape[1] < 2:
        raise ValueError(f"key must hold a set of at least 2: one is not seen; got {list(key.shape)}")
    own = torch.arange(len(query), device=query.device) if own is None else own
    if own.shape != query.shape[:1] or holds(((own < 0) | (own >= key.shape[1])).any()):
        raise ValueError(f"own must hold, for each of {len(query)} rows, one of the {key.shape[1]} keys")
    need_within(0, LARGEST, sharpness=sharpness)
    weight = None if weight is None else weight.detach()
    return expected_costs(wide(query), wide(key), sharpness, own, weight, through)


# --------------------------------------------------------------------------------------------------------------- the losses


class CACROutput(NamedTuple):
    """Both terms; the loss is their sum."""

    attraction: Float[Tensor, ""]  # in 0 .. 4 alpha for unit rows
    repulsion: Float[Tensor, ""]  # in -4 beta .. 0


def _stacked(views: Sequence[Tensor] | Tensor, least: int, name: str, why: str) -> Tensor:
    """[views, n, dim] in float32 at least."""
    if not isinstance(views, Tensor):
        shapes = [list(view.shape) for view in views]
        if not shapes or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"{name} must be [n, dim] alike, got {shapes}")
        views = torch.stack(list(views))
    if views.ndim != 3:
        raise ValueError(f"{name} must be [views, n, dim], got {list(views.shape)}")
    if len(views) < least:
        raise ValueError(f"{name} must be at least {least}, got {len(views)}: {why}")
    return wide(views)


def _others(views: int, device: torch.device) -> Int[Tensor, "views others"]:
    """For every view, which of the pairs x < y, counted row by row, it forms with each of the others."""
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
    r"""Contrastive attraction and contrastive repulsion of V = K + 1 views, with the squared Euclidean cost.

        attraction   mean over x, i of sum_{v != x} pi+_v alpha d2(z_i^x, z_i^v),    pi+ = softmax_v(  t+ d2 )
        repulsion    mean over x < y, i of r_i
        r_i          -sum_{j != i} pi-_j beta d2(z_i^x, z_j^y),                      pi- = softmax_j( -t- d2 )

    Args:
        views: V >= 2 views, each [n, dim] with unit rows (the authors' encoder normalises; nothing is normalised here).
        alpha, beta: in 0..1e30, weights of the terms.
        positive_sharpness, negative_sharpness: t+ and t-, in 0..1e30; they multiply distances, and 0 weighs all alike.
        weight_pos, weight_neg: False weighs positives, negatives, uniformly (the paper's ablations).
        positive_prior: the share in 0..1, 1 not included, of supposed negatives that are positives; the repulsion is then
            the mean of (r_i - prior d2(z_i^x, z_i^y)) / (1 - prior), as in the authors' code. None: not corrected.

    With two views the positive's weight is 1 and the attraction is plain alignment. With a large t- the repulsion is minus
    beta times the distance of the nearest negative. Where all rows are equal both terms and the gradient are 0: a network must
    not start there. Across processes the negatives are everybody's, in rank order; each works on its own rows.

    Source: arXiv 2105.03746, as in the code of its small experiments.

    Raises ValueError for one view, fewer than two rows, shapes that differ, or numbers out of their range.

    >>> cacr(torch.eye(2).expand(2, 2, 2))
    CACROutput(attraction=tensor(0.), repulsion=tensor(-2.))
    """
    z = _stacked(views, 2, "views", "a query has no positives")
    need_within(
        0, LARGEST, alpha=alpha, beta=beta, positive_sharpness=positive_sharpness, negative_sharpness=negative_sharpness
    )
    if positive_prior is not None:
        if not 0 <= positive_prior < 1:
            raise ValueError(f"positive_prior must lie in 0..1, 1 not included, got {positive_prior}")
        if not weight_neg:
            raise ValueError("positive_prior goes with weighted negatives: weight_neg is False")
    here = place(z.shape[1], z.device)
    if here.total < 2:
        raise ValueError(f"views must hold at least 2 rows, got {here.total}: a query has no negatives")
    keys = z if world()[1] == 1 else gather_rows(z.transpose(0, 1)).transpose(0, 1).contiguous()

    # Distances within a sample, of every pair of views: differences are exact where views are equal.
    pairs = torch.cat([(z[x] - z[x + 1 :]).square().sum(2) for x in range(len(z) - 1)])
    positives = pairs[_others(len(z), z.device)]
    weights = (positive_sharpness * positives).softmax(1) if weight_pos else 1 / positives.shape[1]
    attraction = alpha * global_mean((weights * positives).sum(1).mean(0))

    sharpness, own = (
        negative_sharpness if weight_neg else 0.0,
        here.offset + torch.arange(here.rows, device=z.device),
    )
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
    r"""CACR of several views' predictions with one view's keys from a momentum encoder, in the manner of MoCo v3.

    With c_vij the cosine of q_vi and k_j, and p_vi = softmax_v( (2 - 2 c_vii) / T ), without gradient:

        rbf          sum_v mean_i  2 T p_vi ( -c_vii / T + log sum_j exp(c_vij / T) )
        euclidean    sum_v sum_i   p_vi ( 1 - c_vii - sum_{j != i} w_vij (1 - c_vij) )

    and w_vi = softmax_{j != i}( c_vij / T ), without gradient.

    Args:
        queries: one or more views' predictions, each [n, dim]; normalised here.
        key: the keys of another view; normalised here, no gradient.
        temperature: T, in 1e-30..1e30.
        cost: which of the two.
        reduction: over samples. None: as the authors' code, the mean for "rbf" and the sum for "euclidean", whose steps then
            grow with the batch.

    Across processes the keys are everybody's, and a sum is over everybody's samples. One sample alone has the cross-entropy 0.

    Source: arXiv 2105.03746, as in the code of its ImageNet runs.

    Raises ValueError for shapes that differ, no rows, "euclidean" of one row, or options it does not know.

    >>> cacr_momentum(torch.eye(2)[None], torch.eye(2))
    tensor(0.6265)
    """
    q = _stacked(queries, 1, "queries", "nothing is attracted")
    need_within(1 / LARGEST, LARGEST, temperature=temperature)
    if cost not in ("rbf", "euclidean"):
        raise ValueError(f"cost must be 'rbf' or 'euclidean', got {cost!r}")
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
        # The weights stand still and sum to 1, so what is left is linear in q: towards its own key, away from their mean.
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
    r"""What CACR is compared with on several views: NT-Xent of every pair of views, their mean.

    Args:
        views: V >= 2 views, each [n, dim]; normalised here.
        temperature: > 0.

    Raises ValueError for one view or shapes that differ.

    >>> pairwise_nt_xent(torch.eye(3).expand(2, 3, 3), temperature=1.0)
    tensor(0.9048)
    """
    z = unit(_stacked(views, 2, "views", "a query has no positives"))
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
    """Settings of CACR. Defaults are those of the paper's CIFAR-10 runs; the momentum form's those of its ImageNet runs."""

    epochs: int = 200
    batch_size: int = 128
    encoder: str = "resnet-s"
    recipe: str = "moco-v1"
    hidden: int = 4096
    optimizer: str = "momentum"
    lr: float = 0.12
    weight_decay: float = 1e-4
    form: Literal["plain", "momentum", "nt_xent"] = "plain"
    """Expected costs of all views, queries against a momentum encoder's keys, or (a baseline) NT-Xent of all pairs of views."""
    positives: int = 4
    """K, positives of a query: K + 1 views are drawn of an image."""
    alpha: float = 1.0
    """Weight of the attraction."""
    beta: float = 1.0
    """Weight of the repulsion."""
    positive_sharpness: float = 1.0
    """Factor of distances in the weights of positives: 0 weighs all alike, larger prefers the farthest more."""
    negative_sharpness: float = 0.9
    """The same of negatives, larger prefers the closest more; the paper has 2 on CIFAR-100, STL-10 and ImageNet."""
    weight_pos: bool = True
    """Whether positives are weighed by their distance."""
    weight_neg: bool = True
    """Whether negatives are weighed by their closeness."""
    positive_prior: float | None = None
    """Share of negatives that are of the query's own kind, corrected for; the authors' code suggests 0.1. None: not corrected."""
    cost: Literal["rbf", "euclidean"] = "rbf"
    """The momentum form's cost; a mean over the batch in either case."""
    temperature: float = 1.0
    """Temperature of the momentum form (0.2 for vision transformers) and of NT-Xent."""
    keys: int = 2
    """Views of the momentum form whose keys the other views' queries are drawn to in turn: the first ones of all."""
    momentum_teacher: float = 0.996
    """How much of the key network stays at the first step; this rises to 1 on half a cosine."""

    counts: ClassVar[tuple[str, ...]] = (*ViewsConfig.counts, "positives", "keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("plain", "momentum", "nt_xent"):
            raise CounterpointError(f"form is 'plain', 'momentum' or 'nt_xent', got {self.form!r}")
        if self.cost not in ("rbf", "euclidean"):
            raise CounterpointError(f"cost is 'rbf' or 'euclidean', got {self.cost!r}")
        for name in ("alpha", "beta", "positive_sharpness", "negative_sharpness"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise CounterpointError(f"{name} must lie in 0..{LARGEST:g}, got {getattr(self, name)}")
        if not 0 <= self.momentum_teacher <= 1:
            raise CounterpointError(f"momentum_teacher must lie in 0..1, got {self.momentum_teacher}")
        if self.positive_prior is not None and not (0 <= self.positive_prior < 1 and self.weight_neg):
            raise CounterpointError("positive_prior lies in 0..1, 1 not included, and goes with weight_neg")
        if self.form == "momentum" and self.keys > self.positives + 1:
            raise CounterpointError(f"keys ({self.keys}) must not be more than the views ({self.positives + 1})")


class CACR(ViewsLearner):
    """K + 1 views of every image, each a query whose positives are the others; with a momentum encoder where asked for."""

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
        """For each view that gives keys, the loss of all other views' queries; the mean."""
        config = self.config
        # The key network moves before it is asked, as in the authors' code.
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
    # Views cost as much as images: 5 of each for half as many epochs.
    recipe=LAPTOP | {"epochs": 10, "recipe": "moco-v1"},
)
