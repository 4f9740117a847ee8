"""Build models that answer: causal language models of transformers, with or without pictures.

    name           model
    llava-s        LLaVA's classes, built here: a small vision transformer, a projector and a Llama of 3 layers, 64 wide
    llava-W-D-H    the same with a Llama of D layers of width W with H heads
    llama-W-D-H    a Llama without pictures, built here; also qwen2-W-D-H and gpt2-W-D-H
    hf:NAME        any causal language model of transformers, or one of LLaVA's kind with pictures, by name or folder

A model built here learns its tokenizer from the training chats. A chat becomes one text by the tokenizer's chat template. The
prompt is the text before the answer, so the tokens of an answer are known exactly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.encoders.chat_names import patch_side, shape_of, takes_pictures, unloaded
from counterpoint.encoders.chat_tokenizers import ChatTokenizer
from counterpoint.encoders.messages import IMAGE, Message
from counterpoint.encoders.no_rows import no_rows
from counterpoint.errors import CounterpointError, needs_extra
from counterpoint.words import counted

VISION_DEPTH = 2


Pixels = NDArray[np.uint8]  # [height, width, 3] RGB


class Prompt(NamedTuple):
    """What a model answers: messages without the answer, and the pictures of their marks."""

    messages: tuple[Message, ...]
    pictures: tuple[Pixels, ...] = ()  # each [size, size, 3]


def asking(question: str, picture: Pixels) -> Prompt:
    """Return a question about a picture."""
    return Prompt((Message("user", f"{IMAGE} {question}"),), (picture,))


def described(prompt: Prompt, description: str) -> Prompt:
    """Put a description of the picture before the last question. Marks of pictures stay in front."""
    role, text = prompt.messages[-1]
    marks = text.count(IMAGE)
    question = " ".join(text.replace(IMAGE, " ").split())
    start = " ".join([IMAGE] * marks)
    told = f"{start} Image description: {description} {question}".strip()
    return Prompt((*prompt.messages[:-1], Message(role, told)), prompt.pictures)


def padded(
    rows: Sequence[Sequence[int]], pad: int, *, left: bool = False
) -> tuple[Int[Tensor, "n tokens"], Bool[Tensor, "n tokens"]]:
    """Pad token numbers to the longest row, on the right or on the left; return them with their mask."""
    length = max(1, max(map(len, rows), default=1))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for n, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(len(row))
        ids[n, at], mask[n, at] = torch.tensor(list(row), dtype=torch.int64), True
    return ids, mask


def stacked(pixels: UInt8[Tensor, "all ..."], counts: Int[Tensor, " n"]) -> UInt8[Tensor, "n most ..."]:
    """Put the pictures of all texts in a row for each text, at least one long; places without a picture hold zeros."""
    shown = torch.arange(max([1, *counts.tolist()]), device=counts.device) < counts[:, None]
    found = pixels.new_zeros(*shown.shape, *pixels.shape[1:])
    found[shown] = pixels
    return found


class ChatModel(nn.Module):
    """A causal language model with its tokenizer.

    Args:
        name: name from the module's table.
        tokenizer: its tokenizer.
        size: height and width of the pictures in pixels; 0 without pictures.
        context: maximum number of tokens of prompt and answer together.
        dropout: dropout probability of models built here.

    Raises CounterpointError for a model that cannot be loaded, has too short a context, or takes no pictures.
    """

    def __init__(
        self, name: str, tokenizer: ChatTokenizer, *, size: int = 0, context: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.name, self.tokenizer, self.size, self.context = name, tokenizer, size, context
        self.images: Any = None
        if name.startswith("hf:"):
            self.model: Any = self._load(name.removeprefix("hf:"))
        else:
            if size and not takes_pictures(name):
                raise CounterpointError(f"{name} takes no pictures, which these data have; name llava-s or llava-W-D-H")
            numbers = Numbers(tokenizer.vocabulary, tokenizer.pad, tokenizer.fast.eos_token_id, tokenizer.image_id)
            self.model = built(name, numbers, context, dropout, size)
        keep_tied_once(self.model)
        room = getattr(self.text_config, "max_position_embeddings", None) or context
        if room < context:
            raise CounterpointError(f"{name} reads {room} tokens, fewer than context ({context}); lower --context")

    def _load(self, place: str) -> Any:
        try:
            from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText

            if self.size:
                self.images = AutoImageProcessor.from_pretrained(place)
                return AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32)
            return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        except Exception as error:  # of transformers and of its HTTP client
            raise unloaded(self.name, error) from error

    @property
    def network(self) -> Any:
        """The network of transformers, without what peft may have put around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def cuts_logits(self) -> bool:
        """Whether the network takes `logits_to_keep`, the number of last positions whose logits it computes."""
        return "logits_to_keep" in inspect.signature(self.network.forward).parameters

    @property
    def text_config(self) -> Any:
        """The settings of the language model."""
        return getattr(self.model.config, "text_config", self.model.config)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def pixels(self, pictures: Sequence[Pixels] | NDArray[np.uint8]) -> dict[str, Tensor]:
        """Return pictures as the model takes them; {} without pictures."""
        if not len(pictures):
            return {}
        if self.images is not None:
            found = self.images(images=list(pictures), return_tensors="pt")
            return {name: torch.as_tensor(value).to(self.device) for name, value in found.items()}
        rows = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device).permute(0, 3, 1, 2)
        return {"pixel_values": rows.to(self.network.dtype) / 127.5 - 1}

    def forward(
        self,
        ids: Int[Tensor, "n tokens"],
        mask: Bool[Tensor, "n tokens"],
        pictures: UInt8[Tensor, "n most size size 3"] | None = None,
        counts: Int[Tensor, " n"] | None = None,
        **more: Any,
    ) -> Float[Tensor, "n tokens vocabulary"]:
        """Compute the logits of the next token at each position.

        Args:
            ids: token numbers.
            mask: True at tokens, False at padding.
            pictures: RGB pixels; those after a chat's last picture are not used.
            counts: number of pictures of each chat.
            more: further arguments of the network.
        """
        if not len(ids):
            return self._of_no_row(ids, more)
        media = {}
        if pictures is not None and counts is not None:
            shown = torch.arange(pictures.shape[1], device=counts.device) < counts[:, None]
            media = self.pixels(pictures[shown].cpu().numpy())
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **media, **more).logits
        return logits

    def _of_no_row(self, ids: Int[Tensor, "0 tokens"], more: dict[str, Any]) -> Float[Tensor, "0 tokens vocabulary"]:
        """Compute the logits of a process without a share of an epoch's last batch. Networks of transformers need a row."""
        row = ids.new_full((1, ids.shape[1]), self.tokenizer.pad)
        found = self.forward(row, torch.ones_like(row, dtype=torch.bool), **more)[:0]
        # A projector that learns alone has no picture here.
        return found if found.requires_grad else found + no_rows(self, *found.shape[1:])

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        new_tokens: int,
        *,
        processor: Any = None,
        disturb: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        apart: int | None = None,
        **more: Any,
    ) -> list[list[int]]:
        """Answer prompts, by the most probable token at each step or as `processor` decides. Return the tokens of each answer.

        Args:
            prompts: of any lengths.
            new_tokens: maximum number of tokens of an answer.
            processor: a `LogitsProcessor` of transformers.
            disturb: changes the pixels that the model takes.
            apart: first of the prompts that have no pictures, which a pass of their own reads where the model allows it. Default:
                one pass reads all prompts.
            more: further arguments of transformers' `generate`, whose own loop then decodes.

        Raises CounterpointError for a prompt that leaves no room in the context for an answer.
        """
        from counterpoint.encoders.growing_cache import growing_cache
        from counterpoint.encoders.token_steps import loop_of

        rows = [self.tokenizer.prompt(prompt.messages) for prompt in prompts]
        longest = max(range(len(rows)), key=lambda n: len(rows[n]))
        if len(rows[longest]) + new_tokens > self.context:
            raise CounterpointError(
                f"a prompt has {counted(len(rows[longest]), 'token')}, which with {new_tokens} new tokens is more than the "
                f"context of {self.context}: '{prompts[longest].messages[-1].text[:60]}'; shorten it, ask for fewer new tokens, or "
                "use a model of a longer context"
            )
        ids, mask = (part.to(self.device) for part in padded(rows, self.tokenizer.pad, left=True))
        media = self.pixels([picture for prompt in prompts for picture in prompt.pictures])
        if disturb is not None:
            media = disturb(media)
        stop = self.tokenizer.fast.eos_token_id
        cache = growing_cache(self.network)
        loop = loop_of(self.network, apart) if cache and not more else None
        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=stop,
            pad_token_id=self.tokenizer.pad,
            **({} if loop is None else {"custom_generate": loop}),
            **({} if processor is None else {"logits_processor": [processor]}),
            **media,
            **cache,
            **more,
        )[:, ids.shape[1] :].tolist()
        return [row[: row.index(stop) + 1] if stop in row else row for row in found]


def _tied(model: nn.Module) -> dict[str, str]:
    """Return further names of parameters that have several: name -> first name."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def _drop_tied(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _tied(model):
        state.pop(prefix + name, None)


def _add_tied(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in _tied(model).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


def keep_tied_once(model: nn.Module) -> None:
    """Let a model's state hold tied weights, such as embedding and output, once."""
    model.register_state_dict_post_hook(_drop_tied)
    model.register_load_state_dict_pre_hook(_add_tied)


class Numbers(NamedTuple):
    """The numbers of a tokenizer that a model is built for."""

    vocabulary: int
    pad: int
    end: int | None = None  # the token that ends an answer
    image: int = -1


def built(name: str, numbers: Numbers, context: int, dropout: float, size: int = 0) -> Any:
    """Build a small model with random weights.

    Args:
        name: name of a model that is built here.
        numbers: numbers of its tokenizer.
        context: maximum number of tokens.
        dropout: dropout probability.
        size: height and width of the pictures in pixels; 0 without pictures.
    """
    try:
        import transformers
    except ImportError as error:
        raise needs_extra(name, "language") from error
    family, width, depth, heads = shape_of(name)
    shared: dict[str, Any] = {
        "vocab_size": numbers.vocabulary,
        "bos_token_id": None,
        "eos_token_id": numbers.end,
        "pad_token_id": numbers.pad,
    }
    if family == "gpt2":
        rates: dict[str, Any] = {f"{where}_pdrop": dropout for where in ("resid", "embd", "attn")}
        gpt = transformers.GPT2Config(n_embd=width, n_layer=depth, n_head=heads, n_positions=context, **shared, **rates)
        return transformers.GPT2LMHeadModel(gpt)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
        "attention_dropout": dropout,
        "tie_word_embeddings": True,
        "initializer_range": 0.8 * width**-0.5,  # the default 0.02 is made for widths of thousands
    }
    if family == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **shared))
    llama = transformers.LlamaConfig(**sizes, **shared)
    if family == "llama" or not size:
        return transformers.LlamaForCausalLM(llama)
    vision = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=VISION_DEPTH,
        num_attention_heads=heads,
        image_size=size,
        patch_size=patch_side(size),
        attention_dropout=dropout,
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision,
            text_config=llama,
            image_token_index=numbers.image,
            image_seq_length=(size // patch_side(size)) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )
