"""CWCL: a new tower learns the structure of a frozen tower, whose similarities weight every pair of the batch.

Srinivasa, Cho, Yang, Saidutta, Lee, Shen, Jin: "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss",
NeurIPS 2023, arXiv 2309.14580.

Contrastive training against a frozen tower (LiT) has one positive per row. All other pairs are negatives, although many are
similar. CWCL weights each pair by the frozen tower's cosine, mapped to [0, 1], in the direction whose anchors are trained.
The other direction keeps the ordinary loss, because the similarities of an untrained tower are not informative.

Weights are inner products of the frozen features, each extended by a 1. So the weighted sum over the batch is a product with a
matrix of moments, [frozen dim, dim]. In batches of up to DENSE times the frozen dimension, the weights themselves are
less work: the kernel computes them tile by tile. Either way memory is linear in the batch.

No code of the paper's authors is public; the tests compare the loss with a re-implementation (CellCLIP). Two variants are off by
default: `sharpness`, and weights in both directions (`row_feat` of the functions, which no setting uses). Not supported: the
paper's towers and corpora; any encoder of the task can be frozen or trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.distributed import (
    Place,
    batch_logsumexp,
    batch_logsumexp_towards,
    gather_rows,
    global_mean,
    place,
)
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group
from counterpoint.encoders.vectors import build_vector_encoder
from counterpoint.errors import CounterpointError, unknown
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner

BLOCK = 512  # rows of weights at a time where they are no inner products
# For up to this many rows per frozen dimension, the weights are less work than the matrix of moments.
DENSE = 2
SHARPEST = 100  # largest power of the weights


class CWCLTerms(NamedTuple):
    """The two directions; CWCL is their sum."""

    cwcl_term: Float[Tensor, ""]
    column_to_row_ce: Float[Tensor, ""]


@over_group
@full_precision(keep=("frozen_feat", "row_feat"))
def cwcl(
    row_embed: Float[Tensor, "n dim"],
    col_embed: Float[Tensor, "n dim"],
    frozen_feat: Float[Tensor, "n frozen_dim"],
    log_scale: float | Float[Tensor, ""],
    *,
    row_feat: Float[Tensor, "n row_frozen_dim"] | None = None,
    sharpness: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Compute L_CWCL (U to V) + L_CL (V to U): weighted where the trained tower is the anchor, ordinary the other way.

    With S_ij = exp(log_scale) p_i . q_j and w_ij = (1 + cos(f_i, f_j)) / 2,

        L_CWCL = -mean_i (1 / sum_j w_ij) sum_j w_ij log softmax_j(S_i.)
        L_CL   = -mean_j log softmax_i(S_.j) at i = j

    Args:
        row_embed: p, of the trained tower; unit rows (not normalised here).
        col_embed: q, of the frozen tower; unit rows. Row i belongs to row i of `row_embed`.
        frozen_feat: f, the frozen tower's features; normalised here, no gradient.
        log_scale: log(1 / temperature), a learnable scalar or a number.
        row_feat: features for weights in the other direction too, if the row tower is already trained. Default: none.
        sharpness: power of the weights, above 0, at most 100; 1 is the paper's.

    A row of zeros in `frozen_feat` has cosine 0 with every row. For one row the loss is 0. Across processes the batch is
    that of all processes. Raises ValueError for shapes that do not fit, an empty batch or a sharpness out of range.

    >>> x = torch.eye(2)
    >>> cwcl(x, x, torch.tensor([[1.0], [-1.0]]), torch.tensor(0.0))   # weights 0 and 1: both cross-entropies
    tensor(0.6265)
    """
    terms = cwcl_terms(row_embed, col_embed, frozen_feat, log_scale, row_feat=row_feat, sharpness=sharpness)
    return terms.cwcl_term + terms.column_to_row_ce


@over_group
@full_precision(keep=("frozen_feat", "row_feat"))
def cwcl_terms(
    row_embed: Float[Tensor, "n dim"],
    col_embed: Float[Tensor, "n dim"],
    frozen_feat: Float[Tensor, "n frozen_dim"],
    log_scale: float | Float[Tensor, ""],
    *,
    row_feat: Float[Tensor, "n row_frozen_dim"] | None = None,
    sharpness: float = 1.0,
) -> CWCLTerms:
    """Compute both directions of `cwcl` separately.

    Arguments and errors are those of `cwcl`: `log_scale` is log(1 / temperature).
    """
    need_alike("n dim", row_embed=row_embed, col_embed=col_embed)
    need_within(0, SHARPEST, sharpness=sharpness)  # from 127 on, a weight of 1/2 underflows in float32
    need_positive(sharpness=sharpness)
    for name, features in (("frozen_feat", frozen_feat), ("row_feat", row_feat)):
        if features is not None and (features.ndim != 2 or len(features) != len(row_embed)):
            raise ValueError(
                f"{name} must be a row of features for each of row_embed, got {shapes(row_embed=row_embed, **{name: features})}"
            )
    scale = torch.as_tensor(log_scale, dtype=wide(row_embed).dtype, device=row_embed.device).exp()
    p, q = wide(row_embed) * scale, wide(col_embed)
    here = place(len(p), p.device)
    # Targets of a row sum to 1, so the cross-entropy is log Z minus the mean similarity under the targets.
    if sharpness != 1 or here.total <= DENSE * frozen_feat.shape[1]:
        weights = Weights(frozen_feat.to(q.dtype), sharpness)
        rows, columns, towards, back = batch_logsumexp_towards(p, q, weights, columns=True, own=row_feat is None)
        towards = towards / weights.sums(here)
    else:
        rows, columns = batch_logsumexp(p, q, columns=True)
        towards = positive_similarity(p, weighted_mean(q, frozen_feat, sharpness))
        back = positive_similarity(q, p) if row_feat is None else None
    if back is None:
        assert row_feat is not None  # `own` above
        back = positive_similarity(q, weighted_mean(p, row_feat, sharpness))
    assert columns is not None
    return CWCLTerms(global_mean(rows - towards), global_mean(columns - back))


class Weights:
    """The weights w_ij over the batch of all processes, in blocks; the features get no gradient."""

    def __init__(self, features: Float[Tensor, "n frozen_dim"], sharpness: float = 1.0) -> None:
        self.features = unit(gather_rows(features.detach()))
        self.sharpness = sharpness
        self.half = self.features.new_tensor(0.5)

    def __call__(self, rows: slice, columns: slice) -> Float[Tensor, "rows columns"]:
        w = torch.addmm(self.half, self.features[rows], self.features[columns].T, alpha=0.5)
        return w if self.sharpness == 1 else w.clamp_(min=0).pow_(self.sharpness)

    def sums(self, here: Place) -> Float[Tensor, " n"]:
        """Sum the weights over j, for this process's rows i."""
        if self.sharpness == 1:
            mine = slice(here.offset, here.offset + here.rows)
            return torch.addmv(self.half * len(self.features), self.features[mine], self.features.sum(0), alpha=0.5)
        return self.over(here, self.features.new_ones(len(self.features), 1))[:, 0]

    def over(self, here: Place, values: Float[Tensor, "all dim"]) -> Float[Tensor, "n dim"]:
        """Sum w_ij values_j over j, for this process's rows i; the backward pass computes the weights again."""
        stop = here.offset + here.rows
        # At least one block, even an empty one: other processes wait for this one in the values' backward pass.
        ends = [*range(here.offset, max(stop, here.offset + 1), BLOCK), stop]
        parts = [
            checkpoint(self._rows, slice(a, b), values, use_reentrant=False, preserve_rng_state=False)
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(parts)

    def _rows(self, rows: slice, values: Tensor) -> Tensor:
        return self(rows, slice(0, len(self.features))) @ values


@over_group
@full_precision(keep=("features",))
def weighted_mean(
    values: Float[Tensor, "n dim"], features: Float[Tensor, "n frozen_dim"], sharpness: float = 1.0
) -> Float[Tensor, "n dim"]:
    """Compute sum_j w_ij values_j / sum_j w_ij with w_ij = ((1 + cos(f_i, f_j)) / 2) ^ sharpness.

    The sums are over the batch of all processes. The features get no gradient.

    >>> weighted_mean(torch.tensor([[0.0], [4.0]]), torch.eye(2))   # weights 1 and 1/2
    tensor([[1.3333],
            [2.6667]])
    """
    if sharpness != 1:
        weights, here = Weights(features.to(values.dtype), sharpness), place(len(values), values.device)
        return weights.over(here, gather_rows(values)) / weights.sums(here)[:, None]
    # w_ij is half the inner product of (f_i, 1) and (f_j, 1): the sum over j is one matrix for all rows.
    g = F.pad(unit(features.detach().to(values.dtype)), (0, 1), value=1.0)
    counted = torch.cat([values, torch.ones_like(values[:, :1])], 1)
    sums = g @ gather_rows((g.T @ counted)[None]).sum(0)
    return sums[:, :-1] / sums[:, -1:]  # no sum is 0: a row's own weight is 1, or 1/2 for features of zeros


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class CWCLConfig(AlignedConfig):
    """Settings of CWCL. Towers, large batch and cosine are the paper's; other defaults are CLIP's or our choice."""

    batch_size: int = 16384
    image_encoder: str = "timm:vit_large_patch16_224.augreg_in21k"
    pretrained: bool = True
    optimizer: str = "adamw"
    lr: float = 1e-3 * 256 / 16384
    weight_decay: float = 1e-2
    objective: Literal["cwcl", "ordinary"] = "cwcl"
    """The loss: CWCL's, or the baseline, the ordinary loss in both directions (LiT)."""
    frozen: str = ""
    """Modality whose tower is frozen. Default: the first with pretrained weights (images, of images and texts)."""
    projection: bool = False
    """Add a trained projection to `embedding` dimensions to the frozen tower. Default: its own space is the shared space."""
    temperature: float = 0.07
    """Initial value of the learnt temperature."""
    sharpness: float = 1.0
    """Power of the weights, above 0, at most 100; 1 is the paper's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("temperature")
        if not 0 < self.sharpness <= SHARPEST:
            raise CounterpointError(f"sharpness must lie in 0..{SHARPEST}, 0 not included, got {self.sharpness}")


class CWCL(AlignedLearner):
    """A frozen tower of one modality and trained towers of the others, each trained towards the frozen one."""

    def __init__(self, config: CWCLConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.frozen = _frozen(config, self.kinds)
        self.trained = [name for name in self.kinds if name != self.frozen]
        if self.kinds[self.frozen] == "vector":  # already the output of a frozen tower
            self.encoders[self.frozen] = build_vector_encoder("as-is", data.modalities[self.frozen]["dim"])
        self.encoders[self.frozen].requires_grad_(False)
        width = {name: cast(Any, self.encoders[name]).dim for name in self.kinds}
        if config.projection:
            self.heads[self.frozen] = self.build_head(width[self.frozen])
        else:
            self.heads[self.frozen] = nn.Identity()
            for name in self.trained:
                self.heads[name] = nn.Linear(width[name], width[self.frozen], bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    def frozen_modality(self) -> str:
        return _frozen(self.config, self.kinds)

    def train(self, mode: bool = True) -> CWCL:
        super().train(mode)
        self.encoders[self.frozen].eval()
        return self

    def features(self, name: str, values: Any) -> Float[Tensor, "n dim"]:
        if name != self.frozen:
            return super().features(name, values)
        with torch.no_grad():
            return super().features(name, values)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        terms: list[CWCLTerms] = []
        teacher = self.features(self.frozen, batch["inputs"][self.frozen])
        for name in self.trained:
            # Items without a partner are no rows and no columns: they are removed before weights are computed.
            both = batch["present"][self.frozen] & batch["present"][name]
            student = self.features(name, batch["inputs"][name])[both]
            if place(len(student), self.device).total == 0:
                continue
            heads = (self.heads[name], student), (self.heads[self.frozen], teacher[both])
            p, q = (unit(head(rows)) for head, rows in heads)
            if self.config.objective == "ordinary":
                # The same sum of two cross-entropies, with weight 0 for all pairs but a row's own.
                terms.append(CWCLTerms(*_cross_entropies(p, q, self.log_scale)))
            else:
                scale, sharpness = self.log_scale, self.config.sharpness
                terms.append(cwcl_terms(p, q, teacher[both], scale, sharpness=sharpness))
        if not terms:
            raise CounterpointError(f"no item of a batch has {self.frozen} and another modality")
        mean = {field: torch.stack([getattr(part, field) for part in terms]).mean() for field in CWCLTerms._fields}
        loss = mean["cwcl_term"] + mean["column_to_row_ce"]
        return {"loss": loss, **mean, "scale": self.log_scale.detach().exp()}

    def end_step(self) -> None:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(100))


@full_precision
def _cross_entropies(p: Tensor, q: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    p = scaled(p, (-log_scale).exp())
    out = batch_logsumexp(p, q, columns=True)
    assert out.columns is not None
    own = positive_similarity(p, q)
    return global_mean(out.rows - own), global_mean(out.columns - own)


def _frozen(config: CWCLConfig, kinds: Mapping[str, str]) -> str:
    """Return the modality to freeze: `config.frozen`, or the first whose tower has pretrained weights."""
    trained = {
        "image": config.pretrained,
        "text": config.text_encoder != "text-s",
        "audio": config.audio_encoder != "sound-s",
        "vector": True,  # features of a tower outside this run
    }
    if config.frozen and config.frozen not in kinds:
        raise unknown("modality", config.frozen, kinds)
    able = [name for name, kind in kinds.items() if trained.get(kind)]
    if (config.frozen or not able) and config.frozen not in able:
        raise CounterpointError(
            f"the frozen tower{f' of {config.frozen}' if config.frozen else ''} would have random weights, which teach "
            "nothing: use --pretrained with a library's image encoder, or --text-encoder minilm or hf:NAME"
        )
    return config.frozen or able[0]


# -------------------------------------------------------------------------------------------------------------- settings

# The card's setting: a student of 32-128-128-32, AdamW at 1e-3 with a batch of 128, no schedule.
_HALVES = {
    "epochs": 400,
    "batch_size": 128,
    "vector_encoder": "relu-128-128",
    "lr": 1e-3 * 256 / 128,
    "constant_lr": True,
}


SYSTEM = System(
    slug="cwcl",
    task="aligned",
    config=CWCLConfig,
    learner=CWCL,
    data="digit-halves?labelled=700&train=400",
    recipes={"digit-halves": _HALVES | {"pretrained": False, "evaluate_every": 50}},
    # Without a download the only pretrained tower is MiniLM's: texts are frozen, pictures are trained.
    recipe=LAPTOP | {"pretrained": False, "text_encoder": "minilm"},
)
