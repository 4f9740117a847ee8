"""Define students of the task `chats` that learn from a pool of questions, which a teacher answers and which grows.

The teacher is a black box: texts are all that is taken from it. Its calls are counted. A checkpoint keeps the pool, the items of
the current round and the records of all rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.core.masking import IGNORED
from counterpoint.core.world import world
from counterpoint.data.shown import png
from counterpoint.encoders.chat_models import Prompt, stacked
from counterpoint.encoders.decoding import Answer, answers
from counterpoint.encoders.messages import Message
from counterpoint.engine.loading import Steps
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.tasks.chats import AT_ONCE, rows_of
from counterpoint.tasks.measures.rounds import accuracy_by_group, round_figures, smallest_rise
from counterpoint.tasks.pools import Draft, Item, Pool
from counterpoint.tasks.rounds import Relatives
from counterpoint.tasks.taught_chats import TaughtChatLearner, answered
from counterpoint.words import counted


class PooledChatLearner(TaughtChatLearner):
    """A student, its teacher, and the pool that grows from round to round. Subclasses add stages that fill `rows`.

    Attributes:
        pool: All items.
        rows: Numbers of the items that the current round learns; [] where it learns none.
        records: What happened in each round.
        ended: Whether the rounds are over.
    """

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.pool = Pool(config.max_similarity, config.similar_to)
        self.rows: list[int] = []
        self.records: list[dict[str, Any]] = []
        self.ended = False

    def structure(self) -> dict[str, Any]:
        if not len(self.pool):
            return {}
        return {"pool": self.pool.to_json(), "rows": self.rows, "records": self.records, "ended": self.ended}

    def restructure(self, structure: Mapping[str, Any]) -> None:
        self.pool.from_json(structure.get("pool", []))
        self.rows, self.records = list(structure.get("rows", [])), list(structure.get("records", []))
        self.ended = bool(structure.get("ended", False))

    def row_wise(self) -> Sequence[tuple[torch.nn.Module, str]]:
        return [(self.model, "forward"), *([(self.teacher, "forward")] if self.teacher is not None else [])]

    # --- the pool

    def seeds(self, survey: Survey) -> list[Draft]:
        """Return the questions that the pool starts with: of the training chats without captions."""
        chats = [survey.split("train").chats[n] for n in answered(survey).tolist()]
        asked = [chat for chat in chats if chat.kind != "caption"]
        return [Draft(chat.prompt, chat.pictures, chat.group or chat.question) for chat in asked]

    def shown(self, survey: Survey, item: Item | Draft) -> Prompt:
        """Return an item as a model takes it. Pictures after the training ones are unlabelled ones."""
        return Prompt(item.messages, tuple(self._pixels(survey, item.pictures)))

    def _pixels(self, survey: Survey, places: Sequence[int]) -> list[Any]:
        images, further = survey.split("train").images, survey.unlabelled
        known = 0 if images is None else len(images)
        return [
            images.images(np.array([n]))[0] if n < known else further.images(np.array([n - known]))[0] for n in places
        ]

    def relatives(self, survey: Survey) -> Relatives:
        """Return the augmentor that asks the questions of the training chats about other pictures."""
        known: dict[str, dict[tuple[Message, ...], None]] = {}
        for seed in self.seeds(survey):
            known.setdefault(seed.group, {})[seed.messages] = None
        images, further = survey.split("train").images, survey.unlabelled
        start = 0 if images is None else len(images)
        places = range(start, start + len(further)) if further is not None else range(start)
        return Relatives({kind: list(prompts) for kind, prompts in known.items()}, places)

    def fits(self, draft: Draft) -> bool:
        """Return whether a question leaves room for an answer, for student and teacher."""
        models = (self.model, self._answering())
        room = self.config.context - self.config.new_tokens
        return all(len(model.tokenizer.prompt(draft.messages)) <= room for model in models)

    def ask(self, prompts: Sequence[Prompt], temperature: float = 0.0, new_tokens: int = 0) -> list[Answer]:
        """Let the teacher answer prompts."""
        generator = torch.Generator().manual_seed(len(self.pool))
        usual: dict[str, Any] = {"new_tokens": new_tokens or self.config.new_tokens, "temperature": temperature}
        model = self._answering().eval()
        parts = [prompts[start : start + AT_ONCE] for start in range(0, len(prompts), AT_ONCE)]
        return [answer for part in parts for answer in answers(model, part, generator=generator, **usual)]

    def label(self, survey: Survey, items: Sequence[Item], record: dict[str, Any]) -> list[Item]:
        """Let the teacher answer items. Return those that it answers; empty and endless answers are counted and left out.

        Raises CounterpointError where no item of the pool has an answer.
        """
        found = self.ask([self.shown(survey, item) for item in items])
        record["calls"] = record.get("calls", 0) + len(items)
        for item, answer in zip(items, found, strict=True):
            item.answer = answer.text if answer.ended else ""
        kept = [item for item in items if item.answer]
        if left := len(items) - len(kept):
            most = self.config.new_tokens
            told = (
                f"the teacher gives {left} of {counted(len(items), 'question')} no answer, or one of over {most} tokens"
            )
            if not any(item.answer for item in self.pool):
                raise CounterpointError(f"{told}; raise --new-tokens, or train the teacher longer")
            record["unanswered"] = record.get("unanswered", 0) + left
            self.warnings.append(f"{told}; they are left out")
        return kept

    def say(self, survey: Survey, items: Sequence[Item]) -> None:
        """Let the student answer items."""
        for start in range(0, len(items), AT_ONCE):
            part = items[start : start + AT_ONCE]
            found = self.answers([self.shown(survey, item) for item in part], temperature=0.0)
            for item, answer in zip(part, found, strict=True):
                item.said = answer.text

    # --- a step

    def pool_steps(self, survey: Survey) -> Steps:
        """Return the batches of a round: one pass over its items."""
        return Steps(max(1, math.ceil(len(self.rows) / self.config.batch_size)))

    def pool_batch(self) -> dict[str, Any]:
        """Make the batch of this step, in the order of the epoch: this process's share of it. {} where nothing is learned."""
        assert self.survey is not None
        rank, size = world()
        many, position = self.config.batch_size, self.position
        order = np.random.default_rng([self.seed, position.stage, position.epoch]).permutation(len(self.rows))
        first = (position.step % self.steps_per_epoch) * many
        if not self.rows:
            return {}
        batch = order[first : first + many]
        mine = batch[rank::size]  # empty where the last batch has fewer items than there are processes
        items = [self.pool[self.rows[n]] for n in (mine if len(mine) else batch[:1]).tolist()]
        found = rows_of(self.model.tokenizer, [(*one.messages, Message("assistant", one.answer)) for one in items])
        if not len(mine):
            found["labels"].fill_(IGNORED)
        pixels = [self._pixels(self.survey, item.pictures) for item in items]
        if any(pixels):
            found["counts"] = torch.tensor([len(one) for one in pixels])
            flat = torch.from_numpy(np.stack([picture for one in pixels for picture in one]))
            found["pictures"] = stacked(flat, found["counts"])
        return {name: value.to(self.device) for name, value in found.items()}

    def still(self) -> dict[str, Tensor]:
        """Return a loss of 0 whose gradient is 0."""
        total = sum((p.sum() for p in self.model.parameters() if p.requires_grad), torch.zeros((), device=self.device))
        return {"loss": 0.0 * total}

    # --- evaluation

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Measure accuracies by kind of question, the pool, the teacher's calls, and the smallest rise from round to round."""
        by = accuracy_by_group(survey.split(split), self.said)
        if split == "valid" and self.records and by and self.rows:
            self.records[-1]["accuracy"] = by
        found = super().measures(survey, split) | {f"{name}_accuracy": value for name, value in by.items() if name}
        if self.records:
            found |= {"pool": float(len(self.pool)), "teacher_calls": float(sum(one["calls"] for one in self.records))}
            rise = smallest_rise(self.records)
            found |= {} if rise is None else {"smallest_rise": rise}
        return found

    def figures(self, survey: Survey) -> dict[str, Any]:
        """Show accuracy and gap by round and kind of question, the rounds' numbers, and some difficult items."""

        def shown(places: Sequence[int]) -> str:
            return png(self._pixels(survey, places[:1])[0]) if places else ""

        return super().figures(survey) | round_figures(self.records, shown)
