"""Augment captions: remove stop words, then replace, exchange or delete words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

_STOP = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
    itself they them their theirs themselves what which who whom this that these those am is are was were be been being have
    has had having do does did doing a an the and but if or because as until while of at by for with about against between
    into through during before after above below to from up down in out on off over under again further then once here there
    when where why how all any both each few more most other some such no nor not only own same so than too very can will just
    should now
"""
STOP_WORDS = frozenset(_STOP.split())


def augment_text(
    text: str,
    generator: torch.Generator,
    *,
    strong: bool = True,
    drop_stop_words: float = 0.8,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    share: float = 0.1,
) -> str:
    """Change a caption: remove stop words (weak), then also make one change of words (strong).

    Args:
        text: words separated by spaces. An empty text stays unchanged.
        generator: the only source of randomness.
        strong: make the change of words too (default).
        drop_stop_words: probability, 0 to 1, of removing all English stop words; a text of stop words alone keeps them.
        synonyms: synonyms of lower-case words. The change is then a replacement of words that have synonyms (weight 0.4),
            an exchange of two words (0.4) or a deletion (0.2). None: only exchange or deletion.
        share: share of the words to replace or exchange, 0 to 1, at least one word; for deletion, each word's probability.

    Source: the released code of Fini et al. (arXiv 2305.08675), after EDA (Wei and Zou, EMNLP 2019, arXiv 1901.11196).

    >>> augment_text("a picture of the sea", torch.Generator().manual_seed(0), strong=False, drop_stop_words=1.0)
    'picture sea'
    """
    words = text.split()
    if not words:
        return text

    def chance() -> float:
        return float(torch.rand((), generator=generator))

    def order(n: int) -> list[int]:
        return torch.randperm(n, generator=generator).tolist()

    if chance() < drop_stop_words:
        words = [word for word in words if word.lower() not in STOP_WORDS] or words
    if not strong:
        return " ".join(words)
    count = max(1, int(share * len(words)))
    draw = chance() * (1.0 if synonyms is not None else 0.6)
    if draw < 0.2:
        kept = [word for word in words if chance() >= share]
        words = kept or [words[order(len(words))[0]]]
    elif draw < 0.6:
        for _ in range(count if len(words) > 1 else 0):
            a, b = order(len(words))[:2]
            words[a], words[b] = words[b], words[a]
    else:
        assert synonyms is not None
        known = [n for n, word in enumerate(words) if synonyms.get(word.lower())]
        for n in (known[m] for m in order(len(known))[:count]):
            choices = synonyms[words[n].lower()]
            words[n] = choices[order(len(choices))[0]]
    return " ".join(words)
