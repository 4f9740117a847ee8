"""iSogCLR: learn a separate temperature for every training example, as the dual of a robust objective.

Qiu, Hu, Yuan, Zhou, Zhang, Yang: "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic
Temperature Individualization", ICML 2023, arXiv 2305.11965.

For example i, h_i(z) is the similarity of its anchor with a negative z minus that with its positive. The objective is

    F = (1/n) sum_i tau_i log E_z exp(h_i(z) / tau_i) + tau_i rho,      tau_min <= tau_i <= tau_max,

whose optimal tau_i makes KL( softmax(h_i / tau_i) || uniform ) = rho. Examples with many near negatives end with a large
temperature, rare ones with a small one. A moving average s_i per example tracks the expectation over the whole set (SogCLR),
so small batches suffice. A step reads the rows s_i, tau_i, u_i of its examples and updates them; u is the momentum of tau's
gradient. Its loss is a surrogate sum of similarities (core/expected_similarity.py) with the right gradient, whose value is
not the objective.

This is an addition with the authors' three forms:

- A, over SimCLR.
- B, over CLIP: a state for each side, positives in the sums, a running maximum b.
- C, over MoCo: over the positive and the queue.

`isogclr` alone changes SimCLR. There is a state for every position in the training set. A run saves it, once for any number
of processes. An example's average starts from its first value rather than from 0, which is our choice; `isogclr_step` has the
authors' rule by default. `eta=0` keeps temperatures fixed: that is SogCLR. Not built: the squared-hinge surrogates (`*_v2`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.averages import averaged, averaged_log, bounded_exp
from counterpoint.core.checks import need_positive, need_rows
from counterpoint.core.compared import Compared, Queued, Ways, pairs, views
from counterpoint.core.distributed import gather_rows, global_mean, mean_of_total, place, world
from counterpoint.core.expected_similarity import expected_similarity
from counterpoint.core.memory import SampleState, need_positions
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Views
from counterpoint.core.transforms import holds, once
from counterpoint.core.world import over_group
from counterpoint.engine.learner import Learner
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.parts import Losses, Part, Step
from counterpoint.systems.settings import PartConfig
from counterpoint.tasks.measures import ClassMeans, means_by_class

TOLD = 10_000  # number of examples up to which every step reports temperatures; with more, fewer steps do
# Smallest temperature of forms A and C. Below it exp(cosine / tau) overflows float32, because they subtract nothing.
LEAST = 0.012


class Settings(NamedTuple):
    """Settings of a step: rho, gamma (share of a new value in the average), eta and beta_u (tau's rate and momentum), bounds."""

    rho: float
    gamma: float
    eta: float
    beta_u: float
    temperature_min: float
    temperature_max: float
    grad_clip: float


def _moved(rows: dict[str, Tensor], gradient: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Update u and tau by a step along tau's gradient."""
    gradient = gradient.clamp(-settings.grad_clip, settings.grad_clip)
    u = (1 - settings.beta_u) * rows["u"] + settings.beta_u * gradient
    return {"u": u, "tau": (rows["tau"] - settings.eta * u).clamp(settings.temperature_min, settings.temperature_max)}


def _views(
    rows: dict[str, Tensor], z1: Tensor, z2: Tensor, settings: Settings, fresh: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute form A: an anchor's negatives are both views of all other examples; its positive is in no sum."""
    n = len(z1)
    query = torch.cat([z1, z2])
    here = place(2 * n, query.device)
    if here.total < 4:
        raise ValueError("features: one example has no negatives; at least two are needed")
    rule = Views(n, here.offset)
    bank = None if world()[1] == 1 else gather_rows(query)
    negatives = here.total - 2
    tau, old = rows["tau"].repeat(2), rows["s"].repeat(2)
    parts: list[tuple[Tensor, Tensor]] = []

    def weigh(part: slice, logs: Tensor, mean: Tensor, top: Tensor) -> Tensor:
        log_g = logs.to(old) - math.log(negatives)
        log_s = averaged_log(old[part], log_g, settings.gamma, fresh=fresh)
        share = (log_g - log_s).exp()
        parts.append((bounded_exp(log_s), log_s + settings.rho - share * mean.to(old) / tau[part]))
        return share

    pushed = expected_similarity(query, bank, tau, weigh, (rule,))
    s, gradient = (torch.cat(values) for values in zip(*parts, strict=True))
    loss = mean_of_total(pushed, here.total // 2) - 2 * global_mean((z1 * z2).sum(1))
    new = {"s": s[:n] / 2 + s[n:] / 2}
    return loss, new | _moved(rows, (gradient[:n] + gradient[n:]) / 2, settings)


def _side(
    rows: dict[str, Tensor], query: Tensor, key: Tensor, settings: Settings, eps: float, fresh: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute one side of form B: sum over all rows of the other side, with the positive, and divide by one less."""
    here = place(len(query), query.device)
    if here.total < 2:
        raise ValueError("image and text: one pair has no negatives; at least two are needed")
    tau, old = rows["tau"], rows["s"]
    positive = (query * key).sum(1)
    parts: list[tuple[Tensor, ...]] = []

    def weigh(part: slice, logs: Tensor, mean: Tensor, top: Tensor) -> Tensor:
        own = positive.detach()[part].to(old) / tau[part]
        before = rows["b"][part]
        b = torch.maximum(before, top.to(old) - own)
        g = (logs.to(old) - own - b).exp() / (here.total - 1)
        s = averaged(old[part] * (before - b).exp(), g, settings.gamma, fresh=fresh)
        share = g / (s + eps)
        lead = share * (mean.to(old) / tau[part] - own)
        parts.append((b, s, s.log() + b + settings.rho - lead, share))
        return share

    pushed = expected_similarity(query, gather_rows(key), tau, weigh)
    b, s, gradient, shares = (torch.cat(values) for values in zip(*parts, strict=True))
    loss = mean_of_total(pushed, here.total) - global_mean(shares.to(positive) * positive)
    return loss, {"s": s, "b": b} | _moved(rows, gradient, settings)


def _pair(
    rows: dict[str, Tensor], image: Tensor, text: Tensor, settings: Settings, eps: float, fresh: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute form B: both sides, each with the state whose names end in _I or _T."""
    losses, new = [], dict[str, Tensor]()
    for suffix, query, key in (("_I", image, text), ("_T", text, image)):
        own = {name.removesuffix(suffix): value for name, value in rows.items() if name.endswith(suffix)}
        loss, found = _side(own, query, key, settings, eps, fresh)
        losses.append(loss)
        new |= {name + suffix: value for name, value in found.items()}
    return losses[0] + losses[1], new


def _queue(
    rows: dict[str, Tensor], similarity: Tensor, settings: Settings, fresh: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute form C: similarities with the positive (first) and a queue; the mean includes the positive's exp(0)."""
    h = similarity - similarity[:, :1]
    with torch.no_grad():
        scaled = h.to(rows["tau"]) / rows["tau"][:, None]
        log_g = scaled.logsumexp(1) - math.log(scaled.shape[1])
        log_s = averaged_log(rows["s"], log_g, settings.gamma, fresh=fresh)
        weight = (scaled - log_s[:, None]).exp()
        gradient = log_s + settings.rho - (weight * scaled).mean(1)
    loss = global_mean((weight.to(h) * h).mean(1))
    return loss, {"s": bounded_exp(log_s)} | _moved(rows, gradient, settings)


@over_group
@full_precision
def isogclr_step(
    state: Mapping[str, Tensor],
    index: Int[Tensor, " n"],
    features_or_pair: Tensor | tuple[Tensor, Tensor],
    rho: float = 0.4,
    gamma: float = 0.8,
    eta: float = 0.03,
    beta_u: float = 0.9,
    temperature_min: float = 0.05,
    temperature_max: float = 1.0,
    grad_clip: float = 3.0,
    first_epoch: bool = False,
    *,
    eps: float = 1e-10,
    fresh: bool = False,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Compute a step of iSogCLR (Algorithm 1): the surrogate loss and the updated state.

    Args:
        state: numbers of every training example, [length] each: s, u, tau; for pairs s_I, s_T, u_I, u_T, tau_I, tau_T, b_I,
            b_T. They start at 0, the temperatures at their initial value.
        index: positions of the batch's examples, all different.
        features_or_pair: unit rows [n, 2, dim] of two views (form A); (image, text), unit rows [n, dim] each (B); cosines
            [n, 1 + keys] of a query with its key, first, and a queue (C).
        rho, gamma, eta, beta_u, temperature_min, temperature_max: see `Settings`.
        grad_clip: bound on tau's gradient: 3 in the authors' code for A and C, 5 for B.
        first_epoch: do not average yet (form A only); by default average.
        eps: number added to the divisor of B's weights, by default 1e-10 as in the authors' code.
        fresh: start an example's average from its first value; by default from 0.

    The loss has the gradient of the objective, but another value, which may be negative. `state` stays unchanged. If `s`
    overflows the type of its state, the state keeps the type's largest number; losses and temperatures stay finite.
    Raises ValueError for a single example, repeated positions or positions outside, and shapes that do not fit.

    >>> state = {"s": torch.zeros(5), "u": torch.zeros(5), "tau": torch.full((5,), 0.1)}
    >>> loss, state = isogclr_step(state, torch.tensor([4, 2]), torch.eye(2)[:, None].expand(2, 2, 2), first_epoch=True)
    >>> loss
    tensor(-2.)
    """
    need_positive(temperature_min=temperature_min, temperature_max=temperature_max)
    settings = Settings(rho, gamma, eta, beta_u, temperature_min, temperature_max, grad_clip)
    length = len(next(iter(state.values())))
    need_positions(index, length)
    need_rows(index=index)
    ordered = index.sort().values
    if holds((ordered[1:] == ordered[:-1]).any()):
        raise ValueError("index: an example occurs twice in the batch, so its state would be undefined")

    what = "isogclr_step"  # its weights count as constants
    rows = {name: wide(values[index]) for name, values in state.items()}
    if isinstance(features_or_pair, tuple | list):
        image, text = (once(side, what) for side in features_or_pair)
        if image.ndim != 2 or image.shape != text.shape or len(image) != len(index):
            raise ValueError(
                f"image and text must be [n, dim] alike, got {list(image.shape)} and {list(text.shape)} for {len(index)} "
                "positions"
            )
        loss, new = _pair(rows, image, text, settings, eps, fresh)
    elif features_or_pair.ndim == 3:
        if features_or_pair.shape[:2] != (len(index), 2):
            raise ValueError(f"features must be [{len(index)}, 2, dim], got {list(features_or_pair.shape)}")
        z1, z2 = once(features_or_pair, what).unbind(1)
        # Before there is an average, the new value replaces it.
        loss, new = _views(rows, z1, z2, settings._replace(gamma=1.0) if first_epoch else settings, fresh)
    else:
        if features_or_pair.ndim != 2 or len(features_or_pair) != len(index) or features_or_pair.shape[1] < 2:
            raise ValueError(f"similarity must be [{len(index)}, 1 + keys], got {list(features_or_pair.shape)}")
        loss, new = _queue(rows, once(features_or_pair, what), settings, fresh)
    return loss, {name: state[name].index_copy(0, index, new[name].to(state[name].dtype)) for name in state}


@dataclass
class ISogCLRConfig(PartConfig):
    """Settings of iSogCLR. None means the authors' value for the base's form."""

    rho: float | None = None
    """Divergence at which a temperature converges; None: 0.4 over views and a queue, 6 over pairs."""
    tau_init: float | None = None
    """Initial temperature of every example; None: 0.1, over pairs 0.01."""
    tau_min: float | None = None
    """Smallest temperature; None: 0.05, over pairs 0.005."""
    tau_max: float = 1.0
    """Largest temperature."""
    gamma: float = 0.8
    """Share of a new value in an example's moving average, above 0 and at most 1."""
    beta_u: float = 0.9
    """Share of a new gradient in the momentum of a temperature, above 0 and at most 1."""
    eta: float = 0.03
    """Learning rate of temperatures, at least 0; 0 fixes them (SogCLR)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("tau_min", "tau_init") if getattr(self, name) is not None]
        self.need_positive("gamma", "beta_u", "tau_max", *given)
        self.need_share("gamma", "beta_u")
        self.need_weight("eta")
        if self.tau_min is not None and self.tau_min > self.tau_max:
            raise CounterpointError(f"tau_min must be at most tau_max ({self.tau_max}), got {self.tau_min}")


class ISogCLR(Part):
    """The base's comparison with a separate temperature for every example."""

    config: ISogCLRConfig

    def __init__(self, config: ISogCLRConfig, learner: Learner, data: Any, ways: Ways | None) -> None:
        super().__init__(config, learner, data, ways)
        two_sided = ways is pairs

        def chosen(given: float | None, usual: float, of_pairs: float) -> float:
            return (of_pairs if two_sided else usual) if given is None else given

        rho, least = chosen(config.rho, 0.4, 6.0), chosen(config.tau_min, 0.05, 0.005)
        start = chosen(config.tau_init, 0.1, 0.01)
        clip = 5.0 if two_sided else 3.0
        self.settings = Settings(rho, config.gamma, config.eta, config.beta_u, least, config.tau_max, clip)
        if least > config.tau_max:
            raise CounterpointError(f"tau_max {config.tau_max} lies below tau_min, which is {least} here; set both")
        if not two_sided and least < LEAST:
            raise CounterpointError(f"tau_min must be at least {LEAST} over views and a queue, got {least}")
        if not least <= start <= config.tau_max:
            raise CounterpointError(f"tau_init {start} must lie between tau_min {least} and tau_max {config.tau_max}")
        if two_sided and len(data.modalities) > 2:
            raise CounterpointError(f"isogclr needs two modalities, the data has {', '.join(data.modalities)}")
        names = [a + b for a in ("s", "u", "tau", "b") for b in ("_I", "_T")] if two_sided else ["s", "u", "tau"]
        first = {name: start if name.startswith("tau") else 0.0 for name in names}
        states = {name: SampleState(data.examples, initial=value) for name, value in first.items()}
        self.sample_states: Mapping[str, SampleState] = cast(Any, nn.ModuleDict(states))
        self.class_of: Tensor | None = None
        self.told: dict[str, Tensor] = {}
        self.every = max(1, data.examples // TOLD)

    def begin(self, survey: Survey) -> None:
        self.class_of = survey.labels  # only for the figures; training does not use them

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        index = compared.index
        assert index is not None
        query, key = unit(compared.query), unit(compared.key)
        rows = {name: state.lookup(index.to(state.values.device)) for name, state in self.sample_states.items()}
        if compared.ways is pairs:
            loss, new = _pair(rows, query, key, self.settings, 1e-10, fresh=True)
        elif isinstance(compared.ways, Queued):
            positive = (query * key.detach()).sum(1, keepdim=True)
            similarity = torch.cat([positive, query @ compared.ways.queue.to(query).T], 1)
            loss, new = _queue(rows, similarity, self.settings, fresh=True)
        else:
            loss, new = _views(rows, query, key, self.settings, fresh=True)
        for name, state in self.sample_states.items():
            state.update(index.to(state.values.device), new[name])
        # For a large set, not at every step, because it takes as long as the loss.
        if not self.told or step.number % self.every == 0:
            self.told = self._told()
        return {"loss": loss, **self.told}

    def _by_class(self) -> tuple[Tensor, ClassMeans | None]:
        """Return the temperatures, a pair's averaged over its sides, and their means by class."""
        sides = [state.values for name, state in self.sample_states.items() if name.startswith("tau")]
        temperatures = torch.stack(sides).mean(0)
        return temperatures, means_by_class(temperatures, self.class_of)

    def _told(self) -> dict[str, Tensor]:
        """Return the mean temperature and, for known classes, the rank correlation of their sizes and temperatures."""
        temperatures, classes = self._by_class()
        found = {"temperature": temperatures.mean()}
        if classes is not None:
            found["temperature_rank"] = torch.tensor(classes.rank_correlation())
            found["tail_temperature"], found["head_temperature"] = classes.tail_and_head()
        return found

    def figures(self, survey: Survey) -> dict[str, Any]:
        _, classes = self._by_class()
        if classes is None:
            return {}
        axes = "examples of the class", "mean temperature"
        caption = "Each class's mean temperature over its number of training examples. Training did not use labels."
        return {"Temperatures by class": classes.points(survey.classes, axes, caption)}


SYSTEM = Addition(
    slug="isogclr",
    over="simclr",
    config=ISogCLRConfig,
    part=ISogCLR,
    fits=(views, pairs, Queued),
    loss="own",
)
