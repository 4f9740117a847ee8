"""COSMO: a language model that reads pictures in its upper half, and embeds texts in its lower half for a contrast.

Wang, Li, Lin, Wang, Lin, Yang, Wang, Shou: "COSMO: COntrastive Streamlined MultimOdal Model with Interleaved Pre-Training", 2024,
arXiv 2401.00849. Code of the authors: github showlab/cosmo.

    x_1 .. x_T   the pictures of a text, in the order of its marks <image>
    v, V_t       summary of the pictures (mean over t), media tokens of picture t: a Perceiver resampler
    U            number of uni-modal layers of the language model, by default half of them
    h            states of the text; from layer U on, in front of every s-th layer:
                     h <- h + tanh(g_a) XAttn(LN(h), V);  h <- h + tanh(g_f) FF(h);  g_a = g_f = 0 at the start
    H            states after U - 1 layers: they have seen no picture
    t            summary of the text: one learned query attends to H
    S            cosines of W_t t and W_v v, times exp(theta)

    L = L_lm + w L_con,  L_con = (CE(S, diagonal) + CE(S^T, diagonal)) / 2, for pairs;  L = L_lm for documents

Batches of pairs and of documents alternate. Networks are in `encoders/interleaved.py`, blocks in `core/media_attention.py`. A token
attends to the latest picture (`immediate`), and a token before the first picture to none, in both modes.

Against the released code:

- Padding is masked in the text's summary; `mask_padding=False` reads it, as released.
- Equal captions of a batch are positives of each other. `duplicates`: "dropped" leaves L_con out of such a batch. The code means
  to, but compares the number of different label values with the batch. "ignored": only the diagonal is right.
- Across processes, negatives come from all of them. The code's default is each process alone.
- Long documents are cut between answers, and all parts serve. The code draws random windows.
- Captions are measured by CIDEr-D (`cider`) and by the share that equals the reference (`caption_exact`), which the claim uses.
- Not built: clips and their L_con, augmented pictures, the loss guard (off by default), and beams. Nor are pictures placed by
  CLIP's similarity: a document's marks place them. A random space before a caption would change nothing for the tokenizers that
  are made here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.answers import masked_lm_loss
from counterpoint.core.checks import need_alike, need_scale
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean
from counterpoint.core.matching import matching_accuracy
from counterpoint.core.operands import class_similarity, positive_similarity, unit
from counterpoint.core.precision import full_precision, scalar
from counterpoint.core.world import over_group, world
from counterpoint.encoders.chat_models import ChatModel
from counterpoint.encoders.chat_tokenizers import ChatTokenizer
from counterpoint.encoders.interleaved import InterleavedModel, Interleaving, check_vision
from counterpoint.engine.optim import rise_and_fall
from counterpoint.engine.stages import Turn
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.interleaved import InterleavedConfig, InterleavedLearner

MOST_LOGIT_SCALE = 100.0
FEW = 512  # rows up to which the whole matrix is faster

# ------------------------------------------------------------------------------------------------------------ equations


@over_group
@full_precision
def interleaved_contrast(
    vision: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    logit_scale: float | Float[Tensor, ""] = 1.0,
    captions: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    r"""Contrast pictures with their captions: the mean of both directions' cross-entropies of s cos(v_i, t_j).

    The target of a row is uniform over the other side's rows with its caption:

        L = 1/2n sum_i ( log sum_j e^{s_ij} + log sum_j e^{s_ji} ) - 1/n sum_i mean_{j: c_j = c_i} s_ij

    Args:
        vision, text: embeddings of n pictures and of their captions, of any norm; normalised here.
        logit_scale: 1 / temperature, at least 0; it may have a gradient. The paper's is exp(theta), which starts at exp(0.2).
        captions: numbers, equal where two captions are equal. Default: all differ.

    Returns the mean loss; 0 for n = 1, log n for equal embeddings. Across processes each row meets the rows of all processes.
    Memory is linear in n. Raises ValueError for shapes that differ, an empty batch and a negative scale.

    Source: arXiv 2401.00849; without captions it is the loss of CLIP (arXiv 2103.00020).

    >>> x = torch.eye(2)
    >>> interleaved_contrast(x, x), interleaved_contrast(x, x, captions=torch.tensor([7, 7]))
    (tensor(0.3133), tensor(0.8133))
    """
    need_alike("n dim", vision=vision, text=text)
    need_scale(logit_scale=logit_scale)
    if captions is not None and captions.shape != (len(text),):
        raise ValueError(f"captions must be [{len(text)}], a number for each row, got {list(captions.shape)}")
    key = unit(vision)
    query = unit(text) * scalar(logit_scale, key)
    if world()[1] == 1 and len(key) <= FEW:
        s = query @ key.T
        same = None if captions is None else (captions[:, None] == captions).to(s.dtype)
        own = s.diagonal() if same is None else (s * same).sum(1) / same.sum(1)
        return ((s.logsumexp(0) + s.logsumexp(1)) / 2 - own).mean()
    found = batch_logsumexp(query, key, columns=True)
    assert found.columns is not None
    if captions is None:
        own = positive_similarity(query, key)
    else:
        sums, count = class_similarity(query, gather_rows(key), captions, gather_rows(captions))
        own = sums / count
    return global_mean((found.rows + found.columns) / 2 - own)


# ------------------------------------------------------------------------------------------------------------- settings


@dataclass
class CosmoConfig(InterleavedConfig):
    """Settings of COSMO. Defaults are the released ones, as far as a model that is built here has them."""

    epochs: int = 5
    """Passes over the shorter of pairs and documents."""
    batch_size: int = 96
    """Pairs in a batch, over all processes together."""
    optimizer: str = "adamw"
    lr: float = 5e-4 * 256 / 96
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: Literal["epoch", "step"] = "step"
    context: int = 256
    vision: str = "vit-s"
    """The picture encoder: patches-P (patches of P pixels), or an image encoder with a feature map, such as vit-s or hf:NAME."""
    pretrained: bool = False
    """Start the picture encoder from its published weights."""
    frozen_vision: bool = False
    """Do not train the picture encoder. (The paper's is CLIP's, frozen.)"""
    language: Literal["trained", "lora", "frozen"] = "trained"
    """What trains of the language model: all of it, an adapter (lora), or nothing (the paper, with hf:NAME)."""
    rank: int = 8
    """Rank of the language model's adapter, with language lora."""
    unimodal: int = 0
    """Number of the language model's first layers, which see no picture; 0: half of its layers."""
    interval: int = 1
    """Layers from one gated block to the next, at least 1."""
    heads: int = 8
    """Heads of all attention to pictures."""
    dim_head: int = 64
    """Width of each head of the attention to pictures."""
    compress: int = 1
    """Factor by which heads and feed-forward layers of the gated blocks are narrower."""
    media_tokens: int = 64
    """Tokens of a picture that a text attends to."""
    depth: int = 6
    """Layers of the resampler."""
    embedding: int = 512
    """Width of the embeddings that are contrasted."""
    immediate: bool = True
    """Attend to the latest picture alone; otherwise to all before."""
    mask_padding: bool = True
    """The text's summary does not read padding; False: it does, as released."""
    summary: Literal["unimodal", "fused"] = "unimodal"
    """States that are summarised for the contrast: unimodal, of the lower half; fused, the last, which have seen the pictures."""
    contrast: float = 1.0
    """Weight w of the contrast; 0: none."""
    theta: float = 0.2
    """Logarithm of the contrast's scale at the start."""
    duplicates: Literal["positives", "dropped", "ignored"] = "positives"
    """Equal captions in a batch: positives of each other; no contrast in such a batch; or negatives."""
    pair_weight: float = 1.0
    """Weight of the loss of pairs."""
    document_weight: float = 1.0
    """Weight of the loss of documents and texts."""

    counts: ClassVar[tuple[str, ...]] = (
        *(*InterleavedConfig.counts, "interval", "heads", "dim_head", "compress", "media_tokens"),
        *("depth", "embedding", "rank"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_weight("contrast", "pair_weight", "document_weight")
        if self.unimodal < 0:
            raise CounterpointError(f"unimodal must be at least 0, got {self.unimodal}")
        if not 0 <= self.theta <= math.log(MOST_LOGIT_SCALE):
            raise CounterpointError(f"theta must lie in 0..{math.log(MOST_LOGIT_SCALE):.2f}, got {self.theta}")
        if self.dim_head % self.compress:
            raise CounterpointError(f"compress ({self.compress}) must divide dim_head ({self.dim_head})")

    def check(self) -> None:
        super().check()
        check_vision(self.vision)
        if self.language != "trained" and not self.model.startswith("hf:"):
            raise CounterpointError(
                f"language {self.language} needs a trained language model, and {self.model} has random weights; name hf:NAME, or "
                "--language trained"
            )

    @property
    def interleaving(self) -> Interleaving:
        """Sizes and choices of all parts but the language model."""
        return Interleaving(**{field.name: getattr(self, field.name) for field in fields(Interleaving)})


# ------------------------------------------------------------------------------------------------------------- the learner


class Cosmo(InterleavedLearner):
    """A split language model with pictures, and the scale of the contrast."""

    config: CosmoConfig

    def __init__(self, config: CosmoConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.theta = nn.Parameter(torch.tensor(float(config.theta)))

    def build(self, data: Any) -> ChatModel:
        return InterleavedModel(
            data.built,
            ChatTokenizer.from_json(data.tokenizer),
            self.config.interleaving,
            size=data.size,
            context=self.config.context,
            dropout=self.config.dropout,
        )

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        config = self.config
        given = batch["ids"], batch["mask"], batch.get("pictures"), batch.get("counts")
        paired = bool(batch["paired"].all())
        if not paired or not config.contrast:
            lm = masked_lm_loss(self.model(*given), batch["labels"])
            return {"loss": (config.pair_weight if paired else config.document_weight) * lm, "lm_loss": lm}
        logits, vision, text = self.model(*given, embed=True)
        lm = masked_lm_loss(logits, batch["labels"])
        captions = batch["captions"]
        same = captions if config.duplicates == "positives" else None
        contrast = interleaved_contrast(vision, text, self.theta.exp(), same)
        if config.duplicates == "dropped":
            every = gather_rows(captions)
            if len(every.unique()) < len(every):
                contrast = contrast * 0.0
        found = matching_accuracy(vision.detach(), text.detach())
        return {
            "loss": config.pair_weight * (lm + config.contrast * contrast),
            "lm_loss": lm,
            "contrast": contrast,
            "matched": found.top1,
            "scale": self.theta.detach().exp(),
        }

    def turns(self) -> list[Turn]:
        """Train everything, at a rate that rises on a line and falls on half a cosine."""
        curve = rise_and_fall(self.epochs, self.steps_per_epoch, self.config.warmup, cosine=True)
        return [self.turn_of([self], curve=curve)]

    def end_step(self) -> None:
        with torch.no_grad():
            self.theta.clamp_(0, math.log(MOST_LOGIT_SCALE))


RECIPE = {
    "epochs": 18,
    "batch_size": 32,
    "document_share": 0.15,
    "lr": 8e-3,
    "weight_decay": 0.01,
    "model": "llama-64-4-4",
    "vocabulary": 320,
    "context": 48,
    "new_tokens": 6,
    "vision": "conv-cells",
    "heads": 4,
    "dim_head": 16,
    "media_tokens": 4,
    "depth": 1,
    "embedding": 64,
    "theta": 2.0,
    "shots": (2, 4),
    "evaluate_every": 6,
}
SMALL = {  # for data of your own: the released sizes are those of large models
    "epochs": 20,
    "batch_size": 32,
    "lr": 8e-3,
    "weight_decay": 0.01,
    "media_tokens": 16,
    "depth": 2,
    "dim_head": 32,
    "embedding": 128,
    "theta": 2.0,
}
SYSTEM = System(
    slug="cosmo",
    task="interleaved",
    config=CosmoConfig,
    learner=Cosmo,
    data="digit-documents",
    recipes={"digit-documents": RECIPE},
    recipe=SMALL,
)
