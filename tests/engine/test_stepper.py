"""Stepper of a stage without the loop around them."""

from __future__ import annotations

import pytest
from toy import Config, Task, Toy, adam

from counterpoint.engine.loading import Batches
from counterpoint.engine.options import Loop
from counterpoint.engine.stages import Stage
from counterpoint.engine.stepper import Stepper, seed_of
from counterpoint.engine.survey import Survey


class Staged(Toy):
    """A learner with batches of its own in the second stage, and one schedule of each kind."""

    def stages(self) -> list[Stage]:
        return [Stage("first", 1), Stage("second", 1, batches=lambda survey: Batches(survey.examples, 5))]

    def turns(self):
        return [adam(self.encoder, per_step=True), adam(self.head)]


def standing(stage: int) -> Stepper:
    learner, task = Staged(), Task(Config())
    learner.survey = Survey(task, learner)
    learner.begin(learner.survey)
    stepper = Stepper(learner, task, Loop())
    stepper.stand_at(learner.position.state() | {"stage": stage})
    return stepper


def test_a_stage_with_its_own_batches_is_prepared_without_a_fit() -> None:
    assert [len(next(iter(standing(stage).loader))["x"]) for stage in (0, 1)] == [4, 5]


def test_schedules_advance_at_their_own_rhythm() -> None:
    stepper = standing(0)
    stepper.step(next(iter(stepper.loader)))
    assert stepper.rates() == {"lr": 0.01, "lr/1": 0.01}
    stepper.advance(per_step=True)
    assert stepper.rates() == pytest.approx({"lr": 0.009, "lr/1": 0.01})
    stepper.advance(per_step=False)
    assert stepper.rates() == pytest.approx({"lr": 0.009, "lr/1": 0.009})


def test_seeds_depend_on_every_number_and_their_order() -> None:
    seeds = {seed_of(1, 2, 3), seed_of(1, 3, 2), seed_of(0, 2, 3), seed_of(1, 2)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
