"""Give a model that answers the flags of meta-responses: single tokens, their rows, and a rule of decoding.

A flag is one token with a row of its own in the embedding and in the output layer. A new row is the mean of the existing ones. A
user's text cannot contain a flag, for the chat template replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.chat_models import ChatModel, Prompt
from counterpoint.encoders.chat_tokenizers import ChatTokenizer
from counterpoint.encoders.decoding import Branch
from counterpoint.encoders.messages import Message
from counterpoint.encoders.meta_responses import PROMPT, TEXT, render, replacements


def with_flags(tokenizer: ChatTokenizer, flags: Sequence[str]) -> ChatTokenizer:
    """Return a tokenizer that has each flag as one token, and whose template replaces flags in the texts of users.

    A tokenizer that has the flags already is returned as it is.
    """
    known = tokenizer.fast.get_vocab()
    missing = [flag for flag in flags if flag not in known]
    if not missing:
        return tokenizer
    from tokenizers import AddedToken

    found = ChatTokenizer.from_json(tokenizer.to_json())
    found.fast.add_tokens([AddedToken(flag, special=False, normalized=False) for flag in missing])
    filters = "".join(f" | replace({old!r}, {new!r})" for old, new in replacements(flags).items())
    # Answers keep their flags; a content in parts, with pictures, is left as it is.
    found.fast.chat_template = (
        "{%- set own = namespace(messages=[]) -%}{%- for message in messages -%}"
        "{%- if message.role != 'assistant' and message.content is string -%}"
        "{%- set own.messages = own.messages + [{'role': message.role, 'content': message.content" + filters + "}] -%}"
        "{%- else -%}{%- set own.messages = own.messages + [message] -%}{%- endif -%}{%- endfor -%}"
        "{%- set messages = own.messages -%}" + tokenizer.fast.chat_template
    )
    return ChatTokenizer(found.fast, mark=found.mark, parts=found.parts, image=found.image)


def flag_ids(tokenizer: ChatTokenizer, flags: Sequence[str]) -> list[int]:
    """Return the numbers of the flags' tokens."""
    return [int(number) for number in tokenizer.fast.convert_tokens_to_ids(list(flags))]


def make_room(model: ChatModel) -> None:
    """Enlarge embedding and output layer to the tokenizer's vocabulary, where they have fewer rows."""
    if model.network.get_input_embeddings().weight.shape[0] < model.tokenizer.vocabulary:
        model.network.resize_token_embeddings(model.tokenizer.vocabulary, mean_resizing=False)


def tables(model: ChatModel) -> list[nn.Module]:
    """Return the layers that have a row for each token: the embedding and, where it is not tied to it, the output layer."""
    network = model.network
    found = [network.get_input_embeddings()]
    if not getattr(model.text_config, "tie_word_embeddings", True):
        found.append(network.get_output_embeddings())
    return found


@torch.no_grad()
def start_rows(model: ChatModel, flags: Sequence[int], adapter: str) -> None:
    """Set the rows of the flags to the mean of all other rows. Weights and adapter both have them."""
    kept = torch.ones(model.tokenizer.vocabulary, dtype=torch.bool)
    kept[list(flags)] = False
    table: Any
    for table in tables(model):
        weight = table.token_adapter.base_layer.weight  # `table.weight` is a copy with the adapter's rows
        weight[list(flags)] = weight[: len(kept)][kept.to(weight.device)].mean(0)
        table.token_adapter.trainable_tokens_delta[adapter].copy_(weight[sorted(flags)])


def opening(tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens of a meta-response before its flag, and those between the flag and the prompt."""
    _, ids = tokenizer.chat((Message("user", "x"), Message("assistant", render(TEXT, "x"))))
    at = ids.index(flag_ids(tokenizer, [TEXT])[0])
    start, rest = ids[:at], ids[at + 1 :]
    length = next(n for n in range(1, len(rest) + 1) if tokenizer.text(rest[:n]).rstrip().endswith(PROMPT))
    return start, rest[:length]


@dataclass
class FlagDecoder:
    """Decode meta-responses of one flag: write what stands around it, choose among flags alone, then leave the model free.

    Attributes:
        tokenizer: The tokenizer, with the flags.
        flags: The flags that may be chosen.
    """

    tokenizer: ChatTokenizer
    flags: Sequence[str]

    @cached_property
    def allowed(self) -> list[list[int]]:
        """The tokens that are allowed at each of the first steps."""
        start, after = opening(self.tokenizer)
        return [*([n] for n in start), flag_ids(self.tokenizer, self.flags), *([n] for n in after)]

    def branches(self, prompts: Sequence[Prompt], generator: torch.Generator) -> list[Branch]:
        return [Branch(prompts)]

    def combine(self, logits: Float[Tensor, "branches n vocabulary"], step: int) -> Float[Tensor, "n vocabulary"]:
        if step >= len(self.allowed):
            return logits[0]
        chosen = self.allowed[step]
        found = torch.full_like(logits[0], -torch.inf)
        # A forced token may have a logit of -inf; among several, their own logits decide.
        found[:, chosen] = logits[0][:, chosen] if len(chosen) > 1 else 0.0
        return found
