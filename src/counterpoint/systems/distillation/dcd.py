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
of each picture without gradient. The student scores the own caption and the M that the teacher finds hardest. Student and
teacher share the unimodal encoders, which stay fixed while the student trains. The student starts from some of the teacher's
layers (`--student-layers`). The scorers are in encoders/pair_scorers.py, the stages in tasks/taught_scorers.py.

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

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_finite_values, need_positive, need_within, need_word, shapes
from counterpoint.core.distributed import gather_rows, global_mean, place
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP
from counterpoint.tasks.pair_scorers import Side
from counterpoint.tasks.taught_scorers import SMALL, TaughtScorerConfig, TaughtScorerLearner, own_cross_entropy

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
    need_word(get_args(Order), teacher_order=teacher_order)
    if teacher_order == "aligned":
        return teacher_scores.gather(1, selected)
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
    need_word(get_args(Weighting), imitation_weighting=imitation_weighting)
    need_word(get_args(TaskWeighting), task_weighting=task_weighting)
    s, t = wide(student_scores), wide(teacher_scores.detach())
    weights, total = uncertainty_weights(t), place(len(s), s.device).total
    gap = (t - t.mean(1, keepdim=True)) - (s - s.mean(1, keepdim=True)) if centre else t - s
    squared = temperature**2 * (gap / temperature).square().mean(1)
    own = torch.zeros_like(s)
    own[:, 0] = 1
    entropy = F.binary_cross_entropy_with_logits(s, own, reduction="none").mean(1)
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

    It is the repository's alternative, switched off there. A picture that the student gets wrong and the teacher right has a large
    g. The mean of g scales the imitation of the whole batch. The task term has no factor 1 - alpha.

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
    need_finite_values(**scores)


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class DCDConfig(TaughtScorerConfig):
    """Settings of DCD. Defaults are those of the authors' METER on Flickr30k; rates are at a batch of 256."""

    epochs: int = 10
    batch_size: int = 512
    image_encoder: str = "timm:vit_base_patch16_clip_384"
    text_encoder: str = "hf:roberta-base"
    pretrained: bool = True
    context: int = 50
    optimizer: str = "adamw"
    lr: float = 5e-6 * 256 / 512
    weight_decay: float = 0.01
    beta2: float | None = 0.98
    schedule: Literal["epoch", "step"] = "step"
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
        self.need_positive("distill_temperature")
        self.need_share("alpha")
        self.need_count("num_hard")


# ---------------------------------------------------------------------------------------------------------- the learner


class DCD(TaughtScorerLearner):
    """Unimodal encoders, the student's scorer, and the teacher's, which is of this run or of another."""

    slug: ClassVar[str] = "dcd"
    config: DCDConfig

    def lesson(self, image: Side, text: Side, at: Int[Tensor, "n candidates"]) -> dict[str, Tensor]:
        """Score all candidates with the teacher; score with the student, and compare, those that the teacher finds hardest."""
        config = self.config
        selected = torch.arange(at.shape[1], device=at.device).expand_as(at)
        teacher = selected.new_zeros(at.shape).float()
        if config.mining or config.objective != "ce":
            teacher = self.chunked(self.taught, image, text, at)
            if config.mining:
                selected = select_hard_negatives(teacher, config.num_hard)
                teacher = matched_scores(teacher, selected, config.teacher_order)
        student = self.scores(self.student, image, text, at.gather(1, selected))
        if config.objective == "ce":
            return {"loss": own_cross_entropy(student)}
        if config.objective == "wsl":
            found = weighted_soft_label_loss(student, teacher, config.distill_temperature, config.alpha)
        else:
            found = dynamic_distillation_loss(
                student, teacher, config.distill_temperature, config.alpha, config.imitation_weighting,
                config.task_weighting, config.centre,
            )  # fmt: skip
        return found._asdict()

    def shown(self, scores: Float[Tensor, "n candidates"]) -> Int[Tensor, "n kept"]:
        return select_hard_negatives(scores, SHOWN)


SYSTEM = System(
    slug="dcd",
    task="aligned",
    config=DCDConfig,
    learner=DCD,
    data="digit-captions",
    recipes={
        "clustered-pairs": SMALL
        | {
            "fusion": "mlp",
            "vector_encoder": "as-is",
            "embedding": 96,
            "candidates": 32,
            "num_hard": 7,
            "retrieved": 0,
        },
    },
    recipe=LAPTOP | SMALL | {"num_hard": 3, "recipe": "none"},
)
