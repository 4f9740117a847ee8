"""DCD: a deep scorer of pictures and texts teaches a shallower one with negatives that it mines.

Rao, Ding, Qi, Fang, Liu, Shen, Tao: "Dynamic Contrastive Distillation for Image-Text Retrieval", IEEE Transactions on
Multimedia 2023, arXiv 2207.01426.

    symbol   here                        meaning
    C        candidates                  captions drawn for each picture, its own first
    M        num_hard                    hard negatives that the student scores
    t, s     teacher_scores, student_scores    [n, captions], scores of a picture and its captions, column 0 its own
    H        entropy of softmax(t)       the teacher's uncertainty about a picture
    w        task weight                 H / sum H over the batch: uncertain pictures count more in the task loss
    r        imitation weight            softmax over the batch of (1 - w)^2: certain pictures count more in the imitation
    D, N     distill, task               imitation of the teacher's scores; cross-entropy of each pair with right or wrong
    alpha    alpha                       share of D in the loss alpha D + (1 - alpha) N

A cross-encoder scores one pair with one pass, so many negatives are too expensive for the student. The teacher scores C captions
of each picture without gradient. The student scores the own caption and the M that the teacher finds hardest. They share
the unimodal encoders, frozen. The student starts from some of the teacher's layers (`--student-layers`).

    counterpoint train dcd --data manifest:mine.csv                       stage `teacher`, then stage `student`
    counterpoint train dcd --teacher none --data manifest:mine.csv --name large     a scorer alone
    counterpoint train dcd --teacher run:runs/large --data manifest:mine.csv       its student

Two formulas of the released code defeat their purpose. Its teacher scores are in the order of the ranking, while the student's
begin with the own caption (`--teacher-order rank`). Its imitation weights multiply a mean over the whole batch, so that they have
no effect (`--imitation-weighting uniform`). The defaults here align both scores and weigh each picture. The released teacher also
keeps its dropout; here it is in evaluation mode.

Not supported: ViLT's variant with one stream (its code is not released), and METER's published weights. The unimodal encoders may
be published ones (`--image-encoder timm:NAME --pretrained`, `--text-encoder hf:NAME`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.distributed import gather_rows, global_mean, place
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group
from counterpoint.encoders.pair_scorers import PairScorer, copy_layers
from counterpoint.engine.optim import optimisers, rise_and_fall
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, frozen, parameters
from counterpoint.errors import CounterpointError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP
from counterpoint.tasks.pair_figures import pair_figures
from counterpoint.tasks.pair_scorers import PairConfig, PairLearner, Score

Order = Literal["aligned", "rank"]
Weighting = Literal["per_sample", "uniform"]
TaskWeighting = Literal["entropy", "uniform"]
Objective = Literal["dcd", "wsl", "ce"]
SHOWN = 5  # hard captions of a picture on the page
EPSILON = 1e-7  # of the weighted soft label's quotient

# ------------------------------------------------------------------------------------------------------------ equations


def select_hard_negatives(teacher_scores: Float[Tensor, "n c"], num_hard: int) -> Int[Tensor, "n kept"]:
    """Select each picture's own caption and the captions that the teacher scores highest.

    Args:
        teacher_scores: the teacher's scores; column 0 is the picture's own caption.
        num_hard: M, at least 1; a larger number than there are negatives means all.

    Returns [n, M + 1] columns: 0, then the negatives by falling score. Of equal scores the earlier column comes first.

    >>> select_hard_negatives(torch.tensor([[0.1, 0.3, 0.9, 0.5]]), 2)
    tensor([[0, 2, 3]])
    """
    _need_scores(teacher_scores=teacher_scores)
    if num_hard < 1:
        raise ValueError(f"num_hard must be at least 1, got {num_hard}")
    hardest = teacher_scores[:, 1:].argsort(dim=1, descending=True, stable=True)[:, :num_hard] + 1
    return torch.cat([torch.zeros_like(hardest[:, :1]), hardest], 1)


def matched_scores(
    teacher_scores: Float[Tensor, "n c"], selected: Int[Tensor, "n kept"], teacher_order: Order = "aligned"
) -> Float[Tensor, "n kept"]:
    """Return the teacher's scores that the loss compares with the student's scores of the selected captions.

    Args:
        teacher_scores: the teacher's scores of all captions.
        selected: what `select_hard_negatives` returned.
        teacher_order: "aligned": those of the same captions. "rank": its highest scores in falling order, as in the
            released code; these are of other captions wherever the own caption is not first.

    Raises ValueError for another order.
    """
    if teacher_order == "aligned":
        return teacher_scores.gather(1, selected)
    if teacher_order != "rank":
        raise ValueError(f"teacher_order must be 'aligned' or 'rank', got {teacher_order!r}")
    return teacher_scores.sort(dim=1, descending=True, stable=True).values[:, : selected.shape[1]]


class Weights(NamedTuple):
    """The weight of each picture in both losses; each sums to 1 over the batch."""

    task: Float[Tensor, " n"]
    imitation: Float[Tensor, " n"]


@over_group
@full_precision
def uncertainty_weights(teacher_scores: Float[Tensor, "n k"]) -> Weights:
    """Compute w = H / sum H and r = softmax((1 - w)^2) over the batch of all processes.

    H is the entropy of softmax(t_i), in nats.

    Args:
        teacher_scores: the teacher's scores; no gradient.

    If the teacher is certain of every picture, all H are 0 and w is uniform. Raises ValueError for fewer than two captions.

    >>> uncertainty_weights(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).task
    tensor([0.3451, 0.6549])
    """
    _need_scores(teacher_scores=teacher_scores)
    entropy = torch.special.entr(wide(teacher_scores.detach()).softmax(1)).sum(1)
    every, here = gather_rows(entropy), place(len(entropy), entropy.device)
    total = every.sum()
    # A quotient of a safe divisor, so that no entry is NaN where all entropies are 0.
    of_all = torch.where(total > 0, every / total.where(total > 0, torch.ones_like(total)), 1 / here.total)
    mine = slice(here.offset, here.offset + here.rows)
    return Weights(of_all[mine], (1 - of_all).square().softmax(0)[mine])


class Distilled(NamedTuple):
    """A loss with its two terms."""

    loss: Float[Tensor, ""]
    distill: Float[Tensor, ""]
    task: Float[Tensor, ""]


@over_group
@full_precision
def dynamic_distillation_loss(
    student_scores: Float[Tensor, "n k"],
    teacher_scores: Float[Tensor, "n k"],
    temperature: float = 1.0,
    alpha: float = 0.2,
    imitation_weighting: Weighting = "per_sample",
    task_weighting: TaskWeighting = "entropy",
    centre: bool = False,
) -> Distilled:
    """Compute alpha D + (1 - alpha) N.

        D = T^2 sum_i r_i mean_k ((t_ik - s_ik) / T)^2        N = sum_i w_i mean_k BCE(s_ik, 1 if k = 0 else 0)

    Args:
        student_scores: s; column 0 is the picture's own caption.
        teacher_scores: t of the same captions; no gradient.
        temperature: T > 0. It cancels in D; it is an argument of the paper.
        alpha: share of D, 0 to 1.
        imitation_weighting: "per_sample": r; "uniform": 1 / n, as the released code in effect has.
        task_weighting: "entropy": w; "uniform": 1 / n, for a static loss.
        centre: subtract each row's mean from both scores in D. A teacher trained by cross-entropy over captions defines its
            scores only up to a constant of each row.

    Returns the loss, D and N. Raises ValueError for shapes that do not fit, fewer than two captions, and numbers out of range.

    >>> dynamic_distillation_loss(torch.zeros(1, 2), torch.ones(1, 2)).distill
    tensor(1.)
    """
    _need_scores(student_scores=student_scores, teacher_scores=teacher_scores)
    need_positive(temperature=temperature)
    need_within(0, 1, alpha=alpha)
    if imitation_weighting not in get_args(Weighting):
        raise ValueError(f"imitation_weighting must be 'per_sample' or 'uniform', got {imitation_weighting!r}")
    if task_weighting not in get_args(TaskWeighting):
        raise ValueError(f"task_weighting must be 'entropy' or 'uniform', got {task_weighting!r}")
    s, t = wide(student_scores), wide(teacher_scores.detach())
    weights, total = uncertainty_weights(t), place(len(s), s.device).total
    gap = (t - t.mean(1, keepdim=True)) - (s - s.mean(1, keepdim=True)) if centre else t - s
    squared = temperature**2 * (gap / temperature).square().mean(1)
    entropy = F.binary_cross_entropy_with_logits(s, _own(s), reduction="none").mean(1)
    distill = global_mean(squared if imitation_weighting == "uniform" else total * weights.imitation * squared)
    task = global_mean(entropy if task_weighting == "uniform" else total * weights.task * entropy)
    return Distilled(alpha * distill + (1 - alpha) * task, distill, task)


@over_group
@full_precision
def weighted_soft_label_loss(
    student_scores: Float[Tensor, "n k"],
    teacher_scores: Float[Tensor, "n k"],
    temperature: float = 1.0,
    alpha: float = 0.2,
) -> Distilled:
    """Compute alpha D' + mean_i CE(s_i, 0), D' = T^2 mean_i g_i mean_ik ((t_ik - s_ik) / T)^2, g = 1 - exp(-CE(s) / CE(t)).

    It is the repository's alternative, switched off there: a picture that the student gets wrong, compared with the teacher, raises
    the imitation of the whole batch. The task term has no factor 1 - alpha.

    Arguments and errors are those of `dynamic_distillation_loss`. Here g has no gradient.
    """
    _need_scores(student_scores=student_scores, teacher_scores=teacher_scores)
    need_positive(temperature=temperature)
    need_within(0, 1, alpha=alpha)
    s, t = wide(student_scores), wide(teacher_scores.detach())
    wrong = -s.log_softmax(1)[:, 0]
    share = 1 - (-wrong.detach() / (-t.log_softmax(1)[:, 0] + EPSILON)).exp()
    squared = ((t - s) / temperature).square().mean(1)
    distill, task = temperature**2 * global_mean(share) * global_mean(squared), global_mean(wrong)
    return Distilled(alpha * distill + task, distill, task)


@over_group
@full_precision
def mined_distillation_loss(
    student_scores: Float[Tensor, "n c"],
    teacher_scores: Float[Tensor, "n c"],
    num_hard: int = 7,
    alpha: float = 0.2,
    teacher_order: Order = "aligned",
    imitation_weighting: Weighting = "per_sample",
) -> Float[Tensor, ""]:
    """Select the hard negatives of all candidates, and compute `dynamic_distillation_loss` of them, at temperature 1.

    Training scores only the selected captions with the student; this function takes its scores of all.

    Args:
        student_scores, teacher_scores: scores of all candidates; column 0 is the picture's own caption.
        num_hard, teacher_order: see `select_hard_negatives` and `matched_scores`.
        alpha, imitation_weighting: see `dynamic_distillation_loss`.
    """
    _need_scores(student_scores=student_scores, teacher_scores=teacher_scores)
    selected = select_hard_negatives(teacher_scores, num_hard)
    taught = matched_scores(teacher_scores, selected, teacher_order)
    student = student_scores.gather(1, selected)
    return dynamic_distillation_loss(student, taught, 1.0, alpha, imitation_weighting).loss


def _need_scores(**scores: Tensor) -> None:
    need_alike("n captions", **scores)
    first = next(iter(scores.values()))
    if first.shape[1] < 2:
        raise ValueError(f"a picture needs a caption that is not its own, got {shapes(**scores)}")
    for name, values in scores.items():
        if holds(~values.isfinite().all()):
            raise ValueError(f"{name} hold NaN or infinite values")


def _own(scores: Tensor) -> Tensor:
    """Return the labels of the pairs: 1 in column 0, else 0."""
    return torch.zeros_like(scores).index_fill(1, torch.zeros(1, dtype=torch.long, device=scores.device), 1.0)


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class DCDConfig(PairConfig):
    """Settings of DCD. Defaults are those of the authors' METER on Flickr30k; rates are at a batch of 256."""

    epochs: int = 10
    batch_size: int = 512
    image_encoder: str = "timm:vit_base_patch16_clip_384"
    text_encoder: str = "hf:roberta-base"
    pretrained: bool = True
    context: int = 50
    optimizer: str = "adamw"
    lr: float = 5e-6 * 256 / 512
    fusion_lr: float = 5.0
    """Factor of the learning rate of the scorer's layers and poolers, > 0."""
    weight_decay: float = 0.01
    beta2: float | None = 0.98
    schedule: Literal["epoch", "step"] = "step"
    warmup: float = 0.1
    """Share of a stage's steps over which the learning rate rises; then it falls to 0 on a line. 0 to 1, 1 not included."""
    teacher: str = ""
    """run:RUN or fit:dcd?data=SOURCE&...: a finished scorer. none: train a scorer of `fusion_layers` by cross-entropy, without
    a teacher. Default: train the teacher first, in this run."""
    teacher_epochs: int = 10
    """Passes over the training items in stage `teacher`, which trains the encoders and the teacher's scorer; at least 0."""
    teacher_candidates: int = 16
    """Captions for each picture in stage `teacher`, its own included; at least 2."""
    teacher_lr: float = 5e-6 * 256 / 512
    """Learning rate of stage `teacher` at a batch of 256, > 0."""
    student_layers: tuple[int, ...] = (0, 3, 5)
    """Layers of the teacher's scorer that the student starts from, counted from 0; it has as many layers."""
    from_teacher: bool = True
    """Start the student's scorer from the teacher's weights. Off: from random weights."""
    objective: Objective = "dcd"
    """dcd: imitation and task loss with their weights. wsl: the weighted soft label. ce: cross-entropy of the own caption."""
    mining: bool = True
    """The student scores the captions that the teacher finds hardest. Off: all `candidates`."""
    num_hard: int = 7
    """Hard negatives for each picture, at least 1; at most all negatives are used."""
    alpha: float = 0.2
    """Share of the imitation in the loss, 0 to 1."""
    distill_temperature: float = 1.0
    """Temperature of the imitation, > 0; it cancels in the loss."""
    imitation_weighting: Weighting = "per_sample"
    """Weights of pictures in the imitation: per_sample, or uniform as in the released code."""
    task_weighting: TaskWeighting = "entropy"
    """Weights of pictures in the task loss: entropy of the teacher, or uniform."""
    teacher_order: Order = "aligned"
    """Order of the teacher's scores: aligned with the student's, or rank as in the released code."""
    centre: bool = False
    """Subtract the mean of each picture's scores in the imitation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.student_layers = tuple(self.student_layers)
        self.need_positive("fusion_lr", "teacher_lr", "distill_temperature")
        self.need_share("alpha")
        if not 0 <= self.warmup < 1:
            raise CounterpointError(f"warmup must lie in 0..1, 1 not included, got {self.warmup}")
        for name, least in (("num_hard", 1), ("teacher_epochs", 0), ("teacher_candidates", 2)):
            if getattr(self, name) < least:
                raise CounterpointError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, values in (
            ("objective", get_args(Objective)),
            ("imitation_weighting", get_args(Weighting)),
            ("task_weighting", get_args(TaskWeighting)),
            ("teacher_order", get_args(Order)),
        ):
            if getattr(self, name) not in values:
                raise unknown(name, getattr(self, name), values)
        if self.teacher not in ("", "none") and not self.teacher.startswith(("run:", "fit:")):
            raise CounterpointError(f"teacher must be run:RUN, fit:dcd?..., none, or left out, got '{self.teacher}'")
        last = (
            math.inf if self.teacher else self.fusion_layers - 1
        )  # another run's layers are counted when it is opened
        if not self.student_layers or not all(0 <= number <= last for number in self.student_layers):
            raise CounterpointError(
                f"student_layers must name layers of the teacher, 0 to {self.fusion_layers - 1}, got "
                f"{list(self.student_layers)}"
            )


# ---------------------------------------------------------------------------------------------------------- the learner


class DCD(PairLearner):
    """Unimodal encoders, the student's scorer, and the teacher's, which is of this run or of another."""

    slug: ClassVar[str] = "dcd"
    config: DCDConfig

    def __init__(self, config: DCDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.teacher = None if config.teacher else self.scorer(config.fusion_layers)
        self.student = self.scorer(config.fusion_layers if self.alone else len(config.student_layers))
        self.master: Frozen | None = None  # another run's learner; it calls that run's scorer

    @property
    def alone(self) -> bool:
        """Whether a scorer is trained without a teacher."""
        return self.config.teacher == "none"

    @property
    def instructing(self) -> PairScorer | None:
        """The teacher's scorer, of this run or of another one; None while there is none."""
        master: Any = self.teacher if self.master is None else self.master.module.student
        return master

    @property
    def teaching(self) -> bool:
        """Whether the current stage trains the teacher."""
        return self.survey is not None and len(self.stages()) == 2 and self.position.stage == 0

    @property
    def candidates(self) -> int:
        return self.config.teacher_candidates if self.teaching or self.alone else self.config.candidates

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        name = self.config.teacher
        if not name or self.alone:
            return
        self.master = frozen(name, call=lambda found: found.student if isinstance(found, DCD) else found)
        module: Any = self.master.module
        if not isinstance(module, DCD):
            raise CounterpointError(f"the teacher {name} is no run of dcd, whose scorers of pairs can teach")
        own, other = self.config, module.config
        for setting in (
            "fusion",
            "embedding",
            "heads",
            "image_encoder",
            "text_encoder",
            "audio_encoder",
            "vector_encoder",
        ):
            if getattr(own, setting) != getattr(other, setting):
                raise CounterpointError(
                    f"the teacher {name} has {setting} {getattr(other, setting)}, this student {getattr(own, setting)}: "
                    f"both share the encoders; use --{setting.replace('_', '-')} {getattr(other, setting)}"
                )
        if module.facts.modalities != self.facts.modalities or module.facts.tokenizers != self.facts.tokenizers:
            raise CounterpointError(
                f"the teacher {name} was trained on other modalities, sizes or tokens than this data has: train it on the "
                "same captions, or choose a published text encoder"
            )
        copy_layers(self.student, module.student, own.student_layers)  # a wrong layer raises before the first step

    def sizes(self) -> tuple[int, int] | None:
        return (
            None if self.alone or self.instructing is None else (parameters(self.student), parameters(self.instructing))
        )

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config
        if self.alone:
            return [Stage("train", config.epochs)]
        student = Stage("student", config.epochs, lambda: [self.student], enter=self.start)
        if self.teacher is None or not config.teacher_epochs:
            return [student]
        teacher = self.teacher
        modules = [self.encoders, self.heads, self.types, teacher]
        return [Stage("teacher", config.teacher_epochs, lambda: modules, turns=lambda: [self._turn(teacher)]), student]

    def start(self, survey: Survey) -> None:
        """Copy the teacher's encoders and the chosen layers of its scorer."""
        source: Any = self if self.master is None else self.master.module
        if source is not self:
            for name in ("encoders", "heads", "types"):
                getattr(self, name).load_state_dict(getattr(source, name).state_dict())
        if self.config.from_teacher:
            teacher = cast(PairScorer, source.teacher if source is self else source.student)
            copy_layers(self.student, teacher, self.config.student_layers)
        else:
            torch.manual_seed(self.seed)
            self.student.load_state_dict(self.scorer(len(self.config.student_layers)).state_dict())

    def turns(self) -> list[Turn]:
        return [self._turn(self.student)]

    def _turn(self, scorer: Any) -> Turn:
        """Return one update of the scorer's layers, at their own rate, and of all other parameters of the stage."""
        config, steps, epochs = self.config, self.steps_per_epoch, self.epochs
        config = replace(config, lr=config.teacher_lr) if self.teaching else config
        rest = [scorer.head, *([self.encoders, self.heads, self.types] if self.teaching or self.alone else [])]

        curve = rise_and_fall(epochs, steps, config.warmup)
        found = [
            optimisers(config, modules, epochs, config.batch_size, steps_per_epoch=steps, rate=rate, curve=curve)
            for modules, rate in ((rest, 1.0), (scorer.below_head(), config.fusion_lr))
        ]
        return Turn(
            [one for turn in found for one in turn.optimizers], [one for turn in found for one in turn.schedules]
        )

    def row_wise(self) -> list[tuple[Any, str]]:
        if self.teaching or self.alone:
            return [*super().row_wise(), (self.teacher if self.teaching else self.student, "forward")]
        return [(self.student, "forward")]

    # --- a step

    @property
    def taught(self) -> Score:
        """Return the teacher's scorer, in evaluation mode."""
        return cast(Score, self.master if self.teacher is None else self.teacher.eval())

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "candidates" not in batch:
            batch = batch | self.drawn(batch, self.candidates, np.random.default_rng(self.position.step))
        rows, config = self.both(batch), self.config
        at = batch["candidates"][rows]
        if self.teaching or self.alone:
            scorer = self.student if self.alone else cast(Any, self.teacher).train()
            sides = self.pictures(batch, rows), self.side(self.text, batch["pool"])
            return {"loss": _cross_entropy(self.scores(scorer, *sides, at))}
        self.encoders.eval()
        with torch.no_grad():
            sides = self.pictures(batch, rows), self.side(self.text, batch["pool"])
            selected = torch.arange(at.shape[1], device=at.device).expand_as(at)
            teacher = selected.new_zeros(at.shape).float()
            if config.mining or config.objective != "ce":
                teacher = self.chunked(self.taught, *sides, at)
                if config.mining:
                    selected = select_hard_negatives(teacher, config.num_hard)
                    teacher = matched_scores(teacher, selected, config.teacher_order)
        return self._taught_loss(self.scores(self.student, *sides, at.gather(1, selected)), teacher)

    def _taught_loss(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Compute the chosen loss of the captions that the student scored."""
        config = self.config
        if config.objective == "ce":
            return {"loss": _cross_entropy(student)}
        if config.objective == "wsl":
            found = weighted_soft_label_loss(student, teacher, config.distill_temperature, config.alpha)
        else:
            found = dynamic_distillation_loss(
                student, teacher, config.distill_temperature, config.alpha, config.imitation_weighting,
                config.task_weighting, config.centre,
            )  # fmt: skip
        return found._asdict()

    # --- what it learned

    def evaluated(self) -> dict[str, tuple[Score, bool]]:
        if self.teaching:
            return {"teacher_": (cast(Score, self.teacher), True)}
        known = not self.alone and (self.teacher is not None or self.master is not None)
        return {"": (cast(Score, self.student), True)} | ({"teacher_": (self.taught, False)} if known else {})

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show the captions that the teacher finds hardest, and compare student and teacher."""
        if self.alone or (self.teacher is None and self.master is None):
            return {}
        master: Any = self.teacher if self.master is None else self.master.module
        networks = {"teacher": master if self.master is None else master.student, "student": self.student}
        return pair_figures(self, survey, networks, lambda scores: select_hard_negatives(scores, SHOWN))


def _cross_entropy(scores: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy of the own caption, column 0, over the batch of all processes."""
    return global_mean(-wide(scores).log_softmax(1)[:, 0])


# Small networks for small pictures and captions, from random weights.
_SMALL: dict[str, Any] = {
    "image_encoder": "vit-s",
    "pretrained": False,
    "embedding": 64,
    "heads": 4,
    "fusion_layers": 4,
    "student_layers": (0, 3),
    "dropout": 0.0,
    "candidates": 16,
    "teacher_candidates": 8,
    "num_hard": 3,
    "batch_size": 64,
    "epochs": 10,
    "teacher_epochs": 20,
    "lr": 4e-3,
    "teacher_lr": 4e-3,
    "fusion_lr": 1.0,
    "weight_decay": 0.01,
    "warmup_epochs": 0,
    "retrieved": 200,
    "evaluate_every": 10,
}
SYSTEM = System(
    slug="dcd",
    task="aligned",
    config=DCDConfig,
    learner=DCD,
    data="digit-captions",
    recipes={
        "clustered-pairs": _SMALL
        | {
            "fusion": "mlp",
            "vector_encoder": "as-is",
            "embedding": 96,
            "candidates": 32,
            "num_hard": 7,
            "retrieved": 0,
        },
    },
    recipe=LAPTOP | _SMALL | {"recipe": "none"},
)
