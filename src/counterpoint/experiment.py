"""Resolve a system, its settings and its data once. Every command trains and measures through an `Experiment`.

>>> from counterpoint.experiment import Experiment
>>> experiment = Experiment.resolve("simclr", "digits", overrides={"epochs": 2})
>>> experiment.config.epochs
2
>>> rows = experiment.run(seed=0)   # doctest: +SKIP

The order is the same for all: the paper's settings, then the system's recipe for the data source, then the overrides,
then the settings' own check. Only then are data read, and only when the data fit the settings is a learner built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from counterpoint import catalog
from counterpoint import data as sources
from counterpoint.data import source_name
from counterpoint.engine.learner import Learner
from counterpoint.engine.run import Run
from counterpoint.errors import CounterpointError, RunError, unknown
from counterpoint.systems.base import System

Say = Callable[[str], None]


def silent(text: str) -> None:
    """Discard a message."""


@dataclass(frozen=True)
class Experiment:
    """A system with the settings and the data it runs on. Construct one with `resolve` or `of_run`."""

    system: System
    config: Any  # an instance of system.config
    data: str  # NAME, NAME:PLACE or NAME?OPTION=VALUE, as `counterpoint data` lists them
    options: dict[str, Any] = field(
        default_factory=dict
    )  # keyword arguments of the source; they win over those in `data`

    @classmethod
    def resolve(
        cls,
        slug: str | System,
        data: str | None = None,
        *,
        config: Any = None,
        overrides: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        recipe: bool = True,
        check: bool = True,
    ) -> Experiment:
        """Choose the settings for a system on a data source, and check them. Read no data.

        Args:
            slug: A system's name, a composition such as "moco-v2+mochi", or a System.
            data: A data source. Default: the system's own.
            config: Complete settings. Default: the paper's, changed by the recipe.
            overrides: Settings to replace, by name. A dotted name sets a part's setting: {"mochi.hardest": 64}.
            options: Keyword arguments of the data source, such as {"seed": 3}.
            recipe: Start from the system's recipe for this source. False: from the paper's settings, as claims do.
            check: Check the settings, which may import the library of an encoder. False: for a list of defaults.

        Raises CounterpointError for an unknown system or setting, and for a value that the settings refuse.
        """
        system = catalog.load_system(slug) if isinstance(slug, str) else slug
        data = data or system.data
        if config is None:
            config = system.config()
            if recipe:
                config = override(config, system.recipe_for(source_name(data)), system.slug)
        config = override(config, overrides or {}, system.slug)
        if check and hasattr(config, "check"):
            config.check()
        return cls(system, config, data, dict(options or {}))

    @classmethod
    def of_run(cls, run: Run | Path | str) -> Experiment:
        """Restore the experiment that a run directory records. RunError when its config.yaml does not hold one."""
        run = run if isinstance(run, Run) else Run.open(run)
        system = catalog.load_system(run.slug)
        stored = run.config.get("config")
        missing = {"data", "seed"} - set(run.config)
        if not isinstance(stored, dict) or missing:
            raise RunError(
                f"{run.path}/config.yaml is not one this version wrote"
                + (f"; it lacks {', '.join(sorted(missing))}" if missing else "")
            )
        try:
            return cls(system, override(system.config(), stored, system.slug), run.config["data"])
        except (CounterpointError, TypeError, ValueError) as error:
            raise RunError(f"{run.path}/config.yaml is not one this version wrote; {error}") from error

    @property
    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the paper's, by (dotted) name."""
        paper = flat(self.system.config())
        return {name: value for name, value in flat(self.config).items() if value != paper.get(name)}

    @property
    def follows_recipe(self) -> bool:
        """Return whether the settings are the ones that the recipe for this data source gives."""
        paper = self.system.config()
        return flat(override(paper, self.system.recipe_for(source_name(self.data)), self.system.slug)) == flat(
            self.config
        )

    def record(self, seed: int) -> dict[str, Any]:
        """Return what config.yaml of a run holds."""
        return {
            "slug": self.system.slug,
            "title": catalog.get(self.system.slug).title,
            "task": self.system.task,
            "data": self.data,
            "seed": seed,
            "config": asdict(self.config),
        }

    def source(self, data: str | None = None) -> Any:
        """Load the data in the form that the system's task takes. `data` names another source than the experiment's."""
        options = self.options if data is None else {}
        return sources.load(data or self.data, task=task_class(self.system).contract, **options)

    def task(self, source: Any = None) -> Any:
        """Make the task to train on, from loaded data (default: load them), and check that it can be trained on.

        A system may change the data first (`System.source`). Raises CounterpointError when data and settings do not fit.
        """
        source = self.source() if source is None else source
        change = self.system.source
        task = self.measured(change(source, self.config) if change else source)
        if hasattr(task, "check_training"):  # does not matter to a run that is only measured on this data
            task.check_training()
        return task

    def measured(self, source: Any) -> Any:
        """Make the task on loaded data as they are, to measure a trained run on."""
        return task_class(self.system)(source, self.config)

    def learner(self, facts: Mapping[str, Any], seed: int) -> Learner:
        """Build the untrained learner from what a task knows of its data."""
        return self.system.learner(self.config, SimpleNamespace(**facts), seed)

    def run(
        self,
        seed: int,
        *,
        run: Run | Callable[[], Run] | None = None,
        source: Any = None,
        parent: Run | None = None,
        say: Say = silent,
        **services: Any,
    ) -> list[dict[str, float]]:
        """Train and measure once, or do what the system does instead (`System.run`). Return the metrics, a row per epoch.

        Args:
            seed: Seed of initialisation, order of the data and dropout.
            run: The run directory to write to, which is resumed where it has a checkpoint. A function that makes one is
                called once data, settings and networks fit, so that a refused start leaves nothing on disk. Default: none.
            source: The data, where they are loaded already. Default: load them.
            parent: A finished run to start from: its weights and its facts.
            say: Receives notes about the data, a line each.
            services: Further arguments of `engine.fit.fit`: bar, checkpoint_minutes, console, ...

        Raises CounterpointError for data that do not fit the settings, Interrupted after Ctrl-C.
        """
        if self.system.run is not None:
            return self._own_run(seed, run, say)
        from counterpoint.engine.fit import fit  # evaluation and help need no loop

        source = self.source() if source is None else source
        task = self.task(source)
        of_change = [note for note in getattr(task.data, "notes", ()) if note not in getattr(source, "notes", ())]
        for note in (*of_change, *getattr(task, "notes", ())):
            say(f"note: {note}")
        # A resumed run has learnt from facts that need not be found again: the run of a teacher may be gone.
        facts = run.facts() if isinstance(run, Run) and run.checkpoint.is_file() else task.facts
        if parent is not None:
            # The same networks, with the same tokenizer and classes: what they were built from does not change.
            task.check_facts(parent.facts())
            facts = parent.facts() | {name: value for name, value in facts.items() if name == "examples"}
        learner = self.learner(facts, seed)
        if parent is not None:
            _start_from(learner, parent)
        directory = run() if callable(run) else run
        if directory is not None:
            directory.save_facts(facts)
        return fit(
            learner,
            task,
            epochs=self.config.epochs,
            evaluate_every=getattr(self.config, "evaluate_every", 1),
            run=directory,
            title=self.system.slug if directory is None else directory.path.name,
            **({"bar": False} if directory is None else {}) | services,
        )

    def _own_run(self, seed: int, run: Run | Callable[[], Run] | None, say: Say) -> list[dict[str, float]]:
        """Run a system that has a way of its own, and keep its metrics."""
        assert self.system.run is not None
        directory = run() if callable(run) else run
        rows = [dict(row) for row in self.system.run(self, seed, run=directory, say=say)]
        if directory is not None:
            directory.write_metrics(rows)
            if not directory.complete:
                directory.save_weights({})  # nothing was trained; the file says that the run is complete
        return rows


def task_class(system: System) -> Any:
    """Return the class of a system's task."""
    return importlib.import_module(f"counterpoint.tasks.{system.task}").TASK


def override(config: Any, values: Mapping[str, Any], slug: str) -> Any:
    """Return settings with some of them replaced.

    Args:
        config: An instance of a dataclass. Its field `parts`, if it has one, holds the settings of each part by name.
        values: New values by name. "PART.NAME", or a mapping under PART or under "parts", sets those of a part. A list stands
            for a tuple.
        slug: The system's name, for messages.

    Raises CounterpointError that names the first setting which does not exist, with near matches.
    """
    plain: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    known, parts = {f.name for f in fields(config)} - {"parts"}, parts_of(config)
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if name == "parts" and isinstance(value, Mapping) and set(value) <= set(parts):
            for part, more in value.items():
                below.setdefault(part, {}).update(more)
        elif head in parts and (rest or isinstance(value, Mapping)):
            below.setdefault(head, {}).update({rest: value} if rest else value)
        elif name in known:
            old = getattr(config, name)
            plain[name] = tuple(value) if isinstance(old, tuple) and isinstance(value, list) else value
        else:
            hint = str(unknown("setting", name, flat(config))).partition("; ")[2]
            raise CounterpointError(f"{slug} has no setting {name}; {hint}")
    if below:
        plain["parts"] = parts | {name: override(parts[name], more, f"{slug}: {name}") for name, more in below.items()}
    return replace(config, **plain) if plain else config


def parts_of(config: Any) -> dict[str, Any]:
    """Return the settings of each part of a composed system, by the part's name."""
    return dict(getattr(config, "parts", {}))


def flat(config: Any) -> dict[str, Any]:
    """Return all settings by name, those of parts as PART.NAME."""
    found = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "parts"}
    for part, settings in parts_of(config).items():
        found |= {f"{part}.{name}": value for name, value in flat(settings).items()}
    return found


def finished(path: Path | str, slug: str | None = None) -> Run:
    """Open a run that was trained to its end. RunError when it was not, or is of another system than `slug`."""
    run = Run.open(path)
    if slug is not None and run.slug != slug:
        raise RunError(f"{run.path} is a run of {run.slug}, not of {slug}; continue it without naming a system")
    if not run.complete:
        raise RunError(f"{run.path} is not finished; go on with it first: counterpoint train --resume {run.path}")
    return run


def load_learner(run: Run | Path | str) -> Learner:
    """Load the trained learner of a run, in evaluation mode.

    Args:
        run: An open run, or the path of its directory.

    Raises RunError for a path that is no run, and for weights that are missing, damaged or another system's.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    experiment = Experiment.of_run(run)
    weights = run.load_weights()
    if not weights and experiment.system.run is not None:
        raise RunError(f"{run.path}: {run.slug} trains no network; its figures are in metrics.csv")
    learner = experiment.learner(run.facts(), run.config["seed"])
    try:
        learner.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{run.path}: the weights do not fit its config: {_short(error)}") from error
    return learner.eval()


def _start_from(learner: Learner, parent: Run) -> None:
    """Give a learner the weights of a finished run."""
    try:
        learner.load_state_dict(parent.load_weights())
    except RuntimeError as error:
        raise RunError(
            f"{parent.path}: its weights do not fit this run's settings: {_short(error)}; keep the settings of the networks "
            "as they were"
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
