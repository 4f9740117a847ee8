"""Build causal language models that read pictures between their words, with a lower half that stays uni-modal.

    Vision            a picture to tokens
    Resampler         the tokens of a picture to a summary and a few media tokens, by learned latents (a Perceiver)
    GatedBlock        cross-attention from a text to media tokens, in front of a decoder layer; its gates begin closed
    TextPool          one learned query that summarises a text from the states of the lower half
    InterleavedModel  all of them around a causal language model of transformers

A text has a token `<image>` for each picture, in order. What belongs to a picture ends with `<|endofchunk|>`:

    <s><image> three seven<|endofchunk|><image> nine one<|endofchunk|>

Parameters have the names of the authors' modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from counterpoint.core.media_attention import gated_cross_attention, learned_query_pool, media_times, perceiver_layer
from counterpoint.encoders.adapters import with_adapters
from counterpoint.encoders.chat_models import ChatModel, Prompt, padded, stacked
from counterpoint.encoders.chat_tokenizers import ChatTokenizer
from counterpoint.encoders.images import build_image_encoder, check_image_encoder
from counterpoint.encoders.maps import feature_map
from counterpoint.encoders.messages import IMAGE
from counterpoint.encoders.text import PAD, train_bpe
from counterpoint.errors import CounterpointError
from counterpoint.words import counted

BEGIN, END = "<s>", "<|endofchunk|>"
TEMPLATE = (
    BEGIN
    + "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}"
    + END
    + "{% else %}"
    "{{ message.content }}{% endif %}{% endfor %}"
)


def interleaved_tokenizer(name: str, texts: Iterable[str], vocabulary: int) -> ChatTokenizer:
    """Return the tokenizer of an interleaved model, with the tokens of pictures and of the end of a part.

    Args:
        name: name of the language model; for hf:NAME the model's own tokenizer gets the tokens.
        texts: texts to learn from, for models built here.
        vocabulary: maximum number of tokens that are learned, at least 270.

    Raises CounterpointError for a model of transformers whose tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not name.startswith("hf:"):
        model = train_bpe((text.replace(IMAGE, " ") for text in texts), vocabulary - 8, lowercase=False).model
        model.add_special_tokens([BEGIN, END, IMAGE])
        fast: Any = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=BEGIN, eos_token=END, pad_token=PAD)
    else:
        try:
            fast = AutoTokenizer.from_pretrained(name.removeprefix("hf:"))
        except Exception as error:  # of transformers and of its HTTP client
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CounterpointError(
                f"{name}: its tokenizer could not be loaded: {said[:200]}; name a folder"
            ) from error
        fast.add_special_tokens({"additional_special_tokens": [IMAGE, END, BEGIN]})
        fast.eos_token = END
        fast.pad_token = fast.pad_token or END
    fast.chat_template = TEMPLATE
    return ChatTokenizer(fast, mark=IMAGE, image=IMAGE)


@dataclass(frozen=True)
class Interleaving:
    """Sizes and choices of the parts around a language model.

    Attributes:
        vision: Name of the picture encoder: patches-P, whose tokens are patches of P pixels, or one of the image encoders.
        pretrained, frozen_vision: Load that encoder's weights; do not train it.
        unimodal: Number of layers without cross-attention; 0 for half of the layers.
        interval: Layers from one gated block to the next.
        heads, dim_head: Heads of all attention to pictures, and their width before compression.
        compress: Factor by which heads and feed-forward layers of gated blocks are narrower.
        media_tokens, depth: Tokens of a picture after the resampler, and its layers.
        embedding: Width of the embeddings that are contrasted.
        immediate: Attend to the latest picture alone.
        mask_padding: The text's summary does not read padding.
        summary: Layer that it reads: "unimodal", of the lower half; "fused", the last, which has seen the pictures.
        language: What trains of the language model: all, an adapter of rank `rank` (lora), or nothing.
        rank: Rank of the adapter.
    """

    vision: str = "patches-4"
    pretrained: bool = False
    frozen_vision: bool = False
    unimodal: int = 0
    interval: int = 1
    heads: int = 8
    dim_head: int = 64
    compress: int = 1
    media_tokens: int = 64
    depth: int = 6
    embedding: int = 512
    immediate: bool = True
    mask_padding: bool = True
    summary: Literal["unimodal", "fused"] = "unimodal"
    language: Literal["trained", "lora", "frozen"] = "trained"
    rank: int = 8


def check_vision(name: str) -> None:
    """Raise CounterpointError for an unknown picture encoder. Runs before data are read."""
    if re.fullmatch(r"patches-[1-9]\d*", name) is None:
        check_image_encoder(name)


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module by name, with underscores, as the functions of `core.media_attention` take them."""
    return {name.replace(".", "_"): value for name, value in module.named_parameters()}


def _feed_forward(width: int, inner: int) -> nn.Sequential:
    linear = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), linear[0], nn.GELU(), linear[1])


class _Attention(nn.Module):
    """Weights of attention; the functions of `core.media_attention` compute it."""

    def __init__(self, width: int, source: int, inner: int, norms: Sequence[str]) -> None:
        super().__init__()
        for name in norms:
            self.add_module(name, nn.LayerNorm(width))
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(source, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)


class GatedBlock(nn.Module):
    """Gated cross-attention to media tokens and a gated feed-forward layer; both gates begin at 0.

    Args:
        width: width of the text's states.
        media_width: width of media tokens.
        heads, dim_head: heads, and their width before compression.
        compress: factor by which heads and the feed-forward layer are narrower.
        immediate: attend to the latest medium alone.
    """

    def __init__(
        self, width: int, media_width: int, heads: int, dim_head: int, compress: int = 1, *, immediate: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.dim_head, self.immediate = heads, dim_head, immediate
        self.attn = _Attention(width, media_width, heads * dim_head // compress, ["norm"])
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = _feed_forward(width, 4 * width // compress)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden: Float[Tensor, "n tokens width"],
        media: Float[Tensor, "n items media_tokens media_width"],
        times: Int[Tensor, "n tokens"],
    ) -> Float[Tensor, "n tokens width"]:
        """Return the states; `times` is the number of media up to each token."""
        return gated_cross_attention(hidden, media, times, _named(self), self.heads, self.immediate, self.dim_head)


class _Perceiver(nn.Module):
    def __init__(self, width: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.attn = _Attention(width, width, heads * dim_head, ["norm_media", "norm_latents"])
        self.ff = _feed_forward(width, 4 * width)


class Resampler(nn.Module):
    """Read the tokens of a medium by learned latents; the first is its summary.

    Args:
        width: width of the tokens.
        latents: number of media tokens, besides the summary.
        depth: number of layers.
        heads, dim_head: heads and their width.
    """

    def __init__(self, width: int, latents: int, depth: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.latents = nn.Parameter(torch.randn(latents + 1, width))
        self.layers = nn.ModuleList(_Perceiver(width, heads, dim_head) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Float[Tensor, "items tokens width"]
    ) -> tuple[Float[Tensor, "items width"], Float[Tensor, "items latents width"]]:
        """Return summaries and media tokens. For a clip, `tokens` are those of all of its frames."""
        x = self.latents.expand(len(tokens), -1, -1)
        for layer in self.layers:
            x = perceiver_layer(tokens, x, _named(layer), self.heads, self.dim_head)
        x = self.norm(x)
        return x[:, 0], x[:, 1:]


class _Gain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class TextPool(_Perceiver):
    """Summarise each text by one learned query."""

    def __init__(self, width: int, heads: int, dim_head: int) -> None:
        super().__init__(width, heads, dim_head)
        self.heads, self.dim_head = heads, dim_head
        self.norm = _Gain(width)
        self.query = nn.Parameter(torch.randn(1, width))

    def forward(
        self, hidden: Float[Tensor, "n tokens width"], mask: Bool[Tensor, "n tokens"] | None
    ) -> Float[Tensor, "n width"]:
        return learned_query_pool(hidden, self.query, _named(self), self.heads, self.dim_head, mask)


class Vision(nn.Module):
    """Encode pictures as tokens.

    Args:
        name: patches-P, or an image encoder that has a feature map.
        size: height and width of the pictures in pixels.
        width: width of the tokens of patches-P.
        pretrained: load the encoder's weights.

    Raises CounterpointError for patches that do not divide the picture.
    """

    def __init__(self, name: str, size: int, width: int, *, pretrained: bool = False) -> None:
        super().__init__()
        self.encoder: Any = None
        self.patch = int(name.removeprefix("patches-")) if name.startswith("patches-") else 0
        if not self.patch:
            self.encoder = build_image_encoder(name, size, pretrained=pretrained)
            with torch.no_grad():
                found = feature_map(self.encoder.eval(), torch.zeros(1, 3, size, size))
            self.encoder.train()
            self.width = int(found.shape[1])
            return
        if size % self.patch:
            raise CounterpointError(f"{name} does not divide pictures of {size} pixels; name a divisor of {size}")
        self.width = width
        self.project = nn.Linear(3 * self.patch**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn((size // self.patch) ** 2, width))

    def forward(self, pictures: UInt8[Tensor, "items size size 3"]) -> Float[Tensor, "items tokens width"]:
        x = pictures.permute(0, 3, 1, 2).to(next(self.parameters()).dtype) / 127.5 - 1
        if self.encoder is not None:
            return feature_map(self.encoder, x).flatten(2).transpose(1, 2)
        patches = nn.functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        return self.project(patches) + self.positions


class InterleavedModel(ChatModel):
    """A causal language model that reads pictures in its upper half, and embeds texts in its lower half.

    Args:
        name: a causal language model: llama-W-D-H, qwen2-W-D-H, gpt2-W-D-H, or hf:NAME.
        tokenizer: of `interleaved_tokenizer`.
        parts: sizes and choices of all other parts.
        size: height and width of the pictures in pixels; 0 without pictures.
        context: maximum number of tokens of a text.
        dropout: dropout probability of models built here.

    Raises CounterpointError for a model that cannot be loaded, and for more uni-modal layers than it has.
    """

    def __init__(
        self,
        name: str,
        tokenizer: ChatTokenizer,
        parts: Interleaving,
        *,
        size: int,
        context: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(name, tokenizer, size=0, context=context, dropout=dropout)
        self.size, self.parts = size, parts
        network = self.network
        if tokenizer.vocabulary > network.get_input_embeddings().num_embeddings:
            network.resize_token_embeddings(tokenizer.vocabulary, mean_resizing=False)
        inner = network.get_decoder() if hasattr(network, "get_decoder") else network.model
        layers: Sequence[nn.Module] = inner.layers if hasattr(inner, "layers") else inner.h
        width = int(network.get_input_embeddings().embedding_dim)
        self.unimodal = parts.unimodal or len(layers) // 2
        if not 0 < self.unimodal < len(layers):
            raise CounterpointError(
                f"{name} has {counted(len(layers), 'layer')}, so unimodal must be 1 to {len(layers) - 1}, got {self.unimodal}"
            )
        heads = parts.heads, parts.dim_head
        self.blocks = nn.ModuleDict()
        if size:
            self.vision = Vision(parts.vision, size, width, pretrained=parts.pretrained)
            self.vision.requires_grad_(not parts.frozen_vision)
            seen = self.vision.width
            self.resampler = Resampler(seen, parts.media_tokens, parts.depth, *heads)
            self.vision_projection = nn.Linear(seen, parts.embedding, bias=False)
            self.pool = TextPool(width, *heads)
            self.text_projection = nn.Linear(width, parts.embedding, bias=False)
            for number in range(self.unimodal, len(layers), parts.interval):
                self.blocks[str(number)] = GatedBlock(width, seen, *heads, parts.compress, immediate=parts.immediate)
        if parts.language != "trained":
            self._fix()
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before(number), with_kwargs=True)
        network.get_output_embeddings().register_forward_pre_hook(self._keep_last)
        self._media: Tensor | None = None
        self._times: Tensor | None = None
        self._states: dict[str, Tensor] = {}

    def _fix(self) -> None:
        """Fix the language model's weights; with "lora" add an adapter to them."""
        self.model.requires_grad_(False)
        if self.parts.language == "lora":
            from peft import LoraConfig

            rank = self.parts.rank
            chosen = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")  # all but the output layer
            self.model = with_adapters(self.model, chosen)

    def _before(self, number: int) -> Callable[..., Any]:
        """Return the hook in front of a decoder layer: keep the lower half's states, or add pictures to them."""

        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            hidden = given[0] if given else named["hidden_states"]
            if number == self.unimodal - 1:
                self._states["unimodal"] = hidden
            if str(number) not in self.blocks:
                return None
            hidden = self.blocks[str(number)](hidden, *self._seen(hidden))
            return ((hidden, *given[1:]), named) if given else (given, named | {"hidden_states": hidden})

        return hook

    def _keep_last(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        self._states["fused"] = given[0]

    def _seen(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return media tokens and the number of media up to each token. New tokens come after all of the prompt's media."""
        n, length = hidden.shape[:2]
        if self._media is None or self._times is None:
            return hidden.new_zeros(n, 0, 1, 1), torch.zeros(n, length, dtype=torch.int64, device=hidden.device)
        new = length - self._times.shape[1]
        last = self._times[:, -1:]
        if new < 0:  # the prompt is in the cache
            return self._media, last.expand(-1, length)
        return self._media, torch.cat([self._times, last.expand(-1, new)], 1)

    @contextmanager
    def _showing(self, media: Tensor | None, times: Tensor | None) -> Iterator[None]:
        self._media, self._times = media, times
        try:
            yield
        finally:
            self._media, self._times, self._states = None, None, {}

    # --- pictures

    def _times_of(self, ids: Tensor, counts: Tensor | None) -> Tensor:
        """Count the pictures up to each token. CounterpointError where a text has more or fewer marks than pictures."""
        marks = ids == self.tokenizer.image_id
        wanted = torch.zeros_like(ids[:, 0]) if counts is None else counts
        wrong = (marks.sum(1) != wanted).nonzero().flatten().tolist()
        if wrong:
            n = wrong[0]
            raise CounterpointError(
                f"text {n} has {counted(int(marks[n].sum()), 'mark')} {IMAGE} and {counted(int(wanted[n]), 'picture')}; give one "
                "picture for each mark"
            )
        return media_times(marks)

    def read_pictures(
        self, pictures: UInt8[Tensor, "n most size size 3"], counts: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n most latents width"]]:
        """Return the mean summary of the pictures of each text, 0 without any, and their media tokens."""
        shown = torch.arange(pictures.shape[1], device=counts.device) < counts[:, None]
        summaries, media = self.resampler(self.vision(pictures[shown]))
        found = media.new_zeros(*shown.shape, *media.shape[1:])
        found[shown] = media
        whole = summaries.new_zeros(*shown.shape, summaries.shape[1])
        whole[shown] = summaries
        return whole.sum(1) / counts.clamp(min=1)[:, None], found

    # --- texts

    def forward(  # type: ignore[override]
        self,
        ids: Int[Tensor, "n tokens"],
        mask: Bool[Tensor, "n tokens"],
        pictures: UInt8[Tensor, "n most size size 3"] | None = None,
        counts: Int[Tensor, " n"] | None = None,
        *,
        embed: bool = False,
        **more: Any,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Compute the logits of the next token at each position.

        Args:
            ids: token numbers, with one mark `<image>` for each picture.
            mask: True at tokens, False at padding.
            pictures: RGB pixels; those after a text's last picture are not used.
            counts: number of pictures of each text.
            embed: also return the embeddings of pictures and texts, [n, embedding] each.
            more: further arguments of the language model.

        Texts without pictures skip the picture encoder. Raises CounterpointError for a mark without a picture and the reverse.
        """
        times = self._times_of(ids, counts)
        media, summary = None, None
        if pictures is not None and counts is not None and bool(counts.any()):
            summary, media = self.read_pictures(pictures, counts)
        with self._showing(media, times):
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **more).logits
            states = self._states[self.parts.summary]
        if not embed:
            return logits
        if summary is None:
            raise CounterpointError("texts without pictures have no embedding of pictures; leave out embed")
        return logits, self.vision_projection(summary), self._embedded(states, mask)

    def _embedded(self, states: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.text_projection(self.pool(states, mask if self.parts.mask_padding else None))
        return found

    def embed_pictures(self, pictures: UInt8[Tensor, "n most size size 3"], counts: Int[Tensor, " n"]) -> Tensor:
        """Return the embeddings [n, embedding] of the pictures of each text alone."""
        found: Tensor = self.vision_projection(self.read_pictures(pictures, counts)[0])
        return found

    def embed_texts(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Tensor:
        """Return the embeddings [n, embedding] of texts alone, whose marks stand for pictures that are not shown."""
        with self._showing(None, None):
            self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            states = self._states[self.parts.summary]
        return self._embedded(states, mask)

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
        """Continue prompts, as `ChatModel.generate` does. New tokens attend to the pictures of the prompt.

        `disturb` changes pixels in -1..1. One pass reads all prompts, also those `apart`. Raises CounterpointError for a mark
        without a picture and the reverse.
        """
        rows = [self.tokenizer.prompt(prompt.messages) for prompt in prompts]
        ids = padded(rows, self.tokenizer.pad, left=True)[0].to(self.device)
        counts = torch.tensor([len(prompt.pictures) for prompt in prompts], device=self.device)
        times, media = self._times_of(ids, counts), None
        if bool(counts.any()):
            flat = torch.from_numpy(np.stack([picture for prompt in prompts for picture in prompt.pictures]))
            flat = flat.to(self.device)
            if disturb is not None:
                values = disturb({"pixel_values": flat.permute(0, 3, 1, 2).float() / 127.5 - 1})["pixel_values"]
                flat = ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            media = self.read_pictures(stacked(flat, counts), counts)[1]
        texts = [Prompt(prompt.messages) for prompt in prompts]
        with self._showing(media, times):
            return super().generate(texts, new_tokens, processor=processor, **more)
