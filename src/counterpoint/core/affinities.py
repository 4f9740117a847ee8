"""Two matrices of similarities, a teacher's and a student's, neither of which is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core import kernel
from counterpoint.core.kernel import KEEP, Operands, Side, finite, pulled, refused, tiles
from counterpoint.core.precision import exact, full_precision, wide
from counterpoint.core.transforms import traced


class PairCrossEntropy(NamedTuple):
    """Of every row (and, where asked for, column): -sum_j p_ij log softmax_j(s_ij), and the target's entropy.

    cross_entropy - entropy is the Kullback-Leibler divergence KL(p || softmax(s)).
    """

    rows: Float[Tensor, " rows"]
    row_entropy: Float[Tensor, " rows"]
    columns: Float[Tensor, " columns"] | None
    column_entropy: Float[Tensor, " columns"] | None


class _Mean:
    """A running expectation under a softmax whose terms arrive in parts: log Z and the mean of each of several values."""

    def __init__(self, like: Tensor, length: int) -> None:
        self.logs = like.new_full((length,), -math.inf)
        self.means = [like.new_zeros(length) for _ in range(2)]

    def add(self, part: slice, logs: Tensor, *means: Tensor, first: bool) -> None:
        """log Z of the entries that come, and their means; `first`: there were none before."""
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
    """A tile of both matrices: the student's similarities, and exp(x - reference) of the student's and the teacher's."""

    s: Tensor
    student: Tensor
    teacher: Tensor
    references: tuple[Tensor, Tensor]  # scalars

    @staticmethod
    def of(s: Tensor, t: Tensor) -> _Pairs:
        references = s.amax(), t.amax()
        return _Pairs(s, (s - references[0]).exp_(), (t - references[1]).exp_(), references)


def _spread(sides: Sequence[Tensor]) -> Tensor:
    """A value for each row and, if there is another, for each column, added up over the tile."""
    return sides[0][:, None] if len(sides) == 1 else sides[0][:, None] + sides[1]


class _PairCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor | None,
        columns: bool,
        keep: int,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        student = Operands(query, key)
        teacher = Operands(teacher_query, teacher_query if teacher_key is None else teacher_key)
        n, m = len(query), len(key)
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
                        p = (t - log_t.unsqueeze(dim)).exp_()
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
        ctx.columns = columns
        expected = (mean.means[0] for mean, _ in sides)
        ctx.save_for_backward(
            query, key, teacher_query, teacher_key, *logs, *(mean.logs for mean, _ in sides), *expected
        )
        out: list[Tensor | None] = []
        for (mean, _), log in zip(sides, logs, strict=True):
            out += [log - mean.means[0], mean.logs - mean.means[1]]
        ctx.mark_non_differentiable(*out[1::2])
        return tuple(out + [None] * (4 - len(out)))  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, teacher_query, teacher_key, *logs = ctx.saved_tensors
        alike = teacher_key is None
        teacher_key = teacher_query if alike else teacher_key
        student, teacher = Operands(query, key), Operands(teacher_query, teacher_key)
        out = [torch.zeros_like(x) for x in (query, key, teacher_query, teacher_key)]
        if alike:
            out[3] = out[2]
        half = len(logs) // 3
        mine = [Side(log, gradients[2 * i]) for i, log in enumerate(logs[:half])]
        its = [Side(log, -gradients[2 * i]) for i, log in enumerate(logs[half : 2 * half])]
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
                        p = [side.gradient[:, None] * (t - side.logs[:, None]).exp() for side in of_t[:1]]
                        p += [side.gradient * (t - side.logs).exp() for side in of_t[1:]]
                        pull = p[0] * (s - means[0][:, None]) + (p[1] * (s - means[1]) if ctx.columns else 0)
                        g = sum(p) + pulled(s, of_s[0], of_s[1] if ctx.columns else None, student.reach)
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
                out[0][r].addmm_(g, key[c])
                out[1][c].addmm_(g.T, query[r])
                if taught and alike and len(pull) == len(query) and pull.shape[1] == len(key):
                    out[2].addmm_(pull + pull.T, teacher_key)
                elif taught:
                    out[2][r].addmm_(pull, teacher_key[c])
                    out[3][c].addmm_(pull.T, teacher_query[r])
        if torch.is_grad_enabled():
            out = refused(out, (query, key, teacher_query, teacher_key))
        return *out[:2], out[2] if taught else None, out[3] if taught and not alike else None, None, None


@full_precision
def pair_cross_entropy(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    teacher_query: Float[Tensor, "rows teacher_dim"],
    teacher_key: Float[Tensor, "columns teacher_dim"] | None = None,
    *,
    columns: bool = False,
    teacher_gradient: bool = False,
    keep: int = KEEP,
) -> PairCrossEntropy:
    r"""Cross-entropy between the row softmaxes of two matrices of similarities, teacher's and student's, without either.

        rows_i = -sum_j p_ij log softmax_j(q_i . k_j),      p_i = softmax_j(tq_i . tk_j)

    and with `columns` the same down the columns of both, in one pass. `teacher_key` None: the teacher's matrix is of its
    query with itself. Temperatures: see `scaled`. The teacher gets no gradient, or with `teacher_gradient` that of the
    cross-entropies (the entropies never have one). Subtract `row_entropy` for the KL divergence; alpha-mixtures with hard
    targets are mixtures of this and the plain loss. Affinity mimicking, momentum targets (ALBEF) and off-diagonal
    distillation (Mod-X) are of this form. `keep`: see `pair_logsumexp`.

    Raises ValueError for shapes that do not fit. Differentiating twice raises RuntimeError, but for the smallest matrices.

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
    query, key = wide(query), wide(key)
    teacher: list[Tensor | None] = [
        None if x is None else (x if teacher_gradient else x.detach()).to(query.dtype)
        for x in (teacher_query, teacher_key)
    ]
    if traced() or len(query) * len(key) <= kernel.SMALL:
        of, against = teacher[0], teacher[0] if teacher[1] is None else teacher[1]
        assert of is not None
        assert against is not None
        s, t = query @ key.T, of @ against.T
        found: list[Tensor | None] = []
        for dim in (1, 0)[: 1 + columns]:
            found.append(-(t.softmax(dim) * s.log_softmax(dim)).sum(dim))
            found.append(-(t.detach().softmax(dim) * t.detach().log_softmax(dim)).sum(dim))
        return PairCrossEntropy(*found, *[None] * (4 - len(found)))  # type: ignore[arg-type]
    return PairCrossEntropy(*_PairCrossEntropy.apply(query, key, *teacher, columns, keep))
