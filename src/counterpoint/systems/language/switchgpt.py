"""SwitchGPT: a language model learns from few examples which modality a request wants, and writes the prompt of its converter.

Wang, Zhuang, Wu: "SwitchGPT: Adapting Large Language Models for Non-Text Outputs", arXiv 2309.07623. The authors' repository is
empty. Formats, parser and settings are those of ModaVerse (CVPR 2024), by the same first author.

    request         "how does the ruby look"
    meta-response   "Modality: [IMAGE] Prompt: a red ruby"     for [TEXT] the prompt is the answer
    L               cross-entropy of the meta-response's tokens; the flag counts `flag_weight` times

Stages:

    model     plain chats, left out where `model` names a finished one; no flag is read or written
    flags     an adapter (LoRA) and the rows of the flags learn L from `examples` meta-responses, balanced over the modalities

A parsed reply goes to the converter of its modality (`counterpoint.use.converters`). Nothing that a model writes is executed.
L is in core/answers.py; the parser is in encoders/meta_responses.py, the rows of the flags are in encoders/flags.py.

- Certain, by ModaVerse's code: format and parser. LoRA of rank 32 and scale 1 on the attention, dropout 0.1. Weight decay 0.001,
  warm-up over a tenth of the steps, clipping at 1.
- Chosen: sizes, `flag_weight`, `constrained`, the mean of existing rows as the start of a flag's row. ModaVerse trains all rows.
- Left out: media as input (ModaVerse's frozen encoder and linear layer); prompts compared by a sentence encoder.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.core.answers import flag_weighted_lm_loss, masked_lm_loss
from counterpoint.core.masking import IGNORED
from counterpoint.data.chats import Chat, ChatData
from counterpoint.data.images import Indices
from counterpoint.encoders.chat_models import ChatModel
from counterpoint.encoders.chat_tokenizers import ChatTokenizer
from counterpoint.encoders.decoding import Decoder
from counterpoint.encoders.flags import FlagDecoder, flag_ids, make_room, opening, start_rows, with_flags
from counterpoint.encoders.messages import Message
from counterpoint.encoders.meta_responses import FLAGS, FORM, TEXT, named_flags, parse_meta_response, render
from counterpoint.engine.loading import RowBatches
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, RunError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.adapted_chats import of_adapter, plain_name, with_adapter
from counterpoint.tasks.chats import ChatLearner, ChatsConfig, finished_chat, rows_of
from counterpoint.tasks.switching import SwitchingLearner

ADAPTER = "flags"
ROUTERS = ("keywords", "words", "states", "shots")


@dataclass
class SwitchGPTConfig(ChatsConfig):
    """Settings of SwitchGPT. Those of the adapter are ModaVerse's; the model that is trained here is small."""

    lr: float = 1.6e-2
    weight_decay: float = 1e-3
    model: str = "llama-s"
    warmup: float = 0.1
    flags: tuple[str, ...] = FLAGS
    """The modalities, each in brackets; [TEXT] is one of them."""
    examples: int = 0
    """Number of meta-responses that are learned, balanced over the modalities, at least 0; 0: all."""
    tuning_epochs: int = 1
    """Passes over the meta-responses, at least 0; 0: measure the model without tuning."""
    tuning_lr: float = 8e-3
    """Learning rate of the meta-responses at a batch of 256, > 0 (ModaVerse: 5e-4 at a batch of 16)."""
    tuning: Literal["lora", "full"] = "lora"
    """lora: adapter and rows of the flags; full: all weights and these rows, without the adapter."""
    flag_weight: float = 1.0
    """Weight of a flag's token in the loss, at least 1."""
    constrained: bool = False
    """Decode the form of a meta-response, with one flag by a softmax over the flags alone."""
    shuffled: bool = False
    """Give the flags to the requests at random: a control."""
    rank: int = 32
    """Rank of the adapter, at least 1."""
    lora_dropout: float = 0.1
    """Dropout probability of the adapter's inputs, 0 to 1."""
    attention_only: bool = True
    """Put the adapter on the layers of the attention alone."""
    compare: tuple[str, ...] = ()
    """Routers to measure on the same requests: keywords (rules), words (logistic regression of word counts), states (of the model's
    last state), shots (the untuned model after a demonstration of each modality, which names it by a word). `gain_over_NAME` is the
    difference in modality_accuracy."""

    counts: ClassVar[tuple[str, ...]] = (*ChatsConfig.counts, "rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_share("lora_dropout")
        self.need_positive("tuning_lr")
        if self.flag_weight < 1 or min(self.examples, self.tuning_epochs) < 0:
            raise CounterpointError(
                f"flag_weight must be at least 1, examples and tuning_epochs at least 0; got {self.flag_weight}, {self.examples} "
                f"and {self.tuning_epochs}"
            )
        wrong = [flag for flag in self.flags if not FORM.fullmatch(flag)]
        if wrong or TEXT not in self.flags or len(set(self.flags)) < max(2, len(self.flags)):
            raise CounterpointError(
                f"flags are two or more different capital words in brackets, with {TEXT}; got {', '.join(self.flags)}"
            )
        for name in self.compare:
            if name not in ROUTERS:
                raise unknown("router", name, ROUTERS)

    def facts(self, data: ChatData) -> dict[str, Any]:
        """Return the facts of the data; the tokenizer has the flags, which it does not learn from the texts."""
        chats = [Chat(tuple(Message(m.role, bare(m.text)) for m in chat.messages)) for chat in data.train.chats]
        found = super().facts(replace(data, train=replace(data.train, chats=chats, images=None)))
        tokenizer = with_flags(ChatTokenizer.from_json(found["tokenizer"]), self.flags)
        return found | data.spec | {"tokenizer": tokenizer.to_json()}


def bare(text: str) -> str:
    """Return a text without flags."""
    return FORM.sub(" ", text)


class SwitchGPT(SwitchingLearner):
    """A model, the adapter that learns to switch, and the rows of the flags."""

    config: SwitchGPTConfig
    adapter = ADAPTER

    def build(self, data: Any) -> ChatModel:
        config = self.config
        tokenizer = with_flags(ChatTokenizer.from_json(data.tokenizer), config.flags)
        facts = SimpleNamespace(built=data.built, tokenizer=tokenizer.to_json(), size=data.size)
        model = ChatLearner.build(self, facts)
        make_room(model)
        self.flags = flag_ids(tokenizer, config.flags)
        self.opening = opening(tokenizer)
        more: dict[str, Any] = {"scale": 1.0, "dropout": config.lora_dropout, "attention": config.attention_only}
        return with_adapter(model, config.rank, self.adapter, tokens=sorted(self.flags), **more)

    # --- stages

    def stages(self) -> list[Stage]:
        config = self.config

        def learned() -> nn.ParameterList:
            every = self.model.model.named_parameters()
            if config.tuning == "lora":
                return self.adapters
            return nn.ParameterList([p for name, p in every if "lora_" not in name])

        found = [
            Stage(
                "model",
                config.epochs,
                lambda: [self.weights],
                lambda: [self.turn([self.weights], config)],
                batches=lambda survey: RowBatches(self.plain(survey), config.batch_size),
            ),
            Stage(
                "flags",
                config.tuning_epochs,
                lambda: [learned()],
                lambda: [self.turn([learned()], replace(config, lr=config.tuning_lr))],
                batches=lambda survey: RowBatches(self.examples(survey), config.batch_size),
                enter=lambda _: start_rows(self.model, self.flags, self.adapter),
            ),
        ]
        return [one for one in found if one.epochs] or [self.measured_only()]

    @property
    def tunes(self) -> bool:
        """Whether the flags are learned in this stage."""
        return self.stage_name == "flags"

    def plain(self, survey: Survey) -> Indices:
        """Return the training chats without a flag. DataError where there is none."""
        chats = survey.split("train").chats
        found = np.array([n for n in survey.rows.tolist() if chats[n].kind != "meta"], np.int64)
        if not len(found):
            raise DataError(
                "no chat without a modality trains the base model; name a finished one with --model run:RUN or hf:NAME and "
                "--epochs 0, or add plain chats"
            )
        return found

    def examples(self, survey: Survey) -> Indices:
        """Choose the meta-responses that are learned, as many of each modality as there are. DataError without any."""
        chats = survey.split("train").chats
        of: dict[tuple[str, ...], list[int]] = {}
        others: Counter[str] = Counter()
        for n in survey.rows.tolist():
            if chats[n].kind == "meta":
                found = tuple(named_flags(chats[n].answer))
                others.update(set(found) - set(self.config.flags))
                of.setdefault(found, []).append(n)
        if others:
            said = ", ".join(f"{flag} ({count})" for flag, count in sorted(others.items()))
            raise DataError(
                f"training answers have flags that --flags lacks: {said}; add them to --flags, or remove the answers"
            )
        if not of:
            raise DataError(
                "no training answer names a modality; give answers the fields modality and prompt, as in the guide of answers"
            )
        rng = np.random.default_rng([self.seed, 2309_07623])
        ranked = sorted(
            (place, group, n)
            for group, rows in of.items()
            for place, n in enumerate(rng.permutation(sorted(rows)).tolist())
        )
        return np.array(sorted(n for *_, n in ranked[: self.config.examples or len(ranked)]), np.int64)

    def begin(self, survey: Survey) -> None:
        """Check chats and demonstrations. Take the weights of the run that `model` names, which may lack adapter and flags."""
        if self.config.epochs:
            self.plain(survey)
        if self.config.tuning_epochs:
            self.examples(survey)
        if "shots" in self.config.compare:
            self.demonstrations(survey)
        if not self.config.model.startswith("run:"):
            return
        run = finished_chat(self.config.model)
        given = {
            name.removeprefix("model."): value for name, value in run.load_weights().items() if name[:6] == "model."
        }
        if not any(
            bool(value.any()) for name, value in given.items() if "lora_B" in name
        ):  # an adapter that adds nothing
            given = {name: value for name, value in given.items() if not of_adapter(name)}
        theirs = {plain_name(name): value for name, value in given.items()}
        state = self.model.state_dict()
        for name, own in state.items():
            value = given.get(name, theirs.get(plain_name(name)))
            if value is None and of_adapter(name):
                continue
            rows = 0 if value is None else min(len(value), len(own))
            if value is None or not 0 <= len(own) - rows <= len(self.flags) or value[:rows].shape != own[:rows].shape:
                raise RunError(f"{run.path}: its weights do not fit: {name}")
            own[:rows] = value[:rows]
        self.model.load_state_dict(state)

    # --- a step

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Give the requests other flags, for the control."""
        if not self.config.shuffled or not self.tunes:
            return batch
        assert self.survey is not None
        chats = self.survey.split("train").chats
        messages = []
        for n in batch["index"].tolist():
            flag = self.config.flags[int(np.random.default_rng([self.seed, 7, n]).integers(len(self.config.flags)))]
            prompt = parse_meta_response(chats[n].answer, self.config.flags)[1][0]
            messages.append((*chats[n].prompt, Message("assistant", render(flag, prompt))))
        rows = rows_of(self.model.tokenizer, messages)
        return batch | {name: value.to(self.device) for name, value in rows.items()}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits, labels = self.answer_logits(batch)
        if self.tunes:
            return {"loss": flag_weighted_lm_loss(logits, labels, self.flags, self.config.flag_weight)}
        # The base model has no flags yet.
        flags = torch.tensor(self.flags, device=labels.device)
        labels = labels.masked_fill(torch.isin(labels, flags), IGNORED)
        return {"loss": masked_lm_loss(logits.index_fill(2, flags, -torch.inf), labels)}

    # --- answers

    def decoder(self) -> Decoder | None:
        return FlagDecoder(self.model.tokenizer, self.config.flags) if self.config.constrained else None

    @property
    def tuned(self) -> bool:
        """Whether the flags' stage has begun, or a finished run brought them."""
        tables = [p for name, p in self.model.named_parameters() if "lora_B" in name]
        return (self.config.tuning == "full" and self.config.tuning_epochs > 0) or any(bool(p.any()) for p in tables)


RECIPE = {
    "epochs": 3,
    "lr": 0.012,
    "batch_size": 48,
    "model": "llama-64-4-4",
    "context": 64,
    "vocabulary": 800,
    "new_tokens": 20,
    "evaluate_every": 99,
    "examples": 800,
    "tuning_epochs": 6,
    "tuning_lr": 0.04,
    "attention_only": False,
    "compare": ROUTERS[:3],
}
SYSTEM = System(
    slug="switchgpt",
    task="chats",
    config=SwitchGPTConfig,
    learner=SwitchGPT,
    data="media-requests",
    recipes={"media-requests": RECIPE},
)
