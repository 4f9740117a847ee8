"""Relations among the tokens of a transformer: attention between them, its diversity, and the most redundant tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, need_word, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group

# A linear map of rows: a module, its weight [width, dim], or weight and bias [width], in order or by name.
Projection = Callable[[Tensor], Tensor] | Mapping[str, Tensor] | Sequence[Tensor] | Tensor


def projected_tokens(
    projection: Projection, tokens: Float[Tensor, "n tokens dim"], width: int
) -> Float[Tensor, "n tokens width"]:
    """Apply a linear map to tokens. Raises ValueError for one that does not give tokens of this width.

    >>> projected_tokens(torch.eye(2), torch.ones(1, 1, 2), 2)
    tensor([[[1., 1.]]])
    """
    if callable(projection) and not isinstance(projection, Tensor):
        projected = projection(tokens)
    else:
        given: Any = projection
        if isinstance(projection, Mapping):
            given = [projection[name] for name in ("weight", "bias") if name in projection]
        parts = (given,) if isinstance(given, Tensor) else tuple(given)
        if not 1 <= len(parts) <= 2 or parts[0].shape != (width, tokens.shape[2]):
            raise ValueError(
                f"projection must be a module, a weight [{width}, {tokens.shape[2]}], or weight and bias, got "
                f"{[list(part.shape) for part in parts]}"
            )
        projected = F.linear(wide(tokens), *map(wide, parts))
    if projected.shape != (*tokens.shape[:2], width):
        raise ValueError(f"projection must give [n, tokens, {width}], got {shapes(projection=projected)}")
    return projected


def log_relations(q: Tensor, k: Tensor) -> Tensor:
    """Compute the logarithm of `token_relations`, without its checks."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).log_softmax(-1)


@full_precision
def token_relations(
    q: Float[Tensor, "n heads tokens d"], k: Float[Tensor, "n heads tokens d"]
) -> Float[Tensor, "n heads tokens tokens"]:
    """Compute R = softmax_j(q_i . k_j / sqrt(d)), whose rows sum to 1. With q = k = v, it is the value relation.

    Args:
        q: queries, or values.
        k: keys, or the same values.

    Raises ValueError for shapes that differ or a head without numbers.

    >>> token_relations(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    tensor([[[[0.5000, 0.5000],
              [0.5000, 0.5000]]]])
    """
    if q.ndim != 4 or q.shape != k.shape or not q.shape[3]:
        raise ValueError(f"q and k must be [n, heads, tokens, d] alike, got {shapes(q=q, k=k)}")
    return log_relations(wide(q), wide(k)).exp()


def kept_count(tokens: int, keep_ratio: float) -> int:
    """Return ceil(keep_ratio * tokens), at least 1, without the rounding error of the product."""
    return max(1, math.ceil(round(keep_ratio * tokens, 9)))


@torch.no_grad()
def drop_redundant_tokens(
    tokens: Float[Tensor, "n tokens dim"],
    keep_ratio: float = 0.7,
    num_prefix: int = 1,
    redundancy: Literal["mean", "max"] = "mean",
) -> Int[Tensor, "n kept"]:
    """Choose the tokens to keep: the prefix tokens, and the ceil(keep_ratio * patches) least redundant patches, in order.

    Args:
        tokens: prefix tokens, then the patches; no gradient.
        keep_ratio: share of the patches to keep, above 0 and at most 1, by default 0.7; at least one patch is kept.
        num_prefix: number of prefix tokens, which are always kept and not compared, by default 1.
        redundancy: a patch's "mean" cosine (default) with the other patches, or its "max". The mean needs no matrix.

    Returns positions in `tokens`, rising. Of equally redundant patches the earlier ones are kept. A zero token has cosine 0.
    Raises ValueError for a share out of range, tokens without a patch, and values that are NaN.

    >>> drop_redundant_tokens(torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]]), 0.6, num_prefix=0)
    tensor([[0, 2]])
    """
    if tokens.ndim != 3 or not 0 <= num_prefix < tokens.shape[1]:
        raise ValueError(
            f"tokens must be [n, num_prefix + patches, dim] with a patch, got {shapes(tokens=tokens)}, {num_prefix=}"
        )
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be above 0 and at most 1, got {keep_ratio}")
    need_word(("mean", "max"), redundancy=redundancy)
    z = F.normalize(wide(tokens[:, num_prefix:].detach()), dim=2, eps=1e-12)
    count = z.shape[1]
    if redundancy == "mean":
        rho = (z * (z.sum(1, keepdim=True) - z)).sum(2) / max(1, count - 1)
    else:
        cosine = z @ z.transpose(1, 2)
        cosine = torch.maximum(cosine, cosine.transpose(1, 2))  # equal both ways, so that mutual neighbours tie
        rho = cosine.diagonal_scatter(z.new_full(z.shape[:2], -math.inf), dim1=1, dim2=2).amax(2)
    if holds(rho.isnan().any()):
        raise ValueError("tokens holds NaN, which cannot be ordered")
    kept = rho.argsort(dim=1, stable=True)[:, : kept_count(count, keep_ratio)].sort(1).values
    prefix = torch.arange(num_prefix, device=tokens.device).expand(len(tokens), -1)
    return torch.cat([prefix, kept + num_prefix], dim=1)


def _attention(attn: Tensor) -> Tensor:
    if attn.ndim < 2 or attn.shape[-1] != attn.shape[-2] or not attn.shape[-1]:
        raise ValueError(f"attn must be [..., tokens, tokens], got {shapes(attn=attn)}")
    return wide(attn)


@full_precision
def attention_distance(
    attn: Float[Tensor, "*heads tokens tokens"], grid: tuple[int, int] | int
) -> Float[Tensor, "*heads"]:
    """Compute each head's mean distance, in patches, between a query and what it attends to.

    Args:
        attn: attention of patches to patches; rows sum to 1.
        grid: number of patches (down, across), or of both if they are equal.

    Raises ValueError if the tokens do not form the grid.

    >>> attention_distance(torch.full((1, 9, 9), 1 / 9), (3, 3))
    tensor([1.4533])
    """
    found = _attention(attn)
    down, across = (grid, grid) if isinstance(grid, int) else grid
    if down * across != found.shape[-1]:
        raise ValueError(f"grid {down} x {across} has not the {found.shape[-1]} tokens of attn")
    place = torch.cartesian_prod(torch.arange(down), torch.arange(across)).to(found)
    distance = (place[:, None] - place).square().sum(2).sqrt()
    return (found * distance).sum(-1).mean(-1)


@full_precision
def attention_nmi(attn: Float[Tensor, "*heads tokens tokens"]) -> Float[Tensor, "*heads"]:
    """Compute each head's normalised mutual information between query and key: 0 for uniform attention, 1 for the identity.

    Args:
        attn: attention; rows sum to 1. With p(i, j) = attn_ij / tokens, it is I / sqrt(H_key H_query), H_query = ln tokens.

    Where every query attends to one and the same key, or there is only one token, the value is 0.

    >>> attention_nmi(torch.stack([torch.eye(4), torch.full((4, 4), 0.25)])).abs()
    tensor([1., 0.])
    """
    found = _attention(attn)
    joint = found / found.shape[-1]
    key = joint.sum(-2)
    information = torch.xlogy(joint, found).sum((-2, -1)) - torch.xlogy(key, key).sum(-1)
    entropies = -torch.xlogy(key, key).sum(-1) * math.log(found.shape[-1])
    tiny = torch.finfo(found.dtype).eps
    return torch.where(entropies <= tiny, 0.0, information / entropies.clamp(min=tiny).sqrt())


@over_group
@full_precision
def relation_distillation_loss(
    student_qkv: Sequence[Float[Tensor, "n heads tokens d"]], teacher_qkv: Sequence[Float[Tensor, "n heads tokens dt"]]
) -> Float[Tensor, ""]:
    """Compute L_rel = KL(R_qk of the teacher || student's) + KL(R_vv of the teacher || student's).

    Args:
        student_qkv: queries, keys and values of the student, all of one shape.
        teacher_qkv: those of the teacher, of as many pictures, heads and tokens; the width of a head may differ. No gradient.

    Returns the mean over pictures, heads and rows; natural logarithm. A relation over a single token is 1: the loss is 0.
    Raises ValueError for shapes that do not fit, and for an empty batch.

    >>> qkv = torch.randn(3, 1, 2, 5, 4)
    >>> relation_distillation_loss(list(qkv), list(qkv))
    tensor(0.)
    """
    for name, parts in (("student_qkv", student_qkv), ("teacher_qkv", teacher_qkv)):
        found = [list(part.shape) for part in parts]
        if len(found) != 3 or any(each != found[0] for each in found) or len(found[0]) != 4 or 0 in found[0][1:]:
            raise ValueError(f"{name} must be three tensors [n, heads, tokens, d] alike, got {found}")
    (q, k, v), (teacher_q, teacher_k, teacher_v) = student_qkv, (part.detach() for part in teacher_qkv)
    if q.shape[:3] != teacher_q.shape[:3]:
        raise ValueError(
            "student_qkv and teacher_qkv must be of the same pictures, heads and tokens, got "
            f"{shapes(student_qkv=q, teacher_qkv=teacher_q)}"
        )
    need_rows(student_qkv=q)
    total = q.new_zeros(len(q), dtype=wide(q).dtype)
    for own, target in (((q, k), (teacher_q, teacher_k)), ((v, v), (teacher_v, teacher_v))):
        wanted = log_relations(*map(wide, target))
        each = F.kl_div(log_relations(*map(wide, own)), wanted, reduction="none", log_target=True)
        total = total + each.sum(-1).mean((1, 2))
    return global_mean(total)
