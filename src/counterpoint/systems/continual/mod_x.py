"""Mod-X: keep the off-diagonal similarities of images and texts while a CLIP learns from a stream of domains.

Ni, Wei, Tang, Zhuang, Tian: "Continual Vision-Language Representation Learning with Off-Diagonal Information", ICML 2023,
arXiv 2305.07437; code ZixuanNi/Mod-X.

    u, w         [n, dim] unit embeddings of n new pairs of image and text
    u', w'       those of the same pairs by the network at the end of the phase before, which is frozen
    C, C'        u w^T and u' w'^T, cosines; rows are images, and rows of the transposes are texts
    s            log of the scale of CLIP's logits, learned, within 0..ln 100
    alpha        weight of the alignment

Under continued training the spaces of both modalities rotate, each by itself (spatial disorder). So similarities off the diagonal
change, and old pairs are no longer found. In the order of a step:

1. The contrast is CLIP's, with logits exp(s) C (Sec. 4).
2. A row of C' is trusted where its largest entry is its own pair. Other rows hold wrong knowledge and are left out.
3. The alignment is KL(softmax C' || softmax C) of each trusted row, at temperature 1 without s, in both directions.

The first phase has no teacher. Each phase begins with a new optimiser. `--alpha 0` is plain continued training. `--joint` trains
on all phases at once.

- As in the code, the alignment is a sum over rows, so it grows with the batch size n. A mean (`--reduction mean`) does not, and
  needs an alpha n times as large. The diagonal is part of the rows. Of several largest entries the first counts.
- Mended: the teacher computes no gradient, and its matrix is not overwritten. Neither matrix is stored here.

Not built: the baselines EWC, LwF and DER, and the angles within a modality (SAM). The measures `..._rotation` are means of the
angles between an item's embeddings after the first phase and now (RAM).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.checks import need_alike, need_rows, need_word, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean, mean_of_total, place
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision, scalar, wide
from counterpoint.core.world import over_group, world
from counterpoint.systems.base import System
from counterpoint.tasks.streams import StreamConfig, StreamLearner

FEW = 512  # pairs up to which whole matrices are faster
CHUNK = 2**22  # entries of a block of the old matrix
LARGEST = math.log(100)


class ModX(NamedTuple):
    loss: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    alignment: Float[Tensor, ""]


@full_precision
@torch.no_grad()
def trusted_rows(query: Float[Tensor, "n dim"], key: Float[Tensor, "m dim"], offset: int = 0) -> Bool[Tensor, " n"]:
    """Tell of each row whether its own key is the most similar one, of equals the first (step 2).

    Args:
        query, key: unit rows; row i of `query` belongs to row offset + i of `key`.
        offset: position of the first row's own key, by default 0.

    No gradient. Memory is a few blocks, never [n, m]. Raises ValueError for widths that differ and an empty batch.

    >>> trusted_rows(torch.eye(2), torch.eye(2)[[0, 0]])
    tensor([ True, False])
    """
    need_rows(query=query, key=key)
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(f"query and key must be [n, dim] and [m, dim], got {shapes(query=query, key=key)}")
    step = max(1, CHUNK // max(1, len(key)))
    own = torch.arange(offset, offset + len(query), device=query.device)
    parts = [(x @ key.T).argmax(1) == at for x, at in zip(query.split(step), own.split(step), strict=True)]
    return torch.cat(parts)


@over_group
@full_precision
def mod_x(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    image_emb_old: Float[Tensor, "n old_dim"],
    text_emb_old: Float[Tensor, "n old_dim"],
    logit_scale_log: float | Float[Tensor, ""],
    alpha: float = 20.0,
    reduction: Literal["sum", "mean"] = "sum",
) -> ModX:
    r"""Compute CLIP's loss, the alignment with the old network's trusted rows, and contrastive + alpha alignment.

    Args:
        image_emb, text_emb: embeddings of n pairs, of any norm; normalised here.
        image_emb_old, text_emb_old: the old network's of the same pairs, of any norm and width; no gradient.
        logit_scale_log: log(1 / temperature) of the contrast, a learnable scalar or a number.
        alpha: weight of the alignment, by default 20.
        reduction: "sum" of the rows' divergences (default) or their "mean"; the mean over both directions in either case.

    Across processes, each row meets the rows of all processes. For n = 1, and where no row is trusted, the alignment is 0. Raises
    ValueError for shapes that do not fit, an empty batch and an unknown reduction.

    >>> mod_x(torch.eye(2), torch.eye(2), torch.eye(2), torch.eye(2), 0.0).alignment
    tensor(0.)
    """
    need_alike("n dim", image_emb=image_emb, text_emb=text_emb)
    need_alike("n old_dim", image_emb_old=image_emb_old, text_emb_old=text_emb_old)
    if len(image_emb) != len(image_emb_old):
        raise ValueError(
            f"image_emb and image_emb_old must have equally many rows, got {len(image_emb)} and {len(image_emb_old)}"
        )
    need_word(("sum", "mean"), reduction=reduction)
    u, w = unit(wide(image_emb)), unit(wide(text_emb))
    old_u, old_w = (unit(wide(x.detach())).to(u.dtype) for x in (image_emb_old, text_emb_old))
    log_scale, at = scalar(logit_scale_log, u), place(len(u), u.device)
    if world()[1] == 1 and at.total <= FEW:
        similar = u @ w.T
        logits = similar * log_scale.exp()
        contrastive = ((logits.logsumexp(0) + logits.logsumexp(1)) / 2 - logits.diagonal()).mean()
        divergences, trusted = _of_matrices(similar, old_u @ old_w.T)
        return _together(contrastive, divergences, trusted, alpha, at.total, reduction)

    query = scaled(u, (-log_scale).exp())
    out = batch_logsumexp(query, w, columns=True)
    assert out.columns is not None
    contrastive = global_mean((out.rows + out.columns) / 2 - positive_similarity(query, w))
    every_u, every_w, all_u, all_w = (gather_rows(x) for x in (u, w, old_u, old_w))
    if world()[1] == 1:
        both = pair_cross_entropy(u, w, old_u, old_w, columns=True)
        assert both.columns is not None
        assert both.row_entropy is not None
        assert both.column_entropy is not None
        divergences = both.rows - both.row_entropy, both.columns - both.column_entropy
    else:
        of_rows = pair_cross_entropy(u, every_w, old_u, all_w)
        of_columns = pair_cross_entropy(w, every_u, old_w, all_u)
        assert of_rows.row_entropy is not None
        assert of_columns.row_entropy is not None
        divergences = of_rows.rows - of_rows.row_entropy, of_columns.rows - of_columns.row_entropy
    trusted = trusted_rows(old_u, all_w, at.offset), trusted_rows(old_w, all_u, at.offset)
    return _together(contrastive, divergences, trusted, alpha, at.total, reduction)


Both = tuple[Tensor, Tensor]  # of images and of texts


def _of_matrices(similar: Float[Tensor, "n n"], old: Float[Tensor, "n n"]) -> tuple[Both, Both]:
    """Return the divergence of each row and whether it is trusted, from small matrices, which is faster than without them."""
    own = torch.arange(len(old), device=old.device)
    divergences = tuple(
        F.kl_div(new.log_softmax(1), before.log_softmax(1), reduction="none", log_target=True).sum(1)
        for new, before in ((similar, old), (similar.T, old.T))
    )
    trusted = old.argmax(1) == own, old.T.argmax(1) == own
    return (divergences[0], divergences[1]), trusted


def _together(contrastive: Tensor, divergences: Both, trusted: Both, alpha: float, total: int, reduction: str) -> ModX:
    """Reduce the divergences of trusted rows and weight them (step 3)."""
    of_images, of_texts = (torch.where(ok, kl, 0).sum() for ok, kl in zip(trusted, divergences, strict=True))
    alignment = mean_of_total((of_images + of_texts) / 2, total if reduction == "mean" else 1)
    return ModX(contrastive + scalar(alpha, alignment) * alignment, contrastive, alignment)


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class ModXConfig(StreamConfig):
    """Settings of Mod-X. Defaults are the released ones for COCO and Flickr30K: four processes with 70 pairs each."""

    epochs: int = 35
    batch_size: int = 280
    optimizer: str = "adamw"
    lr: float = 5e-4 * 256 / 280
    weight_decay: float = 0.1
    warmup_epochs: int = 7
    schedule: Literal["epoch", "step"] = "step"
    embedding: int = 1024
    recipe: str = "none"
    alpha: float = 20.0
    """Weight of the alignment with the network of the phase before; 0: plain continued training."""
    reduction: Literal["sum", "mean"] = "sum"
    """Sum the alignment over the rows of a batch, as the code does, or average it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_weight("alpha")


class ModXLearner(StreamLearner):
    """A CLIP that learns phase after phase beside its own frozen copy of the phase before."""

    config: ModXConfig

    def __init__(self, config: ModXConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        embeddings, alpha = self.embed(batch), self.config.alpha
        ((image, text, both),) = self.paired_rows(embeddings, batch)
        scale = self.log_scale.detach().exp()
        if not self.phase or not alpha:
            found = mod_x(image, text, image, text, self.log_scale, 0.0)
            return {"loss": found.contrastive, "scale": scale}
        old = self.taught(batch)
        old_image, old_text = (old[name][both] for name in (self.first, self.second))
        found = mod_x(image, text, old_image, old_text, self.log_scale, alpha, self.config.reduction)
        return {"loss": found.loss, "contrast": found.contrastive, "alignment": found.alignment, "scale": scale}

    def end_step(self) -> None:
        super().end_step()
        with torch.no_grad():
            self.log_scale.clamp_(0, LARGEST)


# Settings for small pictures and few items, which replace the paper's.
LAPTOP: dict[str, Any] = {
    "epochs": 8,
    "first_epochs": 20,
    "batch_size": 64,
    "image_encoder": "mlp-s",
    "vector_encoder": "relu-256-256",
    "embedding": 32,
    "context": 16,
    "lr": 4e-3,
    "warmup_epochs": 0,
    "evaluate_every": 10,
}

SYSTEM = System(
    slug="mod-x", task="aligned", config=ModXConfig, learner=ModXLearner, data="digit-streams", recipe=LAPTOP
)
