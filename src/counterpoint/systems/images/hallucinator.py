"""Hallucinator: generate one more positive per pair, moved away from its partner in feature space and smoothed.

Wu, Hobbs, Hovakimyan: "Hallucination Improves the Performance of Unsupervised Visual Representation Learning", ICCV 2023,
arXiv 2307.12168.

Only the paper's abstract was readable, and no code was found.

- Certain: the method works on features, is differentiable and trains with the pretext task. It adds positives, lowers the
  shared information of a pair, and smooths by non-linear operations. Its bases are MoCo, SimCLR and SimSiam.
- Reconstructed: e = z1 + lambda (z1 - z2), which moves only the query's side. h = H(e) with H a small network.
- Chosen: lambda ~ Beta(2, 2) times `reach`, at most 1, because larger values give false positives. H(e) = e + MLP(e) with a
  last layer of zeros, so it starts as the identity. The second contrast has weight 1. For base losses in both directions,
  hallucinate from both sides and take the mean.

This is an addition: `hallucinator` alone changes SimCLR. H belongs to the learner, whose optimiser trains it. Like the
projector it is part of the run's weights, and evaluated features do not pass through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_alike
from counterpoint.core.compared import Compared, Queued, Ways, pairs, predicted, views
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.engine.learner import Learner
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import Addition
from counterpoint.systems.parts import Losses, Part, Step
from counterpoint.systems.settings import PartConfig
from counterpoint.words import counted


@full_precision(keep=("lam",))
def extrapolate_positive(
    z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"], lam: float | Float[Tensor, " n"]
) -> Float[Tensor, "n dim"]:
    """Compute e = z1 + lam (z1 - z2), on the ray from z2 through z1, beyond z1.

    For unit rows and lam >= 0, |e| >= 1 and cos(e, z2) falls with lam.

    Args:
        z1, z2: rows of the two sides.
        lam: a number, or one for each row.

    Raises ValueError for shapes that do not fit.

    >>> extrapolate_positive(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 1.0)
    tensor([[ 2., -1.]])
    """
    need_alike("n dim", z1=z1, z2=z2)
    if isinstance(lam, Tensor) and lam.ndim:
        if lam.numel() != len(z1):
            raise ValueError(
                f"lam must be a number or one for each of {counted(len(z1), 'row')}, got {list(lam.shape)}"
            )
        lam = lam.reshape(-1, 1)
    return z1 + lam * (z1 - z2)


class Hallucinator(nn.Module):
    """The smoothing e -> e + MLP(e), with linear layer, batch normalisation, ReLU and linear layer.

    Args:
        dim: width of features.
        hidden: width of the hidden layer; None: dim.
        nonlinear: smooth features (default); False: leave them unchanged.

    The last layer starts at zero, so the module starts as the identity.
    """

    def __init__(self, dim: int, hidden: int | None = None, nonlinear: bool = True) -> None:
        super().__init__()
        self.layers: nn.Sequential | None = None
        if nonlinear:
            hidden = hidden or dim
            last = nn.Linear(hidden, dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), last)

    def forward(self, e: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        return e if self.layers is None else e + self.layers(e)


@dataclass
class HallucinatorConfig(PartConfig):
    """Settings of the hallucinator."""

    weight: float = 1.0
    """Weight of the contrast with hallucinated positives, at least 0; 0: the base's loss unchanged."""
    reach: float = 1.0
    """Largest extrapolation, 0 to 1: lambda ~ reach Beta(2, 2)."""
    nonlinear: bool = True
    """Smooth extrapolated features by a small network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight >= 0 or not 0 <= self.reach <= 1:
            raise CounterpointError(
                f"hallucinator.weight must not be negative and reach must lie in 0..1, got {self.weight} and {self.reach}"
            )


class Hallucinated(Part):
    """The base's loss of its own rows, plus that of hallucinated rows."""

    config: HallucinatorConfig

    def __init__(self, config: HallucinatorConfig, learner: Learner, data: Any, ways: Ways | None) -> None:
        super().__init__(config, learner, data, ways)
        base = learner.config
        width = base.projection if hasattr(base, "projection") else base.embedding
        self.smooth = Hallucinator(width, nonlinear=config.nonlinear)

    def draw(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.config.weight == 0:
            return {}
        # Beta(2, 2) is the middle of three uniform numbers.
        return {"lam": self.config.reach * torch.rand(rows, 2, 3, generator=generator).median(2).values}

    def loss(self, compared: Compared, step: Step, below: Callable[[Compared], Losses]) -> Losses:
        base, weight = below(compared), self.config.weight
        if weight == 0:
            return base
        z1, z2 = unit(compared.query), unit(compared.key)
        lam = step.drawn["lam"][: len(z1)].to(z1)
        one_sided, by_prediction = isinstance(compared.ways, Queued), compared.ways is predicted
        # If a key or target has no gradient, the rows hallucinated from it send none to it either.
        e1 = extrapolate_positive(z1, z2.detach() if one_sided or by_prediction else z2, lam[:, 0])
        moved = [replace(compared, query=unit(self.smooth(e1)))]
        if not one_sided:
            e2 = extrapolate_positive(z2, z1.detach() if by_prediction else z1, lam[:, 1])
            (h1, h2) = moved[0].query, unit(self.smooth(e2))
            if by_prediction:
                # Give the predictor rows of the usual length.
                sizes = [x.detach().norm(dim=1, keepdim=True) for x in (compared.query, compared.key)]
                targets = z1.detach(), z2.detach()
                moved = [replace(compared, query=h1 * sizes[0], key=h2 * sizes[1], targets=targets)]
            else:
                moved = [replace(compared, query=h1, key=z2), replace(compared, query=z1, key=h2)]
        extra = torch.stack([below(rows)["loss"] for rows in moved]).mean()
        with torch.no_grad():
            shared = global_mean((z1 * z2).sum(1))
            moved_away = global_mean((F.normalize(e1, dim=1) * z2).sum(1))
        return base | {
            "loss": base["loss"] + weight * extra,
            "base": base["loss"].detach(),
            "hallucinated": extra.detach(),
            "pair_cosine": shared,
            "extrapolated_cosine": moved_away,
        }


SYSTEM = Addition(
    slug="hallucinator",
    over="simclr",
    config=HallucinatorConfig,
    part=Hallucinated,
    fits=(views, Queued, pairs, predicted),
    loss="over",
)
