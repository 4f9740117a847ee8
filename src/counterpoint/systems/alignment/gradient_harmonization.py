"""Gradient harmonization: resolve conflicts between the gradients of video-audio and video-text contrast on shared weights.

Wu, Li, Li, Najibi, et al.: "Scaling Multimodal Pre-Training via Cross-Modality Gradient Harmonization", NeurIPS 2022, arXiv
2211.02077.

One backbone serves all modalities. Two losses align a first modality (video) with a second (audio) and a third (text). A *unit* is
a triplet or a micro-batch of triplets. Each unit has a gradient of each loss on the backbone: g_va and g_vt. Where the two
conflict, their cosine is negative, which indicates a noisy triplet. The method uses the cosine in two ways:
  - realignment: where two gradients conflict, each loses its component along the other (PCGrad for two losses);
  - curriculum: a unit counts only if its cosine exceeds gamma, which rises from -0.3 to 0 during training.

Both work with VATT's losses (MIL-NCE) and heads, or with plain InfoNCE. The realigned sum combines the same two gradients:

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
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, need_within, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, place, world
from counterpoint.core.operands import EPS, positive_similarity
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Where
from counterpoint.core.transforms import need_fixed
from counterpoint.core.world import over_group
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner

Objective = Literal["mil-nce", "info-nce"]

# ------------------------------------------------------------------------------------------------------------ the losses


@over_group
@full_precision
def mil_nce(
    video: Float[Tensor, "n dim"],
    text: Float[Tensor, "texts dim"],
    mask: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    r"""Compute MIL-NCE, the mean over samples i of log[ sum_{j,l} exp s_ij,l + sum_{j,l} exp s_ji,l ] - log sum_l exp s_ii,l.

    Args:
        video: one row for each sample.
        text: L candidates for each sample, one after another: [n L, dim].
        mask: False where a sample has no text. Its candidates are masked, its loss does not count, and the mean is over the
            other samples. Default: every sample has a text.

    s_ij,l is the plain dot product of video i with candidate l of sample j: neither normalised nor divided by a temperature.
    (VATT does both before, with 0.07.) One denominator holds both directions. So with L = 1 it holds each positive twice;
    the smallest loss is log 2, also for a batch of one. Without any text the loss is 0. Source: Miech et al., CVPR 2020,
    arXiv 1912.06430, Eq. 2, with rows and columns as in VATT's code. Raises ValueError for shapes that do not fit.

    >>> mil_nce(torch.eye(1), torch.eye(1))
    tensor(0.6931)
    """
    candidates = len(text) // len(video) if len(video) else 1
    fits = video.ndim == text.ndim == 2 and video.shape[1] == text.shape[1] and candidates * len(video) == len(text)
    if not fits or (len(video) and not candidates):
        raise ValueError(f"video must be [n, dim] and text [n L, dim], got {shapes(video=video, text=text)}")
    need_rows(video=video)
    if mask is not None:
        need_fixed("mil_nce", mask=mask)
        if mask.shape != video.shape[:1] or bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(
                f"mask must be True or False (1 or 0) for each sample, got {shapes(mask=mask, video=video)} of {mask.dtype}"
            )
        mask = mask.bool()
    video, text = wide(video), wide(text)
    if mask is not None:  # values of missing texts, also NaN, must have no effect
        text = text.masked_fill(~mask.repeat_interleave(candidates)[:, None], 0.0)
    positive = (video[:, None] * text.view(len(video), candidates, text.shape[1])).sum(2).logsumexp(1)
    if mask is None:
        out = batch_logsumexp(video, text, columns=True)
        assert out.columns is not None
        both = torch.logaddexp(out.rows, out.columns.view(len(video), candidates).logsumexp(1))
        return global_mean(both - positive)
    there = gather_rows(mask.repeat_interleave(candidates))
    if not bool(there.any()):
        return (video.sum() + text.sum()) * 0
    hidden = ~there
    out = batch_logsumexp(video, text, columns=True, exclude=Where(lambda _, columns: hidden[columns]))
    assert out.columns is not None
    # Columns of masked texts are empty; the zeros in their place do not count.
    columns = out.columns.view(len(video), candidates).masked_fill(~mask[:, None], 0.0).logsumexp(1)
    return global_mean((torch.logaddexp(out.rows, columns) - positive)[mask])


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

    All operations support batched gradients.
    """
    query, key = wide(pair.query), wide(pair.key)
    s = (query @ key.T).masked_fill(~(pair.asks[:, None] & pair.answers), -1e9)
    rows, columns = s.logsumexp(1), s.logsumexp(0)
    both = torch.logaddexp(rows, columns) if objective == "mil-nce" else (rows + columns) / 2
    return (both - positive_similarity(query, key)).masked_fill(~pair.there, 0.0)


# --------------------------------------------------------------------------------------------------------- the gradients


class _Products(NamedTuple):
    """Inner products of the rows of two sets of gradients, in float64."""

    dot: Tensor
    first: Tensor  # squared lengths
    second: Tensor

    @staticmethod
    def of(g1: Tensor, g2: Tensor) -> _Products:
        a, b = g1.double(), g2.double()
        return _Products((a * b).sum(-1), a.square().sum(-1), b.square().sum(-1))

    @property
    def cosine(self) -> Tensor:
        """0 where a gradient is zero."""
        length = self.first.sqrt() * self.second.sqrt()  # the product of the squares could overflow
        zero = length == 0
        return torch.where(zero, 0.0, self.dot / torch.where(zero, 1.0, length))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Factors of the two gradients, with which their sum equals that of the realigned gradients."""
        conflict = (self.dot < 0) & (self.first > 0) & (self.second > 0)

        def factor(square: Tensor) -> Tensor:
            return torch.where(conflict, 1 - self.dot / torch.where(conflict, square, 1.0), 1.0)

        return factor(self.first), factor(self.second)


def gradient_cosine(g1: Float[Tensor, "*units size"], g2: Float[Tensor, "*units size"]) -> Float[Tensor, " *units"]:
    """Return the cosine of the two gradients of each unit, in float32 at least; 0 where one of them is zero.

    Sums are computed in float64.

    >>> gradient_cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]))
    tensor(-1.)
    """
    _need_gradients(g1, g2)
    return _Products.of(g1, g2).cosine.to(wide(g1).dtype)


def realigned(
    g1: Float[Tensor, "*units size"], g2: Float[Tensor, "*units size"]
) -> tuple[Float[Tensor, "*units size"], Float[Tensor, "*units size"]]:
    """Remove from each of two conflicting gradients its component along the other; leave gradients without conflict unchanged.

    If <g1, g2> < 0, the results are

        h1 = g1 - <g1, g2> / |g2|^2 g2
        h2 = g2 - <g1, g2> / |g1|^2 g1

    A zero gradient conflicts with nothing. Raises ValueError for shapes that differ.

    >>> realigned(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
    (tensor([0.5000, 0.5000]), tensor([0., 1.]))
    """
    _need_gradients(g1, g2)
    dot, first, second = _Products.of(g1, g2)
    conflict = ~(dot >= 0) & (first != 0) & (second != 0)  # NaN counts as a conflict, so that it is not lost

    def along(square: Tensor) -> Tensor:
        return torch.where(conflict, dot / torch.where(conflict, square, 1.0), 0.0)[..., None].to(own1.dtype)

    own1, own2 = wide(g1), wide(g2)  # computed in float32 at least, returned in the type of the gradients
    return (own1 - along(second) * own2).to(g1.dtype), (own2 - along(first) * own1).to(g2.dtype)


def realign(
    g1: Float[Tensor, "*units size"],
    g2: Float[Tensor, "*units size"],
    reduction: Literal["mean", "sum"] = "mean",
    *,
    shared: Bool[Tensor, " size"] | None = None,
) -> Float[Tensor, "*units size"]:
    """Combine the gradients of two losses to one update: the mean, or the sum, of the `realigned` gradients.

    Args:
        g1, g2: flat gradients of the two losses. Leading dimensions number units; each pair is realigned separately.
        reduction: "mean" matches a loss that averages the two, as VATT's does.
        shared: True for entries that both losses have. In other entries the loss that lacks them has zeros. They are summed
            whatever the reduction, and count in the lengths, as in the reference code of PCGrad. Default: all are shared.

    Without a conflict the result is the plain mean or sum; for opposite gradients it is zero. Raises ValueError for shapes
    that differ.

    >>> realign(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
    tensor([0.2500, 0.7500])
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    h1, h2 = realigned(g1, g2)
    merged = h1 + h2
    if reduction == "sum":
        return merged
    return merged / 2 if shared is None else torch.where(shared, merged / 2, merged)


def _need_gradients(g1: Tensor, g2: Tensor) -> None:
    if g1.ndim < 1 or g1.shape != g2.shape or not g1.is_floating_point() or g1.dtype != g2.dtype:
        raise ValueError(
            f"g1 and g2 must be flat gradients of one shape and one floating type, got {shapes(g1=g1, g2=g2)} of {g1.dtype} "
            f"and {g2.dtype}"
        )


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


BINS = 400  # of cosines between -1 and 1


def _auc(counts: Float[Tensor, "2 bins"]) -> float:
    """Compute the area under the ROC curve of -cosine: the probability that a mismatched unit has the lower cosine.

    Row 0 counts matched units, row 1 mismatched ones. Pairs within a bin count half. nan unless there are both kinds.
    """
    good, bad = (row / row.sum() for row in counts.double())
    above = 1 - good.cumsum(0)
    return float((bad * (above + good / 2)).sum())


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
    """Leave out units whose cosine does not exceed a rising threshold."""
    threshold_start: float = -0.3
    """The threshold at the first step."""
    threshold_end: float = 0.0
    """The threshold at the last step."""
    unit: Literal["sample", "microbatch"] = "sample"
    """Unit that a gradient is computed for: each item, or a micro-batch of items."""
    micro_batch: int = 8
    """Items of a micro-batch."""
    gradients: Literal["backbone", "embedding"] = "backbone"
    """Gradients to compare: on the backbone's weights, or, as a cheap proxy, on the first modality's embedding."""
    statistics: bool = True
    """Measure conflict even without realignment and curriculum."""
    chunk: int = 16
    """Units whose gradients are computed at a time; memory grows with this number times the backbone's weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens", "hidden", "micro_batch", "chunk", "temperature"):
            if not getattr(self, name) > 0:
                raise CounterpointError(f"{name} must be > 0, got {getattr(self, name)}")
        if not -1 <= self.threshold_start <= self.threshold_end <= 1:
            raise CounterpointError(
                "thresholds are cosines that do not fall: -1 <= threshold_start <= threshold_end <= 1, got "
                f"{self.threshold_start} and {self.threshold_end}"
            )
        if self.unit == "microbatch" and self.batch_size % self.micro_batch:
            raise CounterpointError(f"micro_batch ({self.micro_batch}) must divide batch_size ({self.batch_size})")


class _Compared(NamedTuple):
    """The results of comparing the gradients of all units."""

    products: _Products
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
        self.names = (first, *(name for name in names if name != first))
        width = config.embedding
        self.backbone = nn.Sequential(
            nn.Linear(config.tokens, config.hidden), nn.GELU(), nn.Linear(config.hidden, width)
        )
        if config.heads == "vatt":
            self.first_to_second = nn.Sequential(
                nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width),
                nn.BatchNorm1d(width),
            )  # fmt: skip
            self.second_to_second = nn.Linear(width, width)
            self.second_to_third = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width))
            self.third_to_third = nn.Linear(width, width)
        self.misaligned: Tensor | None = None
        # Histograms of this epoch's cosines, of matched and of mismatched units: part of the run's state, for resuming.
        self.register_buffer("counts", torch.zeros(2, BINS))
        self.counts: Tensor
        self.skip = False

    def build_head(self, dim: int) -> nn.Module:
        return nn.Linear(dim, self.config.tokens)

    def begin(self, survey: Survey) -> None:
        """Measure conflicts where the data labels mismatched training items: by domains after a first domain "aligned"."""
        domains = survey.domains
        if domains is not None and survey.domain_names[:1] == ("aligned",):
            self.misaligned = domains > 0

    # --- the two losses

    def spaces(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return unit embeddings in the space of first and second, and in that of first and third; they may be one space."""
        second: dict[str, Tensor] = {}
        third: dict[str, Tensor] = {}
        for name, values in inputs.items():
            x = self.backbone(self.heads[name](self.features(name, values)))
            if self.config.heads == "none":
                second[name] = third[name] = x
            elif name == self.names[2]:
                third[name] = self.third_to_third(x)
            else:
                second[name] = self.first_to_second(x) if name == self.names[0] else self.second_to_second(x)
                # In training the loss needs only the first here, and batch statistics must come from it alone.
                if name == self.names[0] or not self.training:
                    third[name] = self.second_to_third(second[name])
        first, other = (
            {name: F.normalize(x, dim=1, eps=EPS) for name, x in space.items()} for space in (second, third)
        )
        return first, other

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
            known = (compared.products.first > 0) & (compared.products.second > 0)
            cosine = compared.products.cosine
            found["conflict"] = ((cosine < 0) & known).sum() / known.sum().clamp(min=1)
            found["cosine"] = cosine.sum() / known.sum().clamp(min=1)
            if config.curriculum:
                found["kept"] = compared.keep.double().mean()
                found["threshold"] = cosine.new_tensor(self.threshold)
            self.watch(batch, cosine)
            self.skip = not bool(compared.keep.any())
            size = size * compared.keep
        parts = [
            (w[unit] * losses).sum() / n.sum().clamp(min=1) for w, losses, n in zip(weight, each, size, strict=True)
        ]
        loss = torch.stack(parts).mean()
        if correction is not None:
            # The loss has the plain sum of the gradients. This term is zero, and its gradient is the change by realignment:
            # one backward pass gives both, also across processes.
            flat = torch.cat([parameter.flatten() for parameter in self.backbone.parameters()])
            extra = (flat * correction.to(flat.dtype)).sum()
            loss = loss + extra - extra.detach()
        return {"loss": loss, **found}

    @property
    def threshold(self) -> float:
        """gamma of this step."""
        config = self.config
        return curriculum_threshold(self.position.step, self.total_steps, config.threshold_start, config.threshold_end)

    def unit_of(self, total: int) -> Tensor:
        """Return the unit of each row of the gathered batch. The batch's items go to the processes in turn."""
        size = world()[1]
        position = torch.cat([torch.arange(rank, total, size) for rank in range(size)]).to(self.device)
        return position if self.config.unit == "sample" else position // self.config.micro_batch

    def compare(self, local: tuple[_Pair, ...], everybody: tuple[_Pair, ...], unit: Tensor, size: Tensor) -> _Compared:
        """Compute the two gradients of every unit, and from them weights and correction.

        A unit's gradient is first computed on the embeddings, without passing a network. Then it is computed on the backbone's
        weights, for `chunk` units at a time.
        """
        config = self.config
        leaves, means = [], []
        for pair, count in zip(everybody, size, strict=True):
            leaf = pair._replace(query=pair.query.detach().requires_grad_(), key=pair.key.detach().requires_grad_())
            each = _per_sample(leaf, config.objective)
            leaves.append(leaf)
            means.append(torch.zeros_like(count).index_add(0, unit, each) / count.clamp(min=1))
        here = place(len(local[0].query), unit.device)
        mine = slice(here.offset, here.offset + here.rows)
        parameters = list(self.backbone.parameters())
        products, keeps, terms = [], [], []
        for asked in torch.eye(len(size[0]), dtype=means[0].dtype, device=unit.device).split(config.chunk):
            gradients = []
            for pair, leaf, mean in zip(local, leaves, means, strict=True):
                pulled = torch.autograd.grad(
                    mean, (leaf.query, leaf.key), asked, is_grads_batched=True, retain_graph=True
                )
                if config.gradients == "embedding":
                    gradients.append(pulled[0].flatten(1))
                    continue
                onto = torch.autograd.grad(
                    (pair.query, pair.key),
                    parameters,
                    [part[:, mine].to(pair.query.dtype) for part in pulled],
                    is_grads_batched=True,
                    retain_graph=True,
                )
                gradients.append(_summed(torch.cat([part.flatten(1) for part in onto], 1)))
            found = _Products.of(*gradients)
            if not bool(torch.isfinite(torch.stack(found)).all()):
                raise CounterpointError(
                    "gradients are NaN or infinite: training diverged, or the data holds NaN; lower --lr"
                )
            keep = torch.ones_like(found.dot, dtype=torch.bool)
            if config.curriculum:
                keep = (found.cosine > self.threshold) | (found.first == 0) | (found.second == 0)
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
        whole, keep = _Products(*(torch.cat(part) for part in zip(*products, strict=True))), torch.cat(keeps)
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
            self.counts.zero_()
        index = gather_rows(batch["index"])
        wrong = self.misaligned.to(index.device)[index].long()
        # Rows are gathered process by process; units are numbered in the order of the batch.
        bins = ((cosine[self.unit_of(len(index))] + 1) / 2 * BINS).long().clamp(0, BINS - 1)
        self.counts.index_put_((wrong, bins), self.counts.new_ones(len(bins)), accumulate=True)

    def before_step(self) -> None:
        # Without a kept unit there is no step, not even one of momentum alone.
        if self.skip:
            for parameter in self.parameters():
                parameter.grad = None

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        first, other = self.spaces(batch["inputs"])
        embedding = other
        if self.config.heads == "vatt":
            # Both spaces side by side: a dot product is the similarity in the spaces that both modalities have.
            embedding = {
                name: torch.cat([first[name], x], 1) / 2**0.5
                if name in first
                else torch.cat([torch.zeros_like(x), x], 1)
                for name, x in other.items()
            }
        found: dict[str, Any] = {"embedding": embedding}
        if bool(self.counts.any()):
            found["measures"] = {"misaligned_auc": _auc(self.counts)}
        return found


def _summed(gradients: Tensor) -> Tensor:
    """Sum the contributions of all processes' rows to a gradient."""
    if world()[1] > 1:
        dist.all_reduce(gradients)
    return gradients


# --------------------------------------------------------------------------------------------------------------- settings

# The card's: private linear layers 24 -> 48, a shared MLP 48-64-16, 250 steps.
_CLAIM: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 32,
    "lr": 1e-3 * 256 / 32,
    "constant_lr": True,
    "warmup_epochs": 0,
    "vector_encoder": "as-is",
    "tokens": 48,
    "hidden": 64,
    "embedding": 16,
    "heads": "none",
    "objective": "info-nce",
    "temperature": 0.1,
    "chunk": 32,
    "evaluate_every": 1,
}

SYSTEM = System(
    slug="gradient-harmonization",
    task="aligned",
    config=HarmonizationConfig,
    learner=Harmonization,
    data="noisy-triplets",
    recipes={"noisy-triplets": _CLAIM},
    recipe=LAPTOP | {"tokens": 128, "hidden": 256, "optimizer": "adam", "weight_decay": 0.0},
)
