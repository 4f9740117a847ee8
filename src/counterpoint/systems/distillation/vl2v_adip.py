"""VL2V-ADiP: align, distill, predict; a small classifier keeps the robustness of a teacher that gives embeddings alone.

Addepalli, Asokan, Sharma, Babu: "Leveraging Vision-Language Models for Improving Domain Generalization in Image Classification",
CVPR 2024, arXiv 2310.08255.

    symbol   here                    meaning
    g        encoder                 the student's pre-trained backbone
    P        projector               linear map from its features to the teacher's space, with a bias
    t(x)     teacher_rows            the teacher's embedding of the same augmented picture, or of the picture as it is
    c_j      prototypes              unit mean of the unit embeddings of class j's texts (core/class_texts.py)
    lam      lmd                     share of the picture's embedding in the loss; the text has 1 - lam

Stage `align` trains P with g frozen, and keeps the best P on `valid`. Stage `distill` trains g with P frozen. Both minimise
`vl2v_loss`. To predict, take the class whose text is nearest to P g(x). The weights of stage `distill` are averaged over a
valley of the validation loss (SWAD, core/loss_valley.py).

    counterpoint train vl2v-adip --teacher hf:openai/clip-vit-base-patch16 --data 'imagefolder:mine?domain=folder&unseen=sketch'
    counterpoint train vl2v-adip --teacher file:embeddings.npz --from runs/x --data imagefolder:mine

`--objective ce` and `kd` are the baselines of the claim: a linear classifier, first alone and then with the backbone. It
learns from labels, or from labels and the teacher's logits.

Differences from the authors' code: a teacher network gets pictures normalised by its own statistics, not by ImageNet's
(`--foreign-statistics` restores this). A segment of SWAD is an epoch. After the end of the valley, training goes on to its last
epoch, without effect on the average. Fine-tuning of the teacher's own encoder (self-distillation) is `--from` a run of clip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_numbers, need_rows, need_within, shapes
from counterpoint.core.distil import kd
from counterpoint.core.distributed import global_mean
from counterpoint.core.loss_valley import LossValley, as_vector, from_vector
from counterpoint.core.mixing import draw_cutmix
from counterpoint.core.operands import EPS
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group
from counterpoint.encoders.adapters import adapter_parameters, keep_statistics
from counterpoint.engine.optim import constant_rate
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.class_figures import teacher_space
from counterpoint.tasks.class_teachers import SHAPES_TEACHER, ClassTextConfig, ClassTextLearner, with_foreign_statistics
from counterpoint.tasks.kept_classes import labelled_rows
from counterpoint.tasks.labelled import cross_entropy

# ------------------------------------------------------------------------------------------------------------ equations


@full_precision
def vl2v_rows(
    features: Float[Tensor, "n width"],
    labels: Int[Tensor, " n"],
    teacher_image: Float[Tensor, "n dim"],
    class_text: Float[Tensor, "classes dim"],
    proj_weight: Float[Tensor, "dim width"],
    proj_bias: Float[Tensor, " dim"],
    lmd: float = 0.5,
) -> Float[Tensor, " n"]:
    """Compute -lam cos(P g(x), t(x)) - (1 - lam) cos(P g(x), c_y) for each picture.

    Args:
        features: the backbone's features g(x).
        labels: class numbers, 0 to classes - 1.
        teacher_image: the teacher's embeddings of the pictures, normalised here, without gradient.
        class_text: embeddings of the classes' texts, normalised here, without gradient.
        proj_weight, proj_bias: the projector P.
        lmd: lam, 0 (texts alone) to 1 (pictures alone), by default 0.5.

    Raises ValueError for shapes that do not fit, an empty batch, and labels or lam out of range.
    """
    need_within(0, 1, lmd=lmd)
    if features.ndim != 2 or proj_weight.ndim != 2 or proj_weight.shape != (len(proj_bias), features.shape[1]):
        raise ValueError(
            f"proj_weight must be [dim, {features.shape[-1]}] and proj_bias [dim], got "
            f"{shapes(features=features, proj_weight=proj_weight, proj_bias=proj_bias)}"
        )
    need_rows(features=features)
    projected = F.linear(features, proj_weight, proj_bias)
    need_alike("n dim", projected=projected, teacher_image=teacher_image)
    if class_text.ndim != 2 or class_text.shape[1] != projected.shape[1] or labels.shape != features.shape[:1]:
        raise ValueError(
            f"class_text must be [classes, dim] and labels [n], got {shapes(class_text=class_text, labels=labels)}"
        )
    need_numbers(len(class_text), labels=labels)
    rows, image, text = (
        F.normalize(x, dim=1, eps=EPS) for x in (projected, teacher_image.detach(), class_text.detach()[labels])
    )
    return -(lmd * (rows * image).sum(1) + (1 - lmd) * (rows * text).sum(1))


@over_group
def vl2v_loss(
    features: Float[Tensor, "n width"],
    labels: Int[Tensor, " n"],
    teacher_image: Float[Tensor, "n dim"],
    class_text: Float[Tensor, "classes dim"],
    proj_weight: Float[Tensor, "dim width"],
    proj_bias: Float[Tensor, " dim"],
    lmd: float = 0.5,
) -> Float[Tensor, ""]:
    """Compute the mean of `vl2v_rows` over the pictures of all processes, the loss of both stages (Eq. 2 and 3).

    >>> one = torch.ones(1, 2)
    >>> round(float(vl2v_loss(one, torch.tensor([0]), one, one, torch.eye(2), torch.zeros(2))), 4)
    -1.0
    """
    return global_mean(vl2v_rows(features, labels, teacher_image, class_text, proj_weight, proj_bias, lmd))


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class VL2VConfig(ClassTextConfig):
    """Settings of VL2V-ADiP. Defaults are the authors' for ResNet-50, in epochs instead of steps."""

    epochs: int = 25
    """Passes over the training pictures in stage `distill`."""
    align_epochs: int = 25
    """Passes in stage `align`, at least 0; 0: train backbone and projector together from a random projector."""
    batch_size: int = 96
    """Pictures in a batch: 32 of each of three domains in the paper."""
    encoder: str = "torchvision:resnet50"
    pretrained: bool = True
    recipe: str = "supervised"
    optimizer: str = "adam"
    lr: float = 5e-5 * 256 / 96
    align_lr: float = 5e-5 * 256 / 96
    """Learning rate of stage `align` at a batch of 256, > 0."""
    weight_decay: float = 0.0
    objective: Literal["vl2v", "ce", "kd"] = "vl2v"
    """vl2v: the method. Baselines with a linear classifier: ce, cross-entropy; kd, cross-entropy and the teacher's logits."""
    lmd: float = 0.5
    """Share of the picture's embedding in the loss, 0 to 1; for kd the share of the teacher's logits."""
    swad: bool = True
    """Average the weights that stage `distill` trains over a valley of the validation loss."""
    n_converge: int = 3
    """Epochs in a row that decide the beginning of the valley, at least 1."""
    n_tolerance: int = 6
    """Epochs in a row that decide its end, at least 1."""
    tolerance_ratio: float = 0.3
    """Share by which the valley's threshold lies above the mean loss at its beginning, at least 0."""
    frozen_norm: bool = True
    """Keep the running statistics of the backbone's batch normalisation as they are. Off: they move, and `swad` does not average
    them."""
    cutmix: float = 0.0
    """Probability of pasting a box of another picture into each batch's pictures, 0 to 1."""
    cutmix_beta: float = 1.0
    """Both parameters of the Beta distribution of the pasted share, > 0."""
    foreign_statistics: bool = False
    """Show a teacher that is a network pictures normalised by ImageNet's statistics, as the released code does."""

    counts = (*ClassTextConfig.counts, "n_converge", "n_tolerance")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_weight("align_epochs", "tolerance_ratio")
        self.need_share("lmd", "cutmix")
        self.need_positive("align_lr", "cutmix_beta")
        if self.cutmix and (self.cached or self.teacher.startswith("file:")):
            raise CounterpointError(
                "cutmix needs a teacher that sees the mixed pictures: name a network, without --cached"
            )
        if self.cutmix and self.objective != "vl2v":
            raise CounterpointError("cutmix is for the objective vl2v; set --cutmix 0, or --objective vl2v")


# ---------------------------------------------------------------------------------------------------------- the learner


class VL2V(ClassTextLearner):
    """A backbone, its projector into the teacher's space, and the average of its weights."""

    best: Tensor

    def __init__(self, config: VL2VConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        width = self.taught if config.objective == "vl2v" else data.classes
        self.projector = nn.Linear(self.encoder.dim, width)
        self.register_buffer("best", torch.tensor(-torch.inf))  # accuracy on valid of the best projector
        self.kept = nn.Linear(self.encoder.dim, width).requires_grad_(False)  # that projector
        self.valley: LossValley | None = None

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        config = self.config
        if self.network is not None and config.foreign_statistics:
            network = with_foreign_statistics(self.network.module)
            self.network = Frozen(network, config.teacher, network.images)
        if config.swad:
            settings = config.n_converge, config.n_tolerance, config.tolerance_ratio
            self.valley = LossValley(as_vector(self.averaged()), *settings)

    @property
    def joint(self) -> bool:
        """Whether stage `distill` trains the projector, too."""
        return not self.config.align_epochs or self.config.objective != "vl2v"

    def distilled(self) -> list[nn.Module]:
        """Return the modules that stage `distill` trains."""
        return [self.encoder, self.projector] if self.joint else [self.encoder]

    def averaged(self) -> list[nn.Parameter]:
        """Return the parameters that the last stage trains."""
        trained = adapter_parameters(self.encoder).values() if self.config.lora else self.encoder.parameters()
        return [*trained, *(self.projector.parameters() if self.joint else ())]

    def exported(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if not name.startswith("valley.")}

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        found = [Stage("distill", config.epochs, self.distilled, enter=self.enter)]
        if config.align_epochs:
            found.insert(0, Stage("align", config.align_epochs, lambda: [self.projector], turns=self.of_align))
        return found

    @property
    def aligning(self) -> bool:
        """Whether the current stage trains the projector alone."""
        return bool(self.config.align_epochs) and self.position.stage == 0

    def of_align(self) -> list[Turn]:
        own = replace(self.config, lr=self.config.align_lr)
        return [self.turn_of([self.projector], own, curve=constant_rate)]

    def turns(self) -> list[Turn]:
        return [self.turn_of(self.distilled(), curve=constant_rate)]

    def enter(self, survey: Survey) -> None:
        """Take the best projector of stage `align`."""
        if bool(self.best.isfinite()):
            self.projector.load_state_dict(self.kept.state_dict())

    def train(self, mode: bool = True) -> VL2V:
        super().train(mode)
        if self.config.frozen_norm:
            keep_statistics(self.encoder)
        return self

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        found = super().prepare(batch, generator)
        if not self.config.cutmix:
            return found
        images, labels = self.whole(found["views"][0]), self.whole(found["label"])
        mixed, order, lam = draw_cutmix(images, self.config.cutmix_beta, generator, self.config.cutmix)
        _, mine = self.share(len(found["label"]))
        return found | {"views": [mixed[mine]], "label_b": labels[order][mine], "lam": lam[mine]}

    def projected(self, images: Tensor) -> Float[Tensor, "n dim"]:
        return self.projector(self.encoder(images))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        features = self.encoder(batch["views"][0])
        if self.config.objective != "vl2v":
            return self.baseline(features, batch)
        teacher = self.teacher_rows(batch)
        weights = self.projector.weight, self.projector.bias, self.config.lmd
        if "lam" not in batch:
            return {"loss": vl2v_loss(features, batch["label"], teacher, self.prototypes, *weights)}
        a, b = (vl2v_rows(features, batch[name], teacher, self.prototypes, *weights) for name in ("label", "label_b"))
        return {"loss": global_mean(batch["lam"] * a + (1 - batch["lam"]) * b)}

    def baseline(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the cross-entropy of a linear classifier; with kd also the divergence from the teacher's logits."""
        logits = self.projector(features)
        loss = cross_entropy(logits, batch["label"])
        if self.config.objective == "kd":
            taught = kd(logits, self.classify(self.teacher_rows(batch)), 1.0)
            loss = (1 - self.config.lmd) * loss + self.config.lmd * taught
        return {"loss": loss}

    # --- selection

    def end_step(self) -> None:
        if self.valley is not None and not self.aligning:
            self.valley.update(as_vector(self.averaged()))

    def end_epoch(self, epoch: int) -> None:
        assert self.survey is not None
        loss, accuracy = self._on_valid(self.survey)
        if self.aligning:
            if accuracy > float(self.best):
                self.best.fill_(accuracy)
                self.kept.load_state_dict(self.projector.state_dict())
        elif self.valley is not None:
            self.valley.evaluate(loss)
            if epoch + 1 == self.epochs:
                from_vector(self.valley.finish()[0], self.averaged())

    def _on_valid(self, survey: Survey) -> tuple[float, float]:
        """Measure cross-entropy and accuracy on the labelled base classes of `valid`."""
        rows, labels = labelled_rows(survey, "valid", self.base)
        logits = survey.over("valid", lambda batch: self.logits(batch["image"]), rows)[:, : self.base]
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())

    def logits(self, images: Tensor) -> Float[Tensor, "n classes"]:
        """Compute the logits of normalised pictures."""
        found = self.projected(images)
        return self.classify(found) if self.config.objective == "vl2v" else found

    # --- what it learned

    def embed(self, images: Tensor) -> Float[Tensor, "n dim"]:
        return super().embed(images) if self.config.objective == "vl2v" else self.encoder(images)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = batch["image"]
        return {"feature": self.embed(images), "logits": self.logits(images), **self.of_teacher(batch)}

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw test pictures of the student and of the teacher beside the classes' texts, on two principal axes."""
        if self.config.objective != "vl2v":
            return {}
        return {"The teacher's space": teacher_space(survey, self.embed, self.network, self.prototypes)}


START = "fit:simclr?data=styled-shapes%3Ftrain=4096%26seed=901&encoder=conv-s&recipe=digits-moved&epochs=20&evaluate_every=20"
SYSTEM = System(
    slug="vl2v-adip",
    task="labelled",
    config=VL2VConfig,
    learner=VL2V,
    data="styled-shapes?unseen=outline",
    recipes={
        "styled-shapes": {
            "teacher": SHAPES_TEACHER,
            "start": START,
            "recipe": "none",
            "batch_size": 64,
            "align_epochs": 10,
            "epochs": 15,
            "lr": 2e-3,
            "align_lr": 8e-3,
            "evaluate_every": 5,
        }
    },
)
