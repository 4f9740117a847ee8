"""Score annotations of dialogs by a semantic tree: domain, intent, slot, value (SPACE-2, arXiv 2209.06638, Sec. 3.2).

    frame   paths (domain, intent, slot, value) of one annotation
    view    D, I, S, V (nodes), DI, IS, SV (edges), DIS, ISV, DISV (paths): of each frame a set of elements
    score   of two frames in a view: |A n B| / |A u B|

`tree_scores` and `combined_tree_score` return matrices. `view_scores`, `combined_scores` and `equal_scores` return the same as
`PairScores`, whose memory is linear in the number of frames.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import shapes
from counterpoint.core.set_scores import JaccardSets, PairScores, joined_numbers, packed_sets, set_numbers

LEVELS = "DISV"  # domain, intent, slot, value
VIEWS = ("D", "I", "S", "V", "DI", "IS", "SV", "DIS", "ISV", "DISV")

Frames = Int[Tensor, "n rows 4"]


def need_frames(frames: Tensor) -> None:
    """Raise ValueError unless frames are whole numbers [n, rows, 4]."""
    if frames.ndim != 3 or frames.shape[2] != len(LEVELS) or frames.is_floating_point():
        raise ValueError(f"frames must be whole numbers [n, rows, 4], got {frames.dtype} {shapes(frames=frames)}")


def _view_sets(frames: Frames, view: str) -> Int[Tensor, "n rows"]:
    """Return the set of each frame's elements in a view. Elements with a default or absent level are left out."""
    chosen = frames[..., [LEVELS.index(level) for level in view]]
    there = (chosen > 0).all(-1)
    number = joined_numbers(chosen.clamp(min=0).flatten(0, 1))
    return packed_sets(number.view(there.shape), there)


def view_scores(frames: Frames, view: str, dtype: torch.dtype = torch.float64) -> PairScores:
    """Return the scores of one view: Jaccard similarities of the frames' sets, 0 between empty sets."""
    sets = _view_sets(frames, view)
    first, number = set_numbers(sets)
    found = JaccardSets(sets[first], dtype)
    return PairScores(number, (found.size > 0).to(dtype), found.block)


def _distinct_frames(frames: Frames) -> tuple[Frames, Int[Tensor, " n"], Tensor]:
    """Return the distinct frames, the number of each frame's, and 1 for each distinct one that is not empty."""
    number = joined_numbers((frames.clamp(min=-1) + 1).flatten(0, 1))
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
    need_frames(frames)
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
    need_frames(frames)
    return combined_scores(frames).dense()
