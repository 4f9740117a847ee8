"""Fuse the feature maps of any modalities by their agreement with the mean (Any2Seg: Zheng et al., arXiv 2407.11351)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import shapes
from counterpoint.core.map_sums import Map, Maps, inverse_length, mean_weights, weighted_sum
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import holds

Output = Literal["selected", "mean"]


class Fusion(NamedTuple):
    """What `modality_agnostic_fusion` returns."""

    fused: Map
    correlation: Float[Tensor, "modalities n"]
    selected_index: Int[Tensor, "n rows columns"]


def chosen_modalities(index: Tensor, modalities: int) -> Tensor:
    return index == torch.arange(modalities, device=index.device).view(-1, *[1] * index.ndim)


@full_precision(keep=("present",))
def modality_agnostic_fusion(
    features: Maps,
    previous: Map | None = None,
    candidates: int | None = None,
    present: Bool[Tensor, "modalities n"] | None = None,
    *,
    tokens: bool = False,
    output: Output = "selected",
) -> Fusion:
    """Combine the maps of several modalities: their mean, plus at each pixel the modality nearest to their weighted sum.

    Args:
        features: maps F_m; any number M >= 1 of modalities.
        previous: an earlier modality-agnostic map; the anchor is then (previous + mean) / 2. Default: none.
        candidates: only the first so many modalities are selected and averaged, 1 to M. Default: all. A sample that has
            none of these uses those it has.
        present: whether a sample has a modality; others count nowhere. Default: all.
        tokens: correlations of each pixel instead of each sample; they also weight the mean. Default: no.
        output: "selected" (default), or "mean": the mean alone, as in the two-modality model file.

    Returns:
        fused, f_ma; correlation, rho, 0 for absent modalities and for maps of zeros, and with `tokens` its mean over pixels;
        selected_index. Ties select the lower index. The selection has no gradient.

    Raises ValueError for shapes that do not fit, candidates out of range and a sample without a modality.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]]).view(2, 1, 2, 1, 1)
    >>> found = modality_agnostic_fusion(x)
    >>> found.fused.flatten(), found.selected_index.item()
    (tensor([2., 3.]), 1)
    """
    if features.ndim != 5 or 0 in features.shape[:3]:
        raise ValueError(f"features must be [modalities, n, channels, rows, columns], got {shapes(features=features)}")
    modalities, n = features.shape[:2]
    if previous is not None and previous.shape != features.shape[1:]:
        raise ValueError(f"previous must be like one of features, got {shapes(previous=previous, features=features)}")
    if candidates is not None and not 1 <= candidates <= modalities:
        raise ValueError(f"candidates must lie in 1..{modalities}, the number of modalities, got {candidates}")
    if present is not None and present.shape != (modalities, n):
        raise ValueError(f"present must be {[modalities, n]}, got {shapes(present=present)}")
    here = features.new_ones(modalities, n, dtype=torch.bool) if present is None else present.bool()
    if present is not None and holds((~here.any(0)).any()):
        raise ValueError("present leaves a sample without a modality")
    able = here & (torch.arange(modalities, device=here.device) < (candidates or modalities))[:, None]
    able = able | (here & ~able.any(0))
    anchor = weighted_sum(features, mean_weights(here, features.dtype))
    anchor = anchor if previous is None else (previous + anchor) / 2
    axes = (1,) if tokens else (1, 2, 3)
    whole = inverse_length(anchor, axes)
    rho = torch.stack([(x * anchor).sum(axes) * inverse_length(x, axes) * whole for x in features.unbind(0)])
    rho = torch.where(here[..., None, None] if tokens else here, rho, 0.0)
    with torch.no_grad():
        goal = weighted_sum(features, rho)
        # Lengths of the goal are the same for all modalities, so they do not change the nearest one.
        near = torch.stack([(x * goal).sum(1) * inverse_length(x, (1,)) for x in features.unbind(0)])
        index = near.masked_fill(~able[..., None, None], -torch.inf).argmax(0)
    share = mean_weights(able, features.dtype)
    share = share[..., None, None] * rho if tokens else share
    if output == "selected":
        share = chosen_modalities(index, modalities) + (share if tokens else share[..., None, None])
    elif output != "mean":
        raise ValueError(f"output must be selected or mean, got {output}")
    return Fusion(weighted_sum(features, share), rho.mean((2, 3)) if tokens else rho, index)
