"""Measure what vectors of words know: attributes of the objects they name, predicted for words that the probe has not seen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

FOLDS = 5


def probe_words(vectors: Float[np.ndarray, "words dim"], levels: Sequence[str]) -> float:
    """Return the accuracy of a logistic regression from words to levels, by cross-validation in five folds of words.

    Args:
        vectors: one for each word; standardised here, within the training folds.
        levels: level of each word, at least two different ones.

    Raises ValueError for fewer than five words and for one level alone.

    >>> probe_words(np.repeat(np.eye(2), 10, axis=0), ["low"] * 10 + ["high"] * 10)
    1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = np.asarray(levels)
    if len(known) < FOLDS or len(set(levels)) < 2:
        raise ValueError(f"levels must hold {FOLDS} words and two levels, has {len(known)} and {len(set(levels))}")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a level with fewer words than folds
        kind = StratifiedKFold if max(np.unique(known, return_counts=True)[1]) >= FOLDS else KFold
        folds = kind(FOLDS, shuffle=True, random_state=0)
        return float(np.mean(cross_val_predict(model, vectors, known, cv=folds) == known))


def probe_attributes(
    vectors: Mapping[str, NDArray[np.floating]], attributes: Mapping[str, Mapping[str, str]], *, permuted: bool = False
) -> dict[str, float]:
    """Return the probe's accuracy for each attribute that can be probed.

    Args:
        vectors: word -> its vector.
        attributes: attribute -> word -> level. Words without a vector are left out.
        permuted: give every word the level of another, at random: the control.
    """
    found = {}
    for name, levels in attributes.items():
        words = sorted(word for word in levels if word in vectors)
        values = [levels[word] for word in words]
        if permuted:
            values = np.random.default_rng(0).permutation(values).tolist()
        if len(words) >= FOLDS and len(set(values)) > 1:
            found[name] = probe_words(np.stack([vectors[word] for word in words]), values)
    return found


def most_common(attributes: Mapping[str, Mapping[str, str]]) -> float:
    """Return the mean, over attributes, of the share of words with the most common level; NaN without attributes."""
    shares = [
        max(np.unique(list(levels.values()), return_counts=True)[1]) / len(levels) for levels in attributes.values()
    ]
    return float(np.mean(shares)) if shares else float("nan")
