"""Two processes train as one: stages, turns that reach some parameters, surveys, teachers' outputs, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from toy import Config, Task, Toy, adam

from counterpoint.core.distributed import global_mean
from counterpoint.core.world import leave, over, processes
from counterpoint.engine.fit import fit
from counterpoint.engine.gradients import average
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.services import Callback
from counterpoint.engine.stages import Stage
from counterpoint.engine.survey import Survey
from counterpoint.engine.teachers import cached, snapshot
from counterpoint.errors import CounterpointError, Interrupted
from counterpoint.experiment import Experiment

DIGITS = "digits?size=16&train=40&held_out=0.02"
# Vision transformers have no batch statistics, and dropout differs between processes: none. Plain steps, as Adam would blow up
# gradients that are zero but for rounding.
SMALL = {
    "encoder": "vit-s", "batch_size": 9, "evaluate_every": 1, "bank": 40, "warmup_epochs": 0, "optimizer": "momentum",
    "lr": 0.1,
}  # fmt: skip
BUILT = {
    "kd": SMALL | {"teacher_encoder": "vit-s", "teacher_epochs": 1, "epochs": 1, "kd_weight": 1.0},
    # The search, and a student that is found, whose batch normalisation is over all processes.
    "diswot": SMALL
    | {"encoder": "", "teacher_encoder": "resnet-cifar:1-1-1?width=2", "width": 2, "choices": (1, 2), "score_batch": 8}
    | {"teacher_epochs": 0, "epochs": 1, "candidates": 3, "population": 2, "gradient_weight": 0.5},
    "mcl": SMALL | {"epochs": 1, "hidden": 8, "projection": 8, "mcl.stages": 1, "mcl.clusters": 2},
}


class Sides(Toy):
    """Turns that reach some parameters; one is reached on the first process only, one by nobody, one buffer is drawn locally."""

    def __init__(self, seed=0):
        super().__init__(seed, dropout=0.0)
        self.side = torch.nn.Linear(6, 1)
        self.never = torch.nn.Linear(6, 1)
        self.register_buffer("own", torch.zeros(1))

    def stages(self):
        return [Stage("first", 2), Stage("second", 1, trains=lambda: [self.encoder, self.side])]

    def turns(self):
        whole = adam(self.encoder, self.head) if self.position.stage == 0 else adam(self.encoder)
        return [whole, adam(self.side, self.never, loss=self.beside, minimise="side")]

    def beside(self, batch):
        # The first row of the batch, which the first process has.
        if processes()[0]:
            return {"side": global_mean(torch.zeros(len(batch["x"]), requires_grad=True))}
        value = self.side(batch["x"])[:, 0]
        return {"side": global_mean(torch.cat([value[:1], torch.zeros(len(value) - 1)]))}

    def end_step(self):
        super().end_step()
        self.own += 1 + processes()[0]


def trained(kind: str, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    if kind == "sides":
        learner, task = Sides(3), Task(Config())
    else:
        experiment = Experiment.resolve(kind, DIGITS, overrides=BUILT[kind])
        task = experiment.task()
        learner = experiment.learner(task.facts, 3)
    if processes()[0]:  # whatever a process begins with, the first one's weights count
        for parameter in learner.parameters():
            torch.nn.init.zeros_(parameter)
    rows = fit(learner, task, bar=False, say=lambda _: None, loop=Loop(device="cpu"))
    return rows, learner.state_dict()


class Stop(Callback):
    """Ctrl-C reaches the second process alone, or the only one."""

    def on_start(self, learner, task):
        self.learner = learner

    def on_step(self, learner, batch, losses):
        if learner.position.all_steps == 4 and processes()[0] == processes()[1] - 1:
            os.kill(os.getpid(), signal.SIGINT)


def interrupted(folder: Path) -> tuple[bool, int]:
    path = folder / "stopped"
    if processes()[0] == 0:
        Run.create(folder, {"slug": "simclr"}, "stopped")
    if processes()[1] > 1:
        dist.barrier()
    run = Run(path, {"slug": "simclr"})
    learner = Sides(3)
    try:
        fit(learner, Task(Config()), run=run, bar=False, callbacks=[Stop()])
    except Interrupted:
        if processes()[1] > 1:
            dist.barrier()
        return run.checkpoint.is_file(), learner.position.all_steps
    raise AssertionError("the fit did not stop")


def surveyed(folder: Path) -> dict[str, torch.Tensor]:
    os.environ["COUNTERPOINT_CACHE"] = str(folder / "cache")
    learner, task = Toy(3), Task(Config(), examples=11)
    survey = Survey(task, learner)
    teacher = snapshot(learner.encoder)
    teacher._call = lambda batch: teacher.module(batch["x"])
    index = torch.tensor([10, 3, 3])
    return {
        "train": survey.over("train", lambda batch: learner.encoder(batch["x"])),
        "one": survey.over("train", lambda batch: learner.encoder(batch["x"]), torch.tensor([4]).numpy()),
        "cached": cached(teacher, survey, "train", "x")[index],
        "again": cached(teacher, survey, "train", "x")[index],
    }


class Drawn(Sides):
    """A learner whose figures pass over a split, themselves and by a teacher; the first process alone draws them."""

    def figures(self, survey):
        teacher = snapshot(self.encoder)
        teacher._call = lambda batch: teacher.module(batch["x"])
        with patch.object(dist, "all_reduce", side_effect=AssertionError("the other processes do not take part")):
            taught = cached(teacher, survey, "test", "x")
        own = survey.over("test", lambda batch: batch["x"]).mean()
        return {"Mean": {"kind": "text", "value": float(own + taught[torch.arange(len(taught))].mean())}}


def drawn(folder: Path) -> float:
    if processes()[0] == 0:
        Run.create(folder, {"slug": "simclr"}, "drawn")
    if processes()[1] > 1:
        dist.barrier()
    run = Run(folder / "drawn", {"slug": "simclr"})
    fit(Drawn(3), Task(Config()), run=run, bar=False)
    if processes()[1] > 1:
        dist.barrier()
    assert run.load_weights()
    return run.figures()["Mean"]["value"]


def averaged() -> list[torch.Tensor | None]:
    rank, _ = processes()
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    parameters[0].grad = torch.full((2,), 1.0 + rank)
    if rank == 0:
        parameters[1].grad = torch.full((2,), 3.0)
    parameters[3].requires_grad_(False)
    average(parameters)
    found = [p.grad for p in parameters]
    parameters[1].grad = torch.full((2,), 3.0) if rank == 0 else None
    # The first process has every gradient, and so does not wait for what the other one has.
    with patch.object(torch.Tensor, "tolist", None) if rank == 0 else contextlib.nullcontext():
        average(parameters[:2])
    return [*found, parameters[1].grad]


def everything(folder: Path) -> dict:
    found = {kind: trained(kind, folder) for kind in ("sides", *BUILT)}
    with over("world"):
        survey = surveyed(folder)
    return found | {"stopped": interrupted(folder), "survey": survey, "averaged": averaged(), "drawn": drawn(folder)}


def _process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(everything(Path(folder)), f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    before, cache = torch.get_num_threads(), os.environ.get("COUNTERPOINT_CACHE")
    torch.set_num_threads(1)
    one, folder = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    whole = everything(one)
    mp.start_processes(_process, (2, str(folder)), nprocs=2, start_method="forkserver")
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    torch.set_num_threads(before)
    if cache is None:
        os.environ.pop("COUNTERPOINT_CACHE", None)
    else:
        os.environ["COUNTERPOINT_CACHE"] = cache
    return SimpleNamespace(whole=whole, parts=parts, folder=folder)


@pytest.mark.parametrize("kind", ["sides", *BUILT])
def test_two_processes_train_as_one(both, kind):
    rows, weights = both.whole[kind]
    (mine, first), (theirs, second) = (part[kind] for part in both.parts)
    assert mine == theirs  # every figure is the same on all processes
    assert len(mine) == len(rows) > 1
    for row, other in zip(rows, mine, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            # Accuracies may change by an example; uniformity would change if the processes' rows were counted together.
            if name.startswith("train/") or name.endswith("uniformity") or kind == "sides":
                assert value == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    for name, value in first.items():
        assert torch.equal(value, second[name]), name  # bit for bit
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_parameter_that_nobody_reached_stands_still(both):
    start = Sides(3).never.weight
    for part in (both.whole, *both.parts):
        assert torch.equal(part["sides"][1]["never.weight"], start)


def test_gradients_are_means_of_what_was_reached(both):
    for part in both.parts:
        of_both, of_first, of_nobody, of_frozen, of_first_again = part["averaged"]
        assert of_both.tolist() == [1.5, 1.5]
        assert of_first.tolist() == of_first_again.tolist() == [1.5, 1.5]
        assert of_nobody is None
        assert of_frozen is None


def test_ctrl_c_on_one_stops_and_saves_all(both):
    assert both.whole["stopped"] == (True, 5)
    # Several processes learn of it at the next step, so that none waits for the step on its way.
    assert [part["stopped"] for part in both.parts] == [(True, 6)] * 2
    state = torch.load(both.folder / "stopped" / "last.ckpt")
    assert state["position"]["step"] == 6
    assert state["feed"]["steps"] == 6


def test_surveys_are_shared(both):
    for part in both.parts:
        for name, value in both.whole["survey"].items():
            torch.testing.assert_close(part["survey"][name], value)
    # One file of "train", which both share, and one of "test", which the first process writes for its figures.
    assert len(list((both.folder / "cache" / "teachers").glob("*.npy"))) == 2


def test_figures_may_pass_over_a_split(both):
    assert [part["drawn"] for part in both.parts] == [pytest.approx(both.whole["drawn"])] * 2


class Lost(Callback):
    """The second process ends in the second epoch, without a word to the first."""

    def on_step(self, learner, batch, losses):
        if learner.position.all_steps == 4 and processes()[0] == 1:
            os._exit(0)


def _bereft(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    if rank == 0:
        Run.create(Path(folder), {"slug": "simclr"}, "lost")
    dist.barrier()
    with pytest.raises(CounterpointError) as told:
        fit(Sides(3), Task(Config()), run=Run(Path(folder) / "lost", {"slug": "simclr"}), bar=False, callbacks=[Lost()])
    Path(folder, "told.txt").write_text(str(told.value))


def test_a_process_that_is_lost_is_named_with_the_command_that_continues(tmp_path):
    mp.start_processes(_bereft, (str(tmp_path),), nprocs=2, start_method="forkserver")
    told = (tmp_path / "told.txt").read_text()
    assert told.startswith(
        "another process of this training ended; its own message says why. Continue from the last checkpoint"
    )
    assert told.endswith(f"with torchrun as before: counterpoint train --resume {tmp_path}/lost")
