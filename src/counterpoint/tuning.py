"""Search a system's settings with Optuna: `counterpoint sweep`. Trials are judged on `valid`, the chosen one is measured on `test`.

    DIR/study.journal    Optuna's record of all trials
    DIR/trials/0007/     the run directory of the best trial (with `keep`, of every trial)
    DIR/sweep.json       all trials, the best settings, the importance of each setting
    DIR/index.html       the same as a page

A second call with the same arguments continues the study.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from counterpoint import catalog
from counterpoint.engine.learner import Learner
from counterpoint.engine.options import Loop
from counterpoint.engine.run import Run, machine, versions
from counterpoint.engine.services import Callback
from counterpoint.errors import CounterpointError, Interrupted, check_seed, unknown
from counterpoint.experiment import Experiment, Say, silent
from counterpoint.files import check_folder, held, replacing
from counterpoint.lab.cluster import Cluster, Task, run_tasks
from counterpoint.lab.needed import lacking
from counterpoint.lab.ranges import Range
from counterpoint.lab.runner import continued
from counterpoint.report.run import smaller_is_better
from counterpoint.systems.settings import flat
from counterpoint.words import counted

if TYPE_CHECKING:
    import optuna

Sampler = Literal["tpe", "random", "grid", "cmaes"]
Pruner = Literal["median", "halving", "none"]
JOURNAL, RECORD, PAGE, TRIALS = "study.journal", "sweep.json", "index.html", "trials"


class Reporter(Callback):
    """Report each evaluation on `valid` to Optuna, and end a trial that its pruner gives up."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric, self.value = trial, metric, math.nan
        self.error: CounterpointError | None = None  # that of a metric which no trial can have

    def on_start(self, learner: Learner, task: Any) -> None:
        self.learner, self.stages = learner, len(learner.stages())

    def on_epoch(self, row: dict[str, float]) -> None:
        known = [name.removeprefix("valid/") for name in row if name.startswith("valid/")]
        if known and self.metric not in known and self.learner.position.stage + 1 == self.stages:
            self.error = lacking(self.metric, sorted(known))
            raise self.error
        value = row.get(f"valid/{self.metric}")
        if value is None or not math.isfinite(value):
            return
        self.value = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resumed trial has reported its first epochs before
            self.trial.report(value, int(row["epoch"]))
        if self.trial.should_prune():
            import optuna

            raise optuna.TrialPruned


@dataclass(frozen=True)
class Plan:
    """All that a process needs to run trials."""

    slug: str
    data: str
    given: dict[str, Any]
    over: tuple[Range, ...]
    metric: str
    lower: bool
    seed: int
    sampler: Sampler
    pruner: Pruner
    trials: int
    keep: bool
    out: Path
    loop: Loop

    @property
    def study_name(self) -> str:
        """The name of the study, which only the same sweep continues."""
        return (
            f"{self.slug} {self.data} {sorted(self.given.items())} {self.over} {self.metric} {self.seed} {self.sampler}"
        )


def sweep(
    slug: str,
    data: str | None,
    over: Sequence[str],
    *,
    trials: int = 20,
    given: Mapping[str, Any] | None = None,
    metric: str | None = None,
    sampler: Sampler = "tpe",
    pruner: Pruner = "median",
    seed: int = 0,
    jobs: int | None = 1,
    keep: bool = False,
    out: Path | str | None = None,
    loop: Loop | None = None,
    cluster: Cluster | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """Search the settings of a system for the best value of a measure on `valid`. Return the record (DIR/sweep.json).

    Args:
        slug: The system.
        data: The data source. Default: the system's own.
        over: Ranges, each NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C.
        trials: Number of trials of the whole sweep, those of earlier calls included; at least 1.
        given: Other settings, by name.
        metric: The measure. Default: the headline of the system's task.
        sampler: tpe, random, grid (five points of each interval) or cmaes (needs the package cmaes).
        pruner: median ends a trial below the median of the others at the same epoch; halving gives more epochs to better trials;
            none.
        seed: Seed of sampler and trials. All trials have the same seed.
        jobs: Number of trials at a time; with several, the order of the results changes what the sampler tries. None: as many as
            there is room for.
        keep: Keep the run of every trial. Default: of the best alone.
        out: The folder. Default: sweeps/SLUG.
        loop: Options of the training loop.
        cluster: The cluster whose machines run the trials. Default: this machine alone.
        say: Receives messages, a line each.

    A second call with the same arguments continues: it resumes an interrupted trial and runs those that are missing. Raises
    CounterpointError for settings that do not fit, a measure that `valid` lacks, and a folder of another sweep. Raises
    Interrupted after Ctrl-C.
    """
    for name, value, known in (("sampler", sampler, Sampler), ("pruner", pruner, Pruner)):
        if value not in get_args(known):
            raise unknown(name, value, get_args(known))
    if trials < 1 or (jobs is not None and jobs < 1):
        raise CounterpointError(f"trials and jobs must be at least 1, got {trials} and {jobs}")
    check_seed(seed)
    ranges = tuple(Range.parse(text) for text in over)
    if not ranges or len({one.name for one in ranges}) < len(ranges):
        raise CounterpointError("a sweep needs at least one --over, and each setting once: --over lr=1e-4..1e-1:log")
    for both in (one.name for one in ranges if one.name in (given or {})):
        raise CounterpointError(f"{both} is searched by --over and set by --set; leave out one of them")
    _optuna()
    if sampler == "cmaes" and find_spec("cmaes") is None:
        raise CounterpointError("the sampler cmaes needs the package cmaes: pip install cmaes")
    for one in ranges:  # refused before the first trial
        for value in one.ends():
            try:
                Experiment.resolve(slug, data, overrides={**(given or {}), one.name: value})
            except (TypeError, ValueError) as error:  # a value of a type that the system's own check does not expect
                raise CounterpointError(
                    f"{one.name}={value}, or another setting, has a value of another type ({error}); "
                    f"see counterpoint train {slug} --help"
                ) from error
    experiment = Experiment.resolve(slug, data, overrides=given)
    task = experiment.task()
    place = Path(out) if out is not None else Path("sweeps") / slug.replace("+", "-")
    plan = Plan(
        slug,
        experiment.data,
        dict(given or {}),
        ranges,
        metric or str(task.headline),
        bool(getattr(task, "lower", False)) if metric in (None, task.headline) else smaller_is_better(str(metric)),
        seed,
        sampler,
        pruner,
        trials,
        keep,
        place,
        loop or Loop(),
    )
    check_folder(place)
    with held(place, "runs the sweep in"):
        return _continued(plan, jobs, cluster, say)


def _continued(plan: Plan, jobs: int | None, cluster: Cluster | None, say: Say) -> dict[str, Any]:
    study = _opened(plan)
    _take_up(study)
    missing = plan.trials - sum(trial.state.is_finished() and trial.state.name != "FAIL" for trial in study.trials)
    if plan.sampler == "grid":
        missing = min(missing, math.prod(len(one.grid()) for one in plan.over))
    if missing > 0:
        say(
            f"{counted(missing, 'trial')} of {plan.slug} on {plan.data}, judged by {plan.metric} on valid; in {plan.out}"
        )
        done = plan.trials - missing

        def told(text: str) -> None:
            nonlocal done
            done += 1
            say(text)

        with continued(lambda: counted(done, "trial")):
            _run(plan, missing, jobs, cluster, told)
    return _recorded(plan)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise CounterpointError("counterpoint sweep needs Optuna: pip install 'counterpoint[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are tracebacks of errors that we print ourselves
    return optuna


def _opened(plan: Plan) -> optuna.Study:
    """Open the study of a plan, or make it. CounterpointError when the folder has another one."""
    optuna = _optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    plan.out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = JournalStorage(JournalFileBackend(str(plan.out / JOURNAL)))
    others = [one.study_name for one in storage.get_all_studies()]
    if others and plan.study_name not in others:
        found = [optuna.load_study(study_name=name, storage=storage) for name in others]
        if any(trial.values for study in found for trial in study.trials):
            raise CounterpointError(
                f"{plan.out} has a sweep with other settings; name another folder with --out, or remove this one"
            )
        for name in others:  # a sweep that was corrected before a trial was completed
            optuna.delete_study(study_name=name, storage=storage)
    makers: dict[str, Any] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=plan.seed, n_startup_trials=min(10, max(2, plan.trials // 3))),
        "random": lambda: optuna.samplers.RandomSampler(seed=plan.seed),
        "grid": lambda: optuna.samplers.GridSampler({one.name: one.grid() for one in plan.over}, seed=plan.seed),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=plan.seed),
    }
    pruners: dict[str, Any] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        "halving": optuna.pruners.SuccessiveHalvingPruner,
        "none": optuna.pruners.NopPruner,
    }
    return optuna.create_study(
        storage=storage,
        study_name=plan.study_name,
        load_if_exists=True,
        direction="minimize" if plan.lower else "maximize",
        sampler=makers[plan.sampler](),
        pruner=pruners[plan.pruner](),
    )


def _take_up(study: optuna.Study) -> None:
    """Put the trials that an earlier call left unfinished into the queue, with their settings and their runs."""
    from optuna.trial import TrialState

    trials = study.get_trials()
    last = {trial.user_attrs.get("run", f"{trial.number:04d}"): trial for trial in trials}  # a run's last trial
    for run, trial in last.items():
        if trial.state == TrialState.RUNNING:  # its process was killed
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state != TrialState.FAIL or "interrupted" not in trial.user_attrs:
            continue
        study.enqueue_trial(trial.params, user_attrs={"run": run})


def _run(plan: Plan, missing: int, jobs: int | None, cluster: Cluster | None, say: Say) -> None:
    """Run trials. This process draws their settings when there is room for them, and records their outcomes."""
    study = _opened(plan)
    running: dict[str, optuna.Trial] = {}
    threads = max(1, int(cluster.cpus)) if cluster is not None else 0 if jobs == 1 else 1

    def drawn() -> Iterator[Task]:
        for _ in range(missing):
            trial = study.ask()
            settings = {one.name: one.draw(trial) for one in plan.over}
            run = str(trial.user_attrs.get("run", f"{trial.number:04d}"))
            trial.set_user_attr("run", run)
            running[run] = trial
            yield run, (plan, trial, settings, run, threads)

    def finish(run: str, outcome: Outcome) -> None:
        trial = running.pop(run)
        for name in ("test", "error"):
            if (value := getattr(outcome, name)) is not None:
                trial.set_user_attr(name, value)
        _tell(study, trial, outcome.value, "COMPLETE" if outcome.complete else "PRUNED")
        say(f"trial {trial.number}: {outcome.said}")
        if outcome.complete and not plan.keep:
            _keep_best(plan, study)

    try:
        run_tasks(run_trial, drawn(), finish, jobs=jobs, cluster=cluster)
    except BaseException as error:
        for trial in running.values():
            if isinstance(error, Interrupted | KeyboardInterrupt) or len(running) > 1:
                trial.set_user_attr("interrupted", True)
            _tell(study, trial, None, "FAIL")
        raise


def _tell(study: optuna.Study, trial: optuna.Trial, value: float | None, state: str) -> None:
    """Record the end of a trial."""
    from optuna.trial import TrialState

    # A grid that is complete asks a loop to stop, and there is none.
    with contextlib.suppress(*([RuntimeError] if isinstance(study.sampler, _optuna().samplers.GridSampler) else [])):
        study.tell(trial, value if state == "COMPLETE" else None, state=TrialState[state])


@dataclass(frozen=True)
class Outcome:
    """The end of a trial."""

    complete: bool  # or it ended early
    said: str  # for the user: settings, and value or reason
    value: float | None = None
    test: dict[str, float] | None = None
    error: str | None = None


def run_trial(plan: Plan, trial: optuna.Trial, drawn: Mapping[str, Any], name: str, threads: int) -> Outcome:
    """Train with the settings of a trial, or resume its run. Any process may do it, more than once.

    Args:
        plan: The sweep.
        trial: The trial, to which values are reported while it trains.
        drawn: Its settings.
        name: The name of its run.
        threads: Number of threads; 0 leaves it as it is.

    Raises CounterpointError for a measure that `valid` lacks, Interrupted when it is interrupted.
    """
    from counterpoint import training

    if threads:
        import torch

        torch.set_num_threads(threads)
    said = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in drawn.items()
    )
    reporter = Reporter(trial, plan.metric)
    folder = plan.out / TRIALS / name
    optuna = _optuna()

    def ended(reason: str, error: str | None = None) -> Outcome:
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(False, f"{said}: {reason}", error=error)

    try:
        if (folder / "config.yaml").is_file() and not Run.open(folder).complete and Run.open(folder).begun:
            run = training.resume(folder, say=silent, callbacks=[reporter])
        else:
            shutil.rmtree(folder, ignore_errors=True)
            config = Experiment.resolve(plan.slug, plan.data, overrides={**plan.given, **drawn}).config
            run = training.train(
                plan.slug,
                config,
                data=plan.data,
                seed=plan.seed,
                out=folder.parent,
                name=name,
                loop=plan.loop,
                say=silent,
                callbacks=[reporter],
            )
    except optuna.TrialPruned:
        return ended(f"ended early at {plan.metric} {reporter.value:.4f}")
    except Interrupted:
        raise
    except CounterpointError as error:
        if error is reporter.error:
            raise
        reason = str(error).partition("\n")[0]  # the next line names the run, which is removed
        return ended(reason, reason)
    rows = [row for row in run.metrics() if f"valid/{plan.metric}" in row]
    if not rows:
        known = sorted({key.removeprefix("valid/") for row in run.metrics() for key in row if key.startswith("valid/")})
        raise lacking(plan.metric, known)
    value = float(rows[-1][f"valid/{plan.metric}"])
    if not math.isfinite(value):  # Optuna would count no trial, and never reach the number wanted
        reason = f"{plan.metric} is {value} on valid"
        return ended(reason, reason)
    test = {key: v for key, v in run.metrics()[-1].items() if key.startswith("test/")}
    return Outcome(True, f"{said}: {plan.metric} {value:.4f}", value, test)


def _keep_best(plan: Plan, study: optuna.Study) -> None:
    """Remove the runs of all finished trials but the best one."""
    from optuna.trial import TrialState

    done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.value is not None]
    ranked = {str(t.user_attrs.get("run")): float(t.value or 0.0) for t in done}
    best = _best(plan, ranked)
    for other in ranked:
        if other != best:
            shutil.rmtree(plan.out / TRIALS / other, ignore_errors=True)


def _best(plan: Plan, values: Mapping[str, float]) -> str:
    """Return the run with the best value; of equal ones the first."""
    return min(values, key=lambda run: (values[run] if plan.lower else -values[run], run))


def _recorded(plan: Plan) -> dict[str, Any]:
    """Write the record and the page of a sweep."""
    from optuna.trial import TrialState

    from counterpoint.report.swept import write_sweep_page

    study = _opened(plan)
    done = study.get_trials(states=(TrialState.COMPLETE,))
    if not done:
        errors = [str(t.user_attrs["error"]) for t in study.trials if "error" in t.user_attrs]
        raise CounterpointError("no trial was completed" + (f": {errors[-1]}" if errors else ""))
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "settings": {one.name: one.shown(trial.params[one.name]) for one in plan.over if one.name in trial.params},
            "valid": trial.value,
            "reported": {str(step): value for step, value in trial.intermediate_values.items()},
            "seconds": trial.duration.total_seconds() if trial.duration else None,
        }
        for trial in study.trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    ]
    runs = {str(trial.user_attrs.get("run")): trial for trial in done}
    best = runs[_best(plan, {run: float(trial.value or 0.0) for run, trial in runs.items()})]
    settings = {one.name: one.shown(best.params[one.name]) for one in plan.over}
    record: dict[str, Any] = {
        "slug": plan.slug,
        "title": catalog.get(plan.slug.partition("+")[0]).title,
        "data": plan.data,
        "metric": plan.metric,
        "lower_is_better": plan.lower,
        "over": [asdict(one) for one in plan.over],
        "given": plan.given,
        "seed": plan.seed,
        "sampler": plan.sampler,
        "pruner": plan.pruner,
        "trials": rows,
        "best": {
            "trial": best.number,
            "settings": settings,
            "valid": best.value,
            "test": best.user_attrs.get("test", {}),
            "run": str(plan.out / TRIALS / str(best.user_attrs.get("run"))),
        },
        "importances": _importances(study, len(done)),
        "command": command(plan, settings),
        "versions": versions(),
        "machine": machine(),
    }
    with replacing(plan.out / RECORD) as file:
        file.write((json.dumps(record, indent=2, default=str) + "\n").encode())
    write_sweep_page(plan.out / PAGE, record)
    return record


def _importances(study: optuna.Study, done: int) -> dict[str, float]:
    """Return each setting's share in the variance of the measure (fANOVA); empty for fewer than four trials."""
    optuna = _optuna()
    if done < 4:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            return {k: float(v) for k, v in optuna.importance.get_param_importances(study, evaluator=evaluator).items()}
        except (RuntimeError, ValueError):  # all values are equal
            return {}


def command(plan: Plan, settings: Mapping[str, Any]) -> str:
    """Return the command that trains with the chosen settings."""
    import shlex

    from counterpoint.report.run import options

    chosen = {**plan.given, **settings}
    config = Experiment.resolve(plan.slug, plan.data, overrides=chosen).config
    values = {name: flat(config).get(name, value) for name, value in chosen.items()}
    return " ".join(
        [
            f"counterpoint train {plan.slug} --data {shlex.quote(plan.data)} --seed {plan.seed}",
            *options(values, plan.slug),
        ]
    )
