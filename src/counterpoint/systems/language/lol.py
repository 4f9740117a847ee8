"""LOL: contrast a model with one made to hallucinate, at the last and at a lower layer, under a truthful instruction.

Chen et al.: "Lower Layer Matters: Alleviating Hallucination via Multi-Layer Fusion Contrastive Decoding with Truthfulness
Refocused", arXiv 2408.08769. The authors released no code; the baselines follow DoLa (github voidism/DoLa) and ICD (github
HillZhang1999/ICD, MIT).

    theta, phi     the model, and the amateur: the same model, lightly tuned on hallucinated answers
    x, g           the prompt, and an instruction that asks for truth, before it
    l_k            [n, V] log-probabilities of the next token, read from layer k: N is the last layer, M a lower one

    t_k = l_k(theta; g, x) + gamma (l_k(theta; g, x) - l_k(theta; x))        refocus
    s   = t_N - l_N(phi; x) + omega (t_M - l_M(phi; x))                       fusion of two contrasts
    a token is implausible where t_N < max t_N + ln beta

- Known: two contrasts, at the last and at a lower layer. An instruction enters them. Early exit is by the output layer. DoLa,
  ICD and their scoring of answers are tested against their authors' numbers.
- Chosen, because the text of the equations was not available: the forms above, omega 0.3 and gamma 0.5. Layer M is at half of the
  depth. The final normalisation precedes early exit (`early_norm`). beta is 0.1 for answers and 0 for scores of choices.
- Exact special cases: omega 0 and no instruction is ICD; gamma -1 makes the instruction irrelevant.

The amateur is a low-rank adapter (peft) on the model's own weights. So all branches are rows of one batch: rows of the amateur pass
through the adapter, the others do not. Plausibility and DoLa's choice of a layer are in core/decoding.py. Early exit is in
encoders/early_exit.py, the loop over tokens in encoders/decoding.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_within
from counterpoint.core.decoding import FLOOR, plausible, select_premature_layer
from counterpoint.core.masking import IGNORED
from counterpoint.core.precision import full_precision, wide
from counterpoint.data.images import Indices
from counterpoint.encoders.chat_models import Prompt
from counterpoint.encoders.decoding import Answer, Branch, Decoder, Plain, instructed
from counterpoint.encoders.early_exit import EarlyExit
from counterpoint.engine.loading import RowBatches
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.adapted_chats import AdaptedChatLearner, adapting_rows
from counterpoint.tasks.chats import ChatsConfig, rows_of
from counterpoint.tasks.choices import Scores, choice_accuracy, truth_figure

Method = Literal["lol", "icd", "dola", "fusion", "refocus", "instructed", "plain"]
AMATEUR = "amateur"


# ------------------------------------------------------------------------------------------------------------- equations


@full_precision
def fused_scores(
    plain: Float[Tensor, "n vocabulary"],
    guided: Float[Tensor, "n vocabulary"],
    amateur: Float[Tensor, "n vocabulary"],
    early_plain: Float[Tensor, "n vocabulary"] | None = None,
    early_guided: Float[Tensor, "n vocabulary"] | None = None,
    early_amateur: Float[Tensor, "n vocabulary"] | None = None,
    omega: float = 0.3,
    gamma: float = 0.5,
    beta: float = 0.1,
    floor: float = -math.inf,
) -> Float[Tensor, "n vocabulary"]:
    """Compute LOL's scores of the next token, from logits of both layers.

    Args:
        plain, guided: logits of the last layer of the model, without and with the instruction.
        amateur: those of the amateur, without the instruction.
        early_plain, early_guided, early_amateur: the same at the lower layer; None only where omega is 0.
        omega: weight of the lower layer's contrast.
        gamma: strength of the instruction, at least -1; 0 takes the instructed prompt, -1 leaves the instruction out.
        beta: as in `counterpoint.core.decoding.plausible`; 0 keeps all tokens.
        floor: score of implausible tokens.

    Logits may have any per-row constants. Raises ValueError for shapes that differ and values out of range.

    >>> x = torch.tensor([[1.0, 0.0]])
    >>> fused_scores(x, x, -x, omega=0.0, beta=0.0).softmax(1)
    tensor([[0.8808, 0.1192]])
    """
    need_alike("n vocabulary", plain=plain, guided=guided, amateur=amateur)
    need_within(-1, math.inf, gamma=gamma)
    last = _refocused(plain, guided, gamma)
    scores = last - amateur.log_softmax(1)
    if omega:
        if early_plain is None or early_guided is None or early_amateur is None:
            raise ValueError(
                "omega is not 0, so the logits of the lower layer are needed: early_plain, _guided, _amateur"
            )
        lower = _refocused(early_plain, early_guided, gamma)
        scores = scores + omega * (lower - early_amateur.log_softmax(1))
    return scores.masked_fill(~plausible(last, beta), floor)


def _refocused(plain: Tensor, guided: Tensor, gamma: float) -> Tensor:
    plain, guided = plain.log_softmax(1), guided.log_softmax(1)
    return guided + gamma * (guided - plain)


# ----------------------------------------------------------------------------------------------------------- the decoder


@dataclass
class Contrasted:
    """Decode by the model, the model under an instruction, and the amateur.

    Attributes:
        exit: Reads the lower layer, and DoLa's candidates.
        method: One of `Method`.
        instruction: Text of the system's message.
        omega, gamma, beta: As in `fused_scores`.
    """

    exit: EarlyExit
    method: str
    instruction: str
    omega: float
    gamma: float
    beta: float
    first: int | None = None  # row of the batch that the amateur computes, the last of its branches

    @property
    def kinds(self) -> tuple[str, ...]:
        """The branches of the method: plain, guided, amateur."""
        return {
            "lol": ("plain", "guided", "amateur"),
            "refocus": ("plain", "guided", "amateur"),
            "fusion": ("plain", "amateur"),
            "icd": ("plain", "amateur"),
            "instructed": ("guided",),
        }.get(self.method, ("plain",))

    def branches(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[Branch]:
        guided = [instructed(prompt, self.instruction) for prompt in prompts]
        self.first = self.kinds.index("amateur") * len(prompts) if "amateur" in self.kinds else None
        return [Branch(guided if kind == "guided" else prompts) for kind in self.kinds]

    def combine(self, logits: Float[Tensor, "branches n vocabulary"], step: int) -> Float[Tensor, "n vocabulary"]:
        early = [self.exit.logits(number)[:, -1].float().view_as(logits) for number in self.exit.layers]
        return self.scores(logits, early, self.beta, -math.inf)

    def scores(
        self, logits: Float[Tensor, "branches n vocabulary"], early: Sequence[Tensor], beta: float, floor: float
    ) -> Float[Tensor, "n vocabulary"]:
        """Combine the logits of the branches at the last layer, and at the layers of `exit`, by the method."""
        by = dict(zip(self.kinds, wide(logits), strict=True))
        if self.method == "dola":
            rows = torch.arange(logits.shape[1], device=logits.device)
            chosen = torch.stack([layer[0] for layer in early])
            found = chosen[select_premature_layer(by["plain"], chosen), rows]
            scores = by["plain"].log_softmax(1) - found.log_softmax(1)
            return scores.masked_fill(~plausible(by["plain"], beta), floor)
        if "amateur" not in by:
            return next(iter(by.values())).log_softmax(1)
        guided = by.get("guided", by["plain"])
        omega = self.omega if self.method in ("lol", "fusion") else 0.0
        gamma = self.gamma if "guided" in by else -1.0
        lower = dict(zip(self.kinds, early[0], strict=True)) if omega else {}
        below = lower.get("plain"), lower.get("guided", lower.get("plain")), lower.get("amateur")
        return fused_scores(by["plain"], guided, by["amateur"], *below, omega, gamma, beta, floor)


# ------------------------------------------------------------------------------------------------------------- the learner


@dataclass
class LOLConfig(ChatsConfig):
    """Settings of LOL. The model that is trained here is small; the paper decodes Llama-2-7B-chat."""

    lr: float = 1e-2
    model: str = "llama-s"
    method: Method = "lol"
    """lol: both contrasts under the instruction; fusion: without the instruction; refocus: without the lower layer; icd: without
    both; dola: the last layer against an early one; instructed, plain: the model with and without the instruction."""
    compare: tuple[Method, ...] = ()
    """Further methods to measure on the same model and amateur; `gain_over_METHOD` is the difference in choice_accuracy."""
    omega: float = 0.3
    """Weight of the lower layer's contrast; 0: the last layer alone."""
    gamma: float = 0.5
    """Strength of the instruction, at least -1; 0: take the instructed prompt; -1: leave the instruction out."""
    beta: float = 0.1
    """Least probability of a token of an answer in shares of the largest, 0 to 1; 0: keep all. Scores of choices keep all."""
    layer: int = 0
    """The lower layer, from 1; 0: half of the depth. DoLa chooses among the layers up to it."""
    early_norm: bool = True
    """Apply the final normalisation before early exit; DoLa's code does not."""
    instruction: str = "Answer with true and certain facts only."
    """The instruction; empty: none."""
    amateur_epochs: int = 1
    """Passes over the chats that have a rejected answer, by which the amateur is tuned; at least 1."""
    amateur_truth: float = 0.1
    """Share of the amateur's answers that are the reference instead of the rejected one, 0 to 1."""
    amateur_lr: float = 1e-2
    """Learning rate of the amateur at a batch of 256, > 0."""
    rank: int = 8
    """Rank of the amateur's adapter, at least 1."""

    counts = (*ChatsConfig.counts, "amateur_epochs", "rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("beta", "amateur_truth")
        self.need_positive("amateur_lr")
        self.need_weight("layer")
        if self.gamma < -1:
            raise CounterpointError(f"gamma must be at least -1, got {self.gamma}")

    def said_before(self) -> str:
        guided = {self.method, *self.compare} & {"lol", "refocus", "instructed"}
        return self.instruction if guided else ""


class LOL(AdaptedChatLearner):
    """A model and its amateur, an adapter that learns rejected answers."""

    config: LOLConfig
    adapter = AMATEUR
    answers_adapted = False

    def stages(self) -> list[Stage]:
        config = self.config

        def batches(survey: Survey) -> RowBatches:
            return RowBatches(misled(survey), config.batch_size)

        return [
            *self.model_stages(),
            self.adapter_stage("amateur", config.amateur_epochs, config.amateur_lr, batches=batches),
        ]

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        chats = survey.split("train").chats
        if all(chats[n].rejected == chats[n].answer for n in misled(survey)):
            raise DataError("rejected answers: no training chat has one; add a field rejected, unlike the reference")

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Replace most answers by the rejected ones, in the amateur's stage."""
        if self.stage_name != "amateur":
            return batch
        assert self.survey is not None
        total, mine = self.share(len(batch["index"]))
        truth = (torch.rand(total, generator=generator) < self.config.amateur_truth)[mine].tolist()
        chats = [self.survey.split("train").chats[n] for n in batch["index"].tolist()]
        messages = [chat.messages if keep else chat.worse for chat, keep in zip(chats, truth, strict=True)]
        rows = rows_of(self.model.tokenizer, messages)
        return batch | {name: value.to(self.device) for name, value in rows.items()}

    def mean_log_probability(self, batch: dict[str, Any]) -> Float[Tensor, " n"]:
        with self.model.model.disable_adapter():
            return super().mean_log_probability(batch)

    # --- answers

    def rule(self, method: str) -> Contrasted:
        """Return the rule of a method."""
        config = self.config
        layer = config.layer or len(EarlyExit(self.model, []).blocks) // 2
        lower = config.omega and method in ("lol", "fusion")
        layers = list(range(1, layer + 1)) if method == "dola" else [layer] if lower else []
        early = EarlyExit(self.model, layers, early_norm=config.early_norm)
        return Contrasted(early, method, config.instruction, config.omega, config.gamma, config.beta)

    def answers(
        self, prompts: Sequence[Prompt], *, decoder: Decoder | None = None, draw: int = 0, **changed: Any
    ) -> list[Answer]:
        if isinstance(decoder, Plain):
            decoder = self.rule("plain")
        rule = decoder or self.rule(self.config.method)
        if not isinstance(rule, Contrasted):
            with self.model.model.disable_adapter():
                return super().answers(prompts, decoder=rule, draw=draw, **changed)
        with rule.exit.watching(last=True), adapting_rows(self.model, AMATEUR, lambda: rule.first):
            return super().answers(prompts, decoder=rule, draw=draw, **changed)

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().predict({name: value for name, value in batch.items() if name != "options"})
        if "options" in batch:
            found["scores"] = self.option_scores(batch["options"], self.config.method)
        return found

    @torch.no_grad()
    def option_scores(self, options: dict[str, Any], method: str) -> Float[Tensor, " options"]:
        """Score possible answers: the scores of their tokens, summed."""
        rule = self.rule(method)
        last: list[Tensor] = []
        early: list[list[Tensor]] = [[] for _ in rule.exit.layers]
        for kind in rule.kinds:
            messages = options["messages"]
            if kind == "guided":
                messages = [instructed(Prompt(one), rule.instruction).messages for one in messages]
            given = {name: value.to(self.device) for name, value in rows_of(self.model.tokenizer, messages).items()}
            adapted = nullcontext() if kind == "amateur" else self.model.model.disable_adapter()
            with rule.exit.watching(last=False), adapted:
                logits = self.model(given["ids"], given["mask"])
            here = given["labels"][:, 1:] != IGNORED
            last.append(logits[:, :-1][here])
            for n, number in enumerate(rule.exit.layers):
                early[n].append(rule.exit.logits(number)[:, :-1][here])
            tokens = given["labels"][:, 1:][here]
        scores = rule.scores(torch.stack(last), [torch.stack(layer) for layer in early], 0.0, FLOOR)
        chosen = scores.gather(1, tokens[:, None])[:, 0]
        return chosen.new_zeros(len(options["messages"])).index_add(0, here.nonzero()[:, 0], chosen)

    def scorer(self, method: str) -> Scores:
        """Return the scores of options by a method."""
        return lambda options: self.option_scores(options, method)

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure choices by the further methods that `compare` names, on the same model and amateur."""
        compared = self.config.compare
        main = choice_accuracy(survey, split, self.scorer(self.config.method)) if compared else None
        if main is None:
            return {}
        found: dict[str, float] = {}
        for method in compared:
            other = choice_accuracy(survey, split, self.scorer(method)) or 0.0
            found |= {f"{method}_choice_accuracy": other, f"gain_over_{method}": main - other}
        return found

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show how several methods share the probability between the options of some choices."""
        methods = ("plain", "instructed", "icd", "lol")
        return super().figures(survey) | truth_figure(survey, {method: self.scorer(method) for method in methods})


def misled(survey: Survey) -> Indices:
    """Return the positions of the training chats that have a rejected answer."""
    chats = survey.split("train").chats
    return np.array([n for n in survey.rows.tolist() if chats[n].rejected], np.int64)


RECIPE = {
    "epochs": 12,
    "model": "llama-48-4-4",
    "context": 48,
    "vocabulary": 500,
    "batch_size": 64,
    "evaluate_every": 12,
    "instruction": "be truthful",
    "compare": ("icd", "dola", "fusion", "refocus", "instructed", "plain"),
}
SYSTEM = System(
    slug="lol", task="chats", config=LOLConfig, learner=LOL, data="misconceptions", recipes={"misconceptions": RECIPE}
)
