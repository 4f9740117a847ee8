"""Declare systems and additions, so that the command line and the lab can run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from counterpoint.engine.learner import Learner
from counterpoint.errors import CounterpointError
from counterpoint.systems.parts import Part
from counterpoint.systems.settings import PartConfig, with_settings


@dataclass(frozen=True)
class System:
    """A system's declaration, for the rest of the package."""

    slug: str
    task: str  # the name of a module in counterpoint.tasks
    config: Callable[..., Any]  # config(**overrides): the paper's settings, changed by name
    # learner(config, data, seed); the attributes of `data` are the task's facts of its source
    learner: Callable[..., Learner]
    data: str  # default source of `train`
    # Settings, by source name, that replace the paper's for sources far from the paper's scale. A run reports their use.
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    # The same for every other source, usually the user's own data.
    recipe: dict[str, Any] = field(default_factory=dict)
    # source(data, config) returns the data that the task learns from; None: the source's own data.
    source: Callable[[Any, Any], Any] | None = None
    # A custom run in place of the training loop (a federation):
    # run(experiment, seed, *, run, say) returns the metrics, a row per round. `run` is the run directory or None.
    run: Callable[..., Any] | None = None
    # The way a `ContrastiveLearner` contrasts its rows; additions that change this way fit the system.
    compares: Callable[..., Any] | None = None
    additions: tuple[Addition, ...] = ()  # of a composition, in the order of its name
    bare: System | None = None  # of a composition, the system without additions

    def recipe_for(self, source: str) -> dict[str, Any]:
        """Return the settings that replace the paper's on the source of this name."""
        return self.recipes.get(source, self.recipe)


@dataclass(frozen=True)
class Addition:
    """A method that changes part of another system: SLUG alone changes the system `over`, BASE+SLUG any that fits.

    It is a `part` of a contrastive step, or (`around`) a learner around the base's learner.
    """

    slug: str
    over: str  # the base if the slug is named alone
    config: type[PartConfig]
    part: Callable[[Any, Learner, Any, Any], Part] | None = None  # part(settings, learner, data, base.compares)
    # around(settings, make, data, seed), where make(seed) builds the base's learner with all parts
    around: Callable[[Any, Callable[[int], Learner], Any, int], Learner] | None = None
    fits: tuple[Callable[..., Any], ...] = ()  # the ways of comparison that it changes
    task: str = ""  # it also fits every system of this task
    # "own": it replaces the loss, so it refuses a base with an earlier addition that changes the loss. "over": it builds on
    # the loss below. "": it does not change the loss, or not if another addition does.
    loss: Literal["own", "over", ""] = ""
    data: str = ""  # "": the base's source
    defaults: dict[str, Any] = field(
        default_factory=dict
    )  # the paper's settings of the base that differ from the base's defaults
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    # source(data, settings of the addition) returns the data that the composed task learns from.
    source: Callable[[Any, Any], Any] | None = None

    def onto(self, base: System, *, alone: bool = False) -> System:
        """Return the composition of `base` and this addition.

        Args:
            base: the system to change.
            alone: name the composition by the addition's slug alone, with its default settings of the base.

        Raises CounterpointError if the two do not fit.
        """
        self._check(base)
        slug = self.slug if alone else f"{base.slug}+{self.slug}"
        defaults = self.defaults if alone else {}

        def config(**settings: Any) -> Any:
            below = base.config()
            found = replace(below, parts=below.parts | {self.slug: self.config()})
            return with_settings(found, defaults | settings, slug)

        def source(data: Any, config: Any) -> Any:
            data = base.source(data, config) if base.source else data
            return self.source(data, config.parts[self.slug]) if self.source else data

        bare, additions = base.bare or base, (*base.additions, self)

        def learner(config: Any, data: Any, seed: int = 0) -> Learner:
            return _built(bare, additions, config, data, seed)

        return replace(
            base,
            slug=slug,
            config=config,
            learner=learner,
            data=(self.data or base.data) if alone else base.data,
            recipes={
                name: base.recipe_for(name) | self.recipes.get(name, self.recipe)
                for name in {*base.recipes, *self.recipes}
            },
            recipe=base.recipe | self.recipe,
            source=source if base.source or self.source else None,
            additions=additions,
            bare=bare,
        )

    def _check(self, base: System) -> None:
        """Raise CounterpointError if this addition does not fit a system."""
        if base.compares not in self.fits and base.task != self.task:
            how = f"compares by '{_said(base.compares)}'" if base.compares else "does not declare its comparison"
            over = [*map(_said, self.fits), *([f"any system of the task {self.task}"] if self.task else [])]
            raise CounterpointError(
                f"{self.slug} does not go over {base.slug}, which {how} (task {base.task}); it goes over {', '.join(over)}: "
                "see counterpoint.core.compared"
            )
        if self.slug in [addition.slug for addition in base.additions]:
            raise CounterpointError(f"{self.slug} is in {base.slug} already")
        lost = [addition.slug for addition in base.additions if addition.loss]
        if self.loss == "own" and lost:
            raise CounterpointError(
                f"{self.slug} makes its own loss of what is compared and would leave {', '.join(lost)} of {base.slug} "
                "without effect: name one of them, or an addition that builds on the loss (hallucinator) last"
            )


def _said(ways: Any) -> str:
    return str(ways.__name__).lower()


def _built(base: System, additions: tuple[Addition, ...], config: Any, data: Any, seed: int) -> Learner:
    """Build the base's learner, the parts over it in their order, and then the learners around it."""

    def make(seed: int) -> Learner:
        learner = base.learner(config, data, seed)
        for addition in additions:
            if addition.part is not None:
                part = addition.part(config.parts[addition.slug], learner, data, base.compares)
                learner.parts[addition.slug] = part
        return learner

    for addition in additions:
        if addition.around is not None:
            make = partial(addition.around, config.parts[addition.slug], make, data)
    return make(seed)
