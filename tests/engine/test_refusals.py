"""What cannot be trained or resumed is refused by name, and nothing half-written is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import Kill, Killed, Task, Toy, adam

from counterpoint.engine.fit import fit
from counterpoint.engine.loading import Batches, Steps
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.stages import Stage
from counterpoint.engine.state import STATE
from counterpoint.engine.teachers import snapshot
from counterpoint.errors import CounterpointError, RunError


def of(*stages):
    class Odd(Toy):
        def stages(self):
            return [stage(self) if callable(stage) else stage for stage in stages]

    return Odd()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "has no stage: there is nothing to train"),
        ([Stage("idle", 0)], "stage idle of Odd has 0 epochs"),
        ([Stage("fine", 1), Stage("idle", -1)], "stage idle of Odd has -1 epochs"),
        ([Stage("still", 1, trains=lambda: [nn.Tanh()])], "stage still of Odd trains no parameter"),
        ([Stage("fine", 1), Stage("still", 1, trains=list)], "stage still of Odd trains no parameter"),
        ([Stage("still", 1, turns=list)], "stage still of Odd trains no parameter"),
        (
            [lambda self: Stage("still", 1, trains=lambda: [self.head], turns=lambda: [_all(self.encoder)])],
            "stage still of Odd trains no parameter",
        ),
        ([Stage("empty", 1, batches=lambda survey: Steps(0))], "stage empty of Odd has no batch"),
        (
            [Stage("empty", 1, batches=lambda survey: Batches(3, 4, drop_last=True))],
            "stage empty of Odd has no batch; use a smaller --batch-size",
        ),
    ],
)
def test_stages_that_cannot_be_trained_raise_an_error(stages, message, tmp_path):
    run = Run.create(tmp_path, {"slug": "simclr"}, "run")
    before = sorted(run.path.iterdir())
    with pytest.raises(CounterpointError, match=message):
        fit(of(*stages), Task(), run=run, bar=False)
    assert sorted(path for path in run.path.iterdir() if path.name != STATE) == before
    assert run.state is not None
    assert run.state.state == "failed"
    assert not run.begun


def _all(module):
    turn = adam(nn.Linear(1, 1))
    turn.optimizers[0].param_groups[0]["params"] = list(module.parameters())
    return turn


def test_a_stage_that_finds_out_later_that_it_trains_nothing(tmp_path):
    """Its modules are made as it begins. What was trained before stays, to be resumed."""

    class Late(Toy):
        def stages(self):
            return [Stage("fine", 1), Stage("still", 1, enter=self.cut, trains=lambda: [self.head])]

        def cut(self, survey):
            self.head = nn.Flatten()

    run = Run.create(tmp_path, {"slug": "simclr"}, "run")
    with pytest.raises(CounterpointError, match="stage still of Late trains no parameter"):
        fit(Late(), Task(), run=run, bar=False)
    assert run.checkpoint.is_file()
    assert [row["epoch"] for row in run.metrics()] == [0]


def test_an_optimiser_over_nothing_is_named():
    from counterpoint.engine.optim import OptimConfig, optimisers

    with pytest.raises(CounterpointError, match="nothing to train"):
        optimisers(OptimConfig(), [nn.Linear(2, 2).requires_grad_(False)], 1, 4)


def test_a_teacher_that_a_resumed_run_would_not_have(tmp_path):
    class Sudden(Toy):
        def stages(self):
            return [Stage("fine", 1), Stage("taught", 1, enter=self.make)]

        def make(self, survey):
            self.old = snapshot(self.encoder)

    with pytest.raises(
        CounterpointError, match=r"stage taught of Sudden makes a teacher \(old\) that a resumed run would"
    ):
        fit(Sudden(), Task(), bar=False)


@pytest.fixture
def halted(tmp_path):
    run = Run.create(tmp_path, {"slug": "simclr"}, "run")
    with pytest.raises(Killed):
        fit(Toy(), Task(), run=run, bar=False, loop=Loop(checkpoint_minutes=0), callbacks=[Kill(step=4)])
    return run


def refused(run, message, learner=None, task=None):
    held = run.checkpoint.read_bytes()
    with pytest.raises(RunError, match=message):
        fit(learner or Toy(), task or Task(), run=run, bar=False)
    assert run.checkpoint.read_bytes() == held


def test_resuming_with_other_data_raises_an_error(halted):
    refused(halted, "the data has 12 training items now, this run was begun on 10: restore", task=Task(examples=12))


def test_resuming_with_other_teachers_raises_an_error(halted):
    class Taught(Toy):
        def __init__(self):
            super().__init__()
            self.old = snapshot(self.encoder)

    refused(halted, r"written with other teachers \(none\) than this learner has \(old\)", Taught())


def test_a_checkpoint_of_an_older_version_raises_an_error(halted):
    torch.save({"pytorch-lightning_version": "2.5", "state_dict": {}, "loops": {}}, halted.checkpoint)
    refused(halted, r"last\.ckpt is from an older version of counterpoint, .* delete the file to start this run over")


def test_an_incomplete_checkpoint_raises_an_error(halted):
    state = torch.load(halted.checkpoint)
    del state["turns"]
    torch.save(state, halted.checkpoint)
    refused(halted, r"last\.ckpt cannot be resumed from \(KeyError\); delete it")
