"""Stages and turns of every kind, killed inside each stage and at its boundaries, end as if nothing had happened."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy import WIDTH, Config, Task, Toy, adam, never_otherwise

from counterpoint.engine.fit import fit
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches, Steps
from counterpoint.engine.services import Callback
from counterpoint.engine.stages import Stage, Turn
from counterpoint.engine.teachers import snapshot

# Two stages of two epochs of three steps: at once; within stage 0; at its end, before it is saved; in the first step of stage 1,
# which is then entered again; within stage 1; in the last step; before the last figures are saved.
POINTS = [{"step": 0}, {"step": 4}, {"epoch": 1}, {"step": 6}, {"step": 8}, {"step": 11}, {"epoch": 3}]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def two(first: dict, second: dict) -> list[Stage]:
    return [Stage("first", 2, **first), Stage("second", 2, **second)]


class Carried(Toy):
    """The second stage goes on with the optimisers of the first, which hold what the first trained."""

    def stages(self):
        head = {"trains": lambda: [self.head], "turns": lambda: [adam(self.head, per_step=True)]}
        return two(head, {"carry": True, "trains": lambda: [self.encoder, self.head]})


class Warmed(Toy):
    """Schedules that are made with the length of their stage; stages of different length."""

    def turns(self):
        optimizer = adam(self.encoder, self.head)
        total = self.total_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizers[0], lambda step: 1 - step / (total + 1))
        schedule.per_step = True
        optimizer.schedules = [schedule]
        return [optimizer]

    def stages(self):
        return [Stage("first", 2), Stage("second", 1, carry=True), Stage("third", 1, carry=True)]


class Thawed(Toy):
    """The encoder is frozen in the first stage and learns in the second."""

    def stages(self):
        return two(
            {"trains": lambda: [self.head], "turns": lambda: [adam(self.head)]},
            {"enter": lambda survey: None},
        )


class Grown(Toy):
    """The second stage gets a wider head, drawn from torch's own generator."""

    def stages(self):
        return two({}, {"enter": self.grow})

    def grow(self, survey):
        self.restructure({"width": 9})

    def structure(self):
        return {"width": self.head[0].out_features} if isinstance(self.head, nn.Sequential) else {}

    def restructure(self, structure):
        if structure:
            width = structure["width"]
            self.head = nn.Sequential(nn.Linear(5, width), nn.Dropout(0.2), nn.Linear(width, 1))


class Born(Toy):
    """The second stage is taught by a snapshot of the first, and begins anew."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.teachers = {"before": snapshot(self.encoder)}

    def stages(self):
        return two({}, {"enter": self.anew, "turns": lambda: [adam(self.encoder, self.head, loss=self.taught)]})

    def anew(self, survey):
        self.teachers = {"before": snapshot(self.encoder)}
        for parameter in self.encoder.parameters():
            nn.init.normal_(parameter)

    def taught(self, batch):
        own = self.loss(batch)
        lesson = (self.encoder(batch["x"]) - self.teachers["before"](batch["x"])).square().mean()
        return {"loss": own["loss"] + lesson, "lesson": lesson}


class Surveyed(Toy):
    """The second stage keeps to what a survey found; its batches are its own, and it is not measured."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.register_buffer("chosen", torch.zeros(6, dtype=torch.long))

    def stages(self):
        return [
            Stage("first", 2, batches=lambda survey: Steps(3), evaluated=False),
            Stage("second", 2, enter=self.choose, batches=self.rows),
        ]

    def prepare(self, batch, generator):
        if len(batch["x"]):
            return batch
        return batch | {"x": torch.randn(4, WIDTH, generator=generator)}

    def choose(self, survey):
        values = survey.over("train", lambda batch: self.predict(batch)["value"][:, 0])
        self.chosen.copy_(values.argsort()[:6])

    def rows(self, survey):
        chosen = self.chosen.numpy()

        class Own(Batches):
            def order(self, generator):
                return chosen[generator.permutation(6)]

        return Own(6, 2)


class Measured(Toy):
    """The first stage trains nothing: it records the score of each batch."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.register_buffer("scores", torch.zeros(16))

    def stages(self):
        return two({"learns": False, "turns": lambda: [Turn([], loss=self.score)]}, {})

    def score(self, batch):
        found = self.loss(batch)["loss"].detach()
        self.scores[self.position.all_steps] = found
        return {"loss": found}


@pytest.mark.parametrize("kind", [Carried, Thawed, Grown, Born, Surveyed, Measured])
def test_every_kind_of_stage_resumes_exactly(kind, tmp_path):
    rows = never_otherwise(lambda: (kind(3), Task()), tmp_path, POINTS)
    assert [row["stage"] for row in rows] == [0, 0, 1, 1]
    assert ["valid/score" in row for row in rows] == [kind is not Surveyed] * 2 + [True] * 2
    assert [row.get("test/final") for row in rows] == [None, None, None, 1]


def test_carried_schedules_keep_the_length_they_were_made_with(tmp_path):
    rows = never_otherwise(lambda: (Warmed(3), Task()), tmp_path, POINTS)
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * (1 - step / 7) for step in (3, 6, 9, 12)])


def test_services_are_resumed_too(tmp_path):
    never_otherwise(lambda: (Born(3), Task()), tmp_path, POINTS, ema=0.9, precision="bf16")


def test_what_a_stage_does_not_train_stands_still():
    thawed = Thawed(1)
    seen = []

    class Watched(Thawed):
        def end_epoch(self, epoch):
            seen.append(copy.deepcopy(self.encoder.state_dict()))

    fit(Watched(1), Task(), bar=False)
    start = thawed.encoder.state_dict()
    still = [all(torch.equal(value, start[name]) for name, value in state.items()) for state in seen]
    assert still == [True, True, False, False]


def test_a_stage_may_train_nothing_and_the_next_one_trains_all():
    start, seen = Measured(1), []

    class Watched(Measured):
        def end_epoch(self, epoch):
            seen.append({name: value.clone() for name, value in self.named_parameters()})

    learner = Watched(1)
    asked = []
    score = learner.score
    learner.score = lambda batch: (asked.append([p.requires_grad for p in learner.parameters()]), score(batch))[1]
    rows = fit(learner, Task(), bar=False)
    assert not any(map(any, asked))
    before = dict(start.named_parameters())
    for name in before:
        assert [torch.equal(state[name], before[name]) for state in seen] == [True, True, False, False]
    assert rows[0]["train/loss"] == pytest.approx(float(learner.scores[:3].mean()))
    assert "lr" not in rows[0]
    assert (learner.scores > 0).sum() == 6


# --------------------------------------------------------------------------------------------------------------- turns


class Players(Learner):
    """Two players with losses of their own: one makes vectors, the other tells them from the data's."""

    def __init__(self, seed=0):
        super().__init__(seed)
        torch.manual_seed(seed)
        self.config = Config(epochs=4)
        self.maker, self.judge = nn.Linear(2, WIDTH), nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 1))
        self.told: list[str] = []

    def turns(self):
        return [
            adam(self.judge, loss=self.judging, minimise="judging"),
            adam(self.maker, loss=self.making, minimise="making", gamma=0.99, per_step=True),
        ]

    def prepare(self, batch, generator):
        return batch | {"noise": torch.randn(len(batch["x"]), 2, generator=generator)}

    def judging(self, batch):
        self.told.append("judging")
        made, true = self.judge(self.maker(batch["noise"]).detach()), self.judge(batch["x"])
        return {"judging": nn.functional.softplus(made).mean() + nn.functional.softplus(-true).mean()}

    def making(self, batch):
        self.told.append("making")
        return {"making": nn.functional.softplus(-self.judge(self.maker(batch["noise"]))).mean()}

    def predict(self, batch):
        return {"value": self.judge(batch["x"])}


def test_two_players_take_turns(tmp_path):
    rows = never_otherwise(lambda: (Players(2), Task(Config(epochs=4))), tmp_path, POINTS)
    assert {"train/judging", "train/making", "lr", "lr/1"} <= set(rows[0])
    assert rows[-1]["lr"] == pytest.approx(0.01 * 0.9**4)
    assert rows[-1]["lr/1"] == pytest.approx(0.01 * 0.99**12)


def test_the_second_turn_sees_what_the_first_has_done():
    """Against the loop written out: the judge steps, then the maker on the judge as it is now."""
    learner, task = Players(2), Task(Config(epochs=1))
    learner.config = task.config
    steps = []

    class Recorder(Callback):
        def on_step(self, learner, batch, losses):
            steps.append(batch)

    fit(learner, task, bar=False, callbacks=[Recorder()])
    assert learner.told == ["judging", "making"] * 3
    plain = Players(2)
    judge, maker = (turn.optimizers[0] for turn in plain.turns())
    for batch in steps:
        judge.zero_grad()
        plain.judging(batch)["judging"].backward()
        judge.step()
        maker.zero_grad()
        plain.making(batch)["making"].backward()
        maker.step()
        maker.param_groups[0]["lr"] *= 0.99
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(learner.state_dict()[name], value, rtol=0, atol=0)
