"""Compare feature maps place by place: the cosine over channels, averaged over all places of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.operands import EPS, unit

Maps = Float[Tensor, "b channels height width"]


def need_maps(anchor: Tensor, **others: Sequence[Tensor] | Tensor) -> None:
    """Raise ValueError unless the anchor is a batch of maps and all other maps have its shape."""
    if anchor.ndim != 4:
        raise ValueError(f"anchor must be [b, channels, height, width], got {shapes(anchor=anchor)}")
    need_rows(anchor=anchor)
    for name, maps in others.items():
        for one in maps:
            if one.shape != anchor.shape:
                raise ValueError(f"{name} must each be like anchor {list(anchor.shape)}, got {list(one.shape)}")


def unit_maps(anchor: Maps) -> Float[Tensor, "b height width channels"]:
    """Normalise over channels at each place. A place of zeros stays zero and gets no gradient."""
    zero = (anchor.detach() == 0).all(1, keepdim=True)
    return unit(anchor.masked_fill(zero, 0.0).movedim(1, 3))


def map_similarity(unit_anchor: Tensor, other: Maps) -> Float[Tensor, " b"]:
    """Compute the mean cosine of each row of maps. The other maps get no gradient, and no normalised copy is made."""
    rows = other.detach().movedim(1, 3)
    length = torch.linalg.vector_norm(rows, dim=-1).clamp(min=EPS)
    return (torch.linalg.vecdot(unit_anchor, rows) / length).mean((1, 2))
