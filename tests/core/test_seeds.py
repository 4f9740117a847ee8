"""seed_torch: the draws of torch.manual_seed, and all devices where there is an accelerator."""

from __future__ import annotations

import pytest
import torch

from counterpoint.core.seeds import seed_torch


@pytest.mark.parametrize("seed", [0, 7, 2**63, -1])
def test_the_draws_are_those_of_manual_seed(seed):
    torch.manual_seed(seed)
    wanted = torch.rand(3)
    seed_torch(seed)
    assert torch.equal(torch.rand(3), wanted)


def test_an_accelerator_is_seeded_too(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "manual_seed", asked.append)
    seed_torch(5)
    assert asked == [5]
