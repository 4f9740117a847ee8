"""Measure a representation during training with callbacks: a linear classifier and nearest neighbours.

>>> from counterpoint import training
>>> from counterpoint.tasks.online import OnlineProbe
>>> run = training.train("simclr", data="digits", callbacks=[OnlineProbe()])   # doctest: +SKIP

Their features have no gradient, so they do not change the learner's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.core.world import processes
from counterpoint.engine.gradients import average, share_weights
from counterpoint.engine.learner import Learner
from counterpoint.engine.optim import light
from counterpoint.engine.services import Callback
from counterpoint.errors import CounterpointError
from counterpoint.tasks.images import chosen_bank
from counterpoint.tasks.measures import knn_accuracy

Features = Callable[[Learner, dict[str, Any]], Tensor]


def features(learner: Learner, batch: dict[str, Any]) -> Tensor:
    """Compute the features [n, dim] of an evaluation batch, or of the first view of a prepared training batch.

    Concatenate the features of several modalities. Raises CounterpointError for a learner without features or embeddings.
    """
    if "views" in batch and isinstance(batch["views"], list):
        batch = batch | {"image": batch["views"][0]}
    found = learner.predict(batch)
    value = found.get("feature", found.get("embedding"))
    if value is None:
        raise CounterpointError(
            f"{type(learner).__name__} returns no feature or embedding; pass `features` to the callback"
        )
    return torch.cat(list(value.values()), 1) if isinstance(value, Mapping) else value


class _Online(Callback):
    """The base of both callbacks: features in evaluation mode, without gradient."""

    learner: Learner

    def __init__(self, features: Features) -> None:
        self.features = features

    def on_start(self, learner: Learner, task: Any) -> None:
        self.learner = learner
        assert learner.survey is not None
        for name in ("train", "valid"):
            if getattr(learner.survey.split(name), "labels", None) is None:
                raise CounterpointError(
                    f"{type(self).__name__} needs classes, the {name} split has none; use labelled data"
                )

    @torch.no_grad()
    def seen(self, batch: dict[str, Any]) -> Tensor:
        """Return the features of a batch. Keep the learner's mode and random state unchanged."""
        learner, training = self.learner, self.learner.training
        modes = [(module, module.training) for module in learner.modules()]
        learner.eval()
        try:
            return self.features(learner, batch).detach().float()
        finally:
            learner.train(training)
            for module, mode in modes:
                module.training = mode

    def of(self, split: str, rows: Any = None) -> tuple[Tensor, Tensor]:
        """Return features and labels of a split's labelled items."""
        survey = self.learner.survey
        assert survey is not None
        found = survey.over(split, self.seen, rows)
        labels = torch.as_tensor(survey.split(split).labels)
        labels = labels if rows is None else labels[torch.as_tensor(rows)]
        return found[labels >= 0], labels[labels >= 0]


class OnlineProbe(_Online):
    """A linear classifier that trains together with the learner, on its features of each batch's first view.

    It adds two accuracies to each epoch's row. `probe/train_accuracy` is that of the epoch's batches, each measured before
    its step. `probe/accuracy` is that on `valid`. The costs are one forward pass per step and one over `valid` per epoch.

    Args:
        lr: learning rate of Adam, > 0; by default 1e-3.
        every: epochs between measurements on `valid`, at least 1 (default).
        features: maps learner and batch to [n, dim]; by default the function `features`.

    A resumed run restores the classifier. Raises CounterpointError for data without labels.
    """

    def __init__(self, lr: float = 1e-3, every: int = 1, features: Features = features) -> None:
        super().__init__(features)
        if not lr > 0 or every < 1:
            raise CounterpointError(f"lr must be > 0 and every at least 1, got {lr} and {every}")
        self.lr, self.every = lr, every
        self.norm: nn.BatchNorm1d | None = None
        self.network: nn.Linear | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.right, self.count, self.epochs = 0.0, 0, 0

    def on_start(self, learner: Learner, task: Any) -> None:
        super().on_start(learner, task)
        assert learner.survey is not None
        labels = [torch.as_tensor(learner.survey.split(name).labels) for name in ("train", "valid")]
        self.classes = int(torch.cat(labels).max()) + 1

    def _make(self, dim: int) -> None:
        """Build the classifier. Its weights start at 0, so it draws no random numbers."""
        self.network = nn.utils.skip_init(nn.Linear, dim, self.classes).to(self.learner.device)
        nn.init.zeros_(self.network.weight)
        nn.init.zeros_(self.network.bias)
        share_weights(self.network)
        self.optimizer = light(torch.optim.Adam)(self.network.parameters(), lr=self.lr)

    def on_step(self, learner: Learner, batch: dict[str, Any], losses: Mapping[str, Tensor]) -> None:
        labels = batch.get("label")
        if labels is None:
            raise CounterpointError("OnlineProbe needs classes, the batches have none; use labelled data")
        known = labels >= 0
        rows, wanted = _standard(self.seen(batch))[known], labels[known]
        if self.network is None or self.network.in_features != rows.shape[1]:  # or a stage changed the representation
            self._make(rows.shape[1])
        assert self.network is not None
        assert self.optimizer is not None
        with torch.enable_grad():
            logits = self.network(rows)
            loss = nn.functional.cross_entropy(logits, wanted, reduction="sum") / max(1, len(wanted))
            self.optimizer.zero_grad()
            loss.backward()
        average(self.network.parameters())
        self.optimizer.step()
        self.right += float((logits.argmax(1) == wanted).sum())
        self.count += len(wanted)

    def on_epoch(self, row: dict[str, float]) -> None:
        counted = torch.tensor([self.right, float(self.count)], dtype=torch.float64, device=self.learner.device)
        if processes()[1] > 1:
            torch.distributed.all_reduce(counted)
        row["probe/train_accuracy"] = float(counted[0] / counted[1].clamp(min=1))
        self.right, self.count, self.epochs = 0.0, 0, self.epochs + 1
        if self.network is not None and self.epochs % self.every == 0:
            found, labels = self.of("valid")
            with torch.no_grad():
                guessed = self.network(_standard(found).to(self.learner.device)).argmax(1).cpu()
            row["probe/accuracy"] = float((guessed == labels).double().mean())

    def state(self) -> dict[str, Any]:
        if self.network is None or self.optimizer is None:
            return {}
        figures = {"right": self.right, "count": self.count, "epochs": self.epochs}
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()} | figures

    def resume(self, state: Mapping[str, Any]) -> None:
        self._make(state["network"]["weight"].shape[1])
        assert self.network is not None
        assert self.optimizer is not None
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.right, self.count, self.epochs = state["right"], state["count"], state["epochs"]


class OnlineKnn(_Online):
    """The accuracy of nearest neighbours on `valid`, as `knn/accuracy` in an epoch's row.

    Args:
        k: number of neighbours that vote, at least 1; by default 20.
        every: epochs between measurements, at least 1 (default).
        bank: maximum number of labelled training items to search, always the same items; by default 10,000.
        features: maps learner and batch to [n, dim]; by default the function `features`.

    Raises CounterpointError for data without labels.
    """

    def __init__(self, k: int = 20, every: int = 1, bank: int = 10000, features: Features = features) -> None:
        super().__init__(features)
        if k < 1 or every < 1 or bank < 1:
            raise CounterpointError(f"k, every and bank must be at least 1, got {k}, {every} and {bank}")
        self.k, self.every, self.bank, self.epochs = k, every, bank, 0

    def on_epoch(self, row: dict[str, float]) -> None:
        self.epochs += 1
        survey = self.learner.survey
        assert survey is not None
        if self.epochs % self.every == 0:
            bank, known = self.of("train", chosen_bank(survey.rows, self.bank))
            asked, labels = self.of("valid")
            row["knn/accuracy"] = knn_accuracy(bank, known, asked, labels, k=self.k)

    def state(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.epochs = state["epochs"]


def _standard(rows: Tensor) -> Tensor:
    """Scale rows to the length of a standard normal vector, so that one learning rate fits all encoders."""
    return nn.functional.normalize(rows, dim=1) * rows.shape[1] ** 0.5
