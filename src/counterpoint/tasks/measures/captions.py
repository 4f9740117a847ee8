"""Measure captions against references by the words they share: CIDEr and CIDEr-D.

Vedantam, Zitnick, Parikh: "CIDEr: Consensus-based Image Description Evaluation", 2015, arXiv 1411.5726.

    h_k(c)     times the n-gram k occurs in a caption c
    idf_k      log(number of pictures / number of pictures with k in a reference), with at least one such picture
    g_n(c)     vector of h_k(c) idf_k over n-grams of n words, n = 1 .. 4

    CIDEr      mean over n and references s of cos(g_n(c), g_n(s))                                                    (Eq. 2, 3)
    CIDEr-D    10 mean over n and s of exp(-(l(c) - l(s))^2 / 2 sigma^2) min(g_n(c), g_n(s)).g_n(s) / |g_n(c)||g_n(s)|    (Eq. 4)

Frequencies h are counts and words are not stemmed, as in COCO's evaluation code, whose "CIDEr" is CIDEr-D. The paper divides h by
the caption's length, which only the minimum depends on.

A caption of fewer than n words has no n-grams of that length. So even an exact caption of two words has at most half of the full
score.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from counterpoint.core.checks import need_positive
from counterpoint.data.chats import ChatSplit
from counterpoint.words import counted

LONGEST = 4  # words of an n-gram

Gram = tuple[str, ...]


def caption_words(text: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation.

    >>> caption_words("A dog's bowl, half-full.")
    ['a', "dog's", 'bowl', 'half', 'full']
    """
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def cider(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    variant: Literal["cider-d", "cider"] = "cider-d",
    sigma: float = 6.0,
) -> float:
    """Compute the mean CIDEr-D (by default) or CIDEr of captions.

    Args:
        captions: a caption for each picture.
        references: at least one reference for each picture. The frequencies of n-grams are those of all these references.
        variant: cider-d, in 0..10, or cider, in 0..1.
        sigma: width of the penalty of different lengths in CIDEr-D, in words, above 0.

    Words that the references of every picture have do not count. So the score of a single picture is 0.

    Raises ValueError for no captions, a different number of references, and a picture without a reference.

    >>> round(cider(["a red fox", "a den"], [["a red fox"], ["a hole"]], variant="cider"), 3)  # 3 of 4 lengths; "a" is everywhere
    0.375
    """
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(
            f"captions must be one or more, with at least one reference each; got {counted(len(captions), 'caption')}, "
            f"{len(references)} "
            f"lists of references, of {min(map(len, references), default=0)} references or more"
        )
    if variant not in ("cider-d", "cider"):
        raise ValueError(f"variant must be cider-d or cider, got {variant!r}")
    need_positive(sigma=sigma)
    wanted = [[_grams(caption_words(text)) for text in texts] for texts in references]
    pictures = Counter(gram for texts in wanted for gram in {gram for grams in texts for gram in grams})

    def vector(grams: Counter[Gram], n: int) -> dict[Gram, float]:
        return {
            gram: count * math.log(len(captions) / max(1, pictures[gram]))
            for gram, count in grams.items()
            if len(gram) == n
        }

    total = 0.0
    for caption, texts in zip(captions, wanted, strict=True):
        ours = _grams(caption_words(caption))
        for theirs in texts:
            likeness = sum(
                _cosine(vector(ours, n), vector(theirs, n), clipped=variant == "cider-d") for n in range(1, LONGEST + 1)
            )
            factor = 10 * math.exp(-((_words(ours) - _words(theirs)) ** 2) / (2 * sigma**2))
            total += likeness / LONGEST / len(texts) * (factor if variant == "cider-d" else 1)
    return total / len(captions)


def cider_of(split: ChatSplit, answers: Mapping[int, str]) -> dict[str, float]:
    """Compute CIDEr-D of answers to chats about pictures, as {"cider": score}; {} without any reference.

    Args:
        split: the chats. The answers of all chats about the same pictures are the references of each.
        answers: the decoded caption of each measured chat, by its position. The first of each picture counts.
    """
    references: dict[tuple[int, ...], list[str]] = {}
    for n in answers:
        references.setdefault(split.chats[n].pictures, [])
    for chat in split.chats:
        if chat.pictures in references and chat.answer:
            references[chat.pictures].append(chat.answer)
    first = {split.chats[n].pictures: text for n, text in reversed(list(answers.items()))}
    rows = [pictures for pictures in first if references[pictures]]
    return {"cider": cider([first[of] for of in rows], [references[of] for of in rows])} if rows else {}


def _grams(words: Sequence[str]) -> Counter[Gram]:
    """Count the n-grams of 1 to 4 words."""
    return Counter(tuple(words[at : at + n]) for n in range(1, LONGEST + 1) for at in range(len(words) - n + 1))


def _words(grams: Counter[Gram]) -> int:
    """Return the number of words of a caption, by its n-grams."""
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _cosine(ours: dict[Gram, float], theirs: dict[Gram, float], *, clipped: bool) -> float:
    """Return the cosine of two vectors, 0 where one is 0; `clipped`: ours counts no more than theirs in the product."""
    norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
    shared = (
        (min(value, theirs[gram]) if clipped else value) * theirs[gram]
        for gram, value in ours.items()
        if gram in theirs
    )
    return sum(shared) / norms if norms else 0.0
