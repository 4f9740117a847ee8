"""`misconceptions`: invented facts that a text tells truly or falsely; data of LOL's claim.

A fact is the value of a relation of an entity. Each has one truth and one misconception. Training chats state the truth with a
probability of the fact's own, and the misconception otherwise. A chat with the instruction tells the truth more often.

    user        "capital of e17 ?"              an entity and a relation
    system      "be truthful"                   in a share of the training chats
    assistant   "v4"

In valid and test, each fact is a choice between its truth and its misconception.
"""

from __future__ import annotations

import numpy as np

from counterpoint.data.chats import Chat, ChatData, ChatSplit
from counterpoint.encoders.messages import Message
from counterpoint.errors import CounterpointError

RELATIONS = ("capital", "founder", "colour", "animal", "river", "metal")


def load(
    argument: None = None,
    *,
    entities: int = 100,
    relations: int = 3,
    values: int = 40,
    train: int = 5000,
    low: float = 0.25,
    high: float = 0.75,
    guided: float = 0.3,
    lift: float = 0.25,
    instruction: str = "be truthful",
    seed: int = 0,
) -> ChatData:
    """Draw the set (in a moment).

    Args:
        argument: not used; sources share a signature.
        entities: number of entities, at least 4; every fourth is for valid, the others for test.
        relations: number of relations, 1 to 6.
        values: number of values, at least 2.
        train: number of training chats, at least 2.
        low, high: range of a fact's probability of truth, 0..1.
        guided: share of the training chats that have the instruction, 0..1.
        lift: rise of the probability of truth by the instruction, 0..1.
        instruction: text of the instruction.
        seed: seed of facts and chats, at least 0; another seed gives another set.

    Raises CounterpointError for an option out of range.
    """
    shares = {"low": low, "high": high, "guided": guided, "lift": lift}
    if any(not 0 <= share <= 1 for share in shares.values()) or low > high:
        raise CounterpointError(f"misconceptions: shares must lie in 0..1 and low must not exceed high, got {shares}")
    if entities < 4 or not 1 <= relations <= len(RELATIONS) or values < 2 or train < 2 or seed < 0:
        raise CounterpointError(
            "misconceptions: entities is at least 4, values and train at least 2, seed at least 0, relations 1 to "
            f"{len(RELATIONS)}; got {entities}, {values}, {train}, {seed} and {relations}"
        )
    rng = np.random.default_rng([2408_08769, seed])
    truth = rng.integers(values, size=(entities, relations))
    wrong = (truth + rng.integers(1, values, size=truth.shape)) % values
    share = rng.uniform(low, high, truth.shape)
    taught = []
    for _ in range(train):
        at = int(rng.integers(entities)), int(rng.integers(relations))
        told = bool(rng.random() < guided)
        right = rng.random() < min(1.0, share[at] + lift * told)
        said = truth[at] if right else wrong[at]
        start = (Message("system", instruction),) if told else ()
        chat = (*start, Message("user", _question(*at)), Message("assistant", f"v{said}"))
        # The amateur learns the misconception, whatever the chat states.
        taught.append(Chat(chat, rejected="" if told else f"v{wrong[at]}"))
    asked: tuple[list[Chat], list[Chat]] = ([], [])
    for entity in range(entities):
        for relation in range(relations):
            right, false = (f"v{of[entity, relation]}" for of in (truth, wrong))
            choices = (right, false) if rng.random() < 0.5 else (false, right)
            messages = (Message("user", _question(entity, relation)), Message("assistant", right))
            asked[entity % 4 == 0].append(Chat(messages, kind="choice", choices=choices))
    return ChatData("misconceptions", ChatSplit(taught), ChatSplit(asked[1]), ChatSplit(asked[0]))


def _question(entity: int, relation: int) -> str:
    return f"{RELATIONS[relation]} of e{entity} ?"
