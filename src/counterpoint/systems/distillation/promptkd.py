"""PromptKD: a small CLIP learns a domain from pictures without labels, by prompts and a stored classifier of a large CLIP.

Li, Li, Fu, Zhang, Wang, Chen, Yang: "PromptKD: Unsupervised Prompt Distillation for Vision-Language Models", CVPR 2024, arXiv
2403.02781. Stage `tune` is PromptSRC (Khattak et al., ICCV 2023, arXiv 2307.06948).

    symbol   here                meaning
    W        prototypes          the teacher's unit embeddings of all class texts, computed once and stored
    U, q_T   teacher_rows        the teacher's unit embedding of the augmented picture, and its logits s_T U W^T
    P_i      prompts             n vectors appended to the student's tokens before block i < J
    h        features            the student's features with prompts, not normalised
    u, q_S   projected           unit(projector(h)), and the student's logits s_S u W^T
    lambda   kd_weight           weight of the divergence, which is divided by the number of classes C
    tau      temperature         divisor of both logits

    L = lambda tau^2 KL(softmax(q_T / tau) || softmax(q_S / tau)) / C

Prompts and projector are in encoders/prompts.py, stage `tune` in tasks/tuned_teachers.py.

    counterpoint train promptkd --student hf:openai/clip-vit-base-patch16 --teacher hf:openai/clip-vit-large-patch14 \
        --data imagefolder:mine --base 0.5 --tune-epochs 20

Stage `tune` learns prompts in both towers of the teacher from `--shots` labelled pictures of each base class. It runs where
`--tune-epochs` is above 0. Stage `distill` trains the student's prompts and projector on all training pictures, without any
label. All weights of both networks stay frozen: without its prompts the student is the network that it was.

Differences from the authors' code: biases and normalisation layers have no weight decay. W is computed once, not in every step.
Text prompts after the first block, and a teacher's picture prompts, need transformers. The 60 templates of PromptSRC are no
default: `--frozen-templates FILE` takes them. Not built: CoOp and other ways of stage 1; a teacher tuned on other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.class_texts import class_prototypes, cosine_text_logits
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import EPS
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.data.images import ImageData, Indices
from counterpoint.encoders.dual import DualEncoder
from counterpoint.encoders.prompts import (
    Projector,
    blocks_of,
    new_prompts,
    prompt_names,
    prompt_projector,
    prompt_width,
    prompted_vit,
)
from counterpoint.engine.optim import held_then_cosine
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import parameters
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.class_teachers import SHAPES_TEACHER, check_class_teacher, open_network
from counterpoint.tasks.class_texts import texts_of
from counterpoint.tasks.image_towers import ImageTower, tower_facts
from counterpoint.tasks.kept_classes import class_curves, labelled_rows
from counterpoint.tasks.labelled import cross_entropy
from counterpoint.tasks.tuned_teachers import TunedConfig, TunedLearner
from counterpoint.words import counted

COLD = 1e-5  # learning rate of the first epochs

# ------------------------------------------------------------------------------------------------------------ equations


@over_group
@full_precision
def prompt_distillation_loss(
    student_logits: Float[Tensor, "n classes"],
    teacher_logits: Float[Tensor, "n classes"],
    temperature: float = 1.0,
    kd_weight: float = 1000.0,
) -> Float[Tensor, ""]:
    """Compute lambda tau^2 KL(softmax(q_T / tau) || softmax(q_S / tau)) / C, the mean over the pictures of all processes.

    Args:
        student_logits, teacher_logits: q_S and q_T over all classes; the teacher's get no gradient.
        temperature: tau > 0, by default 1.
        kd_weight: lambda, at least 0, by default 1000. A plain mean divergence has the weight lambda / C.

    Raises ValueError for shapes that differ, an empty batch, and numbers out of range. One class gives 0.

    >>> prompt_distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]]), kd_weight=2.0)
    tensor(0.6031)
    """
    if not kd_weight >= 0:
        raise ValueError(f"kd_weight must be at least 0, got {kd_weight}")
    need_alike("n classes", student_logits=student_logits, teacher_logits=teacher_logits)
    need_positive(temperature=temperature)
    own = F.log_softmax(student_logits / temperature, 1)
    with torch.no_grad():  # two sums, of which the first needs no gradient: `kd` writes the matrix of all terms
        target = F.softmax(teacher_logits / temperature, 1)
        constant = -torch.special.entr(target).sum(1)
    divergence = constant - torch.linalg.vecdot(target, own)
    return global_mean(divergence) * temperature**2 * kd_weight / student_logits.shape[1]


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class PromptKDConfig(TunedConfig):
    """Settings of PromptKD. Defaults are the authors' for base and novel classes; learning rates are for a batch of 256."""

    epochs: int = 20
    """Passes over the pictures in stage `distill`."""
    batch_size: int = 8
    """Pictures in a batch, in both stages."""
    student: str = "hf:openai/clip-vit-base-patch16"
    """The student, a network of pictures and texts with a vision transformer: hf:NAME, open_clip:MODEL/WEIGHTS, run:RUN or
    fit:SLUG?data=SOURCE of clip. Empty: --encoder, such as timm:NAME, with --pretrained."""
    teacher: str = "hf:openai/clip-vit-large-patch14"
    recipe: str = "supervised"
    optimizer: str = "sgd"
    lr: float = 0.16  # 0.005 for a batch of 8
    weight_decay: float = 5e-4
    cold_epochs: int = 1
    """Number of first epochs, at least 0, at a constant learning rate of 1e-5. A stage with no more epochs than this leaves
    them out."""
    prompt_depth: int = 9
    """J, number of blocks with prompts of their own, 0 (no prompts) to the student's number of blocks."""
    projector_layers: int = 2
    """Linear layers of the projector, 0 to 3. 0 needs a student as wide as the class texts."""
    temperature: float = 1.0
    """tau, which divides the logits of student and teacher, > 0."""
    kd_weight: float = 1000.0
    """lambda of the objectives kl, l1 and mse, at least 0."""
    objective: Literal["kl", "l1", "mse", "ce", "none"] = "kl"
    """kl: the method. l1, mse: mean absolute or squared difference of unit features. ce: cross-entropy of the labels of base
    classes (--shots of each). none: train nothing, and measure a --student with its own class texts."""
    texts: Literal["teacher", "own"] = "teacher"
    """Class texts of the student: the teacher's, or those of the student's own text encoder."""
    trains: Literal["prompts", "all"] = "prompts"
    """Train prompts and projector, or also the student's own weights."""
    shuffled: bool = False
    """A control: in training, the student gets the class texts in another order."""
    transductive: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    unlabelled_suffices: ClassVar[bool] = True

    @classmethod
    def of_names(cls, teacher: str, student: str) -> dict[str, Any]:
        """Return the settings of `counterpoint distill`: a network of pictures and texts, or an encoder in its place."""
        both = student.partition(":")[0] in ("run", "fit", "hf", "open_clip")
        return {"teacher": teacher} | ({"student": student} if both else {"student": "", "encoder": student})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        self.need_weight("kd_weight", "prompt_depth", "cold_epochs")
        if not 0 <= self.projector_layers <= 3:
            raise CounterpointError(f"projector_layers must lie in 0 to 3, got {self.projector_layers}")
        if self.texts == "own" and (not self.student or self.objective in ("l1", "mse")):
            raise CounterpointError(
                "texts own needs a --student with a text encoder, and the objective kl, ce or none; l1 and mse compare with the "
                "teacher's rows"
            )
        if self.objective == "none" and not self.student:
            raise CounterpointError(
                "objective none measures a --student with a text encoder; an encoder alone has no classes"
            )
        if self.objective != "none" and not self.prompt_depth and not self.projector_layers and self.trains != "all":
            raise CounterpointError("the student has neither prompts nor a projector to train; set --prompt-depth")

    def check(self) -> None:
        super().check()
        if self.student:
            check_class_teacher(self.student, "student")
        if self.student.startswith("file:"):
            raise CounterpointError(f"--student {self.student}: embeddings alone do not learn; name a network")

    def trained_on(self, rows: Indices, data: ImageData) -> Indices:
        """Select all training pictures, also those without a class: no label enters the distillation."""
        if self.objective != "ce":
            return np.arange(len(data.train))
        self.need_labels(data, "--objective ce")
        return rows

    def facts(self, data: ImageData) -> dict[str, Any]:
        return super().facts(data) | {"student": tower_facts(self.student) if self.student else None}


# ---------------------------------------------------------------------------------------------------------- the learner


class PromptKD(TunedLearner):
    """A frozen image tower with prompts, and a projector into the teacher's space."""

    own: Tensor
    student_scale: Tensor

    def __init__(self, config: PromptKDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        depth, layers = config.prompt_depth, config.projector_layers
        if depth and depth > len(blocks_of(self.encoder)):
            raise CounterpointError(
                f"prompt_depth {depth} is more than the {counted(len(blocks_of(self.encoder)), 'block')} of the student; lower "
                "--prompt-depth"
            )
        width, dim = self.encoder.dim, self.encoder.dim if config.texts == "own" else self.taught
        if not layers and width != dim:
            raise CounterpointError(
                f"projector_layers 0 needs equal widths; the student's is {width}, that of the class texts {dim}: set "
                "--projector-layers 1 to 3"
            )
        self.encoder.requires_grad_(config.trains == "all")
        self.prompts = new_prompts(config.prompts, [prompt_width(self.encoder)] * depth if depth else [])
        self.projector = Projector(width, *[dim] * layers) if layers else None
        self.register_buffer("own", torch.zeros(data.classes, width))  # the student's own class texts
        self.register_buffer("student_scale", torch.tensor(100.0))
        self.order = torch.randperm(data.classes, generator=torch.Generator().manual_seed(seed))  # of the control

    def build_encoder(self, data: Any) -> Any:
        return ImageTower(data.student) if self.config.student else super().build_encoder(data)

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config = self.config
        if config.student:
            network = open_network(config.student)
            if not self.own.any():  # else a parent's weights are there
                cast("ImageTower", self.encoder).take(network, config.student)
            words = texts_of(survey.classes, config.templates, config.class_names, config.descriptions)
            with torch.no_grad():
                texts = network.texts([text for of in words for text in of]).unflatten(0, (len(words), -1))
            self.own.copy_(class_prototypes(texts))
            self.student_scale.fill_(network.scale)

    def train(self, mode: bool = True) -> PromptKD:
        super().train(mode)
        self.encoder.train(mode and self.config.trains == "all")  # else neither dropout nor running statistics
        return self

    # --- stages

    def stages(self) -> list[Stage]:
        """Return `tune` where the teacher is tuned, and `distill`."""
        config = self.config
        parts = [self.prompts, self.projector, self.encoder if config.trains == "all" else None]
        trained: list[nn.Module] = [part for part in parts if part is not None]
        few = self.few if config.objective == "ce" else None
        return self.tuned_first(
            Stage("distill", config.epochs, lambda: trained, lambda: self.turn(config.lr, trained), batches=few)
        )

    def turn(self, lr: float, modules: Sequence[nn.Module]) -> list[Turn]:
        config = replace(self.config, lr=lr)
        curve = held_then_cosine(self.epochs, config.cold_epochs, COLD / (lr * config.batch_size / 256))
        return [self.turn_of(modules, config, curve=curve)]

    # --- a step of `distill`

    def features(self, images: Tensor) -> Float[Tensor, "n width"]:
        """Compute h, the student's features with prompts."""
        named = dict(zip(prompt_names(len(self.prompts)), self.prompts, strict=True))
        return prompted_vit(images, named, 0, 0, len(named), self.config.prompts, tower=self.encoder)

    def projected(self, images: Tensor) -> Float[Tensor, "n dim"]:
        """Compute u; without a projector the unit features; for the objective none those without prompts."""
        h = self.encoder(images) if self.config.objective == "none" else self.features(images)
        if self.projector is None or self.config.objective == "none":
            return F.normalize(h, dim=1, eps=EPS)
        named = dict(self.projector.named_parameters()) | dict(self.projector.named_buffers())
        return prompt_projector(h, named, self.training, layers=self.projector)

    def class_rows(self) -> Float[Tensor, "classes dim"]:
        """Return the class texts of the student."""
        return self.own if self.config.texts == "own" or self.config.objective == "none" else self.prototypes

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.tuning:
            return self.tuning_loss(batch)
        config, images = self.config, batch["views"][0]
        if config.objective == "none":
            return {"loss": torch.stack([0 * one.sum() for one in self.parameters() if one.requires_grad]).sum()}
        rows, texts = self.projected(images), self.class_rows()
        if config.objective == "ce":
            logits = cosine_text_logits(rows, texts[: self.base], self.student_scale)
            return {"loss": cross_entropy(logits, batch["label"])}
        teacher = F.normalize(self.teacher_rows(batch), dim=1, eps=EPS)
        if config.objective == "kl":
            texts = texts[self.order.to(texts.device)] if config.shuffled else texts
            logits, taught = cosine_text_logits(rows, texts, self.student_scale), self.classify(teacher)
            return {"loss": prompt_distillation_loss(logits, taught, config.temperature, config.kd_weight)}
        distance = (rows - teacher).abs() if config.objective == "l1" else (rows - teacher).square()
        return {"loss": config.kd_weight * global_mean(distance.mean(1))}

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return ()  # prompts enter between the blocks, outside the encoder's own forward pass

    # --- what it learned

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = self.embed(batch["image"])
        logits = self.student_scale * rows @ self.class_rows().T
        return {"feature": rows, "logits": logits, **self.of_teacher(batch)}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw each class's accuracy: the student before and after, and its teacher; base classes first."""
        rows, labels = labelled_rows(survey, "test")

        def every(batch: dict[str, Any]) -> Tensor:
            found = self.predict(batch)
            before = F.normalize(self.encoder(batch["image"]), dim=1, eps=EPS) @ self.own.T
            return torch.stack([before, found["logits"], found.get("teacher_logits", before)], 1)

        drawn = {"student before": bool(self.own.any()), "student": True, "teacher": self.network is not None}
        parts = zip(drawn.items(), survey.over("test", every, rows).unbind(1), strict=True)
        found = class_curves({name: part for (name, there), part in parts if there}, labels, self.base)
        own = self.encoder.network.tower if isinstance(self.encoder, ImageTower) else self.encoder
        if self.network is not None and parameters(own) > parameters(cast("DualEncoder", self.network.module).tower):
            found["caption"] += " The student is larger than its teacher."
        return {"Classes": found}


STUDENT = (
    "fit:clip?data=styled-shapes%3Ftrain=3072%26drop=0.0%26seed=911%26styles=plain-bright&image_encoder=vit-conv"
    "&embedding=32&recipe=none&epochs=5&batch_size=64&lr=0.004&warmup_epochs=1&schedule=step&weight_decay=0.01"
    "&evaluate_every=20"
)
SYSTEM = System(
    slug="promptkd",
    task="labelled",
    config=PromptKDConfig,
    learner=PromptKD,
    data="styled-shapes?styles=outline-striped",
    recipe={
        "teacher": SHAPES_TEACHER,
        "student": STUDENT,
        "recipe": "none",
        "base": 0.5,
        "batch_size": 64,
        "prompt_depth": 2,
        "epochs": 6,
        "optimizer": "adamw",
        "lr": 4e-3,
        "weight_decay": 0.0,
        "cold_epochs": 0,
        "schedule": "step",
        "evaluate_every": 3,
    },
)
