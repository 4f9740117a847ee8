"""Triton kernels: one tile of the matrix of similarities from the product to its sums, and from the product to its gradient.

`core.chunks` launches them; it also explains the chunks. Legend, besides that of `core.kernel`:

    R, N         rows of a chunk, and of the whole query
    i, j         row of the chunk and column, as vectors of a tile's numbers
    log          log-sum-exp of the tile's part of a row (a column)
    reference    largest similarity of a tile
    spoilt       a tile in which one reference does not do for all rows and columns: some sum underflows

A program makes one tile. It never adds to what another program wrote, so results do not depend on the order of programs.
Without a GPU, TRITON_INTERPRET=1 runs the same kernels in numpy.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Ways to get the similarities of a tile.
PRODUCT, STORED, EXPONENTIALS = (tl.constexpr(value) for value in (0, 1, 2))
# Functions of a similarity that are summed: exp(s) of a softmax, log(1 + exp(s)) of pairs judged one by one.
EXP, SOFTPLUS = (tl.constexpr(value) for value in (0, 1))
NO_LABELS, NOT_OWN_LABEL, OWN_LABEL_ONLY = (tl.constexpr(value) for value in (0, 1, 2))


@triton.jit
def _place(R, M, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BAND: tl.constexpr):
    """Return this program's tile (row and column number) and its rows and columns; neighbours share operands in the cache."""
    number = tl.program_id(0)
    high, broad = tl.cdiv(R, BLOCK_R), tl.cdiv(M, BLOCK_M)
    first = number // (BAND * broad) * BAND
    height = min(high - first, BAND)
    within = number % (BAND * broad)
    row, column = first + within % height, within // height
    return row, column, row * BLOCK_R + tl.arange(0, BLOCK_R), column * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def _product(query, key, i, j, R, M, D, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Return s = q k^T of a tile, summed in float32."""
    s = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    left = query + i.to(tl.int64)[:, None] * D
    right = key + j.to(tl.int64)[None, :] * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(left + d[None, :], mask=(i < R)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(right + d[:, None], mask=(j < M)[None, :] & (d < D)[:, None], other=0.0)
        s = tl.dot(a, b, s, input_precision=PRECISION)
    return s


@triton.jit
def _excluded(s, i, j, R, M, row, column, offset_0, offset_1, offset_2, pairs, pair_offset, row_label, column_label, added,
              OFFSETS: tl.constexpr, VIEWS: tl.constexpr, LABELS: tl.constexpr, ADDED: tl.constexpr,
              UPPER: tl.constexpr):  # fmt: skip
    """Apply the rules: set excluded pairs, and places outside the matrix, to -inf, and add the logs of the weights.

    `row` and `column` are the positions of the chunk's first row and column in the whole matrix.
    """
    out = (i >= R)[:, None] | (j >= M)[None, :]
    # Position of each pair's column, seen from the diagonal.
    off = (j + column)[None, :] - (i + row)[:, None]
    if OFFSETS > 0:
        out |= off == offset_0
    if OFFSETS > 1:
        out |= off == offset_1
    if OFFSETS > 2:
        out |= off == offset_2
    if VIEWS:
        place = (i + row)[:, None]
        other = tl.where(place < pairs, pairs, -pairs)
        out |= (off == pair_offset) | ((off == pair_offset + other) & (place < 2 * pairs))
    if LABELS != NO_LABELS:
        mine = tl.load(row_label + i, mask=i < R, other=0)
        its = tl.load(column_label + j, mask=j < M, other=0)
        equal = mine[:, None] == its[None, :]
        if LABELS == NOT_OWN_LABEL:
            out |= equal
        else:
            out |= equal == 0
    if UPPER:
        out |= (j[None, :] - i[:, None]) < 0
    if ADDED:
        s += tl.load(added + i.to(tl.int64)[:, None] * M + j[None, :], mask=out == 0, other=0.0).to(tl.float32)
    return tl.where(out, float("-inf"), s)


@triton.jit
def _exp(x):
    """Return exp(x) by one multiplication and one instruction; `tl.exp` takes five. Results below 1e-38 are 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _log(x, FAST: tl.constexpr):
    """Return log(x) to 2e-7; FAST takes two instructions in place of 27. The logs of a tile's columns stand in many threads."""
    if FAST:
        return (
            tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1) * 0.6931471805599453
        )
    return tl.log(x)


@triton.jit
def _zero_where_empty(top):
    """Return 0 for -inf, the largest similarity of a row without entries, so that it can be subtracted."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _softplus(s):
    """Return log(1 + exp(s)); log(1 + x) keeps its relative precision for small x (Kahan)."""
    x = _exp(-tl.abs(s))
    u = 1.0 + x
    return tl.maximum(s, 0.0) + tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def sums(query, key, stored, target, row_label, column_label, added,
         row_log, column_log, towards, kept, references, spoilt,
         R, M, D, row, column, offset_0, offset_1, offset_2, pairs, pair_offset, least,
         FUNCTION: tl.constexpr, SOURCE: tl.constexpr, COLUMNS: tl.constexpr, UPPER: tl.constexpr,
         OFFSETS: tl.constexpr, VIEWS: tl.constexpr, LABELS: tl.constexpr, ADDED: tl.constexpr, TARGET: tl.constexpr,
         KEEP: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
         BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BAND: tl.constexpr):  # fmt: skip
    """Write the logs of a tile's part of each row and column.

    query [R, D], key [M, D] or stored [R, M]: the similarities. target [R, M] and added [R, M]: see `core.chunks`.
    row_log [R, tiles across], column_log [tiles down, M], towards [R, tiles across]: the results. For FUNCTION=SOFTPLUS row_log
    has the sums themselves. kept [R, M], references and spoilt [tiles down, tiles across]: the exponentials for `pull`.
    """
    at, across, i, j = _place(R, M, BLOCK_R, BLOCK_M, BAND)
    broad = tl.cdiv(M, BLOCK_M)
    inside_row, inside_column = i < R, j < M
    inside = inside_row[:, None] & inside_column[None, :]
    place = i.to(tl.int64)[:, None] * M + j[None, :]
    out_row = row_log + i.to(tl.int64) * broad + across
    if UPPER and (at * BLOCK_R >= (across + 1) * BLOCK_M):
        # This tile lies below the diagonal: its mirror image has its pairs.
        tl.store(out_row, float("-inf"), mask=inside_row)
        if COLUMNS:
            tl.store(column_log + at.to(tl.int64) * M + j, float("-inf"), mask=inside_column)
        return
    if SOURCE == STORED:
        s = tl.load(stored + place, mask=inside, other=0.0).to(tl.float32)
    else:
        s = _product(query, key, i, j, R, M, D, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION)
    if TARGET:
        t = tl.load(target + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(towards + i.to(tl.int64) * broad + across, tl.sum(t * s, 1), mask=inside_row)
    s = _excluded(s, i, j, R, M, row, column, offset_0, offset_1, offset_2, pairs, pair_offset, row_label, column_label,
                  added, OFFSETS, VIEWS, LABELS, ADDED, UPPER)  # fmt: skip
    if FUNCTION == SOFTPLUS:
        tl.store(out_row, tl.sum(_softplus(s), 1), mask=inside_row)
        if KEEP:
            tl.store(kept + place, (1.0 / (1.0 + _exp(-s))).to(kept.dtype.element_ty), mask=inside)
    else:
        reference = _zero_where_empty(tl.max(s))
        e = _exp(s - reference)
        row_sum = tl.sum(e, 1)
        low = tl.min(tl.where(inside_row, row_sum, 1.0))
        if COLUMNS:
            # On the diagonal of a symmetric matrix, a pair is in its row alone.
            down = e
            if UPPER:
                down = tl.where(j[None, :] == i[:, None], 0.0, e)
            column_sum = tl.sum(down, 0)
            low = tl.minimum(low, tl.min(tl.where(inside_column, column_sum, 1.0)))
        bad = 0
        if low > least:
            tl.store(out_row, _log(row_sum, FAST) + reference, mask=inside_row)
            if COLUMNS:
                tl.store(column_log + at.to(tl.int64) * M + j, _log(column_sum, FAST) + reference, mask=inside_column)
        else:
            # A row lies far below the reference, or has no entry: each row and column gets its own reference.
            top = tl.max(s, 1)
            lost = inside_row & (row_sum <= least) & (top > float("-inf"))
            bad = tl.max(lost.to(tl.int32))
            own = _zero_where_empty(top)
            tl.store(out_row, _log(tl.sum(_exp(s - own[:, None]), 1), FAST) + own, mask=inside_row)
            if COLUMNS:
                if UPPER:
                    s = tl.where(j[None, :] == i[:, None], float("-inf"), s)
                top_down = tl.max(s, 0)
                lost_down = inside_column & (column_sum <= least) & (top_down > float("-inf"))
                bad = tl.maximum(bad, tl.max(lost_down.to(tl.int32)))
                own_down = _zero_where_empty(top_down)
                logs = _log(tl.sum(_exp(s - own_down[None, :]), 0), FAST) + own_down
                tl.store(column_log + at.to(tl.int64) * M + j, logs, mask=inside_column)
        if KEEP:
            tl.store(kept + place, e.to(kept.dtype.element_ty), mask=inside)
            tl.store(references + at * broad + across, reference)
            tl.store(spoilt + at * broad + across, bad)


@triton.jit
def _share(gradient, log, reference):
    """Return a exp(r - log Z), the factor that turns exp(s - r) into the gradient of s; 0 for a row without entries."""
    return tl.where(log == float("-inf"), 0.0, gradient * _exp(reference - log))


@triton.jit
def _factor(i, j, a, b, log, log_down, reference, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
            COLUMNS: tl.constexpr, UPPER: tl.constexpr):  # fmt: skip
    """Return the factor of each exponential exp(s - reference) in the gradient of a tile."""
    factor = tl.broadcast_to(_share(a, log, reference)[:, None], (BLOCK_R, BLOCK_M))
    if COLUMNS:
        more = tl.broadcast_to(_share(b, log_down, reference)[None, :], (BLOCK_R, BLOCK_M))
        if UPPER:
            more = tl.where(j[None, :] == i[:, None], 0.0, more)
        factor += more
    return factor


@triton.jit
def _of_similarities(s, i, j, a, b, log, log_down, reach, COLUMNS: tl.constexpr, UPPER: tl.constexpr):
    """Return the gradient of a tile from its similarities, where rules have set excluded pairs to -inf."""
    reference = _zero_where_empty(tl.max(s))
    low = tl.min(tl.where(log == float("-inf"), float("inf"), log))
    if COLUMNS:
        low = tl.minimum(low, tl.min(tl.where(log_down == float("-inf"), float("inf"), log_down)))
    if reference - low < reach:
        factor = _factor(i, j, a, b, log, log_down, reference, s.shape[0], s.shape[1], COLUMNS, UPPER)
        g = _exp(s - reference) * factor
    else:
        # One reference would overflow for some row: each direction takes its own logs as references.
        own = _zero_where_empty(log)
        g = _exp(s - own[:, None]) * _share(a, log, own)[:, None]
        if COLUMNS:
            if UPPER:
                s = tl.where(j[None, :] == i[:, None], float("-inf"), s)
            own_down = _zero_where_empty(log_down)
            g += _exp(s - own_down[None, :]) * _share(b, log_down, own_down)[None, :]
    return g


@triton.jit
def pull(query, key, stored, target, row_label, column_label, added,
         row_log, row_gradient, column_log, column_gradient, towards_gradient, references, spoilt, gradient,
         R, M, D, row, column, offset_0, offset_1, offset_2, pairs, pair_offset, reach,
         FUNCTION: tl.constexpr, SOURCE: tl.constexpr, COLUMNS: tl.constexpr, UPPER: tl.constexpr,
         OFFSETS: tl.constexpr, VIEWS: tl.constexpr, LABELS: tl.constexpr, ADDED: tl.constexpr, TARGET: tl.constexpr,
         PRECISION: tl.constexpr,
         BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BAND: tl.constexpr):  # fmt: skip
    """Write the gradient g [R, M] of the similarities of a tile.

    row_log, row_gradient [R] and column_log, column_gradient [M]: log Z with a, log Y with b. towards_gradient [R]: the
    gradient of T. stored [R, M] holds similarities (SOURCE=STORED) or what `sums` kept (SOURCE=EXPONENTIALS).
    """
    at, across, i, j = _place(R, M, BLOCK_R, BLOCK_M, BAND)
    broad = tl.cdiv(M, BLOCK_M)
    inside_row, inside_column = i < R, j < M
    inside = inside_row[:, None] & inside_column[None, :]
    place = i.to(tl.int64)[:, None] * M + j[None, :]
    if UPPER and (at * BLOCK_R >= (across + 1) * BLOCK_M):
        tl.store(gradient + place, tl.zeros((BLOCK_R, BLOCK_M), gradient.dtype.element_ty), mask=inside)
        return
    a = tl.load(row_gradient + i, mask=inside_row, other=0.0)
    g = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    if FUNCTION == SOFTPLUS:
        if SOURCE == EXPONENTIALS:
            g = tl.load(stored + place, mask=inside, other=0.0).to(tl.float32)
        else:
            if SOURCE == STORED:
                s = tl.load(stored + place, mask=inside, other=0.0).to(tl.float32)
            else:
                s = _product(query, key, i, j, R, M, D, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION)
            g = 1.0 / (1.0 + _exp(-s))
        g = g * a[:, None]
    else:
        log = tl.load(row_log + i, mask=inside_row, other=float("-inf"))
        log_down = tl.zeros((BLOCK_M,), tl.float32)
        b = tl.zeros((BLOCK_M,), tl.float32)
        if COLUMNS:
            log_down = tl.load(column_log + j, mask=inside_column, other=float("-inf"))
            b = tl.load(column_gradient + j, mask=inside_column, other=0.0)
        if SOURCE == EXPONENTIALS:
            if tl.load(spoilt + at * broad + across) != 0:
                s = _product(query, key, i, j, R, M, D, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION)
                s = _excluded(s, i, j, R, M, row, column, offset_0, offset_1, offset_2, pairs, pair_offset, row_label,
                              column_label, added, OFFSETS, VIEWS, LABELS, ADDED, UPPER)  # fmt: skip
                g = _of_similarities(s, i, j, a, b, log, log_down, reach, COLUMNS, UPPER)
            else:
                reference = tl.load(references + at * broad + across)
                factor = _factor(i, j, a, b, log, log_down, reference, BLOCK_R, BLOCK_M, COLUMNS, UPPER)
                # Excluded pairs have an exponential of 0; where a factor overflows, their product must stay 0.
                e = tl.load(stored + place, mask=inside, other=0.0).to(tl.float32)
                g = tl.where(e == 0.0, 0.0, e * factor)
        else:
            if SOURCE == STORED:
                s = tl.load(stored + place, mask=inside, other=0.0).to(tl.float32)
            else:
                s = _product(query, key, i, j, R, M, D, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION)
            s = _excluded(s, i, j, R, M, row, column, offset_0, offset_1, offset_2, pairs, pair_offset, row_label,
                          column_label, added, OFFSETS, VIEWS, LABELS, ADDED, UPPER)  # fmt: skip
            g = _of_similarities(s, i, j, a, b, log, log_down, reach, COLUMNS, UPPER)
    if TARGET:
        t = tl.load(target + place, mask=inside, other=0.0).to(tl.float32)
        g += t * tl.load(towards_gradient + i, mask=inside_row, other=0.0)[:, None]
    tl.store(gradient + place, g.to(gradient.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------- two matrices: the student's and the teacher's


@triton.jit
def _statistics(s, t, empty, into, size, place, inside, AXIS: tl.constexpr):
    """Write log Z of both softmaxes along an axis, and the mean of both similarities under the teacher's."""
    top_s = tl.max(tl.where(empty, float("-inf"), s), AXIS, keep_dims=True)
    top_t = tl.max(tl.where(empty, float("-inf"), t), AXIS, keep_dims=True)
    e_s = tl.where(empty, 0.0, _exp(s - top_s))
    e_t = tl.where(empty, 0.0, _exp(t - top_t))
    z_s, z_t = tl.sum(e_s, AXIS), tl.sum(e_t, AXIS)
    tl.store(into + place, tl.log(z_s) + tl.max(tl.where(empty, float("-inf"), s), AXIS), mask=inside)
    tl.store(into + size + place, tl.log(z_t) + tl.max(tl.where(empty, float("-inf"), t), AXIS), mask=inside)
    tl.store(into + 2 * size + place, tl.sum(e_t * s, AXIS) / z_t, mask=inside)
    tl.store(into + 3 * size + place, tl.sum(e_t * t, AXIS) / z_t, mask=inside)


@triton.jit
def cross_sums(query, key, teacher_query, teacher_key, row, column, R, M, D, E,
               COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
               BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BAND: tl.constexpr):  # fmt: skip
    """Write four numbers for a tile's part of each row and column: log Z of s, log Z of t, and the means of s and t.

    query [R, D], key [M, D]; teacher_query [R, E], teacher_key [M, E]. row [4, R, tiles across], column [4, tiles down, M].
    """
    at, across, i, j = _place(R, M, BLOCK_R, BLOCK_M, BAND)
    broad, high = tl.cdiv(M, BLOCK_M), tl.cdiv(R, BLOCK_R)
    inside_row, inside_column = i < R, j < M
    s = _product(query, key, i, j, R, M, D, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION)
    t = _product(teacher_query, teacher_key, i, j, R, M, E, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION)
    empty = (i >= R)[:, None] | (j >= M)[None, :]
    size = R * broad
    _statistics(s, t, empty, row, size, i.to(tl.int64) * broad + across, inside_row, 1)
    if COLUMNS:
        size = M * high
        _statistics(s, t, empty, column, size, at.to(tl.int64) * M + j, inside_column, 0)


@triton.jit
def cross_pull(query, key, teacher_query, teacher_key, row, row_gradient, column, column_gradient, student, teacher,
               R, M, D, E, share,
               COLUMNS: tl.constexpr, TAUGHT: tl.constexpr, PRECISION: tl.constexpr,
               BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BAND: tl.constexpr):  # fmt: skip
    """Write the gradients of a tile: of the student's similarities and, if TAUGHT, of the teacher's; [R, M] each.

    row [3, R], column [3, M]: log Z of s and t, and the mean of s. The gradients [R], [M] arrive for the cross-entropies.
    """
    _at, _across, i, j = _place(R, M, BLOCK_R, BLOCK_M, BAND)
    inside_row, inside_column = i < R, j < M
    inside = inside_row[:, None] & inside_column[None, :]
    place = i.to(tl.int64)[:, None] * M + j[None, :]
    s = _product(query, key, i, j, R, M, D, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION)
    t = _product(teacher_query, teacher_key, i, j, R, M, E, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION)
    a = tl.load(row_gradient + i, mask=inside_row, other=0.0)[:, None]
    log_s = tl.load(row + i, mask=inside_row, other=0.0)[:, None]
    log_t = tl.load(row + R + i, mask=inside_row, other=0.0)[:, None]
    p = _exp(t - log_t) * (a * share)
    g = _exp(s - log_s) * a - p
    if TAUGHT:
        # An expectation under p moves with t_ij by p_ij (s_ij - the expectation).
        u = -p * (s - tl.load(row + 2 * R + i, mask=inside_row, other=0.0)[:, None])
    if COLUMNS:
        b = tl.load(column_gradient + j, mask=inside_column, other=0.0)[None, :]
        log_s = tl.load(column + j, mask=inside_column, other=0.0)[None, :]
        log_t = tl.load(column + M + j, mask=inside_column, other=0.0)[None, :]
        p = _exp(t - log_t) * (b * share)
        g += _exp(s - log_s) * b - p
        if TAUGHT:
            u -= p * (s - tl.load(column + 2 * M + j, mask=inside_column, other=0.0)[None, :])
    tl.store(student + place, g.to(student.dtype.element_ty), mask=inside)
    if TAUGHT:
        tl.store(teacher + place, u.to(teacher.dtype.element_ty), mask=inside)
