"""The contract of dialogs: the form that every source for the task `dialogs` returns (numpy only, no torch).

A dialog is a list of turns of two speakers. A turn may have a frame, an annotation by the semantic tree:

    {domain: {intent: {slot: [value, ...]}}}

An example is a turn of the user, with the turns before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frame = Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]
USER, SYSTEM = "user", "system"
DEFAULTS = ("", "default_domain", "default_intent")  # names of a domain or intent that is not known
ABSENT = -1
NONE = "none"  # intent of a turn whose frame is empty


@dataclass(frozen=True)
class Turn:
    """One utterance. Its frame is None without annotation, and empty where the annotation has nothing."""

    role: str
    text: str
    frame: Frame | None = None


Dialog = Sequence[Turn]


@dataclass(frozen=True)
class DialogSplit:
    """Examples in order. Positions are stable: the same number is the same turn in every process and run."""

    dialogs: Sequence[Dialog]
    at: NDArray[np.int64]  # [n, 2] of each example its dialog and its turn
    corpora: NDArray[np.int64]  # [n] number of each example's corpus

    def __len__(self) -> int:
        return len(self.at)

    def context(self, n: int) -> Dialog:
        """Return the turns of an example, of which the last is its own."""
        dialog, turn = self.at[n]
        return self.dialogs[dialog][: turn + 1]

    def frame(self, n: int) -> Frame | None:
        """Return the frame of an example."""
        dialog, turn = self.at[n]
        return self.dialogs[dialog][turn].frame

    @property
    def texts(self) -> list[str]:
        """All utterances of its dialogs."""
        return [turn.text for dialog in self.dialogs for turn in dialog]


@dataclass(frozen=True)
class DialogData:
    """A source's splits, and the facts needed to read them."""

    name: str
    train: DialogSplit  # annotated turns
    valid: DialogSplit  # to monitor training and to choose settings
    test: DialogSplit  # evaluated once, at the end
    unlabelled: DialogSplit | None = None  # turns without annotation, for training
    corpora: tuple[str, ...] = ("",)  # names of the corpora
    # Remarks for the user on this data: rows left out, splits made.
    notes: list[str] = field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        names = sorted({intent_of(self.train.frame(n)) for n in range(len(self.train))})
        return {
            "examples": len(self.train),
            "unlabelled": 0 if self.unlabelled is None else len(self.unlabelled),
            "classes": len(names),
            "class_names": names,
        }


def user_turns(dialogs: Sequence[Dialog], corpora: Sequence[int] | None = None, *, annotated: bool) -> DialogSplit:
    """Make the examples of dialogs: their turns of the user that have a frame, or those that have none.

    Args:
        dialogs: the dialogs.
        corpora: number of each dialog's corpus. Default: all are of one corpus.
        annotated: choose turns with a frame; False: those without.
    """
    at = [
        (d, t)
        for d, dialog in enumerate(dialogs)
        for t, turn in enumerate(dialog)
        if turn.role == USER and (turn.frame is not None) == annotated
    ]
    places = np.array(at, np.int64).reshape(-1, 2)
    numbers = np.zeros(len(dialogs), np.int64) if corpora is None else np.asarray(corpora, np.int64)
    return DialogSplit(dialogs, places, numbers[places[:, 0]])


def intent_of(frame: Frame | None) -> str:
    """Name the domains and intents of a frame: "hotel find + taxi book"; "none" without any."""
    pairs = {
        " ".join(name for name in (clean(domain), clean(intent)) if name not in DEFAULTS)
        for domain, intents in (frame or {}).items()
        for intent in (intents or {"": {}})
    }
    return " + ".join(sorted(pairs - {""})) or NONE


def slots_of(frame: Frame | None) -> str:
    """Name the slots of a frame: "area + day"; "none" without any."""
    found = {clean(slot) for intents in (frame or {}).values() for slots in intents.values() for slot in slots}
    return " + ".join(sorted(found)) or NONE


def values_of(frame: Frame | None) -> list[str]:
    """List the values of a frame, the longest first."""
    found = {
        value.strip()
        for intents in (frame or {}).values()
        for slots in intents.values()
        for values in slots.values()
        for value in values
    }
    return sorted(found - {""}, key=lambda value: (-len(value), value))


def clean(name: str) -> str:
    """Lower-case a name and strip it."""
    return name.strip().lower()


def spans(text: str, values: Iterable[str]) -> list[tuple[int, int]]:
    """Find whole words of a text that are values, in any case: first and last place of each, the last excluded."""
    found = (re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) for value in values)
    return [match.span() for matches in found for match in matches]


class Tree:
    """Numbers of the nodes of the semantic tree: names count within their level, and a default name has number 0.

    Args:
        frames: all frames of the data, in an order that every process has.
    """

    def __init__(self, frames: Iterable[Frame | None]) -> None:
        self.numbers: tuple[dict[str, int], ...] = ({}, {}, {}, {})
        for frame in frames:
            self.paths(frame)

    def _number(self, level: int, name: str) -> int:
        name = clean(name)
        if level < 2 and name in DEFAULTS:
            return 0
        return self.numbers[level].setdefault(name, len(self.numbers[level]) + 1)

    def paths(self, frame: Frame | None) -> list[tuple[int, int, int, int]]:
        """Return the paths of a frame, of which each is (domain, intent, slot, value); -1 from the first absent level on."""
        found: dict[tuple[int, int, int, int], None] = {}
        for domain, intents in (frame or {}).items():
            d = self._number(0, domain)
            if not intents:
                found[d, ABSENT, ABSENT, ABSENT] = None
            for intent, slots in intents.items():
                a = self._number(1, intent)
                if not slots:
                    found[d, a, ABSENT, ABSENT] = None
                for slot, values in slots.items():
                    s = self._number(2, slot)
                    if not values:
                        found[d, a, s, ABSENT] = None
                    for value in values:
                        found[d, a, s, self._number(3, value)] = None
        return list(found)
