"""MSN: masked crops predict which prototypes a moving average of the network assigns to an unmasked crop.

Assran, Caron, Misra, Bojanowski, Bordes, Vincent, Joulin, Rabbat, Ballas: "Masked Siamese Networks for Label-Efficient
Learning", ECCV 2022, arXiv 2204.07141.

    p_v    prediction of anchor v: softmax over prototypes of cosine / temperature
    p+     target: the same of the unmasked crop, from the moving average, sharpened: (p+)^(1/T) / sum
    loss   mean_v H(p+, p_v) + weight (log K - H(mean of all p_v)): the mean prediction shall use all K prototypes

The first large crop is the target. The second one loses patches, and small crops stay whole (focal views). A vision transformer
drops its masked patches, as in the paper. For any other encoder they become zeros of the normalised picture. A run keeps and
measures the moving average. No numbers of the authors were at hand to test against. The target crop passes the network alone. In
`msn+bss` it has one style, which batch normalisation would remove: choose vit-s or conv-group.

Differences from the authors' code: ReLU instead of GELU in the projector, a constant weight decay, and one masked crop a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.assignment import sinkhorn
from counterpoint.core.checks import need_alike, need_positive, need_rows, shapes
from counterpoint.core.compared import by_view
from counterpoint.core.distributed import gather_rows, global_mean, place
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.teacher import EMATeacher, cosine_momentum
from counterpoint.core.transforms import once
from counterpoint.core.world import over_group
from counterpoint.encoders.vision_transformers import VisionTokens
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.views import LAPTOP, MultiCropConfig, MultiCropLearner, mlp


class MSNOutput(NamedTuple):
    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""]
    mean_entropy: Float[Tensor, ""]  # H of the mean prediction, at most log K


@over_group
@full_precision
def msn(
    anchors: Float[Tensor, "views n dim"],
    target: Float[Tensor, "n dim"],
    prototypes: Float[Tensor, "k dim"],
    temperature: float = 0.1,
    sharpening: float = 0.25,
    weight: float = 1.0,
    iterations: int = 0,
    by_view: bool = False,
) -> MSNOutput:
    """Compute the cross-entropy of anchors with the sharpened target, and the entropy of the mean prediction (Eqs. 1 and 2).

    Args:
        anchors: projections of the masked crop and the small crops, normalised here.
        target: projections of the unmasked crops by the moving average, normalised here; no gradient.
        prototypes: normalised here; no gradient through the target.
        temperature: > 0, by default 0.1.
        sharpening: T > 0 of the target, by default 0.25; 1 leaves it as it is.
        weight: weight of log k minus the entropy of the mean prediction, by default 1.
        iterations: iterations of Sinkhorn's algorithm on the target, over the whole batch; 0 (default): none.
        by_view: take the mean prediction of each view alone, and average the entropies (BSS); by default of all views.

    Means cover the batch of all processes. Raises ValueError for shapes or numbers that do not fit and for an empty batch.

    >>> round(msn(torch.eye(2)[None], torch.eye(2), torch.eye(2)).mean_entropy.item(), 4)
    0.6931
    """
    if anchors.ndim != 3 or not len(anchors) or prototypes.ndim != 2 or prototypes.shape[1] != anchors.shape[2]:
        raise ValueError(
            f"anchors must be [views, n, dim] and prototypes [k, dim], got {shapes(anchors=anchors, prototypes=prototypes)}"
        )
    need_alike("n dim", target=target, anchors=anchors[0])
    need_rows(prototypes=prototypes)
    need_positive(temperature=temperature, sharpening=sharpening)
    if not (weight >= 0 and iterations >= 0):
        raise ValueError(f"weight and iterations must not be negative, got {weight} and {iterations}")
    centres = once(unit(prototypes), "msn")  # its targets are constants
    with torch.no_grad():
        scores = unit(target) @ centres.T / (temperature * sharpening)
        if iterations:
            here = place(len(target), target.device)
            scores = sinkhorn(gather_rows(scores.log_softmax(1)), 1.0, iterations)
            wanted = scores[here.offset : here.offset + here.rows]
        else:
            wanted = scores.softmax(1)
    logs = F.log_softmax(unit(anchors) @ centres.T / temperature, dim=2)
    cross = -global_mean((wanted * logs).sum(2).mean(0))
    each = logs.exp() if by_view else logs.exp().mean(0, keepdim=True)
    means = torch.stack([_mean_row(view) for view in each])
    entropy = -torch.xlogy(means, means).sum(1).mean()
    limit = torch.log(torch.tensor(float(len(prototypes)), dtype=entropy.dtype, device=entropy.device))
    return MSNOutput(cross + weight * (limit - entropy), cross, entropy)


def _mean_row(rows: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Compute the mean of the rows of all processes."""
    return gather_rows(rows.sum(0, keepdim=True)).sum(0) / place(len(rows), rows.device).total


@dataclass
class MSNConfig(MultiCropConfig):
    """Settings of MSN. Defaults are those of the authors' configuration for ViT-S/16 on ImageNet."""

    epochs: int = 800
    batch_size: int = 1024
    encoder: str = "timm:vit_small_patch16_224"
    recipe: str = "simclr"
    optimizer: str = "adamw"
    lr: float = 1e-3 * 256 / 1024
    weight_decay: float = 0.04
    warmup_epochs: int = 15
    clip_norm: float | None = 3.0
    hidden: int = 2048
    projection: int = 256
    local_crops: int = 10
    prototypes: int = 1024
    """K, number of prototypes, at least 1."""
    temperature: float = 0.1
    """Temperature of the predictions, > 0."""
    sharpening: float = 0.25
    """T, > 0: targets are raised to the power 1 / T; 1 leaves them as they are."""
    mask: float = 0.15
    """Share of patches that the masked crop loses, at least 0 and below 1."""
    entropy_weight: float = 1.0
    """Weight of the entropy of the mean prediction, at least 0."""
    iterations: int = 3
    """Iterations of Sinkhorn's algorithm on the targets, at least 0; 0: none."""
    momentum_teacher: float = 0.996
    """Momentum of the target network at the first step, 0 to 1; it rises to 1 on half a cosine."""

    counts: ClassVar[tuple[str, ...]] = (*MultiCropConfig.counts, "prototypes")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("sharpening")
        if not 0 <= self.mask < 1 or not 0 <= self.momentum_teacher <= 1:
            raise CounterpointError(
                f"mask must lie in 0..1 without 1 and momentum_teacher in 0..1, got {self.mask} and {self.momentum_teacher}"
            )
        if not (self.entropy_weight >= 0 and self.iterations >= 0):
            raise CounterpointError(
                f"entropy_weight and iterations must not be negative, got {self.entropy_weight} and {self.iterations}"
            )


class MSN(MultiCropLearner):
    """A network on masked and small crops, and its moving average on whole ones."""

    by_view = False  # an addition that gives each view a style of its own sets it

    def __init__(self, config: MSNConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.prototypes = nn.Parameter(unit(torch.randn(config.prototypes, config.projection)))
        self.teacher = EMATeacher(self.network)
        self.patch = int(getattr(self.encoder, "patch", 0)) or max(1, self.size // 8)

    def build_projector(self, dim: int) -> nn.Module:
        return mlp(dim, self.config.hidden, self.config.hidden, self.config.projection)

    def embed(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        encoder, _ = cast(nn.Sequential, self.teacher.module)
        return encoder(images)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        total, mine = self.share(len(batch["image"]))
        noise = torch.rand(total, (-(-self.size // self.patch)) ** 2, generator=generator)[mine]
        return batch | {"noise": noise.to(batch["image"].device)}

    def masked(self, images: Tensor, noise: Tensor) -> Float[Tensor, "n dim"]:
        """Compute the features of images without the patches of the highest noise."""
        kept = noise.argsort(1)[:, : max(1, round(noise.shape[1] * (1 - self.config.mask)))]
        if isinstance(self.encoder, VisionTokens):
            found: Tensor = self.encoder.model.forward_head(self.encoder.tokens(images, kept))
            return found
        side = -(-self.size // self.patch)
        mask = torch.zeros_like(noise).scatter_(1, kept, 1.0).view(-1, 1, side, side)
        mask = mask.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return self.encoder(images * mask[..., : images.shape[2], : images.shape[3]])

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, (whole, large, *small) = self.config, batch["views"]
        target = self.teacher(whole)
        features = [self.masked(large, batch["noise"]), *([self.encoder(torch.cat(small))] if small else [])]
        anchors = self.projector(torch.cat(features)).unflatten(0, (1 + len(small), -1))
        out = msn(
            anchors,
            target,
            self.prototypes,
            config.temperature,
            config.sharpening,
            config.entropy_weight,
            config.iterations,
            self.by_view,
        )
        return {"loss": out.loss, "cross_entropy": out.cross_entropy, "mean_entropy": out.mean_entropy}

    def end_step(self) -> None:
        momentum = cosine_momentum(self.position.step, self.total_steps, self.config.momentum_teacher)
        self.teacher.update(self.network, momentum)


SYSTEM = System(
    slug="msn",
    task="views",
    config=MSNConfig,
    learner=MSN,
    data="cifar10",
    compares=by_view,
    recipe=LAPTOP | {"local_crops": 2, "prototypes": 256, "momentum_teacher": 0.99, "optimizer": "adamw", "lr": 1e-3},
)
