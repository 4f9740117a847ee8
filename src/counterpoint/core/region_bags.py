"""Compare the regions of two pictures: the best match of each region, and losses of a bag of distributions.

A bag is the set of regions of one picture. Its tensors are [bags, regions, width].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.operands import unit
from counterpoint.core.transforms import once, traced

Pooling = Literal["mean", "attention"]
GLOBAL = 2  # global crops of a picture, the teacher's


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


def attention(features: Float[Tensor, "bags regions dim"], temperature: float = 0.1) -> Float[Tensor, "bags regions"]:
    """Compute softmax_m(cos(f_m, mean of f) / temperature), the weights of regions in attention pooling.

    Args:
        features: features of regions, whose mean is the picture's vector.
        temperature: > 0; default 0.1.

    >>> attention(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    tensor([[0.5000, 0.5000]])
    """
    cosine = (unit(features) * unit(features.mean(1, keepdim=True))).sum(2)
    return (cosine / temperature).softmax(1)


def bag_weights(
    features: Float[Tensor, "bags regions dim"], pooling: Pooling = "mean", temperature: float = 0.1
) -> Float[Tensor, "bags regions"]:
    """Compute the weights of the regions of each bag, which sum to 1.

    Args:
        features: features of regions.
        pooling: "mean" (default) for equal weights, or "attention".
        temperature: > 0, of the attention, by default 0.1.
    """
    if pooling == "attention":
        return attention(features, temperature)
    return features.new_full(features.shape[:2], 1 / features.shape[1])


def divergence(p: Float[Tensor, "*n k"], log_p: Float[Tensor, "*n k"], log_q: Float[Tensor, "*n k"]) -> Tensor:
    """Compute KL(p || q) = sum_k p_k (log p_k - log q_k) of each row, from finite logarithms."""
    return (p * (log_p - log_q)).sum(-1)


def bag_divergence(
    image: Float[Tensor, "bags outcomes"],
    region: Float[Tensor, "bags regions outcomes"],
    features: Float[Tensor, "bags regions dim"],
    pooling: Pooling,
    temperature: float,
    attention_temperature: float = 0.1,
) -> Float[Tensor, " bags"]:
    """Compute KL(beta || softmax(image / t)), where beta is the weighted mean of softmax(region / t) over a bag's regions.

    Args:
        image: logits of pictures.
        region: logits of their regions.
        features: features of the regions, for their weights.
        pooling: see `bag_weights`.
        temperature: t > 0.
        attention_temperature: > 0, of the attention, by default 0.1.
    """
    weight = bag_weights(features, pooling, attention_temperature)
    log_beta = ((region / temperature).log_softmax(2) + weight[..., None].log()).logsumexp(1)
    return divergence(log_beta.exp(), log_beta, (image / temperature).log_softmax(1))


class _Bag(torch.autograd.Function):
    """The two results of `bag_terms`. The backward pass computes the softmaxes again, and adds all gradients in one buffer."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, table: Tensor, number: Tensor, weight: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        cross, mixture = _composed(logits, table, number, weight, temperature)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, table, number, weight, mixture)
        return cross, mixture

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, table, number, weight, mixture = ctx.saved_tensors
        to_cross, to_mixture = gradients
        p = (logits / ctx.temperature).softmax(2)
        scale = to_cross / ctx.temperature
        factor = scale * number.shape[2]
        to_weight = None
        if mixture is None:
            p.mul_(factor[..., None])
        else:
            share = to_mixture / mixture.exp()
            to_weight = torch.bmm(p, share[..., None])[..., 0]
            kept = weight / ctx.temperature
            factor = factor - kept * to_weight
            p.mul_(torch.baddbmm(factor[..., None], kept[..., None], share[:, None]))
        return p.sub_(_gathered(table, number, scale)), None, None, to_weight, None


def _gathered(table: Tensor, number: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sum the rows of the table that belong to each region, [bags, regions, outcomes], times a factor of each region."""
    index = number.flatten(0, 1)
    if traced():
        found = table[index].sum(1)
        return (found if scale is None else found * scale.reshape(-1, 1)).view(*number.shape[:2], -1)
    factors = None if scale is None else scale.reshape(-1, 1).expand(index.shape).contiguous()
    return F.embedding_bag(index, table, mode="sum", per_sample_weights=factors).view(*number.shape[:2], -1)


def _composed(
    logits: Tensor, table: Tensor, number: Tensor, weight: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    p = (logits / temperature).softmax(2)
    log_z = logits.amax(2) / temperature - p.amax(2).log()
    towards = torch.linalg.vecdot(_gathered(table, number), logits) / temperature
    cross = number.shape[2] * log_z - towards
    if weight is None:
        return cross, None
    mixture = torch.bmm(weight[:, None], p)[:, 0]
    return cross, mixture.clamp(min=torch.finfo(p.dtype).tiny).log()


def bag_terms(
    logits: Float[Tensor, "bags regions outcomes"],
    table: Float[Tensor, "rows outcomes"],
    number: Int[Tensor, "bags regions targets"],
    weight: Float[Tensor, "bags regions"] | None,
    temperature: float,
) -> tuple[Float[Tensor, "bags regions"], Float[Tensor, "bags outcomes"] | None]:
    r"""Compute the cross-entropy of every region with its targets, and the logarithm of the bag's mixture.

        cross_m       = -sum_n sum_k table[number_mn]_k log p_mk,    p_m = softmax(logits_m / temperature)
        log beta_k    = log sum_m w_m p_mk

    Args:
        logits: of the regions.
        table: distributions, rows that sum to 1; no gradient.
        number: rows of the table that are the targets of each region, at least one.
        weight: w, at least 0; None: no mixture.
        temperature: > 0.

    For the backward pass only the inputs are kept. beta is at least the smallest normal number. A second derivative raises
    RuntimeError.

    >>> number, weight = torch.zeros(1, 2, 1, dtype=torch.long), torch.full((1, 2), 0.5)
    >>> cross, mixture = bag_terms(torch.zeros(1, 2, 4), torch.full((1, 4), 0.25), number, weight, 1.0)
    >>> cross, mixture.exp()
    (tensor([[1.3863, 1.3863]]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
    """
    table = table.detach()
    if traced():
        return _composed(logits, table, number, weight, temperature)
    found: tuple[Tensor, Tensor | None]
    found = _Bag.apply(once(logits, "a loss of bags of regions"), table, number, weight, temperature)
    return found


def crop_regions(regions: Sequence[int], num_crops: int) -> list[int]:
    """Return the number of regions of each crop, the global ones first.

    Args:
        regions: regions of a global crop and, where there are local crops, of a local one; both positive, or both 0.
        num_crops: crops of a picture, at least 2.

    Raises ValueError for numbers out of range.
    """
    if num_crops < GLOBAL:
        raise ValueError(f"num_crops must be at least 2, the global crops; got {num_crops}")
    found = [int(count) for count in regions]
    if not 1 <= len(found) <= 2 or (num_crops > GLOBAL and len(found) < 2):
        raise ValueError(f"regions must be the regions of a global and of a local crop, got {found}")
    counts = found[:1] * GLOBAL + found[1:] * (num_crops - GLOBAL)
    if min(counts) < 0 or (min(counts) == 0 and max(counts) > 0):
        raise ValueError(f"regions must all be positive, or all 0, got {found}")
    return counts


def need_crop_rows(
    student_cls: Tensor, student_region: Tensor, student_feat: Tensor,
    teacher_cls: Tensor, teacher_region: Tensor, teacher_feat: Tensor, counts: list[int],
) -> None:  # fmt: skip
    """Raise ValueError for a tensor whose rows are not those of the crops and regions."""
    crops = len(counts)
    if student_cls.ndim != 2 or len(student_cls) % crops:
        raise ValueError(f"student_cls must be [{crops} crops of b, outcomes], got {shapes(student_cls=student_cls)}")
    need_rows(student_cls=student_cls)
    b, k = len(student_cls) // crops, student_cls.shape[1]
    rows, teacher_rows, dim = b * sum(counts), b * sum(counts[:GLOBAL]), teacher_feat.shape[-1]
    for name, tensor, wanted in (
        ("student_region", student_region, [rows, k]),
        ("teacher_cls", teacher_cls, [GLOBAL * b, k]),
        ("teacher_region", teacher_region, [teacher_rows, k]),
        ("student_feat", student_feat, [rows, dim]),
        ("teacher_feat", teacher_feat, [teacher_rows, dim]),
    ):
        if list(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {wanted}, got {shapes(**{name: tensor})}")
