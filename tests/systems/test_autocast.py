"""Learners under autocast: networks compute in bfloat16, losses in float32."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from counterpoint import catalog
from counterpoint.engine.survey import Survey
from counterpoint.training import default_config, load_source, task_of


@pytest.mark.parametrize(
    ("slug", "data"),
    [
        ("simclr", "digits"),
        ("vicreg", "digits"),
        ("supcon", "digits"),
        ("isogclr", "digits"),
        ("siglip", "digit-captions"),
        ("symile", "xor"),
        ("macil-sd", "async-bags?train=64&test=4"),
    ],
)
def test_losses_under_autocast_are_float32_and_near_those_without(slug: str, data: str) -> None:
    system = catalog.load_system(slug)
    config = replace(default_config(slug, data), batch_size=32)
    config = replace(config, encoder="mlp-s") if hasattr(config, "encoder") else config
    task = task_of(system, load_source(system, data), config)
    totals = []
    for enabled in (False, True):
        learner = system.learner(config, SimpleNamespace(**task.facts), 0)
        learner.survey = Survey(task, learner)
        learner.begin(learner.survey)
        learner.epochs, learner.steps_per_epoch, learner.total_steps = 1, 1, 1
        batch = next(iter(task.train_loader(0, learner.position)))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.manual_seed(0)
            prepared = learner.prepare(batch, torch.Generator().manual_seed(0))
            turns = [((turn.loss or learner.loss)(prepared), turn.minimise) for turn in learner.turns()]
        total = torch.stack([losses[name] for losses, name in turns]).sum()
        assert total.dtype == torch.float32
        total.backward()
        gradients = [p.grad for p in learner.parameters() if p.grad is not None]
        assert gradients
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        totals.append(total.item())
    # bfloat16 networks have 8 bits of precision; a loss in bfloat16 would be off by more.
    assert totals[1] == pytest.approx(totals[0], rel=2e-2)
