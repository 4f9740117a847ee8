"""The contract of chats: the form that every source for the task `chats` returns (numpy only, no torch).

A chat is a list of messages with the roles system, user and assistant. Its last message is the reference answer; the messages
before it are the prompt. In a text, `<image>` stands for a picture of the chat, in order.

Facts of a chat serve the evaluation alone: its possible answers, and the objects that its pictures show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from counterpoint.data.images import ImageSplit
from counterpoint.encoders.messages import IMAGE, ROLES, Message
from counterpoint.errors import DataError
from counterpoint.words import counted

Kind = Literal["yes-no", "caption", "choice", "meta", "free"]


@dataclass(frozen=True)
class Chat:
    """A prompt and its answer, with facts for the evaluation.

    Raises DataError for a chat without an answer at its end and for an unknown role. Raises it too where the marks `<image>` are
    not as many as the pictures.
    """

    messages: tuple[Message, ...]
    pictures: tuple[int, ...] = ()  # positions in the split's pictures, in the order of the marks
    kind: Kind = "free"
    group: str = ""  # of questions, such as "adversarial"; measured apart
    choices: tuple[str, ...] = ()  # possible answers of a choice
    truths: tuple[str, ...] = ()  # those of the choices that are true, besides the reference
    objects: tuple[
        str, ...
    ] = ()  # names of the objects that the pictures of a caption show, or that a meta-response needs
    rejected: str = ""  # an answer that is worse than the reference; "" for none

    def __post_init__(self) -> None:
        roles = [message.role for message in self.messages]
        strange = [role for role in roles if role not in ROLES]
        if strange:
            raise DataError(f"has the role '{strange[0]}'; the roles are {', '.join(ROLES)}")
        if len(roles) < 2 or roles[-1] != "assistant" or not self.answer.strip():
            raise DataError("has no answer: its last message must be the assistant's, and not empty")
        if roles[-2] != "user":
            raise DataError(f"has a message of the {roles[-2]} before the answer, where the user's must be")
        marks = sum(message.text.count(IMAGE) for message in self.messages)
        if marks != len(self.pictures):
            raise DataError(
                f"has {marks} marks {IMAGE} and {counted(len(self.pictures), 'picture')}; write one mark for each picture in the "
                "user's text"
            )

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The reference answer."""
        return self.messages[-1].text

    @property
    def worse(self) -> tuple[Message, ...]:
        """The messages with the rejected answer at their end."""
        return (*self.prompt, Message("assistant", self.rejected))

    @property
    def question(self) -> str:
        """The user's last message, without marks of pictures."""
        return " ".join(self.messages[-2].text.replace(IMAGE, " ").split())


@dataclass(frozen=True)
class ChatSplit:
    """Chats in order. Positions are stable: the same number is the same chat in every process and run."""

    chats: Sequence[Chat]
    images: ImageSplit | None = None  # the pictures of all chats

    def __len__(self) -> int:
        return len(self.chats)


@dataclass(frozen=True)
class ChatData:
    """A source's splits, and the facts needed to read them."""

    name: str
    train: ChatSplit
    valid: ChatSplit  # to monitor training and to choose settings
    test: ChatSplit  # evaluated once, at the end
    size: int = 0  # pixels, height and width of pictures; 0 without pictures
    objects: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # object -> the words that name it, for captions
    unlabelled: ImageSplit | None = None  # further pictures for training, without chats
    # Remarks for the user on this data: rows left out, splits made.
    notes: list[str] = field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {"examples": len(self.train), "size": self.size}


NO = ("no", "not")


def says_yes(answer: str) -> bool:
    """Return whether an answer to a question of yes or no means yes, by POPE's rule.

    Only the first sentence counts. It means no where one of its words is "no" or "not", or ends with "n't".

    >>> says_yes("Yes, there is a dog."), says_yes("No."), says_yes("There isn't one")
    (True, False, False)

    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv 2305.10355.
    """
    words = re.findall(r"[\w'’]+", answer.split(".")[0].lower())
    return not any(word in NO or word.endswith(("n't", "n’t")) for word in words)


def mentioned(answer: str, objects: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the objects that a caption names, in the order of their first mention, each once.

    Longer names are found first, so that "hot dog" is no dog.

    Args:
        answer: A caption.
        objects: Object -> the words that name it.

    >>> mentioned("A red disc and two cats", {"cat": ("cat", "cats"), "disc": ("red disc",), "dog": ("dog",)})
    ['disc', 'cat']
    """
    text = answer.lower()
    words = sorted(((word.lower(), name) for name, own in objects.items() for word in own), key=lambda x: -len(x[0]))
    found: dict[str, int] = {}
    for word, name in words:
        for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text):
            at = match.start()
            found[name] = min(at, found.get(name, at))
            text = text[:at] + "\0" * len(word) + text[match.end() :]
    return sorted(found, key=lambda name: found[name])
