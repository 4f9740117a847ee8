"""Read dialogs with a text encoder: tokens with their place in the utterance, their speaker and their turn, after a [CLS] state."""

from __future__ import annotations

import inspect

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.encoders.masked_words import word_embedding
from counterpoint.encoders.text import PretrainedText, TextTransformer

MARKERS = 4  # start and end of an utterance, for each speaker; numbers from the size of the vocabulary on
SPEAKERS = 2


class DialogEmbedding(nn.Module):
    """Embeddings around a text encoder: the sum of word, place, speaker and turn, and a [CLS] state in front.

    An encoder of transformers keeps its own table of places, to which this module adds speaker and turn. Those start at 0, so
    that published weights begin unchanged.

    Args:
        encoder: encoder that reads the embedded tokens; not a part of this module.
        vocabulary: number of tokens of the tokenizer.
        places: largest number of tokens of an utterance, with its markers.
        turns: largest number of turns.
        dropout: probability, 0 to 1.
    """

    def __init__(
        self, encoder: TextTransformer | PretrainedText, vocabulary: int, *, places: int, turns: int, dropout: float
    ) -> None:
        super().__init__()
        width = encoder.dim
        self.vocabulary, self.own = vocabulary, isinstance(encoder, TextTransformer)
        self.markers, self.speaker, self.turn = (nn.Embedding(n, width) for n in (MARKERS, SPEAKERS, turns + 1))
        self.place = nn.Embedding(places, width) if self.own else None
        self.first = nn.Parameter(torch.empty(width))
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        for table in (self.markers, self.place, self.first):
            if table is not None:
                nn.init.normal_(table if isinstance(table, nn.Parameter) else table.weight, std=0.02)
        for table in (self.speaker, self.turn):
            nn.init.normal_(table.weight, std=0.02) if self.own else nn.init.zeros_(table.weight)

    def forward(
        self,
        encoder: TextTransformer | PretrainedText,
        ids: Int[Tensor, "n tokens"],
        place: Int[Tensor, "n tokens"],
        speaker: Int[Tensor, "n tokens"],
        turn: Int[Tensor, "n tokens"],
        mask: Bool[Tensor, "n tokens"],
        *,
        first: bool,
    ) -> Float[Tensor, "n more dim"]:
        """Compute the last states of all tokens, zeros at padding.

        Args:
            encoder: the encoder.
            ids: token numbers; those from `vocabulary` on are markers.
            place: place of each token in its utterance, from 0.
            speaker: 1 for the user, 0 for the other speaker.
            turn: number of the turn, counted back from 1 for the last one.
            mask: True at tokens, False at padding.
            first: put the [CLS] state in front of the tokens.
        """
        marked = ids >= self.vocabulary
        words = word_embedding(encoder)(ids.masked_fill(marked, 0))
        markers = self.markers((ids - self.vocabulary).clamp(min=0))
        x = torch.where(marked[..., None], markers, words) + self.speaker(speaker) + self.turn(turn)
        if self.place is not None:
            x = x + self.place(place)
        x = self.dropout(x)
        if first:
            x = torch.cat([self.first.expand(x.shape[0], 1, -1), x], 1)
            mask = torch.cat([mask.new_ones(x.shape[0], 1), mask], 1)
            place = torch.cat([place.new_zeros(x.shape[0], 1), place], 1)
        if isinstance(encoder, TextTransformer):
            return encoder.states(self.norm(x), mask)
        given = {"position_ids": place} if "position_ids" in inspect.signature(encoder.model.forward).parameters else {}
        out = encoder.model(inputs_embeds=x, attention_mask=mask.to(torch.int64), **given).last_hidden_state
        return out * mask[..., None]
