"""Operands of a comparison: length of their rows, temperature and biases, and their similarity with their positives.

These operations compose outside the kernel, with autograd's own gradients:

    temperature      scale the query (`scaled`): a number, a learnable scalar or one per row
    additive bias    one or two more columns on both sides (`with_bias`): per row, per key, or both; log w_j weighs key j
    positives        linear in the query: a row of targets times the keys, so no matrix of similarities is needed
                     (`positive_similarity` for one positive, soft targets or lists; `class_similarity` for labels)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.precision import chosen_products, exact, full_precision, half_type, wide
from counterpoint.core.transforms import need_fixed, traced

# The floor under a vector's length when it is normalised, as torch.nn.functional.normalize has it: a zero vector stays zero.
EPS = 1e-12


class _Unit(torch.autograd.Function):
    """scale x / |x|: one pass forward and three backward, where normalize's division takes eight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        unit, length = _stretched(x, scale)
        ctx.scale = scale
        ctx.save_for_backward(x, unit, length)
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        x, unit, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: in terms of x
            again = _composed_unit(x, ctx.scale)
            return torch.autograd.grad(again, x, gradient, create_graph=True)[0], None
        with exact(x.device.type):
            along = torch.linalg.vecdot(unit, gradient).unsqueeze_(-1)
        # Below the floor the length is a constant, and nothing is taken away.
        along.masked_fill_(length == EPS, 0.0)
        return torch.addcmul(gradient, unit, along, value=-(ctx.scale**-2)).div_(length / ctx.scale), None


def unit(x: Float[Tensor, "*rows dim"], scale: float = 1.0) -> Float[Tensor, "*rows dim"]:
    """Divide every row by its Euclidean length, as torch.nn.functional.normalize does, in float32 at least.

    A row of zeros stays a row of zeros, in all functions that normalise. Its cosine with every row is 0, and its distance
    from a unit row is 1. Its gradient is the arriving gradient divided once by `EPS` (1e-12). Rows shorter than `EPS` are
    divided by `EPS`.

    Args:
        x: rows of any number, of any floating type.
        scale: > 0, the length that rows get. unit(x, 1 / t) is `scaled(unit(x), t)` in one pass.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    x = wide(x)
    if traced():
        return _composed_unit(x, scale)
    return _Unit.apply(x, scale) if x.requires_grad and torch.is_grad_enabled() else _stretched(x, scale)[0]


def _composed_unit(x: Tensor, scale: float) -> Tensor:
    """Compute `unit` with PyTorch's own operations, for derivatives of any order; for a row of zeros they are finite too."""
    short = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) <= EPS
    length = torch.linalg.vector_norm(torch.where(short, 1.0, x), dim=-1, keepdim=True)
    return x / (torch.where(short, EPS, length) / scale)


def _stretched(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return x at its new length, and its old length."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=EPS)
    return x / (length / scale), length


def scaled(query: Float[Tensor, "rows dim"], temperature: float | Float[Tensor, ...]) -> Float[Tensor, "rows dim"]:
    """Divide query by a number, a (learnable) scalar or one temperature per row [rows]; in float32 at least.

    With `key=None` both sides are the query: divide by the square root of the temperature instead.
    """
    query = wide(query)
    if not isinstance(temperature, Tensor):
        return query / temperature
    # A product has a shorter backward pass than a quotient.
    return query * (temperature[:, None] if temperature.ndim == 1 else temperature).reciprocal()


def with_bias(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    *,
    row: Float[Tensor, " rows"] | None = None,
    column: Float[Tensor, " columns"] | None = None,
) -> tuple[Float[Tensor, "rows wider"], Float[Tensor, "columns wider"]]:
    """Make operands whose similarities are q_i . k_j + row_i + column_j, with gradients to the biases.

    column = log w weights key j by w_j in every row's denominator. (For w_j = 0 use a rule, because log 0 is not finite.)
    Where products are of half precision, a second column holds what the first loses to rounding: 0.03 of a bias of 10 in bf16.
    Zeros follow, up to a width of a multiple of 8: products of odd widths are slower, by far on tensor cores.
    """
    left, right = [wide(query)], [wide(key)]
    one, other = left[0].new_ones(len(query), 1), right[0].new_ones(len(key), 1)
    half = half_type(chosen_products(query.device.type))
    if row is not None:
        parts = _parts(row.to(left[0].dtype)[:, None], half)
        left, right = [*left, *parts], [*right, *[other] * len(parts)]
    if column is not None:
        parts = _parts(column.to(right[0].dtype)[:, None], half)
        left, right = [*left, *[one] * len(parts)], [*right, *parts]
    rest = -sum(x.shape[1] for x in left) % 8
    left, right = [*left, one.new_zeros(len(one), rest)], [*right, other.new_zeros(len(other), rest)]
    return torch.cat(left, 1), torch.cat(right, 1)


def _parts(bias: Tensor, half: torch.dtype | None) -> list[Tensor]:
    """Return the bias as a sum of tensors that a half precision holds. The first one has the gradient."""
    if half is None:
        return [bias]
    lost = bias.detach() - bias.detach().to(half).to(bias.dtype)
    return [bias - lost, lost]


# --------------------------------------------------------------------------------------------------------- the positives


def positive_similarity(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    positives: Float[Tensor, "rows columns"] | Int[Tensor, "rows most"] | None = None,
) -> Float[Tensor, " rows"]:
    """sum_j p_ij q_i . k_j, linear in q and so without a matrix of similarities.

    Args:
        positives: None: key i is query i's one positive. A floating matrix [rows, columns]: soft targets p. Integers
            [rows, most]: a list of positive keys for each row, entries below 0 are padding, each counts 1.

    For positives by class label see `class_similarity`.
    """
    query, key = wide(query), wide(key)
    if positives is None:
        if query.shape != key.shape:
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must be paired row by row")
        return (query * key).sum(1)
    if positives.is_floating_point():
        with exact(query.device.type):
            return (query * (positives.to(key.dtype) @ key)).sum(1)
    there = positives >= 0
    chosen = key[positives.clamp(min=0)] * there.unsqueeze(-1)
    return (query * chosen.sum(1)).sum(1)


@full_precision
def class_similarity(
    query: Float[Tensor, "rows dim"],
    key: Float[Tensor, "columns dim"],
    query_labels: Int[Tensor, " rows"],
    key_labels: Int[Tensor, " columns"],
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """sum over the keys of a row's own class of q_i . k_j, and how many they are: by class sums, O((rows + columns) dim).

    A row that is itself among the keys counts too; take q_i . q_i and 1 away. Labels may be any integers.
    """
    need_fixed("a sum over classes", labels=query_labels, key_labels=key_labels)
    query, key = wide(query), wide(key)
    labels = torch.cat([query_labels, key_labels])
    if labels.is_cuda:
        classes, index = _numbered(labels)
    else:
        found, index = torch.unique(labels, return_inverse=True)
        classes = len(found)
    rows, columns = index[: len(query)], index[len(query) :]
    sums, count = key.new_zeros(classes, key.shape[1]), columns.new_zeros(classes)
    # On a GPU index_put adds in a fixed order, index_add does not. On a CPU index_add does, and is five times as fast.
    sums = sums.index_put((columns,), key, accumulate=True) if key.is_cuda else sums.index_add(0, columns, key)
    count = count.index_add(0, columns, torch.ones_like(columns))
    return (query * sums[rows]).sum(1), count[rows]


def _numbered(labels: Tensor) -> tuple[int, Tensor]:
    """Number the classes of labels [n] from 0; return a bound of their number, n, and each label's number.

    Unlike torch.unique, this needs no value on the processor.
    """
    ordered, order = labels.sort(stable=True)
    new = torch.zeros_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    return len(labels), torch.empty_like(order).index_copy_(0, order, new.cumsum(0))
