"""What a system's file declares so that the command line and the lab can run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from counterpoint.core.compared import Compared
from counterpoint.engine.learner import Learner
from counterpoint.errors import CounterpointError


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
    # Settings that replace the paper's where a data source is far from the paper's scale, by source name. Named when used.
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    # The same for every other source than those; the user's own data, most often.
    recipe: dict[str, Any] = field(default_factory=dict)
    # The data as the task learns from it, where it is not the source's own: source(data, config).
    source: Callable[[Any, Any], Any] | None = None

    def recipe_for(self, source: str) -> dict[str, Any]:
        """What replaces the paper's settings on the source of this name."""
        return self.recipes.get(source, self.recipe)


class ContrastiveLearner(Learner):
    """A learner whose loss falls into what it compares and what it makes of that, so that an addition can come between.

    `compared` gives the rows of a step (several entries where a step has several comparisons, as of three modalities);
    `objective` makes named scalars of one of them, of which "loss" is minimised. `loss` takes means over the entries.
    """

    def compared(self, batch: dict[str, Any]) -> list[Compared]:
        raise CounterpointError(f"{type(self).__name__} does not say what it compares")

    def objective(self, compared: Compared, batch: dict[str, Any]) -> dict[str, Tensor]:
        raise CounterpointError(f"{type(self).__name__} has no objective")

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = [self.objective(part, batch) for part in self.compared(batch)]
        return {name: torch.stack([part[name] for part in found]).mean() for name in found[0]}


@dataclass
class AdditionConfig:
    """Settings that an addition brings to those of the system it goes over. Fields of subclasses need names of their own."""

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()

    def facts(self, data: Any) -> dict[str, Any]:
        """What the composed learner has to know of the data besides what the base's does."""
        return dict(super().facts(data))  # type: ignore[misc]


@dataclass(frozen=True)
class Addition:
    """A method that changes part of another system: named alone it stands over `over`, as BASE+SLUG over any that fits.

    A learner with `replaces = True` makes a loss of its own of what is compared, so it cannot go over an addition that does
    something to the loss, unless that one does without (`yields = True`).

    The composed system's settings are a class made of both settings' classes, its learner a class made of `learner` and the
    base's learner, in this order: a method of `learner` calls super() for what the base does.
    """

    slug: str
    over: str  # the system it stands over when named alone
    config: type[AdditionConfig]
    learner: type[Any]
    fits: tuple[
        str, ...
    ]  # what it can go over: forms of comparison (`Compared.form`), or "task:NAME" for all of a task
    data: str = ""  # "": the base's
    defaults: dict[str, Any] = field(
        default_factory=dict
    )  # the paper's settings of the base, where they differ from it
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    # The data as the composed task learns from it.
    source: Callable[[Any, Any], Any] | None = None

    def onto(self, base: System, *, alone: bool = False) -> System:
        """The composition: `base` with this switched on; `alone`: as the system of the addition's own name.
        CounterpointError where it does not fit."""
        return _composed(base, self, alone)


def _composed(base: System, addition: Addition, alone: bool) -> System:
    form = getattr(base.learner, "form", None)
    if form not in addition.fits and f"task:{base.task}" not in addition.fits:
        known_as = f"compares by '{form}'" if form else "does not say what it compares"
        raise CounterpointError(
            f"{addition.slug} does not go over {base.slug}, which {known_as} (task {base.task}); it goes over "
            f"{', '.join(addition.fits)}: see counterpoint.core.compared"
        )
    assert isinstance(base.learner, type)
    known = {f.name: f for f in fields(base.config)}
    clash = sorted({f.name for f in fields(addition.config)} & set(known))
    if clash:
        raise CounterpointError(f"{addition.slug} is in {base.slug} already (both have {', '.join(clash)})")
    lost = [
        part.__name__
        for part in base.learner.__mro__
        if "objective" in vars(part) and not issubclass(part, Learner) and not getattr(part, "yields", False)
    ]
    if getattr(addition.learner, "replaces", False) and lost:
        raise CounterpointError(
            f"{addition.slug} makes its own loss of what is compared and would leave {', '.join(lost)} of {base.slug} "
            "without effect: name one of them, or an addition that builds on the loss (hallucinator) last"
        )
    changed: list[Any] = [
        (name, known[name].type, field(default=value)) for name, value in addition.defaults.items() if alone
    ]
    name = f"{base.learner.__name__}With{addition.learner.__name__}"
    config = make_dataclass(f"{name}Config", changed, bases=(addition.config, base.config))
    config.__doc__ = base.config.__doc__
    recipes = {
        source: base.recipe_for(source) | addition.recipes.get(source, addition.recipe)
        for source in {*base.recipes, *addition.recipes}
    }
    earlier = base.source
    sources = [s for s in (earlier, addition.source) if s is not None]

    def source(data: Any, config: Any) -> Any:
        for change in sources:
            data = change(data, config)
        return data

    return replace(
        base,
        slug=addition.slug if alone else f"{base.slug}+{addition.slug}",
        config=config,
        learner=type(name, (addition.learner, base.learner), {"__doc__": addition.learner.__doc__}),
        data=(addition.data or base.data) if alone else base.data,
        recipes=recipes,
        recipe=base.recipe | addition.recipe,
        source=source if sources else None,
    )
