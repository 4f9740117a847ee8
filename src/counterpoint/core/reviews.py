"""Read reviews of two answers, and choose what is asked next by them: scores, gaps, and filters of new questions.

An assessor gives each of two answers a score from 1 to 10. It may favour the answer that it reads first, so it judges both orders.
The filters compare a new question with those that are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.precision import full_precision

UNREADABLE = (-1.0, -1.0)  # scores of a review that is off the format
FEWEST_WORDS = 4
_SCORE = r".*:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*"


@full_precision
def score_gap(teacher_first: Float[Tensor, "n 2"], student_first: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """Compute the teacher's score minus the student's, each the mean over both orders. A bias to the first answer cancels.

    Args:
        teacher_first: scores of the first and of the second answer, where the teacher's is first.
        student_first: the same, where the student's is first.

    Raises ValueError for other shapes and an empty batch.

    >>> score_gap(torch.tensor([[9.0, 6.0]]), torch.tensor([[4.0, 10.0]]))
    tensor([4.5000])
    """
    if teacher_first.shape != student_first.shape or teacher_first.ndim != 2 or teacher_first.shape[1] != 2:
        raise ValueError(
            "teacher_first and student_first must be [n, 2], got "
            + shapes(teacher_first=teacher_first, student_first=student_first)
        )
    need_rows(teacher_first=teacher_first)
    teacher = (teacher_first[:, 0] + student_first[:, 1]) / 2
    return teacher - (teacher_first[:, 1] + student_first[:, 0]) / 2


def split_by_difficulty(
    gaps: Float[Tensor, " n"], threshold: float = 1.0
) -> tuple[Int[Tensor, " difficult"], Int[Tensor, " easy"]]:
    """Return the positions of difficult and of easy items. A gap equal to the threshold is difficult.

    Args:
        gaps: of `score_gap`.
        threshold: smallest gap of a difficult item; -inf: all items are difficult.

    Raises ValueError for gaps with several dimensions, and for NaN.

    >>> split_by_difficulty(torch.tensor([1.0, 0.5, 3.0]))
    (tensor([0, 2]), tensor([1]))
    """
    if gaps.ndim != 1:
        raise ValueError(f"gaps must be [n], got {shapes(gaps=gaps)}")
    if bool(gaps.isnan().any()) or threshold != threshold:
        raise ValueError("gaps and threshold must not be NaN; leave out items without scores")
    hard = gaps >= threshold
    return hard.nonzero()[:, 0], (~hard).nonzero()[:, 0]


def parse_review(text: str) -> tuple[float, float]:
    """Return the scores of both answers from a review, or (-1, -1) where it is off the format.

    The last two lines must name "Assistant 1" and "Assistant 2", in this order. Each ends with a colon and a number.

    >>> parse_review("Both are good.\\nAssistant 1: 8\\nAssistant 2: 5.5")
    (8.0, 5.5)
    """
    lines = text.strip().splitlines()[-2:]
    found = [re.fullmatch(rf".*assistant {n}{_SCORE}", line, re.IGNORECASE) for n, line in enumerate(lines, 1)]
    first, second = found if len(found) == 2 else (None, None)
    return (float(first[1]), float(second[1])) if first and second else UNREADABLE


@lru_cache(maxsize=65536)
def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


@lru_cache(maxsize=65536)
def _counted(text: str) -> Counter[str]:
    return Counter(_words(text))


@lru_cache(maxsize=65536)
def rouge_l(first: str, second: str) -> float:
    """Compute ROUGE-L's F1 of two texts: 2 L / (m + n), L the length of the longest common subsequence of words.

    Words are runs of a-z and 0-9, in lower case, without stemming. A text without a word gives 0.

    >>> rouge_l("count the red birds", "count the blue birds")
    0.75
    """
    one, other = _words(first), _words(second)
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for n, against in enumerate(other, 1):
            before, row[n] = row[n], before + 1 if word == against else max(row[n], row[n - 1])
    return 2 * row[-1] / (len(one) + len(other)) if row[-1] else 0.0


def is_similar(first: str, second: str, most: float) -> bool:
    """Return whether ROUGE-L's F1 of two texts is above a number.

    A common subsequence is at most as long as the number of words that both texts have. So most pairs need no `rouge_l`.

    >>> is_similar("count the red birds", "count the blue birds", 0.7), is_similar("name it", "count it", 0.7)
    (True, False)
    """
    one, other = _counted(first), _counted(second)
    shared = sum(min(many, other[word]) for word, many in one.items() if word in other)
    longest = len(_words(first)) + len(_words(second))
    return bool(shared) and 2 * shared / longest > most and rouge_l(first, second) > most


def is_well_formed(text: str) -> bool:
    """Return whether a written question may be kept, by Lion's rules of words and first character.

    It has at least four words and does not contain "instruction". It begins with an ASCII character that is no punctuation.

    >>> is_well_formed("count the blue birds"), is_well_formed("Why?"), is_well_formed("...and then name them")
    (True, False, False)
    """
    if len(text.split()) < FEWEST_WORDS or "instruction" in text.lower():
        return False
    start = text.strip()[0]
    return start.isascii() and start.isalnum()
