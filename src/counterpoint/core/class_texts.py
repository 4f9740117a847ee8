"""Classify rows by the embeddings of the classes' texts, as CLIP does (Radford et al. 2021, arXiv 2103.00020, Sec. 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.operands import EPS
from counterpoint.core.precision import full_precision, wide


@full_precision
def class_prototypes(text_embeddings: Float[Tensor, "classes templates dim"]) -> Float[Tensor, "classes dim"]:
    """Compute the unit mean of each class's unit text embeddings.

    Args:
        text_embeddings: embeddings of each class's texts, not normalised.

    Raises ValueError for another shape, no class, and classes without texts.

    >>> import torch
    >>> class_prototypes(torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]))
    tensor([[0.7071, 0.7071]])
    """
    if text_embeddings.ndim != 3 or not text_embeddings.shape[1]:
        raise ValueError(f"text_embeddings must be [classes, templates, dim], got {list(text_embeddings.shape)}")
    need_rows(text_embeddings=text_embeddings)
    return F.normalize(F.normalize(wide(text_embeddings), dim=2, eps=EPS).mean(1), dim=1, eps=EPS)


@full_precision
def cosine_text_logits(
    features: Float[Tensor, "n dim"], prototypes: Float[Tensor, "classes dim"], scale: float | Float[Tensor, ""]
) -> Float[Tensor, "n classes"]:
    """Compute scale * cos(feature, prototype).

    Args:
        features: rows, normalised here.
        prototypes: unit rows, see `class_prototypes`.
        scale: 1 / temperature, > 0.

    Raises ValueError for widths that differ and an empty batch.

    >>> import torch
    >>> cosine_text_logits(torch.tensor([[2.0, 0.0]]), torch.eye(2), 10.0)
    tensor([[10.,  0.]])
    """
    if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"features and prototypes must have equal widths, got {shapes(features=features, prototypes=prototypes)}"
        )
    need_rows(features=features)
    return scale * (F.normalize(wide(features), dim=1, eps=EPS) @ wide(prototypes).T)
