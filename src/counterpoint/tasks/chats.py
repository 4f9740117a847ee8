"""Define the task `chats`: a model that answers, with or without pictures, learned from prompts with answers.

A training batch:

    batch["ids"]        [B, T] token numbers of prompt and answer
    batch["mask"]       [B, T] True at tokens, False at padding
    batch["labels"]     [B, T] the token's number in an answer, -100 elsewhere
    batch["pictures"]   [B, most, size, size, 3] uint8, the pictures of each prompt, where the data have pictures
    batch["counts"]     [B] their numbers; further pictures of a row are zeros
    batch["index"]      [B] positions of the chats

An evaluation batch also has "prompts", a list of `Prompt`. For choices it has "options": the same tensors for each possible
answer, and their "messages". Their "owner" is the row of the batch that an option belongs to. A learner's `predict` returns

- "answers", the decoded answers;
- "losses" [B], the mean negative log-probability of the reference answer's tokens, in nats;
- "scores" [options], the mean log-probability of each option's tokens; "sums", where scores are means, the sums.

Its measures are those of `tasks/measures/answers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.answers import answer_log_probability, masked_lm_loss
from counterpoint.core.masking import IGNORED
from counterpoint.core.seeds import generator_of, seed_torch
from counterpoint.core.world import processes
from counterpoint.data.chats import Chat, ChatData, ChatSplit
from counterpoint.data.images import Indices
from counterpoint.encoders.chat_models import ChatModel, Prompt, padded, stacked
from counterpoint.encoders.chat_names import check_chat_model, takes_pictures
from counterpoint.encoders.chat_tokenizers import ChatTokenizer, chat_tokenizer
from counterpoint.encoders.decoding import Answer, Decoder, answers, instructed
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Position, RowBatches, Steps
from counterpoint.engine.optim import OptimConfig, on_lines
from counterpoint.engine.run import Run
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError, RunError
from counterpoint.tasks.measures.answers import ChatEvaluator
from counterpoint.tasks.splits import check_watched, named_split
from counterpoint.words import counted

AT_ONCE = 128  # chats in a batch of the evaluation


@dataclass
class ChatsConfig(OptimConfig):
    """Settings of every learner that answers. Those of the optimiser suit the small models that are built here."""

    optimizer: str = "adamw"
    lr: float = 2.4e-2
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    schedule: Literal["epoch", "step"] = "step"
    epochs: int = 20
    """Passes over the training chats. 0: train nothing; measure a finished model (run:RUN or hf:NAME)."""
    batch_size: int = 32
    """Chats in a batch, over all processes together."""
    model: str = "llava-s"
    """The model: llava-s, llava-W-D-H (with pictures), llama-W-D-H, qwen2-W-D-H, gpt2-W-D-H (without), hf:NAME, or run:RUN, the
    model of a finished run."""
    vocabulary: int = 2000
    """Maximum number of tokens that a model built here learns from the training chats."""
    context: int = 128
    """Maximum number of tokens of prompt and answer together. Longer training chats are left out."""
    dropout: float = 0.0
    """Dropout probability in models that are built here."""
    warmup: float = 0.05
    """Share of a stage's steps over which the learning rate rises; then it falls to 0 on a line."""
    new_tokens: int = 24
    """Maximum number of tokens of an answer."""
    sampling: float = 0.0
    """Temperature of drawn answers; 0: the most probable token at each step."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this share; 1: from all."""
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""

    counts: ClassVar[tuple[str, ...]] = ("batch_size", "vocabulary", "context", "new_tokens", "evaluate_every")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_below_one("dropout", "warmup")
        self.need_share("top_p")
        self.need_count(*self.counts)
        if self.epochs < 0 or self.sampling < 0 or not self.top_p:
            raise CounterpointError(
                f"epochs and sampling must be at least 0 and top_p above 0, got {self.epochs}, {self.sampling} and {self.top_p}"
            )
        if self.new_tokens >= self.context:
            raise CounterpointError(
                f"new_tokens ({self.new_tokens}) must be fewer than context ({self.context}), which also holds the prompt"
            )

    def check(self) -> None:
        """Raise CounterpointError for an unknown model. Runs before data are read."""
        if self.model.startswith("run:"):
            finished_chat(self.model)
        else:
            check_chat_model(self.model)
            if not self.epochs and not self.model.startswith("hf:"):
                raise CounterpointError(
                    f"epochs 0 measures a finished model, and {self.model} has random weights; name run:RUN or hf:NAME"
                )

    def said_before(self) -> str:
        """Return the instruction that stands before each question when it is answered; "": none."""
        return ""

    def facts(self, data: ChatData) -> dict[str, Any]:
        """Return the facts of the data that a learner with these settings needs, fit for JSON."""
        if self.model.startswith("run:"):
            run = finished_chat(self.model)
            theirs = run.facts()
            if theirs["size"] != data.size:
                raise CounterpointError(
                    f"{self.model} takes pictures of {theirs['size']} pixels, {data.name} has {data.size}; use data of its size"
                )
            return data.spec | {"built": theirs["built"], "tokenizer": theirs["tokenizer"]}
        texts = [message.text for chat in data.train.chats for message in chat.messages]
        tokenizer = chat_tokenizer(self.model, texts, vocabulary=self.vocabulary, size=data.size)
        return data.spec | {"built": self.model, "tokenizer": tokenizer.to_json()}


def finished_chat(name: str) -> Run:
    """Open the run that `run:RUN` names. RunError where it is not finished, or its model does not answer."""
    run = Run.finished(name.removeprefix("run:"))
    if run.config.get("task") != "chats":
        raise RunError(
            f"{run.path} is a run of the task {run.config.get('task')}, whose model does not answer; name one of chats"
        )
    return run


# ---------------------------------------------------------------------------------------------------------- the learner


class ChatLearner(Learner):
    """A model that learns the answers of chats. Subclasses add stages, and choose a `decoder`.

    Attributes:
        model: The model that answers.
    """

    config: Any

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(seed)
        seed_torch(seed)
        self.config, self.size = config, data.size
        self.model = self.build(data)

    def build(self, data: Any) -> ChatModel:
        """Build the model from the facts of the data."""
        return ChatModel(
            data.built,
            ChatTokenizer.from_json(data.tokenizer),
            size=data.size,
            context=self.config.context,
            dropout=self.config.dropout,
        )

    def need_room(self, questions: Sequence[str], options: str) -> None:
        """Raise CounterpointError where a question of the system itself leaves no room in the context for its answer.

        Args:
            questions: with the marks of their pictures.
            options: the options that hold them, for the message.
        """
        tokens = [len(self.model.tokenizer.prompt((Message("user", question),))) for question in questions]
        longest = max(range(len(questions)), key=tokens.__getitem__)
        needed = tokens[longest] + self.config.new_tokens
        if needed > self.config.context:
            raise CounterpointError(
                f"the question '{questions[longest][:60]}' and its answer need {needed} tokens, more than the context of "
                f"{self.config.context}; set --context {needed} or more, or shorter questions ({options})"
            )

    def begin(self, survey: Survey) -> None:
        """Take the weights of the run that `model` names."""
        if self.config.model.startswith("run:"):
            run = finished_chat(self.config.model)
            prefix = "model."
            weights = {
                name.removeprefix(prefix): value
                for name, value in run.load_weights().items()
                if name.startswith(prefix)
            }
            try:
                self.model.load_state_dict(weights)
            except RuntimeError as error:
                raise RunError(f"{run.path}: its weights do not fit: {str(error)[:200]}") from error

    def stages(self) -> list[Stage]:
        if self.config.epochs:
            return [Stage("answers", self.config.epochs)]
        return [self.measured_only()]

    def measured_only(self) -> Stage:
        """Return a stage that trains nothing, so that a fit measures the model as it is."""
        return Stage("answer", 1, turns=lambda: [Turn([], loss=self.none)], batches=lambda _: Steps(1), learns=False)

    def none(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a step that trains nothing."""
        return {"loss": torch.zeros((), device=self.device)}

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": masked_lm_loss(*self.answer_logits(batch))}

    def answer_logits(self, batch: dict[str, Any]) -> tuple[Float[Tensor, "n late vocabulary"], Int[Tensor, "n late"]]:
        """Compute the logits of a batch where they predict answers, and cut its labels alike."""
        cut, labels = late(self.model, batch["labels"])
        return self.logits(batch, **cut), labels

    def logits(self, batch: dict[str, Any], **more: Any) -> Float[Tensor, "n tokens vocabulary"]:
        """Compute the model's logits of a batch; `more` goes to the network."""
        found: Tensor = self.model(batch["ids"], batch["mask"], batch.get("pictures"), batch.get("counts"), **more)
        return found

    def row_wise(self) -> Sequence[tuple[torch.nn.Module, str]]:
        return [(self.model, "forward")]

    def turns(self) -> list[Turn]:
        return [self.turn([self.model], self.config)]

    def turn(self, modules: Sequence[torch.nn.Module], config: Any) -> Turn:
        """Return a turn over these modules, whose rate rises and falls on lines."""
        return on_lines(config, modules, self.epochs, self.steps_per_epoch)

    # --- answers

    def decoder(self) -> Decoder | None:
        """Return the rule that answers are decoded by. Default: the model's own logits."""
        return None

    def answers(
        self, prompts: Sequence[Prompt], *, decoder: Decoder | None = None, draw: int = 0, **changed: Any
    ) -> list[Answer]:
        """Answer prompts as the settings say.

        Args:
            prompts: the prompts.
            decoder: the rule. Default: `decoder()`.
            draw: number of the draws; another number gives other drawn answers.
            changed: replaces new_tokens, temperature or top_p.
        """
        config = self.config
        usual = {"new_tokens": config.new_tokens, "temperature": config.sampling, "top_p": config.top_p}
        generator = generator_of(self.seed, draw)
        found: list[Answer] = answers(
            self.model, prompts, decoder or self.decoder(), generator=generator, **usual | changed
        )
        return found

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        index = batch["index"]
        found: dict[str, Any] = {
            "answers": self.answers(batch["prompts"], draw=int(index[0]) if len(index) else 0),
            "losses": -self.mean_log_probability(batch),
        }
        if "options" in batch:
            found["scores"] = self.mean_log_probability(batch["options"])
            found["sums"] = found["scores"] * (batch["options"]["labels"] != IGNORED).sum(1)
        return found

    def mean_log_probability(self, batch: dict[str, Any]) -> Float[Tensor, " n"]:
        """Compute the mean log-probability of the tokens of each answer in a batch."""
        many = (batch["labels"][:, 1:] != IGNORED).sum(1).clamp(min=1)
        return answer_log_probability(*self.answer_logits(batch)) / many


def answer_measures(
    survey: Survey, split: str, answer: Callable[[Sequence[Prompt], int], list[Answer]]
) -> dict[str, float]:
    """Measure answers to all chats of a split.

    Args:
        survey: access to chats.
        split: name of the split.
        answer: answers the prompts of a batch, with the number of the draws (see `ChatLearner.answers`).
    """
    evaluator = survey.evaluator(split)
    for rows in survey.in_batches(split):
        evaluator.take(rows, answer(survey.batch(split, rows)["prompts"], int(rows[0])))
    found: dict[str, float] = evaluator.compute()
    return found


# ------------------------------------------------------------------------------------------------------------- the task


class _Chats(Dataset[dict[str, Any]]):
    """Batches of chats by lists of positions."""

    def __init__(self, split: ChatSplit, tokenizer: ChatTokenizer, *, asked: bool = False) -> None:
        self.split, self.tokenizer, self.asked = split, tokenizer, asked

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        chats = [self.split.chats[n] for n in positions]
        found: dict[str, Any] = {"index": torch.tensor(list(positions), dtype=torch.int64)}
        found |= rows_of(self.tokenizer, [chat.messages for chat in chats])
        found |= pictures_of(chats, self.split)
        if not self.asked:
            return found
        found["prompts"] = [prompt_of(chat, self.split) for chat in chats]
        several = [(row, chat) for row, chat in enumerate(chats) if chat.choices]
        if several:
            options = [(row, chat, choice) for row, chat in several for choice in chat.choices]
            messages = [(*chat.prompt, Message("assistant", choice)) for _, chat, choice in options]
            found["options"] = rows_of(self.tokenizer, messages) | {"messages": messages}
            found["options"]["owner"] = torch.tensor([row for row, _, _ in options])
            found["options"] |= pictures_of([chat for _, chat, _ in options], self.split)
        return found


def pictures_of(chats: Sequence[Chat], split: ChatSplit) -> dict[str, Tensor]:
    """Return the pictures of chats, and their numbers; {} where the data have none."""
    if split.images is None:
        return {}
    counts = torch.tensor([len(chat.pictures) for chat in chats], dtype=torch.int64)
    places = np.array([place for chat in chats for place in chat.pictures], np.int64)
    pixels = torch.from_numpy(np.ascontiguousarray(split.images.images(places)))
    return {"pictures": stacked(pixels, counts), "counts": counts}


def prompt_of(chat: Chat, split: ChatSplit) -> Prompt:
    """Return a chat without its answer, as a model takes it."""
    pictures = () if split.images is None or not chat.pictures else tuple(split.images.images(np.array(chat.pictures)))
    return Prompt(chat.prompt, pictures)


def late(model: ChatModel, labels: Int[Tensor, "n tokens"]) -> tuple[dict[str, int], Int[Tensor, "n late"]]:
    """Return the argument by which a model computes logits where they predict answers, and the labels of these places.

    The first answer of the batch decides how much of the prompts is left out. The output layer has no work there. A model that
    computes all logits gets no argument.
    """
    answers = (labels != IGNORED).any(0)
    if not model.cuts_logits or not bool(answers.any()):
        return {}, labels
    many = labels.shape[1] - max(0, int(answers.int().argmax()) - 1)
    return {"logits_to_keep": many}, labels[:, -many:]


def rows_of(tokenizer: ChatTokenizer, chats: Sequence[Sequence[Message]]) -> dict[str, Tensor]:
    """Return ids, mask and labels of chats, padded on the right."""
    pairs = [tokenizer.chat(messages) for messages in chats]
    ids, mask = padded([[*prompt, *answer] for prompt, answer in pairs], tokenizer.pad)
    labels = torch.full_like(ids, IGNORED)
    for n, (prompt, answer) in enumerate(pairs):
        at = slice(len(prompt), len(prompt) + len(answer))
        labels[n, at] = ids[n, at]
    return {"ids": ids, "mask": mask, "labels": labels}


class ChatsTask:
    """Loaders and evaluator of one source of chats."""

    name = "chats"
    contract = "chats"  # the form of data it takes (see counterpoint.data.load)
    at_once = AT_ONCE

    def __init__(self, data: ChatData, config: Any) -> None:
        if not isinstance(data, ChatData):
            raise CounterpointError(f"{data.name} has no chats, which the task chats needs; name a source of chats")
        if not len(data.train) or not len(data.test):
            raise DataError(f"{data.name}: needs training and test chats, has {len(data.train)} and {len(data.test)}")
        self.data, self.config = data, config
        self.notes: list[str] = []
        self.check_model()

    def check_model(self) -> None:
        """Raise CounterpointError where the data have pictures, which the model does not take."""
        model = self.config.model
        if self.data.size and not model.startswith("run:") and not takes_pictures(model):
            raise CounterpointError(
                f"{model} takes no pictures, which {self.data.name} has; choose --model llava-s or hf:NAME"
            )

    @property
    def headline(self) -> str:
        """The measure that the task judges by."""
        kinds = {chat.kind for chat in self.data.test.chats}
        named = {
            "yes-no": "accuracy",
            "choice": "choice_accuracy",
            "caption": "object_recall",
            "meta": "modality_accuracy",
        }
        return next((measure for kind, measure in named.items() if kind in kinds), "exact")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts from which a learner is built, besides its settings."""
        found: dict[str, Any] = self.config.facts(self.data)
        return found

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The tokenizer: of these chats, or of a trained run (`check_facts`)."""
        return ChatTokenizer.from_json(self.facts["tokenizer"])

    def split(self, name: str) -> ChatSplit:
        """Return the split of this name: train, valid or test. Raises CounterpointError for another name."""
        found: ChatSplit = named_split(self.data, name)
        return found

    def check_training(self) -> None:
        """Raise DataError where the valid split is too small, or no training chat fits the context; count those that do not."""
        check_watched(self.data.name, len(self.data.valid), "chats")
        if not len(self.rows):
            needed = [self.tokens_of(chat) for chat in self.data.train.chats]
            raise DataError(
                f"{self.data.name}: every training chat has more than {self.config.context} tokens; set --context "
                f"{max(needed)} or more (the shortest chat has {min(needed)})"
            )
        for name in ("valid", "test"):
            self.need_room_for_answers(name)
        left = len(self.data.train) - len(self.rows)
        if left:
            self.notes.append(
                f"{left} of {counted(len(self.data.train), 'training chat has', 'training chats have')} more than "
                f"{self.config.context} tokens and are left out; "
                "raise --context to use them"
            )

    def need_room_for_answers(self, name: str) -> None:
        """Raise DataError, before anything is trained, where a question of this split leaves no room for an answer."""
        chats, config = self.split(name).chats, self.config
        instruction = config.said_before()
        asked = (instructed(Prompt(chat.prompt), instruction).messages for chat in chats)
        tokens = [len(self.tokenizer.prompt(messages)) + config.new_tokens for messages in asked]
        long = [n for n, needed in enumerate(tokens) if needed > config.context]
        if long:
            many = f"{len(long)} of {counted(len(chats), f'{name} chat')}"
            many += " under the instruction" * bool(instruction)
            raise DataError(
                f"{self.data.name}: {many} with {config.new_tokens} new tokens exceed the context of {config.context}, first "
                f"'{chats[long[0]].question[:60]}'; set --context {max(tokens)} or more, ask for fewer --new-tokens or shorten them"
            )

    @cached_property
    def rows(self) -> Indices:
        """Positions of the training chats that fit the context."""
        lengths = [self.tokens_of(chat) for chat in self.data.train.chats]
        return np.flatnonzero(np.array(lengths) <= self.config.context)

    def tokens_of(self, chat: Chat) -> int:
        """Return the number of tokens of a chat, with those of its pictures."""
        return sum(map(len, self.tokenizer.chat(chat.messages)))

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        """Take the tokenizer of a trained run, whose model these data are measured by."""
        if trained["size"] != self.data.size:
            raise CounterpointError(
                f"the run's model takes pictures of {trained['size']} pixels, {self.data.name} has {self.data.size}"
            )
        self.facts = dict(trained)

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        """Return the batches of a fit, which depend only on seed and epoch; `batches` replaces them for a stage."""
        chosen = RowBatches(self.rows, self.config.batch_size) if batches is None else batches
        chats = _Chats(self.data.train, self.tokenizer)
        return DataLoader(chats, batch_size=None, sampler=chosen.bind(seed, position, *processes()))

    def evaluation_batch(self, split: str | ChatSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        """Return these chats of a split as a learner's `predict` takes them."""
        chosen = self.split(split) if isinstance(split, str) else split
        return _Chats(chosen, self.tokenizer, asked=True)[list(map(int, rows))]

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Return the chats of a split, in order."""
        chats = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(chats)))) for start in range(0, len(chats), AT_ONCE)]
        return DataLoader(_Chats(chats, self.tokenizer, asked=True), batch_size=None, sampler=at, collate_fn=unchanged)

    def evaluator(self, split: str) -> ChatEvaluator:
        return ChatEvaluator(self.split(split), self.data.objects)


def unchanged(batch: Any) -> Any:
    """Return a batch as it is; by default a loader would make tensors of the prompts' pictures."""
    return batch


def without_pictures(prompt: Prompt) -> Prompt:
    """Return a prompt without its pictures and their marks."""
    messages = (Message(role, " ".join(text.replace(IMAGE, " ").split())) for role, text in prompt.messages)
    return Prompt(tuple(messages))


TASK = ChatsTask
