r"""CMD: a picture is a bag of regions; teach image and regions within their level, and each level by the other.

Bi, Ji, Zhan, Yang, Xia: "Cross-Level Multi-Instance Distillation for Self-Supervised Fine-Grained Visual Categorization",
IEEE TIP 2025, arXiv 2401.08860. Code: github.com/BiQiWHU/CMD, a patch of EsViT (github.com/microsoft/esvit, MIT).

    V, B, K      crops of a picture (0 and 1 are global), pictures, outcomes of a head
    T_v          regions of crop v: T_g of a global crop, T_l of a local one
    c, c_r       centres of the teacher's image and region outputs
    p_q          softmax((teacher's image outputs of global crop q - c) / tau_t)               [B, K]
    p_qn         the same for region n, with c_r                                               [B, T_g, K]
    s_v, s_vm    student's image and region outputs, over tau_s
    n*(m)        the region of q whose feature has the largest cosine with that of region m of v

    L_img(q, v)  mean_b -sum_k p_q log softmax(s_v)                                            image to image
    L_reg(q, v)  mean_bm -sum_k p_q,n*(m) log softmax(s_vm)                                    region to region
    EsViT        mean over pairs q != v of (L_img + L_reg) / 2                                 intra-level
    beta_v       sum_m w_m softmax(s_vm), the bag's distribution; w: 1/T_v, or attention
    L_S(v)       mean_b KL(beta_v || softmax(s_v))                                             inter-level
    CMD          EsViT + lambda mean over pairs of L_S(v)

The paper's exact inter-level term was not available. `inter` chooses among three: "within" is the corrected term L_S above.
"across" takes the other network's level: KL(beta_q || softmax(s_v)) + KL(p_q || beta_v). "literal" is the released code:

    mean_bk(X log X - X p_q) + mean_bk(Y log Y - Y s_v),    X = sum_n p_qn,  Y = sum_m s_vm

It has probabilities and logits in place of their logarithms. It is NaN where Y is negative. "none" is EsViT, and with
region_weight 0 DINO. The teacher's own term KL(beta_q || p_q) has no gradient, and is logged.

Attention is softmax_m(cos(region, mean region) / 0.1): regions near the picture's vector weigh more. Its gradient reaches
the features. The released code pools by the mean.

Memory: the outputs and their gradient, the teacher's distributions, and three tensors of one crop (`core.region_bags`). Nothing
of a pair of crops is kept. With 224 and 96 pixels, V = 10 and K = 65,536, a picture has 170 student and 98
teacher regions: 45 MB and 26 MB for each such tensor.

In the claim's runs the bag comes as near to the picture as expected. They show no gain in 5-NN accuracy, and do not exclude a loss
of one point. In pilots with lambda = 1 the image loss rose above log K: the image level predicted nothing. The code's other
value, 0.1, is milder.

Differences from the authors' code: batches are shuffled, those of the code are not. The differences that DINO's file lists
apply here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.alignment import swapped_entropy
from counterpoint.core.checks import need_positive, need_within, need_word, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.prototypes import DINOHead, moved_center
from counterpoint.core.region_bags import (
    GLOBAL,
    Pooling,
    bag_divergence,
    bag_terms,
    bag_weights,
    crop_regions,
    divergence,
    matched_regions,
    need_crop_rows,
)
from counterpoint.core.world import over_group
from counterpoint.encoders.maps import feature_map, map_networks, map_shape
from counterpoint.engine.survey import Survey
from counterpoint.systems.base import System
from counterpoint.tasks.region_figures import region_figures
from counterpoint.tasks.self_distilled import Levels, SelfDistilledConfig, SelfDistilledLearner, TwoLevels
from counterpoint.tasks.views import LAPTOP

Inter = Literal["within", "across", "literal", "none"]


class CMDOutput(NamedTuple):
    loss: Float[Tensor, ""]
    image: Float[Tensor, ""]
    region: Float[Tensor, ""]
    inter: Float[Tensor, ""]
    teacher_divergence: Float[Tensor, ""]


@over_group
@full_precision(keep=("center", "center_grid"))
def cmd_loss(
    student_cls: Float[Tensor, "vb outcomes"],
    student_region: Float[Tensor, "rows outcomes"],
    student_feat: Float[Tensor, "rows dim"],
    teacher_cls: Float[Tensor, "teacher_images outcomes"],
    teacher_region: Float[Tensor, "teacher_rows outcomes"],
    teacher_feat: Float[Tensor, "teacher_rows dim"],
    regions: Sequence[int],
    num_crops: int,
    center: Float[Tensor, "*one outcomes"],
    center_grid: Float[Tensor, "*one outcomes"],
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    *,
    inter: Inter = "within",
    inter_weight: float = 1.0,
    pooling: Pooling = "mean",
    region_weight: float = 0.5,
    attention_temperature: float = 0.1,
) -> CMDOutput:
    r"""Compute (1 - r) L_img + r L_reg + lambda L_inter, each the mean over pairs q != v.

    Args:
        student_cls: image outputs, crop by crop, the global ones first; in a crop, picture by picture.
        student_region: region outputs in that order; in a picture, region by region.
        student_feat: the encoder's features of these regions, which are matched by cosine.
        teacher_cls, teacher_region, teacher_feat: the same of the two global crops; no gradient.
        regions: regions of a global crop and of a local crop, T_g and T_l; all 0: no region and no inter-level term.
        num_crops: V, at least 2.
        center, center_grid: c and c_r, taken from the teacher's outputs before their temperature.
        student_temp, teacher_temp: temperatures > 0, by default 0.1 and 0.04.
        inter: inter-level term, see the module; "within" by default.
        inter_weight: lambda, at least 0, by default 1.
        pooling: weights of a bag's regions: "mean" (default) or "attention".
        region_weight: r, 0 to 1, by default 0.5; 0: DINO's loss.
        attention_temperature: temperature > 0 of the attention, by default 0.1.

    Returns the loss, and its three terms without their weights. `teacher_divergence` is the mean of KL(beta_q || p_q), and 0
    where no bag is pooled. The centres are not moved: see `moved_center`. NaN in a feature gives NaN. Raises ValueError for
    shapes that do not fit, an empty batch and numbers out of range.

    >>> zeros = torch.zeros(2, 3)
    >>> cmd_loss(zeros, zeros, zeros, zeros, zeros, zeros, [1], 2, zeros[0], zeros[0]).loss
    tensor(1.0986)
    """
    need_positive(student_temp=student_temp, teacher_temp=teacher_temp, attention_temperature=attention_temperature)
    need_within(0, 1, region_weight=region_weight)
    need_within(0, float("inf"), inter_weight=inter_weight)
    need_word(get_args(Inter), inter=inter)
    need_word(get_args(Pooling), pooling=pooling)
    counts = crop_regions(regions, num_crops)
    student, teacher = (student_cls, student_region, student_feat), (teacher_cls, teacher_region, teacher_feat)
    need_crop_rows(*student, *teacher, counts)
    b, k = len(student_cls) // num_crops, student_cls.shape[1]
    for name, centre in (("center", center), ("center_grid", center_grid)):
        if centre.numel() != k:
            raise ValueError(f"{name} must be [{k}], got {shapes(**{name: centre})}")

    def log_teacher(outputs: Tensor, centre: Tensor) -> Tensor:
        return ((outputs.detach() - centre.detach().view(k).to(outputs.dtype)) / teacher_temp).log_softmax(-1)

    s = student_cls.reshape(num_crops, b, k) / student_temp
    log_p = log_teacher(teacher_cls, center).reshape(GLOBAL, b, k)
    p = log_p.exp()
    image = swapped_entropy(p, s)
    zero = image.new_zeros(())
    if not sum(counts):
        return CMDOutput((1 - region_weight) * image, image, zero, zero, zero)

    # The teacher's regions, [b, 2, T_g, ...]: those of a picture together. Its bags, [2, b, K].
    side = GLOBAL, b, counts[0], -1
    grid = log_teacher(teacher_region.reshape(side).transpose(0, 1), center_grid).exp_()
    theirs = teacher_feat.detach().reshape(side).transpose(0, 1)
    pooled = inter in ("within", "across")
    log_q = s.log_softmax(-1) if pooled else s
    weight = bag_weights(theirs.flatten(0, 1), pooling, attention_temperature).view(b, GLOBAL, -1, 1)
    beta = (weight * grid).sum(2).transpose(0, 1) if pooled else grid.sum(2).transpose(0, 1)
    log_beta = beta.clamp(min=torch.finfo(beta.dtype).tiny).log()
    unit_theirs = unit(theirs)
    # Row of the table of all teacher regions where those of picture b and crop q begin.
    offset = torch.arange(b * GLOBAL, device=grid.device).view(b, GLOBAL) * counts[0]

    region_rows = inter_rows = student_cls.new_zeros(b)
    sizes = [b * count for count in counts]
    for v, crop in enumerate(zip(student_region.split(sizes), student_feat.split(sizes), strict=True)):
        outputs, features = (x.reshape(b, counts[v], -1) for x in crop)
        partners = [q for q in range(GLOBAL) if q != v]
        own = unit(features.detach())
        matches = [matched_regions(own, unit_theirs[:, q]) for q in partners]
        number = torch.stack([match + offset[:, q, None] for (_, match), q in zip(matches, partners, strict=True)], 2)
        w = bag_weights(features, pooling, attention_temperature) if pooled else None
        cross, log_bag = bag_terms(outputs, grid.flatten(0, 2), number, w, student_temp)
        # A feature that is NaN has no match, and gives NaN.
        cross = cross + 0 * sum(best for best, _ in matches)
        region_rows = region_rows + cross.mean(1)
        y = outputs.sum(1) / student_temp if inter == "literal" else s[v]
        for q in partners:
            if inter == "within" and log_bag is not None:
                inter_rows = inter_rows + divergence(log_bag.exp(), log_bag, log_q[v])
            elif inter == "across" and log_bag is not None:
                inter_rows = inter_rows + divergence(beta[q], log_beta[q], log_q[v])
                inter_rows = inter_rows + divergence(p[q], log_p[q], log_bag)
            elif inter == "literal":
                x = beta[q]
                inter_rows = inter_rows + (torch.xlogy(x, x) - x * p[q] + torch.xlogy(y, y) - y * s[v]).mean(1)
    pairs = 2 * num_crops - 2
    region, between = global_mean(region_rows) / pairs, global_mean(inter_rows) / pairs
    loss = (1 - region_weight) * image + region_weight * region
    loss = loss if inter == "none" else loss + inter_weight * between
    own_term = global_mean(divergence(beta, log_beta, log_p).mean(0)) if pooled else zero
    return CMDOutput(loss, image, region, between, own_term)


@over_group
@full_precision(keep=("center", "center_grid"))
def esvit_loss(
    student_cls: Float[Tensor, "vb outcomes"],
    student_region: Float[Tensor, "rows outcomes"],
    student_feat: Float[Tensor, "rows dim"],
    teacher_cls: Float[Tensor, "teacher_images outcomes"],
    teacher_region: Float[Tensor, "teacher_rows outcomes"],
    teacher_feat: Float[Tensor, "teacher_rows dim"],
    regions: Sequence[int],
    num_crops: int,
    center: Float[Tensor, "*one outcomes"],
    center_grid: Float[Tensor, "*one outcomes"],
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    literal_mil: bool = False,
) -> Float[Tensor, ""]:
    """Compute EsViT's loss (Li et al., arXiv 2106.09785), or that of CMD's released code.

    Args:
        student_cls: see `cmd_loss`, as for all arguments but the last.
        literal_mil: add the released inter-level term, which is NaN where a bag's logits have a negative sum. Default: no.

    This is `cmd_loss` with inter="none" or "literal", the function that trains. Errors are those of `cmd_loss`.

    >>> zeros = torch.zeros(2, 3)
    >>> esvit_loss(zeros, zeros, zeros, zeros, zeros, zeros, [1], 2, zeros[0], zeros[0])
    tensor(1.0986)
    """
    return cmd_loss(
        student_cls, student_region, student_feat, teacher_cls, teacher_region, teacher_feat, regions, num_crops,
        center, center_grid, student_temp, teacher_temp, inter="literal" if literal_mil else "none",
    ).loss  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the learner


@dataclass
class CMDConfig(SelfDistilledConfig):
    """Settings of CMD. Defaults are those of the released code, for Swin-T; the paper starts from EsViT's ImageNet weights."""

    encoder: str = "timm:swin_tiny_patch4_window7_224"
    batch_size: int = 512
    inter: Inter = "within"
    """Inter-level term: within a network, across (the other network's level), literal (the released code), or none (EsViT)."""
    inter_weight: float = 1.0
    """Weight of the inter-level term, at least 0."""
    pooling: Pooling = "mean"
    """Weights of a bag's regions: mean, or attention (by their cosine with the mean region)."""
    attention_temperature: float = 0.1
    """Temperature of the attention, > 0."""
    region_weight: float = 0.5
    """Share of the region level in EsViT's loss, 0 to 1; 0: DINO's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("attention_temperature")
        self.need_share("region_weight")
        self.need_weight("inter_weight")


class CMD(SelfDistilledLearner):
    """A student of all crops and a teacher of the global ones, each with two heads: for images and for regions."""

    config: CMDConfig
    center_grid: Tensor
    region_projector: DINOHead

    def __init__(self, config: CMDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.register_buffer("center_grid", torch.zeros(config.projection))

    def build_projector(self, dim: int) -> DINOHead:
        """Build both heads; the width of regions is measured on a black picture."""
        projector = super().build_projector(dim)
        self.region_projector = self.head(map_shape(self.encoder, self.size)[0])
        return projector

    @property
    def network(self) -> TwoLevels:
        return TwoLevels(self.encoder, self.projector, self.region_projector)

    @property
    def heads(self) -> list[DINOHead]:
        return [self.projector, self.region_projector]

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return map_networks(self.encoder)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, views = self.config, batch["views"]
        large = torch.cat(views[:GLOBAL])
        teacher: Levels = self.teacher([large])
        student = self.network([large, torch.cat(views[GLOBAL:])] if len(views) > GLOBAL else [large])
        found = cmd_loss(
            *(student.image, student.region, student.feature, teacher.image, teacher.region, teacher.feature),
            *(student.regions, len(views), self.center, self.center_grid),
            *(config.student_temperature, self.teacher_temperature()),
            inter=config.inter, inter_weight=config.inter_weight, pooling=config.pooling,
            region_weight=config.region_weight, attention_temperature=config.attention_temperature,
        )  # fmt: skip
        self.center.copy_(moved_center(self.center, teacher.image, config.center_momentum))
        self.center_grid.copy_(moved_center(self.center_grid, teacher.region, config.center_momentum))
        return {name: value if name == "loss" else value.detach() for name, value in found._asdict().items()}

    @torch.no_grad()
    def divergences(self, batch: dict[str, Any]) -> Float[Tensor, "n 2"]:
        """Compute KL(beta || softmax(s)) of the student on whole pictures, pooled by mean and by attention."""
        image, region, feature, _ = self.network([batch["image"]])
        region, feature = (rows.view(len(image), -1, rows.shape[1]) for rows in (region, feature))
        temperatures = self.config.student_temperature, self.config.attention_temperature
        return torch.stack([bag_divergence(image, region, feature, p, *temperatures) for p in get_args(Pooling)], 1)

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure how far the bag of regions lies from the picture's own distribution, in nats."""
        bag, key = survey.over(split, self.divergences).double().mean(0).tolist()
        return super().measures(survey, split) | {"bag_divergence": bag, "key_divergence": key}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw matched regions of two crops, and the weights of attention on whole pictures, both by the teacher's features."""

        @torch.no_grad()
        def features(images: Tensor) -> Tensor:
            return feature_map(cast(TwoLevels, self.teacher.module).encoder, images.to(self.device))

        return region_figures(survey.split("valid"), features, self.views, self.config.attention_temperature)


SYSTEM = System(
    slug="cmd",
    task="views",
    config=CMDConfig,
    learner=CMD,
    data="cifar10",
    # As DINO's for convolutional networks: batch normalisation in the heads, constant weight decay, no warm-up of the
    # temperature.
    recipe=LAPTOP
    | {
        "epochs": 12,
        "recipe": "dino-cifar",
        "local_crops": 4,
        "final_weight_decay": None,
        "bottleneck": 128,
        "head_norm": True,
        "projection": 1024,
        "teacher_temperature": 0.04,
        "teacher_warmup": 0,
        "momentum_teacher": 0.99,
    },
)
