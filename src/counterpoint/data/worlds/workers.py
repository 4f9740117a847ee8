"""Render many scenes at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from counterpoint.waiting import patient_track

T = TypeVar("T")


def in_processes(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], title: str) -> list[T]:
    """Call a function for each job, in several processes for more than 40 jobs; return the results in the jobs' order.

    Args:
        function: a function at the top level of a module, so that other processes can import it.
        jobs: the arguments of each call.
        title: text before the progress bar.
    """
    from joblib import Parallel, delayed

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Starting workers takes longer than rendering a few scenes.
    parallel = Parallel(n_jobs=min(workers, 8) if len(jobs) > 40 else 1, return_as="generator", batch_size=4)
    made = parallel(delayed(function)(*job) for job in jobs)
    return list(patient_track(made, title, len(jobs)))
