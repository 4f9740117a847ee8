"""Compare the regions of two pictures: the best match of each region, and losses of a bag of distributions.

A bag is the set of regions of one picture. Its tensors are [bags, regions, width].
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.operands import unit
from counterpoint.core.transforms import once, traced


@torch.no_grad()
def matched_regions(
    student: Float[Tensor, "bags regions dim"], teacher: Float[Tensor, "bags others dim"]
) -> tuple[Float[Tensor, "bags regions"], Int[Tensor, "bags regions"]]:
    """Find the teacher's region with the largest product for each of the student's regions, in the same bag.

    Args:
        student, teacher: features of regions, at least one; unit rows give cosines.

    Returns the product and the number of the region; among equal products, any.

    >>> _, number = matched_regions(torch.eye(2)[None], torch.eye(2).flip(0)[None])
    >>> number
    tensor([[1, 0]])
    """
    best, number = torch.bmm(student, teacher.transpose(1, 2)).max(2)
    return best, number


def log_attention(
    features: Float[Tensor, "bags regions dim"], temperature: float = 0.1
) -> Float[Tensor, "bags regions"]:
    """Compute log softmax_m(cos(f_m, mean of f) / temperature), the weights of regions in attention pooling.

    Args:
        features: features of regions, whose mean is the picture's vector.
        temperature: > 0; default 0.1.

    >>> log_attention(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])).exp()
    tensor([[0.5000, 0.5000]])
    """
    cosine = (unit(features) * unit(features.mean(1, keepdim=True))).sum(2)
    return (cosine / temperature).log_softmax(1)


class _Bag(torch.autograd.Function):
    """The two results of `bag_terms`. The backward pass computes the softmaxes again, and adds all gradients in one buffer."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, select: Tensor, log_weight: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        log_z, cross, mixture = _composed(logits, targets, select, log_weight, temperature)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, targets, select, log_weight, log_z, mixture)
        return cross, mixture

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, select, log_weight, log_z, mixture = ctx.saved_tensors
        to_cross, to_mixture = gradients
        to_z = to_cross * select.sum(2)
        to_weight = None
        found = (logits / ctx.temperature).sub_(log_z[..., None])
        if mixture is None:
            found.exp_().mul_(to_z[..., None])
        else:
            # A region's share of the mixture, times the arriving gradient.
            shared = (found + (log_weight[..., None] - mixture[:, None])).exp_().mul_(to_mixture[:, None])
            to_weight = shared.sum(2)
            found.exp_().mul_((to_z - to_weight)[..., None]).add_(shared)
        found.baddbmm_(select * to_cross[..., None], targets, alpha=-1).div_(ctx.temperature)
        return found, None, None, to_weight, None


def _composed(
    logits: Tensor, targets: Tensor, select: Tensor, log_weight: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = logits / temperature
    log_z = x.logsumexp(2)
    towards = torch.bmm(x, targets.transpose(1, 2)) * select
    cross = log_z * select.sum(2) - towards.sum(2)
    mixture = None if log_weight is None else (x + (log_weight - log_z)[..., None]).logsumexp(1)
    return log_z, cross, mixture


def bag_terms(
    logits: Float[Tensor, "bags regions outcomes"],
    targets: Float[Tensor, "bags others outcomes"],
    select: Float[Tensor, "bags regions others"],
    log_weight: Float[Tensor, "bags regions"] | None,
    temperature: float,
) -> tuple[Float[Tensor, "bags regions"], Float[Tensor, "bags outcomes"] | None]:
    r"""Compute the cross-entropy of every region with its targets, and the logarithm of the bag's mixture.

        cross_m       = -sum_n select_mn sum_k targets_nk log p_mk,    p_m = softmax(logits_m / temperature)
        log beta_k    = log sum_m w_m p_mk

    Args:
        logits: of the regions.
        targets: distributions, rows that sum to 1; no gradient.
        select: weight of each target for each region, such as 1 for its match and 0 elsewhere; no gradient.
        log_weight: log w, finite; None: no mixture.
        temperature: > 0.

    A selected target is never copied: its products with all regions of the bag are computed, then selected. For the
    backward pass only the inputs are kept. beta has no zeros under the logarithm. A second derivative raises RuntimeError.

    >>> uniform = torch.full((1, 1, 4), 0.25)
    >>> cross, mixture = bag_terms(torch.zeros(1, 2, 4), uniform, torch.ones(1, 2, 1), torch.full((1, 2), 0.5).log(), 1.0)
    >>> cross, mixture.exp()
    (tensor([[1.3863, 1.3863]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """
    targets, select = targets.detach(), select.detach()
    if traced():
        return _composed(logits, targets, select, log_weight, temperature)[1:]
    found: tuple[Tensor, Tensor | None]
    found = _Bag.apply(once(logits, "a loss of bags of regions"), targets, select, log_weight, temperature)
    return found
