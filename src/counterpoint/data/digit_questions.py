"""`digit-questions`: ten kinds of questions about handwritten digits, some much rarer than others; data of CoMD's claim.

    user        "<image> what comes after it ?"
    assistant   "4"

The kinds of the training chats follow Zipf's law: kind k occurs in proportion to k^-exponent. In valid and test every picture has
all kinds. Training pictures may have captions, too, and the other digits of the training part are unlabelled pictures.

The digits are UCI's optical recognition set, in scikit-learn (CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from counterpoint.data.chats import Chat, ChatData, ChatSplit
from counterpoint.data.images import ArrayImages, Indices, checked_size
from counterpoint.data.valid import SHARE
from counterpoint.data.worlds import digits as world
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.errors import CounterpointError

PRIMES = (2, 3, 5, 7)
KINDS: dict[str, tuple[str, Callable[[int], str]]] = {
    "digit": ("which digit is this ?", str),
    "even": ("is the digit even ?", lambda d: "yes" if d % 2 == 0 else "no"),
    "after": ("what comes after it ?", lambda d: str((d + 1) % 10)),
    "above": ("is it above four ?", lambda d: "yes" if d > 4 else "no"),
    "times": ("last figure of it times three ?", lambda d: str(3 * d % 10)),
    "twice": ("last figure of its double ?", lambda d: str(2 * d % 10)),
    "before": ("what comes before it ?", lambda d: str((d - 1) % 10)),
    "prime": ("is the digit prime ?", lambda d: "yes" if d in PRIMES else "no"),
    "nine": ("how far is it from nine ?", lambda d: str(9 - d)),
    "square": ("last figure of its square ?", lambda d: str(d * d % 10)),
}
ASKS = "describe the picture ."


def load(
    argument: None = None,
    *,
    train: int = 400,
    captions: int = 0,
    exponent: float = 1.5,
    size: int = 12,
    test: int = 60,
    watched: int = 30,
    held_out: float = 0.2,
    valid: float = SHARE,
    seed: int = 0,
) -> ChatData:
    """Draw the set (in a moment).

    Args:
        argument: not used; sources share a signature.
        train: number of training questions, at least 10.
        captions: number of further training chats that name the digit, at least 0.
        exponent: exponent of Zipf's law; 0: all kinds are as frequent.
        size: height and width of pictures in pixels, 8 to 4096.
        test, watched: maximum numbers of pictures in test and valid, at least 1, each with ten questions.
        held_out: share of the digits in the test part, between 0 and 1.
        valid: share of the other digits in the valid part, between 0 and 1.
        seed: seed of the choice of pictures and kinds, at least 0.

    Raises CounterpointError for an option out of range.
    """
    checked_size(size)
    if train < 10 or min(captions, seed) < 0 or min(test, watched) < 1 or not 0 <= exponent < float("inf"):
        raise CounterpointError(
            "digit-questions: train is at least 10, test and watched at least 1, and captions, exponent and seed at least 0; "
            f"got {train}, {test}, {watched}, {captions}, {exponent} and {seed}"
        )
    parts = world.parts("digit-questions", held_out, valid)
    rng = np.random.default_rng([2311_08213, seed])
    names = tuple(KINDS)
    share = np.arange(1.0, len(names) + 1) ** -exponent
    order = rng.permutation(parts.train)
    kinds = rng.choice(len(names), train, p=share / share.sum())
    asked = rng.integers(len(order), size=train)
    labels = world.scene(order).labels[:, 0]
    chats = [_asked(int(at), int(labels[at]), names[kind]) for at, kind in zip(asked, kinds, strict=True)]
    chats += [_captioned(int(at), int(labels[at])) for at in rng.integers(len(order), size=captions)]
    pictures = ArrayImages(world.enlarged(world.scene(order), size))

    def measured(numbers: Indices, most: int) -> ChatSplit:
        chosen = np.sort(rng.permutation(numbers)[:most])
        truth = world.scene(chosen)
        found = [_asked(n, int(digit), kind) for n, digit in enumerate(truth.labels[:, 0]) for kind in names]
        return ChatSplit(found, ArrayImages(world.enlarged(truth, size)))

    return ChatData(
        name="digit-questions",
        train=ChatSplit(chats, pictures),
        valid=measured(parts.valid, watched),
        test=measured(parts.test, test),
        size=size,
        unlabelled=pictures,
    )


def _asked(picture: int, digit: int, kind: str) -> Chat:
    question, answer = KINDS[kind]
    messages = (Message("user", f"{IMAGE} {question}"), Message("assistant", answer(digit)))
    return Chat(messages, (picture,), "free", kind)


def _captioned(picture: int, digit: int) -> Chat:
    messages = (Message("user", f"{IMAGE} {ASKS}"), Message("assistant", f"a {digit}"))
    return Chat(messages, (picture,), "caption")
