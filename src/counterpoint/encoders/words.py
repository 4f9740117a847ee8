"""Assign each token of a text to the word it belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.encoders.text import Tokenizer


def tokens_of_words(
    tokenizer: Tokenizer, texts: Sequence[str], context: int
) -> tuple[Int[Tensor, "n tokens"], Bool[Tensor, "n tokens"], Float[Tensor, "n words tokens"], list[list[str]]]:
    """Tokenize texts; return token numbers, mask, owners (1 where a token belongs to a word, else 0) and the words.

    Args:
        tokenizer: splits texts into tokens.
        texts: n strings.
        context: maximum number of tokens per text; later words are cut off.

    Raises ValueError for a text without words.
    """
    ids, mask = tokenizer.encode(list(texts), context)
    tokenizer.model.enable_truncation(context)
    try:
        encodings = tokenizer.model.encode_batch(list(texts))
    finally:
        tokenizer.model.no_truncation()
    words: list[list[str]] = []
    places: list[list[list[int]]] = []
    for number, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        of: dict[int, list[int]] = {}
        for token, word in enumerate(encoding.word_ids):
            if word is not None and not encoding.special_tokens_mask[token]:
                of.setdefault(word, []).append(token)
        spans = [
            (text[encoding.offsets[tokens[0]][0] : encoding.offsets[tokens[-1]][1]].strip(), tokens)
            for tokens in of.values()
        ]
        spans = [(word, tokens) for word, tokens in spans if word]
        if not spans:
            raise ValueError(f"texts[{number}] has no words")
        words.append([word for word, _ in spans])
        places.append([tokens for _, tokens in spans])
    owners = torch.zeros(len(texts), max(map(len, words)), ids.shape[1])
    for row, spans_ in enumerate(places):
        for word_at, tokens in enumerate(spans_):
            owners[row, word_at, tokens] = 1
    return ids, mask, owners, words
