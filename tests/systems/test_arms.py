"""The arms of claims train what they are named for: each loss is compared with the paper's function of the same rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from counterpoint import catalog
from counterpoint import functional as fn
from counterpoint.core.memory import kmeans
from counterpoint.core.operands import unit
from counterpoint.engine.survey import Survey
from counterpoint.experiment import Experiment
from counterpoint.lab.protocol import of_system, slugs
from counterpoint.systems.settings import with_settings


def learner_of(slug: str, arm: str, modalities: str) -> Any:
    """Build a learner with the settings of an arm of the claim, for vectors of 5 numbers."""
    claim, system = of_system(slug), catalog.load_system(slug)
    settings = {**claim.setting, **claim.arms[arm]}
    config = with_settings(system.config(), settings)
    facts = SimpleNamespace(modalities={name: {"kind": "vector", "dim": 5} for name in modalities}, tokenizers={})
    return system.learner(config, facts, 0)


def batch_of(modalities: str, n: int = 7) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    return {
        "inputs": {name: torch.rand(n, 5, generator=draw) for name in modalities},
        "present": {name: torch.ones(n).bool() for name in modalities},
        "index": torch.arange(n),
    }


@pytest.mark.parametrize("arm", ["clip", "symile"])
def test_symile_s_arms_have_the_loss_of_their_name(arm: str) -> None:
    learner, batch = learner_of("symile", arm, "abc").eval(), batch_of("abc")
    rows = list(learner.embed(batch).values())
    scale = learner.log_scale.exp()
    torch.manual_seed(3)
    found = learner.loss(batch)["loss"]
    torch.manual_seed(3)
    if arm == "clip":
        wanted = fn.clip_pairwise_loss(rows, scale)
    else:
        wanted = fn.symile(rows, scale, learner.config.negatives)
    torch.testing.assert_close(found, wanted)
    other = fn.symile(rows, scale) if arm == "clip" else fn.clip_pairwise_loss(rows, scale)
    assert abs(float((found - other).detach())) > 1e-3


@pytest.mark.parametrize(
    ("arm", "terms"),
    [("clip", (False, False, 0.0)), ("cua", (True, True, 0.0)), ("cuaxu", (True, True, 1.0))],
)
def test_contrastive_gap_s_arms_have_the_terms_of_their_name(arm: str, terms: tuple[bool, bool, float]) -> None:
    learner, batch = learner_of("contrastive-gap", arm, "ab").eval(), batch_of("ab")
    learner.position.epoch = 1000  # after the cross term's warm-up
    a, b = learner.embed(batch).values()
    found = learner.loss(batch)
    uniform, aligned, cross = terms
    wanted, parts = fn.contrastive_gap_loss(a, b, learner.config.temperature, uniform, aligned, cross)
    torch.testing.assert_close(found["loss"], wanted)
    assert set(found) == {"loss", *parts}
    for others in [(False, False, 0.0), (True, True, 0.0), (True, True, 1.0)]:
        if others != terms:
            other, _ = fn.contrastive_gap_loss(a, b, learner.config.temperature, *others)
            assert abs(float((found["loss"] - other).detach())) > 1e-4


@pytest.fixture
def mcl() -> tuple[Any, Any]:
    settings = {"encoder": "conv-s", "batch_size": 16, "epochs": 1, "mcl.stages": 2, "mcl.clusters": 3}
    experiment = Experiment.resolve("mcl", "digits?size=8&held_out=0.4&train=120", overrides=settings)
    task = experiment.task()
    learner = experiment.learner(task.facts, 0)
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    return learner, learner.survey


def test_mcl_clusters_the_normalised_projections_of_the_stage_that_ended(mcl: tuple[Any, Any]) -> None:
    learner, survey = mcl
    learner.eval()
    with torch.no_grad():
        rows = survey.over("train", lambda batch: unit(learner.base.projector(learner.base.embed(batch["image"]))))
    wanted = kmeans(rows, 3, seed=learner.seed).labels
    old = {name: value.clone() for name, value in learner.base.encoder.state_dict().items()}
    learner._next_stage(survey)
    assert torch.equal(learner.assigned[0], wanted)
    assert all(torch.equal(old[name], value) for name, value in learner.earlier[0].state_dict().items())
    assert any(not torch.equal(old[name], value) for name, value in learner.base.encoder.state_dict().items())


def test_mcl_s_stages_begin_with_fresh_optimisers_and_batches_of_the_groups_so_far(mcl: tuple[Any, Any]) -> None:
    learner, survey = mcl
    first, second, third = learner.stages()
    assert [stage.name for stage in (first, second, third)] == ["stage 0", "stage 1", "stage 2"]
    assert first.batches is None
    assert not any(stage.carry for stage in (first, second, third))
    assert all(stage.epochs == first.epochs for stage in (second, third))
    learner._next_stage(survey)
    one = learner.groups()
    assert one is not None
    assert set(np.unique(one)) <= set(range(3))
    learner._next_stage(survey)
    both = learner.groups()
    assert both is not None
    pairs = set(zip(learner.assigned[0].tolist(), learner.assigned[1].tolist(), strict=True))
    assert len(set(both.tolist())) == len(pairs)  # a group is what both stages agree on


@pytest.mark.parametrize("slug", sorted(slugs()))
def test_no_two_arms_of_a_claim_are_the_same_run(slug: str) -> None:
    claim = of_system(slug)
    for part in (claim, *claim.variants.values()):
        configs = {
            arm: str(Experiment.resolve(slug, part.data, overrides=part.settings(arm)).config) for arm in part.arms
        }
        assert len(set(configs.values())) == len(configs), "arms with equal settings"
