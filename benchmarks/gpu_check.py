"""Check the kernel on a GPU against float64 on the CPU: every function and rule, in four types of product. `gpu.py` calls it."""

from __future__ import annotations

import json
import math
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from counterpoint.core.affinities import pair_cross_entropy
from counterpoint.core.contrast import pair_logsumexp, pair_logsumexp_towards, pair_softplus
from counterpoint.core.operands import class_similarity
from counterpoint.core.precision import Products, products
from counterpoint.core.rules import Diagonal, Labels, Listed, Rule, Targets, Views, Where
from counterpoint.core.total import pair_logsumexp_total

# Largest error of values (absolute, of logs) and of gradients (relative to the largest), by type of product.
ALLOWED = {"exact": (5e-6, 5e-6), "tf32": (5e-2, 5e-2), "bf16": (2e-1, 1e-1), "fp16": (5e-2, 3e-2)}
TYPES: dict[Products, torch.dtype | None] = {
    "exact": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip

# Rows, columns and width: no multiples of a tile.
SIZES = (1403, 1797, 200)

# Processes that check at once. Compiling about 100 kernels takes most of the time: three minutes in one process.
PROCESSES = 8

Function = Callable[..., list[Tensor]]


def cases(n: int, m: int, dim: int) -> dict[str, tuple[Function, list[tuple[int, int]]]]:
    """Return name -> (function of operands, shapes of the operands). A function works on the operands' device and type."""

    def labels(rows: int, like: Tensor) -> Tensor:
        return torch.arange(rows, device=like.device) % 37 - 5

    def rule_case(rules: Callable[[Tensor], tuple[Rule, ...]], **asked: Any) -> Function:
        def run(q: Tensor, k: Tensor) -> list[Tensor]:
            plain = "plain" if q.dtype == torch.float64 else "auto"
            out = pair_logsumexp(q, k, exclude=rules(q), columns=True, method=plain, **asked)
            return [x for x in out if x is not None]

        return run

    def itself(q: Tensor) -> list[Tensor]:
        plain = "plain" if q.dtype == torch.float64 else "auto"
        return [pair_logsumexp(q, exclude=Diagonal(), method=plain).rows]

    def grid(r: slice, c: slice, like: Tensor) -> Tensor:
        rows = torch.arange(r.start, r.stop, device=like.device)[:, None]
        return rows + torch.arange(c.start, c.stop, device=like.device)

    def far_apart(**asked: Any) -> Function:
        run = rule_case(lambda q: (Diagonal((0,)),), **asked)
        # Powers of two, which half precision holds: one reference does not do for all rows of a tile.
        return lambda q, k: run(q * 2.0 ** (torch.arange(n, device=q.device) % 6).to(q.dtype)[:, None], k)

    def weighted(q: Tensor, k: Tensor) -> list[Tensor]:
        plain = "plain" if q.dtype == torch.float64 else "auto"
        weight = lambda r, c: 0.5 + grid(r, c, q) % 4  # noqa: E731
        return [pair_logsumexp(q, k, weight=weight, method=plain).rows]

    def targets(q: Tensor, k: Tensor) -> list[Tensor]:
        index = torch.stack([torch.arange(n), (torch.arange(n) + 3) % m], 1).to(q.device)
        share = torch.full((n, 2), 0.5, dtype=q.dtype, device=q.device)
        if q.dtype == torch.float64:
            s = q @ k.T
            return [s.logsumexp(1), (s.gather(1, index) * share).sum(1)]
        out = pair_logsumexp_towards(q, k, Targets(index, share, 0, m))
        return [out.rows, out.towards]

    def softplus(q: Tensor, k: Tensor, bias: Tensor) -> list[Tensor]:
        if q.dtype == torch.float64:
            s = q @ k.T + bias[0]
            return [torch.nn.functional.softplus(s, threshold=100.0).sum(1) - s.diagonal(m - n)]
        return [pair_softplus(q, k, bias[0], own=m - n)]

    def total(q: Tensor, k: Tensor) -> list[Tensor]:
        return [(q @ k.T).logsumexp(1).mean() if q.dtype == torch.float64 else pair_logsumexp_total(q, k)]

    def targeted(q: Tensor, k: Tensor) -> list[Tensor]:
        own = torch.arange(n, device=q.device) * 7 % m
        if q.dtype == torch.float64:
            return [torch.nn.functional.cross_entropy(q @ k.T, own)]
        return [pair_logsumexp_total(q, k, target=own)]

    def cross(q: Tensor, k: Tensor, tq: Tensor, tk: Tensor) -> list[Tensor]:
        if q.dtype == torch.float64:
            s, t = q @ k.T, tq @ tk.T
            return [-(t.softmax(d) * s.log_softmax(d)).sum(d) for d in (1, 0)]
        out = pair_cross_entropy(q, k, tq, tk, columns=True, teacher_gradient=True)
        assert out.columns is not None
        return [out.rows, out.columns]

    def by_class(q: Tensor, k: Tensor) -> list[Tensor]:
        return [class_similarity(q, k, labels(n, q), labels(m, q))[0]]

    two = [(n, dim), (m, dim)]
    listed = torch.stack([torch.arange(n) % m, torch.full((n,), -1), (torch.arange(n) * 7) % m], 1)
    return {
        "no rule": (rule_case(lambda q: ()), two),
        "nothing kept": (rule_case(lambda q: (), keep=0), two),
        "far apart": (far_apart(), two),
        "far apart, nothing kept": (far_apart(keep=0), two),
        "diagonals": (rule_case(lambda q: (Diagonal((0, 3, -2)),)), two),
        "views": (rule_case(lambda q: (Views(n // 2, 4),)), two),
        "own label": (rule_case(lambda q: (Labels(labels(n, q), labels(m, q)),)), two),
        "other labels": (rule_case(lambda q: (Labels(labels(n, q), labels(m, q), same=False),)), two),
        "listed": (rule_case(lambda q: (Listed(listed.to(q.device)),)), two),
        "where": (rule_case(lambda q: (Where(lambda r, c: grid(r, c, q) % 3 == 0), Diagonal((1,)))), two),
        "weights": (weighted, two),
        "itself": (itself, [(n, dim)]),
        "targets": (targets, two),
        "softplus": (softplus, [*two, (1,)]),
        "total": (total, two),
        "total with targets": (targeted, two),
        "by class": (by_class, two),
        "cross-entropy": (cross, [*two, (n, dim // 2), (m, dim // 2)]),
    }


def graded(value: Function, leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    out = value(*leaves)
    total = torch.stack([(torch.sin(torch.arange(x.numel(), device=x.device) + 1.0).to(x.dtype).view_as(x)
                          * x.masked_fill(x == -math.inf, 0.0)).sum() for x in out]).sum()  # fmt: skip
    return [x.detach() for x in out], list(torch.autograd.grad(total, leaves))


def compared(name: str, kind: Products, device: str, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Compare one case, in one type of product, with float64, and with itself run again."""
    value, shapes = cases(*sizes)[name]
    torch.manual_seed(0)
    dtype = TYPES[kind]
    operands = [torch.randn(*shape) * 0.4 for shape in shapes]
    # The reference has the rounded operands: what remains is the error of the computation.
    given = [x if dtype is None else x.to(dtype).float() for x in operands]
    wanted = graded(value, [x.double().requires_grad_() for x in given])
    with products(kind):
        leaves = [x.to(device).requires_grad_() for x in given]
        found, again = graded(value, leaves), graded(value, leaves)
    equal = all(torch.equal(x, y) for x, y in zip((*found[0], *found[1]), (*again[0], *again[1]), strict=True))
    pairs = [(x.cpu().double(), y) for x, y in zip(found[0], wanted[0], strict=True)]
    empty = all(torch.equal(x == -math.inf, y == -math.inf) for x, y in pairs)
    values = max(error(x, y) / (1 + largest(y)) for x, y in pairs)
    gradients = max(error(x.cpu().double(), y) / largest(y) for x, y in zip(found[1], wanted[1], strict=True))
    good = empty and equal and values <= ALLOWED[kind][0] and gradients <= ALLOWED[kind][1]
    return {"case": name, "products": kind, "value": values, "gradient": gradients, "equal": equal, "good": good}


def largest(x: Tensor) -> float:
    """Return the largest magnitude of a tensor; rows without an entry, -inf, do not count."""
    return float(x.masked_fill(x == -math.inf, 0.0).abs().max())


def error(x: Tensor, y: Tensor) -> float:
    """Return the largest difference of two tensors; places where both are -inf do not count."""
    return float((x - y).masked_fill((x == -math.inf) & (y == -math.inf), 0.0).abs().max())


def reported(name: str, kinds: Sequence[Products], device: str, sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Compare one case in each type of product; one that ends in an error is a result, too."""
    rows = []
    for kind in kinds:
        try:
            rows.append(compared(name, kind, device, sizes))
        except Exception:
            rows.append({"case": name, "products": kind, "error": traceback.format_exc()[-2000:], "good": False})
    return rows


def check(
    device: str = "cuda",
    sizes: tuple[int, int, int] = SIZES,
    kinds: Sequence[Products] = tuple(TYPES),
    processes: int = PROCESSES,
) -> list[dict[str, Any]]:
    """Compare every case, in each type of product, with float64."""
    one = partial(reported, kinds=kinds, device=device, sizes=sizes)
    names = list(cases(*sizes))
    if processes == 1:
        found = [one(name) for name in names]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            found = pool.map(one, names, chunksize=1)
    rows = [row for case in found for row in case]
    for row in rows:
        if not row["good"]:
            print(f"WRONG {json.dumps(row)}", flush=True)
    print(f"{sum(row['good'] for row in rows)} of {len(rows)} checks are good", flush=True)
    return rows
