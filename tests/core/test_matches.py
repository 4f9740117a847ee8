"""Pairs judged by their distance: blocks equal the whole matrix, and the matrix is not kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.core import matches
from counterpoint.core.matches import distance_cross_entropy


def given(n: int, dim: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    rows = [F.normalize(torch.randn(n, dim, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2)]
    return [*rows, *(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, 2.0))]


@pytest.mark.parametrize("pairs", [2**20, 40, 1])
def test_blocks_of_rows_have_the_value_and_the_gradients_of_the_whole_matrix(pairs, monkeypatch):
    monkeypatch.setattr(matches, "BLOCK", pairs)
    x, y, scale, shift = inputs = given(17)
    logits = shift - scale * (torch.cdist(x, y).square() + 1e-6).sqrt()
    wanted = F.binary_cross_entropy_with_logits(logits, torch.eye(17, dtype=torch.float64), reduction="sum")
    found = distance_cross_entropy(*inputs)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_memory_is_linear_in_the_number_of_rows(monkeypatch):
    monkeypatch.setattr(matches, "BLOCK", 2**10)
    sizes, block = [], matches._block

    def watched(x, y, *more):
        sizes.append(len(x) * len(y))
        return block(x, y, *more)

    monkeypatch.setattr(matches, "_block", watched)
    for n in (64, 128):
        loss = distance_cross_entropy(*given(n))
        kept = loss.grad_fn.saved_tensors
        assert sum(tensor.nbytes for tensor in kept) == (2 * n * 8 + 2) * 8  # a gradient of every input, no matrix
    assert max(sizes) <= 2**10


def test_blocks_refuse_a_second_derivative(monkeypatch):
    monkeypatch.setattr(matches, "BLOCK", 40)
    inputs = given(17)
    (first,) = torch.autograd.grad(distance_cross_entropy(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="a loss over 17 x 17 distances"):
        first.square().sum().backward()
