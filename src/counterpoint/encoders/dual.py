"""Load published models of pictures and texts in one space, by their own libraries: CLIP, SigLIP and models alike.

    hf:NAME                     a model of transformers with get_image_features and get_text_features, or its folder
    open_clip:MODEL/WEIGHTS     a model of open_clip with the name of its weights or their file: open_clip:ViT-B-32/openai

    network = build_dual_encoder("hf:openai/clip-vit-base-patch32")
    network.images(pictures)                    # [n, dim] of pictures normalised as in counterpoint.views.images
    network.texts(["a photo of a cat"])         # [1, dim]

Learned vectors replace the words of a template (`text_rows_with_context`), as prompt learning needs:

    context = network.word_rows("a photo of a")             # [4, width]: where such vectors begin
    network.text_rows_with_context(context, ["cat", "dog"])     # [2, dim], the same as texts(["a photo of a cat", ...])

Each network enlarges pictures to its own size, and normalises them by its own statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from counterpoint.core.precision import wide
from counterpoint.encoders.taps import block_names, recorded, token_rows
from counterpoint.errors import CounterpointError, needs_extra, unknown
from counterpoint.words import counted

LIBRARIES = ("hf", "open_clip")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures that arrive
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXTS = 256  # texts that are encoded together


class DualEncoder(nn.Module):
    """A network of pictures and texts. Subclasses write the methods from `image_rows` to `own_ids`.

    Args:
        dim: width of the space.
        scale: factor of cosines in its logits, 1 / temperature.
        size: height and width of its pictures, in pixels.
        mean, std: statistics of each channel by which it normalises pictures.
    """

    fixed: int | None = None  # number of tokens to which it pads all texts; None: to the longest

    def __init__(
        self, dim: int, scale: float, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
    ) -> None:
        super().__init__()
        self.dim, self.scale, self.size = dim, scale, size
        mean_, std_ = torch.tensor(mean), torch.tensor(std)
        # One affine map from the statistics of the pictures that arrive to its own.
        self.register_buffer("factor", (torch.tensor(STD) / std_)[:, None, None], persistent=False)
        self.register_buffer("shift", ((torch.tensor(MEAN) - mean_) / std_)[:, None, None], persistent=False)
        self.factor: Tensor
        self.shift: Tensor

    def image_rows(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n dim"]:
        raise NotImplementedError

    def token_ids(self, texts: list[str], room: int = 0) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"]]:
        """Return token numbers and the mask of tokens. Raises CounterpointError for texts that leave no `room` tokens free."""
        raise NotImplementedError

    def token_embeddings(self, ids: Int[Tensor, "n t"], mask: Bool[Tensor, "n t"]) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of texts from their tokens."""
        raise NotImplementedError

    @property
    def words(self) -> nn.Module:
        """The layer that maps token numbers to vectors."""
        raise NotImplementedError

    @property
    def tower(self) -> nn.Module:
        """The image encoder."""
        raise NotImplementedError

    def own_ids(self, text: str) -> list[int]:
        """Return the token numbers of a text without special tokens."""
        raise NotImplementedError

    def text_rows(self, texts: list[str], cut: bool = False) -> Float[Tensor, "n dim"]:
        # With less than no room, no text is too long; tokenizers cut at the context.
        return self.token_embeddings(*self.token_ids(texts, -(2**20) if cut else 0))

    def images(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of normalised pictures of any size. They are not normalised."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return wide(self.image_rows(images * self.factor + self.shift))

    def texts(self, texts: Sequence[str], *, cut: bool = False) -> Float[Tensor, "n dim"]:
        """Compute the embeddings of texts, not normalised.

        Args:
            texts: the texts.
            cut: cut texts that are longer than the context. Default: raise CounterpointError for them.
        """
        rows = [self.text_rows(list(texts[at : at + TEXTS]), cut).float() for at in range(0, len(texts), TEXTS)]
        return torch.cat(rows)

    # --- learned context

    @property
    def width(self) -> int:
        """Width of the vectors of tokens."""
        weight: Any = self.words.weight
        return int(weight.shape[1])

    @functools.cached_property
    def start(self) -> int:
        """Number of special tokens before a text's own ones."""
        return self.token_ids(["a"])[0][0].tolist().index(self.own_ids("a")[0])

    def word_rows(self, text: str) -> Float[Tensor, "m width"]:
        """Return the vectors of a text's own tokens, which a learned context may begin with."""
        weight: Any = self.words.weight
        return weight.detach()[self.own_ids(text)].float()

    def text_rows_with_context(
        self, context: Float[Tensor, "*prompts m width"], texts: Sequence[str], chunk: int = TEXTS
    ) -> Float[Tensor, "*prompts n dim"]:
        """Compute the embeddings of texts behind context vectors: [start, context, the text's tokens, the rest].

        Args:
            context: [m, width] vectors, or [prompts, m, width] for several contexts of every text.
            texts: n texts, such as names of classes.
            chunk: texts that are encoded together, at least 1; the others are computed once more in the backward pass, so
                that memory grows with `chunk` alone. By default 256.

        The gradient reaches the context. Where the context is `word_rows(words)`, the result is that of the whole text. Raises
        CounterpointError for texts that, with the context, are longer than the network reads.
        """
        if context.ndim not in (2, 3) or context.shape[-1] != self.width:
            raise ValueError(
                f"context must be [m, {self.width}] or [prompts, m, {self.width}], got {list(context.shape)}"
            )
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        several = context if context.ndim == 3 else context[None]
        m, n = several.shape[1], len(texts)
        ids, mask = self.token_ids(list(texts), m)
        start = self.start
        # The hook replaces the vectors of the inserted tokens: the number of any word serves.
        ids, mask = _inserted(ids, start, m, self.own_ids("a")[0]), _inserted(mask, start, m, True)
        ids, mask = ids[:, : self.fixed], mask[:, : self.fixed]

        def rows(vectors: Tensor, at: Tensor) -> Tensor:
            with self._injected(vectors, start):
                return self.token_embeddings(ids[at], mask[at]).float()

        found, total = [], len(several) * n
        for first in range(0, total, chunk):
            numbers = torch.arange(first, min(first + chunk, total))
            vectors = several[(numbers // n).to(several.device)]
            if total > chunk and torch.is_grad_enabled() and context.requires_grad:
                found.append(checkpoint(rows, vectors, numbers % n, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(rows(vectors, numbers % n))
        whole = torch.cat(found).unflatten(0, (len(several), n))
        return whole if context.ndim == 3 else whole[0]

    @contextmanager
    def _injected(self, vectors: Float[Tensor, "n m width"], first: int) -> Iterator[None]:
        """Replace the vectors of the m tokens from position `first` on."""
        after = first + vectors.shape[1]

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :first], vectors.to(output.dtype), output[:, after:]], 1)

        handle = self.words.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    # --- layers of the image encoder

    def layers(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "n dim"], list[Float[Tensor, "n t v"]]]:
        """Compute the embeddings of normalised pictures and the tokens of each block of the image encoder.

        A feature map's places are its tokens; a vector is one token.
        """
        tower = self.tower
        names = block_names(tower)
        with recorded(tower, names) as seen:
            rows = self.images(images)
        return rows, [token_rows(seen[name], tower.get_submodule(name)) for name in names]


def _inserted(values: Tensor, at: int, count: int, value: Any) -> Tensor:
    """Insert `count` columns of a value at a position."""
    return torch.cat([values[:, :at], values.new_full((len(values), count), value), values[:, at:]], 1)


def need_short(name: str, texts: Sequence[str], lengths: Sequence[int], context: int, room: int = 0) -> None:
    """Raise CounterpointError for texts that, with `room` more tokens, are longer than a network's context."""
    if room >= context:
        raise CounterpointError(
            f"{name} reads {context} tokens, and a learned context of {room} leaves none for a text; shorten the context"
        )
    long = [text for text, length in zip(texts, lengths, strict=True) if length + room > context]
    if long:
        beside = f" beside the {room} of the context" if room else ""
        raise CounterpointError(
            f"{name} reads {context - room} tokens{beside}, and {counted(len(long), 'text is', 'texts are')} longer, such as "
            f"'{long[0][:80]}'; shorten names of classes, descriptions or the template. A network of longer texts helps, too (for "
            "a run: --context)"
        )


class _Transformers(DualEncoder):
    """A model of transformers."""

    def __init__(self, name: str, model: Any, tokenizer: Any, processor: Any) -> None:
        config = model.config
        vision, text = config.vision_config, config.text_config
        width = getattr(config, "projection_dim", None) or getattr(text, "projection_size", None) or text.hidden_size
        scale = getattr(model, "logit_scale", None)
        super().__init__(
            int(width),
            float(scale.detach().exp()) if scale is not None else 100.0,
            int(vision.image_size),
            getattr(processor, "image_mean", None) or CLIP_MEAN,
            getattr(processor, "image_std", None) or CLIP_STD,
        )
        # transformers 5 keeps the type of the file: widen half-precision weights.
        self.name, self.model, self.tokenizer = name, model.float(), tokenizer
        self.context = int(getattr(text, "max_position_embeddings", 77))
        self.fixed = self.context if "siglip" in str(config.model_type) else None
        self.padding = "max_length" if self.fixed else True
        self.masked = True  # whether its tokenizer gives a mask

    @staticmethod
    def _rows(found: Any) -> Tensor:
        # transformers 5 returns an object with the pooled output, transformers 4 a tensor.
        return found if isinstance(found, Tensor) else found.pooler_output

    def image_rows(self, images: Tensor) -> Tensor:
        return self._rows(self.model.get_image_features(pixel_values=images))

    def token_ids(self, texts: list[str], room: int = 0) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([len(ids) for ids in self.tokenizer(texts)["input_ids"]])
        need_short(self.name, texts, lengths.tolist(), self.context, room)
        found = self.tokenizer(
            texts, padding=self.padding, max_length=self.context, truncation=True, return_tensors="pt"
        )
        self.masked = "attention_mask" in found
        ids = found["input_ids"]
        mask = found["attention_mask"].bool() if self.masked else torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(self.factor.device), mask.to(self.factor.device)

    def token_embeddings(self, ids: Tensor, mask: Tensor) -> Tensor:
        more = {"attention_mask": mask.long()} if self.masked else {}
        return self._rows(self.model.get_text_features(input_ids=ids, **more))

    @property
    def words(self) -> nn.Module:
        return word_layer(self.model.text_model)

    @property
    def tower(self) -> nn.Module:
        return self.model.vision_model

    def own_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def word_layer(model: Any) -> nn.Module:
    """Return the layer of word vectors of a text encoder of any library."""
    found = getattr(model, "token_embedding", None) or getattr(model, "embed", None)
    if found is None:
        inner: Any = getattr(model, "transformer", None)
        inner = inner if hasattr(inner, "get_input_embeddings") else getattr(model, "model", model)
        found = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    if not isinstance(found, nn.Module):
        raise CounterpointError(
            f"{type(model).__name__} has no layer of word vectors to learn a context for; name a CLIP"
        )
    return found


class _OpenClip(DualEncoder):
    """A model of open_clip."""

    def __init__(self, name: str, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        size = settings.get("size", 224)
        scale = float(model.logit_scale.detach().exp())
        blank = tokenizer(["a"])
        with torch.no_grad():
            dim = model.eval().encode_text(blank).shape[1]
        super().__init__(
            int(dim),
            scale,
            int(size[0] if isinstance(size, tuple | list) else size),
            settings.get("mean", CLIP_MEAN),
            settings.get("std", CLIP_STD),
        )
        self.name, self.model, self.tokenizer, self.context = name, model.float(), tokenizer, int(blank.shape[1])
        self.fixed = self.context

    def image_rows(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)

    def token_ids(self, texts: list[str], room: int = 0) -> tuple[Tensor, Tensor]:
        # It cuts long texts without a word.
        special = len(self._plain("a", True)) - len(self._plain("a", False))
        lengths = [len(self.own_ids(text)) + special for text in texts]
        need_short(self.name, texts, lengths, self.context, room)
        ids = self.tokenizer(texts).to(self.factor.device)
        return ids, torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]

    def token_embeddings(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.encode_text(ids)

    @property
    def words(self) -> nn.Module:
        return word_layer(getattr(self.model, "text", self.model))

    @property
    def tower(self) -> nn.Module:
        return self.model.visual

    def own_ids(self, text: str) -> list[int]:
        return self._plain(text, False)

    def _plain(self, text: str, special: bool) -> list[int]:
        """Return the token numbers of a text, not padded and not cut, with or without special tokens."""
        if hasattr(self.tokenizer, "encode"):
            return [*([0] if special else []), *self.tokenizer.encode(text), *([0] if special else [])]
        clean = self.tokenizer.clean_fn(text)
        return list(self.tokenizer.tokenizer(clean, add_special_tokens=special)["input_ids"])


@functools.lru_cache(maxsize=1)
def build_dual_encoder(name: str) -> DualEncoder:
    """Load a network of pictures and texts in evaluation mode, without gradients; keep the last one in memory.

    Args:
        name: name from the module's table.

    Raises CounterpointError for an unknown library, a missing extra and weights that cannot be downloaded. Raises it too for a
    model that lacks pictures or texts.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES or not model:
        raise unknown("model of pictures and texts", name, [f"{known}:NAME" for known in LIBRARIES])
    try:
        found = _of_transformers(name, model) if library == "hf" else _of_open_clip(name, model)
    except CounterpointError:
        raise
    except Exception as error:  # each library and its client of the network raise their own kinds
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CounterpointError(
            f"{name} could not be loaded: {said[:300].rstrip('.')}. A model that is not on this machine is downloaded. "
            "If there is no network, name a folder or file with its weights"
        ) from error
    return found.eval().requires_grad_(False)


def _of_transformers(name: str, place: str) -> DualEncoder:
    try:
        import transformers
    except ImportError as error:
        raise needs_extra(name, "language") from error
    model = transformers.AutoModel.from_pretrained(place)
    if not hasattr(model, "get_text_features") or not hasattr(model, "get_image_features"):
        raise CounterpointError(f"{name} does not embed pictures and texts in one space; name a model such as CLIP")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(place)
    except Exception:  # none was saved beside the weights: CLIP's statistics
        processor = None
    return _Transformers(name, model, transformers.AutoTokenizer.from_pretrained(place), processor)


def _of_open_clip(name: str, model: str) -> DualEncoder:
    try:
        import open_clip
    except ImportError as error:
        raise CounterpointError(f"{name} needs open_clip: pip install open_clip_torch") from error
    architecture, _, weights = model.partition("/")
    if not weights:
        raise CounterpointError(f"{name}: name its weights too, such as open_clip:ViT-B-32/openai, or their file")
    network = open_clip.create_model(architecture, pretrained=weights)
    settings = open_clip.get_model_preprocess_cfg(network)
    return _OpenClip(name, network, open_clip.get_tokenizer(architecture), settings)
