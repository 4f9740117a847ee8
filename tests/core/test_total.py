"""A sum of log Z whose gradient is made in the forward pass, and products of bf16 on a CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from counterpoint.core import distributed, kernel, precision, total
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.precision import products
from counterpoint.core.rules import Diagonal, Labels
from counterpoint.core.total import pair_logsumexp_total


def operands(n: int = 90, m: int = 130, dim: int = 16, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, dim, generator=g).to(dtype).requires_grad_() for rows in (n, m)]


@pytest.mark.parametrize("stripe", [1000, 2**23])
def test_total_and_its_gradients_are_those_of_the_rows(stripe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(total, "STRIPE", stripe)
    query, key = operands()
    share = torch.rand(len(query), dtype=torch.float64, requires_grad=True)
    label = torch.arange(130) % 7
    asked: dict[str, Any] = {
        "exclude": (Diagonal(), Labels(label[:90], label)),
        "weight": lambda r, c: 1.0 + (torch.arange(r.start, r.stop)[:, None] + torch.arange(c.start, c.stop)) % 3,
        "origin": (0, 0),
    }
    rows = pair_logsumexp(query, key, method="plain", **asked).rows
    wanted = torch.autograd.grad((share * rows).sum() * 3, (query, key, share))
    value = pair_logsumexp_total(query, key, share, **asked)
    found = torch.autograd.grad(value * 3, (query, key, share))
    torch.testing.assert_close(value, (share * rows).sum())
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stripe", [1000, 2**23])
@pytest.mark.parametrize("dim", [16, 300])
@pytest.mark.parametrize("ruled", [False, True])
def test_targets_make_it_a_cross_entropy(stripe: int, dim: int, ruled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(total, "STRIPE", stripe)
    query, key = operands(dim=dim)
    share = torch.rand(len(query), dtype=torch.float64, requires_grad=True)
    target = torch.arange(len(query)) * 7 % 11
    # The diagonal is excluded from Z, and row 0 has its target there. One row has no entry.
    asked: dict[str, Any] = {"exclude": (Diagonal(), Labels((torch.arange(90) == 3).long(), torch.ones(130).long()))}
    asked = {**asked, "weight": lambda r, c: 1.0 + torch.arange(c.start, c.stop).expand(r.stop - r.start, -1) % 3}
    asked = asked if ruled else {}
    with torch.no_grad():
        share[3] = 0.0
    rows = pair_logsumexp(query, key, method="plain", **asked).rows - (query * key[target]).sum(1)
    rows = rows.masked_fill(share == 0, 0.0)
    wanted = torch.autograd.grad((share * rows).sum() * 3, (query, key))
    value = pair_logsumexp_total(query, key, share, target=target, **asked)
    found = torch.autograd.grad(value * 3, (query, key), retain_graph=True)
    torch.testing.assert_close(value, (share * rows).sum())
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    # A gradient of one arrives: the stored gradients are given, and stay whole when they are asked for again.
    first = [x.clone() for x in torch.autograd.grad(value, (query, key), retain_graph=True)]
    again = torch.autograd.grad(value, (query, key))
    for x, y, z in zip(first, again, wanted, strict=True):
        torch.testing.assert_close(x, z / 3, rtol=1e-9, atol=1e-12)
        assert torch.equal(x, y)


def test_gradients_of_two_backward_passes_add_up() -> None:
    query, key = operands()
    value = pair_logsumexp_total(query, key)
    value.backward(retain_graph=True)
    assert query.grad is not None
    once = query.grad.clone()
    value.backward()
    torch.testing.assert_close(query.grad, 2 * once)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"target must be \[90\] whole numbers, got \[3\]"),
        (torch.zeros(90, dtype=torch.float64), "whole numbers"),
        (torch.full((90,), 130), r"target must have numbers from 0 to 129, got 130..130"),
        (torch.full((90,), -1), r"got -1..-1"),
    ],
)
def test_targets_that_name_no_key_are_an_error(target: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_logsumexp_total(*operands(), target=target)


def test_default_share_is_the_mean_and_small_matrices_agree() -> None:
    query, key = operands(5, 6)
    torch.testing.assert_close(pair_logsumexp_total(query, key), pair_logsumexp(query, key).rows.mean())


def test_a_row_without_entries_counts_only_with_a_share() -> None:
    query, key = operands(80, 80, dtype=torch.float32)
    label = torch.zeros(80, dtype=torch.long)
    label[0] = 1
    share = torch.ones(80)
    share[1:] = 0
    asked = {"exclude": Labels(label)}
    # Only rows of label 0 lose all other rows of their label; row 0 keeps them.
    value = pair_logsumexp_total(query, key, share, **asked)
    assert value.isfinite()
    query.grad = None
    value.backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
    everything = pair_logsumexp_total(query, key, exclude=Labels(torch.zeros(80, dtype=torch.long)))
    assert everything == -math.inf


def test_second_derivative_is_refused() -> None:
    query, key = operands()
    (first,) = torch.autograd.grad(pair_logsumexp_total(query, key), query, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.sum(), query)


def test_shares_of_another_length_are_an_error() -> None:
    query, key = operands()
    with pytest.raises(ValueError, match=r"share must be \[rows\] = \[90\]"):
        pair_logsumexp_total(query, key, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("way", ["rows", "total", "fixed keys", "itself"])
def test_bf16_on_a_cpu_rounds_gradients_and_not_values(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "fast_bf16", lambda: True)
    monkeypatch.setattr(kernel, "fast_bf16", lambda: True)
    query, key = operands(700, 900, 32, torch.float32)

    def value() -> torch.Tensor:
        if way == "total":
            return pair_logsumexp_total(query, key)
        if way == "itself":
            return pair_logsumexp(query, exclude=Diagonal()).rows.mean()
        return pair_logsumexp(query, key.detach() if way == "fixed keys" else key).rows.mean()

    exact = value()
    (wanted,) = torch.autograd.grad(exact, query)
    with products("bf16"):
        rounded = value()
    (found,) = torch.autograd.grad(rounded, query)
    assert torch.equal(exact, rounded)
    error = (found - wanted).norm() / wanted.norm()
    assert 1e-5 < error < 4e-3


def test_a_ring_s_backward_pass_takes_the_forward_s_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass may run in a thread without the choice of products, and under no `with` block."""
    monkeypatch.setattr(kernel, "fast_bf16", lambda: True)
    monkeypatch.setattr(distributed, "_pass_on", lambda tensors, rows, told: list(tensors))
    query, key = operands(700, 900, 32, torch.float32)
    found = []
    for kind in ("bf16", "exact"):
        with products(kind):
            rows, _ = distributed._Ring.apply(query, key, (), False)
        found.append(torch.autograd.grad(rows.sum(), query)[0])
    with products("bf16"):
        wanted = torch.autograd.grad(pair_logsumexp(query, key, keep=0).rows.sum(), query)[0]
    assert torch.equal(found[0], wanted)
    assert not torch.equal(found[0], found[1])
