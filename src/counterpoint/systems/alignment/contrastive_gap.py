"""The contrastive gap: uniformity and alignment beside the CLIP loss, so that two modalities share one region.

Fahim, Murphy, Fyshe: "It's Not a Modality Gap: Characterizing and Addressing the Contrastive Gap", 2024, arXiv 2405.18570.

CLIP's two encoders map images and texts to separate regions of the sphere, even where both see the same data. The loss itself
causes the gap, because it uses only a small part of the sphere. The method adds Wang and Isola's terms: uniformity of each
modality and alignment of the pairs (CUA), and uniformity across modalities (CUAXU). The temperature is fixed.

This file has the whole loss, in any combination of its terms. `core.gap` measures the gap, and every run of the task reports it.
Not supported: the paper's other losses (cyclic, RSA, SVD), which are no part of the method. Nor is the multimodal arithmetic
of SIMAT, which needs its data.

One addition is off by default: `cross_warmup_epochs` raises the weight of the cross term slowly. From scratch and in few
dimensions this term drives the modalities to opposite poles (see the record of the claim). Every step reports `alignment`: near
4 the modalities are antipodal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.distributed import batch_pair_loss, global_mean
from counterpoint.core.gap import unit_cross_uniformity, unit_uniformity
from counterpoint.core.operands import scaled, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner


class ContrastiveGapLoss(NamedTuple):
    """The weighted sum of the terms, and each term alone: contrastive, uniformity, alignment, cross_uniformity."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]


@over_group
@full_precision
def contrastive_gap_loss(
    x: Float[Tensor, "n dim"],
    y: Float[Tensor, "n dim"],
    temperature: float = 0.01,
    uniformity: bool | float = True,
    alignment: bool | float = True,
    cross_uniformity: bool | float = False,
    contrastive: bool | float = True,
) -> ContrastiveGapLoss:
    r"""Compute L_CUA = L_CLIP + L_Uniform + L_Align, and with `cross_uniformity` L_CUAXU = L_CUA + L_XUniform.

    With u, v the rows of x, y at unit length (normalised here) and S = u v^T / temperature,

        L_CLIP     = (CE(S) + CE(S^T)) / 2, the diagonal as the targets
        L_Uniform  = 1/2 log mean_{i<j} exp(-2 |u_i - u_j|^2) + 1/2 log mean_{i<j} exp(-2 |v_i - v_j|^2)
        L_Align    = mean_i |u_i - v_i|^2
        L_XUniform = log mean_{i != j} exp(-2 |u_i - v_j|^2)

    Args:
        x, y: embeddings of two modalities; row i of one belongs to row i of the other.
        temperature: divisor of the similarities, > 0; fixed in the paper.
        uniformity, alignment, cross_uniformity, contrastive: whether the term counts, or its weight (1 in the paper).

    Returns (loss, terms). Terms have no weights. A term of weight 0 is computed too, without a gradient. For one row, L_CLIP
    and both uniformities are 0. Across processes the batch is that of all processes. Raises ValueError for shapes that
    differ, an empty batch or a temperature that is not positive.

    >>> import torch
    >>> loss, terms = contrastive_gap_loss(torch.eye(2), torch.eye(2), temperature=1.0)
    >>> terms["uniformity"], terms["alignment"]
    (tensor(-4.), tensor(0.))
    """
    need_alike("n dim", x=x, y=y)
    need_positive(temperature=temperature)
    u, v = unit(x), unit(y)
    weights = {
        "contrastive": float(contrastive),
        "uniformity": float(uniformity),
        "alignment": float(alignment),
        "cross_uniformity": float(cross_uniformity),
    }
    terms: dict[str, Tensor] = {}
    loss = (u.sum() + v.sum()) * 0
    for name, weight in weights.items():
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            terms[name] = _TERMS[name](u, v, temperature)
        if weight != 0:
            loss = loss + weight * terms[name]
    return ContrastiveGapLoss(loss, terms)


_TERMS = {
    "contrastive": lambda u, v, temperature: batch_pair_loss(scaled(u, temperature), v),
    "uniformity": lambda u, v, _: (unit_uniformity(u) + unit_uniformity(v)) / 2,
    "alignment": lambda u, v, _: global_mean((u - v).square().sum(1)),
    "cross_uniformity": lambda u, v, _: unit_cross_uniformity(u, v),
}


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class ContrastiveGapConfig(AlignedConfig):
    """Settings of CUA. Defaults are the paper's: CLIP ViT-B/32 fine-tuned on COCO under new projections to 128 dimensions."""

    epochs: int = 9
    batch_size: int = 64
    image_encoder: str = "hf:openai/clip-vit-base-patch32"
    text_encoder: str = "hf:openai/clip-vit-base-patch32"
    pretrained: bool = True
    embedding: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-6 * 256 / 64
    weight_decay: float = 0.1
    beta2: float | None = 0.99
    constant_lr: bool = True
    temperature: float = 0.01
    """Temperature of the CLIP loss, > 0; it is not learnt."""
    contrastive: bool = True
    """Add the CLIP loss."""
    uniformity: bool = True
    """Add the uniformity of each modality."""
    alignment: bool = True
    """Add the squared distance of the pairs."""
    cross_uniformity: bool = False
    """Add the uniformity across the modalities (CUAXU). From scratch it can drive them to opposite poles: then `alignment`, which
    every step reports, comes near 4."""
    cross_warmup_epochs: int = 0
    """Epochs over which the weight of `cross_uniformity` rises from 0 to 1; 0: it is 1 from the start, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        if self.cross_warmup_epochs < 0:
            raise CounterpointError(f"cross_warmup_epochs must not be negative, got {self.cross_warmup_epochs}")
        if not (self.contrastive or self.uniformity or self.alignment or self.cross_uniformity):
            raise CounterpointError(
                "every term of the loss is off; turn on contrastive, uniformity, alignment or cross_uniformity"
            )


class ContrastiveGap(AlignedLearner):
    """Two modalities under the CLIP loss with terms against the gap. With more modalities, the mean over all pairs."""

    def cross_weight(self) -> float:
        config = self.config
        if not config.cross_uniformity:
            return 0.0
        return min(1.0, self.position.epoch / config.cross_warmup_epochs) if config.cross_warmup_epochs else 1.0

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        found = [
            contrastive_gap_loss(
                a, b, config.temperature, config.uniformity, config.alignment, self.cross_weight(), config.contrastive
            )
            for a, b, _ in self.paired_rows(self.embed(batch), batch)
        ]
        terms = {name: torch.stack([terms[name] for _, terms in found]).mean() for name in found[0][1]}
        return {"loss": torch.stack([loss for loss, _ in found]).mean(), **terms}


# -------------------------------------------------------------------------------------------------------------- settings

# The card's setting: two networks of 32-128-128-16, AdamW at 1e-3 with a batch of 64, no schedule.
_HALVES = {
    "epochs": 30,
    "batch_size": 64,
    "embedding": 16,
    "vector_encoder": "relu-128-128",
    "vector_noise": 0.1,
    "optimizer": "adamw",
    "lr": 1e-3 * 256 / 64,
    "weight_decay": 0.01,
    "beta2": None,
}


SYSTEM = System(
    slug="contrastive-gap",
    task="aligned",
    config=ContrastiveGapConfig,
    learner=ContrastiveGap,
    data="digit-halves",
    recipes={"digit-halves": _HALVES},
    recipe=LAPTOP | {"pretrained": False, "beta2": None, "constant_lr": False},
)
