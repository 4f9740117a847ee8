"""Write intents and transcripts from the states of a sound, and embed texts by their tokens' mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.encoders.text import Tokenizer, pool


class TokenMean(nn.Module):
    """An embedding layer of tokens; a text is the mean of its tokens' vectors.

    Args:
        vocabulary: number of tokens.
        dim: width of a vector.
    """

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.embed = nn.Embedding(vocabulary, dim)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Compute one vector per text; zeros for a text without tokens."""
        return pool(self.embed(ids), mask, "mean")


class SequenceDecoder(nn.Module):
    """A transformer that writes tokens one by one and attends to the states of a sound.

    Args:
        vocabulary: number of tokens.
        states: width of a sound's states.
        length: maximum number of tokens of a sequence.
        width: width of a token's vector, a multiple of `heads`.
        depth: number of layers.
        heads: number of attention heads.
        dropout: probability, 0 to 1.
    """

    def __init__(
        self, vocabulary: int, states: int, length: int, width: int, depth: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.bridge = nn.Linear(states, width)
        layer = nn.TransformerDecoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, depth, nn.LayerNorm(width))
        self.out = nn.Linear(width, vocabulary)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        states: Float[Tensor, "batch time dim"],
        there: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """Compute the logits of each next token from the tokens up to it.

        Args:
            tokens: the sequences so far, at most `length` long.
            states: states of the sounds.
            there: True at a state, False at padding; at least one True in each row.
        """
        count = tokens.shape[1]
        x = self.embed(tokens) + self.position[:count]
        later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        memory = self.bridge(states)
        return self.out(self.layers(x, memory, tgt_mask=later, memory_key_padding_mask=~there))

    @torch.no_grad()
    def greedy(
        self, states: Float[Tensor, "batch time dim"], there: Bool[Tensor, "batch time"], start: int, end: int
    ) -> Int[Tensor, "batch length"]:
        """Write the most probable token at each place, up to and including `end`; `end` fills the rest.

        Args:
            states, there: as above.
            start, end: numbers of the first and the last token of a sequence. The first is not in the result.
        """
        tokens = torch.full((len(states), 1), start, device=states.device)
        ended = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        while tokens.shape[1] <= self.length and not bool(ended.all()):
            best = self(tokens, states, there)[:, -1].argmax(1).masked_fill(ended, end)
            tokens = torch.cat([tokens, best[:, None]], 1)
            ended = ended | (best == end)
        filled = tokens.new_full((len(tokens), self.length), end)
        filled[:, : tokens.shape[1] - 1] = tokens[:, 1:]
        return filled


class IntentWriter(nn.Module):
    """A decoder that writes the intent of a sound, a separator and its transcript.

    The tokens of intents and the separator follow those of the tokenizer.

    Args:
        tokenizer: the tokenizer of transcripts. It puts a first and a last token around a text.
        classes: number of intents.
        states: width of a sound's states.
        length: maximum number of tokens of a transcript, with its first and last one.
        width, depth, heads: sizes of the decoder.
    """

    def __init__(
        self, tokenizer: Tokenizer, classes: int, states: int, length: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.tokenizer, self.classes, self.most = tokenizer, classes, length
        self.intent = tokenizer.vocabulary  # the token of class 0
        self.separator = self.intent + classes
        ends = tokenizer.encode([""], length)[0][0]
        self.start, self.end = int(ends[0]), int(ends[-1])
        self.decoder = SequenceDecoder(self.separator + 1, states, length + 1, width, depth, heads)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        states: Float[Tensor, "batch time dim"],
        there: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """Compute the logits of each next token."""
        found: Tensor = self.decoder(tokens, states, there)
        return found

    def targets(
        self,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        labels: Int[Tensor, " batch"],
        known: Bool[Tensor, " batch"],
    ) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
        """Return input tokens, the next tokens, and which of them count.

        Args:
            ids, mask: tokens of the transcripts, and where they are.
            labels: intents.
            known: False for items without a transcript, of which the intent and the separator count.
        """
        intent = (self.intent + labels)[:, None]
        tokens = torch.cat([ids[:, :1], intent, torch.full_like(intent, self.separator), ids[:, 1:]], 1)
        counted = torch.cat([torch.ones_like(intent, dtype=torch.bool).expand(-1, 2), mask[:, 1:] & known[:, None]], 1)
        return tokens[:, :-1], tokens[:, 1:], counted

    def written(
        self, states: Float[Tensor, "batch time dim"], there: Bool[Tensor, "batch time"]
    ) -> Int[Tensor, "batch length"]:
        """Write the tokens after the first one, each the most probable one."""
        return self.decoder.greedy(states, there, self.start, self.end)

    def intents(self, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
        """Read the class of written tokens; -2, which is no class, where the first one is no intent."""
        found = tokens[:, 0] - self.intent
        return found.masked_fill((found < 0) | (found >= self.classes), -2)

    def texts(self, sequences: Iterable[Tensor]) -> list[str]:
        """Read the words of written tokens, without intents and separators."""
        return [self.tokenizer.decode([n for n in row.tolist() if n < self.intent]).strip() for row in sequences]

    def as_written(self, texts: list[str]) -> list[str]:
        """Return texts in the spelling of the tokenizer, cut as the decoder cuts them."""
        ids, mask = self.tokenizer.encode(texts, self.most)
        return self.texts(row[at] for row, at in zip(ids, mask, strict=True))
