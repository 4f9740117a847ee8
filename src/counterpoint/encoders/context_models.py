"""Language models that take a context as vectors: the embeddings of demonstrations, or vectors in their place.

    name             model
    gpt2-W-D-H       a GPT-2 of D layers of width W with H heads, built here; also llama-W-D-H and qwen2-W-D-H
    t5-W-D-H         a T5 with D layers in its encoder and D in its decoder, built here
    hf:NAME          any causal or encoder-decoder model of transformers, by name or folder

A causal model reads [context ; query]. The encoder of an encoder-decoder model reads [context ; source], its decoder the query,
which begins with the decoder's start. So the logits at position t predict the token at t + 1 in both.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.encoders.chat_models import Numbers, built, keep_tied_once
from counterpoint.encoders.chat_names import check_chat_model
from counterpoint.encoders.no_rows import no_rows
from counterpoint.encoders.text import Tokenizer
from counterpoint.errors import CounterpointError, needs_extra, unknown

SMALL = {"gpt2-s": "gpt2-64-3-4", "llama-s": "llama-64-3-4", "qwen2-s": "qwen2-64-3-4", "t5-s": "t5-64-3-4"}
FORMS = [*SMALL, "gpt2-W-D-H", "llama-W-D-H", "qwen2-W-D-H", "t5-W-D-H", "hf:NAME"]
FIRST = 100  # the first token that a placeholder may copy; earlier ones are often special


class Query(NamedTuple):
    """Queries of a model. `source` has no token for a causal model."""

    source: Int[Tensor, "n source"]
    source_mask: Bool[Tensor, "n source"]
    ids: Int[Tensor, "n query"]
    mask: Bool[Tensor, "n query"]
    answer: Bool[Tensor, "n query"]  # True at the tokens of the answer


def check_context_model(name: str) -> None:
    """Raise CounterpointError for a name that is not in the module's table. Runs before data are read."""
    full = SMALL.get(name, name)
    if re.fullmatch(r"t5-\d+-\d+-\d+", full):
        _t5_shape(full)
    elif full.startswith("llava") or not re.match(r"(hf:.|(gpt2|llama|qwen2)-)", full):
        raise unknown("model", name, FORMS)
    else:
        check_chat_model(full)


def _t5_shape(name: str) -> tuple[int, int, int]:
    width, depth, heads = (int(part) for part in name.split("-")[1:])
    if min(width, depth, heads) < 1 or width % heads:
        raise CounterpointError(f"{name}: needs a width that is a multiple of its heads, and at least one layer")
    return width, depth, heads


def is_encoder_decoder(name: str) -> bool:
    """Return whether the model of this name has an encoder and a decoder."""
    if not name.startswith("hf:"):
        return name.startswith("t5-")
    return bool(getattr(_fetched(name, "AutoConfig"), "is_encoder_decoder", False))


def decoder_start(name: str, tokenizer: Tokenizer) -> int:
    """Return the token that the decoder of a model begins with; -1 for a causal model."""
    if not is_encoder_decoder(name):
        return -1
    found = _fetched(name, "AutoConfig").decoder_start_token_id if name.startswith("hf:") else tokenizer.pad
    return tokenizer.pad if found is None else int(found)


def _fetched(name: str, kind: str, **more: Any) -> Any:
    """Load a part of a published model by a class of transformers."""
    try:
        import transformers

        return getattr(transformers, kind).from_pretrained(name.removeprefix("hf:"), **more)
    except Exception as error:  # of transformers and of its HTTP client
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"{name} could not be loaded: {text[:300].rstrip('.')}. A model that is not on this machine is downloaded; name a "
            "folder, or a model that is built here, such as gpt2-s"
        ) from error


def _network(name: str, tokenizer: Tokenizer, context: int, dropout: float) -> Any:
    """Build or load the network."""
    if name.startswith("hf:"):
        kind = "AutoModelForSeq2SeqLM" if is_encoder_decoder(name) else "AutoModelForCausalLM"
        return _fetched(name, kind, dtype=torch.float32)
    name, numbers = SMALL.get(name, name), Numbers(tokenizer.vocabulary, tokenizer.pad)
    if not is_encoder_decoder(name):
        return built(name, numbers, context, dropout)
    try:
        import transformers
    except ImportError as error:
        raise needs_extra(name, "language") from error
    width, depth, heads = _t5_shape(name)
    more: dict[str, Any] = {"decoder_start_token_id": numbers.pad}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=numbers.vocabulary,
            d_model=width,
            d_kv=width // heads,
            d_ff=3 * width,
            num_layers=depth,
            num_heads=heads,
            dropout_rate=dropout,
            pad_token_id=numbers.pad,
            eos_token_id=None,
            **more,
        )
    )


class ContextModel(nn.Module):
    """A language model whose context is a sequence of vectors.

    Args:
        name: name from the module's table.
        tokenizer: its tokenizer.
        context: maximum number of positions of context and query together.
        dropout: dropout probability of models built here.

    Raises CounterpointError for a model that cannot be loaded, has too few positions, or has fewer tokens than the tokenizer.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, context: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.model: Any = _network(name, tokenizer, context, dropout)
        keep_tied_once(self.model)
        need_room(name, self.model, tokenizer, context)
        self.encoder_decoder = bool(self.model.config.is_encoder_decoder)

    @property
    def width(self) -> int:
        """The width of an embedded token."""
        return int(self.model.get_input_embeddings().embedding_dim)

    def embed(self, ids: Int[Tensor, "n tokens"]) -> Float[Tensor, "n tokens width"]:
        """Embed tokens, as the model does."""
        rows: Tensor = self.model.get_input_embeddings()(ids)
        return rows

    def forward(
        self, context: Float[Tensor, "n context width"], mask: Bool[Tensor, "n context"], query: Query
    ) -> Float[Tensor, "n query vocabulary"]:
        """Compute the logits at the positions of the query.

        Args:
            context: vectors before the query.
            mask: True at vectors, False at padding, which stands on the left.
            query: the query, padded on the right.
        """
        if not len(context):
            vocabulary = len(self.model.get_output_embeddings().weight)
            return no_rows(self, query.ids.shape[1], vocabulary) + 0 * context.sum()
        if self.encoder_decoder:
            found = self.model(
                inputs_embeds=torch.cat([context, self.embed(query.source)], 1),
                attention_mask=torch.cat([mask, query.source_mask], 1).long(),
                decoder_input_ids=query.ids,
                decoder_attention_mask=query.mask.long(),
                use_cache=False,
            )
            return torch.as_tensor(found.logits)
        both = torch.cat([mask, query.mask], 1)
        found = self.model(
            inputs_embeds=torch.cat([context, self.embed(query.ids)], 1),
            attention_mask=both.long(),
            position_ids=places(both),
            logits_to_keep=query.ids.shape[1],
            use_cache=False,
        )
        return torch.as_tensor(found.logits)


def places(mask: Bool[Tensor, "n tokens"]) -> Int[Tensor, "n tokens"]:
    """Number the positions of each row from 0 at its first token, so that padding moves no token."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def need_room(name: str, model: Any, tokenizer: Tokenizer, context: int) -> None:
    """Raise CounterpointError for a model with fewer positions than `context`, or fewer tokens than its tokenizer."""
    config = model.config
    known = None if config.is_encoder_decoder else getattr(config, "max_position_embeddings", None)
    if known and known < context:
        raise CounterpointError(f"{name} reads {known} tokens, fewer than context ({context}); lower --context")
    many = model.get_input_embeddings().num_embeddings
    if many < tokenizer.vocabulary:
        raise CounterpointError(
            f"{name} has {many} tokens, fewer than the tokenizer ({tokenizer.vocabulary}); name two models that share a tokenizer"
        )


class Distiller(nn.Module):
    """A language model without its head that reads demonstrations and writes vectors for another model.

    Args:
        name: name from the module's table.
        tokenizer: the tokenizer of both models.
        context: maximum number of positions of demonstrations and vectors together.
        vectors: number of vectors.
        width: width of the vectors. Where its own differs, an affine map and a tanh convert them.
        placeholders: initial placeholders: "vocabulary", rows of its embedding, or "random".
        dropout: dropout probability of models built here.

    Raises CounterpointError as `ContextModel` does.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        context: int,
        vectors: int,
        width: int,
        placeholders: Literal["vocabulary", "random"] = "vocabulary",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole = _network(name, tokenizer, context, dropout)
        need_room(name, whole, tokenizer, context)
        self.initial, self.spread = placeholders, float(getattr(whole.config, "initializer_range", 0.02) or 0.02)
        self.encoder = bool(whole.config.is_encoder_decoder)
        self.body: Any = whole.get_encoder() if self.encoder else whole.base_model
        own, self.width = int(self.table.embedding_dim), width
        self.placeholders = nn.Parameter(torch.empty(vectors, own))
        self.adapter: nn.Module = nn.Identity() if own == width else nn.Sequential(nn.Linear(own, width), nn.Tanh())
        self.renew()

    @property
    def table(self) -> nn.Embedding:
        """The embedding of its tokens."""
        found: nn.Embedding = self.body.get_input_embeddings()
        return found

    @torch.no_grad()
    def renew(self) -> None:
        """Draw the placeholders again."""
        if self.initial == "random":
            self.placeholders.normal_(std=self.spread)
            return
        many = self.table.num_embeddings
        first = FIRST if many > FIRST else 0
        self.placeholders.copy_(self.table.weight[torch.randint(first, many, (len(self.placeholders),))])

    def start_from(self, model: ContextModel) -> None:
        """Take the weights of a model of the same shape, and draw the placeholders from its embedding."""
        source = model.model.get_encoder() if self.encoder else model.model.base_model
        self.body.load_state_dict(source.state_dict())
        self.renew()

    def forward(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n vectors width"]:
        """Distil demonstrations into vectors: the last states of the placeholders, which follow the demonstrations.

        Args:
            ids: tokens of the demonstrations, possibly none.
            mask: True at tokens, False at padding, which stands on the left.
        """
        if not len(ids):
            return no_rows(self, len(self.placeholders), self.width)
        rows = torch.cat([self.table(ids), self.placeholders.expand(len(ids), -1, -1)], 1)
        both = torch.cat([mask, mask.new_ones(len(ids), len(self.placeholders))], 1)
        more = {} if self.encoder else {"position_ids": places(both), "use_cache": False}
        states: Tensor = self.body(inputs_embeds=rows, attention_mask=both.long(), **more).last_hidden_state
        found: Tensor = self.adapter(states[:, -len(self.placeholders) :])
        return found
