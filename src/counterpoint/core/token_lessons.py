"""Teach tokens: neuron selectivity transfer, and contrasts of a student's tokens with a teacher's.

Sources: NST (Huang and Wang, arXiv 1707.01219) and CRD (Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699). VidLanKD takes both to
tokens (Tang, Cho, Tan, Bansal, NeurIPS 2021, arXiv 2107.02681).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_rows, need_word, shapes
from counterpoint.core.contrast import pair_softplus, softplus
from counterpoint.core.distributed import gather_rows, global_mean, mean_of_total, place
from counterpoint.core.nt_xent import nt_xent
from counterpoint.core.operands import EPS, positive_similarity, scaled, unit, with_bias
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import alone, over_group, world

FEW = 256  # rows of a position up to which one product of matrices is faster than the kernel
Mask = Bool[Tensor, "n tokens"] | Int[Tensor, "n tokens"] | Float[Tensor, "n tokens"]


def real_tokens(mask: Mask | None, tokens: Tensor) -> Bool[Tensor, "n tokens"]:
    """Return the mask as bool; None: all tokens."""
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"mask must be [n, tokens] = {list(tokens.shape[:2])}, got {shapes(mask=mask)}")
    return mask != 0


def _neurons(tokens: Tensor, real: Tensor) -> Float[Tensor, "n tokens dim"]:
    """Normalise tokens, then each neuron over the positions of its sentence; padding is 0."""
    return F.normalize(unit(tokens) * real[..., None], dim=1, eps=EPS)


@over_group
@full_precision(keep=("mask",))
def nst_loss(
    student_tokens: Float[Tensor, "n tokens dim"],
    teacher_tokens: Float[Tensor, "n tokens teacher_dim"],
    mask: Mask | None = None,
    reduction: str = "sum",
) -> Float[Tensor, ""]:
    r"""Compare neurons by their activations over a sentence: a maximum mean discrepancy with a kernel of degree 2 (Eq. 4).

    Let S and R have a row of length 1 for each neuron of student and teacher, over positions. A sentence's term is

        mean_{d,d'} (S_d . S_d')^2 - 2 mean_{d,d'} (S_d . R_d')^2

    divided by its number of tokens. The teacher's own term is constant and left out, so values may be negative.

    Args:
        student_tokens: of any norm; tokens are normalised here.
        teacher_tokens: likewise, of any width; no gradient.
        mask: not 0 at tokens, 0 at padding; default: all are tokens.
        reduction: "sum" over sentences (the authors', default) or "mean".

    Memory is O(n m^2), m being the smaller of positions and width. A sentence without tokens and a neuron without activation
    count 0. Raises ValueError for shapes that do not fit, an empty batch and an unknown reduction.
    Source of the distance: NST, arXiv 1707.01219.

    >>> x = torch.eye(2)[None]
    >>> nst_loss(x, x)
    tensor(-0.2500)
    """
    need_tokens(student_tokens, teacher_tokens)
    need_word(("sum", "mean"), reduction=reduction)
    real = real_tokens(mask, student_tokens)
    s = _neurons(wide(student_tokens), real)
    r = _neurons(wide(teacher_tokens.detach()), real).to(s.dtype)
    d, of_teacher = s.shape[2], r.shape[2]
    # sum_{d,d'} (S_d . R_d')^2 = <S^T S, R^T R>, whichever of positions and neurons is fewer.
    if s.shape[1] <= min(d, of_teacher):
        own = s @ s.mT
        values = (own * (own / d**2 - r @ r.mT * (2 / (d * of_teacher)))).sum((1, 2))
    else:
        values = (s.mT @ s).square().sum((1, 2)) / d**2 - (s.mT @ r).square().sum((1, 2)) * (2 / (d * of_teacher))
    values = values / real.sum(1).clamp(min=1)
    return global_mean(values) if reduction == "mean" else mean_of_total(values.sum(), 1)


@over_group
@full_precision
def ntxent_pair(a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"], temperature: float = 1.0) -> Float[Tensor, ""]:
    r"""Compute NT-Xent of n pairs, divided by the number of rows 2n once more, as the authors' code.

    Args:
        a, b: paired rows of any norm; normalised here.
        temperature: > 0, by default 1.

    One pair has no negatives, and its loss is 0. Raises ValueError for shapes that do not fit and an empty batch.
    Relations: SimCLR's `nt_xent`, divided by 2n.

    >>> ntxent_pair(torch.eye(2), torch.eye(2))
    tensor(0.1379)
    """
    need_alike("n dim", a=a, b=b)
    total = place(len(a), a.device).total
    return nt_xent(a, b, temperature) / (2 * total)


def _contrasts(
    a: Float[Tensor, "positions n dim"],
    b: Float[Tensor, "positions n dim"],
    real: Bool[Tensor, "positions n"],
    temperature: float,
) -> Float[Tensor, " positions"]:
    """Compute `ntxent_pair` at each position, over its real rows; 0 where there is none."""
    if 2 * a.shape[1] > FEW:
        with alone():
            found = [
                ntxent_pair(x[r], y[r], temperature) if bool(r.any()) else x.sum() * 0
                for x, y, r in zip(a, b, real, strict=True)
            ]
        return torch.stack(found) if found else a.sum((1, 2))
    z = torch.cat([unit(a), unit(b)], 1)
    there = torch.cat([real, real], 1)
    s = (z @ z.mT) / temperature
    # A row is never its own key, and padding is never a key. Padding keeps one key, so that nothing becomes NaN.
    hidden = ~there[:, None] | torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    positive = s.diagonal(a.shape[1], 1, 2).repeat(1, 2)
    rows = torch.where(there, s.masked_fill(hidden & there[..., None], -torch.inf).logsumexp(2) - positive, 0)
    return rows.sum(1) / there.sum(1).clamp(min=1).square()


@over_group
@full_precision(keep=("mask",))
def token_contrastive_loss(
    student_tokens: Float[Tensor, "n tokens dim"],
    teacher_tokens: Float[Tensor, "n tokens dim"],
    temperature: float = 1.0,
    mask: Mask | None = None,
) -> Float[Tensor, ""]:
    r"""Contrast the sentences of a batch at each position, and average `ntxent_pair` over positions (the code's CRD).

    Args:
        student_tokens: of any norm; normalised here.
        teacher_tokens: of the same width; no gradient.
        temperature: > 0, by default 1.
        mask: not 0 at tokens, 0 at padding; default: all are tokens. A position compares the sentences that reach it.

    A position without tokens is left out of the mean. A batch of one sentence has no negatives, and its loss is 0. Equal
    sentences are false negatives of each other. Up to 128 sentences the products of a position are one matrix; larger
    batches take the kernel, whose memory is linear. Processes share the positions. Raises ValueError for shapes that do
    not fit, an empty batch and a temperature that is not positive.

    >>> x = torch.eye(2)[:, None]
    >>> token_contrastive_loss(x, x)
    tensor(0.1379)
    """
    need_tokens(student_tokens, teacher_tokens)
    need_alike("n tokens dim", student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    need_positive(temperature=temperature)
    real = gather_rows(real_tokens(mask, student_tokens))
    a, b = gather_rows(wide(student_tokens)), gather_rows(wide(teacher_tokens.detach()))
    rank, size = world()
    used = real.any(0)
    mine = slice(rank, None, size)
    found = _contrasts(a.transpose(0, 1)[mine], b.to(a.dtype).transpose(0, 1)[mine], real.T[mine], temperature)
    return mean_of_total(found.sum(), max(1, int(used.sum())))


@over_group
@full_precision(keep=("mask", "bank"))
def token_crd_loss(
    student_tokens: Float[Tensor, "n tokens dim"],
    teacher_tokens: Float[Tensor, "n tokens dim"],
    bank: Float[Tensor, "negatives dim"],
    temperature: float = 0.07,
    size: int | None = None,
    mask: Mask | None = None,
) -> Float[Tensor, ""]:
    r"""Tell a token's teacher from negatives of a memory bank, one by one: the paper's contrast (CRD), averaged over tokens.

    Let s be the cosine divided by the temperature. With n negatives of M rows, and p(s) = e^s / (e^s + n / M):

        -log p(s_positive) - sum_k log (1 - p(s_k))

    Args:
        student_tokens, teacher_tokens: of any norm and one width; normalised here. The teacher's get no gradient.
        bank: rows of the bank that serve as negatives, of any norm; no gradient.
        temperature: > 0, by default 0.07.
        size: M, number of rows of the whole bank; default: all rows are negatives.
        mask: not 0 at tokens, 0 at padding; default: all are tokens.

    Without any token the loss is 0. Memory is linear in tokens and negatives. Raises ValueError for shapes that do not fit.
    Raises it too for an empty batch or bank, and a size below the number of negatives.
    Source: CRD, arXiv 1910.10699, Eq. 17 and 18.

    >>> x = torch.eye(2)[None]
    >>> token_crd_loss(x, x, torch.eye(2), temperature=1.0)
    tensor(2.3197)
    """
    need_tokens(student_tokens, teacher_tokens)
    need_alike("n tokens dim", student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    need_rows(bank=bank)
    need_positive(temperature=temperature)
    if bank.ndim != 2 or bank.shape[1] != student_tokens.shape[2]:
        raise ValueError(f"bank must be [negatives, {student_tokens.shape[2]}], got {shapes(bank=bank)}")
    if size is not None and size < len(bank):
        raise ValueError(f"size must be at least the number of negatives {len(bank)}, got {size}")
    real = real_tokens(mask, student_tokens)
    a, b = unit(wide(student_tokens)[real]), unit(wide(teacher_tokens.detach())[real])
    shift = torch.full((len(a),), math.log(len(bank) / (size or len(bank))), dtype=a.dtype, device=a.device)
    query = scaled(a, temperature)
    own = positive_similarity(query, b.to(a.dtype)) - shift
    query, key = with_bias(query, unit(wide(bank.detach())).to(a.dtype), row=-shift)
    return global_mean(softplus(-own) + pair_softplus(query, key))


def need_tokens(student_tokens: Tensor, teacher_tokens: Tensor) -> None:
    """Raise ValueError for an empty batch, and for other shapes than [n, tokens, dim] of the same n and tokens."""
    need_rows(student_tokens=student_tokens, teacher_tokens=teacher_tokens)
    if student_tokens.ndim != 3 or teacher_tokens.ndim != 3 or student_tokens.shape[:2] != teacher_tokens.shape[:2]:
        raise ValueError(
            "student_tokens and teacher_tokens must be [n, tokens, dim] of the same n and tokens, got "
            + shapes(student_tokens=student_tokens, teacher_tokens=teacher_tokens)
        )
