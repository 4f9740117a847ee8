"""Symile: contrast whole tuples, not pairs, of any number of modalities in one space.

Saporta, Puli, Goldstein, Ranganath: "Contrasting with Symile: Simple Model-Agnostic Representation Learning for Unlimited
Modalities", NeurIPS 2024, arXiv 2411.01053.

CLIP on every pair of three modalities sees only pairwise information: for c = a XOR b it learns nothing, although any two
determine the third. Symile replaces the dot product by the multilinear inner product (MIP). The MIP is the sum over
coordinates of the product of all embeddings. The loss is a lower bound of total correlation.

This file has the loss with both kinds of negatives and the scores of candidates. It also has the paper's baseline, the sum of
pairwise CLIP losses (`objective="clip"`). "n" shuffles the other modalities for N - 1 shared negatives per row, with memory
O(N dim). "n_squared" takes all N^(M-1) combinations. The logits of all M anchors are one array of N^M numbers. It is
computed once, in blocks, for all anchors together (core/multilinear.py).

A learnt vector replaces the encoder's output for a missing modality. The paper's variants pass a constant "missing" input and an
indicator through the encoder, whose output is then also constant.

Not supported: the pretrained towers of Symile-M3 (Whisper, CLIP, XLM-R) and the chest X-ray networks of Symile-MIMIC.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_one_type, need_scale, need_word
from counterpoint.core.contrast import pair_logsumexp, softplus
from counterpoint.core.distributed import batch_logsumexp, batch_order, gather_rows, global_mean, place, world
from counterpoint.core.multilinear import combined_logsumexp, product
from counterpoint.core.operands import EPS, positive_similarity
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Diagonal
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.aligned import LAPTOP, AlignedConfig, AlignedLearner
from counterpoint.words import counted

MOST = 2**36  # similarities for "n_squared" at most; a batch of 4,096 triples has as many

# ---------------------------------------------------------------------------------------------------------------- the loss


@over_group
@full_precision
def symile(
    reps: Sequence[Float[Tensor, "n dim"]],
    logit_scale: float | Float[Tensor, ""],
    negatives: Literal["n", "n_squared"] = "n",
    permutations: Int[Tensor, "anchors others n"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Compute the Symile loss: the mean of a cross-entropy over the M choices of an anchor modality.

    MIP(x_1, ..., x_M) = sum over coordinates k of the product over m of x_m[k]. For anchor a, row i's logits are logit_scale
    times the MIP of its embedding with tuples of the others. The positive is its own tuple. The negatives are

        "n"          K_j = product over the others m of O_m[pi_m(j)], j != i, with a permutation for each anchor and other
        "n_squared"  all other combinations of rows of the others

    Args:
        reps: M embeddings; row i of all of them is one tuple. Not normalised here: the XOR experiments pass unit rows, the
            others the output of a LayerNorm.
        logit_scale: 1 / temperature, not its logarithm; finite, at least 0 (where all logits are equal).
        negatives: see above. "n" needs M >= 2 and memory O(n dim); "n_squared" time n^M, memory n^floor(M/2) dim and n^ceil(M/2).
        permutations: for "n", one per anchor and other modality, in their order; across processes those of the whole batch.
            Default: drawn with `generator` (across processes, the first one's draw).
        generator: source of the draw. Default: torch's own.

    For one tuple the loss is 0. For M = 2 "n_squared" is the symmetric InfoNCE (CLIP's). Across processes the batch is that
    of all processes. Raises ValueError for shapes that differ, fewer than two modalities and permutations that do not fit.
    Raises it too for too many combinations. Source: the authors' code, symile/loss.py and symile/similarity.py.

    >>> x = torch.eye(4)
    >>> symile([x, x, x], 0.0, "n_squared")   # (M - 1) log n
    tensor(2.7726)
    """
    return symile_per_anchor(reps, logit_scale, negatives, permutations, generator=generator).mean()


@over_group
@full_precision
def symile_per_anchor(
    reps: Sequence[Float[Tensor, "n dim"]],
    logit_scale: float | Float[Tensor, ""],
    negatives: Literal["n", "n_squared"] = "n",
    permutations: Int[Tensor, "anchors others n"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " anchors"]:
    """Compute the loss of each choice of the anchor; `symile` is their mean. Arguments and errors are those of `symile`."""
    reps = _checked(reps)
    need_scale(logit_scale=logit_scale)
    need_word(("n", "n_squared"), negatives=negatives)
    if permutations is not None and negatives != "n":
        raise ValueError("permutations are for negatives='n'; 'n_squared' shuffles nothing")
    positive = product(reps).sum(1) * logit_scale
    if negatives == "n":
        losses = _shuffled(reps, logit_scale, positive, permutations, generator)
    else:
        losses = [logs - positive for logs in _combined(reps, logit_scale)]
    return torch.stack([global_mean(rows) for rows in losses])


def _checked(reps: Sequence[Tensor]) -> list[Tensor]:
    if len(reps) < 2:
        raise ValueError(f"reps must be at least two modalities, got {len(reps)}")
    need_alike("n dim", **{f"reps[{number}]": rep for number, rep in enumerate(reps)})
    need_one_type(reps=reps)
    return [wide(rep) for rep in reps]


def draw_permutations(
    modalities: int, n: int, generator: torch.Generator | None = None
) -> Int[Tensor, "anchors others n"]:
    """Draw an independent permutation of the batch for each anchor and each of its others.

    Args:
        modalities: M; there are M anchors and M - 1 others.
        n: number of tuples.
        generator: source of the draw. Default: torch's own.
    """
    drawn = [torch.randperm(n, generator=generator) for _ in range(modalities * (modalities - 1))]
    return torch.stack(drawn).view(modalities, modalities - 1, n)


def _shuffled(
    reps: list[Tensor],
    scale: float | Tensor,
    positive: Tensor,
    permutations: Tensor | None,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Compute the losses of each row, for each anchor, with shuffled negatives."""
    here = place(len(positive), positive.device)
    wanted = (len(reps), len(reps) - 1, here.total)
    if permutations is None:
        permutations = draw_permutations(len(reps), here.total, generator).to(positive.device)
        if world()[1] > 1:  # every process draws; the first one's draw counts
            permutations = gather_rows(permutations[None])[0]
    permutations = permutations.to(positive.device)
    counted = torch.arange(here.total, device=positive.device)
    if permutations.shape != wanted or holds((permutations.sort(-1).values != counted).any()):
        raise ValueError(
            f"permutations must be [anchors, others, n] = {list(wanted)}, got {list(permutations.shape)} of "
            f"{permutations.dtype}; a permutation has every number of 0..{here.total - 1} once"
        )
    permutations = permutations.long()
    # One gather for all modalities.
    everyone = reps if world()[1] == 1 else gather_rows(torch.stack(reps, 1)).unbind(1)
    losses = []
    for anchor, rows in enumerate(permutations):
        others = [rep for number, rep in enumerate(everyone) if number != anchor]
        keys = product([other.index_select(0, row) for other, row in zip(others, rows, strict=True)])
        # The positive replaces the shuffled key on the diagonal.
        negative = pair_logsumexp(reps[anchor] * scale, keys, exclude=Diagonal(), origin=(here.offset, 0)).rows
        losses.append(softplus(negative - positive))
    return losses


def _combined(reps: list[Tensor], scale: float | Tensor) -> list[Tensor]:
    """Compute log Z of each row, for each anchor, over all combinations of rows of the others."""
    n = place(len(reps[0]), reps[0].device).total
    if n ** len(reps) > MOST:
        raise ValueError(
            f"negatives='n_squared' of a batch of {n} in {counted(len(reps), 'modality')} has {n}^{len(reps)} = "
            f"{float(n) ** len(reps):.1e} similarities, more than {float(MOST):.1e}; use a smaller batch or negatives='n'"
        )
    return combined_logsumexp([reps[0] * scale, *reps[1:]])


# --------------------------------------------------------------------------------------------------- scores and the baseline


@over_group
@full_precision
def clip_pairwise_loss(
    reps: Sequence[Float[Tensor, "n dim"]], logit_scale: float | Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute the baseline: CLIP's symmetric loss summed (not averaged) over all pairs of modalities.

    Arguments are those of `symile`. Across processes the batch is that of all processes. Raises ValueError for shapes that
    differ and for fewer than two modalities.

    >>> clip_pairwise_loss([torch.eye(3)] * 3, 0.0)   # 3 log 3
    tensor(3.2958)
    """
    need_scale(logit_scale=logit_scale)
    total: Tensor | float = 0.0
    for a, b in itertools.combinations(_checked(reps), 2):
        query = a * logit_scale
        out = batch_logsumexp(query, b, columns=True)
        assert out.columns is not None
        total = total + global_mean((out.rows + out.columns) / 2 - positive_similarity(query, b))
    assert isinstance(total, Tensor)
    return total


@full_precision
def mip_similarity(
    candidates: Float[Tensor, "c dim"], others: Sequence[Float[Tensor, "n dim"]]
) -> Float[Tensor, "n c"]:
    """Compute the MIP of every candidate of one modality with each row of all others: sum_k c[k] prod_m other_m[k].

    Raises ValueError for shapes that do not fit.

    >>> mip_similarity(torch.eye(2), [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])])
    tensor([[3., 8.]])
    """
    return product(_queries(candidates, others)) @ wide(candidates).T


@full_precision
def zeroshot_symile(
    candidates: Float[Tensor, "c dim"],
    others: Sequence[Float[Tensor, "n dim"]],
    logit_scale: float | Float[Tensor, ""] = 1.0,
) -> Float[Tensor, "n c"]:
    """Compute Symile's score of each candidate for each row of the other modalities: logit_scale times `mip_similarity`.

    Its softmax over candidates is p(candidate | all others). Raises ValueError for shapes that do not fit.
    """
    need_scale(logit_scale=logit_scale)
    return logit_scale * mip_similarity(candidates, others)


@full_precision
def zeroshot_clip(
    candidates: Float[Tensor, "c dim"],
    others: Sequence[Float[Tensor, "n dim"]],
    logit_scale: float | Float[Tensor, ""] = 1.0,
) -> Float[Tensor, "n c"]:
    """Compute pairwise CLIP's score: logit_scale (sum_m other_m . c + sum of the dot products of pairs of the others).

    The second sum is the same for all candidates and changes no ranking. Raises ValueError for shapes that do not fit.

    >>> zeroshot_clip(torch.eye(2), [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])])
    tensor([[3., 1.]])
    """
    need_scale(logit_scale=logit_scale)
    queries = _queries(candidates, others)
    total = torch.stack(queries).sum(0)
    # The sum over pairs is half the difference between the square of the sum and the sum of the squares.
    among = (total.square() - torch.stack(queries).square().sum(0)).sum(1, keepdim=True) / 2
    return logit_scale * (total @ wide(candidates).T + among)


def _queries(candidates: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    if not others:
        raise ValueError("others must be at least one modality")
    need_alike("n dim", **{f"others[{number}]": other for number, other in enumerate(others)})
    if candidates.ndim != 2 or candidates.shape[1] != others[0].shape[1]:
        raise ValueError(f"candidates must be [c, {others[0].shape[1]}], got {list(candidates.shape)}")
    need_one_type(candidates=[candidates], others=others)
    return [wide(other) for other in others]


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class SymileConfig(AlignedConfig):
    """Settings of Symile. Defaults are those of the paper's XOR example, the only one with a complete published recipe."""

    epochs: int = 50
    batch_size: int = 1000
    embedding: int = 16
    vector_encoder: str = "linear"
    optimizer: str = "adamw"
    lr: float = 0.1 * 256 / 1000
    weight_decay: float = 0.01
    constant_lr: bool = True
    objective: Literal["symile", "clip"] = "symile"
    """The loss: Symile's, or the baseline, the sum of pairwise CLIP losses."""
    negatives: Literal["n", "n_squared"] = "n"
    """n: shuffled negatives, one for each row of the batch. n_squared: all combinations of rows."""
    normalize: bool = True
    """Normalise embeddings to unit length, as in the XOR experiments; off, a LayerNorm ends each encoder, as in Symile-M3."""
    log_scale: float = -0.3
    """Initial logarithm of the learnt scale of the logits. It is not bounded."""


class Symile(AlignedLearner):
    """Two or more modalities under one loss of whole tuples."""

    def __init__(self, config: SymileConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        if len(self.kinds) < 2:
            raise CounterpointError(f"symile aligns two modalities or more, the data has {', '.join(self.kinds)}")
        self.log_scale = nn.Parameter(torch.tensor(float(config.log_scale)))
        widths = {name: cast(Any, self.encoders[name]).dim for name in self.kinds}
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.randn(w) * 0.02) for name, w in widths.items()})
        normed = () if config.normalize else self.kinds
        self.norms = nn.ModuleDict({name: nn.LayerNorm(config.embedding) for name in normed})

    @property
    def whole_tuples(self) -> bool:
        """Whether a query must have all other modalities, to score as in training: by their product with the target."""
        return self.config.objective == "symile" and len(self.kinds) > 2

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        if self.config.objective == "symile" and self.config.negatives == "n":
            total = place(len(batch["index"]), self.device).total
            drawn = draw_permutations(len(self.kinds), total, generator)
            order = batch_order(total)  # of the gathered rows, which differs from that of the draw
            batch["permutations"] = order.argsort()[drawn[..., order]].to(self.device)
        return batch

    def embed(self, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, "n embedding"]]:
        found = {}
        for name, values in batch["inputs"].items():
            features = self.features(name, values)
            if "present" in batch:  # prompts of classes are only texts, and all present
                features = torch.where(batch["present"][name][:, None], features, self.missing[name])
            out = self.heads[name](features)
            found[name] = F.normalize(out, dim=1, eps=EPS) if self.config.normalize else self.norms[name](out)
        return found

    def joint(self, embeddings: Sequence[Float[Tensor, "n dim"]]) -> Float[Tensor, "n dim"]:
        return product(embeddings) if self.config.objective == "symile" else super().joint(embeddings)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        reps, scale = list(self.embed(batch).values()), self.log_scale.exp()
        if self.config.objective == "clip":
            loss = clip_pairwise_loss(reps, scale)
        else:
            loss = symile(reps, scale, self.config.negatives, batch.get("permutations"))
        return {"loss": loss, "scale": scale.detach()}


# -------------------------------------------------------------------------------------------------------------- settings

SYSTEM = System(
    slug="symile",
    task="aligned",
    config=SymileConfig,
    learner=Symile,
    data="xor",
    # The card's setting: linear encoders to 16 dimensions, AdamW at 0.1 with a batch of 256, no schedule.
    recipes={"xor": {"epochs": 25, "batch_size": 256, "lr": 0.1}},
    # CLIP's initial scale: at LAPTOP's learning rate the scale does not rise far enough from e^-0.3.
    recipe=LAPTOP | {"vector_encoder": "mlp", "constant_lr": False, "log_scale": math.log(1 / 0.07)},
)
