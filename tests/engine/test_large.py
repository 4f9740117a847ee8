"""`--accumulate N`: the gradients of the whole batch, for every learner whose networks see each row by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterpoint import catalog
from counterpoint.engine.fit import Fit
from counterpoint.engine.large import check_row_wise, running
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.survey import Survey
from counterpoint.errors import CounterpointError
from counterpoint.experiment import Experiment

IMAGES = {"encoder": "vit-s", "batch_size": 12, "epochs": 1}
ALIGNED = {"image_encoder": "vit-s", "batch_size": 12, "epochs": 1}
PICTURES = "digits"


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(part) for key, part in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(doubled(part) for part in value)
    if hasattr(value, "_fields"):
        return type(value)(*(doubled(part) for part in value))
    return value


def started(slug: str, data: str | None, settings: dict[str, Any], parts: int) -> tuple[Fit, dict[str, Any]]:
    """A fit at its first step, in float64, and that step's batch."""
    experiment = Experiment.resolve(slug, data, overrides=settings)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    learner.double()
    prepare = learner.prepare
    learner.prepare = lambda batch, generator: doubled(prepare(batch, generator))  # type: ignore[method-assign]
    fit = Fit(learner, task, Loop(accumulate=parts), 1, None, (), None)
    fit.stand_at(learner.position.state())
    return fit, next(iter(fit.loader))


def compared(slug: str, data: str | None, settings: dict[str, Any], batch_changed: Any = None) -> None:
    """One step in three parts is one step of the whole batch: losses, gradients, weights, buffers."""
    found = []
    for parts in (1, 3):
        fit, batch = started(slug, data, settings, parts)
        if batch_changed is not None:
            batch = batch_changed(batch)
        calls: list[int] = []
        if parts > 1:
            for module, _ in fit.learner.row_wise():
                module.register_forward_hook(lambda *_: calls.append(1))
        gradients: dict[str, Tensor] = {}
        before_step = fit.learner.before_step

        def noted(fit: Fit = fit, gradients: dict[str, Tensor] = gradients, then: Any = before_step) -> None:
            then()
            gradients |= {n: p.grad.clone() for n, p in fit.learner.named_parameters() if p.grad is not None}

        fit.learner.before_step = noted  # type: ignore[method-assign]
        losses = fit.step(batch)
        found.append((losses, gradients, dict(fit.learner.state_dict())))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert one
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


# Every system that is built stands in one of these lists: compared with N = 1, or refused for a reason.
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        ("simclr", "simsiam", "byol", "moco-v1", "moco-v2", "barlow-twins", "vicreg", "cacr", "swav", "dino"),
        (PICTURES, IMAGES),
    ),
    **dict.fromkeys(("dcl", "hard-contrastive", "hallucinator", "isogclr", "mochi", "adainf", "mcl"), (PICTURES, IMAGES)),
    "mae": (PICTURES, IMAGES | {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}),
    **dict.fromkeys(("supcon", "triplet"), (PICTURES, IMAGES)),
    "mean-teacher": (PICTURES, IMAGES | {"labelled_batch": 4}),
    **dict.fromkeys(("kd", "rkd", "crd"), (PICTURES, IMAGES | {"teacher_epochs": 0, "teacher_encoder": "vit-s"})),
    **dict.fromkeys(("clip", "siglip", "contrastive-gap", "cwcl", "improved-vlp-baselines"), ("digit-captions", ALIGNED)),
    "albef": ("digit-captions", ALIGNED),
    "m3col": ("digit-halves", {"batch_size": 12, "epochs": 1}),
    "symile": ("xor", {"batch_size": 12, "epochs": 1}),
    "gradient-harmonization": ("noisy-triplets", {"batch_size": 12, "epochs": 1, "realign": True}),
    "macil-sd": ("async-bags?train=24&test=4", {"batch_size": 12, "epochs": 1, "dropout": 0.0}),
}
REFUSED = {
    "attention-transfer": (PICTURES, IMAGES | {"teacher_epochs": 0, "teacher_encoder": "resnet-s", "encoder": "resnet-s"}),
    "fitnets": (PICTURES, IMAGES | {"teacher_epochs": 0, "teacher_encoder": "resnet-s", "encoder": "resnet-s"}),
    "audio-sheet-retrieval": ("scores", {"batch_size": 12, "epochs": 1}),
}


def test_every_system_is_compared_or_refused() -> None:
    built = {row.slug for row in catalog.entries().values() if row.built}
    assert built == set(EXACT) | set(REFUSED)


@pytest.mark.parametrize("slug", sorted(EXACT))
def test_a_step_in_parts_is_the_step_of_the_whole_batch(slug: str) -> None:
    compared(slug, *EXACT[slug])
