"""DisWOT: search the student of a teacher without training, by similarity at random weights; then distil it.

Dong, Li, Wei: "DisWOT: Student Architecture Search for Distillation WithOut Training", CVPR 2023, arXiv 2303.15678. Code of the
authors: github lliai/DisWOT-CVPR2023 (Apache-2.0).

    N, K, C      images of a batch with labels, classes, channels of the last map
    F            [N, C, h, w] the last map before it is averaged; T the teacher's, S the student's, both with random weights
    g            [K, C] gradient of the mean cross-entropy with respect to the classifier's weight W
    D_rel        distance of the two [N, N] Gram matrices of F, rows of length 1
    D_sem        distance of the [C, C] matrices g_k g_k^T of each class k, rows of length 1

    score(S) = -(D_rel + D_sem), or one of them alone; higher is better. The search updates no weight.

    search       ageing evolution: of the last `population` candidates draw `sample`, change one place of one of their best
                 `parents`, score the child, append it to the history; the oldest leaves
    distil       ce_weight CE + kd_weight KD + relation_weight D_rel + channel_weight D_ch, where D_ch is D_sem's form on maps;
                 gradient_weight D_sem is an extension, 0 by default

D_rel is `relation_distance` of core/grams.py. The search is in tasks/searched.py, its spaces in encoders/spaces.py.

- Certain: distances, spaces, evolution without crossover, initialisation N(0, 1) of the correlation experiments.
- From memory: the terms of the loss of `distil`. Its recipe is that of CRD's comparison.
- Chosen: crossover as an option, `--semantic classes` for unequal widths, the mean over `repeats` draws of weights and batch.
  Gradients of the linear head have a closed form here. A member that is proposed again keeps its score.
- Slips of the code that are not repeated. It takes parents of the lowest scores. It checks one member for FLOPs and copies it.
  It compares the first image of a batch alone. It adds up gradients of the teacher. A Zen score has this method's name.

Not built: the Zen-like macro space S2, and the step schedule (see `TaughtConfig`). Two proxies of the paper's tables are built,
the numbers of parameters and of multiply-adds. NWOT, SynFlow, SNIP, GradNorm and Zen are not. D_rel is about 1e-2 and D_sem
0.3 to 1, so D_sem decides their sum, as in the code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_numbers, need_rows, need_word, shapes
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.grams import gram_distance, relation_distance
from counterpoint.core.operands import EPS
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.seeds import seed_torch, seeded
from counterpoint.core.world import alone, over_group
from counterpoint.encoders.maps import map_networks, map_shape, vector_and_map
from counterpoint.encoders.spaces import Member, gaussian
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.searched import RECIPE, SearchedConfig, SearchedLearner
from counterpoint.tasks.taught import Classifier, Seen, TaughtConfig

# ----------------------------------------------------------------------------------------------------------- the distances


@over_group
@full_precision
def channel_correlation(
    feat_s: Float[Tensor, "n channels *places"], feat_t: Float[Tensor, "n channels *others"]
) -> Float[Tensor, ""]:
    """Compute D_ch: the distance between the correlations of a map's channels, rows of length 1 (ICKD's loss).

    The sum of squared differences of two [channels, channels] matrices, divided by the channels; the mean over images.

    Args:
        feat_s: the student's maps.
        feat_t: the teacher's maps, with as many channels; height and width may differ; no gradient.

    Raises ValueError for shapes that do not fit, and for an empty batch.

    >>> channel_correlation(torch.eye(2)[None, :, :, None], torch.ones(1, 2, 1, 1))
    tensor(0.5858)
    """
    if min(feat_s.ndim, feat_t.ndim) < 3 or feat_s.shape[:2] != feat_t.shape[:2]:
        said = shapes(feat_s=feat_s, feat_t=feat_t)
        raise ValueError(f"feat_s and feat_t must be maps [n, channels, ...] with as many channels, got {said}")
    need_rows(feat_s=feat_s)
    distances = gram_distance(wide(feat_s).flatten(2), wide(feat_t).flatten(2), "channel_correlation")
    return global_mean(distances / feat_s.shape[1])


@full_precision
def classifier_gradient(
    feature: Float[Tensor, "n channels"], logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]
) -> Float[Tensor, "classes channels"]:
    """Compute g, the gradient of the mean cross-entropy with respect to the weight of a linear classifier, in closed form.

    g = (softmax(logits) - onehot(labels))^T feature / n. No backward pass is needed, and g itself can be differentiated.

    Args:
        feature: input of the classifier: the average of a map.
        logits: its output.
        labels: classes, 0 to classes - 1.

    Raises ValueError for shapes that do not fit, labels out of range, and an empty batch.

    >>> classifier_gradient(torch.ones(1, 1), torch.zeros(1, 2), torch.tensor([0]))
    tensor([[-0.5000],
            [ 0.5000]])
    """
    if feature.ndim != 2 or logits.ndim != 2 or not len(feature) == len(logits) == len(labels):
        said = shapes(feature=feature, logits=logits, labels=labels)
        raise ValueError(f"feature, logits and labels must be [n, channels], [n, classes] and [n], got {said}")
    need_rows(feature=feature)
    need_numbers(logits.shape[1], labels=labels)
    error = wide(logits).softmax(1) - F.one_hot(labels.long(), logits.shape[1])
    return error.to(wide(feature).dtype).T @ wide(feature) / len(feature)


@full_precision
def semantic_distance(
    grad_W_teacher: Float[Tensor, "classes channels"],
    grad_W_student: Float[Tensor, "classes student_channels"],
    compare: Literal["channels", "classes"] = "channels",
) -> Float[Tensor, ""]:
    """Compute D_sem: the distance between two classifiers' gradients, in memory linear in their size.

    A class's matrix g_k g_k^T has rank one: its row r, normalised, is sign(g_kr) g_k / |g_k|. The squared differences are
    summed over classes, rows and columns, and divided by classes * channels. A row shorter than 1e-12 is divided by 1e-12.

    Args:
        grad_W_teacher: gradient of the teacher; no gradient flows.
        grad_W_student: gradient of the student.
        compare: "channels" (default), which need equal widths; "classes": the [classes, classes] matrices g g^T, rows of
            length 1, divided by classes^2, for any widths. That is an extension of this library.

    Raises ValueError for shapes that do not fit, and without classes.

    >>> semantic_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor(1.)
    """
    teacher, student = wide(grad_W_teacher.detach()), wide(grad_W_student)
    need_word(("channels", "classes"), compare=compare)
    need_rows(grad_W_student=student)
    if compare == "classes":
        if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
            said = shapes(grad_W_teacher=teacher, grad_W_student=student)
            raise ValueError(f"grad_W_teacher and grad_W_student must have the same classes, got {said}")
        return gram_distance(student[None], teacher[None], "semantic_distance").sum() / len(student) ** 2
    if student.ndim == teacher.ndim == 2 and len(student) == len(teacher) and student.shape != teacher.shape:
        raise ValueError(
            f"grad_W_teacher and grad_W_student must be of equal width, got {teacher.shape[1]} and {student.shape[1]}; "
            "compare='classes' takes any widths"
        )
    need_alike("classes channels", grad_W_teacher=teacher, grad_W_student=student)
    (t, a), (s, b) = _rank_one(teacher), _rank_one(student)
    # |s_r b - t_r a|^2 = (s_r - t_r)^2 + s_r t_r |b - a|^2, which is exactly 0 for equal gradients.
    rows = (s - t).square().sum(1) + (s * t).sum(1) * (b - a).square().sum(1)
    return rows.sum() / student.numel()


def _rank_one(g: Tensor) -> tuple[Tensor, Tensor]:
    """Split the matrices g_k g_k^T with normalised rows into signs, shrunk for short rows, and unit rows g_k / |g_k|."""
    largest = g.detach().abs().amax(1, keepdim=True)  # squares of small numbers would underflow
    g = g / torch.where(largest == 0, 1.0, largest)
    length = torch.linalg.vector_norm(g.masked_fill(largest == 0, 1.0), dim=1, keepdim=True)
    products = (largest * g) * (largest * length)
    long = products.detach().abs() >= EPS
    signs = torch.where(long, g.detach().sign(), products.masked_fill(long, 0.0) / EPS)
    return signs, g / length


@over_group
@full_precision
def diswot_score(
    feat_teacher: Float[Tensor, "n ..."],
    feat_student: Float[Tensor, "n ..."],
    grad_W_teacher: Float[Tensor, "classes channels"],
    grad_W_student: Float[Tensor, "classes student_channels"],
    compare: Literal["channels", "classes"] = "channels",
) -> Float[Tensor, ""]:
    """Compute the score of a student, -(D_rel + D_sem); higher is better.

    Args:
        feat_teacher, feat_student: last maps of both networks, for `relation_distance`.
        grad_W_teacher, grad_W_student: gradients of both classifiers, for `semantic_distance`, of the whole batch.
        compare: as in `semantic_distance`.

    >>> diswot_score(torch.eye(2), torch.eye(2), torch.eye(2), -torch.eye(2))
    tensor(-0.)
    """
    relation = relation_distance(feat_teacher, feat_student)
    return -(relation + semantic_distance(grad_W_teacher, grad_W_student, compare))


# ---------------------------------------------------------------------------------------------------------------- settings


@dataclass
class DisWOTConfig(SearchedConfig):
    """Settings of DisWOT. Defaults are the paper's for ResNets on CIFAR-100 (search space S0)."""

    ce_weight: float = 0.1
    kd_weight: float = 0.9
    relation_weight: float = 1.0
    """Weight of D_rel between the last maps in the student's loss, at least 0."""
    channel_weight: float = 1.0
    """Weight of D_ch, between channel correlations of the last maps, in the student's loss, at least 0."""
    gradient_weight: float = 0.0
    """Weight of D_sem between the classifiers' gradients in the student's loss, at least 0; an extension."""
    metric: Literal["diswot", "relation", "semantic", "parameters", "flops"] = "diswot"
    """Score of a candidate: diswot, -(D_rel + D_sem); relation or semantic, one of them; parameters or flops, their number."""
    semantic: Literal["channels", "classes"] = "channels"
    """D_sem compares channels, which needs a teacher as wide as the students; or classes, an extension for any widths."""
    initialisation: Literal["default", "normal"] = "default"
    """Random weights of both networks: default, that of the layers; normal, N(0, 1), of the rank-correlation experiments."""
    repeats: int = 1
    """Number of draws of weights and batch, at least 1; a score is their mean, and 2 to 5 reduce its noise."""
    score_batch: int = 64
    """N, number of training images in the batch of a score, at least 1; all candidates see the same ones."""

    counts: ClassVar[tuple[str, ...]] = (*SearchedConfig.counts, "repeats", "score_batch")
    weights: ClassVar[tuple[str, ...]] = (
        *TaughtConfig.weights,
        *("relation_weight", "channel_weight", "gradient_weight"),
    )


# ------------------------------------------------------------------------------------------------------------- the learner


class DisWOT(SearchedLearner):
    """A search that trains nothing, then the teacher, then the student that was found."""

    config: DisWOTConfig

    def __init__(self, config: DisWOTConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.bench: list[tuple[Tensor, ...]] = []  # images, labels, the teacher's map and gradient, for each repeat
        self.regressor: nn.Module = nn.Identity()
        self.fit_widths()
        width = self.instructing.encoder.dim
        wanted = not config.encoder and config.metric in ("diswot", "semantic") and config.semantic == "channels"
        if wanted and width != 4 * config.width:
            raise CounterpointError(
                f"candidates have {4 * config.width} channels, the teacher {data.teacher_encoder} has {width}, and D_sem compares "
                "channels: choose another --width or teacher, --metric relation, or --semantic classes"
            )

    # --- the score of a candidate

    @torch.no_grad()
    def score(self, member: Member) -> dict[str, float]:
        """Score a member: a forward pass with random weights and statistics of the batch, for each repeat. Nothing trains."""
        config, name = self.config, self.space.name(member)
        if config.metric in ("parameters", "flops"):
            return {"score": float(self.costs[member][config.metric == "parameters"])}
        self.bench = self.bench or [self._drawn(repeat) for repeat in range(config.repeats)]
        totals = torch.zeros(3)
        with alone(), torch.autocast(self.device.type, enabled=False):
            for repeat, (images, labels, feature, gradient) in enumerate(self.bench):
                own, slope = self._random(name, (repeat, *member), images, labels)
                relation = relation_distance(feature, own)
                comparable = config.semantic == "classes" or slope.shape == gradient.shape
                semantic = (
                    semantic_distance(gradient, slope, config.semantic)
                    if comparable
                    else torch.full_like(relation, math.nan)
                )
                score = {"diswot": -(relation + semantic), "relation": -relation, "semantic": -semantic}[config.metric]
                totals += torch.stack([score, relation, semantic]).cpu() / config.repeats
        found = dict(zip(("score", "relation", "semantic"), totals.tolist(), strict=True))
        if not math.isfinite(found["score"]):
            raise CounterpointError(
                f"the score of {name} is {found['score']} with {config.initialisation} weights: choose --initialisation default"
            )
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def _drawn(self, repeat: int) -> tuple[Tensor, ...]:
        """Draw a batch, and compute the map and gradient of the teacher with random weights."""
        assert self.survey is not None
        rows = self.survey.rows
        chosen = np.random.default_rng([self.seed, repeat]).permutation(rows)[: self.config.score_batch]
        batch = self.survey.batch("train", chosen)
        images, labels = batch["image"], batch["label"]
        return images, labels, *self._random(self.facts.teacher_encoder, (repeat,), images, labels)

    def _random(self, name: str, draw: Sequence[int], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the last map and the classifier's gradient of a network whose random weights depend on seed and `draw`."""
        with torch.random.fork_rng(devices=[]):
            seed_torch(seeded(self.seed, *draw))
            network = Classifier(name, self.facts)
            if self.config.initialisation == "normal":
                gaussian(network)
        network.to(self.device).train()
        vector, last = vector_and_map(network.encoder, images)
        return last, classifier_gradient(vector, network.classifier(vector), labels)

    # --- distillation

    @property
    def by_maps(self) -> bool:
        """Whether the student's loss needs the last maps."""
        return bool(self.config.relation_weight or self.config.channel_weight)

    def adopt(self, name: str) -> None:
        super().adopt(name)
        self.bench = []
        self.fit_widths()

    def fit_widths(self) -> None:
        """Add a 1 x 1 convolution from the student's channels to the teacher's, where channels are compared and differ."""
        if not self.config.channel_weight:
            return
        encoders: list[Any] = [self.encoder, self.instructing.encoder]
        own, its = (map_shape(encoder, self.size, self.channels)[0] for encoder in encoders)
        self.regressor = (nn.Identity() if own == its else nn.Conv2d(own, its, 1, bias=False)).to(self.device)

    def both(self, images: Tensor) -> tuple[Seen, Seen]:
        if not self.by_maps:
            return super().both(images)

        def seen(network: Any) -> Seen:
            vector, last = vector_and_map(network.encoder, images)
            return Seen(network.classifier(vector), vector, [last])

        with torch.no_grad():
            teacher = seen(self.instructing.eval())
        return seen(self), teacher

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, terms = self.config, {}
        if config.relation_weight:
            terms["relation"] = config.relation_weight * relation_distance(teacher.maps[0], student.maps[0])
        if config.channel_weight:
            own = self.regressor(student.maps[0])
            terms["channel"] = config.channel_weight * channel_correlation(own, teacher.maps[0])
        if config.gradient_weight:
            labels = gather_rows(batch["label"])
            its, own = (
                classifier_gradient(gather_rows(x.feature), gather_rows(x.logits), labels) for x in (teacher, student)
            )
            terms["gradient"] = config.gradient_weight * semantic_distance(its, own, config.semantic)
        return terms

    def row_wise(self) -> Sequence[tuple[nn.Module, str]]:
        return super().row_wise() if self.at_teacher or not self.by_maps else map_networks(self.encoder)


SYSTEM = System(
    slug="diswot", task="labelled", config=DisWOTConfig, learner=DisWOT, data="cifar10", recipe=RECIPE | {"repeats": 3}
)
