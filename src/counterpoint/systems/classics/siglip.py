"""SigLIP: every pairing of an image and a text judged on its own by a sigmoid, no softmax over the batch.

Zhai, Mustafa, Kolesnikov, Beyer: "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv 2303.15343.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from counterpoint.core.contrast import pair_softplus, positive_similarity, scaled, wide, with_bias
from counterpoint.core.distributed import gather_rows, global_mean


def siglip(
    image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"], log_scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    r"""Sigmoid loss (Eq. 1): (1/n) sum_ij softplus(-y_ij (exp(log_scale) I_i . T_j + bias)), y = 1 on the diagonal, else -1.

    Args:
        image, text: unit rows (not normalised here); row i of one belongs to row i of the other.
        log_scale, bias: learnable scalars; the paper starts at ln 10 and -10.

    The sum over all pairs is divided by n, not n^2. Across processes the negatives are everybody's.
    Raises ValueError for shapes that differ.

    >>> import torch
    >>> siglip(torch.eye(2), torch.eye(2), torch.tensor(0.0), torch.tensor(0.0))
    tensor(1.0064)
    """
    if image.shape != text.shape or image.ndim != 2:
        raise ValueError(f"image and text must be [n, dim] alike, got {tuple(image.shape)} and {tuple(text.shape)}")
    query, key = scaled(image, (-log_scale).exp()), wide(text)
    own = positive_similarity(query, key) + bias
    # softplus(-s) = softplus(s) - s turns the diagonal's positives into negatives like all others, less their logits.
    query, key = with_bias(query, key, row=bias.expand(len(query)))
    return global_mean(pair_softplus(query, gather_rows(key)) - own)
