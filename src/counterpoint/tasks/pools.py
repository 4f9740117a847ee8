"""The pool of a model that learns from questions it finds difficult: items with answers, scores and the round they came from.

The pool is plain data. `to_json` gives all of it, for a checkpoint, and `from_json` restores it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from counterpoint.core.reviews import is_similar, is_well_formed
from counterpoint.encoders.messages import IMAGE, Message

Scope = Literal["picture", "all"]


def question_of(messages: Sequence[Message]) -> str:
    """Return the last message of a prompt, without marks of pictures."""
    return " ".join(messages[-1].text.replace(IMAGE, " ").split())


class Draft(NamedTuple):
    """A new question before the filters."""

    messages: tuple[Message, ...]
    pictures: tuple[int, ...] = ()
    group: str = ""
    written: bool = False  # by a model; a question that a person wrote needs no check of its form
    ended: bool = True  # False for a text that was cut at the limit


@dataclass
class Item:
    """A question of the pool."""

    number: int
    messages: tuple[Message, ...]  # the prompt
    pictures: tuple[int, ...] = ()  # of the training pictures; unlabelled ones count on after them
    group: str = ""  # kind of question
    origin: int = 0  # round that it came from; 0: the seeds
    parent: int = -1  # item that seeded it; -1: none
    how: str = "seed"  # or of which seed: difficult, easy, random, uniform
    answer: str = ""  # the teacher's
    said: str = ""  # the student's, at the last assessment
    scores: tuple[float, float] | None = None  # of teacher and student, at the last assessment
    uses: int = 0  # times that it was a seed

    @property
    def question(self) -> str:
        """The last message, without marks of pictures."""
        return question_of(self.messages)

    @property
    def gap(self) -> float | None:
        """The teacher's score minus the student's; None where it has no scores."""
        return None if self.scores is None else self.scores[0] - self.scores[1]


@dataclass
class Pool:
    """Items, and the filters of new ones.

    Attributes:
        max_similarity: A question with a higher ROUGE-L to a kept one is left out.
        scope: Compare with questions about the same pictures ("picture"), or with every one ("all", as Lion does).
        items: The items; an item's number is its position.
    """

    max_similarity: float = 0.7
    scope: Scope = "picture"
    items: list[Item] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __getitem__(self, number: int) -> Item:
        return self.items[number]

    def add(self, draft: Draft, *, origin: int = 0, parent: int = -1, how: str = "seed") -> Item:
        """Add a question without a filter; return its item."""
        item = Item(len(self.items), draft.messages, draft.pictures, draft.group, origin, parent, how)
        self.items.append(item)
        return item

    def reason(self, draft: Draft, fits: Callable[[Draft], bool] = lambda draft: True) -> str:
        """Return why a question is left out; "" for one to keep.

        Reasons are "cut off", "malformed" (`is_well_formed`), "too long" (`fits` is False) and "similar" (ROUGE-L).
        """
        text = question_of(draft.messages)
        if not draft.ended:
            return "cut off"
        if not text or (draft.written and not is_well_formed(text)):
            return "malformed"
        if not fits(draft):
            return "too long"
        near = (item for item in self.items if self.scope == "all" or item.pictures == draft.pictures)
        return "similar" if any(is_similar(text, item.question, self.max_similarity) for item in near) else ""

    def grow(
        self,
        drafts: Sequence[Draft],
        seeds: Sequence[Item],
        hows: Sequence[str],
        origin: int,
        fits: Callable[[Draft], bool] = lambda draft: True,
    ) -> tuple[list[Item], dict[str, int]]:
        """Add the questions that pass the filters; count the others by reason.

        Args:
            drafts: new questions.
            seeds: the item that each came from.
            hows: why each seed was chosen.
            origin: number of the round.
            fits: whether a question fits the model.
        """
        added, left = [], Counter[str]()
        for draft, seed, how in zip(drafts, seeds, hows, strict=True):
            if why := self.reason(draft, fits):
                left[why] += 1
            else:
                added.append(self.add(draft, origin=origin, parent=seed.number, how=how))
        return added, dict(left)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the items as plain data."""
        return [asdict(item) | {"messages": [list(message) for message in item.messages]} for item in self.items]

    def from_json(self, kept: Sequence[dict[str, Any]]) -> None:
        """Restore the items that `to_json` gave."""
        self.items = [
            Item(
                **one
                | {
                    "messages": tuple(Message(*message) for message in one["messages"]),
                    "pictures": tuple(one["pictures"]),
                    "scores": None if one["scores"] is None else tuple(one["scores"]),
                }
            )
            for one in kept
        ]


def draw_seeds(items: Sequence[Item], most: int, max_uses: int, rng: np.random.Generator) -> list[Item]:
    """Draw items at random to seed new ones, each at most as often as it may still do so."""
    slots = [item for item in items for _ in range(max_uses - item.uses)]
    return [slots[n] for n in rng.permutation(len(slots))[:most].tolist()]


def draw_alike(items: Sequence[Item], many: int, by_kind: bool, rng: np.random.Generator) -> list[Item]:
    """Draw items with replacement, each as likely; `by_kind`: each kind of question as likely."""
    kinds: dict[str, list[Item]] = {}
    for item in items:
        kinds.setdefault(item.group if by_kind else "", []).append(item)
    named = sorted(kinds)
    chosen = [kinds[named[n]] for n in rng.integers(len(named), size=many).tolist()]
    return [of[int(rng.integers(len(of)))] for of in chosen]
