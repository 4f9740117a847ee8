r"""SupReMix: supervised contrast for regression, with mixtures of embeddings as hard negatives and as hard positives.

Wu, Mon-Williams, Liu et al.: "Mixup Your Own Pairs", arXiv 2309.16633. Code: github.com/yilei-wu/SupReMix (no licence).

    f_i, y_i     unit rows of the head, one for each view, and their targets; N = views x examples; every row is an anchor
    s(i, x)      f_i . x / tau
    P_i          other rows whose target equals y_i exactly, among them the anchor's other view
    n_ik         a f_i + (1 - a) f_k for y_k != y_i, a ~ Beta(2, 8): Mix-neg, of target u_ik = a y_i + (1 - a) y_k
    p_ijk        b f_j + (1 - b) f_k for y_j < y_i < y_k, both nearer to y_i than w; b = (y_k - y_i) / (y_k - y_j): Mix-pos
    W(i, u)      |y_i - u| + 1 (or its square + 1, or 1): distance magnifying

    Z_i   = sum_{j != i} W(i, y_j) e^{s(i, f_j)} + sum_k W(i, u_ik) e^{s(i, n_ik)} + sum_{jk} e^{s(i, p_ijk)}
    L_i   = -(1 / (|P_i| + #p_i)) [ sum_{P_i} (s(i, f_j) - log Z_i) + sum_{jk} (s(i, p_ijk) - log Z_i) ]
    L     = the mean of L_i over the anchors

Mixtures are not normalised, and constant: their gradient reaches the anchor alone. The loss builds none of them, because
s(i, a x + b y) = a s(i, x) + b s(i, y): see `core.label_mixtures`.

After the contrast, a linear regressor reads the encoder without the head. The encoder is frozen, or both are fine-tuned.

Deviations from the authors' code, numbered:

1. The code subtracts one maximum from the rows' logits and another one from the mixtures', which rescales the mixtures' terms.
   `separate_max=True` does the same, and is the function's default, for comparison with the code. Training has the exact value.
2. The code sorts the mixtures' targets apart from the mixtures, so weights belong to other mixtures. Here they stay together.
3. With one kind of mixture alone, unused places stay in the code's sums as zero vectors with target 0. Here they do not.
4. An anchor without a positive (one view alone) is left out of the mean. The code divides by the number of positives + 1.
5. The paper's text, brain and X-ray sets are not here; tables, pictures and series are.

Targets have units: with w = 5 the paper means years. Targets of deviation 1 need w of about that, and get weights of about 1.
The run warns where half of the anchors have no Mix-pos, or more than N^2 / 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.label_mixtures import BetaShares, Shares, Terms, mixture_contrast, mixture_counts
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds
from counterpoint.core.world import alone, over_group
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.regression import RegressionConfig, RegressionLearner
from counterpoint.words import counted

COMPARED = 400  # items of the picture
JUDGED = 4096  # maximum number of targets that the window is compared with


@over_group
@full_precision(keep=("labels", "alpha_neg"))
def supremix_loss(
    features: Float[Tensor, "n views dim"],
    labels: Real[Tensor, " n"],
    temperature: float,
    window: float,
    alpha_neg: Shares | None = None,
    weight_power: int = 1,
    separate_max: bool = True,
    *,
    mix_pos: bool | None = None,
    pool: int = 1,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    r"""Compute L of the module's equations.

    Args:
        features: views of n examples, unit rows, which this function does not normalise. With one view, anchors need another
            row of their target, or a Mix-pos.
        labels: finite targets, of any type. Only equal ones are positives: quantise them yourself where you want more.
        temperature: tau > 0.
        window: w >= 0, in units of the targets; 0: no Mix-pos.
        alpha_neg: share a of each anchor in its mixture with each row, [views n, views n], rows of the first view first; or a
            function from row numbers [r] to these rows. Entries of equal targets are not used. None: no Mix-neg.
        weight_power: distance magnifying: 1 (default): |d| + 1; 2: d^2 + 1; 0: none.
        separate_max: subtract two maxima as the authors' code does (default); False: the exact value.
        mix_pos: whether there is Mix-pos; default: if there is alpha_neg.
        pool: number of equal parts of the batch, each with its own loss; by default 1.
        reduction: "mean" (default) or "sum" of the parts' losses.

    With a group, every process computes all of it. Then alpha_neg is that of the whole batch, with examples in rank order. An
    anchor without a positive does not count; without any anchor the loss is 0. Memory is O(views n dim) and a block.
    Raises ValueError for shapes that do not fit, targets that are not finite, and numbers out of range.

    >>> pairs = torch.eye(2)[:, None].expand(2, 2, 2)
    >>> loss = supremix_loss(pairs, torch.tensor([20.0, 23.0]), temperature=1.0, window=5.0)
    >>> round(float(loss), 4)  # log(1 + 2 (1 + 3) / e)
    1.372
    """
    need_positive(temperature=temperature)
    if features.ndim != 3 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must be [n, views, dim] and labels [n], got {shapes(features=features, labels=labels)}"
        )
    need_rows(features=features)
    if not window >= 0 or weight_power not in (0, 1, 2) or reduction not in ("mean", "sum"):
        raise ValueError(
            "window must be at least 0, weight_power 0, 1 or 2, and reduction mean or sum, got "
            f"{window=}, {weight_power=}, {reduction=}"
        )
    if holds(~labels.isfinite().all()):
        raise ValueError(f"labels must be finite targets, got {int((~labels.isfinite()).sum())} that are not")
    temperature, window, weight_power = float(temperature), float(window), int(weight_power)
    features, labels = gather_rows(features), gather_rows(labels)
    (n, views, _), many = features.shape, len(features) * features.shape[1]
    if isinstance(alpha_neg, Tensor) and alpha_neg.shape != (many, many):
        raise ValueError(
            f"alpha_neg must be [{many}, {many}], a share for each pair of rows, got {list(alpha_neg.shape)}"
        )
    if pool < 1 or n % pool:
        raise ValueError(f"pool must divide the {n} examples of a batch, got {pool}")
    between = (alpha_neg is not None if mix_pos is None else mix_pos) and window > 0
    losses = []
    for part in range(pool):
        some, own = slice(part * n // pool, (part + 1) * n // pool), alpha_neg
        if pool > 1 and alpha_neg is not None:
            own = _part(alpha_neg, torch.arange(many, device=features.device).view(views, n)[:, some].flatten())
        x, y = features[some].transpose(0, 1).flatten(0, 1), labels[some].repeat(views)
        total, counted = mixture_contrast(x, y, Terms(temperature, window, weight_power, own, between, separate_max))
        losses.append(total / counted.clamp(min=1))
    loss = torch.stack(losses).sum()
    return loss / pool if reduction == "mean" else loss


def _part(shares: Shares, rows: Tensor) -> Shares:
    """Return the shares of some rows among themselves."""
    if isinstance(shares, Tensor):
        return shares[rows][:, rows]
    return lambda some: shares(rows[some])[:, rows]


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class SupReMixConfig(RegressionConfig):
    """Settings of SupReMix. Defaults are those of the published code for images of faces and their age in years."""

    epochs: int = 100
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 4e-3
    """Learning rate at a batch of 256; it is multiplied by batch_size / 256 (the code's 1e-3 is for a batch of 64)."""
    weight_decay: float = 0.0
    drop_at: float = 0.8
    """Share of the epochs after which the learning rate falls to a tenth, 0 to 1; 1: never."""
    hidden: int = 0
    """Width of the head's hidden layer; 0: that of the encoder."""
    projection: int = 128
    """Width of the head's output, which the loss compares."""
    temperature: float = 0.3
    """Divisor of the products, > 0."""
    window: float = 5.0
    """w: rows of Mix-pos are nearer to the anchor's target than this, in units of the target; at least 0."""
    mix_neg: bool = True
    """Mix each anchor with each negative, as hard negatives."""
    mix_pos: bool = True
    """Mix rows below and above each anchor's target, as hard positives."""
    weight_power: int = 1
    """Distance magnifying: weights of |distance| + 1 (1), distance squared + 1 (2), or none (0)."""
    alpha: float = 2.0
    """First parameter of the Beta distribution of the anchor's share in Mix-neg, > 0."""
    beta: float = 8.0
    """Second parameter, > 0; the anchor's mean share is alpha / (alpha + beta)."""
    pool: int = 1
    """Number of equal parts of a batch, each with its own loss. It divides batch_size."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean or sum of the parts' losses."""
    separate_max: bool = False
    """Rescale the mixtures' terms as the authors' code does, by two maxima. False: the exact loss."""

    counts: ClassVar[tuple[str, ...]] = (*RegressionConfig.counts, "projection", "pool")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature", "alpha", "beta")
        self.need_share("drop_at")
        for name in ("window", "hidden"):
            if not getattr(self, name) >= 0:
                raise CounterpointError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.temperature < math.inf or self.weight_power not in (0, 1, 2):
            raise CounterpointError(
                f"temperature must be finite and weight_power 0, 1 or 2, got {self.temperature} and {self.weight_power}"
            )
        if self.batch_size % self.pool:
            raise CounterpointError(f"pool must divide batch_size ({self.batch_size}), got {self.pool}")


# ------------------------------------------------------------------------------------------------------------- the learner


class SupReMix(RegressionLearner):
    """An encoder and a head, whose rows are contrasted by targets; then a linear regressor."""

    config: SupReMixConfig

    def __init__(self, config: SupReMixConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        dim = self.encoder.dim
        hidden = config.hidden or dim
        self.head = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, config.projection),
            nn.BatchNorm1d(config.projection),
        )

    def networks(self) -> list[nn.Module]:
        return [self.encoder, self.head]

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        # The same number on all processes, which therefore draw the same shares of anchors.
        return super().prepare(batch, generator) | {"draw": int(torch.randint(2**62, (), generator=generator))}

    def contrast(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, views = self.config, batch["views"]
        projected = unit(self.head(self.encoder(torch.cat(views))))
        features, targets = self.whole(torch.stack(projected.chunk(len(views)), 1)), self.whole(batch["target"])
        shares = BetaShares(batch["draw"], config.alpha, config.beta, len(views) * len(features))
        own = shares if config.mix_neg else None
        with alone():  # the rows are those of all processes already, in the batch's order
            loss = supremix_loss(
                features,
                targets,
                config.temperature,
                config.window,
                own,
                config.weight_power,
                config.separate_max,
                mix_pos=config.mix_pos,
                pool=config.pool,
                reduction=config.reduction,
            )
        if not config.mix_pos:
            return {"loss": loss}
        counts = mixture_counts(targets.repeat(len(views)), config.window)[1]
        return {"loss": loss, "mix_pos": counts.double().median().float()}

    def begin(self, survey: Survey) -> None:
        """Warn where the window does not fit the targets: an anchor of median target has too few or too many Mix-pos."""
        super().begin(survey)
        config = self.config
        if not (config.mix_pos and config.epochs):
            return
        known = torch.from_numpy(survey.split().targets)
        known = known[torch.linspace(0, len(known) - 1, min(len(known), JUDGED)).long()]
        rows = 2 * config.batch_size // config.pool
        median = rows**2 * float(mixture_counts(known, config.window)[1].double().median()) / len(known) ** 2
        if not 0.5 <= median <= rows**2 / 8:
            what = "no" if median < 0.5 else f"{median:.0f} (more than N^2 / 8)"
            self.warnings.append(
                f"half of the anchors have {what} Mix-pos in a batch of {rows} views with window {config.window:g}; choose a "
                f"--window in units of the targets, which lie in {float(known.min()):g}..{float(known.max()):g}"
            )

    def curve(self) -> Callable[[float], float]:
        """Return the factor of the learning rate during contrast, which falls to a tenth once."""
        drop = self.config.drop_at * self.epochs
        return lambda epoch: 0.1 if epoch >= drop and self.config.drop_at < 1 else 1.0

    # --- the page

    @torch.no_grad()
    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show how similar rows are whose targets differ by more and more, in the encoder and behind the head."""
        split = survey.split("test")
        rows = torch.linspace(0, len(split) - 1, min(len(split), COMPARED)).long()
        # The first process alone is here, so it cannot share the work.
        features = torch.cat(
            [self.embed(survey.batch("test", part.numpy())["input"]).float() for part in rows.split(200)]
        )
        y = torch.from_numpy(split.targets)[rows]
        pairs = torch.triu_indices(len(y), len(y), 1)
        distance = (y[pairs[0]] - y[pairs[1]]).abs()
        edges = torch.linspace(0, float(distance.max()), 21, dtype=torch.float64)
        at = torch.bucketize(distance, edges[1:-1])
        counts = at.bincount(minlength=20)
        series = {}
        spaces = {"encoder": features.cpu(), "head": self.head(features).cpu()}
        for name, x in spaces.items():
            x = unit(x - x.mean(0))
            cosine = (x[pairs[0]] * x[pairs[1]]).sum(1).double()
            mean = torch.zeros(20, dtype=torch.float64).index_add_(0, at, cosine) / counts.clamp(min=1)
            series[name] = [((edges[1:] + edges[:-1]) / 2)[counts > 0].tolist(), mean[counts > 0].tolist()]
        caption = (
            f"Mean cosine of {counted(len(distance), 'pair')} of test items, from the mean item. A space ordered by target has a "
            "curve that "
            "falls all the way."
        )
        curves = {"kind": "curves", "series": series, "xlabel": "difference of targets", "caption": caption}
        return super().figures(survey) | {"Similarity by difference of targets": curves}


# Settings for small sets on a few cores.
LAPTOP: dict[str, Any] = {
    "encoder": "convnet-s",
    "recipe": "digits-shifted",
    "epochs": 20,
    "batch_size": 32,
    "lr": 8e-3,
    "projection": 32,
    "evaluate_every": 5,
}

SYSTEM = System(
    slug="supremix",
    task="regression",
    config=SupReMixConfig,
    learner=SupReMix,
    data="digit-numbers",
    recipes={
        "digit-numbers": LAPTOP,
        "pulses": LAPTOP | {"window": 10.0},
        "diabetes": LAPTOP | {"window": 20.0, "epochs": 40},
    },
    recipe=LAPTOP | {"encoder": "resnet-s", "recipe": "weak"},
)
