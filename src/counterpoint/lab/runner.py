"""Run many small experiments in parallel, and keep finished runs under a stamp of their code.

Claims, comparisons and sweeps all run through `run_all`. The stamp of a finished run covers its settings, the libraries'
versions and every source file of the package. A change to any of them therefore invalidates the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import counterpoint
from counterpoint.engine.run import versions
from counterpoint.errors import Interrupted
from counterpoint.experiment import Experiment
from counterpoint.files import check_folder, replacing
from counterpoint.lab.cluster import Cluster, run_tasks
from counterpoint.lab.needed import NeedMetric
from counterpoint.words import counted

PACKAGE = Path(counterpoint.__file__).parent
SECONDS, DATA = "seconds", "data"  # beside the figures of a run: processor time, and a digest of its training data


def figures(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Reduce a run's rows to its figures.

    - `test/NAME` after the last epoch, as NAME;
    - the last `valid/NAME`, as valid_NAME;
    - the last epoch's `train/NAME`, as train_NAME.

    No best epoch is chosen, and no mean over epochs is taken.
    """
    last = rows[-1]
    found: dict[str, float] = {}
    for key, value in last.items():
        part, _, name = key.partition("/")
        if part == "test":
            found[name] = value
        elif part in ("train", "valid"):
            found[f"{part}_{name}"] = value
    return found


@contextlib.contextmanager
def continued(done: Callable[[], str]) -> Iterator[None]:
    """Name, at an interruption, what is done. The message of one of several runs would continue that run alone.

    Args:
        done: Returns what is finished, such as "3 runs".

    Raises Interrupted at Ctrl-C.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(f"stopped after {done()}; the same command or call continues") from error


def run_one(
    slug: str,
    data: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    seed: int,
    recipe: bool,
    metric: str | None = None,
) -> dict[str, Any]:
    """Train one system on one thread and return its figures, its processor time and a digest of its training data.

    Args:
        slug: The system.
        data: The data source.
        options: Keyword arguments of the source.
        settings: Settings that replace the paper's, or the recipe's.
        seed: Seed of initialisation, order of the data and dropout.
        recipe: Start from the system's recipe for this data. False: from the paper's settings.
        metric: End the run after its first measured epoch when it lacks this metric. Default: check none.
    """
    import torch

    torch.set_num_threads(1)  # one thread a run, so that figures do not depend on what else is running
    started = time.process_time()
    rows, digest = _rows(slug, data, dict(options), dict(settings), seed, recipe, metric)
    return {**figures(rows), SECONDS: time.process_time() - started, DATA: digest}


def _rows(
    slug: str,
    data: str,
    options: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
    recipe: bool,
    metric: str | None = None,
) -> tuple[list[dict[str, float]], str | None]:
    """Train, and return the rows of the run and a digest of its data. No other function here calls a system's training."""
    experiment = Experiment.resolve(slug, data, overrides=settings, options=options, recipe=recipe)
    source = experiment.source()
    digest = digest_of(source)  # before training: a split may keep items that it has read
    checks = [NeedMetric(metric)] if metric else []
    return experiment.run(seed, source=source, callbacks=checks), digest


def digest_of(source: Any) -> str | None:
    """Return a digest of a source's training split; None for one that cannot be pickled (such as open files)."""
    import joblib

    try:
        return str(joblib.hash(source.train, coerce_mmap=True))  # a set read from the cache is the set that was built
    except Exception:  # the split may be of any class, and pickling may raise any exception
        return None


def run_all(
    todo: Mapping[str, tuple[Any, ...]],
    run_one: Callable[..., dict[str, Any]],
    *,
    cache: Path,
    stamp: str,
    jobs: int | None,
    title: str,
    console: Console | None = None,
    cluster: Cluster | None = None,
) -> dict[str, dict[str, Any]]:
    """Call `run_one(*arguments)` for every entry of `todo`, in parallel. Return the results by name.

    Args:
        todo: Maps names to arguments. Each name must be a valid file name.
        run_one: A function at the top level of a module, so that other processes can import it.
        cache: Folder of finished runs. Those with the same `stamp` are not run again.
        stamp: Hash of the code and the settings; see `stamp_of`.
        jobs: Number of parallel processes, at least 1; None: see `cluster.run_tasks`.
        title: Title of the progress bar.
        console: Console of the progress bar. Default: standard error.
        cluster: The cluster whose machines run them. Default: this machine alone.

    Raises CounterpointError, before anything runs, where the cache cannot be written. Raises Interrupted after Ctrl-C.
    """
    check_folder(cache)
    done: dict[str, dict[str, Any]] = {}
    for key in todo:
        file = cache / f"{key}.json"
        if file.is_file():
            kept = json.loads(file.read_text())
            if kept["stamp"] == stamp:
                done[key] = kept["metrics"]
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
    with continued(lambda: f"{len(done)} of {counted(len(todo), 'run')}"), progress:
        bar = progress.add_task(title, total=len(todo), completed=len(done))

        def finish(key: str, metrics: dict[str, Any]) -> None:
            done[key] = metrics
            with replacing(cache / f"{key}.json") as file:
                file.write(json.dumps({"stamp": stamp, "metrics": metrics}).encode())
            progress.advance(bar)

        rest = [(key, todo[key]) for key in todo if key not in done]
        here = cluster is None and len(rest) <= 1
        run_tasks(run_one, rest, finish, jobs=1 if here else jobs, cluster=cluster)
    return done


def stamp_of(settings: Any) -> str:
    """Return a short hash of settings, the libraries' versions, and every source file of the package."""
    found = hashlib.sha256(json.dumps([settings, versions()], sort_keys=True).encode())
    found.update(sources().encode())
    return found.hexdigest()[:16]


@cache
def sources(package: Path = PACKAGE) -> str:
    """Return the SHA-256 of the names and contents of all Python files of the package."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


def commit() -> dict[str, Any] | None:
    """Return the commit of the package's git checkout, and whether its tree differs, except in results/. None without git."""
    top = _git("rev-parse", "--show-toplevel")
    ours = _git("ls-files", "--error-unmatch", str(PACKAGE / "__init__.py"))
    if top is None or ours is None:
        return None
    changed = _git("-C", top, "status", "--porcelain", "--", ".", ":(exclude)results")
    return {"id": _git("rev-parse", "HEAD"), "dirty": bool(changed)}


def uncommitted(path: str) -> bool:
    """Return whether a file in the package's checkout differs from the last commit, or is not part of it."""
    return commit() is not None and bool(_git("status", "--porcelain", "--", path))


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=PACKAGE, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def plain(value: Any) -> Any:
    """Return a value with every number that is not finite replaced by None, for JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
