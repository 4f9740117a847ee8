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
    kept = []
    for n in (256, 512):
        held: dict[int, int] = {}

        def pack(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            distance_cross_entropy(*given(n))
        kept.append(sum(held.values()))
    assert kept[1] < 2.2 * kept[0] < 256 * 256 * 8 * 2.2
