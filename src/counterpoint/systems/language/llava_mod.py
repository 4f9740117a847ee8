"""LLaVA-MoD: a small model of pictures and text learns from a large one, and then prefers better than it.

Shu, Liao, Zhuo, Xu, Zhang, Zhang, Chen, Hu, He, Liu, Jiang, Zhao, Wang, Zhao: "LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge
Distillation", ICLR 2025, arXiv 2408.15881. Code of the authors: github shufangxun/LLaVA-MoD (Apache-2.0).

    p_S, p_T    student and teacher, of one vocabulary
    R           positions that predict a token of an answer
    r_S, r_T    summed log-probability of an answer

    L_KD   = -1/|R| sum_{t in R} sum_v p_T(v | t) log p_S(v | t)
    L_LM   = next token's cross-entropy on answers (core/answers.py)
    L_r    = 0.01 sum over layers of the loss of load balance (core/routing.py, encoders/mixture_of_experts.py)
    u+, u- = r_S - r_T of the better and of the worse answer: the teacher is the reference
    L_P    = sigmoid (DPO) or kto_pair of u+ and u- (`core/preferences.py`)

Stages:

    teacher       chats; left out where `teacher` names a finished model
    adaptor       L_LM; the projector of pictures alone learns
    dense         L_KD
    sparse        every second feed-forward network becomes experts that copy it; L_KD + L_LM + L_r
    preferences   L_P + L_r of both forward passes

- Certain: equations, the order of the stages, 4 experts, 2 for a token, the layers that have them, 0.01, beta 0.1.
- `shift`: R as above. False is the authors' code: positions at answer tokens, so the first token of an answer is not learned.
- The authors' code counts L_r twice where it adds L_LM. Here it counts once, with `router_weight`.
- `preference`: the released script sets kto_pair, the paper's equation is DPO.
- Chosen: no token is dropped and no noise is added (`capacity_factor` 1.5, `router_noise` are DeepSpeed's). Padding is not routed.
  Pairs of equal answers are left out and counted. Chats with a rejected answer serve the preferences alone.
- Rates are for models that are built here; the paper's are 1e-3, 2e-5, 2e-5 and 2e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.answers import answer_log_probability, masked_lm_loss
from counterpoint.core.checks import need_alike, shapes
from counterpoint.core.distil import soft_cross_entropies
from counterpoint.core.distributed import global_mean
from counterpoint.core.masking import IGNORED
from counterpoint.core.precision import full_precision
from counterpoint.core.preferences import Preference, preference_loss
from counterpoint.core.world import over_group
from counterpoint.engine.loading import RowBatches
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import Frozen, snapshot
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.chats import pictures_of, rows_of
from counterpoint.tasks.sparse_chats import SparseChatLearner, SparseChatsConfig
from counterpoint.tasks.taught_chats import answered, preferred

# ------------------------------------------------------------------------------------------------------------- equations


@over_group
@full_precision
def mimic_loss(
    student_logits: Float[Tensor, "n tokens vocabulary"],
    teacher_logits: Float[Tensor, "n tokens vocabulary"],
    labels: Int[Tensor, "n tokens"],
    all_tokens: bool = False,
    shift: bool = True,
) -> Float[Tensor, ""]:
    """Compute L_KD: the cross-entropy of the student under the teacher's probabilities, averaged over the positions in R.

    Args:
        student_logits, teacher_logits: those at position t predict the token at t + 1. The teacher's get no gradient.
        labels: tokens of the answers, -100 elsewhere.
        all_tokens: R is every position: prompt, pictures and padding, too.
        shift: R has the positions whose next token is an answer's. False: those at tokens of an answer, as in the authors' code.

    Tokens to which the student gives probability 0 do not count. Without a position in R the loss is 0. Raises ValueError for
    shapes that do not fit and an empty batch.

    >>> x = torch.zeros(1, 3, 4)
    >>> mimic_loss(x, x, torch.tensor([[-100, 1, 2]]))
    tensor(1.3863)
    """
    need_alike("n tokens vocabulary", student_logits=student_logits, teacher_logits=teacher_logits)
    if labels.shape != student_logits.shape[:2]:
        raise ValueError(
            "labels must be [n, tokens] of the logits, got " + shapes(labels=labels, logits=student_logits)
        )
    chosen = labels != IGNORED
    if shift:
        chosen = F.pad(chosen[:, 1:], (0, 1))
    student, teacher = (
        logits.flatten(0, 1) if all_tokens else logits[chosen] for logits in (student_logits, teacher_logits.detach())
    )
    return global_mean(soft_cross_entropies(student, teacher))


# -------------------------------------------------------------------------------------------------------------- settings


@dataclass
class LLaVAMoDConfig(SparseChatsConfig):
    """Settings of LLaVA-MoD. `epochs` are those of the dense stage."""

    warmup: float = 0.03
    adaptor_epochs: int = 1
    """Passes over the chats for the projector alone, at least 0; 0: none. A model without pictures has none."""
    adaptor_lr: float = 8e-3
    """Learning rate of the projector at a batch of 256, > 0."""
    sparse_epochs: int = 5
    """Passes over the chats with experts, at least 0; 0: the model stays dense."""
    sparse_lr: float = 8e-3
    """Learning rate of the sparse stage at a batch of 256, > 0."""
    preference_epochs: int = 1
    """Passes over the preference pairs, at least 0; 0: none."""
    preference_lr: float = 8e-4
    """Learning rate of the preferences at a batch of 256, > 0."""
    objective: Literal["mimic", "sft"] = "mimic"
    """mimic: learn from the teacher; sft: from the reference answers alone, a control."""
    all_tokens: bool = False
    """Mimic at every position, not only at answers."""
    shift: bool = True
    """Mimic at the positions that predict an answer's tokens; False: at the tokens themselves, as the authors' code."""
    learns: Literal["feed-forward", "all"] = "feed-forward"
    """What learns with experts and from preferences: feed-forward networks and routers (the paper), or all."""
    preference: Preference = "kto_pair"
    """Loss of preferences: kto_pair (the script), sigmoid (DPO), hinge or ipo."""
    reference: Literal["teacher", "student"] = "teacher"
    """Reference of the preferences: the teacher, or the student as it was before: a control."""
    beta: float = 0.1
    """Strength beta of the reference, > 0; a larger one keeps the student closer to it."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be wrong, with the loss sigmoid, 0 to 0.5."""
    freeze_pictures: bool = False
    """Keep the network of pictures as it is. True in the paper, where it is pre-trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("adaptor_lr", "sparse_lr", "preference_lr", "beta")
        if min(self.adaptor_epochs, self.sparse_epochs, self.preference_epochs) < 0:
            raise CounterpointError(
                "adaptor_epochs, sparse_epochs and preference_epochs must not be negative, got "
                f"{self.adaptor_epochs}, {self.sparse_epochs} and {self.preference_epochs}"
            )
        if not 0 <= self.label_smoothing <= 0.5:
            raise CounterpointError(f"label_smoothing must be 0 to 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.preference != "sigmoid":
            raise CounterpointError("label_smoothing is for --preference sigmoid alone; set --label-smoothing 0")


# --------------------------------------------------------------------------------------------------------------- learner


class LLaVAMoD(SparseChatLearner):
    """A student that becomes sparse, its teacher, and the reference of its preferences."""

    config: LLaVAMoDConfig

    def __init__(self, config: LLaVAMoDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        # Replaced when the preferences begin.
        self.before: Frozen | None = snapshot(self.model) if config.reference == "student" else None

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.config.preference_epochs:  # before hours of training, not after them
            self.warnings += preferred(survey, self.model.tokenizer, self.config.context)[1]

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config

        def stage(name: str, epochs: int, lr: float, trains: Any, enter: Any = None) -> Stage:
            return Stage(
                name,
                epochs,
                trains,
                lambda: [self.turn(trains(), replace(config, lr=lr))],
                batches=lambda survey: RowBatches(self._rows(survey, name), config.batch_size),
                enter=enter,
            )

        projector = self.part("multi_modal_projector")
        found = [
            stage("adaptor", config.adaptor_epochs if projector else 0, config.adaptor_lr, lambda: [projector]),
            stage("dense", config.epochs, config.lr, self._learning),
            stage("sparse", config.sparse_epochs, config.sparse_lr, self._learning_sparse, self.become_sparse),
            stage(
                "preferences",
                config.preference_epochs,
                config.preference_lr,
                self._learning_sparse,
                self._keep_reference,
            ),
        ]
        found = [one for one in found if one.epochs]
        # A finished student that only is measured needs no teacher to train first.
        return [*self.teacher_stages(), *found] if found else [self.measured_only()]

    def _rows(self, survey: Survey, stage: str) -> Any:
        if stage == "preferences":
            return preferred(survey, self.model.tokenizer, self.config.context)[0]
        return answered(survey)

    def _learning(self) -> Sequence[nn.Module]:
        frozen = self.part("vision_tower") if self.config.freeze_pictures else None
        still = {id(p) for p in frozen.parameters()} if frozen is not None else set()
        return [nn.ParameterList(p for p in self.model.parameters() if id(p) not in still)]

    def _learning_sparse(self) -> Sequence[nn.Module]:
        return self._learning() if self.config.learns == "all" else [self.feed_forward]

    def become_sparse(self, survey: Survey | None = None) -> None:
        super().become_sparse()
        self._keep_reference()

    def _keep_reference(self, survey: Survey | None = None) -> None:
        if self.before is not None:
            self.before = snapshot(self.model)

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Add the worse answers, in the stage of preferences."""
        if self.stage_name != "preferences":
            return batch
        assert self.survey is not None
        split = self.survey.split("train")
        return {"chosen": batch, "rejected": self._worse(split, batch["index"].tolist())}

    def _worse(self, split: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Make the batch of the rejected answers of some chats."""
        chats = [split.chats[n] for n in rows]
        found = rows_of(self.model.tokenizer, [chat.worse for chat in chats]) | pictures_of(chats, split)
        return {name: value.to(self.device) for name, value in found.items()}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        stage, config = self.stage_name, self.config
        if stage == "teacher":
            return self.teacher_loss(batch)
        if stage == "preferences":
            return self.preference(batch["chosen"], batch["rejected"])
        logits, balance = self.routed(batch)
        language = masked_lm_loss(logits, batch["labels"])
        found = {"loss": language, "lm_loss": language}
        if stage != "adaptor" and config.objective == "mimic":
            own, its = (x[..., : self.vocabulary] for x in (logits, self.instruct(batch)))
            mimic = mimic_loss(own, its, batch["labels"], config.all_tokens, config.shift)
            found |= {"loss": mimic if stage == "dense" else mimic + language, "mimic_loss": mimic}
        if stage == "sparse":
            found |= {"loss": found["loss"] + config.router_weight * balance, "balance_loss": balance}
        return found

    def preference(self, chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of pairs, with the gains of the student over the reference."""
        config, labels = self.config, (chosen["labels"], rejected["labels"])
        (better, balance), (worse, other) = self.routed(chosen), self.routed(rejected)
        refer = self.instruct if self.before is None else self._refer
        own = answer_log_probability(better, labels[0]), answer_log_probability(worse, labels[1])
        its = answer_log_probability(refer(chosen), labels[0]), answer_log_probability(refer(rejected), labels[1])
        losses = preference_loss(*own, *its, config.beta, config.preference, config.label_smoothing)
        gains = [(a - b).detach() for a, b in zip(own, its, strict=True)]
        return {
            "loss": global_mean(losses) + config.router_weight * (balance + other),
            "balance_loss": balance + other,
            "chosen_reward": global_mean(config.beta * gains[0]),
            "rejected_reward": global_mean(config.beta * gains[1]),
            "reward_accuracy": global_mean((gains[0] > gains[1]).to(losses.dtype)),
        }

    def _refer(self, batch: dict[str, Any]) -> Tensor:
        assert self.before is not None
        found: Tensor = self.before(batch["ids"], batch["mask"], batch.get("pictures"), batch.get("counts"))
        return found

    # --- evaluation

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure the teacher, the balance of the experts, and the share of pairs whose u+ exceeds u-, against the teacher."""
        found = super().measures(survey, split)
        chats = survey.split(split).chats
        pairs = np.array([n for n, chat in enumerate(chats) if chat.rejected], np.int64)
        if self.survey is not None and len(pairs):
            prefers = survey.over(split, lambda batch: self._prefers(survey, split, batch), pairs)
            found["reward_accuracy"] = float(prefers.mean())
        return found

    def _prefers(self, survey: Survey, split: str, batch: dict[str, Any]) -> Float[Tensor, " n"]:
        """Return 1 for each chat whose u+ is larger than its u-, against the teacher."""
        worse = self._worse(survey.split(split), batch["index"].tolist())
        better, other = (
            answer_log_probability(self.logits(one), one["labels"])
            - answer_log_probability(self.instruct(one), one["labels"])
            for one in (batch, worse)
        )
        return (better > other).float()


RECIPE = {
    "batch_size": 8,
    "lr": 0.096,
    "epochs": 6,
    "model": "llava-48-1-4",
    "teacher": "llava-48-2-4",
    "teacher_epochs": 7,
    "teacher_lr": 0.096,
    "adaptor_epochs": 0,
    "sparse_epochs": 1,
    "sparse_lr": 0.032,
    "preference_epochs": 3,
    "preference_lr": 0.01,
    "context": 64,
    "vocabulary": 400,
    "new_tokens": 12,
    "evaluate_every": 7,
}
SYSTEM = System(
    slug="llava-mod",
    task="chats",
    config=LLaVAMoDConfig,
    learner=LLaVAMoD,
    data="grid-chats?train=800&questions=0&most=2&invented=0.5&pairs=200",
    recipes={"grid-chats": RECIPE},
)
