"""Predict masked words from a text encoder's states, as BERT does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.text import PretrainedText, TextTransformer, Tokenizer
from counterpoint.errors import CounterpointError

MASKS = ("[MASK]", "<mask>")


class WordHead(nn.Module):
    """BERT's head of masked words: linear, GELU, LayerNorm, and the word embedding as the last linear map."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self, states: Float[Tensor, "m width"], embedding: Float[Tensor, "vocabulary width"]
    ) -> Float[Tensor, "m vocabulary"]:
        """Compute the logits of the word at each state."""
        return F.linear(self.norm(F.gelu(self.dense(states))), embedding, self.bias)


def word_embedding(encoder: TextTransformer | PretrainedText) -> nn.Embedding:
    """Return the embedding of the words that a text encoder reads."""
    model: Any = encoder
    found: nn.Embedding = encoder.embed if isinstance(encoder, TextTransformer) else model.model.get_input_embeddings()
    return found


def mask_token(tokenizer: Tokenizer, name: str) -> tuple[int, int]:
    """Return the number of the mask token, and the size of the vocabulary with it.

    A vocabulary learned here has none and gets one more token. Raises CounterpointError for another tokenizer without one.

    Args:
        tokenizer: the tokenizer of the encoder.
        name: name of the encoder.
    """
    found = next((n for token in MASKS if (n := tokenizer.model.token_to_id(token)) is not None), None)
    if found is not None:
        return found, tokenizer.vocabulary
    if not name.startswith("text-"):
        raise CounterpointError(f"the tokenizer of {name} has no [MASK], which masked words need; name another encoder")
    return tokenizer.vocabulary, tokenizer.vocabulary + 1
