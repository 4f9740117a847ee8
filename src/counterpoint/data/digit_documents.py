"""`digit-documents`: pictures of two handwritten digits with captions, and documents of several of them.

    pair         user "<image>", assistant "three seven"
    document     user "a page of numbers <image>", assistant "three seven", user "<image>", assistant "nine one"

Half of the documents begin with a heading. Pictures have 16 x 16 pixels, with noise; the digits are in the middle rows. Valid and
test pictures show digits that no training picture shows, and each of the 100 captions equally often.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.chats import Chat, ChatData, ChatSplit
from counterpoint.data.images import ArrayImages, Indices
from counterpoint.data.valid import SHARE
from counterpoint.data.worlds import digits as world
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.errors import CounterpointError

CAPTIONS = 100
HEADING = "a page of numbers"
MOST = 3  # pictures of a document
PAD = world.SIDE // 2


def load(
    argument: None = None,
    *,
    train: int = 1500,
    documents: int = 500,
    each: int = 3,
    test_documents: int = 50,
    noise: float = 0.15,
    held_out: float = 0.2,
    valid: float = SHARE,
    seed: int = 0,
) -> ChatData:
    """Draw the set (less than a second).

    Args:
        argument: not used; sources share a signature.
        train: number of training pairs, at least 2.
        documents: number of training documents of two or three pictures, at least 0.
        each: pairs of each of the 100 captions in valid and in test, at least 1.
        test_documents: number of documents in valid and in test, at least 0.
        noise: standard deviation of the noise, in shares of the range of a pixel; at least 0.
        held_out: share of the digits that test pictures are made of, between 0 and 1.
        valid: share of the other digits that valid pictures are made of, between 0 and 1.
        seed: seed of the pictures and documents, at least 0.

    Raises CounterpointError for an option out of range.
    """
    if train < 2 or each < 1 or min(documents, test_documents, seed) < 0 or noise < 0 or not 0 < held_out < 1:
        raise CounterpointError(
            "digit-documents: train must be at least 2, and each at least 1; documents, test_documents, noise and seed must be at "
            f"least 0; held_out is a share between 0 and 1; got {train=}, {each=}, {documents=}, {test_documents=}, {noise=}, "
            f"{seed=}, {held_out=}"
        )
    parts = world.parts("digit-documents", held_out, valid)
    labels = world.inventory()[1]
    splits = []
    for number, pool in enumerate(parts):
        rng = np.random.default_rng([2401_00849, seed, number])
        many, wanted = (documents, rng.integers(0, CAPTIONS, train)) if number == 0 else (test_documents, None)
        said = np.repeat(np.arange(CAPTIONS), each) if wanted is None else wanted
        counts = rng.integers(2, MOST, many, endpoint=True)
        every = np.concatenate([said, rng.integers(0, CAPTIONS, int(counts.sum()))])
        shown = _digits(pool, labels, np.stack(np.divmod(every, 10), 1), rng)
        pixels = np.pad(world.noisy(world.scene(shown), noise, rng), ((0, 0), (PAD, PAD), (0, 0)))
        captions = world.words(labels[shown])
        chats = [_chat([n], captions) for n in range(len(said))]
        ends = len(said) + np.cumsum(counts)
        for start, end in zip(ends - counts, ends, strict=True):
            chats.append(_chat(list(range(start, end)), captions, HEADING if rng.random() < 0.5 else ""))
        grey = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)
        splits.append(ChatSplit(chats, ArrayImages(np.repeat(grey[..., None], 3, 3))))
    return ChatData("digit-documents", splits[0], splits[1], splits[2], 2 * world.SIDE)


def _digits(pool: Indices, labels: Indices, wanted: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw a digit of the pool for each wanted class."""
    found = np.empty_like(wanted)
    for digit in range(10):
        at = wanted == digit
        own = pool[labels[pool] == digit]
        if not len(own):
            raise CounterpointError(f"digit-documents: no digit {digit} is left for a split; set a larger ?valid=")
        found[at] = rng.choice(own, int(at.sum()))
    return found


def _chat(pictures: list[int], captions: list[str], heading: str = "") -> Chat:
    """Make a pair, or a document of several pictures."""
    turns: list[Message] = []
    for n, at in enumerate(pictures):
        turns.append(Message("user", f"{heading} {IMAGE}".strip() if n == 0 else IMAGE))
        turns.append(Message("assistant", captions[at]))
    return Chat(tuple(turns), tuple(pictures))
