"""Judge two answers to a question, and make new questions of old ones: assessors and augmentors of rounds of feedback.

An assessor scores pairs of answers from 1 to 10. An augmentor makes a new question of each seed. Both are callables, so that a
learner takes the user's own.

    Likelihood   a score from the model's probability of the answer's tokens
    Agreement    the highest score for an answer that equals the reference, the lowest for another
    Judge        a model of chats reads both answers and writes a review
    Relatives    a question of the same kind, about another picture
    Rewriter     a model of chats writes a question like the seed, about the seed's picture
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.answers import answer_log_probability
from counterpoint.core.masking import IGNORED
from counterpoint.core.reviews import UNREADABLE, parse_review
from counterpoint.encoders.chat_models import ChatModel, Prompt, stacked
from counterpoint.encoders.decoding import Answer
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.errors import CounterpointError
from counterpoint.tasks.chats import AT_ONCE, late, rows_of
from counterpoint.tasks.pools import Draft, Item, question_of

Ask = Callable[[Sequence[Prompt]], Sequence[Answer]]
LOWEST, HIGHEST = 1.0, 10.0

# --- assessors


@runtime_checkable
class Assessor(Protocol):
    """A judge of pairs of answers.

    Attributes:
        calls: Calls of a model for each pair and order.
        sees_order: Whether scores may depend on the order. If not, one order is enough.
    """

    calls: int
    sees_order: bool

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], reference: Sequence[str]
    ) -> Float[Tensor, "n 2"]:
        """Return the scores of the first and second answers, 1 to 10; (-1, -1) for a review that is off the format."""
        ...


class Agreement:
    """Give 10 to an answer that has the words of the teacher's, and 1 to another."""

    calls, sees_order = 0, False

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], reference: Sequence[str]
    ) -> Float[Tensor, "n 2"]:
        """Return the scores; `reference` holds the teacher's answers."""
        equal = [
            [text.split() == its.split() for text in pair] for *pair, its in zip(first, second, reference, strict=True)
        ]
        return torch.where(torch.tensor(equal, dtype=torch.bool).view(-1, 2), HIGHEST, LOWEST)


class Likelihood:
    """Give 1 + 9 p to an answer, p the geometric mean of the model's probabilities of its tokens."""

    calls, sees_order = 2, False

    def __init__(self, model: ChatModel) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], reference: Sequence[str]
    ) -> Float[Tensor, "n 2"]:
        """Return the scores."""
        model = self.model.eval()
        parts = []
        for start in range(0, len(prompts), AT_ONCE):
            chosen, at = prompts[start : start + AT_ONCE], slice(start, start + AT_ONCE)
            both = [mean_probability(model, chosen, texts[at]) for texts in (first, second)]
            parts.append(LOWEST + (HIGHEST - LOWEST) * torch.stack(both, 1))
        return torch.cat(parts) if parts else torch.empty(0, 2)


def mean_probability(model: ChatModel, prompts: Sequence[Prompt], texts: Sequence[str]) -> Float[Tensor, " n"]:
    """Compute the geometric mean of the probabilities of each answer's tokens, its end among them."""
    batch = rows_of(
        model.tokenizer,
        [(*prompt.messages, Message("assistant", text)) for prompt, text in zip(prompts, texts, strict=True)],
    )
    batch = {name: value.to(model.device) for name, value in batch.items()}
    shown: tuple[Tensor, ...] = ()
    if any(prompt.pictures for prompt in prompts):
        counts = torch.tensor([len(prompt.pictures) for prompt in prompts])
        pixels = torch.from_numpy(np.stack([picture for prompt in prompts for picture in prompt.pictures]))
        shown = stacked(pixels, counts).to(model.device), counts.to(model.device)
    cut, labels = late(model, batch["labels"])
    logs = answer_log_probability(model(batch["ids"], batch["mask"], *shown, **cut), labels)
    return (logs / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)).exp().cpu()


class Judge:
    """Let a model of chats review both answers, and read its scores.

    Args:
        ask: answers prompts.
    """

    calls, sees_order = 1, True
    asks = (
        "Rate both replies to the question from 1 to 10 for being right, relevant and exact. Explain first. End with two lines:\n"
        "Assistant 1: its score\nAssistant 2: its score"
    )

    def __init__(self, ask: Ask) -> None:
        self.ask = ask

    def __call__(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], reference: Sequence[str]
    ) -> Float[Tensor, "n 2"]:
        """Return the scores of the reviews."""
        shown = [
            _extended(prompt, _asked(one, other)) for prompt, one, other in zip(prompts, first, second, strict=True)
        ]
        found = [parse_review(answer.text) for answer in self.ask(shown)]
        kept = [pair if min(pair) >= LOWEST and max(pair) <= HIGHEST else UNREADABLE for pair in found]
        return torch.tensor(kept).view(-1, 2)


def check_reviews(model: ChatModel, prompts: Sequence[Prompt], new_tokens: int, written_tokens: int) -> None:
    """Raise CounterpointError where a model has no room for a review of two answers to the longest question.

    Args:
        model: the model that reviews.
        prompts: the questions.
        new_tokens: maximum number of tokens of an answer.
        written_tokens: maximum number of tokens of a review.
    """
    lengths = (len(model.tokenizer.prompt(_extended(prompt, _asked("", "")).messages)) for prompt in prompts)
    needed = max(lengths, default=0) + 2 * new_tokens + written_tokens
    if needed > model.context:
        raise CounterpointError(
            f"a review needs up to {needed} tokens, {written_tokens} of them its own, and the context has {model.context}; raise "
            "--context, or lower --written-tokens"
        )


def _asked(one: str, other: str) -> str:
    return f"\nAssistant 1 replied: {one}\nAssistant 2 replied: {other}\n{Judge.asks}"


def _extended(prompt: Prompt, text: str) -> Prompt:
    role, question = prompt.messages[-1]
    return Prompt((*prompt.messages[:-1], Message(role, question + text)), prompt.pictures)


# --- augmentors


@runtime_checkable
class Augmentor(Protocol):
    """A maker of new questions."""

    def __call__(self, seeds: Sequence[Item], rarer: Sequence[bool], rng: np.random.Generator) -> Sequence[Draft]:
        """Return a new question for each seed; `rarer`: of the seed's domain, but a rarer one, else as difficult as the seed."""
        ...


class Relatives:
    """Ask a question of the seed's kind about other pictures.

    Args:
        questions: prompts by kind.
        places: positions of the pictures to draw from.
    """

    def __init__(self, questions: dict[str, Sequence[Sequence[Message]]], places: Sequence[int]) -> None:
        self.questions, self.places = questions, places

    def __call__(self, seeds: Sequence[Item], rarer: Sequence[bool], rng: np.random.Generator) -> list[Draft]:
        """Return the questions. Difficult and easy seeds are treated alike."""
        found = []
        for seed in seeds:
            known = self.questions.get(seed.group) or [seed.messages]
            chosen = tuple(known[int(rng.integers(len(known)))])
            marks = sum(message.text.count(IMAGE) for message in chosen)
            pictures = tuple(int(place) for place in rng.choice(self.places, marks)) if marks else ()
            found.append(Draft(chosen, pictures, seed.group))
        return found


class Rewriter:
    """Let a model of chats write a question about the seed's pictures.

    Args:
        ask: answers prompts.
        show: makes the prompt of a question.
    """

    like = (
        "Write one new question about the same material. It has the domain, kind of task, length and difficulty of this question, "
        "but another content: "
    )
    rare = (
        "Write one new question about the same material. It has the domain and length of this question, but is rarer: "
    )

    def __init__(self, ask: Ask, show: Callable[[Draft], Prompt]) -> None:
        self.ask, self.show = ask, show

    def __call__(self, seeds: Sequence[Item], rarer: Sequence[bool], rng: np.random.Generator) -> list[Draft]:
        """Return the questions that the model wrote."""
        prompts = []
        for seed, rare in zip(seeds, rarer, strict=True):
            role, text = seed.messages[-1]
            start = " ".join([IMAGE] * text.count(IMAGE))
            asked = f"{start} {self.rare if rare else self.like}{question_of(seed.messages)}".strip()
            prompts.append(self.show(Draft((*seed.messages[:-1], Message(role, asked)), seed.pictures)))
        found = []
        for seed, answer in zip(seeds, self.ask(prompts), strict=True):
            role, text = seed.messages[-1]
            start = " ".join([IMAGE] * text.count(IMAGE))
            written = answer.text.replace(IMAGE, " ").strip()
            last = Message(role, f"{start} {written}".strip())
            found.append(Draft((*seed.messages[:-1], last), seed.pictures, seed.group, True, answer.ended))
        return found
