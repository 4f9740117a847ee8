"""Servers and parties that learn from each other's representations of a public set, by the rounds of `tasks.federations`.

A system adds what is its own: how the server fuses the parties' representations (`PublicServer.fused`), and how a party
contrasts its own with the server's (`PublicParty.contrast`). Steps of a round:

    1. the server passes over the public items by its learner's loss, and broadcasts its representations
    2. each chosen party repeats: a pass over its own items, and one over the public items with its contrast
    3. the party answers with its representations of the public items
    4. the server passes over them once more, towards the fused representations
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from counterpoint.core.class_logits import class_margin_loss
from counterpoint.core.seeds import seed_torch, seeded
from counterpoint.data.federations import Party
from counterpoint.engine.evaluation import measure
from counterpoint.engine.optim import factor, optimisers
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, diverged, unknown
from counterpoint.tasks.aligned import AlignedLearner
from counterpoint.tasks.federations import (
    Federation,
    FederationConfig,
    FederationTask,
    InProcess,
    Items,
    finish,
    pack,
    passes,
    unpack,
)


class Trained:
    """A network with its optimiser, which lasts over the rounds.

    Args:
        learner: the network.
        config: its settings.
        curve: the factor of the learning rate by round; None: half a cosine over the rounds.
    """

    def __init__(
        self, learner: AlignedLearner, config: FederationConfig, curve: Callable[[float], float] | None
    ) -> None:
        if torch.cuda.is_available():
            learner.to("cuda")
        self.learner, self.config = learner.train(), config
        turn = optimisers(config, [learner], config.rounds, config.batch_size, curve=curve)
        self.optimizer, self.curve = turn.optimizers[0], curve or (lambda r: factor(r, config.rounds, 0))

    def begin(self, round: int, *seeds: int) -> None:
        """Seed the random numbers of a round, and set its learning rate."""
        seed_torch(seeded(*seeds, round))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.curve(round)

    def step(self, loss: Tensor, of: str) -> float:
        """Take a step and return the loss. Raises CounterpointError, naming `of`, for a loss that is not finite."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise diverged(f"the loss of {of} is not finite", "lower its learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return value

    def state(self) -> dict[str, Any]:
        """Return what a resumed federation needs."""
        return {"network": dict(self.learner.state_dict()), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self.learner.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class ClassLearner(AlignedLearner):
    """One encoder with a classifier and a margin: the network of a party of one modality.

    Args:
        config: settings, with `class_scale`, the factor of images' embeddings, and `class_margin`.
        data: facts of the party's items, with one modality and `classes`.
        seed: seed of the initial weights.
    """

    def __init__(self, config: Any, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        (self.modality,) = data.modalities
        self.scale = config.class_scale if self.kinds[self.modality] == "image" else 1.0
        weights = nn.init.kaiming_uniform_(torch.empty(data.classes, config.embedding), math.sqrt(5))
        self.classes = nn.Parameter(weights)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        z = self.embed(batch)[self.modality]
        return {"loss": class_margin_loss(z, self.classes, batch["label"], self.scale, self.config.class_margin)}


class PublicServer(Trained):
    """The server. `shares` has those of the last fusion: modality -> party -> [public items]."""

    def __init__(self, learner: AlignedLearner, task: FederationTask, config: FederationConfig, seed: int) -> None:
        super().__init__(learner, config, None)
        self.public, self.seed = Items(task, task.data.train, task.data.modalities), seed
        self.shares: dict[str, dict[str, Tensor]] = {}

    def fused(self, rows: Tensor, other: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return one representation of each public item [N, d], and the parties' shares [parties, N] where they differ.

        Args:
            rows: the parties' representations in one modality [parties, N, d].
            other: the server's own in the other modality [N, d].
        """
        raise NotImplementedError

    def learn(self, round: int) -> dict[str, float]:
        """Learn the public set (step 1)."""
        self.begin(round, self.seed, 1)
        losses = []
        for epoch in range(self.config.epochs):
            for n, rows in enumerate(passes(len(self.public), self.config.batch_size, self.seed, round, epoch, 1)):
                batch = self.public.train(self.learner, rows, seeded(self.seed, round, epoch, n, 1))
                losses.append(self.step(self.learner.loss(batch)["loss"], "the server"))
        return {"loss": sum(losses) / len(losses)}

    def represent(self) -> dict[str, Tensor]:
        """Return the server's representations of the public items, by modality."""
        self.globals = self.public.represent(self.learner)
        return self.globals

    def merge(self, round: int, answers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """Learn towards the fused representations (step 4). A modality without an answer has no part in it."""
        targets = {}
        for name, other in zip(self.globals, reversed(self.globals), strict=True):
            held = {party: rows[name] for party, rows in answers.items() if name in rows}
            if held:
                stacked = torch.stack(list(held.values())).to(self.learner.device)
                targets[name], shares = self.fused(stacked, self.globals[other])
                if shares is not None:
                    self.shares[name] = dict(zip(held, shares.cpu(), strict=True))
        losses = []
        count, size = len(self.public), self.config.batch_size
        for n, rows in enumerate(passes(count, size, self.seed, round, 2) if targets else ()):
            batch = self.public.train(self.learner, rows, seeded(self.seed, round, n, 2))
            found = self.learner.embed(batch)
            at = batch["index"].to(self.learner.device)
            loss = torch.stack([F.mse_loss(found[name], rows[at]) for name, rows in targets.items()]).sum()
            losses.append(self.step(self.config.distil_weight * loss, "the distillation"))
        return {"distillation": sum(losses) / len(losses)} if losses else {}

    def state(self) -> dict[str, Any]:
        return super().state() | {"shares": self.shares}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.shares = dict(state["shares"])


class PublicParty(Trained):
    """One party.

    Args:
        task: the federation.
        number: the party's number.
        learner: its network, whose loss its own items have.
        config: its settings.
        seed: seed of the federation.
        curve: see `Trained`.
    """

    def __init__(
        self,
        task: FederationTask,
        number: int,
        learner: AlignedLearner,
        config: FederationConfig,
        seed: int,
        curve: Callable[[float], float] | None,
    ) -> None:
        super().__init__(learner, config, curve)
        self.party = party = task.parties[number]
        self.seeds, self.modalities = (seed, number, 4), list(task.data.modalities)
        self.own = Items(task, party.items, party.modalities)
        self.public = Items(task, task.data.train, party.modalities)

    @property
    def contrasts(self) -> bool:
        """Whether the party contrasts its representations with the server's."""
        raise NotImplementedError

    def contrast(
        self, z: Mapping[str, Tensor], old: Mapping[str, Tensor], rows: Mapping[str, Tensor], index: Tensor
    ) -> Tensor:
        """Return the weighted contrast of a batch of public items.

        Args:
            z: the party's embeddings of the batch, by modality [b, d].
            old: its embeddings of these items at the beginning of the round.
            rows: the server's representations of all public items [N, d], in both modalities.
            index: rows of the batch's items in these [b].
        """
        raise NotImplementedError

    def answer(self, message: bytes) -> bytes:
        """Learn from the server's message and the party's items; return the party's representations of the public items.

        Raises CounterpointError for a message of another version or shape, and where training diverges.
        """
        facts, rows = unpack(message)
        shape = (len(self.public), self.config.embedding)
        if list(rows) != sorted(self.modalities) or any(value.shape != shape for value in rows.values()):
            found = {name: list(value.shape) for name, value in rows.items()}
            raise CounterpointError(
                f"{self.party.name}: the server's public set {found} is not this party's, {list(shape)} of "
                f"{' and '.join(self.modalities)}; use the same public file and --embedding on both sides"
            )
        round = int(facts["round"])
        self.train(round, {name: value.to(self.learner.device) for name, value in rows.items()})
        return pack(self.public.represent(self.learner), round=round, sender=self.party.name)

    def train(self, round: int, rows: Mapping[str, Tensor]) -> None:
        """Repeat the passes over the party's own items and over the public ones (step 2)."""
        config, name = self.config, self.party.name
        self.begin(round, *self.seeds)
        old = self.public.represent(self.learner) if self.contrasts else {}
        for epoch in range(config.party_epochs):
            own, public = (
                passes(len(items), config.batch_size, *self.seeds, round, epoch, n)
                for n, items in enumerate((self.own, self.public))
            )
            seeds = itertools.count(seeded(*self.seeds, round, epoch))
            around = itertools.cycle(public)
            for at in own:
                loss = self.learner.loss(self.own.train(self.learner, at, next(seeds)))["loss"]
                if self.contrasts and config.together:
                    loss = loss + self._contrast(next(around), next(seeds), rows, old)
                self.step(loss, name)
            for at in public if self.contrasts and not config.together else ():
                self.step(self._contrast(at, next(seeds), rows, old), name)

    def _contrast(
        self, at: NDArray[np.int64], seed: int, rows: Mapping[str, Tensor], old: Mapping[str, Tensor]
    ) -> Tensor:
        batch = self.public.train(self.learner, at, seed)
        index = batch["index"].to(self.learner.device)
        z = self.learner.embed(batch)
        return self.contrast(z, {name: old[name][index] for name in z}, rows, index)


def facts_of(task: FederationTask, party: Party) -> SimpleNamespace:
    """Return the facts that a party's learner is built from."""
    modalities = {name: modality.spec for name, modality in party.modalities.items()}
    return SimpleNamespace(**task.facts | {"modalities": modalities, "classes": len(party.classes)})


def number_of(task: FederationTask, name: str) -> int:
    """Return the number of a party. Raises CounterpointError for an unknown name."""
    names = [party.name for party in task.parties]
    if name not in names:
        raise unknown("party", name, names)
    return names.index(name)


# ------------------------------------------------------------------------------------------------------------------ the run

Serves = Callable[[AlignedLearner, FederationTask, Any, int], PublicServer]
Joins = Callable[[FederationTask, str, int], PublicParty]


def federate_here(
    experiment: Any,
    seed: int,
    *,
    server: Serves,
    party: Joins,
    run: Run | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Run the federation with all parties in this process, and return a row for each round (see `federate`).

    Args:
        party: makes a party from the task, its name and the seed.
    """
    task: FederationTask = experiment.task()
    names = [party.name for party in task.parties] if experiment.config.distil_weight else []
    exchange = InProcess({name: party(task, name, seed) for name in names}, experiment.config.answer_seconds)
    return federate(experiment, task, server, exchange, seed, run=run, say=say)


def federate(
    experiment: Any,
    task: FederationTask,
    server: Serves,
    exchange: Any,
    seed: int,
    *,
    run: Run | None,
    say: Callable[[str], None],
) -> list[dict[str, float]]:
    """Run the server's side of the federation over an exchange of messages; finish the run directory.

    Args:
        experiment: system, settings and data.
        task: the federation.
        server: makes the server from its learner, the task, the settings and the seed.
        exchange: see `Federation`.
        seed: seed of the federation.
        run: the run directory, or None.
        say: receives a line for each party that is left out.
    """
    config: FederationConfig = experiment.config
    if run is not None:
        run.save_facts(task.facts)
    learner = experiment.learner(task.facts if run is None else run.facts(), seed)
    made = server(learner, task, config, seed)

    def measured(round: int) -> dict[str, float]:
        found = {f"valid/{k}": v for k, v in measure(learner, task, "valid", final=False)[0].items()}
        if round == config.rounds - 1:
            figures, evaluator, _ = measure(learner, task, "test", final=True)
            found |= {f"test/{k}": v for k, v in figures.items()}
            if run is not None:
                run.save_chance(evaluator.chance())
                run.save_figures(shares_of(made, task) | evaluator.figures)
        return found

    public, parties = len(task.data.train), task.parties
    federation = Federation(made, exchange, parties, config, seed, public, measure=measured, run=run, say=say)
    rows = federation.rounds(ask=config.distil_weight > 0)
    if run is not None:
        finish(run, learner, rows)
    return rows


def shares_of(server: PublicServer, task: FederationTask) -> dict[str, Any]:
    """Draw each party's share in the fused representations, relative to equal shares, by domain of the public items."""
    found: dict[str, Any] = {}
    domains = task.data.train.domains
    groups = np.arange(len(server.public)) * 8 // len(server.public) if domains is None else domains
    named = [f"part {n + 1}" for n in range(8)] if domains is None else list(task.data.domains)
    for name, shares in server.shares.items():
        values = [
            [float(share.numpy()[groups == g].mean()) * len(shares) for g in np.unique(groups)]
            for share in shares.values()
        ]
        found[f"Who has a say in {name}"] = {
            "kind": "table",
            "columns": ["party", *(named[g] for g in np.unique(groups))],
            "rows": [[party, *(f"{value:.2f}" for value in row)] for party, row in zip(shares, values, strict=True)],
            "caption": "Shares of the parties in the fused representations of the last round, by domain of the public items. 1: an "
            "equal share.",
        }
    return found
