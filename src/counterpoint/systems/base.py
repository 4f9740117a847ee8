"""What a system's file declares so that the command line, `verify` and the reports can run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from counterpoint.engine.learner import Learner


@dataclass(frozen=True)
class Comparison:
    """One sentence of a claim: `arm` beats `baseline` in the claim's metric, or in one of its own."""

    arm: str
    baseline: str
    at_least: float = 0.0  # the mean difference the card expects; judged beside the interval
    metric: str = ""  # where it is not the claim's
    lower: bool = False  # less of it is better: differences are counted as gains, baseline - arm


@dataclass(frozen=True)
class Claim:
    """A paper's central claim at laptop scale. The setting is written here before any seed is run.

    All arms of a seed see the same data and start from the same random state; every arm gets `setting`, plus its own
    overrides. `metric` is what the verdict is about, higher is better.
    """

    sentence: str
    data: str  # the data source, which is given the seed when `data_seeded`
    setting: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    baseline: str
    metric: str
    comparisons: tuple[Comparison, ...]
    data_seeded: bool = False
    data_options: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)  # overrides that make a rehearsal of it take seconds
    quick_data_options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    variants: dict[str, Claim] = field(default_factory=dict)  # reported beside the claim, never asserted


@dataclass(frozen=True)
class System:
    """A system as the rest of the house sees it."""

    slug: str
    task: str  # the name of a module in counterpoint.tasks
    config: type[Any]
    learner: Callable[
        ..., Learner
    ]  # learner(config, data, seed); data has what the task knows of its source as attributes
    data: str  # the source `train` uses when none is named
    claim: Claim | None = None  # None for the classic baselines, against which others' claims are tried
    # Settings that replace the paper's where a data source is far from the paper's scale, by source name. Named when used.
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    # The same for every other source than those; the user's own data, most often.
    recipe: dict[str, Any] = field(default_factory=dict)

    def recipe_for(self, source: str) -> dict[str, Any]:
        """What replaces the paper's settings on the source of this name."""
        return self.recipes.get(source, self.recipe)
