"""Define a task of random vectors, and learners small enough to train and kill many times in a second."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.core.distributed import world
from counterpoint.engine.fit import fit
from counterpoint.engine.learner import Learner
from counterpoint.engine.loading import Batches
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run
from counterpoint.engine.services import Callback
from counterpoint.engine.stages import Turn

WIDTH = 6


@dataclass
class Config:
    epochs: int = 2
    batch_size: int = 4


class Split:
    def __init__(self, n: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.x = torch.from_numpy(rng.normal(size=(n, WIDTH)).astype(np.float32))
        self.labels, self.groups = np.arange(n) % 3, np.arange(n) // 2
        self.domains = np.arange(n) % 2

    def __len__(self) -> int:
        return len(self.x)


class Loader:
    def __init__(self, split: Split, batches: Batches) -> None:
        self.split, self.batches = split, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for rows in self.batches:
            yield {"x": self.split.x[rows], "index": torch.tensor(rows, dtype=torch.long)}


class Evaluator:
    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        self.parts.append(outputs["value"])

    def compute(self, *, final: bool = False) -> dict[str, float]:
        return {"score": float(torch.cat(self.parts).double().mean())} | ({"final": 1.0} if final else {})


class Task:
    """Ten training vectors in batches of four, the last one of two."""

    headline = "score"

    def __init__(self, config: Config | None = None, examples: int = 10) -> None:
        self.config = config or Config()
        self.splits = {"train": Split(examples, 0), "valid": Split(7, 1), "test": Split(5, 2)}
        self.data = SimpleNamespace(classes=("a", "b", "c"), domains=("here", "there"))

    def split(self, name: str) -> Split:
        return self.splits[name]

    def train_loader(self, seed, position, batches=None):
        batches = Batches(len(self.splits["train"]), self.config.batch_size) if batches is None else batches
        return Loader(self.splits["train"], batches.bind(seed, position, *world()))

    def evaluation_batch(self, split, rows):
        return {"x": self.splits[split].x[list(rows)], "index": torch.tensor(list(rows), dtype=torch.long)}

    def evaluation_loader(self, split):
        n = len(self.splits[split])
        return [self.evaluation_batch(split, range(s, min(s + 4, n))) for s in range(0, n, 4)]

    def evaluator(self, split):
        return Evaluator()


class Toy(Learner):
    """An encoder with dropout and a head, trained to give each vector's sum. Loss and gradients are those of the whole batch."""

    def __init__(self, seed: int = 0, dropout: float = 0.3) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)
        self.config = Config()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros(64))

    def turns(self) -> list[Turn]:
        return [adam(self.encoder, self.head)]

    def loss(self, batch):
        from counterpoint.core.distributed import global_mean

        error = (self.head(self.encoder(batch["x"]))[:, 0] - batch["x"].sum(1)).square()
        return {"loss": global_mean(error)}

    def predict(self, batch):
        return {"value": self.head(self.encoder(batch["x"]))}

    def end_step(self) -> None:
        self.seen[self.position.all_steps] += 1


def adam(*modules: nn.Module, gamma: float = 0.9, per_step: bool = False, **turn: Any) -> Turn:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    schedule.per_step = per_step
    return Turn([optimizer], [schedule], **turn)


class Killed(BaseException):
    """As sudden as a kill: nothing of the loop catches it."""


class Kill(Callback):
    """Ends a fit within step `step`, counted from its beginning, or after epoch `epoch`, before that is saved."""

    def __init__(self, step: int = -1, epoch: int = -1) -> None:
        self.step, self.epoch = step, epoch

    def on_start(self, learner, task) -> None:
        self.learner = learner

    def on_step(self, learner, batch, losses) -> None:
        if learner.position.all_steps == self.step:
            raise Killed

    def on_epoch(self, row) -> None:
        if row["epoch"] == self.epoch:
            raise Killed


def never_otherwise(make, folder, kills, **loop) -> list[dict[str, float]]:
    """Fail unless a fit that is killed at each of these points ends bit for bit as an uninterrupted fit.

    Args:
        make: returns a new learner and its task.
        kills: points in order; each fit is killed at one, and the next resumes from its checkpoint.
    """
    options = {"loop": Loop(checkpoint_minutes=0, **loop), "bar": False, "say": lambda _: None}
    whole = Run.create(folder, {"slug": "simclr"}, "whole")
    learner, task = make()
    fit(learner, task, run=whole, **options)
    broken = Run.create(folder, {"slug": "simclr"}, "broken")
    for point in kills:
        other, task = make()
        try:
            fit(other, task, run=broken, callbacks=[Kill(**point)], **options)
        except Killed:
            assert not broken.complete
        else:
            raise AssertionError(f"{point} was not reached")
    other, task = make()
    fit(other, task, run=broken, **options)
    assert broken.complete
    assert broken.metrics() == whole.metrics()
    assert broken.structure() == whole.structure()
    for mine, theirs in ((broken.load_weights(), whole.load_weights()), (other.state_dict(), learner.state_dict())):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), name
    return whole.metrics()
