"""Hybrid Distill: one student learns token features of a discriminative teacher and token relations of a masked autoencoder.

Shi, Zhang, Tang, Dong, Chen, Xiong, Tian: "Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners",
ICLR 2024, arXiv 2306.15876.

    counterpoint train dino --data imagefolder:photos --encoder vit-s --name dino
    counterpoint train mae --data imagefolder:photos --encoder vit-s --name mae
    counterpoint train hybrid-distill --data imagefolder:photos --feature-teacher run:runs/dino --relation-teacher run:runs/mae

    symbol    here                    shape           meaning
    F_c       teachers["feature"]     [B, N, C_c]     last tokens of the discriminative teacher (supervised, DINO, CLIP)
    T         targets                 [B, N', C_c]    F_c, normalised token by token, at the tokens that the student kept
    q, k, v   Inside.layers           [B, h, N, d]    queries, keys and values of a layer, of the student and of the MAE
    R_qk      token_relations(q, k)   [B, h, N, N]    softmax of q k^T / sqrt(d); R_vv likewise, of v and v
    P         projector               C -> C_c        a linear map with bias
    alpha     feature_weight          number          weight of L_feat
    beta      relation_weight         number          weight of L_rel
    rho       drop_redundant_tokens   [B, N]          mean cosine of a token with the other surviving tokens
    k         keep_ratio              number          share of the patches that each dropping keeps

    L         = alpha L_feat + beta L_rel

R_qk, L_rel and the dropping are in core/tokens.py, `Inside` in encoders/inside.py.

A step: both teachers see the whole picture; the student drops its most redundant tokens before some layers, and carries the
numbers of the surviving patches. L_feat compares the survivors of the last layer, L_rel those alive at its layer: the
teacher's q, k, v are gathered before the softmax. Evaluation and export use the student alone, with all tokens.

The paper has no public code. L_rel is TinyMIM's loss and L_feat is FD's, reproduced in value and gradient. Not known from the
paper, and therefore settings: layers of relations and of dropping, keep_ratio, the measure of redundancy, the transition.
Choices: AdamW's beta2 of 0.95; layer l of L_S follows layer l L_T / L_S of the teacher, rounded; the class token is compared
where both networks have one; other prefix tokens (registers) are not; no drop path unless asked for. Nothing of a teacher
is cached, because each step has new crops. Not built: fine-tuning, detection and segmentation on ImageNet, COCO and ADE20K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, need_within, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.seeds import seed_torch
from counterpoint.core.tokens import Projection, drop_redundant_tokens, projected_tokens, relation_distillation_loss
from counterpoint.core.world import over_group, world
from counterpoint.encoders.inside import Inside, TokenNetwork, gathered, need_common_heads
from counterpoint.encoders.vision_transformers import set_drop_path
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, parameters
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.attention_diversity import diversity, diversity_figures, survivors
from counterpoint.tasks.images import ImagesConfig
from counterpoint.tasks.token_teachers import check_token_teacher, token_teacher
from counterpoint.tasks.views import ViewsLearner

# --- token features: what the discriminative teacher teaches


@over_group
@full_precision
def feature_distillation_loss(
    student_tokens: Float[Tensor, "n tokens dim"],
    teacher_tokens: Float[Tensor, "n tokens width"],
    projection: Projection,
    beta: float = 2.0,
) -> Float[Tensor, ""]:
    """Compute L_feat: smooth L1 between the projected student tokens and the teacher's, normalised token by token.

    Args:
        student_tokens: the student's last tokens.
        teacher_tokens: the teacher's tokens at the same places; no gradient. Their target has mean 0 and variance 1 over the
            channels (+ 1e-5), so it does not change with the teacher's scale and shift.
        projection: P, a module from dim to width; or its weight [width, dim]; or (weight, bias [width]), also
            by these names.
        beta: transition from squared to absolute error, at least 0, by default 2; 0: absolute error.

    Returns the mean over pictures, tokens and channels. Raises ValueError for shapes that do not fit and an empty batch.

    >>> feature_distillation_loss(torch.zeros(1, 1, 2), torch.tensor([[[-1.0, 1.0]]]), torch.eye(2))
    tensor(0.2500)
    """
    need_within(0.0, math.inf, beta=beta)
    if student_tokens.ndim != 3 or teacher_tokens.ndim != 3 or student_tokens.shape[:2] != teacher_tokens.shape[:2]:
        raise ValueError(
            "student_tokens and teacher_tokens must be [n, tokens, dim] of the same pictures and tokens, got "
            f"{shapes(student_tokens=student_tokens, teacher_tokens=teacher_tokens)}"
        )
    need_rows(student_tokens=student_tokens)
    if not student_tokens.shape[1] or not teacher_tokens.shape[2]:
        raise ValueError(f"teacher_tokens must have tokens and channels, got {shapes(teacher_tokens=teacher_tokens)}")
    target = F.layer_norm(wide(teacher_tokens.detach()), teacher_tokens.shape[2:], eps=1e-5)
    projected = wide(projected_tokens(projection, student_tokens, target.shape[2]))
    if world()[1] == 1:  # one pass less than the mean of each picture's mean
        return F.smooth_l1_loss(projected, target, beta=float(beta))
    error = F.smooth_l1_loss(projected, target, reduction="none", beta=float(beta))
    return global_mean(error.mean((1, 2)))


# --- settings


@dataclass
class HybridDistillConfig(ImagesConfig):
    """Settings of Hybrid Distill. Defaults are the paper's for ViT-B on ImageNet, or TinyMIM's where it is silent."""

    epochs: int = 300
    batch_size: int = 4096
    encoder: str = "timm:vit_base_patch16_224"
    """The student, a vision transformer: vit-s, vit-xs, timm:vit_..."""
    recipe: str = "mae"
    optimizer: str = "adamw"
    lr: float = 1.5e-4
    weight_decay: float = 0.05
    beta2: float | None = 0.95
    warmup_epochs: int = 15
    feature_teacher: str = "timm:deit_base_patch16_224"
    """Gives token features: run:RUN, fit:SLUG?data=SOURCE, hf:NAME or timm:NAME, supervised or contrastive (DINO, CLIP)."""
    relation_teacher: str = "hf:facebook/vit-mae-base"
    """Gives token relations: run:RUN of mae, fit:mae?data=SOURCE, hf:NAME or timm:NAME, a masked autoencoder."""
    feature_weight: float = 1.0
    """Alpha, the weight of the feature distillation, at least 0; 0: this teacher is not used."""
    relation_weight: float = 1.0
    """Beta, the weight of the relation distillation, at least 0; 0: this teacher is not used."""
    relation_layers: tuple[int, ...] = (-2,)
    """Layers of the student whose relations are compared, from 0; negative: from the end. Default: the last but one."""
    relation_heads: int = 0
    """Heads into which queries, keys and values of both networks are split for the relations. 0: the networks' own heads, or
    the student's where they differ."""
    transition: float = 2.0
    """Error at which the feature loss changes from squared to absolute, at least 0; 0: absolute."""
    keep_ratio: float = 0.7
    """Share of the patches that each dropping keeps, above 0; 1: no dropping."""
    drop_layers: tuple[int, ...] = ()
    """Layers of the student before which patches are dropped, from 0. Default: 0, a third and two thirds of the depth."""
    redundancy: Literal["mean", "max"] = "mean"
    """Redundancy of a patch: its mean cosine with the other surviving patches, or the largest."""
    drop_path: float = 0.0
    """Probability that the student's last layer is skipped for a picture in training; it rises from 0 by layer. TinyMIM: 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_weight("feature_weight", "relation_weight", "transition", "relation_heads")
        if not self.feature_weight and not self.relation_weight:
            raise CounterpointError(
                "feature_weight and relation_weight are both 0: the student has no teacher; set one above 0"
            )
        self.need_below_one("drop_path")
        self.need_positive("keep_ratio")
        self.need_share("keep_ratio")
        if self.relation_weight and not self.relation_layers:
            raise CounterpointError("relation_layers must name at least one layer, or set --relation-weight 0")

    def check(self) -> None:
        super().check()
        for name, weight in (("feature", self.feature_weight), ("relation", self.relation_weight)):
            if weight:
                check_token_teacher(f"--{name}-teacher", getattr(self, f"{name}_teacher"))


# --- the learner


class HybridDistill(ViewsLearner):
    """A student that drops tokens, a projector of its features, and up to two frozen teachers."""

    crops = 1
    compares = False
    encoder: Any

    def __init__(self, config: HybridDistillConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        config = self.config  # its encoder is that of the run to start from
        student = TokenNetwork(self.encoder, f"--encoder {config.encoder}", self.size)
        if not hasattr(self.encoder, "patch"):
            raise CounterpointError(
                f"--encoder {config.encoder} cannot drop tokens between its layers; use vit-s, vit-xs or timm:vit_..."
            )
        if config.drop_path:
            set_drop_path(self.encoder.model.blocks, config.drop_path)
        # Held in a list: its weights are the encoder's, which is a part of this learner already.
        self.students = [student]
        self.teachers: dict[str, Frozen] = {}
        self.relation_layers = student.numbered("relation_layers", config.relation_layers)
        thirds = tuple(dict.fromkeys(n * student.depth // 3 for n in range(3)))
        self.drop_layers = (
            student.numbered("drop_layers", config.drop_layers or thirds) if config.keep_ratio < 1 else []
        )

    @property
    def student(self) -> TokenNetwork:
        """The student, with access to its inside."""
        return self.students[0]

    def build_projector(self, dim: int) -> nn.Module:
        """Build a place for P: its width is the teacher's, which is known when a fit begins."""
        return nn.Identity()

    def structure(self) -> dict[str, Any]:
        return {"projector": self.projector.out_features} if isinstance(self.projector, nn.Linear) else {}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        if structure:
            with torch.random.fork_rng(devices=[]):
                seed_torch(self.seed)
                self.projector = nn.Linear(self.encoder.dim, int(structure["projector"])).to(self.device)

    def begin(self, survey: Survey) -> None:
        """Load the teachers, and check that they fit the student."""
        super().begin(survey)
        config = self.config
        for name in ("feature", "relation"):
            if getattr(config, f"{name}_weight") and name not in self.teachers:
                given = getattr(config, f"{name}_teacher")
                self.teachers[name] = token_teacher(f"--{name}-teacher", given, self.student.grid).to(self.device)
        if "feature" in self.teachers and not self.structure():
            self.restructure({"projector": self.network_of("feature").dim})
        if "relation" in self.teachers:
            self.heads()

    def sizes(self) -> tuple[int, int] | None:
        its = [parameters(teacher.module) for teacher in self.teachers.values()]
        return (parameters(self.encoder), min(its)) if its else None

    def network_of(self, name: str) -> TokenNetwork:
        """Return the network of the "feature" or the "relation" teacher. CounterpointError before it is loaded."""
        if name not in self.teachers:
            raise CounterpointError(
                f"the {name} teacher is not loaded: a fit loads it when it begins. In a loop of your own, set "
                f"learner.teachers[{name!r}] = token_teacher(...), see counterpoint.tasks.token_teachers"
            )
        module: Any = self.teachers[name].module
        return module

    def heads(self) -> int:
        """Return the number of heads of the relations. CounterpointError where it does not divide both widths."""
        count = self.config.relation_heads or self.student.heads
        need_common_heads("relation_heads", count, self.student, self.network_of("relation"))
        return count

    def layer_of_teacher(self, layer: int) -> int:
        """Return the teacher's layer for a layer of the student: the same where depths agree, else its share of the depth."""
        return self.network_of("relation").layer_at(layer, self.student.depth)

    def look(self, images: Tensor, layers: Sequence[int] = ()) -> Inside:
        """Run the student with its droppings."""
        keep, prefix = self.config.keep_ratio, self.student.prefix
        choose = partial(drop_redundant_tokens, keep_ratio=keep, num_prefix=prefix, redundancy=self.config.redundancy)
        return self.student.dropping(images, dict.fromkeys(self.drop_layers, choose), layers)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (images,) = batch["views"]
        config, found = self.config, {}
        inside = self.look(images, self.relation_layers if config.relation_weight else ())
        if config.feature_weight:
            both = self.student.classes and self.network_of("feature").classes
            target = self.teachers["feature"](images).tokens
            target = gathered(target, self.network_of("feature").places(target, inside.alive, both))
            own = gathered(inside.tokens, self.student.places(inside.tokens, None, both))
            found["feature"] = feature_distillation_loss(own, target, self.projector, config.transition)
        if config.relation_weight:
            both = self.student.classes and self.network_of("relation").classes
            layers = [self.layer_of_teacher(n) for n in self.relation_layers]
            theirs = self.teachers["relation"](images, list(dict.fromkeys(layers))).layers
            terms = []
            for own_layer, layer in zip(self.relation_layers, layers, strict=True):
                student = self.student.regrouped(inside.layers[own_layer], None, both, self.heads())
                alive, network = inside.alive_at[own_layer], self.network_of("relation")
                teacher = network.regrouped(theirs[layer], alive, both, self.heads())
                terms.append(relation_distillation_loss(student, teacher))
            found["relation"] = torch.stack(terms).mean()
        parts = [getattr(config, f"{name}_weight") * term for name, term in found.items()]
        return {"loss": torch.stack(parts).sum()} | {name: term.detach() for name, term in found.items()}

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return ()  # layers inside are recorded once, for the whole batch

    def embed(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        return self.encoder.tokens(images)[:, self.student.prefix :].mean(1)

    def _networks(self) -> dict[str, Any]:
        """Return the student ("") and the loaded teachers: network, and function of pictures and layers."""
        teachers = {f"{name}_teacher": (self.network_of(name), self.teachers[name]) for name in self.teachers}
        return {"": (self.student, self.student)} | teachers

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the diversity of attention in the last two layers, in a fit also that of the teachers.

        teachers_nmi and teachers_distance_spread are the relation teacher's measure minus the feature teacher's.
        """
        found = diversity(self._networks(), survey, split)
        if len(self.teachers) == 2:  # the paper's premise: the masked autoencoder's attention is the more diverse
            for name in ("nmi", "distance_spread"):
                found[f"teachers_{name}"] = found[f"relation_teacher_{name}"] - found[f"feature_teacher_{name}"]
        return found

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw distance and NMI of every head, and the tokens that survive each dropping."""
        drawn = diversity_figures(self._networks(), survey)
        return drawn | (survivors(self.look, self.drop_layers, self.student.grid, survey) if self.drop_layers else {})


# Teachers for the digits, trained once in a minute or two and kept. For other data, name teachers of your own.
_FIT = "data=digits%3Fseed=900&encoder=vit-xs&epochs=40&batch_size=128&warmup_epochs=2&evaluate_every=40&lr=0.006"
FEATURES = f"fit:kd?{_FIT}&kd_weight=0.0&teacher_epochs=0&optimizer=adamw&weight_decay=0.05&recipe=digits-easy"
RELATIONS = f"fit:mae?{_FIT}&decoder_width=48&decoder_depth=1&decoder_heads=4&norm_pix=false&recipe=digits-moved"

LAPTOP: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 128,
    "encoder": "vit-s",
    "lr": 2e-3,
    "warmup_epochs": 2,
}

SYSTEM = System(
    slug="hybrid-distill",
    task="views",
    config=HybridDistillConfig,
    learner=HybridDistill,
    data="digits",
    recipes={
        "digits": LAPTOP
        | {
            "encoder": "vit-xs",
            "lr": 6e-3,
            "recipe": "digits-easy",
            "feature_teacher": FEATURES,
            "relation_teacher": RELATIONS,
        }
    },
    recipe=LAPTOP,
)
