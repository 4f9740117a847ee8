"""The kernel against the plain matrix: values, gradients, rules, references, memory, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.core import kernel
from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.contrast import pair_logsumexp, pair_logsumexp_towards, pair_softplus
from counterpoint.core.operands import EPS, class_similarity, positive_similarity, scaled, unit, with_bias
from counterpoint.core.rules import Diagonal, Labels, Listed, Targets, Views, Where


@pytest.fixture(autouse=True)
def no_shortcut(monkeypatch):
    monkeypatch.setattr(kernel, "SMALL", 0)


def draw(*shapes, scale=1.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_() for shape in shapes
    ]


def direct(query, key, allowed, weight=None):
    """log Z of rows and columns, written as in the docstring; rows that are empty are -inf."""
    s = (query @ key.T).masked_fill(~allowed, -math.inf)
    if weight is not None:
        s = s + weight.log()
    empty = s == -math.inf
    s = s.masked_fill(empty, torch.finfo(s.dtype).min)
    return tuple(s.logsumexp(d).masked_fill(empty.all(d), -math.inf) for d in (1, 0))


def same(found, expected, inputs, tolerance=1e-9):
    """Check values, and gradients of an arbitrary function of them in which every entry has a weight of its own."""
    loss = []
    for values in (found, expected):
        total = 0
        for part in values:
            part = part.masked_fill(part == -math.inf, 0.0)
            total = total + (part * torch.arange(1, len(part) + 1) + 0.1 * part**2).sum()
        loss.append(total)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in loss), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile", [(512, 2048), (7, 5)])
@pytest.mark.parametrize("keep", [0, 2000, kernel.KEEP])
@pytest.mark.parametrize("scale", [0.3, 3.0, 60.0])
@pytest.mark.parametrize("columns", [False, True])
def test_logsumexp_of_rows_and_columns_equals_the_direct_form(monkeypatch, tile, keep, scale, columns):
    monkeypatch.setattr(kernel, "TILE", tile)
    q, k = draw((31, 6), (23, 6), scale=scale)
    everything = torch.ones(31, 23, dtype=torch.bool)
    found = pair_logsumexp(q, k, columns=columns, keep=keep)
    expected = direct(q, k, everything)
    same(found[: 1 + columns], expected[: 1 + columns], [q, k])


@pytest.mark.parametrize("tile", [(512, 2048), (7, 5)])
@pytest.mark.parametrize("keep", [0, 2000, kernel.KEEP])
@pytest.mark.parametrize("scale", [0.3, 60.0])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("small", [0, 64 * 64])
def test_similarity_under_soft_targets_equals_the_direct_form(monkeypatch, tile, keep, scale, columns, small):
    monkeypatch.setattr(kernel, "TILE", tile)
    monkeypatch.setattr(kernel, "SMALL", small)
    q, k = draw((31, 6), (23, 6), scale=scale)
    p = torch.rand(31, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = pair_logsumexp_towards(q, k, lambda r, c: p[r, c], columns=columns, keep=keep)
    expected = direct(q, k, torch.ones(31, 23, dtype=torch.bool))[: 1 + columns]
    same([*found[: 1 + columns], found.towards], [*expected, (p * (q @ k.T)).sum(1)], [q, k])
    with pytest.raises(ValueError, match="own"):
        pair_logsumexp_towards(q, k, lambda r, c: p[r, c], own=True)
    square = pair_logsumexp_towards(q[:23], k, lambda r, c: p[r, c], columns=columns, keep=keep, own=True)
    expected = direct(q[:23], k, torch.ones(23, 23, dtype=torch.bool))[: 1 + columns]
    whole = q[:23] @ k.T
    towards = [(p[:23] * whole).sum(1), whole.diagonal()]
    same([*square[: 1 + columns], *square[2:]], [*expected, *towards], [q, k])


def test_sparse_targets_equal_the_dense_ones():
    index, weight = torch.tensor([[0, 2], [4, 4], [3, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.1], [1.0, 0.0]])
    whole = torch.zeros(3, 5)
    for row in range(3):
        for column, share in zip(index[row], weight[row], strict=True):
            whole[row, column] += share
    targets = Targets(index, weight, offset=10, length=5)
    for rows, columns in ((slice(0, 3), slice(0, 5)), (slice(1, 3), slice(2, 5)), (slice(0, 2), slice(1, 3))):
        placed = slice(rows.start + 10, rows.stop + 10)
        torch.testing.assert_close(targets(placed, columns), whole[rows, columns])


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_unit_equals_normalize_in_value_and_derivatives(shape, scale):
    (x,) = draw(shape)
    with torch.no_grad():
        x[..., 0, :] = 0  # no direction: stays, and its gradient is that of a division by the floor
        x[..., 1, :] *= 1e-9
    ours, theirs = (unit(x, scale), torch.nn.functional.normalize(x, dim=-1, eps=EPS) * scale)
    torch.testing.assert_close(ours, theirs)
    weight = torch.arange(x.numel(), dtype=x.dtype).view(shape)
    a, b = (torch.autograd.grad((y * weight).sin().sum(), x, create_graph=True)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b)
    plain = torch.autograd.grad((unit(x, scale) * weight).sin().sum(), x)[0]
    torch.testing.assert_close(plain, b.detach())
    assert unit(x.detach().half()).dtype == torch.float32
    (y,) = draw(shape, seed=1)
    assert torch.autograd.gradgradcheck(lambda y: unit(y, scale), y)


LABELS = torch.randint(0, 4, (150,), generator=torch.Generator().manual_seed(1))
PAIRS = torch.arange(150).roll(75)


@pytest.mark.parametrize("tile", [(512, 2048), (64, 40)])
@pytest.mark.parametrize("keep", [0, 40000, kernel.KEEP])
@pytest.mark.parametrize("scale", [0.3, 3.0, 60.0])
@pytest.mark.parametrize(
    ("rules", "excluded"),
    [
        ([], torch.zeros(150, 150, dtype=torch.bool)),
        ([Diagonal()], torch.eye(150, dtype=torch.bool)),
        ([Diagonal((0, 75, -75))], torch.eye(150, dtype=torch.bool) | torch.eye(150, dtype=torch.bool)[PAIRS]),
        ([Views(75)], torch.eye(150, dtype=torch.bool) | torch.eye(150, dtype=torch.bool)[PAIRS]),
        ([Diagonal((3,))], torch.ones(150, 150).triu(3).tril(3).bool()),
        ([Labels(LABELS)], LABELS[:, None] == LABELS),
        ([Labels(LABELS, same=False), Diagonal()], (LABELS[:, None] != LABELS) | torch.eye(150, dtype=torch.bool)),
        ([Labels(LABELS * 0)], torch.ones(150, 150, dtype=torch.bool)),
        ([Listed(torch.stack([PAIRS, torch.full((150,), -1)], 1))], torch.eye(150, dtype=torch.bool)[PAIRS]),
        ([Where(lambda r, c: LABELS[r][:, None] + LABELS[c] == 3, symmetric=True)], LABELS[:, None] + LABELS == 3),
        ([Where(lambda r, c: LABELS[r][:, None] > LABELS[c])], LABELS[:, None] > LABELS),
    ],
)
def test_rules_and_the_half_that_symmetry_spares(monkeypatch, tile, keep, scale, rules, excluded):
    monkeypatch.setattr(kernel, "TILE", tile)
    (x,) = draw((150, 6), scale=scale)
    same(pair_logsumexp(x, exclude=rules, keep=keep)[:1], direct(x, x, ~excluded)[:1], [x])


def test_symmetric_similarities_are_computed_once(monkeypatch):
    seen = torch.zeros(1200, 1200)

    def watch(r, c):
        seen[r, c] += 1
        return torch.zeros(r.stop - r.start, c.stop - c.start, dtype=torch.bool)

    (x,) = draw((1200, 4))
    pair_logsumexp(x, keep=8 * 1200**2, exclude=Where(watch, symmetric=True)).rows.sum().backward()
    assert ((seen + seen.T).clamp(max=1) == 1).all()  # every pair, from one side or the other
    assert seen.sum() < 0.65 * 1200**2


@pytest.mark.parametrize("keep", [0, kernel.KEEP])
def test_weighted_logsumexp_equals_the_direct_form(monkeypatch, keep):
    monkeypatch.setattr(kernel, "TILE", (7, 5))
    q, k = draw((31, 6), (23, 6), scale=2.0)
    weight = torch.rand(31, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight[4] = 0  # a row with nothing in its denominator
    found = pair_logsumexp(q, k, weight=lambda r, c: weight[r, c], columns=True, keep=keep)
    same(found, direct(q, k, weight > 0, weight), [q, k])
    assert found.rows[4] == -math.inf


def test_a_part_of_a_larger_matrix_equals_its_slice():
    q, k = draw((30, 6), (30, 6))
    whole = pair_logsumexp(q, k, exclude=Diagonal()).rows
    part = pair_logsumexp(q[10:17], k, exclude=Diagonal(), origin=(10, 0)).rows
    torch.testing.assert_close(part, whole[10:17])


def test_temperature_bias_and_more_keys_compose_with_their_gradients():
    q, k, queue, row, column, t = draw((9, 4), (8, 4), (11, 4), (9,), (8,), ())
    temperatures = torch.rand(9, dtype=torch.float64).add(0.2).requires_grad_()
    a, b = with_bias(scaled(scaled(q, temperatures), t.exp()), k, row=row, column=column)
    found = torch.logaddexp(pair_logsumexp(a, b).rows, pair_logsumexp(scaled(q, temperatures), queue.detach()).rows)
    s = q @ k.T / temperatures[:, None] / t.exp() + row[:, None] + column
    expected = torch.cat([s, q @ queue.detach().T / temperatures[:, None]], 1).logsumexp(1)
    same([found], [expected], [q, k, row, column, t, temperatures])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    q, k = draw((200, 32), (300, 32), dtype=dtype)
    found = pair_logsumexp(q, k, columns=True)
    expected = direct(q.float(), k.float(), torch.ones(200, 300, dtype=torch.bool))
    assert found.rows.dtype == torch.float32
    torch.testing.assert_close(found.rows, expected[0], rtol=1e-5, atol=1e-5)
    found.rows.sum().backward()
    assert q.grad.dtype == dtype


def test_autocast_does_not_reach_into_the_kernel():
    q, k = draw((64, 32), (64, 32), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pair_logsumexp(q, k, columns=True)
    torch.testing.assert_close(found.rows, pair_logsumexp(q, k).rows)


def test_float32_is_exact_to_rounding_at_low_temperature():
    q, k = draw((300, 16), (400, 16), dtype=torch.float64)
    q, k = (torch.nn.functional.normalize(x, dim=1) for x in (q, k))
    found = pair_logsumexp(q.float() / 0.005, k.float(), columns=True)
    expected = direct(q / 0.005, k, torch.ones(300, 400, dtype=torch.bool))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.floats(-300, 300))
def test_a_shift_of_all_similarities_shifts_the_result(n, m, dim, shift):
    q, k = draw((n, dim), (m, dim), seed=n * 100 + m)
    a, b = with_bias(q, k, row=torch.full((n,), shift, dtype=torch.float64))
    for moved, still in zip(
        pair_logsumexp(a, b, columns=True, method="blocks"), pair_logsumexp(q, k, columns=True), strict=True
    ):
        torch.testing.assert_close(moved, still + shift)


def test_equal_embeddings_give_log_of_their_number():
    x = torch.ones(50, 8) / math.sqrt(8)
    torch.testing.assert_close(pair_logsumexp(x / 0.1, x).rows, torch.full((50,), math.log(50) + 10))


def test_retained_graphs_give_the_same_gradient_again():
    q, k = draw((20, 4), (20, 4))
    loss = pair_logsumexp(q, k, columns=True).rows.sum()
    first = torch.autograd.grad(loss, [q, k], retain_graph=True)
    second = torch.autograd.grad(loss, [q, k])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_second_derivatives_are_refused_in_blocks_and_right_in_the_plain_way():
    q, k = draw((6, 3), (5, 3))
    (gradient,) = torch.autograd.grad(pair_logsumexp(q, k, columns=True).rows.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    assert torch.autograd.gradgradcheck(lambda q, k: pair_logsumexp(q, k, columns=True, method="plain"), (q, k))


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="older PyTorch breaks the graph in two")
def test_the_compiler_gets_the_plain_way():
    found = []
    q, k = draw((6, 3), (5, 3))
    compiled = torch.compile(
        lambda q, k: pair_logsumexp(q, k, columns=True).rows.sum(), backend=lambda g, _: found.append(g) or g.forward
    )
    torch.testing.assert_close(compiled(q, k), pair_logsumexp(q, k).rows.sum())
    assert len(found) == 1  # one graph, no break


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_logsumexp_of_nothing_is_minus_infinity(shape):
    q, k = draw((shape[0], 3), (shape[1], 3))
    found = pair_logsumexp(q, k, columns=True)
    assert (found.rows == -math.inf).all()
    assert found.rows.shape == shape[:1]
    assert found.columns.shape == shape[1:]


def test_arguments_that_do_not_fit_raise_an_error():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="query and key must be"):
        pair_logsumexp(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match="one floating type"):
        pair_logsumexp(x, x.double())
    with pytest.raises(ValueError, match="one floating type"):
        pair_logsumexp(x.long())
    with pytest.raises(ValueError, match="must agree"):
        pair_cross_entropy(x, x, x, torch.zeros(2, 4))


def test_nan_stays_visible():
    q, k = draw((10, 3), (10, 3))
    with torch.no_grad():
        q[3, 0] = math.nan
    found = pair_logsumexp(q, k, columns=True)
    assert found.rows[3].isnan()
    assert found.columns.isnan().all()
    assert torch.isfinite(pair_logsumexp(q, k).rows[[0, 1, 2, 4]]).all()


# --- positives --------------------------------------------------------------------------------------------------------


def test_positives_of_every_kind_equal_their_sums():
    q, k = draw((12, 5), (12, 5))
    s = q @ k.T
    torch.testing.assert_close(positive_similarity(q, k), s.diagonal())
    soft = torch.rand(12, 12, dtype=torch.float64)
    torch.testing.assert_close(positive_similarity(q, k, soft), (soft * s).sum(1))
    index = torch.tensor([[0, 3, -1], [2, -1, -1]] * 6)
    listed = torch.stack([s[i, row[row >= 0]].sum() for i, row in enumerate(index)])
    torch.testing.assert_close(positive_similarity(q, k, index), listed)
    labels, other = torch.tensor([5, -7, 9] * 4), torch.tensor([9, 9, 5, 1] * 3)
    found, count = class_similarity(q, k, labels, other)
    match = labels[:, None] == other
    torch.testing.assert_close(found, (s * match).sum(1))
    assert count.tolist() == match.sum(1).tolist()


# --- soft targets and pairs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 2000, kernel.KEEP])
@pytest.mark.parametrize("tile", [(512, 2048), (7, 5)])
@pytest.mark.parametrize("scale", [1.0, 40.0, 4000.0])
@pytest.mark.parametrize("small", [0, kernel.SMALL])
def test_cross_entropy_with_soft_targets_equals_the_direct_form(monkeypatch, tile, scale, keep, small):
    monkeypatch.setattr(kernel, "TILE", tile)
    monkeypatch.setattr(kernel, "SMALL", small)
    q, k, tq, tk = draw((31, 6), (23, 6), (31, 4), (23, 4), scale=scale**0.5)
    found = pair_cross_entropy(q, k, tq, tk, columns=True, keep=keep)
    s, t = q @ k.T, (tq @ tk.T).detach()
    expected = [-(t.softmax(d) * s.log_softmax(d)).sum(d) for d in (1, 0)]
    entropy = [-(t.softmax(d) * t.log_softmax(d)).sum(d) for d in (1, 0)]
    torch.testing.assert_close(found.row_entropy, entropy[0])
    torch.testing.assert_close(found.column_entropy, entropy[1])
    same([found.rows, found.columns], expected, [q, k], 1e-8)
    one_way = pair_cross_entropy(q, k, tq, tk, keep=keep).rows
    same([one_way], [-(t.softmax(1) * (q @ k.T).log_softmax(1)).sum(1)], [q, k], 1e-8)
    assert torch.autograd.grad(found.rows.sum(), tq, allow_unused=True)[0] is None


@pytest.mark.parametrize("keep", [0, kernel.KEEP])
@pytest.mark.parametrize("scale", [1.0, 40.0, 4000.0])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("small", [0, kernel.SMALL])
def test_gradients_reach_soft_targets_that_learn(monkeypatch, scale, columns, keep, small):
    monkeypatch.setattr(kernel, "TILE", (7, 5))
    monkeypatch.setattr(kernel, "SMALL", small)
    q, k, tq, tk = draw((31, 6), (23, 6), (31, 4), (23, 4), scale=scale**0.5)
    found = pair_cross_entropy(q, k, tq, tk, columns=columns, teacher_gradient=True, keep=keep)
    s, t = q @ k.T, tq @ tk.T
    expected = [-(t.softmax(d) * s.log_softmax(d)).sum(d) for d in (1, 0)][: 1 + columns]
    same([x for x in (found.rows, found.columns) if x is not None], expected, [q, k, tq, tk], 1e-8)


@pytest.mark.parametrize("tile", [(512, 2048), (7, 5)])
@pytest.mark.parametrize("keep", [0, kernel.KEEP])
@pytest.mark.parametrize("small", [0, 64 * 64])
def test_soft_targets_of_one_set_with_itself(monkeypatch, tile, keep, small):
    monkeypatch.setattr(kernel, "TILE", tile)
    monkeypatch.setattr(kernel, "SMALL", small)
    q, k, x = draw((31, 6), (31, 6), (31, 4))
    found = pair_cross_entropy(q, k, x, columns=True, teacher_gradient=True, keep=keep)
    s, t = q @ k.T, x @ x.T
    expected = [-(t.softmax(d) * s.log_softmax(d)).sum(d) for d in (1, 0)]
    same([found.rows, found.columns], expected, [q, k, x], 1e-8)


@pytest.mark.parametrize("keep", [0, 500, kernel.KEEP])
def test_softplus_of_pairs_equals_the_direct_form(monkeypatch, keep):
    monkeypatch.setattr(kernel, "TILE", (7, 5))
    q, k = draw((31, 6), (23, 6), scale=3.0)
    same([pair_softplus(q, k, keep=keep)], [torch.nn.functional.softplus(q @ k.T, threshold=40).sum(1)], [q, k])


@pytest.mark.parametrize("learnt", ["all", "query and bias", "key", "bias"])
@pytest.mark.parametrize(("small", "keep"), [(0, 0), (0, 500), (0, kernel.KEEP), (kernel.SMALL, 0)])
@pytest.mark.parametrize("own", [None, 0, 3, 8])
def test_softplus_with_a_bias_and_own_keys_equals_the_direct_form(monkeypatch, own, small, keep, learnt):
    monkeypatch.setattr(kernel, "TILE", (7, 5))
    monkeypatch.setattr(kernel, "SMALL", small)
    q, k = draw((23, 6), (31, 6), scale=3.0)
    bias = torch.tensor(-1.3, dtype=q.dtype, requires_grad=True)
    s = q @ k.T + bias
    expected = torch.nn.functional.softplus(s, threshold=40).sum(1) - (0 if own is None else s.diagonal(own)[:23])
    inputs = {"all": [q, k, bias], "query and bias": [q, bias], "key": [k], "bias": [bias]}[learnt]
    a, b, c = (x if any(x is y for y in inputs) else x.detach() for x in (q, k, bias))
    same([pair_softplus(a, b, c, own=own, keep=keep)], [expected], inputs)


@pytest.mark.parametrize("own", [-1, 9])
def test_softplus_names_own_keys_that_are_not_there(own):
    with pytest.raises(ValueError, match="own must be from 0 to 31 columns - 23 rows"):
        pair_softplus(torch.zeros(23, 2), torch.zeros(31, 2), own=own)


@pytest.mark.parametrize("columns", [False, True])
def test_no_tensor_is_nearly_as_large_as_the_matrix(columns):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else [out]:
                if isinstance(part, torch.Tensor):
                    self.entries = max(self.entries, part.untyped_storage().nbytes() // part.element_size())
            return out

    n = 6000
    q, k = draw((n, 16), (n, 16), dtype=torch.float32)
    with Largest() as seen:
        out = pair_logsumexp(q, k, columns=columns, keep=0)
        (out.rows.sum() + (out.columns.sum() if columns else 0)).backward()
        found = pair_logsumexp(q, exclude=Diagonal(), keep=0).rows.sum()
        found.backward()
    assert n * 16 <= seen.entries <= max(math.prod(kernel.TILE), n * 16) < n * n / 30


@pytest.mark.parametrize("keep", [0, 2**24])
@pytest.mark.parametrize("asked", [{"columns": True}, {}, {"symmetric": True}, {"weighted": True}])
def test_tiles_whose_rows_differ_much_are_multiplied_once_and_exact(asked, keep, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", (40, 64))
    products = []
    similarities = kernel.Operands.similarities

    def counted(self, tile):
        products.append(tile)
        return similarities(self, tile)

    monkeypatch.setattr(kernel.Operands, "similarities", counted)
    g = torch.Generator().manual_seed(0)
    q, k = (unit(torch.randn(n, 24, generator=g, dtype=torch.float64)) for n in (150, 160))
    k[:150:3] = q[::3]  # a third of the rows has a key of cosine 1, 100 above all others
    q, k = 100 * q, k
    if "symmetric" in asked:
        q, k, rest = 10 * torch.cat([k, k[:50]]), None, {"exclude": Diagonal()}
    else:
        # Weights so small that e^-50 times them is no number of float32 any more.
        tiny = {
            "weight": lambda r, c: 1e-37 ** (torch.arange(r.start, r.stop)[:, None] % 2).expand(-1, c.stop - c.start)
        }
        rest = tiny if "weighted" in asked else asked
    wanted, found = [], []
    for dtype, into, method in ((torch.float64, wanted, "plain"), (torch.float32, found, "blocks")):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (q, k) if x is not None]
        out = pair_logsumexp(*leaves, method=method, keep=keep, **rest)
        total = sum((side * torch.linspace(1, 2, len(side))).sum() for side in out if side is not None)
        into += [x for x in out if x is not None]
        into += torch.autograd.grad(total, leaves, retain_graph=True)
        into += torch.autograd.grad(total, leaves)
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()
    tiles = list(kernel.tiles(len(q), len(q if k is None else k), k is None))
    if "weighted" not in asked:
        # Kept tiles: once. Others: forward, and in each of the two backward passes.
        assert len(products) == len(tiles) * (1 if keep else 3)
