"""Run tasks in this process, in processes of this machine, or on the machines of a Ray cluster.

A task is a function at the top of a module, with arguments that pickle. Its result depends on nothing else: neither on the place
where it runs, nor on other tasks. So a task whose process or machine is lost runs again, up to `RETRIES` times, and gives the
same result. An error of the task itself is raised at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from counterpoint.errors import CounterpointError

RETRIES = 3  # further tries of a task whose process is lost
ANSWER = 20.0  # seconds within which a cluster's address must answer
STORE = 128 * 2**20  # bytes of shared memory of a cluster that is started here; results are small

Task = tuple[str, tuple[Any, ...]]  # name and arguments
Finish = Callable[[str, Any], None]


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each task reserves on it.

    Args:
        address: "local" is a new cluster on this machine, which ends with the tasks. "auto" is the one that $RAY_ADDRESS names,
            or that runs on this machine. Others are addresses as Ray takes them, such as ray://head:10001.
        cpus: CPUs for a task, above 0. A fraction is possible.
        gpus: GPUs for a task, at least 0. A fraction is possible.
    """

    address: str = "local"
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not self.cpus > 0 or not self.gpus >= 0:
            raise CounterpointError(
                f"a task needs CPUs above 0 and GPUs of at least 0, got {self.cpus} and {self.gpus}"
            )


def run_tasks(
    function: Callable[..., Any],
    tasks: Iterable[Task],
    finish: Finish,
    *,
    jobs: int | None = 1,
    cluster: Cluster | None = None,
) -> None:
    """Call `function(*arguments)` for each task, and `finish(name, result)` in the order in which results come.

    Args:
        function: A function at the top of a module that other processes can import.
        tasks: Names and arguments. A task is taken when there is room for it, so it may depend on results before.
        finish: Called in this process.
        jobs: Number of tasks at a time, at least 1. None: as many as the cluster has room for, on this machine one for each core.
        cluster: Where to run. Default: here. With one job, that is this process.

    Raises what a task raises. Raises CounterpointError for a task that is lost again and again, and without Ray or its cluster.
    """
    if jobs is not None and jobs < 1:
        raise CounterpointError("--jobs must be at least 1")
    if cluster is not None:
        _on_ray(function, iter(tasks), finish, jobs, cluster)
    elif jobs == 1:
        for name, arguments in tasks:
            finish(name, function(*arguments))
    else:
        _in_processes(function, iter(tasks), finish, jobs or os.cpu_count() or 1)


def _in_processes(function: Callable[..., Any], tasks: Iterator[Task], finish: Finish, jobs: int) -> None:
    """Run tasks in processes of this machine. A process that ends takes its pool with it, so the pool is made again."""
    again: list[Task] = []
    tries: Counter[str] = Counter()
    running: dict[Future[Any], Task] = {}

    def pool_of() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))

    pool = pool_of()
    try:
        while True:
            while len(running) < jobs and (task := again.pop() if again else next(tasks, None)) is not None:
                try:
                    running[pool.submit(function, *task[1])] = task
                except BrokenProcessPool:
                    again.append(task)
                    break
            if not running and not again:
                break
            lost = []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, arguments = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    lost.append((name, arguments))
                else:
                    finish(name, result)
            if lost or (again and not running):
                lost += running.values()
                running.clear()
                tries.update(name for name, _ in lost)
                for name, count in tries.items():
                    if count > RETRIES:
                        raise _lost(name, "its process ended")
                again += reversed(lost)
                pool.shutdown(wait=False, cancel_futures=True)
                pool = pool_of()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _lost(name: str, how: str) -> CounterpointError:
    return CounterpointError(
        f"{name}: {how} {RETRIES + 1} times, perhaps for lack of memory; the same command continues where it stopped"
    )


# ------------------------------------------------------------------------------------------------------------------- Ray


def _on_ray(
    function: Callable[..., Any], tasks: Iterator[Task], finish: Finish, jobs: int | None, cluster: Cluster
) -> None:
    """Run tasks on a Ray cluster. Ray itself runs a task again whose worker is lost."""
    with _connected(cluster, jobs) as ray:
        places = _room(ray, cluster)
        room = jobs or places
        remote = ray.remote(there).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=RETRIES)
        running: dict[Any, str] = {}
        try:
            while True:
                while len(running) < room and (task := next(tasks, None)) is not None:
                    running[remote.remote(function, task[1], str(Path.cwd()))] = task[0]
                if not running:
                    break
                for done in ray.wait(list(running), num_returns=1)[0]:
                    name = running.pop(done)
                    try:
                        result = ray.get(done)
                    except ray.exceptions.RayTaskError as error:
                        if isinstance(error.cause, ray.exceptions.RayError):
                            said = str(error.cause).splitlines()[0]
                            raise CounterpointError(
                                f"{name}: a worker cannot read its task ({said}); all machines need the same versions of "
                                "Python, Ray and Counterpoint"
                            ) from error
                        raise error.cause from None
                    except ray.exceptions.RayError as error:
                        raise _lost(name, f"its worker was lost ({type(error).__name__})") from error
                    finish(name, result)
        except BaseException:
            for one in running:
                ray.cancel(one)
            raise


def there(function: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> Any:
    """Call a function on a worker, in the folder of the process that gave the task.

    Raises CounterpointError where the worker's machine lacks this folder.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise CounterpointError(
            f"the machine {os.uname().nodename} has no folder {folder}; runs, data and results must be on a file system "
            "that all machines share"
        ) from error
    return function(*arguments)


def _room(ray: Any, cluster: Cluster) -> int:
    """Return the number of tasks that the cluster's machines hold at a time. CounterpointError where none holds a single one."""
    wanted = {"CPU": cluster.cpus, "GPU": cluster.gpus}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(has.get(name, 0) / count) for name, count in wanted.items() if count) for has in machines)
    if not room:
        raise CounterpointError(
            f"no machine of the cluster has the {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs of a task; lower --cpus-per-task "
            "or --gpus-per-task, or start such a machine first"
        )
    return room


@contextlib.contextmanager
def _connected(cluster: Cluster, jobs: int | None) -> Iterator[Any]:
    """Connect to a cluster, or start one on the loopback address of this machine. A connection of the caller stays as it is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use to its makers otherwise
    try:
        import ray
    except ImportError:
        raise CounterpointError("--on ray needs Ray: pip install 'counterpoint[cluster]'") from None
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    passed = {name: value for name, value in os.environ.items() if name.startswith("COUNTERPOINT_")}
    try:
        if cluster.address != "local":
            try:
                _need_answer(cluster.address)
                ray.init(cluster.address, runtime_env={"env_vars": passed}, **options)
            except (OSError, ValueError) as error:
                if _wants_token(error):
                    raise CounterpointError(
                        f"the Ray cluster at {cluster.address} asks for its token; set RAY_AUTH_MODE=token, and give the token of "
                        "the head's ~/.ray/auth_token in RAY_AUTH_TOKEN where this machine has another home"
                    ) from error
                said = str(error).splitlines()[0][:120].partition(". ")[0]
                raise CounterpointError(
                    f"no Ray cluster answers at {cluster.address} ({said}); start one with ray start --head, or leave --address "
                    "out"
                ) from error
        else:
            _start(ray, cluster, jobs or os.cpu_count() or 1, options)
        yield ray
    finally:
        ray.shutdown()


def _wants_token(error: BaseException) -> bool:
    """Return whether a cluster refused a connection for lack of its token."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return any("AuthenticationError" in f"{type(one).__name__}: {one}" for one in causes)


def _need_answer(address: str) -> None:
    """Raise OSError where an address names a host and a port that do not answer. Ray itself would wait for many minutes."""
    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if sign and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()


def _start(ray: Any, cluster: Cluster, places: int, options: Mapping[str, Any]) -> None:
    """Start a cluster with room for so many tasks on the loopback address of this machine, without a dashboard.

    Ray replaces a loopback address by the machine's own, and then anyone in its network can run code here. It leaves the address as
    it is where clusters are switched off, as on Windows and macOS. Hence the switch.
    """
    switch = ray._private.ray_constants
    name, before = switch.ENABLE_RAY_CLUSTERS_ENV_VAR, switch.ENABLE_RAY_CLUSTER
    os.environ[name], switch.ENABLE_RAY_CLUSTER = "0", False  # for the processes that start now, and for this one
    try:
        ray.init(
            "local",
            num_cpus=max(1, round(places * cluster.cpus)),
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=STORE,
            **options,
        )
    finally:
        del os.environ[name]
        switch.ENABLE_RAY_CLUSTER = before
