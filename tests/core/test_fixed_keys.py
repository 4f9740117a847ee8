"""Keys without a gradient: the number of products, values and gradients against the dense float64 matrix, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoint.core import affinities, kernel
from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.contrast import pair_logsumexp, pair_softplus
from counterpoint.core.operands import scaled, unit
from counterpoint.core.rules import Diagonal, Listed, Where
from counterpoint.functional import clip, moco, momentum_contrast_soft

N, M, D, TEACHER = 30, 70, 16, 11
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Products(TorchDispatchMode):
    """Count multiplications of matrix products by the width of the operands, in products of the whole [N, M] matrix."""

    def __init__(self, matrix: int) -> None:
        super().__init__()
        self.matrix, self.by_width = matrix, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            first, second = args[-2:] if "add" not in name else args[1:3]
            # Three sizes meet in a product: two cover a part of the matrix, the third is a width.
            sizes = [first.shape[-2], first.shape[-1], second.shape[-1]]
            width = next(size for size in sizes if size in (D, TEACHER))
            self.by_width[width] = self.by_width.get(width, 0) + math.prod(sizes) / width / self.matrix
        return function(*args, **(kwargs or {}))


def products(loss, matrix=N * M):
    """Count products of forward and backward, by width."""
    with Products(matrix) as seen:
        loss().sum().backward()
    return {width: round(count, 9) for width, count in seen.by_width.items()}


def draw(*shapes, dtype=torch.float64, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype) for shape in shapes]


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "SMALL", 0)
    monkeypatch.setattr(kernel, "TILE", (7, 25))
    monkeypatch.setattr(affinities, "STRIPE", 5 * M)


# ---------------------------------------------------------------------------------------------------- the number of products


@pytest.mark.parametrize("keep", [0, None])
@pytest.mark.parametrize(
    "rules", [(), Diagonal(), Where(lambda r, c: torch.zeros(len(range(*r.indices(N))), 1).bool())]
)
def test_logsumexp_of_fixed_keys_takes_two_products(keep, rules):
    q, k = draw((N, D), (M, D))
    q.requires_grad_()
    assert products(lambda: pair_logsumexp(q, k, exclude=rules, keep=keep).rows) == {D: 2}


@pytest.mark.parametrize(("keep", "count"), [(0, 4), (None, 3)])
def test_logsumexp_of_learnt_keys_takes_three_products_or_four(keep, count):
    q, k = (x.requires_grad_() for x in draw((N, D), (M, D)))
    assert products(lambda: pair_logsumexp(q, k, keep=keep).rows) == {D: count}


@pytest.mark.parametrize("fixed", ["query", "key"])
@pytest.mark.parametrize(("keep", "count"), [(0, 3), (None, 2)])
def test_both_directions_spare_the_product_of_the_fixed_side(keep, count, fixed):
    q, k = draw((N, D), (M, D))
    (k if fixed == "query" else q).requires_grad_()

    def loss():
        found = pair_logsumexp(q, k, columns=True, keep=keep)
        return found.rows.sum() + found.columns.sum()

    assert products(loss) == {D: count}


@pytest.mark.parametrize("keep", [0, kernel.KEEP])
def test_softplus_of_fixed_keys_takes_two_products(keep):
    q, k = draw((N, D), (M, D))
    q.requires_grad_()
    assert products(lambda: pair_softplus(q, k, keep=keep)) == {D: 2}


def test_cross_entropy_of_fixed_keys_takes_two_products_and_the_teachers_similarities():
    q, k, tq, tk = draw((N, D), (M, D), (N, TEACHER), (M, TEACHER))
    q.requires_grad_()
    assert products(lambda: pair_cross_entropy(q, k, tq, tk, keep=0).rows) == {D: 2, TEACHER: 1}


def test_the_queues_of_moco_and_albef_and_the_locked_tower_of_clip_are_fixed_keys():
    q, k, queue = draw((N, D), (N, D), (M, D))
    q.requires_grad_()
    assert products(lambda: moco(q, k, unit(queue)).loss) == {D: 2}
    f_t, g_v, g_t = draw((N, D), (N, D), (N, D), seed=1)
    f_t.requires_grad_()
    queues = unit(queue).T, unit(queue).T

    def soft(alpha):
        return lambda: momentum_contrast_soft(q, f_t, g_v, g_t, *queues, 0.1, alpha)

    # Two directions over N + M keys; the momentum copy's similarities are one more product each.
    assert products(soft(0.0), N * (N + M)) == {D: 4}
    assert products(soft(0.4), N * (N + M)) == {D: 6}
    assert products(lambda: clip(q, k, torch.tensor(1.0)), N * N) == {D: 2}


# -------------------------------------------------------------------------------------------------- values and gradients


def same(found, expected, query, double, dtype):
    """Check that values and the query's gradients agree, with separate weights of the rows.

    Errors are relative to the largest entry.
    """
    weight = torch.arange(1, len(found) + 1).double().cos()
    pairs = [(found, expected)]
    loss = [(x.double().masked_fill(x == -math.inf, 0) * weight).sum() for x in (found, expected)]
    pairs.append((torch.autograd.grad(loss[0], query)[0], torch.autograd.grad(loss[1], double)[0]))
    for a, b in pairs:
        size = b.detach().masked_fill(b == -math.inf, 0).abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * max(1.0, size))


CASES = {
    "no rule": ((), None),
    "diagonal": (Diagonal((0, 3)), None),
    "listed": (Listed(torch.arange(N)[:, None] * 2), None),
    "a row without entries": (
        Where(lambda r, c: (torch.arange(N)[r] == 4)[:, None].expand(-1, c.stop - c.start)),
        None,
    ),
    "a first tile without entries": (
        Where(lambda r, c: (torch.arange(M)[c] < 25)[None].expand(r.stop - r.start, -1)),
        None,
    ),
    "weights": ((), torch.rand(N, M, generator=torch.Generator().manual_seed(2), dtype=torch.float64)),
}


@pytest.mark.parametrize("tile", [(7, 25), (512, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("case", CASES)
def test_logsumexp_of_fixed_keys_equals_the_dense_matrix_in_float64(monkeypatch, tile, dtype, scale, case):
    monkeypatch.setattr(kernel, "TILE", tile)
    rules, weight = CASES[case]
    # Unit rows and a temperature, as losses have them: a similarity is at most 1 / temperature.
    q, k = (unit(x) for x in draw((N, D), (M, D)))
    q, k = q.to(dtype).requires_grad_(), k.to(dtype)
    double = q.detach().double().requires_grad_()
    by_tile = None if weight is None else lambda r, c: weight.to(dtype)[r, c]
    found = pair_logsumexp(scaled(q, 1 / scale), k, exclude=rules, weight=by_tile).rows
    dense = None if weight is None else lambda r, c: weight[r, c]
    expected = pair_logsumexp(
        scaled(double, 1 / scale), k.double().requires_grad_(), exclude=rules, weight=dense, method="plain"
    ).rows
    same(found, expected, q, double, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("small", [0, 10**6])
def test_cross_entropy_of_fixed_keys_equals_the_dense_matrices_in_float64(monkeypatch, dtype, share, entropy, small):
    monkeypatch.setattr(kernel, "SMALL", small)
    q, k, tq, tk = (x.to(dtype) for x in draw((N, D), (M, D), (N, TEACHER), (M, TEACHER), scale=0.7))
    q.requires_grad_()
    double = q.detach().double().requires_grad_()
    found = pair_cross_entropy(q, k, tq, tk, share=share, entropy=entropy)
    s, t = double @ k.double().T, tq.double() @ tk.double().T
    expected = s.logsumexp(1) - share * (t.softmax(1) * s).sum(1)
    same(found.rows, expected, q, double, dtype)
    if entropy:
        wanted = -(t.softmax(1) * t.log_softmax(1)).sum(1)
        torch.testing.assert_close(found.row_entropy.double(), wanted, rtol=0, atol=10 * TOLERANCE[dtype])
        assert not found.row_entropy.requires_grad


@pytest.mark.parametrize("learnt", ["keys", "teacher", "columns"])
def test_share_means_the_same_where_more_than_the_query_learns(learnt):
    q, k, tq, tk = (x.requires_grad_() for x in draw((N, D), (M, D), (N, TEACHER), (M, TEACHER)))
    found = pair_cross_entropy(
        q, k, tq, tk, share=0.3, columns=learnt == "columns", teacher_gradient=learnt == "teacher"
    )
    s, t = q @ k.T, tq @ tk.T
    t = t if learnt == "teacher" else t.detach()
    expected = [s.logsumexp(d) - 0.3 * (t.softmax(d) * s).sum(d) for d in (1, 0)[: 1 + (learnt == "columns")]]
    inputs = [q, k, tq, tk] if learnt == "teacher" else [q, k]
    loss = [sum((x.cos() * x).sum() for x in values) for values in ([x for x in found[::2] if x is not None], expected)]
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in loss), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_of_fixed_keys_equals_the_dense_matrix_in_float64(dtype):
    q, k = (x.to(dtype) for x in draw((N, D), (M, D)))
    q.requires_grad_()
    double = q.detach().double().requires_grad_()
    expected = torch.nn.functional.softplus(double @ k.double().T, threshold=40).sum(1)
    same(pair_softplus(q, k), expected, q, double, dtype)


# ------------------------------------------------------------------------------------------------------------- the edges

LOSSES = {
    "logsumexp": lambda q, k: pair_logsumexp(q, k).rows,
    "cross-entropy": lambda q, k: pair_cross_entropy(q, k, k[: len(q)] * 2, k).rows,
    "softplus": pair_softplus,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_and_a_retained_graph_gives_the_same_gradient(name):
    q, k = draw((N, D), (M, D))
    q.requires_grad_()
    loss = LOSSES[name](q, k).sum()
    first = torch.autograd.grad(loss, q, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, q, retain_graph=True)[0], first)
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_nan_stays_in_its_row():
    q, k = draw((N, D), (M, D))
    q[3, 0] = math.nan
    rows = pair_logsumexp(q.requires_grad_(), k).rows
    rows.sum().backward()
    for x in (rows[:, None], q.grad):
        broken = x.isnan().any(1)
        assert broken[3]
        assert broken.sum() == 1


def test_keys_that_change_after_the_forward_pass_do_not_change_the_gradient():
    q, queue = draw((N, D), (M, D))
    q.requires_grad_()
    expected = torch.autograd.grad(pair_logsumexp(q, queue).rows.sum(), q)[0]
    loss = pair_logsumexp(q, queue).rows.sum()
    queue.zero_()  # a queue is written to before backward runs
    assert torch.equal(torch.autograd.grad(loss, q)[0], expected)
