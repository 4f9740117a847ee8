"""Render many scenes at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def in_processes(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], title: str) -> list[T]:
    """Call a function for each job, in several processes for more than 40 jobs; return the results in the jobs' order.

    Args:
        function: a function at the top level of a module, so that other processes can import it.
        jobs: the arguments of each call.
        title: text before the progress bar. Where standard error is no terminal, a line with the number of jobs is written.
    """
    from joblib import Parallel, delayed
    from rich.console import Console
    from rich.progress import track

    console, quiet = Console(stderr=True), os.environ.get("RANK", "0") != "0"
    if len(jobs) > 40 and not console.is_terminal and not quiet:
        console.print(f"{title}: {len(jobs):,} of them, which may take minutes; the cache keeps them", soft_wrap=True)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Starting workers takes longer than rendering a few scenes.
    parallel = Parallel(n_jobs=min(workers, 8) if len(jobs) > 40 else 1, return_as="generator", batch_size=4)
    made = parallel(delayed(function)(*job) for job in jobs)
    return list(
        track(made, title, len(jobs), console=console, transient=True, disable=quiet or not console.is_terminal)
    )
