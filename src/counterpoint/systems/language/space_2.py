"""SPACE-2: pre-train an encoder of task-oriented dialogs on labelled and unlabelled dialogs, with graded positives from a tree.

He et al.: "SPACE-2: Tree-Structured Semi-Supervised Contrastive Pre-training for Task-Oriented Dialog Understanding",
COLING 2022, arXiv 2209.06638; code AlibabaResearch/DAMO-ConvAI (space-2).

    frame      annotation of the last turn: paths (domain, intent, slot, value) of the semantic tree
    k          view of the tree: D, I, S, V (nodes), DI, IS, SV (edges), DIS, ISV, DISV (paths)
    A_k        set of a frame's nodes, edges or paths in view k
    s_k        score of two frames: |A_k n B_k| / |A_k u B_k|
    z          [B, dim] the state at [CLS]
    e_k        [B, 2, dim] unit vectors of subspace k: one linear map and tanh, for two passes with different dropout
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_rows, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_max, global_mean, place
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Diagonal
from counterpoint.core.set_scores import (
    JaccardSets,
    PairScores,
    joined_numbers,
    packed_sets,
    scored_sums,
    set_numbers,
)
from counterpoint.core.transforms import holds, need_fixed
from counterpoint.core.world import over_group

LEVELS = "DISV"  # domain, intent, slot, value
VIEWS = ("D", "I", "S", "V", "DI", "IS", "SV", "DIS", "ISV", "DISV")

FEW = 512  # examples up to which the matrix of scores is faster than its tiles

Frames = Int[Tensor, "n rows 4"]


# ----------------------------------------------------------------------------------------------------- the semantic tree


def _need_frames(frames: Tensor) -> None:
    if frames.ndim != 3 or frames.shape[2] != len(LEVELS) or frames.is_floating_point():
        raise ValueError(f"frames must be whole numbers [n, rows, 4], got {frames.dtype} {shapes(frames=frames)}")


def _view_sets(frames: Frames, view: str) -> Int[Tensor, "n rows"]:
    """Return the set of each frame's elements in a view. Elements with a default or absent level are left out."""
    chosen = frames[..., [LEVELS.index(level) for level in view]]
    there = (chosen > 0).all(-1)
    number = torch.zeros(frames.shape[0] * frames.shape[1], dtype=torch.int64, device=frames.device)
    for level in chosen.clamp(min=0).flatten(0, 1).T:
        number = joined_numbers(number, level)
    return packed_sets(number.view(there.shape), there)


def view_scores(frames: Frames, view: str, dtype: torch.dtype = torch.float64) -> PairScores:
    """Return the scores of one view: Jaccard similarities of the frames' sets, 0 between empty sets."""
    sets = _view_sets(frames, view)
    first, number = set_numbers(sets)
    found = JaccardSets(sets[first], dtype)
    return PairScores(number, (found.size > 0).to(dtype), found.block)


def _distinct_frames(frames: Frames) -> tuple[Frames, Int[Tensor, " n"], Tensor]:
    """Return the distinct frames, the number of each frame's, and 1 for each distinct one that is not empty."""
    number = torch.zeros(frames.shape[0] * frames.shape[1], dtype=torch.int64, device=frames.device)
    for level in (frames.clamp(min=-1) + 1).flatten(0, 1).T:
        number = joined_numbers(number, level)
    sets = packed_sets(number.view(frames.shape[:2]), frames[..., 0] >= 0)
    first, number = set_numbers(sets)
    return frames[first], number, (sets[first] >= 0).any(1)


def combined_scores(frames: Frames, dtype: torch.dtype = torch.float64) -> PairScores:
    """Return the single score: the mean of s_k over views in which a frame of the two has an element; 1 for equal frames."""
    distinct, number, full = _distinct_frames(frames)
    views = [JaccardSets(_view_sets(distinct, view), dtype) for view in VIEWS]

    def block(rows: slice, columns: slice) -> Tensor:
        total = torch.zeros(1, dtype=dtype, device=frames.device)
        asked = torch.zeros(1, dtype=dtype, device=frames.device)
        for view in views:
            total = total + view.block(rows, columns)
            asked = asked + ((view.size[rows] > 0)[:, None] | (view.size[columns] > 0))
        mean = total / asked.clamp(min=1)
        return torch.where(_equal(rows, columns, full), 1, mean)

    return PairScores(number, full.to(dtype), block)


def equal_scores(frames: Frames, dtype: torch.dtype = torch.float64) -> PairScores:
    """Return 1 for equal frames that are not empty, else 0: the labels of a supervised contrast without a tree."""
    _, number, full = _distinct_frames(frames)
    return PairScores(number, full.to(dtype), lambda rows, columns: _equal(rows, columns, full).to(dtype))


def _equal(rows: slice, columns: slice, full: Tensor) -> Tensor:
    at = torch.arange(len(full), device=full.device)
    return (at[rows][:, None] == at[columns]) & full[rows][:, None]


def tree_scores(frames: Frames) -> Float[Tensor, "10 n n"]:
    r"""Score the pairs of n frames in the ten views of the tree: s_k = |A_k n B_k| / |A_k u B_k| (Sec. 3.2).

    Args:
        frames: paths of each frame, a row (domain, intent, slot, value) each. Numbers name nodes within their level. 0 is the
            default domain or intent, whose elements are left out. -1 is an absent level, and -2 padding.

    Returns float64 scores in the order D, I, S, V, DI, IS, SV, DIS, ISV, DISV. The diagonal is 1. Two sets without elements score
    0, so an empty frame scores 0 with every other frame. Raises ValueError for another shape or type.

    >>> tree_scores(torch.tensor([[[1, 1, 1, 1]], [[1, 2, 1, -1]]]))[:, 0, 1].tolist()
    [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    _need_frames(frames)
    return torch.stack([view_scores(frames, view).dense() for view in VIEWS])


def combined_tree_score(frames: Frames) -> Float[Tensor, "n n"]:
    """Score the pairs of n frames by one number: the mean over the views in which one of the two has an element.

    Args:
        frames: as in `tree_scores`.

    Returns float64 scores. Equal frames that are not empty score 1, and so does the diagonal. An empty frame scores 0 with every
    other frame. Raises ValueError for another shape or type.

    >>> combined_tree_score(torch.tensor([[[1, 1, 1, 1]], [[1, 2, 1, -1]]]))[0, 1].item()
    0.2
    """
    _need_frames(frames)
    return combined_scores(frames).dense()


# ----------------------------------------------------------------------------------------------------------- the contrast


@over_group
@full_precision(keep=("weights",))
def soft_supcon(
    features: Float[Tensor, "n 2 dim"],
    weights: Float[Tensor, "n total"] | PairScores | None = None,
    temperature: float = 0.07,
    base_temperature: float = 0.07,
) -> Float[Tensor, ""]:
    r"""Contrast two passes of n examples with a weight for each pair: the mean over the 2n anchors a of (Eq. 3)

        -(temperature / base_temperature) sum_b M_ab log p(b|a) / sum_b M_ab,    p(b|a) = exp s_ab / sum_{c != a} exp s_ac.

    M_ab is the weight of the two examples, and 0 for a itself. So an example's other pass has the weight on the diagonal.

    Args:
        features: both passes, rows of any norm; normalised here.
        weights: weights of the pairs, at least 0, with a positive diagonal; total is the number of examples of all processes. Or
            scores that are computed tile by tile. Default: the identity, which gives NT-Xent.
        temperature: > 0, by default 0.07; s is the cosine divided by it.
        base_temperature: > 0, by default 0.07; divides the loss, as in the authors' code.

    Memory is linear in n, apart from given weights. One example has no negatives, and its loss is 0. Raises ValueError for shapes
    that do not fit, an empty batch, weights out of range and a temperature that is not positive and finite.

    Relations: the identity gives NT-Xent, equality of labels gives SupCon.

    >>> soft_supcon(torch.eye(2)[:, None].expand(2, 2, 2), temperature=1.0, base_temperature=1.0)
    tensor(0.5514)
    """
    if features.ndim != 3 or features.shape[1] != 2:
        raise ValueError(f"features must be [n, 2, dim], got {shapes(features=features)}")
    need_rows(features=features)
    need_positive(temperature=temperature, base_temperature=base_temperature)
    x = unit(features, temperature**-0.5)
    at = place(len(x), x.device)
    log_z = batch_logsumexp(x.flatten(0, 1), exclude=Diagonal()).rows.view(-1, 2).mean(1)
    twin = (x[:, 0] * x[:, 1]).sum(1)
    if weights is None:
        return temperature / base_temperature * global_mean(log_z - twin)
    # Both anchors of an example together: the sum over the other examples, and the twin from both sides.
    sums = x.sum(1)
    own, others, count = _others(sums, weights, at.offset, at.total)
    towards = ((sums * others).sum(1) / 2 + own * twin) / (2 * count + own)
    return temperature / base_temperature * global_mean(log_z - towards)


def _others(
    sums: Float[Tensor, "n dim"], weights: Tensor | PairScores, offset: int, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each example's weight with itself, its weighted sum over the other examples, and their weights' sum."""
    n, everything = len(sums), gather_rows(sums)
    if isinstance(weights, PairScores):
        if len(weights.number) != total:
            raise ValueError(f"weights must have scores of {total} examples, has {len(weights.number)}")
        if total <= FEW:
            weights = weights.dense()[offset : offset + n]
    if isinstance(weights, PairScores):
        number = weights.number
        mine = number[offset : offset + n]
        row = torch.cat([everything, everything.new_ones(total, 1)], 1)
        of_class = row.new_zeros(len(weights.own), row.shape[1]).index_add(0, number, row)
        score = PairScores(number, weights.own, lambda r, c: weights.block(r, c).to(row.dtype))
        found = scored_sums(score, of_class)[mine] - weights.own.to(row.dtype)[mine, None] * row[offset : offset + n]
        return row.new_ones(n), found[:, :-1], found[:, -1].detach()
    if weights.shape != (n, total):
        raise ValueError(f"weights must be [n, total] = [{n}, {total}], got {shapes(weights=weights)}")
    w = weights.detach().to(sums.dtype)
    own = w.diagonal(offset)
    if holds((w < 0).any() | (own <= 0).any()):
        raise ValueError("weights must be at least 0, and above 0 on the diagonal")
    w = w.clone()
    w.diagonal(offset).zero_()
    return own, w @ everything, w.sum(1)


@over_group
@full_precision(keep=("frames",))
def tree_contrast(
    features: Float[Tensor, "n 2 views dim"],
    frames: Frames,
    temperature: float = 0.07,
    base_temperature: float = 0.07,
    views: Sequence[str] = VIEWS,
) -> Float[Tensor, ""]:
    r"""Compute L_tree: the mean over the views of the tree of `soft_supcon`, each in its own subspace with its own scores.

    Args:
        features: rows of each subspace, for two passes; of any norm.
        frames: annotations, as in `tree_scores`. A process may have other rows than another one.
        temperature: > 0, by default 0.07.
        base_temperature: > 0, by default 0.07; divides the loss.
        views: names of the active views, in the order of the subspaces; default: all ten.

    Memory is linear in n. Raises ValueError for shapes that do not fit, another view, an empty batch and a temperature that is not
    positive and finite.

    >>> tree_contrast(torch.eye(2)[:, None, None].expand(2, 2, 10, 2), torch.full((2, 1, 4), -2), 1.0, 1.0)
    tensor(0.5514)
    """
    _need_frames(frames)
    if features.ndim != 4 or features.shape[2] != len(views) or len(frames) != len(features) or not len(views):
        raise ValueError(
            f"features must be [n, 2, views, dim] with {len(views)} views and a frame for each of n, got "
            + shapes(features=features, frames=frames)
        )
    if unknown := [view for view in views if view not in VIEWS]:
        raise ValueError(f"views must be of {', '.join(VIEWS)}, got {unknown[0]!r}")
    need_fixed("tree_contrast", frames=frames)
    everything = gathered_frames(frames)
    losses = [
        soft_supcon(rows, view_scores(everything, view, wide(features).dtype), temperature, base_temperature)
        for rows, view in zip(features.unbind(2), views, strict=True)
    ]
    return torch.stack(losses).mean()


def gathered_frames(frames: Frames) -> Frames:
    """Gather the frames of all processes, which may have different numbers of rows."""
    most = global_max(frames.shape[1], frames.device)
    return gather_rows(F.pad(frames.long(), (0, 0, 0, most - frames.shape[1]), value=-2))


@over_group
@full_precision
def r_drop(logits_1: Float[Tensor, "n classes"], logits_2: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    r"""Compute R-Drop of two passes with different dropout: the mean of (KL(p||q) + KL(q||p)) / 2.

    Args:
        logits_1, logits_2: logits of the passes; p and q are their softmax. Both have a gradient.

    Equal logits give 0. Raises ValueError for shapes that do not fit and an empty batch. Source: arXiv 2106.14448.

    >>> r_drop(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor(0.)
    """
    need_alike("n classes", logits_1=logits_1, logits_2=logits_2)
    log_p, log_q = logits_1.log_softmax(1), logits_2.log_softmax(1)
    return global_mean(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1) / 2)
