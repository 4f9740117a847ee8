"""Split a BERT in two halves: the lower layers read a text, the upper layers also read the tokens of an image (fusion).

    text = TextEncoder(size, lower=6)
    fusion = Fusion(size, upper=6, image=768, words=True)
    states = fusion(text.tokens(ids, mask), mask, image_tokens)          # [n, tokens, width]

`build_halves` builds the text encoder from random weights or from a published BERT. It also returns the sizes, the mask
token and the published weights for the fusion encoder. In a mask, True marks a token and False marks padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.encoders.text import PretrainedText, Tokenizer
from counterpoint.errors import CounterpointError


@dataclass(frozen=True)
class TextSize:
    """Sizes of a BERT.

    Args:
        vocabulary: number of tokens in the vocabulary.
        length: maximum number of tokens of a text.
        width: width of a token's state, a multiple of `heads`.
        depth: number of layers, lower and upper together.
        heads: number of attention heads.
        hidden: width of the feed-forward layer.
        dropout: probability, at least 0 and below 1.
    """

    vocabulary: int
    length: int
    width: int
    depth: int
    heads: int
    hidden: int
    dropout: float


class Attention(nn.Module):
    """BERT's attention: queries from `x`, keys and values from `source`, then LayerNorm(x + output)."""

    def __init__(self, width: int, source: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "n tokens width"],
        source: Float[Tensor, "n keys source"],
        mask: Bool[Tensor, "n keys"] | None = None,
        kept: list[Tensor] | None = None,
    ) -> Float[Tensor, "n tokens width"]:
        """Compute attention from the tokens of `x` to the keys of `source`.

        Args:
            x: states of the tokens.
            source: states that keys and values are computed from.
            mask: False where a key is padding; None: no key is padding.
            kept: list to append the attention probabilities [n, heads, tokens, keys] to; None: do not keep them.
        """
        q, k, v = (
            layer(values).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, values in ((self.query, x), (self.key, source), (self.value, source))
        )
        seen = None if mask is None else mask[:, None, None]
        if kept is None:
            out = F.scaled_dot_product_attention(q, k, v, seen, dropout_p=self.rate if self.training else 0.0)
        else:
            logits = q @ k.mT / q.shape[-1] ** 0.5
            logits = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
            kept.append(logits.softmax(-1))
            out = self.dropout(kept[-1]) @ v
        return self.norm(x + self.dropout(self.dense(out.transpose(1, 2).flatten(2))))


class Layer(nn.Module):
    """A layer of BERT, with LayerNorm after each part.

    If `image`, the width of image tokens, is not None, the layer also has cross-attention to them.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, image: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        if image is not None:
            self.crossattention = Attention(width, image, heads, dropout)
        self.intermediate, self.output = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "n tokens width"],
        mask: Bool[Tensor, "n tokens"] | None,
        image: Float[Tensor, "n patches image"] | None = None,
        kept: list[Tensor] | None = None,
        image_mask: Bool[Tensor, "n patches"] | None = None,
    ) -> Float[Tensor, "n tokens width"]:
        """Compute the states of the next layer.

        Args:
            x: states of the tokens.
            mask: False at padding; None: no padding.
            image: states that the cross-attention reads; None: no cross-attention.
            kept: list to append the cross-attention probabilities to; None: do not keep them.
            image_mask: False where a state of `image` is padding; None: none is.
        """
        x = self.attention(x, x, mask)
        if image is not None:
            x = self.crossattention(x, image, image_mask, kept)
        return self.norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class Embeddings(nn.Module):
    """The normalised sum of the embeddings of words, positions and segment types; the type is always BERT's first."""

    def __init__(self, vocabulary: int, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.token_type = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Int[Tensor, "n tokens"]) -> Float[Tensor, "n tokens width"]:
        x = self.word(ids) + self.position.weight[: ids.shape[1]] + self.token_type.weight[0]
        return self.dropout(self.norm(x))


class TextEncoder(nn.Module):
    """The lower layers of a BERT. The vector of a text is the state of its first token."""

    def __init__(self, size: TextSize, lower: int) -> None:
        super().__init__()
        self.dim, self.length, self.vocabulary = size.width, size.length, size.vocabulary
        self.embeddings = Embeddings(size.vocabulary, size.length, size.width, size.dropout)
        self.layers = nn.ModuleList(Layer(size.width, size.heads, size.hidden, size.dropout) for _ in range(lower))
        self.apply(_bert_start)

    def tokens(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n tokens width"]:
        """Compute every token's state. A text without tokens attends to its first padding."""
        if ids.shape[1] > self.length:
            raise CounterpointError(
                f"texts of {ids.shape[1]} tokens are longer than the encoder's {self.length}; encode them shorter"
            )
        x, mask = self.embeddings(ids), _never_empty(mask)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def forward(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n width"]:
        return self.tokens(ids, mask)[:, 0]


class Fusion(nn.Module):
    """The upper layers of a BERT with cross-attention to image tokens; if `words`, also BERT's head for masked words."""

    def __init__(self, size: TextSize, upper: int, image: int, words: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(size.width, size.heads, size.hidden, size.dropout, image) for _ in range(upper)
        )
        if words:
            self.dense = nn.Linear(size.width, size.width)
            self.norm = nn.LayerNorm(size.width, eps=1e-12)
            self.bias = nn.Parameter(torch.zeros(size.vocabulary))
        self.apply(_bert_start)

    def forward(
        self,
        text: Float[Tensor, "n tokens width"],
        mask: Bool[Tensor, "n tokens"],
        image: Float[Tensor, "n patches image"],
        kept: list[Tensor] | None = None,
    ) -> Float[Tensor, "n tokens width"]:
        """Compute the text's states, which attend to the image.

        Args:
            text: states of the text encoder.
            mask: False at padding.
            image: states of the image tokens.
            kept: list to append the cross-attention probabilities of every layer to; None: do not keep them.
        """
        mask = _never_empty(mask)
        for layer in self.layers:
            text = layer(text, mask, image, kept)
        return text

    def words(
        self, states: Float[Tensor, "m width"], embedding: Float[Tensor, "vocabulary width"]
    ) -> Float[Tensor, "m vocabulary"]:
        """Compute the logits of the word at each state; the last linear map is the word embedding, as in BERT."""
        return F.linear(self.norm(F.gelu(self.dense(states))), embedding, self.bias)


def _never_empty(mask: Tensor) -> Tensor:
    """Make the first key of every row visible, because a row of attention without any key is NaN."""
    return mask | (torch.arange(mask.shape[1], device=mask.device) == 0)


def _bert_start(module: nn.Module) -> None:
    """Initialise a layer with BERT's standard deviation of 0.02, rescaled from a width of 768 to the layer's.

    Unscaled, the first token of a narrow network would receive almost nothing from the other tokens.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 * (768 / module.weight.shape[1]) ** 0.5)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------- published weights


# Names of BERT's weights in transformers and the authors' files, and our names. Replacements apply in this order.
_BERT_NAMES = (
    (r"^embeddings\.word_embeddings\.", "embeddings.word."),
    (r"^embeddings\.position_embeddings\.", "embeddings.position."),
    (r"^embeddings\.token_type_embeddings\.", "embeddings.token_type."),
    (r"^embeddings\.LayerNorm\.", "embeddings.norm."),
    (r"^encoder\.layer\.", "layers."),
    (r"attention\.self\.", "attention."),
    (r"attention\.output\.dense\.", "attention.dense."),
    (r"attention\.output\.LayerNorm\.", "attention.norm."),
    (r"\.intermediate\.dense\.", ".intermediate."),
    (r"\.output\.dense\.", ".output."),
    (r"\.output\.LayerNorm\.", ".norm."),
)


def bert_name(name: str, lower: int) -> tuple[bool, str]:
    """Return whether a weight of a BERT belongs to the fusion encoder, and our name of it.

    Args:
        name: the weight's name in transformers.
        lower: number of layers of the text encoder; the fusion encoder has the layers above.
    """
    for old, new in _BERT_NAMES:
        name = re.sub(old, new, name)
    found = re.match(r"layers\.(\d+)\.(.*)", name)
    if not found or int(found[1]) < lower:
        return False, name
    return True, f"layers.{int(found[1]) - lower}.{found[2]}"


class Halves(NamedTuple):
    """A text encoder, with the sizes, mask token and weights for its fusion encoder."""

    text: TextEncoder
    size: TextSize
    lower: int  # number of layers of the text encoder
    mask_token: int
    upper: dict[
        str, Tensor
    ]  # published weights of the upper layers by their names in `Fusion`; empty without a published BERT


def build_halves(
    name: str, words: Tokenizer, published: PretrainedText | None, size: TextSize, *, context: int, upper: int
) -> Halves:
    """Build the text encoder, and find the mask token and the weights of the upper layers.

    Args:
        name: name of the text encoder, for messages.
        words: its tokenizer. If `published` is None and the vocabulary has no mask token, append one.
        published: a BERT to take weights and sizes from; None: random weights of `size`.
        size: sizes to use if `published` is None; the tokenizer's vocabulary replaces its vocabulary.
        context: maximum number of tokens of a text, at most `size.length`.
        upper: number of layers of the fusion encoder, fewer than `size.depth`; 0: none.

    Raises CounterpointError for a published model that is not a BERT or lacks a mask token. Raises it too for a `context` or
    an `upper` that does not fit.
    """
    special = (words.model.token_to_id(token) for token in ("[MASK]", "<mask>"))
    found = next((number for number in special if number is not None), None)
    weights: Mapping[str, Tensor] = {}
    if published is None:
        size = replace(size, vocabulary=words.vocabulary + (found is None))
    else:
        size = _published_size(published, name, size.dropout)
        weights = published.model.state_dict()
        if found is None:
            raise CounterpointError(f"the tokenizer of {name} has no [MASK], which MLM needs; use another text encoder")
    if context > size.length:
        raise CounterpointError(f"{name} reads {size.length} tokens, fewer than context ({context}); lower context")
    if upper >= size.depth:
        raise CounterpointError(
            f"fusion_layers ({upper}) must leave layers to the text encoder, out of {size.depth}; lower fusion_layers"
        )
    lower = size.depth - upper
    encoder = TextEncoder(size, lower)
    named = [(bert_name(old, lower), value) for old, value in weights.items()]
    mine = {new: value for (above, new), value in named if not above}
    if mine:
        odd = encoder.load_state_dict(mine, strict=False)
        if odd.missing_keys:
            raise CounterpointError(f"{name} is not a BERT: it lacks {odd.missing_keys[0]}")
    above = {new: value for (is_above, new), value in named if is_above}
    return Halves(encoder, size, lower, words.vocabulary if found is None else found, above)


def _published_size(encoder: PretrainedText, name: str, dropout: float) -> TextSize:
    """Return the sizes of a model of transformers. Raises CounterpointError if it is not a BERT."""
    model: Any = encoder.model
    found = model.config
    if found.model_type != "bert":
        raise CounterpointError(
            f"albef needs a BERT as its text transformer, {name} is a {found.model_type}; use text-s, minilm or "
            "hf:bert-base-uncased"
        )
    return TextSize(
        int(found.vocab_size),
        int(found.max_position_embeddings),
        int(found.hidden_size),
        int(found.num_hidden_layers),
        int(found.num_attention_heads),
        int(found.intermediate_size),
        dropout,
    )
