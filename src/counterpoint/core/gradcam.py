"""Grad-CAM on attention: which keys the queries attended to where that raised a score.

Selvaraju et al.: "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", arXiv 1610.02391.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def attention_maps(
    attention: Float[Tensor, "n heads queries keys"],
    gradient: Float[Tensor, "n heads queries keys"],
    owners: Float[Tensor, "n groups queries"],
) -> Float[Tensor, "n groups keys"]:
    """Average attention x max(gradient, 0) over the heads and over the queries of a group.

    Args:
        attention: probabilities of one layer.
        gradient: of a score with respect to them.
        owners: 1 where a query belongs to a group (a token to a word), else 0.

    Maps are not negative, in units of the score. A group without queries has a map of zeros.

    >>> import torch
    >>> attention_maps(torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[[1.0, -1.0], [3.0, 0.0]]]]), torch.ones(1, 1, 2))
    tensor([[[1., 0.]]])
    """
    cam = (attention.detach() * gradient.clamp(min=0)).mean(1)
    return owners @ cam / owners.sum(2, keepdim=True).clamp(min=1)
