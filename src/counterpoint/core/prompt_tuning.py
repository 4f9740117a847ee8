"""Tune prompts by few labels without forgetting (PromptSRC: Khattak et al., ICCV 2023, arXiv 2307.06948)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_numbers, need_positive, need_rows, need_within, shapes
from counterpoint.core.distil import kd
from counterpoint.core.distributed import global_mean
from counterpoint.core.operands import EPS
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group


@over_group
@full_precision
def prompt_tuning_loss(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "classes dim"],
    frozen_image: Float[Tensor, "n dim"],
    frozen_text: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " n"],
    logit_scale: float,
    text_weight: float = 25.0,
    image_weight: float = 10.0,
) -> Float[Tensor, ""]:
    """Compute PromptSRC's four terms: cross-entropy, distance of texts, distance of pictures, divergence of the logits.

    Args:
        image, text: embeddings with prompts, normalised here.
        frozen_image, frozen_text: embeddings without prompts, normalised here, without gradient.
        labels: class numbers, 0 to classes - 1.
        logit_scale: factor of cosines, 1 / temperature, > 0.
        text_weight, image_weight: weights of the mean absolute differences, by default 25 and 10.

    The divergence is divided by the number of classes. Raises ValueError for shapes that do not fit, an empty batch, and labels or
    numbers out of range.

    >>> one = torch.eye(2)
    >>> prompt_tuning_loss(one, one, one, one, torch.tensor([0, 1]), 100.0).item()
    0.0
    """
    need_positive(logit_scale=logit_scale)
    need_rows(image=image)
    need_alike("n dim", image=image, frozen_image=frozen_image)
    need_alike("classes dim", text=text, frozen_text=frozen_text)
    if image.shape[1] != text.shape[1] or labels.shape != image.shape[:1]:
        raise ValueError(
            f"text must be [classes, {image.shape[1]}] and labels [n], got {shapes(text=text, labels=labels)}"
        )
    need_within(0, math.inf, text_weight=text_weight, image_weight=image_weight)
    need_numbers(len(text), labels=labels)
    u, w, v, t = (F.normalize(x, dim=1, eps=EPS) for x in (image, text, frozen_image.detach(), frozen_text.detach()))
    logits = logit_scale * u @ w.T
    fitted = global_mean(F.cross_entropy(logits, labels, reduction="none"))
    texts, images = (w - t).abs().mean(), global_mean((u - v).abs().mean(1))
    return fitted + text_weight * texts + image_weight * images + kd(logits, logit_scale * v @ t.T, 1.0) / len(text)


def gaussian_epoch_weights(epochs: int, mean: float = 15.0, std: float = 1.0) -> Float[Tensor, " epochs"]:
    """Compute weights of epochs 1, 2, ..., which sum to 1: a Gaussian around the epoch `mean`.

    Args:
        epochs: number of epochs, at least 1.
        mean: epoch of the largest weight, by default 15.
        std: standard deviation in epochs, > 0, by default 1.

    Raises ValueError for numbers out of range.

    >>> gaussian_epoch_weights(2, mean=1.5)
    tensor([0.5000, 0.5000])
    """
    need_positive(epochs=epochs, std=std)
    return (-0.5 * ((torch.arange(1, epochs + 1) - mean) / std) ** 2).softmax(0)
