"""STIC: a model of pictures and text makes its own preferences from unlabelled pictures, and learns from them.

Deng, Lu, Yin, Hu, Shen, Gu, Zou, Chang, Wang: "Enhancing Large Vision Language Models with Self-Training on Image
Comprehension", NeurIPS 2024, arXiv 2405.19716. Code of the authors: github yihedeng9/STIC (Apache-2.0).

    v, x        an unlabelled picture, an ordinary question for a caption
    y_g         the model's answer to a guided question about v: preferred
    y_b         with probability 1/2 its answer to a question that invites inventions, otherwise its answer to x about a damaged v:
                the short side scaled to 20 pixels, or colours changed (brightness 0.5, hue 0.3)
    p, p_0      the model with its adapter, and without

    d = log p(y_g | v, x) - log p_0(y_g | v, x) - (log p(y_b | v, x) - log p_0(y_b | v, x))
    L = -log sigmoid(beta d) - alpha log p(y_g | v, x)                (core/preferences.py)

Stages:

    model          chats; left out where `model` names a finished one
    preferences    the pairs are made once, then the adapter learns L
    descriptions   some training chats, with the model's own caption before the question; the adapter learns their answers

- Certain: questions of three kinds, damages, L, alpha 1/1024, beta 0.1, draws at temperature 0.2, the order of the stages.
- `rejected_scoring`: the paper scores the tokens of y_b. The code scores at each the most probable other token ("runner_up").
- Chosen: the words of the questions, and their numbers (the authors have 8 ordinary and 8 inventive ones). Pairs of equal or
  empty answers are left out and counted. The projector of pictures stays, so that p_0 stays too.
- `describe`: the model also describes a picture before it answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from counterpoint.core.answers import answer_log_probability
from counterpoint.core.distributed import global_mean
from counterpoint.core.preferences import Scoring, regularized_dpo
from counterpoint.core.seeds import generator_of
from counterpoint.core.world import world
from counterpoint.data.shown import captioned, png
from counterpoint.encoders.chat_models import Prompt, asking, described
from counterpoint.encoders.decoding import Answer, Decoder
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.engine.loading import Steps
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.systems.base import System
from counterpoint.tasks.adapted_chats import AdaptedChatLearner
from counterpoint.tasks.chats import ChatsConfig, pictures_of, rows_of
from counterpoint.views.transformed import damaged
from counterpoint.words import counted

ORDINARY = (
    "Describe the picture.",
    "What does the picture show?",
    "Write a caption of the picture.",
    "Which objects are in the picture?",
)
GUIDED = (
    "Describe the picture step by step. Name its main objects and what they do, the place, colours and composition, and say only "
    "what is visible."
)
INVENTIVE = (
    "Describe the picture, and add objects that could be near but are not visible.",
    "Describe the picture, and imagine what happens in it.",
)
AT_ONCE = 64  # pictures for which pairs are made together
SHOWN = 6  # pairs on the page


@dataclass
class STICConfig(ChatsConfig):
    """Settings of STIC. Defaults of both losses are the paper's; the model that is trained here is small."""

    preference_epochs: int = 1
    """Passes over the pairs, at least 0; 0: no preferences."""
    preference_lr: float = 1e-3
    """Learning rate of the preferences at a batch of 256, > 0."""
    objective: Literal["dpo", "sft"] = "dpo"
    """dpo: L, the loss of the paper; sft: the likelihood of the preferred answers alone."""
    beta: float = 0.1
    """Strength beta of the reference, > 0; a larger one keeps the model closer to it."""
    alpha: float = 1 / 1024
    """Weight of the summed log-probability of the preferred answer, at least 0."""
    rejected_scoring: Scoring = "label"
    """Tokens of a worse answer that are scored: label, its own (the paper); runner_up, the most probable others (the code)."""
    shuffled: bool = False
    """Take the better and the worse answer of a pair by chance: a control."""
    pictures: int = 6000
    """Maximum number of unlabelled pictures, at least 1; without unlabelled ones the training pictures serve."""
    pair_sampling: float = 0.2
    """Temperature of the answers that pairs are made of, > 0."""
    ordinary: tuple[str, ...] = ORDINARY
    """Ordinary questions for a caption; both answers of a pair are learned as answers to one of them."""
    guided: str = GUIDED
    """The question that preferred answers reply to."""
    inventive: tuple[str, ...] = INVENTIVE
    """Questions that worse answers reply to."""
    description_epochs: int = 1
    """Passes over the chats with descriptions, at least 0; 0: none."""
    description_lr: float = 1e-3
    """Learning rate of that stage at a batch of 256, > 0."""
    described_chats: int = 5000
    """Maximum number of training chats that get a description, at least 1."""
    describe: bool = False
    """Describe a picture first, then answer, in the evaluation."""
    rank: int = 128
    """Rank of the adapter, at least 1."""

    counts: ClassVar[tuple[str, ...]] = (*ChatsConfig.counts, "pictures", "described_chats", "rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("preference_lr", "description_lr", "beta", "pair_sampling")
        self.need_weight("alpha", "preference_epochs", "description_epochs")
        if not self.ordinary or not self.inventive or not self.guided.strip():
            raise CounterpointError("ordinary, inventive and guided need at least one question each")


class STIC(AdaptedChatLearner):
    """A model, the adapter that learns, its pairs, and the descriptions of training chats."""

    config: STICConfig

    def __init__(self, config: STICConfig, data: Any, seed: int = 0) -> None:
        if not data.size:
            raise DataError("stic learns from pictures, and these data have none; name a source of chats with pictures")
        super().__init__(config, data, seed)
        # Picture, ordinary question, better and worse answer, and how the worse one was made.
        self.pairs: list[list[Any]] = []
        self.descriptions: list[list[Any]] = []  # training chat, description
        self.left_out = 0

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config

        def steps(of: str) -> Callable[[Survey], Steps]:
            return lambda _: Steps(max(1, math.ceil(len(getattr(self, of)) / config.batch_size)))

        pairs: dict[str, Any] = {"enter": self._make_pairs, "batches": steps("pairs")}
        texts: dict[str, Any] = {"enter": self._describe_chats, "batches": steps("descriptions")}
        found = [
            *self.model_stages(),
            self.adapter_stage("preferences", config.preference_epochs, config.preference_lr, **pairs),
            self.adapter_stage("descriptions", config.description_epochs, config.description_lr, **texts),
        ]
        return [one for one in found if one.epochs] or [self.measured_only()]

    def structure(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "descriptions": self.descriptions, "left_out": self.left_out}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self.pairs, self.descriptions = list(structure.get("pairs", [])), list(structure.get("descriptions", []))
        self.left_out = int(structure.get("left_out", 0))

    def _pictures(self, survey: Survey) -> Any:
        found = survey.unlabelled
        return survey.split("train").images if found is None else found

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.config.preference_epochs or self.config.description_epochs:
            asked = (self.config.guided, *self.config.ordinary, *self.config.inventive)
            self.need_room([f"{IMAGE} {question}" for question in asked], "--guided, --ordinary and --inventive")

    @torch.no_grad()
    def _make_pairs(self, survey: Survey) -> None:
        """Answer questions about unlabelled pictures, and keep the answers as pairs."""
        config, images = self.config, self._pictures(survey)
        generator = generator_of(self.seed, 2405_19716)
        order = torch.randperm(len(images), generator=generator)[: config.pictures].tolist()
        self.pairs, self.left_out = [], 0
        self.eval()
        for start in range(0, len(order), AT_ONCE):
            rows = order[start : start + AT_ONCE]
            shown = images.images(np.array(rows))
            coins = torch.rand(len(rows), generator=generator).tolist()
            asked = torch.randint(len(config.ordinary), (len(rows),), generator=generator).tolist()
            inviting = torch.randint(len(config.inventive), (len(rows),), generator=generator).tolist()
            better = [asking(config.guided, picture) for picture in shown]
            worse = [
                asking(config.inventive[inviting[n]], picture)
                if coins[n] < 0.5
                else asking(config.ordinary[asked[n]], damaged(picture, generator))
                for n, picture in enumerate(shown)
            ]
            found = self.answers([*better, *worse], temperature=config.pair_sampling, draw=1_000_000 + start)
            for n, row in enumerate(rows):
                good, bad = found[n].text, found[len(rows) + n].text
                if good == bad or not good or not bad:
                    self.left_out += 1
                    continue
                how = "inventive question" if coins[n] < 0.5 else "damaged picture"
                if config.shuffled and torch.rand((), generator=generator) < 0.5:
                    good, bad = bad, good
                self.pairs.append([row, asked[n], good, bad, how])
        self.train()
        if not self.pairs:
            raise CounterpointError(
                f"all {counted(self.left_out, 'pair has', 'pairs have')} equal or empty answers, so there is nothing to prefer; "
                "raise --pair-sampling, or "
                "choose other questions (--guided, --inventive)"
            )
        if self.left_out:
            self.warnings.append(
                f"{self.left_out} of {counted(len(order), 'pair has', 'pairs have')} equal or empty answers and are left out"
            )

    @torch.no_grad()
    def _describe_chats(self, survey: Survey) -> None:
        """Describe the pictures of some training chats."""
        config, split = self.config, survey.split("train")
        rows = [n for n in survey.rows.tolist() if split.chats[n].pictures]
        generator = np.random.default_rng([self.seed, 5])
        chosen = sorted(generator.permutation(len(rows))[: config.described_chats].tolist())
        self.descriptions = []
        self.eval()
        for start in range(0, len(chosen), 2 * AT_ONCE):
            part = [rows[n] for n in chosen[start : start + 2 * AT_ONCE]]
            asked = generator.integers(len(config.ordinary), size=len(part)).tolist()
            shown = [split.images.images(np.array(split.chats[n].pictures[:1]))[0] for n in part]
            prompts = [asking(config.ordinary[a], picture) for a, picture in zip(asked, shown, strict=True)]
            found = self.answers(prompts, temperature=config.pair_sampling, draw=2_000_000 + start)
            for n, answer in zip(part, found, strict=True):
                messages = described(Prompt(split.chats[n].prompt), answer.text).messages
                tokens = self.model.tokenizer.chat((*messages, split.chats[n].messages[-1]))
                if sum(map(len, tokens)) <= config.context:
                    self.descriptions.append([n, answer.text])
        self.train()
        if not self.descriptions:
            raise CounterpointError(f"no chat with a description fits the context of {config.context}; raise --context")
        if left := len(chosen) - len(self.descriptions):
            self.warnings.append(
                f"{left} of {len(chosen)} chats and their descriptions exceed --context and are left out"
            )

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Take the pairs or descriptions of this step, in the order of the epoch, and this process's share of them."""
        if self.stage_name not in ("preferences", "descriptions"):
            return batch
        assert self.survey is not None
        rank, size = world()
        config, position = self.config, self.position
        every = self.pairs if self.stage_name == "preferences" else self.descriptions
        order = np.random.default_rng([self.seed, position.stage, position.epoch]).permutation(len(every))
        first = (position.step % self.steps_per_epoch) * config.batch_size
        mine = [every[n] for n in order[first : first + config.batch_size][rank::size].tolist()]
        return self._pairs(mine) if self.stage_name == "preferences" else self._described(mine)

    def _pairs(self, pairs: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Make one batch of the better answers, and after them the worse ones where the loss needs them."""
        assert self.survey is not None
        kinds = (2,) if self.config.objective == "sft" else (2, 3)
        pixels = self._pictures(self.survey).images(np.array([pair[0] for pair in pairs], np.int64))
        pictures = torch.from_numpy(np.ascontiguousarray(pixels))[:, None].repeat(len(kinds), 1, 1, 1, 1)
        messages = [
            (Message("user", f"{IMAGE} {self.config.ordinary[pair[1]]}"), Message("assistant", pair[at]))
            for at in kinds
            for pair in pairs
        ]
        rows = rows_of(self.model.tokenizer, messages)
        rows |= {"pictures": pictures, "counts": torch.ones(len(messages), dtype=torch.int64)}
        return {name: value.to(self.device) for name, value in rows.items()} | {"pairs": len(pairs)}

    def _described(self, chosen: Sequence[Sequence[Any]]) -> dict[str, Any]:
        assert self.survey is not None
        split = self.survey.split("train")
        chats = [split.chats[n] for n, _ in chosen]
        messages = [
            (*described(Prompt(chat.prompt), text).messages, chat.messages[-1])
            for chat, (_, text) in zip(chats, chosen, strict=True)
        ]
        rows = rows_of(self.model.tokenizer, messages) | pictures_of(chats, split)
        return {name: value.to(self.device) for name, value in rows.items()}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        if "pairs" not in batch or config.objective == "sft":
            return super().loss(batch)
        policy, labels = self.answer_logits(batch)
        reference = self.unadapted(batch)
        (better, worse), (chosen, rejected) = policy.chunk(2), labels.chunk(2)
        first, second = reference.chunk(2)
        weights = config.beta, config.alpha, config.rejected_scoring
        losses = regularized_dpo(better, worse, first, second, chosen, rejected, *weights)
        with torch.no_grad():
            gains = answer_log_probability(policy, labels) - answer_log_probability(reference, labels)
            gain, other = gains.chunk(2)
        return {
            "loss": global_mean(losses),
            "chosen_reward": global_mean(config.beta * gain),
            "rejected_reward": global_mean(config.beta * other),
            "reward_accuracy": global_mean((gain > other).to(losses.dtype)),
        }

    # --- answers

    def answers(
        self, prompts: Sequence[Prompt], *, decoder: Decoder | None = None, draw: int = 0, **changed: Any
    ) -> list[Answer]:
        if self.config.describe and not self.training and "temperature" not in changed:
            seen = [n for n, prompt in enumerate(prompts) if prompt.pictures]
            asked = [asking(self.config.ordinary[0], prompts[n].pictures[0]) for n in seen]
            told = super().answers(asked, decoder=decoder, draw=draw)
            by = {n: answer.text for n, answer in zip(seen, told, strict=True)}
            prompts = [described(prompt, by[n]) if n in by else prompt for n, prompt in enumerate(prompts)]
        return super().answers(prompts, decoder=decoder, draw=draw, **changed)

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show some pairs that the model made."""
        found = super().figures(survey)
        if not self.pairs:
            return found
        images = self._pictures(survey)
        cells = []
        for row, _, good, bad, how in self.pairs[:SHOWN]:
            text = f"preferred: {good} · worse ({how}): {bad}"
            cells.append({"png": png(images.images(np.array([row]))[0]), "text": text})
        caption = "Pairs that the model made of unlabelled pictures."
        return found | {"Preferences of its own": captioned(cells, 3, caption)}


RECIPE = {
    "epochs": 7,
    "model": "llava-64-2-4",
    "context": 96,
    "vocabulary": 400,
    "evaluate_every": 7,
    "ordinary": ("describe the picture .",),
    "guided": "describe the picture with care .",
    "inventive": ("imagine more in the picture .",),
    "pictures": 600,
    "preference_epochs": 4,
    "rank": 8,
}
SYSTEM = System(
    slug="stic",
    task="chats",
    config=STICConfig,
    learner=STIC,
    data="grid-chats?styles=1&invented=0.25&unlabelled=600",
    recipes={"grid-chats": RECIPE},
)
