"""Training, resuming and evaluating a system by name: what the command line and Python scripts call.

>>> from counterpoint.training import train, default_config
>>> run = train("macil-sd", default_config("macil-sd", "async-bags"), data="async-bags")   # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from counterpoint import catalog
from counterpoint import data as sources
from counterpoint.data import source_name
from counterpoint.engine.learner import Learner
from counterpoint.engine.run import Run, check_new
from counterpoint.errors import CounterpointError, RunError
from counterpoint.systems.base import System
from counterpoint.systems.settings import flat, stored, with_settings

Say = Callable[[str], None]


def default_config(slug: str, data: str | None = None) -> Any:
    """The settings `train` starts from: the paper's, with the system's recipe for this data source where it has one."""
    system = catalog.load_system(slug)
    name = source_name(data or system.data)
    return system.config(**system.recipe_for(name))


def task_class(system: System) -> Any:
    """The class of a system's task."""
    return importlib.import_module(f"counterpoint.tasks.{system.task}").TASK


def load_source(system: System, spec: str, **options: Any) -> Any:
    """A data source in the form the system's task takes."""
    return sources.load(spec, task=task_class(system).contract, **options)


def task_of(system: System, source: Any, config: Any) -> Any:
    """The task of a system that is to be trained on a source of data, which the system may change first."""
    task = task_class(system)(system.source(source, config) if system.source else source, config)
    if hasattr(task, "check_training"):  # what does not matter to a run that is only measured on this data
        task.check_training()
    return task


def _start_from(learner: Learner, parent: Run) -> None:
    """Give a learner the weights of a finished run."""
    try:
        learner.load_state_dict(parent.load_weights())
    except RuntimeError as error:
        raise RunError(
            f"{parent.path}: its weights do not fit this run's settings: {' '.join(str(error).split())[:300]}; keep the "
            "settings of the networks as they were"
        ) from error


def _fit(
    run: Run,
    system: System,
    config: Any,
    source: Any,
    checkpoint_minutes: float,
    say: Say,
    parent: Run | None = None,
) -> Run:
    from counterpoint.engine.fit import fit
    from counterpoint.engine.services import Loop

    task = task_of(system, source, config)
    of_data = [
        note for note in getattr(task.data, "notes", ()) if note not in source.notes
    ]  # of what the system changed
    for note in (*of_data, *getattr(task, "notes", ())):
        say(f"note: {note}")
    # What is resumed has learnt from facts that need not be found again (the run of a teacher may be gone).
    facts = run.facts() if run.checkpoint.is_file() else task.facts
    if parent is not None:
        # The same networks, with the same tokenizer and classes: what they were built from does not change.
        task.check_facts(parent.facts())
        facts = parent.facts() | {name: value for name, value in facts.items() if name == "examples"}
    run.save_facts(facts)
    learner = system.learner(config, SimpleNamespace(**facts), run.config["seed"])
    if parent is not None:
        _start_from(learner, parent)
    fit(
        learner,
        task,
        loop=Loop(checkpoint_minutes=checkpoint_minutes),
        evaluate_every=getattr(config, "evaluate_every", 1),
        run=run,
        title=run.path.name,
        say=say,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        from counterpoint.report.run import write_run_report

        last = run.metrics()[-1]
        levels = run.chance()
        found = {k.removeprefix("test/"): v for k, v in last.items() if k.startswith("test/")}
        say("  ".join(f"{k} {v:.4f}" + (f" (chance {levels[k]:.4f})" if k in levels else "") for k, v in found.items()))
        say(f"Run: {run.path}  Page: {write_run_report(run.path)}")
    return run


def fit_alone(system: System, config: Any, source: Any, seed: int) -> list[dict[str, float]]:
    """Fit without a run directory or a progress bar, and return the metrics, a row per epoch: for claims and comparisons."""
    from counterpoint.engine.fit import fit

    task = task_of(system, source, config)
    learner = system.learner(config, SimpleNamespace(**task.facts), seed)
    return fit(learner, task, evaluate_every=getattr(config, "evaluate_every", 1), bar=False)


def train(
    slug: str,
    config: Any = None,
    *,
    data: str | None = None,
    seed: int = 0,
    out: Path = Path("runs"),
    name: str | None = None,
    parent: Path | str | None = None,
    checkpoint_minutes: float = 10.0,
    say: Say = print,
) -> Run:
    """Train a system and return its run.

    With a `parent`, a finished run of the same system, training goes on from its weights: a new run, with its own schedule
    and optimiser from the start, that names its parent. Its data and settings default to the parent's.

    `config` defaults to `default_config(slug, data)`. Raises CounterpointError for what the user can mend: unknown
    names, data that is missing or damaged, settings that do not fit.
    """
    system = catalog.load_system(slug)
    origin = None if parent is None else finished(parent, slug)
    spec = data or (origin.config["data"] if origin else system.data)
    if config is None:
        config = restore(origin)[1] if origin else default_config(slug, data)
    if hasattr(config, "check"):  # settings first: data may take minutes to read
        config.check()
    check_new(Path(out), name)
    source = load_source(system, spec)
    for note in source.notes:
        say(f"note: {note}")
    recipe = system.recipe_for(source_name(spec))
    paper = system.config()
    usual = flat(paper)
    changed = {k: v for k, v in flat(config).items() if v != usual[k]}
    if changed:
        expected = {k: v for k, v in recipe.items() if v != usual[k]}
        said = "the recipe for this data" if changed == expected else "this run"
        say(f"{said} departs from the paper's settings: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    record = {
        "slug": slug,
        "title": catalog.get(slug).title,
        "task": system.task,
        "data": spec,
        "seed": seed,
        "config": stored(config),
    }
    if origin is not None:
        record["parent"] = {"run": str(origin.path), "weights": origin.digest()}
    return _fit(_create(Path(out), record, name), system, config, source, checkpoint_minutes, say, origin)


def finished(path: Path | str, slug: str | None = None) -> Run:
    """Open a run that was trained to its end; RunError when it was not, or is of another system than `slug`."""
    run = Run.open(path)
    if slug is not None and run.slug != slug:
        raise RunError(f"{run.path} is a run of {run.slug}, not of {slug}; continue it without naming a system")
    if not run.complete:
        raise RunError(f"{run.path} is not finished; go on with it first: counterpoint train --resume {run.path}")
    return run


def _create(out: Path, record: dict[str, Any], name: str | None) -> Run:
    """Make the run directory. Under torchrun the first process does, and only it ever writes there."""
    if int(os.environ.get("RANK", "0")) == 0:
        return Run.create(out, record, name)
    return Run(out / "of-the-first-process", record)


def resume(path: Path | str, *, checkpoint_minutes: float = 10.0, say: Say = print) -> Run:
    """Go on with an interrupted run; it ends with the metrics it would have had without the interruption."""
    run = Run.open(path)
    if run.complete:
        raise RunError(
            f"{run.path} is complete; there is nothing to resume. Measure it: counterpoint evaluate {run.path}"
        )
    system, config = restore(run)
    return _fit(run, system, config, load_source(system, run.config["data"]), checkpoint_minutes, say, _parent(run))


def _parent(run: Run) -> Run | None:
    """The run whose weights an interrupted run starts from, if it was interrupted before its first checkpoint."""
    named = run.config.get("parent")
    if not named or run.checkpoint.is_file():
        return None
    parent = finished(named["run"], run.slug)
    if parent.digest() != named["weights"]:
        raise RunError(f"{parent.path} has other weights than those {run.path} started from; train it anew")
    return parent


def restore(run: Run) -> tuple[System, Any]:
    """The system and settings a run was made with; RunError when its config.yaml does not hold them."""
    system = catalog.load_system(run.slug)
    kept = run.config.get("config")
    missing = {"data", "seed"} - set(run.config)
    if not isinstance(kept, dict) or missing:
        raise RunError(
            f"{run.path}/config.yaml is not one this version wrote"
            + (f"; it lacks {', '.join(sorted(missing))}" if missing else "")
        )
    try:
        return system, with_settings(system.config(), kept, run.slug)
    except CounterpointError as error:
        raise RunError(f"{run.path}/config.yaml is not one this version wrote; {error}") from error
    except TypeError as error:
        raise RunError(f"{run.path}/config.yaml: {error}") from error


def load_learner(run: Run | Path | str) -> Learner:
    """Load the trained learner of a run, in evaluation mode.

    Args:
        run: an open run, or the path of its directory.

    Raises RunError for a path that is no run and for weights that are missing, damaged or another system's.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    system, config = restore(run)
    learner = system.learner(config, SimpleNamespace(**run.facts()), run.config["seed"])
    try:
        learner.load_state_dict(run.load_weights())
    except RuntimeError as error:
        raise RunError(
            f"{run.path}: the weights do not fit its config: {' '.join(str(error).split())[:300]}"
        ) from error
    return learner.eval()


class Measured(dict[str, float]):
    """Metrics by name; `chance` has what guessing would score, for those that have such a level."""

    chance: dict[str, float]


@torch.no_grad()
def evaluate(path: Path | str, *, data: str | None = None, say: Say = print) -> Measured:
    """Measure a trained run on its test data, or on another source's that gives the same kind of items."""
    run = Run.open(path)
    learner = load_learner(run)
    system, config = restore(run)
    source = load_source(system, data or run.config["data"])
    for note in source.notes:
        say(f"note: {note}")
    task = task_class(system)(source, config)
    task.check_facts(run.facts())
    from functools import partial

    from rich.console import Console
    from rich.progress import track

    from counterpoint.engine.evaluation import measure

    shown = partial(track, description="evaluating", console=Console(stderr=True), transient=True)
    figures, evaluator, _ = measure(learner, task, "test", final=True, track=shown)
    found = Measured(figures)
    found.chance = dict(evaluator.chance()) if hasattr(evaluator, "chance") else {}
    return found
