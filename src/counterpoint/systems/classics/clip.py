"""CLIP: images and texts in one space, each pair told from all other pairings of the batch.

Radford et al.: "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020.

The loss of Figure 3 on the kernel: both directions from one pass over a matrix that is never stored.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from counterpoint.core.contrast import positive_similarity, scaled, wide
from counterpoint.core.distributed import batch_logsumexp, global_mean


def clip(
    image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"], log_scale: Float[Tensor, ""], *, ring: bool = False
) -> Float[Tensor, ""]:
    r"""Symmetric cross-entropy over S = exp(log_scale) I T^T: (CE(S) + CE(S^T)) / 2 with the diagonal as the targets.

    Args:
        image, text: unit rows (they are not normalised here, as in open_clip); row i of one belongs to row i of the other.
        log_scale: learnable log of the inverse temperature, a scalar; the paper starts at ln(1/0.07) and keeps it below ln 100.
        ring: across processes, pass keys round instead of gathering them.

    Across processes the negatives are everybody's. n = 1: the loss is 0. Raises ValueError for shapes that differ.

    >>> import torch
    >>> clip(torch.eye(3), torch.eye(3), torch.tensor(0.0))
    tensor(0.5514)
    """
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"image and text must be [n, dim] alike, got {tuple(image.shape)} and {tuple(text.shape)}")
    query, key = scaled(image, (-log_scale).exp()), wide(text)
    out = batch_logsumexp(query, key, columns=True, ring=ring)
    assert out.columns is not None
    return global_mean((out.rows + out.columns) / 2 - positive_similarity(query, key))
