"""MEND: distil demonstrations into a few vectors that a frozen language model reads in their place.

Li, Ma, Lu, Lee, Liu, Guo: "MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning", ICLR 2024,
arXiv 2403.06914. Authors' code: github bigheiniu/MEND (CC-BY-NC 4.0).

    D, q        tokens of the demonstrations, and of the query with its answer
    F, E_F      the large model, frozen, and its embedding
    G, P, A     the distiller, a language model without its head; l placeholders; an adapter, the identity where widths agree

    S = A(G([E_G(D) ; P]))                                       the states of the placeholders
    p_S(t) = softmax(F([S ; E_F(q)])_t / tau)                    the student
    p_T(t) = softmax(F([D ; q])_t / tau), without gradient       the teacher
    L_KL = mean over the query's tokens of KL(p_T || p_S)        stage 1: plain texts, of which D is the first part
    L = L_pred + lambda L_KL                                     stage 2: queries of training tasks, L_pred over the answer's tokens

The divergence and L_pred are in core/answers.py, G and A in encoders/context_models.py.

- A new task needs no training: the distiller reads its demonstrations once, and its vectors serve all queries.
- Of an encoder-decoder model, the encoder reads vectors and input, the decoder the answer. The distiller then is an encoder.
  The authors' code lacks this branch, which their paper evaluates.
- Demonstrations are padded on the left, and positions count tokens alone. So padding moves no token.
- Left out: switches of the authors' code that no experiment of the paper uses (contrast, state and gradient matching, fusion);
  early stopping; the model in 8 bits; the paper's other distillers (prompt tuning, HyperTuning, Gisting).
- The temperature enters the divergence alone, as in the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.answers import answer_log_probability, masked_lm_loss, masked_token_kl
from counterpoint.core.checks import need_alike, need_positive, need_rows, need_within, shapes
from counterpoint.core.masking import IGNORED
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group
from counterpoint.encoders.context_models import Distiller, check_context_model
from counterpoint.engine.loading import RowBatches
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, unknown
from counterpoint.systems.base import System
from counterpoint.systems.settings import claim_settings
from counterpoint.tasks.demonstrations import DemonstrationLearner, DemonstrationsConfig

METHODS = ("full", "zero", "other")
COPY = "copy"
ABSENT = -10000.0  # score of a candidate that a query does not have


# ------------------------------------------------------------------------------------------------------------- equations


class ContextLosses(NamedTuple):
    """Losses of the two stages."""

    pretrain: Float[Tensor, ""]  # the divergence from the model with all demonstrations
    finetune: Float[Tensor, ""]  # the prediction of answers, and the weighted divergence


@over_group
@full_precision
def context_distillation_losses(
    student_logits: Float[Tensor, "n positions vocabulary"],
    teacher_logits: Float[Tensor, "n tokens vocabulary"],
    query_ids: Int[Tensor, "n query"],
    query_mask: Bool[Tensor, "n query"] | Int[Tensor, "n query"],
    answer_mask: Bool[Tensor, "n query"] | Int[Tensor, "n query"],
    teacher_mask: Bool[Tensor, "n tokens"] | Int[Tensor, "n tokens"],
    teacher_demo_mask: Bool[Tensor, "n tokens"] | Int[Tensor, "n tokens"],
    num_vectors: int,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
) -> ContextLosses:
    """Compute the losses of both stages: L_KL, and L_pred + kl_weight L_KL.

    Args:
        student_logits: of the frozen model on [vectors ; query], so there are num_vectors + query positions.
        teacher_logits: of the same model on [demonstrations ; query], with padding anywhere; no gradient.
        query_ids: token numbers of the query with its answer.
        query_mask: 1 at the tokens of the query.
        answer_mask: 1 at the tokens of the answer.
        teacher_mask: 1 at the teacher's tokens.
        teacher_demo_mask: 1 at the demonstrations among these.
        num_vectors: number of vectors before the query, at least 0.
        temperature: divisor of both logits in the divergence, > 0; the prediction term has none.
        kl_weight: weight of the divergence, at least 0.

    Without a query's token the divergence is 0, and without an answer's token the prediction term is 0. Raises ValueError for
    shapes that do not fit and a value out of range. Student and teacher need as many tokens of the query in each row.
    """
    need_rows(student_logits=student_logits)
    n, many = query_ids.shape
    if student_logits.shape[:2] != (n, num_vectors + many):
        raise ValueError(
            f"student_logits must be [n, num_vectors + query, vocabulary] with num_vectors {num_vectors}, got "
            + shapes(student_logits=student_logits, query_ids=query_ids)
        )
    need_alike("n query", query_ids=query_ids, query_mask=query_mask, answer_mask=answer_mask)
    need_alike("n tokens", teacher_mask=teacher_mask, teacher_demo_mask=teacher_demo_mask)
    need_positive(temperature=temperature)
    need_within(0, math.inf, kl_weight=kl_weight)
    student, asked = student_logits[:, num_vectors:], query_mask.bool()
    theirs = teacher_mask.bool() & ~teacher_demo_mask.bool()
    divergence = masked_token_kl(student, teacher_logits, asked, temperature, teacher_mask=theirs)
    labels = torch.where(answer_mask.bool() & asked, query_ids, IGNORED)
    return ContextLosses(divergence, masked_lm_loss(student, labels) + kl_weight * divergence)


@full_precision
def candidate_scores(
    student_logits: Float[Tensor, "rows positions vocabulary"],
    ids: Int[Tensor, "rows query"],
    answer_mask: Bool[Tensor, "rows query"] | Int[Tensor, "rows query"],
    class_mask: Bool[Tensor, "n classes"] | Int[Tensor, "n classes"],
    num_vectors: int,
    num_class: int,
) -> Float[Tensor, "n classes"]:
    """Score the candidate answers of queries: the mean log-probability of a candidate's tokens.

    Args:
        student_logits: of the frozen model on [vectors ; query with candidate]; row n * num_class + c is candidate c of query n.
        ids: token numbers of each query with a candidate.
        answer_mask: 1 at the tokens of the candidate.
        class_mask: 1 at the candidates that a query has; the others score -10,000.
        num_vectors: number of vectors before the query, at least 0.
        num_class: number of candidates of each query.

    Raises ValueError for shapes that do not fit, and for a candidate of a query that has no answer token.
    """
    need_rows(student_logits=student_logits)
    rows, many = ids.shape
    if student_logits.shape[:2] != (rows, num_vectors + many) or answer_mask.shape != ids.shape:
        raise ValueError(
            f"student_logits must be [rows, {num_vectors} + query, vocabulary], and ids and answer_mask [rows, query], got "
            + shapes(student_logits=student_logits, ids=ids, answer_mask=answer_mask)
        )
    if class_mask.shape[1:] != (num_class,) or class_mask.numel() != rows:
        raise ValueError(
            f"class_mask must be [n, {num_class}] for n * {num_class} rows, got "
            + shapes(class_mask=class_mask, ids=ids)
        )
    labels = torch.where(answer_mask.bool(), ids, IGNORED)
    tokens = (labels[:, 1:] != IGNORED).sum(1).view(-1, num_class)
    there = class_mask.bool()
    if holds((there & (tokens == 0)).any()):
        at = (there & (tokens == 0)).nonzero()[0].tolist()
        raise ValueError(f"answer_mask has no token for candidate {at[1]} of query {at[0]}, which class_mask names")
    scores = answer_log_probability(student_logits[:, num_vectors:], labels).view(-1, num_class)
    return torch.where(there, scores / tokens.clamp(min=1), ABSENT)


# ------------------------------------------------------------------------------------------------------------- learner


@dataclass
class MENDConfig(DemonstrationsConfig):
    """Settings of MEND. Defaults are the paper's, with a small model that is built here; rates are for its batch of 8."""

    optimizer: str = "adamw"
    lr: float = 3.2e-4
    weight_decay: float = 0.0
    schedule: Literal["epoch", "step"] = "step"
    pretrain_epochs: int = 5
    """Passes of the first stage over the plain texts, at least 0; 0: no first stage."""
    pretrain_lr: float = 1.6e-3
    """Learning rate of the first stage at a batch of 256, > 0."""
    distiller: str = COPY
    """The distiller: copy, a copy of the model, or another model of the same tokenizer: gpt2-W-D-H, ..., hf:NAME."""
    distiller_context: int = 900
    """Maximum number of tokens of the demonstrations, which the distiller reads; at least 1."""
    vectors: int = 100
    """l, number of vectors that replace the demonstrations, at least 1."""
    placeholders: Literal["vocabulary", "random"] = "vocabulary"
    """Initial placeholders: rows of the distiller's embedding, or random ones."""
    temperature: float = 1.0
    """Divisor of the logits in the divergence, > 0."""
    kl_weight: float = 1.0
    """lambda, weight of the divergence in the second stage, at least 0."""
    compare: tuple[str, ...] = METHODS
    """Methods to measure beside MEND: full (all demonstrations), zero (none), other (vectors of another task's demonstrations)."""

    counts: ClassVar[tuple[str, ...]] = (*DemonstrationsConfig.counts, "distiller_context", "vectors")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("pretrain_lr", "temperature")
        self.need_weight("kl_weight")
        for name in self.compare:
            if name not in METHODS:
                raise unknown("method", name, METHODS)
        if self.pretrain_epochs < 0 or not self.pretrain_epochs + self.epochs:
            raise CounterpointError(
                f"pretrain_epochs and epochs must be at least 0, one of them above 0, got {self.pretrain_epochs} and {self.epochs}"
            )

    @property
    def reads_texts(self) -> bool:
        return self.pretrain_epochs > 0

    @property
    def room(self) -> int:
        return min(self.context, self.distiller_context)

    @property
    def before(self) -> int:
        return self.vectors

    def check(self) -> None:
        super().check()
        if self.distiller != COPY:
            check_context_model(self.distiller)


class MEND(DemonstrationLearner):
    """A model, frozen after its own stage, and the distiller of its demonstrations."""

    config: MENDConfig

    def __init__(self, config: MENDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        copied = config.distiller == COPY
        name, positions = (data.built, self.positions) if copied else (config.distiller, config.room + config.vectors)
        sizes = config.vectors, self.model.width
        self.reads = f"{config.vectors} vectors"
        self.distiller = Distiller(name, self.tokenizer, positions, *sizes, config.placeholders, config.dropout)

    @property
    def positions(self) -> int:
        own = self.config.room + self.config.vectors  # of the distiller
        return max(self.config.context, own if self.config.distiller == COPY else 0)

    # --- stages

    def stages(self) -> list[Stage]:
        config, distiller = self.config, self.distiller

        def stage(name: str, epochs: int, lr: float, **more: Any) -> Stage:
            changed = replace(config, lr=lr)
            return Stage(name, epochs, lambda: [distiller], lambda: [self.turn([distiller], changed)], **more)

        def texts(survey: Survey) -> RowBatches:
            return RowBatches(survey.examples + survey.text_rows, config.batch_size)

        later = [
            stage("pretrain", config.pretrain_epochs, config.pretrain_lr, batches=texts, enter=self.copy),
            stage("finetune", config.epochs, config.lr, enter=None if config.pretrain_epochs else self.copy),
        ]
        return [*([self.model_stage()] if config.trains_model else []), *(one for one in later if one.epochs)]

    def copy(self, survey: Survey) -> None:
        """Let the distiller start from the model's weights."""
        if self.config.distiller == COPY:
            self.distiller.start_from(self.model)

    # --- a step

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if self.stage_name == "model":
            return {"loss": self.model_loss(batch)}
        self.model.eval()  # without dropout, student and teacher differ by their context alone
        query, config = batch["query"], self.config
        student = self.answered(self.distiller(batch["ids"], batch["mask"]), query)
        with torch.no_grad():
            teacher = self.full(batch)
        # Both have logits at the query's positions alone, so there are no vectors or demonstrations to skip.
        losses = context_distillation_losses(
            student, teacher, query.ids, query.mask, query.answer, query.mask, torch.zeros_like(query.mask), 0,
            config.temperature, config.kl_weight,
        )  # fmt: skip
        if self.stage_name == "pretrain":
            return {"loss": losses.pretrain}
        prediction = losses.finetune - config.kl_weight * losses.pretrain
        return {"loss": losses.finetune, "prediction": prediction.detach(), "divergence": losses.pretrain.detach()}

    def answered(self, vectors: Float[Tensor, "n vectors width"], query: Any) -> Float[Tensor, "n query vocabulary"]:
        """Compute the model's logits of queries after vectors."""
        found: Tensor = self.model(
            vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device), query
        )
        return found

    def row_wise(self) -> Any:
        return [(self.model, "forward"), (self.distiller, "forward")]

    # --- answers

    def scores(self, batch: dict[str, Any], method: str = "") -> Float[Tensor, "n candidates"]:
        """Score the candidates of a batch's queries by the mean log-probability of their tokens.

        Args:
            batch: a batch of the evaluation.
            method: one of METHODS. Default: vectors of the demonstrations.
        """
        there, query = batch["there"], batch["candidates"]
        each = there.shape[1]
        if method in ("full", "zero"):
            given = batch if method == "full" else {name: batch[name][:, :0] for name in ("ids", "mask")}
            logits = self.full(given, query, each)
        else:
            ids, mask = batch["other"] if method else (batch["ids"], batch["mask"])
            logits = self.answered(self.distiller(ids, mask).repeat_interleave(each, 0), query)
        return candidate_scores(logits, query.ids, query.answer, there, 0, each)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found, early = {"cut": batch["cut"]}, self.stage_name == "model"
        if not early:
            asked = batch["query"].mask.sum(1) + batch["query"].source_mask.sum(1)
            found |= {
                "scores": self.scores(batch),
                "tokens": batch["mask"].sum(1) + asked,
                "read": asked + self.config.vectors,
            }
        for method in self.config.compare:
            if not early or method != "other":
                found[f"{method}_scores"] = self.scores(batch, method)
        return found


SYSTEM = System(
    slug="mend",
    task="demonstrations",
    config=MENDConfig,
    learner=MEND,
    data="symbol-tasks",
    recipes={"symbol-tasks": claim_settings("mend")},
)
