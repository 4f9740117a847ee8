"""Measure the choice of answers among candidates, by task.

    accuracy      share of right answers of a task, averaged over tasks
    macro_f1      mean F1 over the answers that a task has or gets, averaged over tasks

Methods of answering other than the learner's own have their name before a measure: `full_accuracy`. `gain_over_NAME` is the
accuracy minus that of another method, and `share_of_full` its part of full_accuracy. Two further measures:

    cut           mean number of demonstrations of a query that were shortened or left out
    read_share    positions that the model reads, as a share of those with all demonstrations
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.demonstrations import DemonstrationSplit
from counterpoint.errors import diverged


def macro_f1(truth: Sequence[str], found: Sequence[str]) -> float:
    """Compute the mean F1 over all answers that are true or found.

    >>> macro_f1(["a", "a", "b"], ["a", "b", "b"])
    0.6666666666666666
    """
    scores = []
    for name in sorted({*truth, *found}):
        hits = sum(a == name == b for a, b in zip(truth, found, strict=True))
        scores.append(2 * hits / (list(truth).count(name) + list(found).count(name)))
    return float(np.mean(scores))


class CandidateEvaluator:
    """Measure the candidates of best score in one split."""

    def __init__(self, split: DemonstrationSplit) -> None:
        self.split = split
        self.reset()

    def reset(self) -> None:
        self.picked: dict[str, dict[int, str]] = {}  # by method, the chosen answer of each query
        self.sums: dict[str, list[float]] = {}
        self.figures: dict[str, Any] = {}

    def update(self, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        for name in (name for name in outputs if name.endswith("scores")):
            self.choose(name.removesuffix("scores").removesuffix("_"), batch["index"].tolist(), outputs[name])
        for name in ("cut", "tokens", "read"):
            if name in outputs:
                self.sums.setdefault(name, []).extend(outputs[name].double().cpu().tolist())

    def choose(self, method: str, index: Sequence[int], scores: Tensor) -> None:
        """Take the scores of a method for some queries."""
        scores = scores.double().cpu()
        if not bool(torch.isfinite(scores).all()):
            raise diverged("the scores hold NaN or infinite values")
        of = self.picked.setdefault(method, {})
        for n, best in zip(index, scores.argmax(1).tolist(), strict=True):
            of[n] = self.split.options(self._example(n))[best]

    def _example(self, n: int) -> Any:
        return self.split.examples[self.split.queries[n]]

    def _by_task(self, picked: Mapping[int, str]) -> dict[str, tuple[list[str], list[str]]]:
        found: dict[str, tuple[list[str], list[str]]] = {}
        for n in sorted(picked):
            example = self._example(n)
            truth, said = found.setdefault(example.task, ([], []))
            truth.append(example.output)
            said.append(picked[n])
        return found

    def compute(self, *, final: bool = False) -> dict[str, float]:
        found: dict[str, float] = {}
        for method, picked in self.picked.items():
            prefix = f"{method}_" if method else ""
            tasks = self._by_task(picked).values()
            found[f"{prefix}accuracy"] = float(np.mean([np.mean(np.array(a) == np.array(b)) for a, b in tasks]))
            found[f"{prefix}macro_f1"] = float(np.mean([macro_f1(*both) for both in tasks]))
        if "accuracy" in found:
            for method in filter(None, self.picked):
                found[f"gain_over_{method}"] = found["accuracy"] - found[f"{method}_accuracy"]
            if found.get("full_accuracy"):
                found["share_of_full"] = found["accuracy"] / found["full_accuracy"]
        if "cut" in self.sums:
            found["cut"] = float(np.mean(self.sums["cut"]))
        if "tokens" in self.sums and "read" in self.sums:
            found["read_share"] = float(np.sum(self.sums["read"]) / np.sum(self.sums["tokens"]))
        return found

    def chance(self) -> dict[str, float]:
        """Return the accuracy of a guess among the candidates."""
        of: dict[str, list[float]] = {}
        for n in self.split.queries.tolist():
            example = self.split.examples[n]
            of.setdefault(example.task, []).append(1 / len(self.split.options(example)))
        share = float(np.mean([np.mean(one) for one in of.values()]))
        return {f"{method}_accuracy".lstrip("_"): share for method in self.picked}
