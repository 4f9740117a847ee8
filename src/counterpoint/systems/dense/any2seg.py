"""Any2Seg: segment from any sensors, by a fusion that selects a sensor for each pixel and relations of a language model.

Zheng, Lyu, Wang: "Learning Modality-agnostic Representation for Semantic Segmentation from Any Modalities", ECCV 2024, arXiv
2407.11351. The authors published no source. The fusion is that of the group's compiled model file, run on arrays.

    counterpoint train any2seg --data sensors
    counterpoint train clip --data "masks:mine?modalities=rgb,depth" --out runs --name teacher
    counterpoint train any2seg --data "masks:mine?modalities=rgb,depth" --teacher run:runs/teacher

    symbol     here             shape              meaning
    F_m        features         [M, B, C, h, w]    map of modality m: class logits, or maps of the encoder (`level`)
    f          anchor           [B, C, h, w]       mean of the F_m, with the previous f_ma where one is given
    rho_m      correlation      [M, B]             cos(F_m, f) of a sample's flattened maps (Eq. 1)
    g                           [B, C, h, w]       sum of rho_m F_m
    m*         selected_index   [B, h, w]          modality nearest to g at a pixel
    f_ma       fused            [B, C, h, w]       F_m* + mean of the F_m, the modality-agnostic feature
    M^e, M^f   rows             [B, M]             agreement with the sentence: of the teacher; of the student, rho
    R^t, R^s                    [K, K]             cosines of class texts; of the classes' mean features

    L = L_sup + lambda L_cr + beta L_se            (Eqs. 7, 2, 5)

The fusion is in core/map_fusion.py, the classes' mean features in core/map_sums.py, the teacher's rows in tasks/scene_teachers.py.

Unknown in the paper and chosen here: both distances (KL, or mean squared error), temperatures, weights. The prototypes of L_se are
means of the decoder's features, fused like the logits. Differences: LanguageBind and the LLaMA-Adapter are not in transformers. A
model like CLIP and captions of the data, or class names, replace them. The learning rate falls on half a cosine, not as a power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from counterpoint.core.checks import need_positive, need_rows, need_word, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.map_fusion import Output, chosen_modalities, modality_agnostic_fusion
from counterpoint.core.map_sums import Map, Maps, class_means, mean_weights, weighted_sum
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.any_modalities import AnyModalitiesConfig, AnyModalitiesLearner, Outputs
from counterpoint.tasks.dense import LAPTOP, pixel_cross_entropy
from counterpoint.tasks.scene_teachers import (
    TextTeacher,
    agreement,
    check_class_text,
    check_scene_teacher,
    scene_teacher,
    text_rows,
)
from counterpoint.words import counted

Distance = Literal["kl", "mse"]
FAR = -1e9  # logit of an entry that does not take part

# -------------------------------------------------------------------------------------------------------------- relations


def _divergence(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Compute KL(softmax(teacher) || softmax(student)) over the last axis, of the entries in the mask."""
    own, target = (torch.where(mask, x / temperature, FAR).log_softmax(-1) for x in (student, teacher))
    return torch.where(mask, target.exp() * (target - own), 0.0).sum(-1)


@over_group
@full_precision(keep=("present",))
def inter_modal_loss(
    student_row: Float[Tensor, "*n modalities"],
    teacher_row: Float[Tensor, "*n modalities"],
    temperature: float = 1.0,
    present: Bool[Tensor, "*n modalities"] | None = None,
    distance: Distance = "kl",
) -> Float[Tensor, ""]:
    """Compute L_cr: the modalities' relative agreement with the scene follows the teacher's (Eq. 2).

    Args:
        student_row: M^f, the correlations rho of each sample or of one; `modality_agnostic_fusion` returns them as [M, n].
        teacher_row: M^e, cosines of each modality's embedding with the sentence's; no gradient.
        temperature: t > 0, by default 1.
        present: whether a sample has a modality. Default: all.
        distance: "kl" (default), KL(softmax(M^e / t) || softmax(M^f / t)), or "mse", the mean squared error.

    Returns the mean over samples. One modality: 0. Raises ValueError for shapes that do not fit and an empty batch.

    >>> inter_modal_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(0.3278)
    """
    mask = torch.ones_like(student_row, dtype=torch.bool) if present is None else present.bool()
    if student_row.ndim not in (1, 2) or not student_row.shape == teacher_row.shape == mask.shape:
        raise ValueError(
            f"rows must be [n, modalities] alike, got {shapes(student_row=student_row, teacher_row=teacher_row, present=mask)}"
        )
    need_rows(student_row=student_row)
    need_positive(temperature=temperature)
    need_word(get_args(Distance), distance=distance)
    if student_row.ndim == 1:
        student_row, teacher_row, mask = student_row[None], teacher_row[None], mask[None]
    target = teacher_row.detach()
    if distance == "kl":
        return global_mean(_divergence(student_row, target, mask, temperature))
    error = torch.where(mask, student_row - target, 0.0).square().sum(1)
    return global_mean(error / mask.sum(1).clamp(min=1))


@over_group
@full_precision(keep=("class_text", "present"))
def intra_modal_loss(
    student_prototypes: Float[Tensor, "*n classes dim"],
    class_text: Float[Tensor, "classes text"],
    present: Bool[Tensor, "*n classes"],
    temperature: float = 1.0,
    distance: Distance = "kl",
) -> Float[Tensor, ""]:
    """Compute L_se: cosines between the classes' features follow those between the classes' names (Eq. 5).

    Args:
        student_prototypes: mean feature of each class, of one batch or of each of n images; any numbers where it is absent.
        class_text: text embeddings of the names; no gradient.
        present: whether a class is there. Absent ones count neither as rows nor as columns.
        temperature: t > 0, by default 1.
        distance: "kl" (default), row by row as in `inter_modal_loss`, or "mse", the mean squared error off the diagonal.

    Returns the mean over rows, then over images. An image with fewer than two classes counts as 0. Raises ValueError for
    shapes that do not fit and an empty batch.

    >>> intra_modal_loss(torch.eye(2), torch.ones(2, 3), torch.tensor([True, True]))  # log(1 + e) - log(2) - 1/2
    tensor(0.1201)
    """
    if student_prototypes.ndim not in (2, 3) or present.shape != student_prototypes.shape[:-1]:
        raise ValueError(
            "student_prototypes must be [classes, dim] or [n, classes, dim] and present like it without dim, got "
            + shapes(student_prototypes=student_prototypes, present=present)
        )
    if class_text.ndim != 2 or len(class_text) != student_prototypes.shape[-2]:
        raise ValueError(f"class_text must be [classes, text] of {student_prototypes.shape[-2]} classes, got "
                         f"{shapes(class_text=class_text)}")  # fmt: skip
    if student_prototypes.ndim == 2:
        student_prototypes, present = student_prototypes[None], present[None]
    need_rows(student_prototypes=student_prototypes)
    need_positive(temperature=temperature)
    need_word(get_args(Distance), distance=distance)
    present = present.bool()
    rows = unit(torch.where(present[..., None], student_prototypes, 0.0))
    own = rows @ rows.transpose(1, 2)
    text = unit(class_text.detach().to(own.dtype))
    target = (text @ text.T).expand_as(own)
    both = present[:, :, None] & present[:, None, :]
    if distance == "kl":
        each = torch.where(present, _divergence(own, target, both, temperature), 0.0).sum(1)
        return global_mean(each / present.sum(1).clamp(min=1))
    both = both & ~torch.eye(both.shape[1], dtype=torch.bool, device=both.device)
    each = torch.where(both, own - target, 0.0).square().sum((1, 2))
    return global_mean(each / both.sum((1, 2)).clamp(min=1))


# --------------------------------------------------------------------------------------------------------------- settings


@dataclass
class Any2SegConfig(AnyModalitiesConfig):
    """Settings of Any2Seg. Defaults are the group's for DELIVER, and choices where the paper is silent."""

    epochs: int = 200
    batch_size: int = 4
    encoder: str = "hf:nvidia/mit-b2"
    pretrained: bool = True
    recipe: str = "supervised"
    optimizer: str = "adamw"
    lr: float = 6e-5 * 256 / 4
    weight_decay: float = 0.01
    warmup_epochs: int = 10
    fusion: Literal["mff", "mean", "concat"] = "mff"
    """mff: the paper's selecting fusion. Baselines: mean, or concat, maps side by side, where absent modalities are zeros."""
    output: Output = "selected"
    """Output of the fusion mff: selected, the selected modality plus the mean, or mean, the mean alone."""
    tokens: bool = False
    """Compute correlations for each pixel, and weight the mean by them, instead of one for each picture."""
    candidates: int = 0
    """Number of first modalities that are selected and averaged, at least 0; 0: all."""
    previous: bool = False
    """Add the fused maps of the step before, of other pictures, to the anchor, in training alone."""
    teacher: str = "hf:openai/clip-vit-large-patch14"
    """Embeds pictures and sentences: hf:NAME, run:RUN, or fit:SLUG?data=SOURCE (see counterpoint.tasks.scene_teachers)."""
    class_text: str = ""
    """Text encoder of the class names: minilm or hf:NAME. Default: the teacher's text side."""
    inter_weight: float = 1.0
    """Weight lambda of the relations between modalities, at least 0; needs the fusion mff."""
    intra_weight: float = 1.0
    """Weight beta of the relations between classes, at least 0."""
    inter_temperature: float = 1.0
    """Temperature of the relations between modalities, > 0. A small one, such as 0.07, sharpens a nearly uniform target; 0.1
    lowered results on `sensors`."""
    intra_temperature: float = 1.0
    """Temperature of the relations between classes, > 0."""
    distance: Distance = "kl"
    """Distance of relations: kl or mse."""
    pooling: Literal["image", "batch"] = "image"
    """Average the features of a class over each image, or over the batch."""
    hard_pixels: float = 0.7
    """Learn from pixels whose true class has at most this probability, and from the hardest sixteenth (OHEM), 0 to 1; 0: all
    pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("inter_temperature", "intra_temperature")
        self.need_share("hard_pixels")
        self.need_weight("inter_weight", "intra_weight", "candidates")
        if self.fusion != "mff" and (self.inter_weight or self.previous or self.tokens or self.candidates):
            raise CounterpointError(
                f"--fusion {self.fusion} has no correlations; set --inter-weight 0, and leave out previous, tokens and candidates"
            )

    def check(self) -> None:
        super().check()
        if self.inter_weight or (self.intra_weight and not self.class_text):
            check_scene_teacher(self.teacher)
        check_class_text(self.class_text)


# -------------------------------------------------------------------------------------------------------------- the learner


class Any2Seg(AnyModalitiesLearner):
    """One encoder and decoder for all modalities, and the paper's fusion or a baseline's."""

    agreement: Tensor | None = None  # [examples, M], M^e of the training scenes
    class_text: Tensor | None = None  # [K, text]

    def __init__(self, config: Any2SegConfig, data: Any, seed: int = 0) -> None:
        count = len(data.modalities)
        super().__init__(config, data, seed, beside=count if config.fusion == "concat" else 1)
        if config.candidates > count:
            raise CounterpointError(
                f"--candidates {config.candidates}: the data have {counted(count, 'modality')}; lower it"
            )
        if config.previous:
            with torch.no_grad():
                maps = self.eval()(torch.zeros(1, count, 3, self.size, self.size)).maps
            self.train()
            for n, each in enumerate(maps):  # a map of zeros does not change the anchor's direction
                self.register_buffer(f"previous_{n}", each.new_zeros(config.batch_size, *each.shape[1:]))

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config = self.config
        named = bool(config.intra_weight and config.class_text)
        inter = bool(config.inter_weight) and len(self.modalities) > 1
        if inter or (config.intra_weight and not named):
            teacher = scene_teacher(config.teacher).to(self.device)
            module: Any = teacher.module
            if inter:
                self.agreement = agreement(teacher, survey, self.modalities, self.regions)
            self.class_text = text_rows(module.text, self.regions) if config.intra_weight else None
        if named:
            encoder = TextTeacher(config.class_text).eval()
            self.class_text = text_rows(encoder.text, self.regions)

    def fused(
        self, maps: list[Maps], present: Bool[Tensor, "modalities n"], previous: list[Map] | None = None
    ) -> Outputs:
        config, late = self.config, self.config.level == "logits"
        present = present | ~present.any(0)  # the maps of a sample without any modality are zeros
        weight = mean_weights(present, maps[0].dtype)
        if config.fusion != "mff":
            joined = (
                [weighted_sum(x, weight) for x in maps]
                if config.fusion == "mean"
                else [(x * present[..., None, None, None]).transpose(0, 1).flatten(1, 2) for x in maps]
            )
            features = joined[0] if late else self.decoder(joined)
            return Outputs(self.classifier(features), features, None, None, joined)
        given = [self.classifier(maps[0].flatten(0, 1)).unflatten(0, present.shape)] if late else maps
        before: Sequence[Map | None] = previous or [None] * len(given)
        limit, options = config.candidates or None, {"tokens": config.tokens, "output": config.output}
        found = [modality_agnostic_fusion(x, f, limit, present, **options) for x, f in zip(given, before, strict=True)]
        fused = [each.fused for each in found]
        rho = torch.stack([each.correlation for each in found]).mean(0)
        index = found[0].selected_index
        if not late:
            features = self.decoder(fused)
            return Outputs(self.classifier(features), features, rho, index, fused)
        share = weight[..., None, None] + (chosen_modalities(index, len(present)) if config.output == "selected" else 0)
        return Outputs(fused[0], weighted_sum(maps[0], share), rho, index, fused)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        (pictures,), (masks,) = batch["views"], batch["masks"]
        here = self.seen(batch)
        maps = self.encoded(pictures if pictures.ndim == 5 else pictures[:, None], here)
        out = self.fused(maps, here, self.carried(len(masks)) if config.previous else None)
        if config.previous:
            self.carry(out.maps)
        found = {"supervised": pixel_cross_entropy(self.upsampled(out.logits), masks, config.hard_pixels)}
        loss = found["supervised"]
        if self.agreement is not None and out.correlation is not None:
            rows = self.agreement[batch["index"].cpu()].to(out.correlation)
            temperature = config.inter_temperature
            found["inter"] = inter_modal_loss(out.correlation.T, rows, temperature, here.T, config.distance)
            loss = loss + config.inter_weight * found["inter"]
        if self.class_text is not None:
            means, shown = class_means(out.features, masks, len(self.regions), config.pooling == "batch")
            settings = (config.intra_temperature, config.distance)
            found["intra"] = intra_modal_loss(means, self.class_text.to(means.device), shown, *settings)
            loss = loss + config.intra_weight * found["intra"]
        return {"loss": loss} | {name: value.detach() for name, value in found.items()}

    def carried(self, rows: int) -> list[Map]:
        """Return this process's share of the fused maps of the step before."""
        _, mine = self.share(rows)
        return [value[mine] for name, value in self.named_buffers() if name.startswith("previous_")]

    def carry(self, maps: list[Map]) -> None:
        for n, each in enumerate(maps):
            self.get_buffer(f"previous_{n}").copy_(self.whole(each.detach()))


# A CLIP of the four sensors and captions of other scenes: 128 steps, a minute or two.
TEACHER = (
    "fit:clip?data=sensors%3Fseed=1000%26valid=60%26test=60&image_encoder=conv-s&batch_size=100&epochs=16&evaluate_every=16"
    "&lr=0.004"
)

SYSTEM = System(
    slug="any2seg",
    task="dense",
    config=Any2SegConfig,
    learner=Any2Seg,
    data="sensors",
    recipes={
        "sensors": LAPTOP
        | {
            "encoder": "conv-s",
            "pretrained": False,
            "recipe": "weak",
            "batch_size": 8,
            "epochs": 10,
            "lr": 0.064,
            "width": 32,
            "hard_pixels": 0.0,
            "teacher": TEACHER,
        }
    },
    recipe=LAPTOP | {"encoder": "conv-s", "pretrained": False, "recipe": "weak", "width": 64, "hard_pixels": 0.0},
)
