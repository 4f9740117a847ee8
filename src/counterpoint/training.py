"""Train, resume and evaluate a system by name, with a run directory. The command line and Python scripts call this module.

>>> from counterpoint.training import default_config, train
>>> config = default_config("simclr", "digits")
>>> run = train("simclr", config, data="digits", seed=1)   # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from counterpoint.data.devices import computing_on
from counterpoint.engine.options import Loop
from counterpoint.engine.run import BAD_BATCH, Run, check_new
from counterpoint.engine.state import need_idle
from counterpoint.errors import CounterpointError, Interrupted, RunError, check_seed
from counterpoint.experiment import Experiment, Say, finished, load_learner
from counterpoint.files import quoted
from counterpoint.systems.settings import stored, with_settings
from counterpoint.waiting import patient_track

if TYPE_CHECKING:
    from counterpoint.engine.replay import Replay

__all__ = ["Measured", "default_config", "evaluate", "finished", "load_learner", "replay", "resume", "train"]


def default_config(slug: str, data: str | None = None) -> Any:
    """Return the default settings of `train`: the paper's, changed by the system's recipe for this data source."""
    return Experiment.resolve(slug, data, check=False).config


def train(
    slug: str,
    config: Any = None,
    *,
    data: str | None = None,
    seed: int = 0,
    out: Path = Path("runs"),
    name: str | None = None,
    parent: Path | str | None = None,
    loop: Loop | None = None,
    say: Say = print,
    **services: Any,
) -> Run:
    """Train a system and return its run.

    Args:
        slug: The system's name, or a composition BASE+ADDITION.
        config: Settings. Default: `default_config(slug, data)`, or the parent's.
        data: The data source. Default: the system's own, or the parent's.
        seed: Seed of initialisation, order of the data and dropout.
        out: The folder in which the run directory is made.
        name: The run directory's name. Default: the system and the time.
        parent: A finished run of the same system. Training starts from its weights, as a new run with its own schedule and
            optimiser, and the new run names its parent.
        loop: Precision, device, large batches and other options of the loop.
        say: Receives messages, a line each.
        services: Further arguments of `engine.fit.fit`, such as callbacks.

    Raises CounterpointError for unknown names, missing or damaged data, and settings that do not fit. It then leaves nothing
    on disk. Raises Interrupted after Ctrl-C; then the run can be resumed.
    """
    check_seed(seed)
    origin = None if parent is None else finished(parent, slug)
    if origin is None:
        experiment = Experiment.resolve(slug, data, config=config)
    else:
        before = Experiment.of_run(origin)
        experiment = Experiment.resolve(
            before.system, data or before.data, config=before.config if config is None else config
        )
    loop = loop or Loop()
    loop.check()
    check_new(Path(out), name)
    with computing_on(loop.on()):
        source = experiment.source()
    for note in source.notes:
        say(f"note: {note}")
    if changed := experiment.changed:
        said = "the recipe for this data" if experiment.follows_recipe else "this run"
        say(f"{said} changes the paper's settings: " + ", ".join(f"{k} {_typed(v)}" for k, v in changed.items()))
    for note in experiment.unreached:
        say(f"note: {note}")
    record = experiment.record(seed) | {"loop": stored(loop)}
    if origin is not None:
        record["parent"] = {"run": str(origin.path), "weights": origin.digest()}
    made: list[Run] = []
    fresh = not Path(out).exists()

    def create() -> Run:
        made.append(_create(Path(out), record, name))
        return made[0]

    try:
        experiment.run(seed, run=create, source=source, parent=origin, say=say, loop=loop, **services)
    except Interrupted:
        raise
    except CounterpointError:
        if made and not made[0].begun and not (made[0].path / BAD_BATCH).is_file():
            shutil.rmtree(made[0].path, ignore_errors=True)  # refused before its first step
            if fresh:
                with contextlib.suppress(OSError):
                    Path(out).rmdir()
        raise
    return _shown(made[0], say)


def _typed(value: Any) -> str:
    """Return a setting as it is typed on the command line."""
    if isinstance(value, tuple | list):
        return " ".join(map(_typed, value)) or '""'
    if isinstance(value, float):
        return f"{value:.6g}"
    return '""' if value == "" else str(value)


def resume(path: Path | str, *, loop: Loop | None = None, say: Say = print, **services: Any) -> Run:
    """Continue an interrupted run. Its final metrics are those of an uninterrupted run.

    Args:
        path: The run directory.
        loop: Only its `device` and `checkpoint_minutes` are used. The run's record gives all other options.
        say: Receives messages, a line each.
        services: Further arguments of `engine.fit.fit`, such as callbacks.

    Raises RunError for a run that is complete, for a damaged checkpoint, and for data or teachers that have changed. Raises
    Interrupted after Ctrl-C.
    """
    run = Run.open(path)
    if run.complete:
        raise RunError(
            f"{run.path} is complete; there is nothing to resume. Measure it: counterpoint evaluate {quoted(run.path)}"
        )
    need_idle(run.path)
    experiment = Experiment.of_run(run)
    asked = loop or Loop()
    own = _loop_of(run)
    own = replace(own, device=asked.device, checkpoint_minutes=asked.checkpoint_minutes)
    own.check()
    experiment.run(run.config["seed"], run=run, parent=_parent(run), say=say, loop=own, **services)
    return _shown(run, say)


def replay(path: Path | str, *, device: str = "cpu") -> Replay:
    """Rerun the step of the batch that a run kept because its loss was not finite.

    Args:
        path: The run directory.
        device: Device to run the step on, such as "cpu" or "cuda".

    Raises RunError when the run kept no batch, or when the batch does not fit the run.
    """
    from counterpoint.engine.kept import read_batch
    from counterpoint.engine.replay import replay as again

    run = Run.open(path)
    kept = read_batch(run)
    experiment = Experiment.of_run(run)
    loop = replace(_loop_of(run), device=device, log=())
    loop.check()
    with computing_on(loop.on()):
        task = experiment.task()
    return again(experiment.learner(run.facts(), run.config["seed"]), task, kept, loop)


def _loop_of(run: Run) -> Loop:
    """Return the options of the loop that a run records."""
    try:
        own: Loop = with_settings(Loop(), run.config.get("loop", {}), "the loop")
    except (CounterpointError, TypeError) as error:
        raise RunError(
            f"{run.path}/config.yaml cannot be read by this version: its loop has other options; use the version that wrote it"
        ) from error
    return own


def _create(out: Path, record: dict[str, Any], name: str | None) -> Run:
    """Make the run directory. Under torchrun the first process makes it, and only that process ever writes there."""
    if int(os.environ.get("RANK", "0")) == 0:
        return Run.create(out, record, name)
    return Run(out / "of-the-first-process", record)


def _parent(run: Run) -> Run | None:
    """Find the run whose weights an interrupted run starts from, if it was interrupted before its first checkpoint."""
    named = run.config.get("parent")
    if not named or run.checkpoint.is_file():
        return None
    parent = finished(named["run"], run.slug)
    if parent.digest() != named["weights"]:
        raise RunError(f"{parent.path} has other weights than those {run.path} started from; train {run.path} again")
    return parent


def _shown(run: Run, say: Say) -> Run:
    """Write the page of a complete run and print its test metrics."""
    if int(os.environ.get("RANK", "0")) == 0:
        from counterpoint.report.run import write_run_report

        last = run.metrics()[-1]
        levels = run.chance()
        found = {k.removeprefix("test/"): v for k, v in last.items() if k.startswith("test/")}
        if speed := run.speed():
            say(_speed(speed, run.config.get("config", {})))
        say("  ".join(f"{k} {v:.4f}" + (f" (chance {levels[k]:.4f})" if k in levels else "") for k, v in found.items()))
        say(f"Run: {run.path}  Page: {write_run_report(run)}")
    return run


def _speed(speed: Mapping[str, float], settings: Mapping[str, Any]) -> str:
    """Say how fast a run was trained, and what would speed it up.

    >>> _speed({"items": 5120, "seconds": 4.0, "items_per_second": 1280.0, "waiting_share": 0.45}, {"workers": 0})
    '5,120 items in 4.0 s: 1,280 a second; 45 % of the time was waiting for batches: --workers N reads them in N processes'
    """
    share = speed["waiting_share"]
    said = f"{speed['items']:,.0f} items in {speed['seconds']:,.1f} s: {speed['items_per_second']:,.0f} a second"
    said += f"; {100 * share:.0f} % of the time was waiting for batches"
    return said + (": --workers N reads them in N processes" if share > 0.2 and settings.get("workers") == 0 else "")


class Measured(dict[str, float]):
    """Metrics by name. `chance` has the chance level of those that have one."""

    chance: dict[str, float]


@torch.no_grad()
def evaluate(path: Run | Path | str, *, data: str | None = None, device: str = "cpu", say: Say = print) -> Measured:
    """Measure a trained run on its test data, or on those of another source with the same kind of items.

    Args:
        path: The run, or the path of its directory.
        data: Another data source. Default: the source that the run was trained on.
        device: Device to compute on: auto (the GPU if there is one), cpu, cuda, cuda:1, mps.
        say: Receives notes about the data, a line each.

    Raises RunError for a path that is no run or has no weights, DataError for data that cannot be read.
    """
    run = path if isinstance(path, Run) else Run.open(path)
    place = Loop(device=device).on()
    learner = load_learner(run).to(place)
    experiment = Experiment.of_run(run)
    with computing_on(place):
        source = experiment.source(data)
    for note in source.notes:
        say(f"note: {note}")
    task = experiment.measured(source)
    task.check_facts(run.facts())
    from counterpoint.engine.evaluation import measure

    figures, evaluator, _ = measure(learner, task, "test", final=True, track=partial(patient_track, what="evaluating"))
    found = Measured(figures)
    found.chance = dict(evaluator.chance()) if hasattr(evaluator, "chance") else {}
    return found
