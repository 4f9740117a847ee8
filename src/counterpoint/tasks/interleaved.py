"""Define the task `interleaved`: a model that reads pictures between words, learned from pairs and documents.

It takes the form `chats`. A chat with one picture and one answer is a pair. A chat with several pictures or answers is a document,
and one without pictures a text. A batch has one kind of chats alone. Batches of the kinds alternate, and an epoch ends with the
shortest kind.

A training batch has what one of `tasks/chats.py` has, and

    batch["labels"]      the tokens of every answer and its end, except before a document's first picture
    batch["paired"]      [B] True for pairs
    batch["captions"]    [B] numbers that are equal where two chats have the same text

An evaluation batch has them, too; there only the last answer is learned. A learner's `predict` also returns "vision" and "text",
the embeddings of the batch's pairs. Its measures are those of `tasks/measures/interleaved.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from counterpoint.core.masking import IGNORED
from counterpoint.core.media_attention import media_times
from counterpoint.core.world import processes
from counterpoint.data.chats import Chat, ChatData, ChatSplit
from counterpoint.data.images import Indices
from counterpoint.data.shown import captioned, png
from counterpoint.encoders.chat_models import Prompt, padded
from counterpoint.encoders.chat_names import check_chat_model, takes_pictures
from counterpoint.encoders.chat_tokenizers import ChatTokenizer
from counterpoint.encoders.interleaved import InterleavedModel, interleaved_tokenizer
from counterpoint.encoders.messages import Message
from counterpoint.engine.loading import Batches, Position
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError, DataError
from counterpoint.tasks.chats import AT_ONCE, ChatLearner, ChatsConfig, ChatsTask, pictures_of, prompt_of, unchanged
from counterpoint.tasks.measures.captions import cider_of
from counterpoint.tasks.measures.interleaved import InterleavedEvaluator
from counterpoint.words import counted

Kind = Literal["pair", "document", "text"]
KINDS: tuple[Kind, ...] = ("pair", "document", "text")
LEAST = 4  # documents in a batch
SHOWN = 6  # pictures on a run's page
NEAREST = 3


@dataclass
class InterleavedConfig(ChatsConfig):
    """Settings of every learner that reads pictures between words."""

    model: str = "llama-s"
    """The language model: llama-W-D-H, qwen2-W-D-H, gpt2-W-D-H, built here, or hf:NAME, a causal language model."""
    most_pictures: int = 3
    """Maximum number of pictures of a training document; longer documents are cut between their answers."""
    document_share: float = 0.25
    """Documents in a batch for each pair in a batch of pairs; a batch has at least 4."""
    shots: tuple[int, ...] = ()
    """Numbers of captioned training pictures in front of a picture to caption; each is measured apart."""
    shot_choice: Literal["random", "similar"] = "random"
    """random: any training pairs; similar: those with the most similar pictures, the nearest last (RICES)."""

    counts: ClassVar[tuple[str, ...]] = (*ChatsConfig.counts, "most_pictures", "epochs")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("document_share")
        if any(shot < 1 for shot in self.shots):
            raise CounterpointError(
                f"shots must be numbers of at least 1, got {list(self.shots)}; 0 is always measured"
            )

    def check(self) -> None:
        """Raise CounterpointError for a model that is no causal language model. Runs before data are read."""
        if self.model.startswith("run:"):
            raise CounterpointError(
                f"model must be a language model, not {self.model}; start from a run with --from RUN"
            )
        check_chat_model(self.model)
        if not self.model.startswith("hf:") and takes_pictures(self.model):
            raise CounterpointError(
                f"{self.model} reads pictures in front of all of its layers; name a language model: llama-W-D-H, qwen2-W-D-H, "
                "gpt2-W-D-H or hf:NAME"
            )

    def facts(self, data: ChatData) -> dict[str, Any]:
        texts = [message.text for chat in data.train.chats for message in chat.messages]
        tokenizer = interleaved_tokenizer(self.model, texts, self.vocabulary)
        return data.spec | {"built": self.model, "tokenizer": tokenizer.to_json()}


def kind_of(chat: Chat) -> Kind:
    """Return whether a chat is a pair, a document or a text."""
    if not chat.pictures:
        return "text"
    answers = sum(message.role == "assistant" for message in chat.messages)
    return "pair" if len(chat.pictures) == answers == 1 else "document"


def text_number(messages: Sequence[Message]) -> int:
    """Return a number of 60 bits that equal texts share, in every process."""
    return int(hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).hexdigest()[:15], 16)


def turn_rows(tokenizer: ChatTokenizer, chats: Sequence[Sequence[Message]]) -> dict[str, Tensor]:
    """Return ids, mask and labels of chats, padded on the right. All answers are learned.

    An answer before a document's first picture is not.
    """
    parts = [tokenizer.turns(messages) for messages in chats]
    ids, mask = padded([[number for numbers, _ in turns for number in numbers] for turns in parts], tokenizer.pad)
    learned = torch.zeros_like(mask)
    for row, turns in enumerate(parts):
        at = 0
        for numbers, answer in turns:
            learned[row, at : at + len(numbers)] = answer
            at += len(numbers)
    marks = ids == tokenizer.image_id
    learned &= ~marks & ((media_times(marks) > 0) | ~marks.any(1)[:, None])
    return {"ids": ids, "mask": mask, "labels": torch.where(learned, ids, IGNORED)}


def windows(chat: Chat, tokenizer: ChatTokenizer, context: int, most: int) -> list[Chat]:
    """Cut a document between its answers into parts of at most `context` tokens and `most` pictures."""
    ends = [n + 1 for n, message in enumerate(chat.messages) if message.role == "assistant"]
    found: list[Chat] = []
    held: tuple[Message, ...] = ()
    at = shown = start = 0

    def fits(messages: Sequence[Message], pictures: int) -> bool:
        return pictures <= most and sum(len(numbers) for numbers, _ in tokenizer.turns(messages)) <= context

    for end in ends:
        new = chat.messages[start:end]
        more = sum(message.text.count("<image>") for message in new)
        if held and not fits((*held, *new), shown + more):
            found.append(replace(chat, messages=held, pictures=chat.pictures[at : at + shown]))
            held, at, shown = (), at + shown, 0
        held, shown, start = (*held, *new), shown + more, end
    return [*found, replace(chat, messages=held, pictures=chat.pictures[at : at + shown])]


class KindBatches(Batches):
    """Batches of one kind each, which alternate; an epoch has as many of each kind as the shortest gives.

    Args:
        kinds: positions of the chats of each kind, none of them empty.
        sizes: number of chats in a batch of each kind, over all processes.
    """

    def __init__(self, kinds: Sequence[Indices], sizes: Sequence[int]) -> None:
        self.kinds = list(kinds)
        self.sizes = [min(size, len(rows)) for size, rows in zip(sizes, kinds, strict=True)]
        self.rounds = min(len(rows) // size for size, rows in zip(self.sizes, kinds, strict=True))
        super().__init__(sum(map(len, kinds)), max(self.sizes))

    def __len__(self) -> int:
        return self.rounds * len(self.kinds)

    def epoch(self, generator: np.random.Generator) -> Iterator[Indices]:
        orders = [generator.permutation(rows) for rows in self.kinds]
        for number in range(self.rounds):
            for order, size in zip(orders, self.sizes, strict=True):
                yield order[number * size : (number + 1) * size]


class _Interleaved(Dataset[dict[str, Any]]):
    """Training batches by lists of positions."""

    def __init__(self, task: InterleavedTask) -> None:
        self.task, self.split = task, task.data.train

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        chats = [self.split.chats[n] for n in positions]
        found: dict[str, Any] = {"index": torch.tensor(list(positions), dtype=torch.int64)}
        found |= turn_rows(self.task.tokenizer, [chat.messages for chat in chats]) | pictures_of(chats, self.split)
        return found | self.task.described(chats)


class _Evaluated(Dataset[dict[str, Any]]):
    """Evaluation batches of a split by lists of positions."""

    def __init__(self, task: InterleavedTask, split: ChatSplit) -> None:
        self.task, self.split = task, split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Any]:
        return self.task.evaluation_batch(self.split, positions)


class InterleavedTask(ChatsTask):
    """Loaders and evaluator of one source of pairs and documents."""

    name = "interleaved"
    headline = "caption_exact"

    def __init__(self, data: ChatData, config: Any) -> None:
        super().__init__(data, config)
        if not data.size:
            raise DataError(
                f"{data.name} has no pictures, which the task interleaved needs; name a source of chats with some"
            )

    def check_model(self) -> None:
        """Take any language model; its settings are checked before data are read."""

    def _windows(self, chat: Chat) -> list[Chat]:
        if kind_of(chat) != "document":
            return [chat]
        return windows(chat, self.tokenizer, self.config.context, self.config.most_pictures)

    def check_facts(self, trained: Mapping[str, Any]) -> None:
        super().check_facts(trained)
        for name in ("tokenizer", "rows"):  # both may be of the data's own tokenizer
            self.__dict__.pop(name, None)

    def check_training(self) -> None:
        """Cut long documents, and check the rest as `ChatsTask` does; also whether the examples of `shots` fit."""
        cut = [self._windows(chat) for chat in self.data.train.chats]
        more = sum(len(parts) > 1 for parts in cut)
        if more:
            self.notes.append(
                f"{more} of {counted(len(cut), 'training chat is', 'training chats are')} cut between their answers into "
                f"{sum(map(len, cut)) - len(cut) + more}, "
                f"of at most {self.config.context} tokens and {self.config.most_pictures} pictures"
            )
            self.data = replace(
                self.data, train=replace(self.data.train, chats=[part for parts in cut for part in parts])
            )
        super().check_training()
        needed = max((sum(map(len, self.tokenizer.chat(chat.messages))) for chat in self._pairs()), default=0)
        most = max(self.config.shots, default=0)
        if needed * (most + 1) + self.config.new_tokens > self.config.context:
            raise CounterpointError(
                f"shots of {most} may need {needed * (most + 1) + self.config.new_tokens} tokens, more than the context of "
                f"{self.config.context}; raise --context, or lower --shots or --new-tokens"
            )
        if most and sum(1 for _ in self._pairs()) < most:
            raise DataError(
                f"{self.data.name}: shots of {most} need as many training pairs of a picture and its caption"
            )

    def _pairs(self) -> Iterator[Chat]:
        return (self.data.train.chats[n] for n in self.rows.tolist() if kind_of(self.data.train.chats[n]) == "pair")

    def tokens_of(self, chat: Chat) -> int:
        """Return the number of tokens of a chat, with those of its pictures."""
        return sum(len(numbers) for numbers, _ in self.tokenizer.turns(chat.messages))

    def described(self, chats: Sequence[Chat]) -> dict[str, Tensor]:
        """Return which chats are pairs, and a number for each text."""
        return {
            "paired": torch.tensor([kind_of(chat) == "pair" for chat in chats], dtype=torch.bool),
            "captions": torch.tensor([text_number(chat.messages) for chat in chats], dtype=torch.int64),
        }

    def batches(self) -> KindBatches:
        """Return the batches of an epoch: one kind each."""
        kinds = np.array([KINDS.index(kind_of(self.data.train.chats[n])) for n in self.rows.tolist()])
        few = max(LEAST, round(self.config.batch_size * self.config.document_share))
        found = [(self.rows[kinds == n], few if n == 1 else self.config.batch_size) for n in range(len(KINDS))]
        return KindBatches([rows for rows, _ in found if len(rows)], [size for rows, size in found if len(rows)])

    def train_loader(self, seed: int, position: Position, batches: Batches | None = None) -> DataLoader[dict[str, Any]]:
        chosen = self.batches() if batches is None else batches
        return DataLoader(_Interleaved(self), batch_size=None, sampler=chosen.bind(seed, position, *processes()))

    def evaluation_batch(self, split: str | ChatSplit, rows: Sequence[int] | Indices) -> dict[str, Any]:
        chosen = self.split(split) if isinstance(split, str) else split
        return super().evaluation_batch(chosen, rows) | self.described([chosen.chats[int(n)] for n in rows])

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        chats = self.split(split)
        at = [list(range(start, min(start + AT_ONCE, len(chats)))) for start in range(0, len(chats), AT_ONCE)]
        return DataLoader(_Evaluated(self, chats), batch_size=None, sampler=at, collate_fn=unchanged)

    def evaluator(self, split: str) -> InterleavedEvaluator:
        return InterleavedEvaluator(self.split(split), self.data.objects)


# ---------------------------------------------------------------------------------------------------------- the learner


class InterleavedLearner(ChatLearner):
    """A model of `encoders.interleaved`, which captions pictures, also after examples, and embeds pictures and texts."""

    model: InterleavedModel

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = super().predict(batch)
        paired = batch["paired"]
        if bool(paired.any()):
            found["vision"] = self.model.embed_pictures(batch["pictures"][paired], batch["counts"][paired])
            found["text"] = self.model.embed_texts(batch["ids"][paired], batch["mask"][paired])
        return found

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure captions after each number of examples that `shots` names."""
        found: dict[str, float] = {}
        for shots in self.config.shots:
            chosen, told = survey.split(split), dict[int, str]()
            for prompts, rows in self._shot_batches(survey, split, shots):
                told |= {n: a.text for n, a in zip(rows, self.answers(prompts, temperature=0.0), strict=True)}
            right = [text.split() == chosen.chats[n].answer.split() for n, text in told.items()]
            found |= {f"caption_exact_{shots}": float(np.mean(right))} if right else {}
            found |= {f"{name}_{shots}": score for name, score in cider_of(chosen, told).items()}
        return found

    def _shot_batches(
        self, survey: Survey, split: str, shots: int, most: int | None = None
    ) -> Iterator[tuple[list[Prompt], list[int]]]:
        """Yield prompts of examples and a picture to caption, with the positions of the chats that have the references."""
        train, chosen = survey.split("train"), survey.split(split)
        known = [n for n in survey.rows.tolist() if kind_of(train.chats[n]) == "pair"]
        asked = [n for n, chat in enumerate(chosen.chats) if kind_of(chat) == "pair"][:most]
        if self.config.shot_choice == "similar":
            likeness = self._summaries(chosen, asked) @ self._summaries(train, known).T
            nearest = likeness.topk(shots, 1).indices.flip(1).tolist()
        else:
            rng = np.random.default_rng([self.seed, shots, len(asked)])
            nearest = [rng.choice(len(known), shots, replace=False).tolist() for _ in asked]
        for start in range(0, len(asked), AT_ONCE):
            prompts = []
            for row in range(start, min(start + AT_ONCE, len(asked))):
                chat = chosen.chats[asked[row]]
                examples = [train.chats[known[n]] for n in nearest[row]]
                own = prompt_of(chat, chosen)
                before = [message for example in examples for message in example.messages]
                shown = [picture for example in examples for picture in prompt_of(example, train).pictures]
                prompts.append(Prompt((*before, *own.messages), (*shown, *own.pictures)))
            yield prompts, asked[start : start + AT_ONCE]

    @torch.no_grad()
    def _summaries(self, split: ChatSplit, rows: Sequence[int]) -> Tensor:
        """Return unit summaries [rows, width] of the pictures of pairs."""
        parts = []
        for start in range(0, len(rows), AT_ONCE):
            shown = pictures_of([split.chats[n] for n in rows[start : start + AT_ONCE]], split)
            parts.append(self.model.read_pictures(*(shown[name].to(self.device) for name in ("pictures", "counts")))[0])
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show some test pictures with their captions after 0 and more examples, and the nearest texts."""
        split = survey.split("test")
        pairs = [n for n, chat in enumerate(split.chats) if kind_of(chat) == "pair"]
        if not pairs:
            return super().figures(survey)
        every = pairs[:: max(1, len(pairs) // 200)]
        batch = survey.batch("test", every)
        vision, text = (
            torch.nn.functional.normalize(rows, dim=1)
            for rows in (
                self.model.embed_pictures(batch["pictures"], batch["counts"]),
                self.model.embed_texts(batch["ids"], batch["mask"]),
            )
        )
        cells = []
        shown = every[:: max(1, len(every) // SHOWN)][:SHOWN]
        told = self.answers([prompt_of(split.chats[n], split) for n in shown], temperature=0.0)
        for n, answer in zip(shown, told, strict=True):
            order = (text @ vision[every.index(n)]).sort(descending=True)
            near: dict[str, float] = {}
            for at, value in zip(order.indices.tolist(), order.values.tolist(), strict=True):
                near.setdefault(split.chats[every[at]].answer, value)
            listed = ", ".join(f"{name} ({value:.2f})" for name, value in list(near.items())[:NEAREST])
            text_of = f"reference: {split.chats[n].answer} · caption: {answer.text} · nearest texts: {listed}"
            assert split.images is not None
            cells.append({"png": png(split.images.images(np.array(split.chats[n].pictures))[0]), "text": text_of})
        caption = (
            "Test pictures, the captions that the upper half writes, and the nearest texts by the lower half (cosine)."
        )
        return super().figures(survey) | {"Captions and retrieval": captioned(cells, 3, caption)}


TASK = InterleavedTask
