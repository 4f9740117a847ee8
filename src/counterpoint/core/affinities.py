r"""Cross-entropy between the softmaxes of two matrices of similarities, a teacher's and a student's, neither of them stored.

    s_ij = q_i . k_j         the student's similarities
    t_ij = tq_i . tk_j       the teacher's
    p_ij = exp(t_ij) / sum_j exp(t_ij)             the soft targets of row i
    log Z_i = log sum_j exp(s_ij)
    loss_i = log Z_i - sum_j p_ij s_ij             the cross-entropy of row i
    d loss_i / d s_ij = exp(s_ij) / Z_i - p_ij

Down the columns both softmaxes run over i. There are two ways, both in parts of the matrices:

    `_PairCrossEntropy`   any direction, any gradient, in the kernel's tiles: 5 products with all tiles kept, 7 with none
    `_FixedKeys`          rows only, where the query alone has a gradient: 3 products, in stripes of whole rows. Two of
                          them are of student and keys, one makes the teacher's similarities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core import chunks, kernel
from counterpoint.core.checks import need_within
from counterpoint.core.chunked_affinities import Pair
from counterpoint.core.exponentials import exp_
from counterpoint.core.kernel import KEEP, Operands, Side, Tile, finite, refused, tile_gradient, tiles
from counterpoint.core.precision import Products, exact, full_precision, products, wide
from counterpoint.core.transforms import traced

# Similarities in a stripe of whole rows: enough rows to a product, even with 65,536 keys.
STRIPE = 2**23


class PairCrossEntropy(NamedTuple):
    """Cross-entropy of every row and, where asked for, of every column, and the entropy of their targets.

    Cross-entropy less entropy is the Kullback-Leibler divergence KL(p || softmax(s)).
    """

    rows: Float[Tensor, " rows"]
    row_entropy: Float[Tensor, " rows"] | None
    columns: Float[Tensor, " columns"] | None
    column_entropy: Float[Tensor, " columns"] | None


class _Mean:
    """Expectation of two values under a softmax whose terms arrive in parts: log Z so far, and both means so far."""

    def __init__(self, like: Tensor, length: int) -> None:
        self.logs = like.new_full((length,), -math.inf)
        self.means = [like.new_zeros(length) for _ in range(2)]

    def add(self, part: slice, logs: Tensor, *means: Tensor, first: bool) -> None:
        """Add entries with this log Z and these means; `first`: there were none before."""
        if first:
            self.logs[part] = logs
            for mean, value in zip(self.means, means, strict=True):
                mean[part] = value
            return
        total = torch.logaddexp(self.logs[part], logs)
        old, new = ((x - finite(total)).exp() for x in (self.logs[part], logs))
        for mean, value in zip(self.means, means, strict=True):
            mean[part] = mean[part] * old + value * new
        self.logs[part] = total


class _Pairs(NamedTuple):
    """A tile of both matrices: the student's similarities s, and exp(x - reference) of the student's and the teacher's."""

    s: Tensor
    student: Tensor
    teacher: Tensor
    references: tuple[Tensor, Tensor]  # scalars

    @staticmethod
    def of(s: Tensor, t: Tensor) -> _Pairs:
        references = s.amax(), t.amax()
        return _Pairs(s, exp_(s - references[0]), exp_(t - references[1]), references)


def _spread(sides: Sequence[Tensor]) -> Tensor:
    """Spread a value for each row, and a second one for each column, over a tile; their sum where there are both."""
    return sides[0][:, None] if len(sides) == 1 else sides[0][:, None] + sides[1]


class _PairCrossEntropy(torch.autograd.Function):
    """The cross-entropies in tiles, with the gradient of all four operands."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor | None,
        columns: bool,
        keep: int,
        share: float,
    ) -> tuple[Tensor | None, ...]:
        student = Operands(query, key)
        teacher = Operands(teacher_query, teacher_query if teacher_key is None else teacher_key)
        n, m = len(query), len(key)
        ctx.columns, ctx.share, ctx.kind = columns, share, student.kind
        if chunks.usable(query):
            pair = Pair(query, key, teacher_query, teacher.key, student.kind)
            of_rows, of_columns = pair.forward(columns)
            ctx.save_for_backward(query, key, teacher_query, teacher_key, of_rows, of_columns)
            out: list[Tensor | None] = []
            for found in (of_rows, of_columns) if of_columns is not None else (of_rows,):
                out += [found[0] - share * found[2], found[1] - found[3]]
            ctx.mark_non_differentiable(*out[1::2])
            return tuple(out + [None] * (4 - len(out)))
        keep = keep if any(ctx.needs_input_grad) else 0
        sides = [(_Mean(query, n), 1)] + ([(_Mean(query, m), 0)] if columns else [])
        logs = [query.new_full((n,), -math.inf)] + ([query.new_full((m,), -math.inf)] if columns else [])
        ctx.kept = []
        with exact(query.device.type):
            for tile in tiles(n, m):
                s, t = student.similarities(tile), teacher.similarities(tile)
                pairs = _Pairs.of(s, t)
                sums = [(pairs.student.sum(dim), pairs.teacher.sum(dim)) for _, dim in sides]
                low = torch.stack([part.min() for both in sums for part in both]).min()
                values = (pairs.teacher * s, pairs.teacher * t) if low > math.exp(-student.reach) else None
                for (mean, dim), log, (sum_s, sum_t) in zip(sides, logs, sums, strict=True):
                    part = tile.rows if dim else tile.columns
                    if values is not None:
                        log_s, log_t = sum_s.log() + pairs.references[0], sum_t.log() + pairs.references[1]
                        means = [value.sum(dim) / sum_t for value in values]
                    else:  # some row lies far below the tile's largest entry: a reference of its own for each
                        log_s, log_t = s.logsumexp(dim), t.logsumexp(dim)
                        p = exp_(t - log_t.unsqueeze(dim))
                        means = [(p * value).sum(dim) for value in (s, t)]
                    first = (tile.columns if dim else tile.rows).start == 0
                    mean.add(part, log_t, *means, first=first)
                    log[part] = log_s if first else torch.logaddexp(log[part], log_s)
                size = 3 * s.numel() * s.element_size()
                fits = values is not None and size <= keep
                ctx.kept.append(pairs if fits else None)
                if fits:
                    keep -= size
                    student.buffer = s.new_empty(0)  # the tile is kept: the next one needs memory of its own
        expected = (mean.means[0] for mean, _ in sides)
        ctx.save_for_backward(
            query, key, teacher_query, teacher_key, *logs, *(mean.logs for mean, _ in sides), *expected
        )
        out = []
        for (mean, _), log in zip(sides, logs, strict=True):
            out += [log - share * mean.means[0], mean.logs - mean.means[1]]
        ctx.mark_non_differentiable(*out[1::2])
        return tuple(out + [None] * (4 - len(out)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, teacher_query, teacher_key, *logs = ctx.saved_tensors
        alike = teacher_key is None
        teacher_key = teacher_query if alike else teacher_key
        if chunks.usable(query):
            pair = Pair(query, key, teacher_query, teacher_key, ctx.kind)
            column = (logs[1], gradients[2]) if ctx.columns else None
            needs = ctx.needs_input_grad
            of_teacher = needs[2] or needs[3]
            wanted = (needs[0], needs[1], of_teacher, of_teacher)
            found = pair.backward((logs[0], gradients[0]), column, ctx.share, wanted)
            if alike:
                found[2] += found[3]
            if torch.is_grad_enabled():
                found = refused(found, (query, key, teacher_query, teacher_key))
            return (
                *found[:2],
                found[2] if of_teacher else None,
                found[3] if of_teacher and not alike else None,
                *[None] * 3,
            )
        student, teacher = Operands(query, key), Operands(teacher_query, teacher_key)
        out = [torch.zeros_like(x) for x in (query, key, teacher_query, teacher_key)]
        if alike:
            out[3] = out[2]
        half = len(logs) // 3
        mine = [Side(log, gradients[2 * i]) for i, log in enumerate(logs[:half])]
        its = [Side(log, -gradients[2 * i] * ctx.share) for i, log in enumerate(logs[half : 2 * half])]
        taught = any(ctx.needs_input_grad[2:4])
        with torch.no_grad(), exact(query.device.type):
            for tile, pairs in zip(tiles(len(query), len(key)), ctx.kept, strict=True):
                r, c = tile.rows, tile.columns
                parts = (r, c)[:half]
                of_s, of_t = ([side[at] for side, at in zip(sides, parts, strict=True)] for sides in (mine, its))
                means = [mean[at] for mean, at in zip(logs[2 * half :], parts, strict=True)]
                if pairs is None:
                    s, t = student.similarities(tile), teacher.similarities(tile)
                    pairs = _Pairs.of(s, t)
                    below = [
                        reference - torch.cat([side.logs for side in sides]).amin()
                        for reference, sides in zip(pairs.references, (of_s, of_t), strict=True)
                    ]
                    if not max(below) < student.reach:
                        # One reference would overflow for some: each direction gets probabilities of its own.
                        p = [side.gradient[:, None] * exp_(t - side.logs[:, None]) for side in of_t[:1]]
                        p += [side.gradient * exp_(t - side.logs) for side in of_t[1:]]
                        pull = p[0] * (s - means[0][:, None]) + (p[1] * (s - means[1]) if ctx.columns else 0)
                        g = sum(p) + tile_gradient(s, of_s[0], of_s[1] if ctx.columns else None, student.reach)
                        pairs = None
                if pairs is not None:
                    share = [side.share(pairs.references[1]) for side in of_t]
                    factor = _spread(share)
                    g = torch.addcmul(
                        pairs.student * _spread([side.share(pairs.references[0]) for side in of_s]),
                        pairs.teacher,
                        factor,
                    )
                    if taught:
                        # An expectation under p moves with t_ij by p_ij (s_ij - the expectation).
                        offset = _spread([part * mean for part, mean in zip(share, means, strict=True)])
                        pull = torch.mul(pairs.s, factor).sub_(offset).mul_(pairs.teacher)
                if ctx.needs_input_grad[0]:
                    out[0][r].addmm_(g, key[c])
                if ctx.needs_input_grad[1]:
                    out[1][c].addmm_(g.T, query[r])
                if taught and alike and len(pull) == len(query) and pull.shape[1] == len(key):
                    out[2].addmm_(pull + pull.T, teacher_key)
                elif taught:
                    out[2][r].addmm_(pull, teacher_key[c])
                    out[3][c].addmm_(pull.T, teacher_query[r])
        if torch.is_grad_enabled():
            out = refused(out, (query, key, teacher_query, teacher_key))
        return *out[:2], out[2] if taught else None, out[3] if taught and not alike else None, *[None] * 3


class _FixedKeys(torch.autograd.Function):
    """Cross-entropy of each row where the query alone has a gradient, and the targets' entropy where it is wanted.

    A stripe of whole rows gives its softmaxes at once. The gradient of row i, without the arriving factor, is a difference. It is
    the mean key under the student's softmax minus the mean key under `share` of the targets: one product gives both.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor, share: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        student, teacher = Operands(query, key), Operands(teacher_query, teacher_key)
        rows, pull = query.new_empty(len(query)), torch.empty_like(query)
        of_targets = torch.empty_like(rows) if entropy else None
        stripes = min(len(query), -(-len(query) * len(key) // STRIPE))
        with exact(query.device.type):
            for number in range(stripes):  # of equal size: a row by itself takes nearly as long as many
                part = slice(len(query) * number // stripes, len(query) * (number + 1) // stripes)
                stripe = Tile(part, slice(0, len(key)), False)
                s = student.similarities(stripe)
                log_q = s.log_softmax(1)
                # log_q = s - log Z, read off the first column.
                log_z = s[:, 0] - log_q[:, 0]
                teacher.buffer = student.buffer  # s is no longer needed, and its memory is in the cache
                t = teacher.similarities(stripe)
                if of_targets is None:
                    p = t.softmax(1)
                else:
                    log_p = t.log_softmax(1)
                    p = log_p.exp()
                    of_targets[part] = -torch.linalg.vecdot(p, log_p)
                # The part of the cross-entropy without `share` is log Z itself.
                rows[part] = (1 - share) * log_z - share * torch.linalg.vecdot(p, log_q)
                torch.mm(exp_(log_q).sub_(p, alpha=share), key, out=pull[part])
        ctx.save_for_backward(query, pull)
        if of_targets is not None:
            ctx.mark_non_differentiable(of_targets)
        return rows, of_targets

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, pull = ctx.saved_tensors
        to_query = gradients[0][:, None] * pull
        if torch.is_grad_enabled():
            (to_query,) = refused((to_query,), (query,))
        return to_query, *[None] * 5


@full_precision
def pair_cross_entropy(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    teacher_query: Float[Tensor, "rows teacher_dim"],
    teacher_key: Float[Tensor, "columns teacher_dim"] | None = None,
    *,
    columns: bool = False,
    teacher_gradient: bool = False,
    share: float = 1.0,
    entropy: bool = True,
    keep: int = KEEP,
    precision: Products | Literal["auto"] = "auto",
) -> PairCrossEntropy:
    r"""Compute cross-entropies between row softmaxes of two matrices of similarities, the teacher's and the student's.

    Neither matrix is held in memory.

        rows_i = -sum_j p_ij log softmax_j(q_i . k_j),      p_i = softmax_j(tq_i . tk_j)

    Affinity mimicking, momentum targets (ALBEF) and off-diagonal distillation (Mod-X) are of this form. Subtract
    `row_entropy` for the KL divergence. Temperatures: see `core.operands.scaled`. Where key and teacher have no gradient,
    rows cost two products with the keys, and one for the teacher's similarities.

    Args:
        query, key: the student's operands; float64, float32, or a half precision (then computed in float32).
        teacher_query, teacher_key: the teacher's; teacher_key None compares teacher_query with itself.
        columns: compute the same over the columns of both, in the same pass; default no.
        teacher_gradient: whether the teacher gets the gradient of the cross-entropies; default no. Entropies have none.
        share: 0 to 1, share of the target mass in the soft targets: rows_i = log Z_i - share sum_j p_ij s_ij. For
            a mixture with hard targets, subtract (1 - share) times the positive's similarity. Default 1: all of it.
        entropy: whether to compute the entropies; without them `row_entropy` may be None. Default yes.
        keep: bytes of intermediate results to keep for the backward pass; see `core.contrast.pair_logsumexp`.
        precision: type of the products on a GPU; see there. Default "auto".

    Raises ValueError for shapes that do not fit. Differentiating twice raises RuntimeError, except for the smallest matrices.

    >>> x = torch.eye(3)
    >>> out = pair_cross_entropy(x, x, x, x)
    >>> torch.allclose(out.rows, out.row_entropy)
    True
    """
    shapes = [
        tuple(x.shape) for x in (query, key, teacher_query, teacher_query if teacher_key is None else teacher_key)
    ]
    if (
        any(len(shape) != 2 for shape in shapes)
        or shapes[0][1] != shapes[1][1]
        or shapes[2][1] != shapes[3][1]
        or (shapes[0][0], shapes[1][0]) != (shapes[2][0], shapes[3][0])
    ):
        raise ValueError(
            f"query, key, teacher_query and teacher_key must agree in rows, columns and widths, got {shapes}"
        )
    if 0 in shapes[0] or 0 in shapes[1]:
        raise ValueError(f"query and key must not be empty, got {shapes[:2]}")
    need_within(0, 1, share=share)
    query, key = wide(query), wide(key)
    teacher: list[Tensor | None] = [
        None if x is None else (x if teacher_gradient else x.detach()).to(query.dtype)
        for x in (teacher_query, teacher_key)
    ]
    if traced() or len(query) * len(key) <= (chunks.SMALL if chunks.usable(query) else kernel.SMALL):
        of, against = teacher[0], teacher[0] if teacher[1] is None else teacher[1]
        assert of is not None
        assert against is not None
        s, t = query @ key.T, of @ against.T

        def along(dim: int) -> tuple[Tensor, Tensor]:
            soft = -(t.softmax(dim) * s.log_softmax(dim)).sum(dim)
            mixed = soft if share == 1 else (1 - share) * s.logsumexp(dim) + share * soft
            return mixed, -(t.detach().softmax(dim) * t.detach().log_softmax(dim)).sum(dim)

        return PairCrossEntropy(*along(1), *(along(0) if columns else (None, None)))
    if not columns and not chunks.usable(query) and kernel.fixed(query, key, *[x for x in teacher if x is not None]):
        against = teacher[0] if teacher[1] is None else teacher[1]
        rows, row_entropy = _FixedKeys.apply(query, key, teacher[0], against, share, entropy)
        return PairCrossEntropy(rows, row_entropy, None, None)
    with products(precision):
        return PairCrossEntropy(*_PairCrossEntropy.apply(query, key, *teacher, columns, keep, share))
