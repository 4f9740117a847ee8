"""TinyCLIP: a small CLIP begins as a part of a large one, and copies its affinities between pictures and texts.

Wu, Peng, Zhou, Xiao, Liu, Yuan, Xuan, Valenzuela, Chen, Wang, Chao, Hu: "TinyCLIP: CLIP Distillation via Affinity Mimicking and
Weight Inheritance", ICCV 2023, arXiv 2309.12314. Where paper and released code differ, the code counts.

    symbol   here                          meaning
    u, v     student_image, student_text   the student's unit rows
    U, V     teacher_image, teacher_text   the teacher's unit rows, of any width
    s        student_scale, teacher_scale  factors of the cosines, 1 / temperature
    A        -                             softmax of s u v^T over texts (i2t), or over images (t2i)
    z        Gates (encoders/towers.py)    hard-concrete masks of channels, heads and neurons
    q, e     target, expected              share of both towers' parameters to remove, and its expectation (core/hard_concrete.py)

The student learns by `affinity_mimicking_loss` alone (alpha 1), or together with the loss of CLIP. It begins in one of three ways
(`--inherit`):

    none     from random weights, with towers of any kind and any teacher
    manual   from every n-th block, leading channels and leading heads of the teacher (`inherit_weights`, core/inherited.py)
    auto     as the whole teacher, whose units get masks; both towers share one budget; then the masked units are cut
             (core/hard_concrete.py, tasks/tower_pairs.py)

    counterpoint train tinyclip --teacher run:runs/clip --inherit auto --keep 0.75 0.5 --data manifest:mine.csv
    counterpoint train tinyclip --teacher open_clip:ViT-B-32/openai --inherit none --image-encoder resnet-s --data manifest:mine.csv

Inheritance needs a teacher with towers of this library: a run of clip or siglip with `--image-encoder tower-...` and
`--text-encoder tower-...`. Stages run one after another: `--keep` lists shares for `auto`, `--steps` towers for `manual`. Each
inherits from the stage before. The teacher of the affinities stays the first network.

Differences from the released code. A later stage masks the network that was cut before, not one padded with zeros. A unit that was
cut stays cut. A block without heads keeps the bias of its attention, so that the cut network equals the masked one. Rows of the
projections are not multiplied by the masks once more. Adam's epsilon is 1e-8, not 1e-6. Not built: ResNet towers, and
inheritance from open_clip's files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.distributed import batch_pair_cross_entropy, batch_pair_loss, global_mean
from counterpoint.core.hard_concrete import scheduled_sparsity, sparsity_lagrangian
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group
from counterpoint.encoders.towers import KINDS, Gates
from counterpoint.engine.optim import light
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP
from counterpoint.tasks.tower_figures import affinity_matrices, units_left
from counterpoint.tasks.tower_pairs import TowerConfig, TowerLearner

# ------------------------------------------------------------------------------------------------------------ equations


class Affinities(NamedTuple):
    loss: Float[Tensor, ""]
    loss_i2t: Float[Tensor, ""]
    loss_t2i: Float[Tensor, ""]


@over_group
@full_precision
def affinity_mimicking_loss(
    student_image: Float[Tensor, "n dim"],
    student_text: Float[Tensor, "n dim"],
    student_scale: float | Float[Tensor, ""],
    teacher_image: Float[Tensor, "n teacher_dim"],
    teacher_text: Float[Tensor, "n teacher_dim"],
    teacher_scale: float | Float[Tensor, ""],
) -> Affinities:
    r"""Compute the cross-entropy of the student's affinities under the teacher's, in both directions, and their mean.

        L_i2t = -1/N sum_i sum_j A^T_ij log A^S_ij,      A_ij = softmax_j(s u_i . v_j);      L_t2i likewise over columns

    One pass gives both directions; none of the four matrices is stored. The paper adds the directions, the code takes their mean.

    Args:
        student_image, student_text: unit rows, not normalised here; row i of one belongs to row i of the other.
        student_scale: 1 / temperature of the student, > 0; it may have a gradient.
        teacher_image, teacher_text: unit rows of any width, without gradient.
        teacher_scale: 1 / temperature of the teacher, > 0.

    Across processes, each row meets the rows of all processes. For n = 1 the loss is 0. Raises ValueError for shapes that do not
    fit, an empty batch, and a scale that is not > 0.

    >>> affinity_mimicking_loss(torch.eye(2), torch.eye(2), 1.0, torch.eye(3)[:2], torch.eye(3)[:2], 100.0).loss
    tensor(0.3133)
    """
    need_alike("n dim", student_image=student_image, student_text=student_text)
    need_alike("n teacher_dim", teacher_image=teacher_image, teacher_text=teacher_text)
    need_positive(student_scale=student_scale, teacher_scale=teacher_scale)
    if len(student_image) != len(teacher_image):
        raise ValueError(
            f"student_image and teacher_image must have equally many rows, got {len(student_image)} and {len(teacher_image)}"
        )
    u, v = wide(student_image), wide(student_text)
    taught_u, taught_v = (wide(x.detach()).to(u.dtype) for x in (teacher_image, teacher_text))
    rows, columns = batch_pair_cross_entropy(u * student_scale, v, taught_u * teacher_scale, taught_v)
    i2t, t2i = global_mean(rows), global_mean(columns)
    return Affinities((i2t + t2i) / 2, i2t, t2i)


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class TinyCLIPConfig(TowerConfig):
    """Settings of TinyCLIP. Defaults are the released ones for ViT-B/32 with 40 M parameters of vision."""

    epochs: int = 6
    """Passes over the training items in each stage; with auto, after each cut."""
    batch_size: int = 32768
    image_encoder: str = "tower-512-12-64"
    """The student's network for pictures: tower-WIDTH-DEPTH-HEAD[-PATCH] or, without inheritance, any image encoder. With auto the
    student begins as the teacher, and this is not read."""
    text_encoder: str = "tower-512-6-64"
    """The student's network for texts: tower-WIDTH-DEPTH-HEAD or, without inheritance, text-s, minilm, hf:NAME."""
    optimizer: str = "adamw"
    lr: float = 1e-4 * 256 / 32768
    weight_decay: float = 0.2
    beta2: float | None = 0.98
    clip_norm: float | None = 5.0
    warmup_epochs: int = 1
    schedule: Literal["epoch", "step"] = "step"
    keep: tuple[float, ...] = (0.5,)
    """With auto: share of the teacher's parameters that each stage keeps in the blocks of both towers, falling, in 0..1."""
    mask_epochs: int = 1
    """With auto: passes before each cut, while masks are learned, at least 1."""
    mask_lr: float = 0.02
    """Learning rate of the masks and, uphill, of the multipliers; not scaled with the batch. > 0."""
    sparsity_steps: int = 1000
    """Steps until the masks meet the whole target, at least 1."""
    masked_rate: float = 1.0
    """Factor of the weights' learning rate while masks are learned, at least 0; 0: train masks alone."""
    cut_rate: float = 1.0
    """Factor of the weights' learning rate in other stages, at least 0; 0: leave the network as it was inherited or cut."""
    choice: Literal["learned", "leading"] = "learned"
    """Units that a cut keeps: those of the learned masks, or as many leading ones (the baseline of the claim)."""
    alpha: float = 1.0
    """Share of affinity mimicking in the loss, 0 to 1; the loss of CLIP has the rest."""
    weight: float = 1.0
    """Factor of affinity mimicking and of the loss of CLIP, > 0; the pressure on the size has the factor 1."""
    student_scale: float = 50.0
    """Factor of the student's cosines, > 0; 0: learn it, from 1 / 0.07 and up to 100."""
    rates: ClassVar[tuple[str, ...]] = ("masked_rate", "cut_rate", "student_scale", "teacher_scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.keep = tuple(self.keep) if isinstance(self.keep, tuple | list) else (float(self.keep),)
        if not self.keep or any(not 0 < part < 1 for part in self.keep) or sorted(self.keep)[::-1] != list(self.keep):
            raise CounterpointError(f"keep must list falling shares between 0 and 1, got {list(self.keep)}")
        self.need_share("alpha")
        self.need_positive("mask_lr", "mask_epochs", "sparsity_steps", "weight")
        for name in self.rates:
            if getattr(self, name) < 0:
                raise CounterpointError(f"{name} must not be negative, got {getattr(self, name)}")


# ---------------------------------------------------------------------------------------------------------- the learner


class TinyCLIP(TowerLearner):
    """A student of one picture and one text modality, whose towers a stage may replace or cut."""

    def __init__(self, config: TinyCLIPConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed, slug="tinyclip")
        fixed = config.student_scale > 0
        start = config.student_scale if fixed else 1 / 0.07
        self.log_scale = nn.Parameter(torch.tensor(math.log(start)), requires_grad=not fixed)

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        if config.inherit == "none":
            return [Stage("distil", config.epochs)]
        if config.inherit == "manual":
            return [
                Stage(f"distil {n + 1}", config.epochs, enter=partial(self.inherit, names, n == 0))
                for n, names in enumerate(config.path())
            ]
        found = []
        for n, share in enumerate(config.keep):
            enter = partial(self.mask, n == 0)
            found.append(Stage(f"mask {share:.0%}", config.mask_epochs, turns=self.masked_turns, enter=enter))
            found.append(
                Stage(f"distil {share:.0%}", config.epochs, enter=partial(self.cut, config.choice == "leading"))
            )
        return found

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters that train by the loss: all but masks and multipliers."""
        masks = {id(p) for one in self.gates() for p in one.parameters()}
        return [p for p in self.parameters() if id(p) not in masks]

    def turns(self) -> list[Turn]:
        config = self.config if self.config.inherit != "auto" else replace(self.config, warmup_epochs=0)
        return [self._turn(config, config.cut_rate)]

    def masked_turns(self) -> list[Turn]:
        """Return optimisers of the weights, whose rate rises over the whole stage, of the masks, and of the multipliers."""
        turn = self._turn(replace(self.config, warmup_epochs=self.epochs, schedule="step"), self.config.masked_rate)
        masks = [getattr(one, kind) for one in self.gates() for kind in KINDS]
        adam = light(torch.optim.AdamW)
        down = adam(masks, lr=self.config.mask_lr, weight_decay=0.0)
        up = adam([one.multipliers for one in self.gates()], lr=self.config.mask_lr, weight_decay=0.0, maximize=True)
        return [Turn([*turn.optimizers, down, up], turn.schedules)]

    def _turn(self, config: TinyCLIPConfig, rate: float) -> Turn:
        constant = self.weights() if config.constant_lr else ()
        return self.turn_of([nn.ParameterList(self.weights())], config, constant=constant, rate=rate)

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        found = super().prepare(batch, generator)
        # All processes draw the same masks.
        return found | {"drawn": [one.draw(generator) for one in self.gates()]}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, gates = self.config, self.gates()
        for one, drawn in zip(gates, batch["drawn"], strict=True):
            one.drawn = drawn
        ((a, b, both),) = self.paired_rows(self.embed(batch), batch)
        u, v = (a, b) if next(iter(batch["inputs"])) == self.image else (b, a)
        scale = self.log_scale.exp()
        loss, named = u.new_zeros(()), {"scale": scale.detach()}
        if config.alpha > 0:
            image, text = self.taught(batch, both, wide(u).dtype)
            affinity = affinity_mimicking_loss(u, v, scale, image, text, self.taught_scale).loss
            loss, named["affinity"] = loss + config.alpha * affinity, affinity.detach()
        if config.alpha < 1:
            loss = loss + (1 - config.alpha) * batch_pair_loss(wide(u) * scale, wide(v))
        loss = config.weight * loss
        if gates:
            loss = loss + self.pressure(gates, named)
        return {"loss": loss, **named}

    def pressure(self, gates: list[Gates], named: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Compute the pressure of the joint budget of both towers, and note target and expected sparsity."""
        n, keep = self.position.stage // 2, self.config.keep
        target = scheduled_sparsity(
            1 - keep[n - 1] if n else 0.0, 1 - keep[n], self.position.step, self.config.sparsity_steps
        )
        expected = 1 - sum(one.expected_size() for one in gates) / sum(one.shape.prunable for one in gates)
        multipliers = torch.stack([one.multipliers for one in gates]).mean(0)
        assert isinstance(expected, Tensor)
        named |= {"sparsity": expected.detach(), "target": expected.new_tensor(target)}
        return sparsity_lagrangian(expected, target, multipliers[0], multipliers[1])

    def end_step(self) -> None:
        super().end_step()
        for one in self.gates():
            one.bound()
        with torch.no_grad():
            if self.log_scale.requires_grad:
                self.log_scale.clamp_(0, math.log(100))

    # --- what it learned

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Return the numbers of parameters of both towers and, after cuts, the share of the blocks' parameters that was kept."""
        sizes = [sum(p.numel() for n, p in one.named_parameters() if "gates." not in n) for one in self.towers()]
        found = {"image_parameters": float(sizes[0]), "text_parameters": float(sizes[1])}
        if self.config.inherit == "auto" and self.replaced:
            shapes = [one.shape for one in self.towers()]
            found["kept_share"] = sum(one.left for one in shapes) / sum(one.prunable for one in shapes)
        return found | super().measures(survey, split)

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Draw the units that are left in each block, and both networks' affinities of a few test pairs."""
        named = dict(zip((self.image, self.text), self.towers(), strict=True))
        found = units_left(named, self.config.keep[-1]) if self.config.inherit == "auto" else {}
        return found | affinity_matrices(self, survey, float(self.log_scale.exp()))


TEACHER = (
    "fit:clip?data=styled-shapes%3Ftrain=8192%26seed=900&image_encoder=tower-48-4-8&text_encoder=tower-48-4-8&embedding=48"
    "&context=12&recipe=none&epochs=20&batch_size=128&lr=0.003&evaluate_every=20"
)
SYSTEM = System(
    slug="tinyclip",
    task="aligned",
    config=TinyCLIPConfig,
    learner=TinyCLIP,
    data="styled-shapes",
    recipe=LAPTOP
    | {
        "teacher": TEACHER,
        "inherit": "auto",
        "keep": (0.75, 0.5),
        "image_encoder": "tower-32-2-8",
        "text_encoder": "tower-32-2-8",
        "embedding": 48,
        "context": 12,
        "recipe": "none",
        "batch_size": 128,
        "epochs": 4,
        "mask_epochs": 6,
        "mask_lr": 0.2,
        "sparsity_steps": 60,
        "student_scale": 20.0,
        "teacher_scale": 20.0,
        "lr": 2e-3,
        "weight_decay": 0.05,
        "warmup_epochs": 0,
    },
)
