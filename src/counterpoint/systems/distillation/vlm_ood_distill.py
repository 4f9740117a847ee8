"""VLM-OOD distillation: a student of labelled pictures classifies classes that it never saw, by the teacher's texts of their names.

Li, Fang, Liu, Ling, Tu, Su: "Distilling Large Vision-Language Model with Out-of-Distribution Generalizability", ICCV 2023, arXiv
2307.03135.

    symbol       here             meaning
    s            projected        the student's features, as wide as the teacher's
    t            known            the teacher's embeddings of the pictures without augmentation, computed once
    w            prototypes       embeddings of the classes' texts
    T            temperature      0.07
    L-cls        language         cross-entropy of cos(s, w) / T
    L-vlalign    language         KL(teacher || student) over the classes whose texts are nearest to t, at temperature T
    L-cap        language         contrast with the picture's own caption, without a temperature
    L-mse        visual           squared distance of the unit rows s and t
    L-im-cst     visual           contrast of s with its own t among the batch's

`counterpoint train vlm-ood-distill --base 0.5 --data imagefolder:mine` learns from the first half of the classes, and measures the
second half by their texts. The texts come from `--templates` and `--descriptions` (sentences on shape, colour and parts, which make
texts separable).

The contrast sees the pictures of all processes. The learning rate falls on half a cosine, not in steps. Not built: prompt learning
(CoOp) of the class texts, and few-shot learning of the new classes by training or by retrieval.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_numbers, need_positive, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, mean_of_total
from counterpoint.core.operands import EPS, positive_similarity, scaled
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Where
from counterpoint.core.world import over_group
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.class_teachers import ClassTextConfig, ClassTextLearner
from counterpoint.tasks.kept_classes import class_shares, labelled_rows
from counterpoint.words import counted

# ------------------------------------------------------------------------------------------------------------ equations


@full_precision
def vision_language_alignment(
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    topk: int = 256,
    filter_misaligned: bool = True,
) -> Float[Tensor, ""]:
    """Compute L-vlalign: KL(softmax of the teacher || softmax of the student) over the teacher's k best classes of each picture.

    Args:
        student, teacher: logits by the same texts.
        labels: class numbers, for the filter.
        topk: k, at least 1; all classes where there are fewer. By default 256. k = 1 gives 0.
        filter_misaligned: leave out pictures whose class the teacher gets wrong (default).

    The mean is over the kept pictures of all processes; it is 0 without any.
    """
    need_alike("n classes", student=student, teacher=teacher)
    student, teacher = wide(student), wide(teacher)
    need_positive(topk=topk)
    best, at = teacher.topk(min(topk, teacher.shape[1]), 1)
    p = best.log_softmax(1)
    rows = (p.exp() * (p - student.gather(1, at).log_softmax(1))).sum(1)
    kept = teacher.argmax(1) == labels if filter_misaligned else torch.ones_like(labels, dtype=torch.bool)
    count = gather_rows(kept.sum()[None]).sum()
    return mean_of_total((rows * kept).sum(), count.clamp(min=1))


@full_precision
def feature_contrast(
    student: Float[Tensor, "n dim"], teacher: Float[Tensor, "n dim"], temperature: float, bidirectional: bool = True
) -> Float[Tensor, ""]:
    """Compute L-im-cst: cross-entropy of each student's row with its own teacher's row among those of all processes.

    Args:
        student, teacher: unit rows.
        temperature: > 0.
        bidirectional: the mean of both directions (default); else student to teacher alone.
    """
    need_positive(temperature=temperature)
    need_alike("n dim", student=student, teacher=teacher)
    query = scaled(student, temperature)
    out = batch_logsumexp(query, teacher, columns=bidirectional)
    found = out.rows if out.columns is None else (out.rows + out.columns) / 2
    return global_mean(found - positive_similarity(query, teacher))


@full_precision
def caption_contrast(
    student: Float[Tensor, "n dim"], captions: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Compute L-cap: contrast with the own caption; captions of other pictures of the same class are left out.

    Cosines have no temperature, as in the authors' code.

    Args:
        student, captions: unit rows.
        labels: class numbers.
    """
    need_alike("n dim", student=student, captions=captions)
    every = gather_rows(labels)

    def alike(rows: slice, columns: slice) -> Tensor:
        at = [torch.arange(len(every), device=every.device)[part] for part in (rows, columns)]
        return (every[rows, None] == every[None, columns]) & (at[0][:, None] != at[1])

    out = batch_logsumexp(student, captions, exclude=Where(alike))
    return global_mean(out.rows - positive_similarity(student, captions))


@over_group
@full_precision
def vlm_ood_distillation_loss(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    text: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " n"],
    *,
    temperature: float = 0.07,
    topk: int = 256,
    filter_misaligned: bool = True,
    use_cls: bool = True,
    vlalign_only: bool = False,
    use_mse: bool = True,
    use_mse_unnorm: bool = False,
    use_contrastive: bool = True,
    bidirectional: bool = True,
    captions: Float[Tensor, "n dim"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Compute the sum of the chosen losses, each of weight 1, and the parts language_loss, mse_loss, contrastive_loss.

    Args:
        student, teacher: features of the pictures, normalised here; the teacher's without gradient.
        text: embeddings of the classes' texts, normalised here.
        labels: class numbers, 0 to classes - 1.
        temperature: T > 0, by default 0.07.
        topk: k of L-vlalign; -1: without L-vlalign. By default 256.
        filter_misaligned: L-vlalign leaves out pictures that the teacher gets wrong.
        use_cls: L-cls, and with it the other language losses; by default on.
        vlalign_only: leave out L-cls itself.
        use_mse: L-mse; by default on.
        use_mse_unnorm: ln(1 + mean squared distance of the features as they are / 10) instead of L-mse.
        use_contrastive: L-im-cst; by default on.
        bidirectional: L-im-cst in both directions.
        captions: embeddings of the pictures' captions, for L-cap; default: without.

    Raises ValueError for shapes that do not fit, an empty batch, and labels or numbers out of range.

    >>> same = torch.eye(2)
    >>> vlm_ood_distillation_loss(same, same, same, torch.tensor([0, 1]), use_cls=False, use_contrastive=False)[0]
    tensor(0.)
    """
    need_positive(temperature=temperature)
    need_alike("n dim", student=student, teacher=teacher)
    if text.ndim != 2 or text.shape[1] != student.shape[1] or labels.shape != student.shape[:1]:
        raise ValueError(f"text must be [classes, dim] and labels [n], got {shapes(text=text, labels=labels)}")
    need_numbers(len(text), labels=labels)
    if topk == 0 or topk < -1:
        raise ValueError(f"topk must be at least 1, or -1 for none, got {topk}")
    s, t, w = (F.normalize(rows, dim=1, eps=EPS) for rows in (student, teacher.detach(), text))
    zero = (student * 0).sum()
    language = visual = contrast = zero
    if use_cls:
        of_student = s @ w.T / temperature
        if not vlalign_only:
            language = language + global_mean(F.cross_entropy(of_student, labels, reduction="none"))
        if topk > 0:
            language = language + vision_language_alignment(
                of_student, t @ w.T / temperature, labels, topk, filter_misaligned
            )
        if captions is not None:
            need_alike("n dim", student=student, captions=captions)
            language = language + caption_contrast(s, F.normalize(captions.detach(), dim=1, eps=EPS), labels)
    if use_mse_unnorm:
        visual = torch.log1p(global_mean((student - teacher.detach()).square().sum(1)) / 10)
    elif use_mse:
        visual = global_mean((s - t).square().sum(1))
    if use_contrastive:
        contrast = feature_contrast(s, t, temperature, bidirectional)
    parts = {"language_loss": language, "mse_loss": visual, "contrastive_loss": contrast}
    return language + visual + contrast, parts


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class VLMOODConfig(ClassTextConfig):
    """Settings of VLM-OOD distillation. Defaults are the authors' for ResNet-18."""

    epochs: int = 90
    batch_size: int = 128
    encoder: str = "torchvision:resnet18"
    recipe: str = "supervised"
    optimizer: str = "sgd"
    lr: float = 0.1  # 0.05 for a batch of 128
    weight_decay: float = 1e-4
    teacher: str = "hf:openai/clip-vit-large-patch14"
    cached: bool = True
    temperature: float = 0.07
    """T of all losses but that of captions, > 0."""
    cls: bool = True
    """Use L-cls, the cross-entropy with the classes' texts."""
    vlalign: int = 256
    """Number of classes that L-vlalign compares, those nearest to the teacher's embedding of the picture, at least 0; 0: no
    L-vlalign."""
    filter_misaligned: bool = True
    """Leave pictures that the teacher gets wrong out of L-vlalign."""
    mse: bool = True
    """Use L-mse, the squared distance of unit features."""
    mse_unnorm: bool = False
    """Instead of L-mse, use ln(1 + d / 10) with d the mean squared distance of features that are not normalised."""
    contrast: bool = True
    """Use L-im-cst, the contrast of the student's features with the teacher's."""
    bidirectional: bool = True
    """Compute L-im-cst in both directions; off: from student to teacher alone."""
    captions: str = ""
    """Text file with a caption for each training picture, one a line in their order, for L-cap. Default: without."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0 or self.vlalign < 0:
            raise CounterpointError(
                f"temperature must be > 0 and vlalign at least 0, got {self.temperature} and {self.vlalign}"
            )
        if not (self.cls or self.vlalign or self.captions or self.mse or self.mse_unnorm or self.contrast):
            raise CounterpointError("all losses are off; leave one on")
        if self.captions and self.teacher.startswith("file:"):
            raise CounterpointError("captions need a teacher with a text encoder; name a network instead of a file")


class VLMOOD(ClassTextLearner):
    """An encoder and a linear layer to the width of the teacher's features."""

    def __init__(self, config: VLMOODConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.head = nn.Linear(self.encoder.dim, self.taught)
        self.captions: Tensor | None = None  # [examples, dim]; from a file at each fit

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        file = self.config.captions
        if not file:
            return
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read ({error})") from error
        if len(lines) != survey.examples:
            raise DataError(
                f"{file}: has {counted(len(lines), 'caption')} for {survey.examples} training pictures; write one a line"
            )
        assert self.network is not None
        with torch.no_grad():
            network: Any = self.network.module
            self.captions = network.texts(lines).cpu()

    def projected(self, images: Tensor) -> Float[Tensor, "n dim"]:
        return self.head(self.encoder(images))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, rows = self.config, self.projected(batch["views"][0])
        captions = None if self.captions is None else self.captions[batch["index"].cpu()].to(rows.device)
        loss, parts = vlm_ood_distillation_loss(
            rows,
            self.teacher_rows(batch),
            self.prototypes[: self.base],
            batch["label"],
            temperature=config.temperature,
            topk=config.vlalign or -1,
            filter_misaligned=config.filter_misaligned,
            use_cls=bool(config.cls or config.vlalign or captions is not None),
            vlalign_only=not config.cls,
            use_mse=config.mse,
            use_mse_unnorm=config.mse_unnorm,
            use_contrastive=config.contrast,
            bidirectional=config.bidirectional,
            captions=captions,
        )
        return {"loss": loss} | {name: value.detach() for name, value in parts.items()}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the student's accuracy on each class beside the teacher's, base classes first."""
        known, own = labelled_rows(survey, "test")

        def both(batch: dict[str, Any]) -> Tensor:
            found = self.predict(batch)
            return torch.stack([found["logits"], found.get("teacher_logits", torch.zeros_like(found["logits"]))], 1)

        logits = survey.over("test", both, known)
        parts = logits.unbind(1)[: 1 if self.network is None else 2]
        found = [class_shares(part, own, self.base).tolist() for part in parts]  # nan: no picture
        rows = [
            [
                name,
                "base" if number < self.base else "novel",
                *("" if values[number] != values[number] else f"{values[number]:.2f}" for values in found),
            ]
            for number, name in enumerate(survey.classes)
        ]
        return {
            "Classes": {
                "kind": "table",
                "columns": ["class", "kind", "student", "teacher"][: 2 + len(found)],
                "rows": rows,
                "caption": "Share of each class's test pictures that get their class, among the base or among the novel classes.",
            }
        }


TEACHER = (
    "fit:clip?data=styled-shapes%3Ftrain=8192%26drop=0.4%26seed=902&image_encoder=conv-s&embedding=64&recipe=none&epochs=20"
    "&batch_size=128&lr=0.003&evaluate_every=20"
)
SYSTEM = System(
    slug="vlm-ood-distill",
    task="labelled",
    config=VLMOODConfig,
    learner=VLMOOD,
    data="styled-shapes?label=shape-colour",
    recipes={
        "styled-shapes": {
            "teacher": TEACHER,
            "encoder": "conv-s",
            "recipe": "none",
            "base": 0.5,
            "batch_size": 64,
            "epochs": 20,
            "optimizer": "adamw",
            "lr": 4e-3,
            "weight_decay": 0.01,
            "evaluate_every": 5,
        }
    },
)
