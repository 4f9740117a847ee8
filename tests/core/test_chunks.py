"""The GPU's kernels, run by Triton's interpreter on the processor, against PyTorch's own operations in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoint.core import chunks, operands
from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.contrast import pair_logsumexp, pair_logsumexp_towards, pair_softplus
from counterpoint.core.precision import chosen_products, products
from counterpoint.core.rules import Diagonal, Labels, Listed, Rule, Targets, Views, Where
from counterpoint.core.total import pair_logsumexp_total

pytest.importorskip("triton")
# The interpreter is numpy, which reports the log of an empty row and what is then masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# No multiples of a tile (32 x 64), of a step of the product (16), or of 32 rows.
N, M, D = 37, 70, 20


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels in the interpreter, with chunks of 32 rows and for the smallest matrices too."""
    monkeypatch.setattr(chunks, "interpreted", True)
    monkeypatch.setattr(chunks, "SMALL", 0)
    monkeypatch.setattr(chunks, "CHUNK", 1)


def rows(n: int, seed: int, kind: str = "exact", scale: float = 1.0) -> Tensor:
    """Draw rows that the operands' type holds without rounding."""
    x = scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return x.half().float() if kind == "fp16" else x


def labels(n: int) -> Tensor:
    return torch.arange(n) % 5 * 7 - 3


RULES: dict[str, tuple[Rule, ...]] = {
    "no rule": (),
    "its own key and two other diagonals": (Diagonal((0, 3, -2)),),
    "more diagonals than the kernel knows": (Diagonal((0, 1, 2)), Diagonal((5,))),
    "other views": (Views(18, 4),),
    "columns of the own label": (Labels(labels(N), labels(M)),),
    "columns of other labels": (Labels(labels(N), labels(M), same=False),),
    "listed columns": (Listed(torch.stack([torch.arange(N) % M, torch.full((N,), -1), torch.arange(N)[:] + 30], 1)),),
    "a function, beside a diagonal": (
        Where(lambda r, c: (torch.arange(r.start, r.stop)[:, None] + torch.arange(c.start, c.stop)) % 3 == 0),
        Diagonal((1,)),
    ),
    "everything for some rows": (Where(lambda r, c: (torch.arange(r.start, r.stop) < 5)[:, None].expand(-1, c.stop - c.start)),),
}  # fmt: skip


def weight(r: slice, c: slice) -> Tensor:
    return 0.5 + ((torch.arange(r.start, r.stop)[:, None] * 3 + torch.arange(c.start, c.stop)) % 4)


def expected(
    query: Tensor, key: Tensor, value: Callable[[Tensor, Tensor], list[Tensor]], *operands: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the values of a function of float64 operands, and the gradients of their sum weighted by sines."""
    leaves = [x.detach().double().requires_grad_() for x in (query, key, *operands)]
    return graded(value, leaves)


def graded(value: Callable[..., list[Tensor]], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    out = value(*leaves)
    total = torch.stack(
        [(torch.sin(torch.arange(len(x)) + 1.0).to(x.dtype) * x.masked_fill(x == -math.inf, 0.0)).sum() for x in out]
    )
    return [x.detach() for x in out], list(torch.autograd.grad(total.sum(), leaves, allow_unused=True))


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Assert equality within a tolerance relative to the largest entry; -inf must be -inf."""
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x == -math.inf, y == -math.inf)
        x, y = (z.masked_fill(z == -math.inf, 0.0).double() for z in (x, y))
        assert (x - y).abs().max() <= tolerance * max(1e-3, float(y.abs().max()))


def plain(query: Tensor, key: Tensor | None, **asked: Any) -> list[Tensor]:
    out = pair_logsumexp(query, key, method="plain", **asked)
    return [x for x in out if x is not None]


def tiled(query: Tensor, key: Tensor | None, **asked: Any) -> list[Tensor]:
    out = pair_logsumexp(query, key, method="blocks", **asked)
    return [x for x in out if x is not None]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kind", ["exact", "fp16"])
def test_totals_and_their_gradients_are_those_of_float64(kind: Any, targeted: bool) -> None:
    query, key, share = rows(N, 0, kind), rows(M, 1, kind), torch.linspace(0, 1, N)
    # Two rows have one target.
    target = torch.arange(N) * 3 % 50 if targeted else None

    def value(q: Tensor, k: Tensor) -> list[Tensor]:
        return [pair_logsumexp_total(q, k, share, target=target, precision=kind)[None]]

    def wanted(q: Tensor, k: Tensor) -> list[Tensor]:
        s = q @ k.T
        own = 0.0 if target is None else s.gather(1, target[:, None])[:, 0]
        return [(share.double() * (s.logsumexp(1) - own)).sum()[None]]

    found = graded(value, [query.requires_grad_(), key.requires_grad_()])
    right = graded(wanted, [x.detach().double().requires_grad_() for x in (query, key)])
    for x, y, tolerance in zip(found, right, (1e-6, 2e-6 if kind == "exact" else 1e-2), strict=True):
        close(x, y, tolerance)


@pytest.mark.parametrize("kind", ["exact", "fp16"])
@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients_are_those_of_float64(name: str, kind: Any) -> None:
    query, key = rows(N, 0, kind), rows(M, 1, kind)
    asked: dict[str, Any] = {"exclude": RULES[name], "columns": True, "weight": weight if "function" in name else None}
    values, gradients = expected(query, key, lambda q, k: plain(q, k, **asked))
    for keep in (0, 10**9):
        with products(kind):
            found = graded(lambda q, k: tiled(q, k, keep=keep, **asked), [query.requires_grad_(), key.requires_grad_()])  # noqa: B023
        close(found[0], values, 1e-6)
        # g is bf16 in half precision: 8 bits.
        close(found[1], gradients, 2e-6 if kind == "exact" else 1.2e-2)


@pytest.mark.parametrize("keep", [0, 10**9])
@pytest.mark.parametrize("columns", [True, False])
def test_rows_far_below_their_tile_keep_their_value_and_gradient(columns: bool, keep: int) -> None:
    """One row and one column are so far below the rest that exp(s - reference) underflows for them."""
    query, key = rows(N, 2), rows(M, 3)
    query[4], key[7] = -40 * key.mean(0).sign(), key[7] * 1e-3
    query[9] *= 60
    value, gradients = expected(query, key, lambda q, k: plain(q, k, columns=columns))
    found = graded(lambda q, k: tiled(q, k, columns=columns, keep=keep), [query.requires_grad_(), key.requires_grad_()])
    close(found[0], value, 1e-6)
    # float32 rounds similarities near 300 by 2e-5.
    close(found[1], gradients, 1e-4)


@pytest.mark.parametrize("keep", [0, 10**9])
@pytest.mark.parametrize("rules", [(), (Diagonal(),), (Views(34),), (Labels(labels(68)),)])
def test_a_set_with_itself_computes_the_upper_half_alone(rules: tuple[Rule, ...], keep: int) -> None:
    x = rows(68, 4)
    wanted = expected(x, x, lambda q, _: plain(q, None, exclude=rules))
    matrix = chunks.Matrix(x, x, rules, symmetric=True)
    assert [chunk.left for chunk in matrix.chunks()] == [0, 32, 64]
    found = graded(lambda q: tiled(q, None, exclude=rules, keep=keep), [x.requires_grad_()])
    close(found[0], wanted[0], 1e-6)
    close(found[1], wanted[1][:1], 2e-6)


def test_keys_without_gradient_cost_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = rows(N, 5).requires_grad_(), rows(M, 6)
    wanted = expected(query, key, lambda q, k: plain(q, k, exclude=RULES["columns of the own label"]))
    counted = []
    multiply = chunks.multiply
    monkeypatch.setattr(chunks, "multiply", lambda a, b: counted.append(1) or multiply(a, b))
    found = graded(lambda q: tiled(q, key, exclude=RULES["columns of the own label"]), [query])
    close(found[0], wanted[0], 1e-6)
    close(found[1], wanted[1][:1], 2e-6)
    # For each chunk one product for dq; the other, of the similarities, is in the kernel.
    assert len(counted) == len(list(chunks.Matrix(query, key).chunks()))


def test_targets_and_the_own_key_have_their_gradients() -> None:
    query, key = rows(N, 7), rows(N, 8)
    index = torch.stack([torch.arange(N), (torch.arange(N) + 3) % N], 1)

    def value(q: Tensor, k: Tensor) -> list[Tensor]:
        share = torch.tensor([0.75, 0.5], dtype=q.dtype).expand(N, 2)
        out = pair_logsumexp_towards(q, k, Targets(index, share, 0, N), columns=True, own=True)
        assert out.columns is not None
        assert out.own is not None
        return [out.rows, out.columns, out.towards, out.own]

    wanted = expected(query, key, value)
    found = graded(value, [query.requires_grad_(), key.requires_grad_()])
    close(found[0], wanted[0], 1e-6)
    close(found[1], wanted[1], 2e-6)


@pytest.mark.parametrize("keep", [0, 10**9])
@pytest.mark.parametrize("fixed", [True, False])
def test_softplus_of_pairs_keeps_small_values(fixed: bool, keep: int) -> None:
    query, key = rows(N, 9), rows(M, 10)
    # All similarities of row 3 are -12: its softplus is 6e-6, of which log(1 + x) keeps two digits.
    key[:, 0], query[3] = 1.0, torch.tensor([-12.0] + [0.0] * (D - 1))
    wanted = expected(query, key, lambda q, k: [torch.nn.functional.softplus(q @ k.T, threshold=100.0).sum(1)])
    leaves = [query.requires_grad_()] + ([] if fixed else [key.requires_grad_()])
    found = graded(lambda q, *k: [pair_softplus(q, k[0] if k else key, keep=keep)], leaves)
    close(found[0], wanted[0], 1e-6)
    close(found[1], wanted[1][: len(leaves)], 2e-6)
    assert float((found[0][0][3] - wanted[0][0][3]).abs() / wanted[0][0][3]) < 1e-5


@pytest.mark.parametrize("kind", ["exact", "fp16"])
@pytest.mark.parametrize("own", [None, 4])
def test_softplus_with_a_learnable_bias_is_that_of_float64(own: int | None, kind: Any) -> None:
    query, key, bias = rows(N, 9, kind), rows(M, 10, kind), torch.tensor(-30.01)  # fp16 would make -30.016 of it

    def value(q: Tensor, k: Tensor, b: Tensor) -> list[Tensor]:
        s = q @ k.T + b
        return [torch.nn.functional.softplus(s, threshold=100.0).sum(1) - (0 if own is None else s.diagonal(own)[:N])]

    wanted = expected(query, key, value, bias)
    leaves = [x.requires_grad_() for x in (query, key, bias)]
    found = graded(lambda q, k, b: [pair_softplus(q, k, b, own=own, precision=kind)], leaves)
    close(found[0], wanted[0], 1e-6 if kind == "exact" else 1e-3)
    close(found[1], wanted[1], 2e-6 if kind == "exact" else 5e-3)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("side", ["row", "column"])
def test_a_bias_is_held_by_half_precision_in_two_parts(side: str, kind: Any, dtype: torch.dtype) -> None:
    bias = torch.tensor([-10.03, 1234.5, 1e-3], requires_grad=True)
    with products(kind):
        pair = operands.with_bias(torch.zeros(3, 8), torch.zeros(3, 8), **{side: bias})
    query, key = (x.to(dtype).double() for x in pair)
    s = (query @ key.T).diagonal()
    assert ((s - bias.double()).abs() <= 2e-5 * bias.double().abs()).all()
    biased = pair[0] if side == "row" else pair[1]
    # Ones of the other side are no function of the bias.
    assert torch.equal(torch.autograd.grad(biased.sum(), bias)[0], torch.ones(3))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("taught", [True, False])
def test_cross_entropy_of_two_matrices_is_that_of_float64(taught: bool, columns: bool, alike: bool) -> None:
    m = N if alike else M
    operands = [rows(N, 11), rows(m, 12), rows(N, 13)[:, :12]] + ([] if alike else [rows(m, 14)[:, :12]])

    def value(*x: Tensor) -> list[Tensor]:
        out = pair_cross_entropy(*x, columns=columns, teacher_gradient=taught, share=0.7)
        return [y for y in out if y is not None]

    def reference(*x: Tensor) -> list[Tensor]:
        s, t = x[0] @ x[1].T, x[2] @ x[-1 if not alike else 2].T
        t = t if taught else t.detach()
        out = []
        for dim in (1, 0)[: 1 + columns]:
            soft = -(t.softmax(dim) * s.log_softmax(dim)).sum(dim)
            out.append(0.3 * s.logsumexp(dim) + 0.7 * soft)
            out.append(-(t.softmax(dim) * t.log_softmax(dim)).sum(dim).detach())
        return out

    leaves = [x.double().requires_grad_() for x in operands]
    wanted = graded(reference, leaves)
    found = graded(value, [x.requires_grad_() for x in operands])
    close(found[0], wanted[0], 2e-6)
    close([x for x in found[1] if x is not None], [x for x in wanted[1] if x is not None], 4e-6)


def test_two_runs_are_equal_to_the_last_bit() -> None:
    query, key = rows(N, 15).requires_grad_(), rows(M, 16).requires_grad_()
    one, two = (graded(lambda q, k: tiled(q, k, columns=True), [query, key]) for _ in range(2))
    for x, y in zip((*one[0], *one[1]), (*two[0], *two[1]), strict=True):
        assert torch.equal(x, y)


def test_half_precision_inputs_and_autocast_choose_the_type_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    made = chunks.Matrix.__init__
    monkeypatch.setattr(
        chunks.Matrix, "__init__", lambda self, *a, **k: (made(self, *a, **k), seen.append(self.kind))[0]
    )
    query, key = rows(N, 17), rows(M, 18)
    pair_logsumexp(query, key)
    pair_logsumexp(query.bfloat16(), key.bfloat16())
    with torch.autocast("cpu", dtype=torch.float16):
        pair_logsumexp(query, key)
    pair_logsumexp(query.bfloat16(), key.bfloat16(), precision="exact")
    pair_softplus(query, key, precision="fp16")
    assert seen == ["exact", "bf16", "fp16", "exact", "fp16"]
    assert chosen_products("cpu") == "exact"
    with pytest.raises(ValueError, match="precision must be auto or one of"):
        pair_logsumexp(query, key, precision="half")


class Waits(TorchDispatchMode):
    """Record the operations that make the processor wait for a GPU: they read a value, or their result's size is one."""

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "unique",
        "masked_select",
        "item",
        "is_nonzero",
        "equal",
        "bincount",
        "_to_copy",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.strip("_") in {n.strip("_") for n in self.NAMES} and (name != "_to_copy" or "device" in (kwargs or {})):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Launched:
    """Stand in for a kernel: count its launches and compute nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(**_: Any) -> None:
            self.count += 1

        return launch


@pytest.mark.parametrize("name", ["rules", "itself", "fixed keys", "softplus", "cross-entropy", "targets", "classes"])
def test_nothing_waits_for_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from counterpoint.core import triton_kernels

    stubs = {kernel: Launched() for kernel in ("sums", "pull", "cross_sums", "cross_pull")}
    for kernel, stub in stubs.items():
        monkeypatch.setattr(triton_kernels, kernel, stub)
    query, key = rows(N, 19).requires_grad_(), rows(N, 20).requires_grad_()
    everything = tuple(rule for rules in list(RULES.values())[1:7] for rule in rules)
    targets = Targets(torch.arange(N)[:, None], torch.ones(N, 1), 0, N)
    numbered = operands._numbered
    with Waits() as waits:
        if name == "rules":
            out = torch.cat(tiled(query, key, exclude=everything, columns=True, weight=weight)).sum()
        elif name == "itself":
            out = tiled(query, None, exclude=(Diagonal(),))[0].sum()
        elif name == "fixed keys":
            out = tiled(query, key.detach())[0].sum()
        elif name == "softplus":
            out = pair_softplus(query, key).sum()
        elif name == "cross-entropy":
            out = pair_cross_entropy(query, key, query.detach(), columns=True).rows.sum()
        elif name == "targets":
            out = pair_logsumexp_towards(query, key, targets, own=True).towards.sum()
        else:
            assert torch.equal(numbered(labels(N))[1], torch.unique(labels(N), return_inverse=True)[1])
            waits.found.clear()
            numbered(labels(N))
            return assert_quiet(waits)
        out.backward()
    assert sum(stub.count for stub in stubs.values()) >= 2
    assert_quiet(waits)
    return None


def assert_quiet(waits: Waits) -> None:
    assert waits.found == []
