"""Packed weights: the products of linear layers, for a few rows on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from counterpoint.encoders.packed_weights import LEAST_STEPS, MOST_ROWS, packed_weights

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(160, 840), nn.Linear(840, 200, bias=False), nn.Linear(200, 8))  # the last is small


@pytest.mark.parametrize("rows", [2, 3, 4, 7, MOST_ROWS, MOST_ROWS + 1])
def test_products_of_packed_weights_equal_those_of_the_layers(rows):
    network, x = layers(), torch.randn(rows, 1, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        right = network(x)
        with packed_weights([network], min(rows, MOST_ROWS), LEAST_STEPS) as count:
            assert count == 2
            weight = network[1].weight.clone()
            network[1].weight.zero_()
            kept = network(x)  # of the packed copies, while the batch has a few rows
            network[1].weight.copy_(weight)
            found = network(x)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, found) == (rows <= MOST_ROWS)
    assert not any("forward" in layer.__dict__ for layer in network)


@pytest.mark.parametrize(
    ("rows", "steps", "dtype"),
    [
        (1, LEAST_STEPS, torch.float32),
        (MOST_ROWS + 1, LEAST_STEPS, torch.float32),
        (2, LEAST_STEPS - 1, torch.float32),
        (2, LEAST_STEPS, torch.bfloat16),
    ],
)
def test_nothing_is_packed_where_it_would_not_help(rows, steps, dtype):
    network = layers().to(dtype)
    with packed_weights([network], rows, steps) as count:
        assert count == 0


def test_weights_that_would_take_too_much_memory_are_not_packed(monkeypatch):
    monkeypatch.setattr("counterpoint.encoders.packed_weights.MOST", 160 * 840 + 840 * 200 - 1)
    with packed_weights([layers()], 2, LEAST_STEPS) as count:
        assert count == 0


def test_layers_are_restored_after_an_error():
    network = layers()
    with pytest.raises(RuntimeError, match="stop"), packed_weights([network], 2, LEAST_STEPS):
        raise RuntimeError("stop")
    assert not any("forward" in layer.__dict__ for layer in network)
