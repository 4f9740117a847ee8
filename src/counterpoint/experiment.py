"""Resolve a system, its settings and its data once. Every command trains and measures through an `Experiment`.

>>> from counterpoint.experiment import Experiment
>>> experiment = Experiment.resolve("simclr", "digits", overrides={"epochs": 2})
>>> experiment.config.epochs
2
>>> rows = experiment.run(seed=0)   # doctest: +SKIP

The order is always the same: the paper's settings, the system's recipe for the data source, the overrides, the settings'
own check. Only then are data read. A learner is built only when the data fit the settings.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import yaml

from counterpoint import catalog
from counterpoint import data as sources
from counterpoint.core.world import processes
from counterpoint.data import cached, source_name
from counterpoint.data.devices import computing_on
from counterpoint.encoders.adapters import adapted, load_base, merged_state
from counterpoint.engine.learner import Learner
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run, versions
from counterpoint.engine.state import recorded
from counterpoint.errors import CounterpointError, Interrupted, RunError, check_seed
from counterpoint.systems.base import System
from counterpoint.systems.settings import flat, stored, with_settings
from counterpoint.words import counted

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

        Raises CounterpointError for an unknown system or setting, and for a value that the settings reject.
        """
        system = catalog.load_system(slug) if isinstance(slug, str) else slug
        data = data or system.data
        if config is None:
            config = system.config()
            if recipe:
                config = with_settings(config, system.recipe_for(source_name(data)), system.slug)
        config = with_settings(config, overrides or {}, system.slug)
        if check and hasattr(config, "check"):
            config.check()
        return cls(system, config, data, dict(options or {}))

    @classmethod
    def of_run(cls, run: Run | Path | str) -> Experiment:
        """Restore the experiment that a run directory records. RunError when its config.yaml does not hold one."""
        run = run if isinstance(run, Run) else Run.open(run)
        system = catalog.load_system(run.slug)
        kept = run.config.get("config")
        missing = {"data", "seed"} - set(run.config)
        if not isinstance(kept, dict) or missing:
            raise RunError(
                f"{run.path}/config.yaml cannot be read by this version"
                + (f": it lacks {', '.join(sorted(missing))}" if missing else ": it holds no settings under config")
                + "; use the version that wrote it, or train again"
            )
        try:
            return cls(system, with_settings(system.config(), kept, system.slug), run.config["data"])
        except (CounterpointError, TypeError, ValueError) as error:
            raise RunError(
                f"{run.path}/config.yaml cannot be read by this version: {error}; use the version that wrote it, or train again"
            ) from error

    @property
    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the paper's, by (dotted) name; without those that a run to start from replaces."""
        paper = flat(self.system.config())
        started = getattr(self.config, "start", "") and getattr(self.config, "adapts", False)
        replaced = ("encoder", "pretrained") if started else ()
        return {n: value for n, value in flat(self.config).items() if value != paper.get(n) and n not in replaced}

    @property
    def unreached(self) -> list[str]:
        """Return a note for each part of the method that would begin after the last epoch."""
        epochs = getattr(self.config, "epochs", None)
        configs = {"": self.config, **{f"{slug}.": part for slug, part in getattr(self.config, "parts", {}).items()}}
        return [
            f"{before}{name} is {getattr(config, name)}, so {part} never begins in {counted(epochs, 'epoch')}; "
            f"give more epochs or a lower {before}{name}"
            for before, config in configs.items()
            for name, (part, more) in getattr(config, "late", {}).items()
            if epochs is not None and getattr(config, name) + more >= epochs
        ]

    @property
    def follows_recipe(self) -> bool:
        """Return whether the settings are the ones that the recipe for this data source gives."""
        paper = self.system.config()
        return flat(with_settings(paper, self.system.recipe_for(source_name(self.data)), self.system.slug)) == flat(
            self.config
        )

    def record(self, seed: int) -> dict[str, Any]:
        """Return the content of a run's config.yaml, without the loop's options."""
        return {
            "slug": self.system.slug,
            "title": catalog.get(self.system.slug).title,
            "task": self.system.task,
            "data": self.data,
            "seed": seed,
            "config": stored(self.config),
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
        """Make the task on loaded data without `System.source`'s changes, to measure a trained run on."""
        return task_class(self.system)(source, self.config)

    def learner(self, facts: Mapping[str, Any], seed: int) -> Learner:
        """Build the untrained learner from the facts of a task's data, such as sizes and classes."""
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
            services: Further arguments of `engine.fit.fit`: loop, callbacks, bar, title, console.

        Raises CounterpointError for data that do not fit the settings, Interrupted after Ctrl-C.
        """
        check_seed(seed)
        if self.data.startswith("stream:") and (self.system.run is not None or self.system.source is not None):
            why = "trains no network by steps" if self.system.run is not None else "changes its data"
            raise CounterpointError(f"{self.system.slug} {why}, so it cannot be run over a stream; name another system")
        if self.system.run is not None:
            loop = services.get("loop") or Loop()
            if replace(loop, device="auto", checkpoint_minutes=10.0) != Loop():
                raise CounterpointError(
                    f"{self.system.slug} has a run of its own, so it takes no options of the loop: leave out "
                    "--precision, --accumulate, --compile, --ema, --patience, --fsdp and --log"
                )
            if parent is not None:
                raise CounterpointError(
                    f"{self.system.slug} has a run of its own, which cannot begin at a finished one: leave out --continue "
                    "(in Python: parent)"
                )
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise CounterpointError(
                    f"{self.system.slug} has a run of its own, which is one process: start it without torchrun"
                )
            return self._own_run(seed, run, say)
        from counterpoint.engine.fit import fit  # evaluation and help need no loop

        with computing_on((services.get("loop") or Loop()).on()):
            source = self.source() if source is None else source
            task = self.task(source)
        of_change = [note for note in getattr(task.data, "notes", ()) if note not in getattr(source, "notes", ())]
        for note in (*of_change, *getattr(task, "notes", ())):
            say(f"note: {note}")
        # A resumed run keeps its recorded facts: their source, such as a teacher's run, may be gone.
        facts = run.facts() if isinstance(run, Run) and run.checkpoint.is_file() else task.facts
        if parent is not None:
            # The parent's networks, tokenizer and classes stay, so the facts that they were built from stay too.
            task.check_facts(parent.facts())
            facts = parent.facts() | {name: value for name, value in facts.items() if name == "examples"}
        learner = self.learner(facts, seed)
        if parent is not None:
            _start_from(learner, parent)
        if getattr(source, "stream", False):
            learner = self._over_stream(learner, task, facts)
        directory = run() if callable(run) else run
        if directory is not None:
            directory.save_facts(facts)
        return fit(
            learner,
            task,
            evaluate_every=getattr(self.config, "evaluate_every", 1),
            run=directory,
            say=None if say is silent else say,
            **({"bar": False, "title": self.system.slug} if directory is None else {"title": directory.path.name})
            | services,
        )

    def _over_stream(self, learner: Learner, task: Any, facts: Mapping[str, Any]) -> Learner:
        """Let a learner train over the phases of its data (see tasks/sequential.py)."""
        from counterpoint.tasks.sequential import over_stream, phase_data

        tasks = [self.measured(part) for part in phase_data(task.data)]
        for part in tasks:
            part.check_facts(facts)
        return over_stream(learner, task, tasks)

    def _own_run(self, seed: int, run: Run | Callable[[], Run] | None, say: Say) -> list[dict[str, float]]:
        """Run a system that has its own `run` instead of the training loop, and keep its metrics."""
        assert self.system.run is not None
        directory = run() if callable(run) else run
        with recorded(directory.path if directory else None):
            rows = [dict(row) for row in self.system.run(self, seed, run=directory, say=say)]
        if directory is not None:
            directory.write_metrics(rows)
            if not directory.complete:
                directory.save_weights({})  # nothing was trained; the file says that the run is complete
        return rows


def task_class(system: System) -> Any:
    """Return the class of a system's task."""
    return importlib.import_module(f"counterpoint.tasks.{system.task}").TASK


def finished(path: Path | str, slug: str | None = None) -> Run:
    """Open a completely trained run. RunError when it is not complete, or when its system is not `slug`."""
    run = Run.finished(path)
    if slug is not None and run.slug != slug:
        raise RunError(f"{run.path} is a run of {run.slug}, not of {slug}; leave out the name of the system")
    return run


def load_learner(run: Run | Path | str) -> Learner:
    """Load the trained learner of a run, in evaluation mode.

    Args:
        run: An open run, or the path of its directory.

    Raises RunError for a path that is no run, and for weights that are missing, damaged or of another system.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    experiment = Experiment.of_run(run)
    weights = run.load_weights()
    if not weights and experiment.system.run is not None:
        raise RunError(f"{run.path}: {run.slug} trains no network; its figures are in metrics.csv")
    learner = experiment.learner(run.facts(), run.config["seed"])
    learner.restructure(run.structure())
    try:
        learner.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(
            f"{run.path}: the weights do not fit its config: {_short(error)}; restore config.yaml, or train again"
        ) from error
    return learner.eval()


def untrained(record: Mapping[str, Any], facts: Mapping[str, Any]) -> Learner:
    """Build the learner of a run's record and facts, with random weights."""
    system = catalog.load_system(record["slug"])
    config = with_settings(system.config(), record["config"], system.slug)
    return system.learner(config, SimpleNamespace(**facts), record["seed"])


def of_spec(spec: str) -> tuple[Experiment, int]:
    """Resolve "SLUG?data=SOURCE&seed=0&OPTION=VALUE" (see `fitted`): the experiment and its seed."""
    slug, _, query = spec.partition("?")
    given = {name: yaml.safe_load(value) for name, value in parse_qsl(query, keep_blank_values=True)}
    data, seed = given.pop("data", None), int(given.pop("seed", 0))
    return Experiment.resolve(slug, data, overrides=given), seed


def fitted(spec: str) -> Learner:
    """Load a small learner that is trained once and kept in the cache: "SLUG?data=SOURCE&seed=0&OPTION=VALUE".

    A question mark or an ampersand within the data's name is written %3F or %26. The cache identifies the run by its
    settings, the package's version and torch's version. Raises CounterpointError as `Experiment.resolve` does, and under
    several processes for a learner that is not kept yet: one process would hold the lock and wait for the others.
    """
    experiment, seed = of_spec(spec)
    record = experiment.record(seed)
    place = cached.place("fitted", record, versions(), suffix="")
    kept = (place / "config.yaml").is_file() and Run.open(place).complete
    if not kept and processes()[1] > 1:
        raise CounterpointError(
            f"fit:{spec} is trained in one process: run this command once without torchrun, then again with it"
        )
    with cached.locked(place):
        run = Run.open(place) if (place / "config.yaml").is_file() else None
        if run is None or not run.complete:
            title = f"{experiment.system.slug} (once)"
            try:
                experiment.run(seed, run=run or Run.create(place.parent, record, place.name), title=title)
            except Interrupted as error:
                raise Interrupted("interrupted; the same command or call continues") from error
    return load_learner(place)


def _start_from(learner: Learner, parent: Run) -> None:
    """Give a learner the weights of a finished run. Its adapters stay new where the run has none; else they are merged or kept."""
    learner.restructure(parent.structure())
    try:
        weights = parent.load_weights()
        with_adapters, mine = any(".lora_" in name for name in weights), bool(adapted(learner))
        if mine and not with_adapters:
            load_base(learner, weights)
        else:
            learner.load_state_dict(merged_state(load_learner(parent)) if with_adapters and not mine else weights)
    except RuntimeError as error:
        raise RunError(
            f"{parent.path}: its weights do not fit this run's settings: {_short(error)}; keep the parent's settings of the "
            "networks"
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
