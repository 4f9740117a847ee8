"""Measure decoded transcripts: word errors and exact matches."""

from __future__ import annotations

from collections.abc import Sequence


def word_errors(reference: Sequence[str], found: Sequence[str]) -> int:
    """Return the least number of words to substitute, delete and insert that turns one text into the other.

    >>> word_errors("turn on the lamp".split(), "turn off lamp".split())
    2
    """
    row = list(range(len(found) + 1))
    for i, word in enumerate(reference, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def transcript_figures(references: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Return `word_error` (word errors over the words of all references) and `exact_match` (share of equal texts).

    Args:
        references, found: n texts each; words are separated by white space. {} for none, and for references without a word.
    """
    pairs = [(a.split(), b.split()) for a, b in zip(references, found, strict=True)]
    words = sum(len(a) for a, _ in pairs)
    if not words:
        return {}
    return {
        "word_error": sum(word_errors(a, b) for a, b in pairs) / words,
        "exact_match": sum(a == b for a, b in pairs) / len(pairs),
    }
