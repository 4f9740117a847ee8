"""Measure meta-responses: their modality, their form and their prompt; and routers that generate nothing.

    modality_accuracy    share of replies whose set of flags is the reference's, averaged over the references' modalities
    format_valid         share of replies in the form of a meta-response with known flags
    entity_in_prompt     share of prompts that have all names that the reference needs, among the requests that need one
    prompt_exact         share of prompts that equal the reference's, of modalities other than TEXT

A router learns from the requests of training and returns the flag of others. `keyword_router` has rules, `logistic_router` is a
logistic regression.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterpoint.encoders.meta_responses import FLAGS, TEXT, named_flags, parse_meta_response, well_formed
from counterpoint.tasks.measures.classes import confusion_figure

WORD = r"\w+"


def known_flags(references: Sequence[str]) -> list[str]:
    """Return the flags that a reply may have: the usual ones and those of the references."""
    named = [flag for text in references for flag in named_flags(text)]
    return list(dict.fromkeys([*FLAGS, *named]))


def has_name(text: str, name: str) -> bool:
    """Return whether a text has a name as a whole word, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", text.lower()) is not None


def macro_accuracy(said: Sequence[frozenset[str]], truth: Sequence[frozenset[str]]) -> float:
    """Compute the share of equal sets, averaged over the different sets of the truth.

    >>> macro_accuracy([frozenset("a"), frozenset("b"), frozenset("b")], [frozenset("a"), frozenset("a"), frozenset("b")])
    0.75
    """
    right: dict[frozenset[str], list[bool]] = {}
    for one, other in zip(said, truth, strict=True):
        right.setdefault(other, []).append(one == other)
    return float(np.mean([np.mean(part) for part in right.values()]))


def modality_measures(
    replies: Sequence[str], references: Sequence[str], names: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Compute the measures of meta-responses.

    Args:
        replies: what the model answered.
        references: meta-responses.
        names: for each, the names that the prompt must have; empty where none is known.
    """
    flags = known_flags(references)
    said = [parse_meta_response(reply, flags, TEXT, strict=True) for reply in replies]
    truth = [parse_meta_response(reply, flags, TEXT, strict=True) for reply in references]
    found = {
        "modality_accuracy": macro_accuracy([frozenset(a) for a, _ in said], [frozenset(a) for a, _ in truth]),
        "format_valid": float(np.mean([well_formed(reply, flags) for reply in replies])),
    }
    needed = [all(has_name(b[0], name) for name in own) for (_, b), own in zip(said, names, strict=True) if own]
    if needed:
        found["entity_in_prompt"] = float(np.mean(needed))
    exact = [b[0].split() == d[0].split() for (_, b), (c, d) in zip(said, truth, strict=True) if c != [TEXT]]
    if exact:
        found["prompt_exact"] = float(np.mean(exact))
    return found


def modality_figure(replies: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Build the confusion matrix of modalities. A reply with several flags counts by the first of them."""
    flags = known_flags(references)
    table = torch.zeros(len(flags), len(flags), dtype=torch.int64)
    for reply, reference in zip(replies, references, strict=True):
        said, truth = (parse_meta_response(text, flags, TEXT, strict=True)[0][0] for text in (reply, reference))
        table[flags.index(truth), flags.index(said)] += 1
    return confusion_figure(table, [flag.strip("[]") for flag in flags], "modality")


# ------------------------------------------------------------------------------------------------------------- routers


def words_of(text: str) -> list[str]:
    """Return the words of a text."""
    return re.findall(WORD, text.lower())


def keyword_router(requests: Sequence[str], flags: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Choose flags of requests by the words that only one modality has in training. Most votes win; without a vote it is TEXT.

    >>> keyword_router(["draw a cat", "say a cat"], ["[IMAGE]", "[AUDIO]"], ["draw a dog", "a dog"])
    ['[IMAGE]', '[TEXT]']
    """
    of: dict[str, set[str]] = {}
    for text, flag in zip(requests, flags, strict=True):
        for word in words_of(text):
            of.setdefault(word, set()).add(flag)
    rules = {word: next(iter(own)) for word, own in of.items() if len(own) == 1}
    votes = [Counter(rules[word] for word in words_of(text) if word in rules) for text in asked]
    return [min(vote, key=lambda flag: (-vote[flag], flag)) if vote else TEXT for vote in votes]


def word_counts(requests: Sequence[str], asked: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the counts of the words of `requests` in both lists of texts."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=WORD, dtype=np.float32).fit(requests)
    return counter.transform(requests).toarray(), counter.transform(asked).toarray()


def logistic_router(features: NDArray[Any], flags: Sequence[str], asked: NDArray[Any]) -> list[str]:
    """Choose flags by a logistic regression of features, which are standardised; with one flag in training, by this flag."""
    from sklearn.linear_model import LogisticRegression

    if len(set(flags)) == 1:
        return [flags[0]] * len(asked)
    middle, scale = features.mean(0), features.std(0) + 1e-6
    fitted = LogisticRegression(max_iter=300).fit((features - middle) / scale, list(flags))
    return [str(flag) for flag in fitted.predict((asked - middle) / scale)]
