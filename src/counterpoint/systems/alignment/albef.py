"""ALBEF: image and text are aligned by a momentum contrast before a fusion encoder reads both, and learn from a slow copy.

Li, Selvaraju, Gotmare, Joty, Xiong, Hoi: "Align before Fuse: Vision and Language Representation Learning with Momentum
Distillation", NeurIPS 2021, arXiv 2107.07651.

Three networks: an image transformer, the lower layers of a BERT for text, and its upper layers with cross-attention to the
image's tokens (fusion). Three losses, added with weight 1: ITC contrasts the two uni-modal embeddings with queues of keys
of the momentum copy; ITM asks the fusion encoder whether image and text belong together, with negatives drawn by ITC's own
similarity; MLM predicts masked words from text and image. Captions of the web are noisy, so targets of ITC and MLM are
mixed with what the momentum copy of the networks says (`alpha`).

Here are pre-training, fine-tuning for retrieval as far as its loss goes (`same_text`), re-ranking by ITM, Grad-CAM of words
in the picture, and reading of the authors' checkpoints. Departures: a clean warm-up and cosine in place of the code's
schedule, which jumps; ITC's in-batch keys are those of all processes, so that its value does not depend on their number
(ITM's negatives come from the own process, as in the code); the temperature is bounded in retrieval too.

Not here: the heads of VQA, SNLI-VE and NLVR2, RandAugment (of the paper's views the crops and flips are here), RefCOCO+.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.memory import Queue
from counterpoint.core.operands import class_similarity, positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.teacher import EMATeacher
from counterpoint.core.transforms import holds, need_fixed, once
from counterpoint.core.weights import read_weights
from counterpoint.core.world import over_group
from counterpoint.data.images import Indices
from counterpoint.data.shown import png
from counterpoint.encoders.images import VisionTokens
from counterpoint.encoders.text import PretrainedText, Tokenizer
from counterpoint.engine.survey import BATCH, Survey
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner, first_two, taken, there
from counterpoint.tasks.measures import retrieval
from counterpoint.views.images import normalise

NOBODY = -100  # the identity of a queue's slot that nothing was written to
IGNORED = -100  # the label of a token that is not to be predicted
TEMPERATURES = (0.001, 0.5)  # what the temperature is kept within
PAIRS = 256  # pairs that re-ranking fuses at a time
RERANKED = 1000  # test items that are re-ranked, at most
DRAWN = 4  # test pairs whose words are shown in the picture


def _unit(x: Tensor) -> Tensor:
    return unit(x)


# ---------------------------------------------------------------------------------------------------- momentum contrast


@over_group
@full_precision(keep=("image_queue", "text_queue"))
def momentum_contrast_soft(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    image_emb_m: Float[Tensor, "n dim"],
    text_emb_m: Float[Tensor, "n dim"],
    image_queue: Float[Tensor, "dim queue"],
    text_queue: Float[Tensor, "dim queue"],
    temperature: float | Float[Tensor, ""],
    alpha: float,
    idx: Int[Tensor, " n"] | None = None,
    idx_queue: Int[Tensor, " queue"] | None = None,
) -> Float[Tensor, ""]:
    r"""ITC with momentum distillation (Eq. 6): the mean of image-to-text and text-to-image.

    With A_t = [g_t ; text queue], the student's s = f_v A_t^T / tau and the teacher's q = g_v A_t^T / tau, image to text
    is mean_b -sum_j y_bj log softmax(s)_bj, y = alpha softmax(q) + (1 - alpha) Y; Y has a 1 at the row's own pair or, with
    `idx`, equal shares at all keys of the row's identity. Text to image likewise.

    Args:
        image_emb, text_emb: the student's, row by row pairs; normalised here.
        image_emb_m, text_emb_m: the momentum copy's (g); normalised here, no gradient.
        image_queue, text_queue: older keys of the copy in unit columns, as the authors store them; may be empty.
        temperature: tau, a divisor > 0, a number or a learnable scalar (the teacher's similarities give it no gradient).
        alpha: 0 (hard targets, the copy makes keys only) to 1.
        idx, idx_queue: identities of the pairs and of the queue's slots, for several captions of an image; -100 marks a slot
            that is nobody's. Both or neither.

    Memory is linear in n + queue: similarities are gone through in blocks of rows of at most 2^23 numbers (or one row).
    Across processes the in-batch keys are everybody's. Raises ValueError for shapes that do not fit, an empty batch, an
    alpha or temperature outside its range. Differentiating twice raises RuntimeError, but for alpha 0.
    Source: models/model_pretrain.py and model_retrieval.py of the authors' code.

    >>> x = torch.ones(4, 3)
    >>> momentum_contrast_soft(x, x, x, x, torch.ones(3, 4) / 3**0.5, torch.ones(3, 4) / 3**0.5, 0.07, 0.4)   # log(4 + 4)
    tensor(2.0794)
    """
    need_alike("n dim", image_emb=image_emb, text_emb=text_emb, image_emb_m=image_emb_m, text_emb_m=text_emb_m)
    for name, queue in (("image_queue", image_queue), ("text_queue", text_queue)):
        if queue.ndim != 2 or len(queue) != image_emb.shape[1]:
            raise ValueError(f"{name} must be [dim, queue], got {shapes(image_emb=image_emb, **{name: queue})}")
    need_within(0, 1, alpha=alpha)
    need_positive(temperature=temperature)
    if (idx is None) != (idx_queue is None):
        raise ValueError("idx and idx_queue go together: give both or neither")
    ids = None
    if idx is not None and idx_queue is not None:
        if idx.shape != image_emb.shape[:1] or idx_queue.shape != image_queue.shape[1:]:
            raise ValueError(
                "idx and idx_queue must be a number for each row and each column of the queues, got "
                + shapes(idx=idx, idx_queue=idx_queue)
            )
        if holds((idx == NOBODY).any()):
            raise ValueError(f"idx holds {NOBODY}, which marks a slot that is nobody's")
        ids = idx, torch.cat([gather_rows(idx), idx_queue])
    f_v, f_t = _unit(image_emb), _unit(text_emb)
    g_v, g_t = _unit(image_emb_m.detach()).to(f_v.dtype), _unit(text_emb_m.detach()).to(f_v.dtype)
    to_text = _direction(f_v, g_v, g_t, text_queue, temperature, alpha, ids)
    to_image = _direction(f_t, g_t, g_v, image_queue, temperature, alpha, ids)
    return (global_mean(to_text) + global_mean(to_image)) / 2


def _direction(
    query: Tensor,
    teacher: Tensor,
    own: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    alpha: float,
    ids: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The cross-entropy of each row."""
    mine, older = gather_rows(own), queue.detach().to(own.dtype)
    # Copied as the queue lies in memory, in columns or in rows: turning it round takes as long as a product with it.
    key = torch.cat([mine.T, older], 1).T if older.is_contiguous() else torch.cat([mine, older.T])
    q = scaled(query, temperature)
    if ids is None:
        positive = positive_similarity(q, own)
    else:
        total, count = class_similarity(q, key, *ids)
        positive = total / count  # the row's own pair is among them
    if alpha == 0:
        return pair_logsumexp(q, key).rows - positive
    taught = scaled(teacher, temperature.detach() if isinstance(temperature, Tensor) else temperature)
    soft = pair_cross_entropy(once(q, "momentum_contrast_soft"), key, taught, key, share=alpha, entropy=False).rows
    return soft - (1 - alpha) * positive


class HardNegativeWeights(NamedTuple):
    """Row b: weights for drawing an image for text b, and a text for image b; 0 where it may not be drawn."""

    image_weights: Float[Tensor, "n n"]
    text_weights: Float[Tensor, "n n"]


@full_precision
@torch.no_grad()
def hard_negative_weights(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    text_key: Float[Tensor, "n dim"],
    image_key: Float[Tensor, "n dim"],
    temperature: float | Float[Tensor, ""],
    idx: Int[Tensor, " n"] | None = None,
) -> HardNegativeWeights:
    """How likely ITM draws each in-batch negative (Sec. 3.2): the softmax of ITC's similarities, 0 for what is no negative.

    Args:
        image_emb, text_emb: the student's; normalised here.
        text_key, image_key: the momentum copy's of the same pairs; normalised here.
        temperature: divisor, > 0.
        idx: identities; pairs of one identity are no negatives of each other. None: every pair is its own.

    Rows do not sum to 1, as what is no negative is set to 0 after the softmax. A row that underflows there (a peaked softmax
    leaves no other pair a probability) gets the softmax over its negatives alone, which has the same proportions. The
    authors' repair, 1e-4 on the logits, changes nothing; BLIP's, 1e-4 on the probabilities, draws from another distribution.
    No gradient. Raises ValueError for shapes that do not fit, numbers that are not finite, and where a row has no negative:
    one pair, or pairs of one identity only.

    >>> x = torch.eye(2)
    >>> hard_negative_weights(x, x, x, x, 1.0).text_weights
    tensor([[0.0000, 0.2689],
            [0.2689, 0.0000]])
    """
    need_alike("n dim", image_emb=image_emb, text_emb=text_emb, text_key=text_key, image_key=image_key)
    need_positive(temperature=temperature)
    n = len(image_emb)
    if idx is not None and idx.shape != (n,):
        raise ValueError(f"idx must be a number for each row, got {shapes(image_emb=image_emb, idx=idx)}")
    if n < 2:
        raise ValueError("image_emb is one row: a hard negative needs another pair in the batch")
    forbidden = torch.eye(n, dtype=torch.bool, device=image_emb.device) if idx is None else idx[:, None] == idx
    if holds(forbidden.all()):
        raise ValueError("idx holds one identity only: there is no negative in the batch")

    def weights(names: str, query: Tensor, key: Tensor) -> Tensor:
        logits = scaled(_unit(query), temperature) @ _unit(key).to(wide(query).dtype).T
        if holds(~logits.isfinite().all()):
            raise ValueError(f"{names} hold numbers that are not finite")
        found = logits.softmax(1).masked_fill(forbidden, 0.0)
        among = logits.masked_fill(forbidden, -torch.inf).softmax(1)
        # Below this the weights are subnormal and have lost their proportions.
        info = torch.finfo(found.dtype)
        return torch.where(found.sum(1, keepdim=True) < info.tiny / info.eps, among, found)

    return HardNegativeWeights(
        weights("text_emb and image_key", text_emb, image_key), weights("image_emb and text_key", image_emb, text_key)
    )


# --------------------------------------------------------------------------------------------------------- masked words


class MaskedTokens(NamedTuple):
    ids: Int[Tensor, "n tokens"]
    labels: Int[Tensor, "n tokens"]


def mask_tokens(
    ids: Int[Tensor, "n tokens"],
    maskable: Bool[Tensor, "n tokens"],
    mask_token: int,
    vocabulary: int,
    probability: float = 0.15,
    *,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """BERT's masking: of the tokens chosen 80 % become the mask token, 10 % a random one, 10 % stay.

    Args:
        ids: token numbers; left as they are.
        maskable: which may be chosen. ALBEF's are all but padding and the first token; the last one may be.
        mask_token: number of the mask token.
        vocabulary: random tokens are drawn from 0..vocabulary - 1.
        probability: of each to be chosen.
        generator: what to draw with, on the CPU; None: the default one.

    Returns new numbers and labels: the old number where a token was chosen, -100 elsewhere. Raises ValueError for shapes
    that differ and a probability outside 0..1.

    >>> mask_tokens(torch.tensor([[7, 8]]), torch.tensor([[False, False]]), 3, 10, 1.0).labels
    tensor([[-100, -100]])
    """
    if ids.shape != maskable.shape or maskable.dtype != torch.bool:
        raise ValueError(f"maskable must be bool of ids' shape, got {shapes(ids=ids, maskable=maskable)}")
    need_within(0, 1, probability=probability)
    need_positive(vocabulary=vocabulary)

    def uniform() -> Tensor:
        return torch.rand(ids.shape, generator=generator).to(ids.device)

    chosen = (uniform() < probability) & maskable
    what = uniform()
    random = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.device)
    new = torch.where(chosen & (what < 0.8), mask_token, ids)
    new = torch.where(chosen & (what >= 0.9), random, new)
    return MaskedTokens(new, torch.where(chosen, ids, IGNORED))


@over_group
@full_precision
def mlm_distill(
    logits: Float[Tensor, "*places vocabulary"],
    logits_m: Float[Tensor, "*places vocabulary"],
    labels: Int[Tensor, "*places"],
    alpha: float,
) -> Float[Tensor, ""]:
    """Masked language modelling with momentum distillation (Eq. 7): (1 - alpha) CE + alpha KD, means over masked places.

    CE is -log softmax(logits)[label], KD is -sum_v softmax(logits_m)_v log softmax(logits)_v.

    Args:
        logits: the student's; logits_m: the momentum copy's on the same masked text, no gradient.
        labels: -100 where nothing is to be predicted.
        alpha: 0..1.

    No masked place: 0, with a gradient of 0. Across processes the mean is over everybody's places. Raises ValueError for
    shapes that do not fit, labels that are no token, an alpha outside 0..1.

    >>> mlm_distill(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[1, -100]]), 0.4)   # log 4
    tensor(1.3863)
    """
    if logits.shape != logits_m.shape or logits.shape[:-1] != labels.shape or logits.ndim < 1:
        raise ValueError(
            "logits and logits_m must be [..., vocabulary] alike and labels [...], got "
            + shapes(logits=logits, logits_m=logits_m, labels=labels)
        )
    need_within(0, 1, alpha=alpha)
    need_fixed("mlm_distill", labels=labels)
    where = labels != IGNORED
    targets = labels[where]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise ValueError(
            f"labels must be {IGNORED} or lie in 0..{logits.shape[-1] - 1}, got {int(targets.min())}..{int(targets.max())}"
        )
    log_p = wide(logits[where]).log_softmax(-1)
    taught = wide(logits_m[where].detach()).softmax(-1).to(log_p.dtype)
    hard = log_p.gather(-1, targets[:, None]).squeeze(-1)
    return global_mean(-(1 - alpha) * hard - alpha * (taught * log_p).sum(-1))


# ------------------------------------------------------------------------------------------- text and fusion transformers


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
        """`mask` is False where a key is not there; the probabilities [n, heads, tokens, keys] are appended to `kept`."""
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
    """A layer of BERT, LayerNorm after each part; with `image`, the width of image tokens, also cross-attention to them."""

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
        mask: Bool[Tensor, "n tokens"],
        image: Float[Tensor, "n patches image"] | None = None,
        kept: list[Tensor] | None = None,
    ) -> Float[Tensor, "n tokens width"]:
        x = self.attention(x, x, mask)
        if image is not None:
            x = self.crossattention(x, image, None, kept)
        return self.norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class Embeddings(nn.Module):
    """Words, positions and BERT's type of segment (always the first), summed and normalised."""

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
    """The lower layers of a BERT; its vector of a text is that of the first token."""

    def __init__(self, size: TextSize, lower: int) -> None:
        super().__init__()
        self.dim, self.length, self.vocabulary = size.width, size.length, size.vocabulary
        self.embeddings = Embeddings(size.vocabulary, size.length, size.width, size.dropout)
        self.layers = nn.ModuleList(Layer(size.width, size.heads, size.hidden, size.dropout) for _ in range(lower))
        self.apply(_bert_start)

    def tokens(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n tokens width"]:
        """Every token's state. A text without tokens attends to its first padding."""
        if ids.shape[1] > self.length:
            raise CounterpointError(f"texts of {ids.shape[1]} tokens are longer than the encoder's {self.length}")
        x, mask = self.embeddings(ids), _never_empty(mask)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def forward(self, ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Float[Tensor, "n width"]:
        return self.tokens(ids, mask)[:, 0]


class Fusion(nn.Module):
    """The upper layers, with cross-attention to image tokens, and BERT's head for masked words if it is wanted."""

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
        """Text states that have read the image; cross-attention of every layer goes to `kept`."""
        mask = _never_empty(mask)
        for layer in self.layers:
            text = layer(text, mask, image, kept)
        return text

    def words(
        self, states: Float[Tensor, "m width"], embedding: Float[Tensor, "vocabulary width"]
    ) -> Float[Tensor, "m vocabulary"]:
        """Logits of the word at each state; the last map is the embedding of words, as in BERT."""
        return F.linear(self.norm(F.gelu(self.dense(states))), embedding, self.bias)


@dataclass(frozen=True)
class TextSize:
    """Measures of a BERT."""

    vocabulary: int
    length: int
    width: int
    depth: int
    heads: int
    hidden: int
    dropout: float


def _never_empty(mask: Tensor) -> Tensor:
    """A row of attention without any key is NaN: the first one is always there."""
    return mask | (torch.arange(mask.shape[1], device=mask.device) == 0)


def _bert_start(module: nn.Module) -> None:
    """BERT's 0.02 is for a width of 768; in a narrow one the first token would hear next to nothing of the others."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 * (768 / module.weight.shape[1]) ** 0.5)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


# Names of BERT's weights (transformers', and so the authors') and ours, in the order in which they are tried.
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


def _bert_name(name: str, lower: int) -> tuple[bool, str]:
    """(whether it is one of the fusion encoder's, our name) of a weight of a BERT whose first `lower` layers are the text's."""
    for old, new in _BERT_NAMES:
        name = re.sub(old, new, name)
    found = re.match(r"layers\.(\d+)\.(.*)", name)
    if not found or int(found[1]) < lower:
        return False, name
    return True, f"layers.{int(found[1]) - lower}.{found[2]}"


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class ALBEFConfig(AlignedConfig):
    """Settings of ALBEF. Defaults are the paper's for pre-training; its rate falls to a tenth, ours to 0."""

    epochs: int = 30
    batch_size: int = 512
    image_encoder: str = "timm:deit_base_patch16_224"
    text_encoder: str = "hf:bert-base-uncased"
    pretrained: bool = True
    embedding: int = 256
    context: int = 25
    recipe: str = "mae"
    optimizer: str = "adamw"
    lr: float = 1e-4 * 256 / 512
    weight_decay: float = 0.02
    warmup_epochs: int = 1
    alpha: float = 0.4
    """How much the momentum copy's soft targets count; 0 is plain ITC and MLM."""
    alpha_ramp: float = 1.0
    """Epochs over which alpha rises from 0; 0: it is whole from the first step."""
    momentum_teacher: float = 0.995
    """How much of the momentum copy stays at each step."""
    queue: int = 65536
    """Keys of earlier batches that ITC contrasts with; a multiple of batch_size."""
    temperature: float = 0.07
    """Where the learnt temperature starts; it stays within 0.001 and 0.5."""
    mlm_probability: float = 0.15
    """Share of a text's tokens that are masked."""
    fusion_layers: int = 6
    """How many of the text transformer's layers, the upper ones, read the image."""
    depth: int = 12
    """Layers of the text transformer, fusion included, where it is trained from scratch (text-s)."""
    width: int = 768
    """Its width."""
    heads: int = 12
    """Its heads of attention."""
    dropout: float = 0.1
    """Dropout in text transformer and fusion."""
    use_itc: bool = True
    """Contrast embeddings of image and text."""
    use_itm: bool = True
    """Tell pairs that belong together from pairs that do not, by the fusion encoder."""
    use_mlm: bool = True
    """Predict masked words from text and image."""
    hard_negatives: bool = True
    """Draw ITM's negatives by ITC's similarity; off, or without ITC, all are as likely."""
    same_text: bool = False
    """Items with the very same words count as one, in ITC's targets and ITM's negatives (the paper's retrieval loss)."""
    rerank: int = 128
    """Candidates of each query that ITM's score re-ranks when retrieval is measured; 0: none."""
    checkpoint: str = ""
    """Weights to start from: a file of the authors' code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "momentum_teacher", "mlm_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise CounterpointError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise CounterpointError(f"dropout must lie in 0..1, 1 not included, got {self.dropout}")
        if self.alpha_ramp < 0 or self.rerank < 0:
            raise CounterpointError(
                f"alpha_ramp and rerank must not be negative, got {self.alpha_ramp} and {self.rerank}"
            )
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            raise CounterpointError(f"temperature must lie in {low}..{high}, got {self.temperature}")
        if not (self.use_itc or self.use_itm or self.use_mlm):
            raise CounterpointError("use_itc, use_itm and use_mlm are all off: there is nothing to learn from")
        if self.queue < 1 or self.queue % self.batch_size:
            near = max(1, round(self.queue / self.batch_size)) * self.batch_size
            raise CounterpointError(
                f"the queue ({self.queue}) must be a multiple of the batch ({self.batch_size}); --queue {near} is one"
            )
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise CounterpointError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if not self.fusion_layers >= 1:
            raise CounterpointError(f"fusion_layers must be at least 1, got {self.fusion_layers}")

    @property
    def fuses(self) -> bool:
        return self.use_itm or self.use_mlm


class Seen(NamedTuple):
    """What an encoder makes of a modality: the vector, and the tokens where something is to be fused."""

    vector: Float[Tensor, "n dim"]
    tokens: Float[Tensor, "n tokens dim"] | None = None


class ALBEF(AlignedLearner):
    """Image encoder, text encoder, fusion encoder, their momentum copy and two queues of its keys.

    Without ITM and MLM nothing is fused, and any two modalities will do, vectors for instance.
    """

    queue_ids: Int[Tensor, " queue"]
    student: nn.ModuleDict
    _size: TextSize
    _lower: int  # layers of the text transformer that do not read the image
    _published: Mapping[str, Tensor] | None = None  # a BERT's weights, between making its lower and its upper layers

    def __init__(self, config: ALBEFConfig, data: Any, seed: int = 0) -> None:
        kinds = {name: spec["kind"] for name, spec in data.modalities.items()}
        image, text = _sides(config, kinds)
        super().__init__(config, data, seed)
        self.image, self.text = image, text
        encoder: Any = self.encoders[self.image]
        networks: dict[str, nn.Module] = {"encoders": self.encoders, "heads": self.heads}
        if config.fuses:
            if not isinstance(encoder, VisionTokens) or encoder.prefix < 1:
                raise CounterpointError(
                    f"image_encoder {config.image_encoder} has no tokens that a fusion encoder could read, with a class "
                    "token before them: use vit-s or a vision transformer of timm (timm:deit_tiny_patch16_224), or switch "
                    "use_itm and use_mlm off"
                )
            self.fusion = Fusion(self._size, config.fusion_layers, encoder.dim, config.use_mlm)
            upper = {name: value for (above, name), value in self._named_published() if above}
            self.fusion.load_state_dict(upper, strict=False)
            networks["fusion"] = self.fusion
            if config.use_itm:
                self.itm_head = nn.Linear(self._size.width, 2)
        self._published = None
        self.tokenizer = Tokenizer.from_json(data.tokenizers[self.text]) if kinds[self.text] == "text" else None
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)), requires_grad=config.use_itc)
        if not config.use_itc:
            self.heads.requires_grad_(False)
        # A view of what is registered already, not a module of its own.
        self.__dict__["student"] = nn.ModuleDict(networks)
        self.teacher = EMATeacher(self.student)
        generator = torch.Generator().manual_seed(seed)
        self.queues = nn.ModuleDict(
            {name: Queue(config.queue, config.embedding, seed=generator) for name in (self.image, self.text)}
        )
        self.register_buffer("queue_ids", torch.full((config.queue if config.same_text else 0,), NOBODY))
        self.steps_per_epoch = 0
        self.collected: list[dict[str, Tensor]] = []
        self.passed = 0

    # --- networks

    def build_head(self, dim: int) -> nn.Module:
        return nn.Linear(dim, self.config.embedding)

    def build_encoder(self, spec: Mapping[str, Any], tokenizer: str | None) -> nn.Module:
        if spec["kind"] != "text":
            return super().build_encoder(spec, tokenizer)
        assert tokenizer is not None
        config = self.config
        words = Tokenizer.from_json(tokenizer)
        special = (words.model.token_to_id(name) for name in ("[MASK]", "<mask>"))
        found = next((number for number in special if number is not None), None)
        if config.text_encoder == "text-s":
            # A vocabulary without a mask token gets one after its last.
            vocabulary = words.vocabulary + (found is None)
            size = TextSize(
                vocabulary, config.context, config.width, config.depth, config.heads, 4 * config.width, config.dropout
            )
        else:
            published: Any = super().build_encoder(spec, tokenizer)
            size = _published_size(published, config)
            self._published = published.model.state_dict()
            if found is None:
                raise CounterpointError(f"the tokenizer of {config.text_encoder} has no [MASK], which MLM needs")
        if config.context > size.length:
            raise CounterpointError(
                f"{config.text_encoder} reads {size.length} tokens, fewer than context {config.context}"
            )
        if config.fuses and config.fusion_layers >= size.depth:
            raise CounterpointError(
                f"fusion_layers ({config.fusion_layers}) must leave layers to the text encoder, of {size.depth} altogether"
            )
        self.mask_token = words.vocabulary if found is None else found
        self._size = size
        self._lower = size.depth - (config.fusion_layers if config.fuses else 0)
        encoder = TextEncoder(size, self._lower)
        lower = {name: value for (above, name), value in self._named_published() if not above}
        if lower:
            odd = encoder.load_state_dict(lower, strict=False)
            if odd.missing_keys:
                raise CounterpointError(f"{config.text_encoder} is no BERT: it lacks {odd.missing_keys[0]}")
        return encoder

    def _named_published(self) -> list[tuple[tuple[bool, str], Tensor]]:
        return [(_bert_name(name, self._lower), value) for name, value in (self._published or {}).items()]

    def see(self, networks: Any, name: str, values: Any, *, fused: bool = False) -> Seen:
        """One modality's encoder of the student's or the copy's networks; `fused`: with tokens, whose first is the vector."""
        encoder = networks["encoders"][name]
        arguments = values if isinstance(values, tuple | list) else (values,)
        if isinstance(encoder, TextEncoder) or (fused and name == self.image):
            tokens = encoder.tokens(*arguments)
            return Seen(tokens[:, 0], tokens if fused else None)
        if isinstance(encoder, VisionTokens) and encoder.prefix:
            return Seen(encoder.tokens(*arguments)[:, 0])  # what `fused` would give, whatever the model pools
        return Seen(encoder(*arguments))

    def embedded(self, networks: Any, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "n embedding"]]:
        """Unit embeddings of every modality by the student's or the copy's networks; zeros where an item lacks it."""
        present, found = batch.get("present", {}), {}
        for name, values in batch["inputs"].items():
            rows = there(present.get(name))
            z = _unit(networks["heads"][name](self.see(networks, name, taken(values, rows)).vector))
            found[name] = z if rows is None else z.new_zeros(len(present[name]), z.shape[1]).index_copy(0, rows, z)
        return found

    def embed(self, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "n embedding"]]:
        return self.embedded(self.student, batch)

    # --- training

    def begin(self, survey: Survey) -> None:
        if self.config.checkpoint:
            self.load_state_dict(load_albef_checkpoint(Path(self.config.checkpoint), self))

    @property
    def alpha(self) -> float:
        """How much soft targets count at this step: 0 at the first, then on a line to the whole."""
        ramp = self.config.alpha_ramp * self.steps_per_epoch
        return self.config.alpha * (min(1.0, self.position.step / ramp) if ramp else 1.0)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config, image, text = self.config, self.image, self.text
        both = batch["present"][image] & batch["present"][text]
        if int(both.sum()) < (2 if config.use_itm else 1):
            raise CounterpointError(
                f"a batch has {int(both.sum())} items with {image} and {text}"
                + (", ITM needs two: use a larger batch, or switch use_itm off" if config.use_itm else "")
            )
        rows = None if bool(both.all()) else both.nonzero().flatten()
        inputs = {name: taken(batch["inputs"][name], rows) for name in (image, text)}
        alpha = self.alpha
        with torch.no_grad():
            self.temperature.clamp_(*TEMPERATURES)
        v, w = (self.see(self.student, name, inputs[name], fused=config.fuses) for name in (image, text))
        f_v, f_t = self.heads[image](v.vector), self.heads[text](w.vector)
        self.teacher.update(self.student, config.momentum_teacher)
        copy: Any = self.teacher.module
        with torch.no_grad():
            v_m, w_m = (self.see(copy, name, inputs[name], fused=config.fuses) for name in (image, text))
            g_v, g_t = _unit(copy["heads"][image](v_m.vector)), _unit(copy["heads"][text](w_m.vector))
        ids = _identities(*inputs[text]) if config.same_text else None

        terms: dict[str, Tensor] = {}
        if config.use_itc:
            of_v, of_t = (cast(Queue, self.queues[name]) for name in (image, text))
            # The loss reads the queues as they are; nothing it keeps for its backward pass is a view of them.
            terms["itc"] = momentum_contrast_soft(
                *(f_v, f_t, g_v, g_t, of_v.rows.T, of_t.rows.T),
                temperature=self.temperature,
                alpha=alpha,
                idx=ids,
                idx_queue=None if ids is None else self.queue_ids,
            )
            if not bool(terms["itc"].isfinite()):
                raise CounterpointError("the contrastive loss is not finite: training diverged; lower --lr")
            if ids is not None:
                self._write_ids(gather_rows(ids), int(of_v.pointer))
            of_v.write(g_v)
            of_t.write(g_t)
        if config.use_itm:
            terms["itm"] = self._itm(v.tokens, w.tokens, inputs[text][1], (f_v, f_t, g_t, g_v), ids)
        if config.use_mlm:
            terms["mlm"] = self._mlm(inputs[text], v.tokens, v_m.tokens, alpha)
        loss = torch.stack(list(terms.values())).sum()
        return {"loss": loss, **terms, "temperature": self.temperature.detach(), "alpha": loss.new_tensor(alpha)}

    @torch.no_grad()
    def _write_ids(self, ids: Tensor, pointer: int) -> None:
        """As the queues write the keys of these items."""
        length = len(self.queue_ids)
        places = torch.arange(max(len(ids) - length, 0), len(ids), device=ids.device)
        self.queue_ids[(pointer + places) % length] = ids[places]

    def _itm(
        self, v: Any, w: Any, mask: Tensor, embeddings: tuple[Tensor, Tensor, Tensor, Tensor], ids: Tensor | None
    ) -> Tensor:
        """Cross-entropy of "belong together": the n pairs, n texts with a drawn image, n images with a drawn text."""
        n, hard = len(v), self.config.hard_negatives and self.config.use_itc
        try:
            # Where all negatives are to be as likely, no temperature may let the softmax underflow.
            weights = hard_negative_weights(*embeddings, temperature=self.temperature if hard else 1.0, idx=ids)
        except ValueError as error:
            raise CounterpointError(f"ITM finds no negatives: {error}") from error
        if not hard:
            weights = HardNegativeWeights(*((rows > 0).float() for rows in weights))
        image_at, text_at = (torch.multinomial(rows, 1).squeeze(1) for rows in weights)
        states = self.fusion(
            torch.cat([w, w, w[text_at]]), torch.cat([mask, mask, mask[text_at]]), torch.cat([v, v[image_at], v])
        )
        labels = torch.cat([mask.new_ones(n), mask.new_zeros(2 * n)]).long()
        return global_mean(F.cross_entropy(self.itm_head(states[:, 0]), labels, reduction="none"))

    def _mlm(self, text: tuple[Tensor, Tensor], v: Any, v_m: Any, alpha: float) -> Tensor:
        """Logits are made of the masked tokens alone."""
        ids, mask = text
        first = torch.arange(ids.shape[1], device=ids.device) == 0
        new, labels = mask_tokens(
            ids, mask & ~first, self.mask_token, self._size.vocabulary, self.config.mlm_probability
        )
        where = labels != IGNORED

        def logits(networks: Any, image: Tensor) -> Tensor:
            encoder = networks["encoders"][self.text]
            states = networks["fusion"](encoder.tokens(new, mask), mask, image)
            return networks["fusion"].words(states[where], encoder.embeddings.word.weight)

        with torch.no_grad():
            taught = logits(self.teacher.module, v_m)
        return mlm_distill(logits(self.student, v), taught, labels[where], alpha)

    # --- evaluation

    def predict(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embeddings of the student and of the momentum copy."""
        return {"embedding": self.embed(batch), "teacher_embedding": self.embedded(self.teacher.module, batch)}

    def measures(self, survey: Survey, split: str) -> dict[str, float]:
        """Retrieval re-ranked by ITM (see `rerank`), among the first 1,000 items."""
        if not (self.config.use_itm and self.config.rerank):
            return {}
        items = survey.split(split)
        rows = np.arange(min(RERANKED, len(items)))
        parts = [
            self._fused_rows(survey.batch(split, rows[start : start + BATCH])) for start in range(0, len(rows), BATCH)
        ]
        pictures = items.same(self.image) if hasattr(items, "same") else None
        return self._reranked(parts, pictures)

    def _fused_rows(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What ITM needs of each item that has both an image and a text."""
        both = batch["present"][self.image] & batch["present"][self.text]
        rows = both.nonzero().flatten()
        v, w = (
            self.see(self.student, name, taken(batch["inputs"][name], rows), fused=True)
            for name in (self.image, self.text)
        )
        ids, mask = taken(batch["inputs"][self.text], rows)
        assert v.tokens is not None
        assert w.tokens is not None
        f_v, f_t = (_unit(self.heads[name](s.vector)) for name, s in ((self.image, v), (self.text, w)))
        found = {"v": v.tokens, "w": w.tokens, "mask": mask, "f_v": f_v, "f_t": f_t, "ids": _identities(ids, mask)}
        return found | {"at": batch["index"][rows]}

    def _reranked(self, parts: Sequence[Mapping[str, Tensor]], pictures: Indices | None) -> dict[str, float]:
        """Recalls of both directions; `pictures`: numbers of all items, equal where they show one picture."""
        most = max(part["mask"].shape[1] for part in parts)
        v, f_v, f_t, ids = (torch.cat([part[name] for part in parts]) for name in ("v", "f_v", "f_t", "ids"))
        mask = torch.cat([F.pad(part["mask"], (0, most - part["mask"].shape[1])) for part in parts])
        w = torch.cat([F.pad(part["w"], (0, 0, 0, most - part["w"].shape[1])) for part in parts])
        if len(v) < 2:
            return {}

        def score(images: Tensor, texts: Tensor) -> Tensor:
            return self.itm_head(self.fusion(w[texts], mask[texts], v[images])[:, 0])[:, 1]

        found: dict[str, float] = {}
        both = (
            (self.image, self.text, f_v @ f_t.T, score),
            (self.text, self.image, f_t @ f_v.T, lambda texts, images: score(images, texts)),
        )
        everyone = torch.eye(len(v), device=v.device)
        groups = ids[:, None].cpu()
        # A picture may stand in several rows, with other words in each: all of them are right for it.
        if pictures is not None:
            at = torch.cat([part["at"] for part in parts]).cpu()
            groups = torch.cat([groups, torch.from_numpy(pictures)[at][:, None]], 1)
        for a, b, similarity, asked in both:
            # Each key is one place of its own, so that products with the scores are the scores.
            measured = retrieval(rerank(similarity, asked, self.config.rerank), everyone, groups, groups)
            found |= {f"reranked_{a}_to_{b}_{name}": measured[name] for name in ("r1", "r5", "r10")}
        return found | {"reranked_mean_recall": float(np.mean(list(found.values())))}

    def figures(self, survey: Survey) -> dict[str, Any]:
        if not self.config.use_itm or self.config.fusion_layers < 2:
            return {}
        split, rows = survey.split("test"), []
        at = np.linspace(0, len(split) - 1, min(len(split), 4 * DRAWN)).astype(np.int64)
        texts = [str(text) for text in split.column(self.text, at)]
        shown = split.present(self.image, at) & np.array([bool(text.strip()) for text in texts])
        shown &= split.present(self.text, at)
        for n in np.flatnonzero(shown)[:DRAWN]:
            pixels = np.asarray(split.column(self.image, at[n : n + 1]))
            maps, words = grounding_maps(self, torch.from_numpy(pixels).permute(0, 3, 1, 2), [texts[n]])
            drawn = [
                {"text": word, "map": [[round(float(x), 6) for x in line] for line in found]}
                for word, found in zip(words[0], maps[0], strict=True)
            ]
            rows.append({"png": png(pixels[0]), "maps": drawn})
        return {"Where words are found": {"kind": "maps", "rows": rows}} if rows else {}


def _sides(config: ALBEFConfig, kinds: Mapping[str, str]) -> tuple[str, str]:
    """The modalities that are image and text; the first and the second where nothing is fused."""
    first, second = first_two(kinds)
    if set(kinds.values()) == {"image", "text"}:
        return (first, second) if kinds[first] == "image" else (second, first)
    if config.fuses:
        raise CounterpointError(
            "albef fuses images and texts, the data has "
            + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            + "; switch use_itm and use_mlm off to align other modalities"
        )
    if config.same_text:
        raise CounterpointError("same_text compares the words of items, of which the data has none")
    return first, second


def _published_size(encoder: Any, config: ALBEFConfig) -> TextSize:
    """Measures of a model of transformers; CounterpointError for what is no BERT."""
    assert isinstance(encoder, PretrainedText)
    model: Any = encoder.model
    found = model.config
    if found.model_type != "bert":
        raise CounterpointError(
            f"albef's text transformer is a BERT, {config.text_encoder} is a {found.model_type}; use text-s, minilm or "
            "hf:bert-base-uncased"
        )
    return TextSize(
        int(found.vocab_size),
        int(found.max_position_embeddings),
        int(found.hidden_size),
        int(found.num_hidden_layers),
        int(found.num_attention_heads),
        int(found.intermediate_size),
        config.dropout,
    )


def _identities(ids: Int[Tensor, "n tokens"], mask: Bool[Tensor, "n tokens"]) -> Int[Tensor, " n"]:
    """A number for each text, the same for the same tokens whatever the padding: a polynomial in 2^62, not negative.

    Of a million texts, two share a number by chance in one set of ten million.
    """
    total = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    for column in range(ids.shape[1]):
        step = (total * 6364136223846793005 + ids[:, column] + 1442695040888963407) ^ (total >> 29)
        total = torch.where(mask[:, column], step, total)
    return total & (2**62 - 1)


def rerank(
    similarity: Float[Tensor, "n m"],
    score: Callable[[Int[Tensor, " pairs"], Int[Tensor, " pairs"]], Float[Tensor, " pairs"]],
    k: int,
) -> Float[Tensor, "n m"]:
    """Scores for ranking: of each query's k nearest keys by similarity what `score` says, -100 for all others.

    Args:
        similarity: of queries (rows) and keys.
        score: (queries, keys), numbers of rows and columns, -> a score each, such as ITM's logit; asked for 256 at a time.
        k: > 0; more than there are keys is all of them.

    Raises ValueError for a k that is not positive. Source: evaluation() of the authors' Retrieval.py.

    >>> rerank(torch.tensor([[3.0, 2.0, 1.0]]), lambda query, key: key.float(), 2)
    tensor([[   0.,    1., -100.]])
    """
    need_positive(k=k)
    nearest = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    queries = torch.arange(len(similarity), device=similarity.device).repeat_interleave(nearest.shape[1])
    keys = nearest.flatten()
    found = [score(a, b) for a, b in zip(queries.split(PAIRS), keys.split(PAIRS), strict=True)]
    scores = torch.full_like(similarity, -100.0)
    scores[queries, keys] = torch.cat(found).to(scores.dtype)
    return scores


# ----------------------------------------------------------------------------------------------- words found in pictures


class Grounding(NamedTuple):
    """Maps of the words of each text over the patches of its image; zeros beyond a text's words."""

    maps: Float[Tensor, "n words rows columns"]
    words: list[list[str]]


def grounding_maps(learner: ALBEF, images: Tensor, texts: Sequence[str], layer: int | None = None) -> Grounding:
    """Where in an image each word of its text is found: Grad-CAM of ITM's logit on cross-attention (Sec. 6.4 and Appendix).

    A map is the mean over heads of attention times the positive part of its gradient, and over the tokens of a word.

    Args:
        learner: with ITM; its mode and gradients are left as they are.
        images: [n, 3, size, size], uint8 or normalised already.
        texts: a text for each image.
        layer: which fusion layer, from 0; default: the third, the paper's, or the last but one if there are fewer. Not the
            last: the logit is read off the first token, so what words attend to there does not reach it.

    Maps are not negative, in units of the logit. Raises ValueError for a learner without ITM, numbers that differ, a
    layer that is not there or the last, and a text without words.

    >>> grounding_maps(learner, images, ["a dog on the grass"]).maps.shape   # doctest: +SKIP
    torch.Size([1, 5, 16, 16])
    """
    if not learner.config.use_itm or learner.tokenizer is None:
        raise ValueError("learner has no ITM, whose logit the maps explain")
    if len(images) != len(texts) or not len(texts):
        raise ValueError(f"texts must be one for each image, got {len(texts)} for {len(images)}")
    last = learner.config.fusion_layers - 1
    if last == 0:
        raise ValueError("learner has one fusion layer, in which only the first token's attention reaches the logit")
    layer = min(2, last - 1) if layer is None else layer
    if not 0 <= layer < last:
        raise ValueError(f"layer must lie in 0..{last - 1}, before the last, got {layer}")
    ids, mask, owners, words = _words(learner, texts)
    encoder = cast(VisionTokens, learner.encoders[learner.image])
    training = learner.training
    learner.eval()
    try:
        with torch.enable_grad():
            pixels = normalise(images) if images.dtype == torch.uint8 else images
            with torch.no_grad():
                v = learner.see(learner.student, learner.image, pixels.to(learner.device), fused=True).tokens
                w = learner.see(learner.student, learner.text, (ids, mask), fused=True).tokens
            assert v is not None
            assert w is not None
            kept: list[Tensor] = []
            # Nothing before the fusion encoder needs a gradient; attention does, whether or not weights are frozen.
            states = learner.fusion(w.requires_grad_(), mask, v, kept)
            logit = learner.itm_head(states[:, 0])[:, 1].sum()
            (gradient,) = torch.autograd.grad(logit, kept[layer])
    finally:
        learner.train(training)
    rows, columns = pixels.shape[2] // encoder.patch, pixels.shape[3] // encoder.patch
    cam = (kept[layer].detach() * gradient.clamp(min=0)).mean(1)[..., encoder.prefix :]  # [n, tokens, patches]
    count = owners.sum(2, keepdim=True).clamp(min=1)
    return Grounding((owners @ cam / count).unflatten(2, (rows, columns)), words)


def _words(learner: ALBEF, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, list[list[str]]]:
    """Numbers and mask of texts, which tokens are whose: [n, words, tokens] of 0 and 1, and the words."""
    assert learner.tokenizer is not None
    tokenizer = learner.tokenizer
    ids, mask = tokenizer.encode(list(texts), learner.config.context)
    tokenizer.model.enable_truncation(learner.config.context)
    try:
        encodings = tokenizer.model.encode_batch(list(texts))
    finally:
        tokenizer.model.no_truncation()
    words: list[list[str]] = []
    places: list[list[list[int]]] = []
    for number, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        of: dict[int, list[int]] = {}
        for token, word in enumerate(encoding.word_ids):
            if word is not None and not encoding.special_tokens_mask[token]:
                of.setdefault(word, []).append(token)
        spans = [
            (text[encoding.offsets[tokens[0]][0] : encoding.offsets[tokens[-1]][1]].strip(), tokens)
            for tokens in of.values()
        ]
        spans = [(word, tokens) for word, tokens in spans if word]
        if not spans:
            raise ValueError(f"texts[{number}] has no words")
        words.append([word for word, _ in spans])
        places.append([tokens for _, tokens in spans])
    owners = torch.zeros(len(texts), max(map(len, words)), ids.shape[1])
    for row, spans_ in enumerate(places):
        for word_at, tokens in enumerate(spans_):
            owners[row, word_at, tokens] = 1
    device = learner.device
    return ids.to(device), mask.to(device), owners.to(device), words


# ------------------------------------------------------------------------------------------- the authors' checkpoints


def load_albef_checkpoint(source: Path | str | Mapping[str, Any], learner: ALBEF) -> dict[str, Tensor]:
    """The authors' weights as a state dict of `learner`, for its `load_state_dict`.

    Args:
        source: a file (.pth with tensors only, .safetensors), or what it holds: names to tensors, or that under "model".
        learner: says what is wanted: which parts, and how many patches.

    Their names are those of timm's vision transformer (`visual_encoder.`), transformers' BERT with cross-attention
    (`text_encoder.bert.`, `text_encoder.cls.predictions.`), `vision_proj`, `text_proj`, `itm_head`, `temp`, the copies'
    with `_m`, and the queues. Position embeddings of the image are interpolated (bicubic) to the learner's patches; a text's
    are cut where the learner reads less. What fine-tuning may have dropped is made good: a copy that is not there is the
    student again, queues that are not there stay the learner's. Parts the learner was built without are left out.
    Raises CounterpointError that lists what is missing, what is not known and what has another shape; RunError for a file
    that cannot be read.

    >>> learner.load_state_dict(load_albef_checkpoint("ALBEF.pth", learner))   # doctest: +SKIP
    """
    held: Mapping[str, Any] = read_weights(Path(source)) if isinstance(source, Path | str) else source
    held = held["model"] if isinstance(held.get("model"), Mapping) else held
    own = learner.state_dict()
    state: dict[str, Tensor] = {}
    odd: list[str] = []
    for name, value in held.items():
        if not isinstance(value, Tensor):
            odd.append(name)
            continue
        target = _own_name(name, learner)
        if target is None:
            odd.append(name)
        elif target in own:
            state[target] = _fitted(name, value, own[target], learner)
    if "queue_ptr" in held and learner.config.use_itc:
        for side in (learner.image, learner.text):
            state[f"queues.{side}.pointer"] = held["queue_ptr"].reshape(()).to(torch.int64)
    copies = [name for name in own if name.startswith("teacher.")]
    if not any(name in state for name in copies):
        state |= {name: state[name.removeprefix("teacher.module.")] for name in copies if name[15:] in state}
    for name in own:
        if name.startswith("queue") and name not in state:
            state[name] = own[name]
    missing = [name for name in own if name not in state]
    wrong = [
        f"{name} {list(state[name].shape)}, wanted {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    said = [
        f"{what}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        for what, names in (("it lacks", missing), ("it has, and nobody knows", odd), ("of another shape", wrong))
        if names
    ]
    if said:
        raise CounterpointError("the checkpoint does not fit this model; " + "; ".join(said))
    return {name: state[name].to(own[name].dtype) for name in own}


# What the authors' files hold that is not a weight, or is another one once more.
_LEFT_OUT = re.compile(r"(.*\.position_ids|queue_ptr|text_encoder(_m)?\.cls\.predictions\.decoder\.(weight|bias))$")


def _own_name(name: str, learner: ALBEF) -> str | None:
    """Our name of one of the authors' weights, whether the learner has it or not; None for a name that is not known."""
    if _LEFT_OUT.match(name):
        return ""
    single = {
        "temp": "temperature",
        "image_queue": f"queues.{learner.image}.rows",
        "text_queue": f"queues.{learner.text}.rows",
        "idx_queue": "queue_ids",
    }
    if name in single:
        return single[name]
    part, _, rest = name.partition(".")
    prefix = "teacher.module." if part.endswith("_m") else ""
    part = part.removesuffix("_m")
    if part == "visual_encoder":
        # A head of ImageNet's classes, which pretraining starts from.
        return "" if rest.startswith("head.") else f"{prefix}encoders.{learner.image}.model.{rest}"
    if part in ("vision_proj", "text_proj"):
        return f"{prefix}heads.{learner.image if part == 'vision_proj' else learner.text}.{rest}"
    if part == "itm_head":
        return f"itm_head.{rest}"
    if part == "text_encoder" and rest.startswith("bert."):
        above, found = _bert_name(rest.removeprefix("bert."), learner._lower)
        return f"{prefix}fusion.{found}" if above else f"{prefix}encoders.{learner.text}.{found}"
    head = {"transform.dense.": "dense.", "transform.LayerNorm.": "norm.", "bias": "bias"}
    if part == "text_encoder" and rest.startswith("cls.predictions."):
        rest = rest.removeprefix("cls.predictions.")
        found_head = next((new + rest.removeprefix(old) for old, new in head.items() if rest.startswith(old)), None)
        return None if found_head is None else f"{prefix}fusion.{found_head}"
    return None


def _fitted(name: str, value: Tensor, own: Tensor, learner: ALBEF) -> Tensor:
    """A weight in the learner's form: queues as rows, positions for the learner's number of patches and tokens."""
    if name in ("image_queue", "text_queue"):
        return value.T.contiguous()
    if name.endswith("embeddings.position_embeddings.weight"):
        return value[: len(own)]
    if not name.endswith(".pos_embed") or value.shape == own.shape or value.shape[::2] != own.shape[::2]:
        return value
    encoder = cast(VisionTokens, learner.encoders[learner.image])
    first, patches = value[:, : encoder.prefix], value[:, encoder.prefix :]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        return value
    grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), encoder.grid, mode="bicubic", align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2).to(value.dtype)], 1)


# -------------------------------------------------------------------------------------------------------------- settings

# Small networks for pictures and captions, from random weights. Embeddings are all alike in the beginning then. A copy
# faster than the paper's, or a long queue, lets the networks tell keys by their age instead of by what they show, and soft
# targets of a copy that knows nothing yet keep it so: the paper's momentum, a short queue, a long ramp.
_SMALL: dict[str, Any] = {
    "image_encoder": "vit-s",
    "pretrained": False,
    "depth": 4,
    "width": 128,
    "heads": 4,
    "fusion_layers": 2,
    "dropout": 0.0,
    "rerank": 16,
}


SYSTEM = System(
    slug="albef",
    task="aligned",
    config=ALBEFConfig,
    learner=ALBEF,
    data="digit-pairs",
    recipes={
        "digit-pairs": LAPTOP
        | _SMALL
        | {
            "epochs": 40,
            "batch_size": 64,
            "queue": 64,
            "alpha_ramp": 20.0,
            "recipe": "none",
            "lr": 1e-3 * 256 / 64,
            "vocabulary": 300,
            "context": 8,
        }
    },
    recipe=LAPTOP | _SMALL | {"queue": 256, "alpha_ramp": 5.0, "recipe": "weak"},
)
