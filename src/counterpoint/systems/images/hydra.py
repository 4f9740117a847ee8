r"""Hydra (later SimLAP): any two classes may be positives, in a subspace that a learned gate selects for the pair.

Wu, Ren, Jiang and others: "Rethinking Positive Pairs in Contrastive Learning", 2024, arXiv 2410.18200. Code: the first author's
github.com/erow/vitookit (form A) and github.com/erow/FastSSL (form B).

Contrastive learning takes positives from one picture or one class. Hydra draws a partner class for every anchor. It assumes
that any two classes look alike in some subspace of the features. The feature filter maps the two classes to a gate in (0, 1)^D,
which selects the subspace. The filter learns by the same loss.

    z_i, k_j    projections of the anchors (first view) and of the keys (second view), [D]
    y_i, y'_i   class of anchor i, and its partner class
    g_i         gate = sigmoid(MLP((M[y_i] + M[y'_i]) / 2)), M a table of label embeddings
    s_ij        similarity in the subspace of anchor i:
                form A, "renormalised":  cos(g_i z_i, g_i k_j)
                form B, "plain":         <g_i^2 z^_i, k^_j> - alpha <z^_i, k^_j>, z^ and k^ of unit length
    P, N        positives: keys of class y'_i. Negatives: keys of neither class. Other keys are left out.

    t_ij = -log( exp(s_ij / T) / (exp(s_ij / T) + sum_{n in N_i} exp(s_in / T)) )      each positive competes alone
    L    = mean of t over all positive pairs, or over anchors the mean of their positives (`row_mean`)

Form A needs no [B, N, D] tensor. Its cosine is a quotient of two matrix products: (g_i^2 z_i) k_j, and for the length
|g_i k_j|^2 = (g_i^2) (k_j^2). Rows are computed in blocks, and again in the backward pass, so memory is linear in the batch.

Not here: Gumbel and stochastic gates, the sign-agreement gate, the MoCo-v3 variant, and partner classes drawn by WordNet distance.
The later version's gate penalty has no published formula; `gate_penalty` weighs mean g (1 - g), our choice, 0 by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from counterpoint.core.checks import need_alike, need_numbers, need_positive, shapes
from counterpoint.core.distributed import gather_rows, global_mean, mean_of_total
from counterpoint.core.operands import EPS, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.images import ImageLearner
from counterpoint.tasks.labelled import LAPTOP, EmbeddingConfig

BLOCK = 2**20  # similarities that are in memory together
WEIGHTS = ("label_embedding", "bn1_weight", "bn1_bias", "fc1_weight", "fc1_bias", "bn2_weight", "bn2_bias", "fc2_weight",
           "fc2_bias")  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- the gate


@full_precision
def pair_gate(
    y1: Int[Tensor, " b"],
    y2: Int[Tensor, " b"],
    weights: Mapping[str, Tensor],
    running: Mapping[str, Tensor] | None = None,
    training: bool = True,
) -> Float[Tensor, "b dim"]:
    """Compute the gates of pairs of classes: sigmoid(MLP((M[y1] + M[y2]) / 2)), symmetric in the two.

    The MLP is ReLU, batch normalisation, linear, ReLU, batch normalisation, linear.

    Args:
        y1, y2: classes of each pair, 0 to classes - 1.
        weights: `label_embedding` [classes, d0], `bn1_weight`, `bn1_bias` [d0], `fc1_weight` [h, d0], `fc1_bias` [h],
            `bn2_weight`, `bn2_bias` [h], `fc2_weight` [dim, h], `fc2_bias` [dim].
        running: `mean1`, `var1`, `mean2`, `var2`, averages of the statistics, updated in training. Default: none.
        training: whether statistics are those of the batch (default) or the running ones. One pair takes the running ones.

    Raises ValueError for classes that do not fit, and for a single pair without running statistics.

    >>> table = {"label_embedding": torch.eye(3), "bn1_weight": torch.zeros(3), "bn1_bias": torch.zeros(3),
    ...          "fc1_weight": torch.zeros(2, 3), "fc1_bias": torch.zeros(2), "bn2_weight": torch.zeros(2),
    ...          "bn2_bias": torch.zeros(2), "fc2_weight": torch.zeros(4, 2), "fc2_bias": torch.zeros(4)}
    >>> pair_gate(torch.tensor([0, 1]), torch.tensor([2, 2]), table)[0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    table = weights["label_embedding"]
    if y1.shape != y2.shape or y1.ndim != 1:
        raise ValueError(f"y1 and y2 must be [b] alike, got {shapes(y1=y1, y2=y2)}")
    need_numbers(len(table), y1=y1, y2=y2)
    batch = training and len(y1) > 1
    if not batch and running is None:
        raise ValueError("one pair has no statistics of its own: give `running`, or more pairs")
    x = (table[y1] + table[y2]) / 2
    for n in ("1", "2"):
        mean, var = (None, None) if running is None else (running[f"mean{n}"], running[f"var{n}"])
        x = F.batch_norm(F.relu(x), mean, var, weights[f"bn{n}_weight"], weights[f"bn{n}_bias"], batch)
        x = F.linear(x, weights[f"fc{n}_weight"], weights[f"fc{n}_bias"])
    return x.sigmoid()


class FeatureFilter(nn.Module):
    """The feature filter: a table of label embeddings and an MLP; see `pair_gate`.

    Args:
        classes: number of classes.
        dim: width of the gates.
        label_dim: width of the label embeddings.
        hidden: width of the MLP's hidden layer.
    """

    def __init__(self, classes: int, dim: int, label_dim: int = 512, hidden: int = 1024) -> None:
        super().__init__()
        first, second = nn.Linear(label_dim, hidden), nn.Linear(hidden, dim)
        self.label_embedding = nn.Parameter(torch.randn(classes, label_dim))
        for n, layer, width in (("1", first, label_dim), ("2", second, hidden)):
            self.register_parameter(f"bn{n}_weight", nn.Parameter(torch.ones(width)))
            self.register_parameter(f"bn{n}_bias", nn.Parameter(torch.zeros(width)))
            self.register_parameter(f"fc{n}_weight", nn.Parameter(layer.weight.detach()))
            self.register_parameter(f"fc{n}_bias", nn.Parameter(layer.bias.detach()))
            self.register_buffer(f"mean{n}", torch.zeros(width))
            self.register_buffer(f"var{n}", torch.ones(width))

    def forward(self, y1: Int[Tensor, " b"], y2: Int[Tensor, " b"]) -> Float[Tensor, "b dim"]:
        weights = {name: getattr(self, name) for name in WEIGHTS}
        running = {name: getattr(self, name) for name in ("mean1", "var1", "mean2", "var2")}
        return pair_gate(y1, y2, weights, running, self.training)


# ---------------------------------------------------------------------------------------------------------------- the loss


def _block(query: Tensor, squares: Tensor | None, key: Tensor, same: Tensor, positive: Tensor, t: Tensor) -> Tensor:
    """Return sum_j P_ij t_ij and |P_i| of some anchors, [2, rows]; `squares`: g^2 of form A."""
    s = query @ key.T
    if squares is not None:
        s = s / (squares @ key.square().T).clamp(min=EPS**2).sqrt()
    logits = s / t
    negatives = logits.masked_fill(same | positive, -math.inf)
    # A row without negatives has log 0: its positives have t = 0.
    alone = (same | positive).all(1)
    log_n = negatives.masked_fill(alone[:, None], 0.0).logsumexp(1).masked_fill(alone, -math.inf)
    each = F.softplus(torch.where(alone, 0.0, log_n)[:, None] - logits, threshold=40.0)
    each = each.masked_fill(~positive | alone[:, None], 0.0)
    return torch.stack([each.sum(1), positive.sum(1).to(each.dtype)])


@over_group
@full_precision
def gated_pair_infonce(
    z1: Float[Tensor, "b dim"],
    z2: Float[Tensor, "b dim"],
    y1: Int[Tensor, " b"],
    y2: Int[Tensor, " b"],
    gate: Float[Tensor, "b dim"],
    temperature: float | Tensor = 0.1,
    renormalise: bool = True,
    row_mean: bool = False,
    alpha: float | Tensor = 0.0,
) -> Float[Tensor, ""]:
    r"""Compute L: positives of an anchor are the keys of its partner class, compared in the subspace of the anchor's gate.

    Args:
        z1: projections of the anchors.
        z2: projections of the keys, row by row of the same pictures; may be z1 itself.
        y1: classes of the pictures.
        y2: partner class of each anchor.
        gate: g, in 0..1; ones for no gate.
        temperature: T > 0, a number or a learnable scalar; default 0.1.
        renormalise: form A (default), or form B.
        row_mean: mean over anchors of the mean over their positives; anchors without one count 0. Default: mean over all
            positive pairs.
        alpha: weight of the ungated similarity that form B subtracts; default 0.

    Returns a scalar: 0 without positives. Across processes, keys and means are those of all processes. Raises ValueError for
    shapes that do not fit, an empty batch, and a temperature that is not positive.
    Source: vitookit, evaluation/simlap.py (form A); FastSSL, model/simlap.py (form B).

    >>> z, y = torch.eye(3), torch.tensor([0, 1, 2])
    >>> gated_pair_infonce(z, z, y, y, torch.ones(3, 3), temperature=1.0)
    tensor(0.5514)
    """
    need_alike("b dim", z1=z1, z2=z2, gate=gate)
    if y1.shape != (len(z1),) or y2.shape != (len(z1),):
        raise ValueError(f"y1 and y2 must be [b] = [{len(z1)}], got {shapes(y1=y1, y2=y2)}")
    need_positive(temperature=temperature)
    key, classes = gather_rows(z2), gather_rows(y1)
    squares = gate.square()
    query = unit(gate * z1) * gate if renormalise else unit(z1) * (squares - alpha)
    key = key if renormalise else unit(key)
    t = torch.as_tensor(temperature, dtype=z1.dtype, device=z1.device)
    rows = max(1, BLOCK // max(1, len(key)))
    parts = []
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        same, positive = classes == y1[part, None], classes == y2[part, None]
        given = (query[part], squares[part] if renormalise else None, key, same, positive, t)
        again = len(query) > rows and torch.is_grad_enabled()
        parts.append(checkpoint(_block, *given, use_reentrant=False) if again else _block(*given))
    total, count = torch.cat(parts, 1) if parts else z1.new_zeros(2, 0)
    if row_mean:
        return global_mean(total / (count + 1e-6))
    everywhere = gather_rows(count.detach()).sum().clamp(min=1)
    return mean_of_total(total.sum(), 1) / everywhere


def draw_partners(y: Int[Tensor, " b"], classes: int, pairs: str, generator: torch.Generator) -> Int[Tensor, " b"]:
    """Draw the partner class of every anchor.

    Args:
        y: classes of the anchors.
        classes: number of classes, at least 2.
        pairs: "arbitrary": a permutation of the batch's classes; "distinct": any other class, uniformly; "identical": y.
        generator: source of the random numbers.

    >>> draw_partners(torch.tensor([0, 1, 1]), 2, "distinct", torch.Generator())
    tensor([1, 0, 0])
    """
    if pairs == "identical":
        return y
    if pairs == "arbitrary":
        return y[torch.randperm(len(y), generator=generator).to(y.device)]
    return (y + torch.randint(1, classes, (len(y),), generator=generator).to(y.device)) % classes


# ------------------------------------------------------------------------------------------------------------- the learner


@dataclass
class HydraConfig(EmbeddingConfig):
    """Settings of Hydra. Defaults are the authors' for CIFAR-10, where Adam has a learning rate of 1e-3 at any batch size."""

    epochs: int = 50
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 5e-4
    warmup_epochs: int = 2
    recipe: str = "supcon"
    projection: int = 256
    """Width of the projections and of the gates."""
    temperature: float = 0.1
    """Temperature of the loss; with learn_temperature its start."""
    learn_temperature: bool = False
    """Learn the logarithm of 1 / temperature."""
    pairs: Literal["arbitrary", "distinct", "identical"] = "arbitrary"
    """Partner class of an anchor: arbitrary (a permutation of the batch's), distinct (another class), identical (its own)."""
    gate: Literal["pair", "product", "none"] = "pair"
    """pair: the filter sees both classes together. product: it sees each class alone, and both gates are multiplied. none: no
    filter."""
    form: Literal["renormalised", "plain"] = "renormalised"
    """renormalised: cosine of the gated rows (form A); plain: gated product of unit rows (form B)."""
    row_mean: bool = False
    """Average over anchors, each with the mean of its positives, in place of all positive pairs."""
    residual: bool = False
    """Subtract a learned share of the ungated similarity (form plain)."""
    symmetric: bool = False
    """Average the loss with that of the second view's rows as anchors."""
    label_dim: int = 512
    """Width of the label embeddings."""
    filter_hidden: int = 1024
    """Width of the filter's hidden layer."""
    gate_penalty: float = 0.0
    """Weight of mean g (1 - g), which drives gates to 0 or 1; at least 0."""

    counts: ClassVar[tuple[str, ...]] = (*EmbeddingConfig.counts, "label_dim", "filter_hidden")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        self.need_weight("gate_penalty")
        if self.residual and self.form != "plain":
            raise CounterpointError("residual belongs to form B: add --form plain")


class Hydra(ImageLearner):
    """An encoder, a projector that ends in LayerNorm, and the feature filter."""

    config: HydraConfig
    crops: ClassVar[int] = 2

    def __init__(self, config: HydraConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        if data.classes < 3:
            raise DataError(f"hydra needs at least three classes, the data has {data.classes}: two leave no negatives")
        self.classes = data.classes
        self.projector = nn.Sequential(
            nn.Linear(self.encoder.dim, config.hidden),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.projection, bias=False),
            nn.LayerNorm(config.projection),
        )
        sizes = config.projection, config.label_dim, config.filter_hidden
        self.filter = None if config.gate == "none" else FeatureFilter(data.classes, *sizes)
        log_scale = torch.tensor(-math.log(config.temperature))
        self.log_scale = nn.Parameter(log_scale) if config.learn_temperature else None
        self.alpha = nn.Parameter(torch.zeros(())) if config.residual else None

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        # Batch normalisation in the filter uses the pairs of all processes.
        y1 = self.whole(batch["label"])
        y2 = draw_partners(y1, self.classes, self.config.pairs, generator)
        _, mine = self.share(len(batch["label"]))
        return batch | {"pairs": (y1, y2), "mine": mine}

    def gates(self, y1: Tensor, y2: Tensor) -> Float[Tensor, "b dim"]:
        if self.filter is None:
            return torch.ones(len(y1), self.config.projection, device=y1.device)
        if self.config.gate == "product":
            one, two = self.filter(torch.cat([y1, y2]), torch.cat([y1, y2])).chunk(2)
            return one * two
        found: Tensor = self.filter(y1, y2)
        return found

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, (y1, y2), mine = self.config, batch["pairs"], batch["mine"]
        z1, z2 = self.projector(self.encoder(torch.cat(batch["views"]))).chunk(2)
        gate = self.gates(y1, y2)[mine]
        t = config.temperature if self.log_scale is None else (-self.log_scale).exp()
        options = t, config.form == "renormalised", config.row_mean, 0.0 if self.alpha is None else self.alpha
        y1, y2 = y1[mine], y2[mine]
        loss = gated_pair_infonce(z1, z2, y1, y2, gate, *options)
        if config.symmetric:
            loss = (loss + gated_pair_infonce(z2, z1, y1, y2, gate, *options)) / 2
        found = {"contrast": loss, "gate": global_mean(gate.detach().mean(1))}
        if config.gate_penalty:
            loss = loss + config.gate_penalty * global_mean((gate * (1 - gate)).mean(1))
        return {"loss": loss} | found

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show how much of the space the gate of every pair of classes opens."""
        if self.filter is None:
            return {}
        with torch.no_grad():
            every = torch.arange(self.classes, device=self.device)
            one, two = every.repeat_interleave(self.classes), every.repeat(self.classes)
            opened = self.gates(one, two).mean(1).view(self.classes, self.classes)
        return {
            "Gates of class pairs": {
                "kind": "matrix",
                "values": opened.cpu().tolist(),
                "names": list(survey.classes),
                "caption": "Mean of the gate of each pair of classes: the share of the space in which they are compared.",
            }
        }


SYSTEM = System(
    slug="hydra",
    task="labelled",
    config=HydraConfig,
    learner=Hydra,
    data="cifar10",
    recipe=LAPTOP | {"optimizer": "adam", "lr": 1e-3, "hidden": 512, "label_dim": 128, "filter_hidden": 256},
)
