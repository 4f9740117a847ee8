"""MLCD: classify each image into its several nearest clusters, with separate terms for positive and negative classes.

An, Yang, Dai, Feng, Deng: "Multi-label Cluster Discrimination for Visual Representation Learning", ECCV 2024, arXiv
2407.17331. The authors published models and the code of the single-label ancestor (UNICOM, arXiv 2304.05884), not this loss.

    t_i, y_i       a teacher's features of image i, and its l labels: the l nearest of k centres of k-means on unit features
    u, w_c         unit embedding of an image, and unit class centre; class centres are learnt and start at N(0, 0.01^2)
    s_j, s_p       logits: cosine / temperature of a negative class j; of a positive class p, cos(angle + m) / temperature
    A, B           sum over p of exp(-s_p), and sum over j of exp(s_j)

    MLC            log(1 + A B)                         pairs of a positive and a negative; with l = 1 the softmax's loss
    MLCD           log(1 + A) + log(1 + B)              = log(1 + A + B + A B)

A gradient of MLCD with respect to s_p does not depend on negatives, nor one of s_j on positives. Each step draws a share r of
the classes for the batch of all processes. The positives of all images are always among them (PartialFC). So positives of one
image are negatives of others.

- Certain: both losses, l, k, r. The appendix has an ArcFace margin.
- Of the ancestor: temperature 1/64, m = 0.3, the filter of near classes, and the gradient of the margin. The authors change
  cosines without gradient. So the gradient is that of the plain cosine, at the changed logits. This is not ArcFace's own.
- Chosen: the mean over the batch, a linear layer as head, crops of 20 to 100 % with a flip as views.

Departures: class centres always train with Adam, whatever `optimizer` is. With adamw the drawn rows also decay. `clip_norm` does
not count them. Every process holds all centres; the ancestor's code divides them over processes. With `--objective softmax` all
labels share one draw of classes; the group's later code draws anew for each label. Not built: averages of image and caption
features, and the text tower that a locked encoder would get afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.class_logits import ClassLogits, need_margins
from counterpoint.core.contrast import softplus
from counterpoint.core.distributed import global_mean
from counterpoint.core.memory import kmeans, nearest_clusters
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.data.images import ImageData
from counterpoint.engine.optim import light
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.cluster_figures import cluster_figures
from counterpoint.tasks.image_teachers import check_teacher, teacher_features
from counterpoint.tasks.images import BATCH, ImagesConfig
from counterpoint.tasks.views import BARE, ViewsLearner
from counterpoint.words import counted

COMPARED = 512  # images whose cosines are drawn

# ------------------------------------------------------------------------------------------------------------- the losses


@over_group
@full_precision
def mlcd_loss(
    embedding: Float[Tensor, "n dim"],
    class_center: Float[Tensor, "k dim"],
    labels: Int[Tensor, "n labels"],
    scale: float = 64.0,
    margin: float = 0.3,
    sample_rate: float = 0.1,
    generator: torch.Generator | None = None,
    *,
    coupled: bool = False,
    m_cos: float = 0.0,
    filter_threshold: float = 0.0,
    mask: Bool[Tensor, " n"] | None = None,
    sparse: bool = False,
) -> Float[Tensor, ""]:
    r"""Compute the loss of multi-label cluster discrimination, the mean over rows of log(1 + A) + log(1 + B).

    With A = sum_p exp(-s_p) over a row's labels and B = sum_j exp(s_j) over the other classes that take part.

    Args:
        embedding, class_center: rows, which this function normalises.
        labels: classes of each row, 0 to k - 1, in any order; -1 for none. A repeated label counts once. A row without
            labels has A = 0.
        scale: 1 / temperature, > 0, by default 64.
        margin: added to the angle between a row and its class, 0 to below pi, by default 0.3. Its gradient is that of the
            plain cosine.
        sample_rate: share of the classes that take part, 0 to 1, by default 0.1; see `sampled_classes`.
        generator: draws the classes; needed for a sample_rate below 1.
        coupled: use log(1 + A B) instead, the baseline MLC; by default False.
        m_cos: subtracted from the cosine between a row and its class, at least 0, by default 0.
        filter_threshold: a cosine with another class above it, 0 to 1, counts as 0. 0 (default): no filter.
        mask: True where a row is left out of the mean; its labels still take part. None (default): no row.
        sparse: make the gradient of class_center sparse, with the rows that take part alone; by default False.

    A row whose labels are all classes has B = 0. Memory is linear in rows and in classes that take part. Raises ValueError
    for shapes that do not fit, labels and numbers out of range, and a missing generator.

    >>> mlcd_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([[0]]), 16.0, 0.0, 1.0)
    tensor(1.3863)
    """
    need_margins(scale, margin, m_cos, filter_threshold)
    given = scale, sample_rate, generator, filter_threshold
    found = ClassLogits(embedding, class_center, labels, *given, sparse=sparse)
    if mask is not None and mask.shape != labels.shape[:1]:
        raise ValueError(f"mask must be [{len(labels)}], got {list(mask.shape)}")
    positive = (-found.margined(margin, m_cos)).masked_fill(~found.valid, -math.inf).logsumexp(1)
    negative = found.others()
    losses = softplus(positive + negative) if coupled else softplus(positive) + softplus(negative)
    return global_mean(losses if mask is None else losses[~mask])


@over_group
@full_precision
def margin_cluster_loss(
    embedding: Float[Tensor, "n dim"],
    class_center: Float[Tensor, "k dim"],
    label: Int[Tensor, " n *labels"],
    scale: float = 64.0,
    m_arc: float = 0.0,
    m_cos: float = 0.0,
    filter_threshold: float = 0.0,
    *,
    sample_rate: float = 1.0,
    generator: torch.Generator | None = None,
    sparse: bool = False,
) -> Float[Tensor, ""]:
    """Compute the single-label ancestor: cross-entropy with margins, the mean over rows and over their labels.

    Each label is the one target of a softmax, in which the row's other labels are negatives (UNICOM; several labels: the
    group's later code). The gradient is that of the mean.

    Args:
        embedding, class_center: rows, which this function normalises.
        label: one class of each row, or several; -1 for none, which leaves the term out of the mean.
        scale: 1 / temperature, > 0, by default 64.
        m_arc, m_cos: margins on the angle (0 to below pi) and on the cosine (at least 0), by default 0. The angle's has the
            gradient of the plain cosine.
        filter_threshold, sample_rate, generator, sparse: as in `mlcd_loss`; by default all classes take part.

    Raises ValueError as `mlcd_loss` does.

    >>> margin_cluster_loss(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), 1.0)
    tensor(0.3133)
    """
    need_margins(scale, m_arc, m_cos, filter_threshold)
    label = label[:, None] if label.ndim == 1 else label
    given = scale, sample_rate, generator, filter_threshold
    found = ClassLogits(embedding, class_center, label, *given, sparse=sparse)
    rest, cosine, labels = found.others()[:, None], found.cosine, found.labels
    if label.shape[1] > 1:  # of each label's softmax the row's other labels, [n, target, other]
        if filter_threshold:
            cosine = cosine.masked_fill(cosine > filter_threshold, 0.0)
        shown = found.valid[:, None] & (label[:, :, None] != labels[:, None])
        beside = (scale * cosine)[:, None].expand(shown.shape).masked_fill(~shown, -math.inf)
        rest = torch.cat([beside, rest[:, None].expand(-1, shown.shape[1], 1)], 2).logsumexp(2)
    # A repeated label has the logit of its first occurrence.
    first = (label[:, :, None] == labels[:, None]).int().argmax(2)
    losses = softplus(rest - found.margined(m_arc, m_cos).gather(1, first))
    return global_mean(losses[label >= 0])


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class MLCDConfig(ImagesConfig):
    """Settings of MLCD. Defaults are the paper's for LAION-400M with ViT-B/32."""

    epochs: int = 32
    batch_size: int = 32768
    encoder: str = "timm:vit_base_patch32_224"
    recipe: str = "mae"
    optimizer: str = "adamw"
    lr: float = 1e-3 / 128
    weight_decay: float = 0.2
    projection: int = 512
    """Width of the embedding that is compared with the class centres."""
    teacher: str = "hf:openai/clip-vit-large-patch14"
    """Network whose features are clustered: hf:NAME, timm:NAME, torchvision:NAME, run:RUN, fit:SLUG?data=SOURCE; or data, the
    features that come with the source."""
    teacher_size: int = 224
    """Pixels to which pictures are enlarged for a teacher of a library."""
    clusters: int = 1_000_000
    """k, number of clusters of the training images, and of classes."""
    labels: int = 8
    """l, number of nearest clusters that are labels of an image, below `clusters`."""
    cluster_library: Literal["sklearn", "faiss"] = "sklearn"
    """Library of the k-means; faiss is faster on millions of images."""
    objective: Literal["mlcd", "mlc", "softmax"] = "mlcd"
    """mlcd: separate terms. mlc: coupled terms. softmax: one softmax for each label, averaged; UNICOM with one label."""
    sample_rate: float = 0.1
    """r, share of the classes that take part in a step, 0 to 1; those of the batch always do."""
    temperature: float = 1 / 64
    """Divisor of the cosines, > 0; the papers' gamma is its inverse."""
    margin: float = 0.3
    """m, added to the angle between an image and its class, 0 to below pi."""
    cosine_margin: float = 0.0
    """Subtracted from the cosine between an image and its class, at least 0 (CosFace)."""
    filter_threshold: float = 0.0
    """A cosine with a class that is no label, above this, counts as 0 (0 to 1); 0: no filter."""
    center_rate: float = 1.0
    """Factor of the class centres' learning rate; UNICOM's fine-tuning has 5."""

    counts: ClassVar[tuple[str, ...]] = (*ImagesConfig.counts, "projection", "teacher_size", "labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("center_rate", "temperature")
        self.need_share("sample_rate", "filter_threshold")
        self.need_weight("margin", "cosine_margin")
        if self.labels >= self.clusters:
            raise CounterpointError(f"labels must lie below clusters ({self.clusters}), got {self.labels}")
        if self.margin >= math.pi:
            raise CounterpointError(f"margin must lie in 0..pi, pi not included, got {self.margin}")
        check_teacher(self.teacher)

    def check(self) -> None:
        super().check()
        if self.cluster_library == "faiss" and not find_spec("faiss"):
            raise CounterpointError(
                "--cluster-library faiss is not installed: pip install faiss-cpu, or leave the option out"
            )

    def facts(self, data: ImageData) -> dict[str, Any]:
        if self.clusters > len(data.train):
            raise DataError(
                f"{data.name} has {counted(len(data.train), 'training image')}, fewer than the {self.clusters} clusters; lower "
                "--clusters"
            )
        return super().facts(data)


# ------------------------------------------------------------------------------------------------------------- the learner


class MLCD(ViewsLearner):
    """An encoder, a linear head, learnt class centres, and a table of labels by position in the training set."""

    crops: ClassVar[int] = 1
    config: MLCDConfig
    labels: Int[Tensor, "examples labels"]

    def __init__(self, config: MLCDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.centers = nn.Parameter(0.01 * torch.randn(config.clusters, config.projection))
        self.register_buffer("labels", torch.full((data.examples, config.labels), -1))

    def build_projector(self, dim: int) -> nn.Module:
        return nn.Linear(dim, self.config.projection)

    # --- before training: clusters

    def stages(self) -> list[Stage]:
        return [Stage("train", self.config.epochs, enter=self._cluster)]

    def _cluster(self, survey: Survey) -> None:
        """Cluster the teacher's unit features by k-means, and label each training image with its nearest clusters."""
        config = self.config
        features = unit(teacher_features(config.teacher, survey, config.teacher_size, self.device))
        centers = kmeans(features, config.clusters, self.seed, library=config.cluster_library).centers
        self.labels.copy_(nearest_clusters(features, centers, config.labels))

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        # The same number on all processes, which therefore draw the same classes.
        return super().prepare(batch, generator) | {"draw": int(torch.randint(2**62, (), generator=generator))}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, (view,) = self.config, batch["views"]
        labels, generator = self.labels[batch["index"]], torch.Generator().manual_seed(batch["draw"])
        embedding = self.projector(self.encoder(view))
        given = embedding, self.centers, labels, 1 / config.temperature, config.margin
        rate, extra, limit = config.sample_rate, config.cosine_margin, config.filter_threshold
        if config.objective == "softmax":
            loss = margin_cluster_loss(*given, extra, limit, sample_rate=rate, generator=generator, sparse=True)
        else:
            coupled = config.objective == "mlc"
            options: dict[str, Any] = {"coupled": coupled, "m_cos": extra, "filter_threshold": limit}
            loss = mlcd_loss(*given, rate, generator, **options, sparse=True)
        with torch.no_grad():
            own = torch.einsum("nd,nld->nl", unit(embedding), unit(self.centers[labels]))
        return {"loss": loss, "positive_cosine": global_mean(own.mean(1))}

    def turns(self) -> list[Turn]:
        """Return a turn of two optimisers: that of the networks, and Adam on the drawn rows of the class centres."""
        turn = self.turn_of([self.encoder, self.projector])
        rows = light(torch.optim.SparseAdam)([self.centers])
        self.optimizers = *turn.optimizers, rows
        return [Turn(self.optimizers, turn.schedules)]

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the class centres the networks' learning rate, and decay the drawn rows as AdamW does."""
        group, own = (optimizer.param_groups[0] for optimizer in self.optimizers)
        own["lr"] = lr = group["lr"] * self.config.center_rate
        gradient = self.centers.grad
        if gradient is not None and self.config.optimizer == "adamw":
            drawn = gradient.coalesce().indices()[0]
            self.centers[drawn] *= 1 - lr * group["weight_decay"]

    # --- what remains: the encoder and its head

    def exported(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name not in ("centers", "labels")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state. An export has neither class centres nor labels: they stay unchanged."""
        own = {name: value for name, value in self.state_dict().items() if name in ("centers", "labels")}
        return super().load_state_dict(own | dict(state_dict), strict=strict, assign=assign)

    # --- the page

    @torch.no_grad()
    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show images with their clusters, and their cosines with the centres of these clusters and of others."""
        positions = np.unique(np.linspace(0, survey.examples - 1, min(COMPARED, survey.examples)).astype(np.int64))
        parts = [
            survey.batch("train", part)["image"] for part in np.array_split(positions, -(-len(positions) // BATCH))
        ]
        u = torch.cat([unit(self.projector(self.encoder(images))).cpu() for images in parts])
        return cluster_figures(survey, positions, u, self.labels.cpu(), self.centers.detach().cpu())


# Settings for a small set of small pictures on a few cores.
SMALL: dict[str, Any] = BARE | {
    "optimizer": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.05,
    "batch_size": 128,
    "recipe": "weak",
    "projection": 64,
    "teacher": "torchvision:resnet18",
    "clusters": 150,
    "sample_rate": 0.5,
    "temperature": 1 / 16,
    "margin": 0.0,
}

SYSTEM = System(
    slug="mlcd",
    task="views",
    config=MLCDConfig,
    learner=MLCD,
    data="digit-canvases",
    recipes={"digit-canvases": SMALL | {"teacher": "data", "encoder": "mlp-s", "recipe": "none", "bank": 500}},
    recipe=SMALL,
)
