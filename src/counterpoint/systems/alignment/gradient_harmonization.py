"""Gradient harmonization: resolve conflicts between the gradients of video-audio and video-text contrast on shared weights.

Wu, Li, Li, Najibi, et al.: "Scaling Multimodal Pre-Training via Cross-Modality Gradient Harmonization", NeurIPS 2022, arXiv
2211.02077.

One backbone serves all modalities. Two losses align a first modality (video) with a second (audio) and a third (text). A *unit* is
a triplet or a micro-batch of triplets. Each unit has a gradient of each loss on the backbone: g_va and g_vt. Where the two
conflict, their cosine is negative, which indicates a noisy triplet. The method uses the cosine in two ways:
  - realignment: where two gradients conflict, each loses its component along the other (PCGrad for two losses, see
    `core.gradients.realigned`);
  - curriculum: a unit counts only if its cosine exceeds gamma, which rises from -0.3 to 0 during training.

Both work with VATT's losses (`core.mil.mil_nce`) and heads, or with plain InfoNCE. Where two gradients conflict, the realigned
sum combines the same two gradients with other factors:

    h_va + h_vt = (1 - d/|g_va|^2) g_va + (1 - d/|g_vt|^2) g_vt with d = <g_va, g_vt>

So a unit's gradients are computed, compared, added with these factors and discarded. This is one sweep over the units through the
backbone alone; then the ordinary backward pass follows. Neither the layers before the backbone nor the optimiser run twice.

No code of the method is public. The abstract gives the two uses. The schedule and the projection are from memory. These choices
are ours:
  - a triplet is the unit;
  - kept units are averaged; without a kept unit there is no step;
  - a unit without audio or text, or with a zero gradient, has no conflict and is kept;
  - the backbone is an MLP on the outputs of each modality's encoder, not VATT's transformer on raw tokens;
  - the learning rate ends at 0, not at half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.core.checks import need_within
from counterpoint.core.distributed import batch_order, gather_rows, place
from counterpoint.core.gradients import Products, weight_gradients, with_gradient
from counterpoint.core.operands import EPS, positive_similarity
from counterpoint.core.precision import full_precision, wide
from counterpoint.encoders.vatt import TwoSpaces, side_by_side
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, diverged
from counterpoint.systems.base import System
from counterpoint.systems.settings import claim_settings
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner
from counterpoint.tasks.measures import RocCounts

Objective = Literal["mil-nce", "info-nce"]

# ---------------------------------------------------------------------------------- the losses and the curriculum


class _Pair(NamedTuple):
    """The operands of one of the two losses, already normalised and scaled, and the rows that have each side."""

    query: Float[Tensor, "n dim"]
    key: Float[Tensor, "n dim"]
    asks: Bool[Tensor, " n"]
    answers: Bool[Tensor, " n"]

    @property
    def there(self) -> Bool[Tensor, " n"]:
        return self.asks & self.answers


@full_precision
def _per_sample(pair: _Pair, objective: Objective) -> Float[Tensor, " n"]:
    """Compute the loss of every sample of a whole batch, 0 where one side is missing; a missing side is no negative.

    The mean over the samples that have both sides is `mil_nce`, or InfoNCE in both directions. All operations support
    batched gradients.
    """
    query, key = wide(pair.query), wide(pair.key)
    s = (query @ key.T).masked_fill(~(pair.asks[:, None] & pair.answers), -1e9)
    rows, columns = s.logsumexp(1), s.logsumexp(0)
    both = torch.logaddexp(rows, columns) if objective == "mil-nce" else (rows + columns) / 2
    return (both - positive_similarity(query, key)).masked_fill(~pair.there, 0.0)


def curriculum_threshold(step: int, total: int, start: float = -0.3, end: float = 0.0) -> float:
    """Compute gamma, the cosine that a unit must exceed: linear from `start` at step 0 to `end` at the last step.

    Args:
        step: 0..total - 1.
        total: number of steps, at least 1.
        start, end: cosines in -1..1.

    >>> [curriculum_threshold(step, 3) for step in range(3)]
    [-0.3, -0.15, 0.0]
    """
    if total < 1 or not 0 <= step < total:
        raise ValueError(f"step must lie in 0..total - 1, got step {step} of {total}")
    need_within(-1, 1, start=start, end=end)
    return end if total == 1 else start + (end - start) * step / (total - 1)


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class HarmonizationConfig(AlignedConfig):
    """Settings of gradient harmonization. Defaults are VATT's and the paper's, as far as they are known."""

    epochs: int = 20
    batch_size: int = 2048
    optimizer: str = "adam"
    lr: float = 1e-4 * 256 / 2048
    weight_decay: float = 0.0
    warmup_epochs: int = 1
    embedding: int = 512
    tokens: int = 768
    """Width of the backbone's input, the output of every modality's private part."""
    hidden: int = 3072
    """Width of the backbone's hidden layer; its output is `embedding` wide."""
    first: str = ""
    """Modality that both others are aligned with. Default: the data's first."""
    heads: Literal["vatt", "none"] = "vatt"
    """VATT's heads, with one space for first and second and another for first and third, or none: one space for all."""
    objective: Objective = "mil-nce"
    """VATT's loss, with both directions in one denominator, or the mean of two cross-entropies."""
    temperature: float = 0.07
    """Temperature of both losses."""
    realign: bool = True
    """Where two gradients conflict, remove from each its component along the other."""
    curriculum: bool = True
    """Leave out units whose gradients' cosine does not exceed a rising threshold."""
    threshold_start: float = -0.3
    """Cosine that a unit must exceed at the first step, -1 to threshold_end."""
    threshold_end: float = 0.0
    """Cosine that a unit must exceed at the last step, threshold_start to 1; between both it rises on a line."""
    unit: Literal["sample", "microbatch"] = "sample"
    """Unit that a gradient is computed for: each item, or a micro-batch of items."""
    micro_batch: int = 8
    """Items of a micro-batch (with unit microbatch); it divides batch_size."""
    gradients: Literal["backbone", "embedding"] = "backbone"
    """Gradients to compare: on the backbone's weights, or, as a cheap proxy, on the first modality's embedding."""
    statistics: bool = True
    """Measure conflict even without realignment and curriculum."""
    chunk: int = 16
    """Units whose gradients are computed at a time; memory grows with this number times the backbone's weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("tokens", "hidden", "micro_batch", "chunk", "temperature")
        if not -1 <= self.threshold_start <= self.threshold_end <= 1:
            raise CounterpointError(
                "thresholds are cosines that do not fall: -1 <= threshold_start <= threshold_end <= 1, got "
                f"{self.threshold_start} and {self.threshold_end}"
            )
        if self.unit == "microbatch" and self.batch_size % self.micro_batch:
            raise CounterpointError(f"micro_batch ({self.micro_batch}) must divide batch_size ({self.batch_size})")


class _Compared(NamedTuple):
    """The results of comparing the gradients of all units."""

    products: Products
    keep: Bool[Tensor, " units"]
    weight: Float[Tensor, "2 units"]  # of each unit in the two losses
    correction: Float[Tensor, " weights"] | None  # that realignment adds to the backbone's gradient


class Harmonization(AlignedLearner):
    """A backbone shared by three modalities under two losses, whose gradients are compared for each unit."""

    config: HarmonizationConfig

    def __init__(self, config: HarmonizationConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        names = list(data.modalities)
        first = config.first or names[0]
        if len(names) != 3 or first not in names:
            raise CounterpointError(
                f"gradient harmonization aligns a first modality with two others, the data has {', '.join(names)}"
                + (f"; --first {first} is none of them" if first not in names else "")
            )
        second, third = (name for name in names if name != first)
        self.names = (first, second, third)
        layers = nn.Linear(config.tokens, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.embedding)
        self.backbone = nn.Sequential(*layers)
        self.two_spaces = TwoSpaces(self.names, config.embedding) if config.heads == "vatt" else None
        self.misaligned: Tensor | None = None
        self.roc = RocCounts()  # of this epoch's cosines; mismatched units are positive
        self.skip = False

    def build_head(self, dim: int) -> nn.Module:
        return nn.Linear(dim, self.config.tokens)

    def begin(self, survey: Survey) -> None:
        """Find the mismatched training items, where the data label them: those outside of a first domain named "aligned"."""
        super().begin(survey)
        domains = survey.domains
        if domains is not None and survey.domain_names[:1] == ("aligned",):
            self.misaligned = domains > 0

    # --- the two losses

    def spaces(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return unit embeddings in the space of first and second, and in that of first and third; they may be one space."""
        x = {name: self.backbone(self.heads[name](self.features(name, values))) for name, values in inputs.items()}
        both = (x, x) if self.two_spaces is None else self.two_spaces(x)
        second, third = ({name: F.normalize(z, dim=1, eps=EPS) for name, z in space.items()} for space in both)
        return second, third

    def pairs(self, batch: Mapping[str, Any]) -> tuple[_Pair, _Pair]:
        """Return the operands of first against second and first against third, of this process's rows."""
        (first, second, third), there = self.names, batch["present"]
        va, vt = self.spaces(batch["inputs"])
        scale = 1 / self.config.temperature
        return (
            _Pair(va[first] * scale, va[second], there[first], there[second]),
            _Pair(vt[first] * scale, vt[third], there[first], there[third]),
        )

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        local = self.pairs(batch)
        everybody = tuple(_Pair(*(gather_rows(part) for part in pair)) for pair in local)
        each = [_per_sample(pair, config.objective) for pair in everybody]
        unit = self.unit_of(len(each[0]))
        # Number of losses of each kind in a unit: an item that lacks a modality has none.
        size = torch.stack(
            [losses.new_zeros(int(unit.max()) + 1).index_add(0, unit, pair.there.to(losses.dtype))
             for losses, pair in zip(each, everybody, strict=True)]
        )  # fmt: skip
        found = {
            f"{self.names[0]}_{name}": losses.sum() / count.sum().clamp(min=1)
            for name, losses, count in zip(self.names[1:], each, size, strict=True)
        }
        weight, correction = torch.ones_like(size), None
        if config.realign or config.curriculum or config.statistics:
            compared = self.compare(local, everybody, unit, size)
            weight, correction = compared.weight, compared.correction
            known, cosine = compared.products.nonzero, compared.products.cosine
            found["conflict"] = ((cosine < 0) & known).sum() / known.sum().clamp(min=1)
            found["cosine"] = cosine.sum() / known.sum().clamp(min=1)
            if config.curriculum:
                found["kept"] = compared.keep.double().mean()
                found["threshold"] = cosine.new_tensor(self.threshold)
            self.watch(batch, cosine)
            self.skip = not bool(compared.keep.any())
            size = size * compared.keep
        totals = size.sum(1).clamp(min=1)
        parts = [(w[unit] * losses).sum() / n for w, losses, n in zip(weight, each, totals, strict=True)]
        loss = torch.stack(parts).mean()
        if correction is not None:
            # The loss alone has the plain sum of the gradients.
            loss = with_gradient(loss, list(self.backbone.parameters()), correction)
        return {"loss": loss, **found}

    @property
    def threshold(self) -> float:
        """gamma of this step."""
        config = self.config
        return curriculum_threshold(self.position.step, self.total_steps, config.threshold_start, config.threshold_end)

    def unit_of(self, total: int) -> Tensor:
        """Return the unit of each row of the gathered batch."""
        position = batch_order(total).to(self.device)
        return position if self.config.unit == "sample" else position // self.config.micro_batch

    def compare(self, local: tuple[_Pair, ...], everybody: tuple[_Pair, ...], unit: Tensor, size: Tensor) -> _Compared:
        """Compute the two gradients of every unit, and from them weights and correction.

        A unit's gradient is first computed on the embeddings, without passing a network. Then it is computed on the backbone's
        weights, for `chunk` units at a time.
        """
        config, weights = self.config, list(self.backbone.parameters())
        leaves = [_Pair(p.query.detach().requires_grad_(), p.key.detach().requires_grad_(), *p[2:]) for p in everybody]
        means = [
            torch.zeros_like(count).index_add(0, unit, _per_sample(leaf, config.objective)) / count.clamp(min=1)
            for leaf, count in zip(leaves, size, strict=True)
        ]
        here = place(len(local[0].query), unit.device)
        mine = slice(here.offset, here.offset + here.rows)
        products, keeps, terms = [], [], []
        for asked in torch.eye(len(size[0]), dtype=size.dtype, device=unit.device).split(config.chunk):
            gradients = []
            for pair, leaf, mean in zip(local, leaves, means, strict=True):
                pulled = torch.autograd.grad(mean, leaf[:2], asked, is_grads_batched=True, retain_graph=True)
                if config.gradients == "embedding":
                    gradients.append(pulled[0].flatten(1))
                else:
                    gradients.append(weight_gradients(pair[:2], [part[:, mine] for part in pulled], weights))
            found = Products.of(*gradients)
            if not bool(torch.isfinite(torch.stack(found)).all()):
                raise diverged("gradients are NaN or infinite", "lower --lr, or look for NaN in the data")
            keep = ~found.nonzero | (found.cosine > (self.threshold if config.curriculum else -torch.inf))
            products.append(found)
            keeps.append(keep)
            if config.realign and config.gradients == "backbone":
                # The other gradient loses a component along this one, so the other's weight counts: its number of items.
                other = (asked @ size.T * keep[:, None]).flip(1).T
                added = [
                    ((factor - 1) * weight).to(g.dtype) @ g
                    for factor, weight, g in zip(found.factors, other, gradients, strict=True)
                ]
                terms.append(torch.stack(added))
        whole, keep = Products(*(torch.cat(part) for part in zip(*products, strict=True))), torch.cat(keeps)
        weight = torch.ones_like(size) * keep
        total = (size * keep).sum(1, keepdim=True).clamp(min=1)
        correction = None
        if terms:
            correction = (torch.stack(terms).sum(0) / total.flip(0)).mean(0)
        elif config.realign:
            share = size / total
            ratio = share.flip(0) / torch.where(share > 0, share, 1.0)
            weight = weight * (1 + (torch.stack(whole.factors).to(size.dtype) - 1) * ratio)
        return _Compared(whole, keep, weight, correction)

    # --- measures of the conflict

    def watch(self, batch: Mapping[str, Any], cosine: Tensor) -> None:
        """Count this epoch's cosines of matched and of mismatched units, where the data labels them."""
        if self.misaligned is None or self.config.unit != "sample":
            return
        if self.position.batch == 0:
            self.roc.counts.zero_()
        index = gather_rows(batch["index"])
        # Rows are gathered process by process; units are numbered in the order of the batch.
        self.roc.add(cosine[self.unit_of(len(index))], self.misaligned.to(index.device)[index])

    def before_step(self) -> None:
        # Without a kept unit there is no step, not even one of momentum alone.
        if self.skip:
            self.zero_grad()

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        second, third = self.spaces(batch["inputs"])
        found: dict[str, Any] = {"embedding": side_by_side(second, third) if self.two_spaces is not None else third}
        if bool(self.roc.counts.any()):
            found["measures"] = {"misaligned_auc": self.roc.area()}
        return found


# --------------------------------------------------------------------------------------------------------------- settings

SYSTEM = System(
    slug="gradient-harmonization",
    task="aligned",
    config=HarmonizationConfig,
    learner=Harmonization,
    data="noisy-triplets",
    # Private linear layers 24 -> 48, a shared MLP 48-64-16, 250 steps.
    recipes={"noisy-triplets": claim_settings("gradient-harmonization")},
    recipe=LAPTOP | {"tokens": 128, "hidden": 256, "optimizer": "adam", "weight_decay": 0.0},
)
