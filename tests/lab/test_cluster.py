"""Tasks in processes of this machine and on Ray: the same figures, lost workers, and what is refused."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import counterpoint
from counterpoint.errors import CounterpointError
from counterpoint.lab import cluster
from counterpoint.lab.cluster import Cluster, run_tasks
from counterpoint.lab.protocol import of_system
from counterpoint.lab.verify import verify


def square(number: int, folder: str, kill: bool) -> int:
    """Return a square, and leave a file for each call. With `kill`, the first call's process is killed."""
    place = Path(folder)
    calls = len(list(place.glob(f"{number}-*")))
    (place / f"{number}-{calls}").touch()
    if kill and not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    if number < 0:
        raise CounterpointError(f"{number} is negative")
    return number**2


def squares(folder: Path, numbers: list[int], kill: tuple[int, ...] = (), **options: Any) -> dict[str, int]:
    """Run `square` for each number. Return the results by name."""
    found: dict[str, int] = {}
    tasks = ((f"task {number}", (number, str(folder), number in kill)) for number in numbers)
    run_tasks(square, tasks, found.__setitem__, **options)
    return found


def test_one_job_runs_here_and_takes_a_task_when_the_one_before_is_finished(tmp_path: Path) -> None:
    order: list[str] = []

    def tasks() -> Iterator[tuple[str, tuple[Any, ...]]]:
        for number in (1, 2):
            order.append(f"take {number}")
            yield str(number), (number, str(tmp_path), False)

    run_tasks(square, tasks(), lambda name, result: order.append(f"finish {name} {result}"))
    assert order == ["take 1", "finish 1 1", "take 2", "finish 2 4"]


@pytest.mark.slow
def test_a_task_whose_process_is_killed_runs_again_in_another_one(tmp_path: Path) -> None:
    assert squares(tmp_path, [1, 2, 3, 4], kill=(2,), jobs=2) == {f"task {n}": n * n for n in (1, 2, 3, 4)}
    assert (tmp_path / "2-1").exists()


def test_errors_and_settings_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CounterpointError, match="-1 is negative"):
        squares(tmp_path, [-1, 2], jobs=2)
    with pytest.raises(CounterpointError, match="--jobs must be at least 1"):
        squares(tmp_path, [1], jobs=0)
    with pytest.raises(CounterpointError, match="CPUs above 0"):
        Cluster(cpus=0)
    with pytest.raises(
        CounterpointError, match=r"has no folder .*gone; runs, data and results must be on a file system"
    ):
        cluster.there(square, (1, str(tmp_path), False), str(tmp_path / "gone"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CounterpointError, match=r"--on ray needs Ray: pip install 'counterpoint\[cluster\]'"):
        squares(tmp_path, [1], cluster=Cluster())


# ------------------------------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a cluster of two workers, which the tests below share."""
    pytest.importorskip("ray", reason="needs the extra [cluster]")
    with pytest.MonkeyPatch.context() as patch:
        # Workers import this module and the package. Other folders of tests may hide modules of Ray.
        places = Path(__file__).parent, Path(counterpoint.__file__).parents[1]
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))
        with cluster._connected(Cluster("local"), 2) as ray:
            yield ray


def test_an_address_without_a_cluster_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra [cluster]")
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        with pytest.raises(
            CounterpointError, match=rf"no Ray cluster answers at {address} .*start one with ray start --head"
        ):
            squares(tmp_path, [1], cluster=Cluster(address))


def test_a_cluster_that_refuses_for_lack_of_its_token_is_told_apart() -> None:
    said = RuntimeError("Failed to connect to GCS. Last connection error: ... AuthenticationError: RPC error")
    refused = ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6379")
    assert not cluster._wants_token(refused)
    refused.__cause__ = said
    assert cluster._wants_token(refused)


@pytest.mark.slow
def test_ray_runs_a_lost_task_again_and_raises_errors_as_they_are(ray: Any, tmp_path: Path) -> None:
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    on: dict[str, Any] = {"jobs": None, "cluster": Cluster()}
    assert squares(tmp_path, [1, 2, 3, 4], kill=(2,), **on) == {f"task {n}": n * n for n in (1, 2, 3, 4)}
    assert (tmp_path / "2-1").exists()
    with pytest.raises(CounterpointError, match="-1 is negative"):
        squares(tmp_path, [-1], **on)
    with pytest.raises(CounterpointError, match="no machine of the cluster has the 1 CPUs and 1 GPUs of a task"):
        squares(tmp_path, [1], jobs=1, cluster=Cluster(gpus=1))


@pytest.mark.slow
def test_comparisons_sweeps_and_embeddings_on_ray_are_those_of_this_machine(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from counterpoint import search, tuning
    from counterpoint.lab import compare

    places = (("local", None, 1), ("ray", Cluster(), 2))
    given = {"epochs": 1, "batch_size": 64, "encoder": "conv-s"}
    records = [
        compare.compare(
            ["simclr", "dcl"],
            "digits?train=128&held_out=0.05&valid=0.05",
            seeds=1,
            jobs=jobs,
            out=tmp_path / name,
            overrides=given,
            cluster=where,
        )
        for name, where, jobs in places
    ]
    figures = [
        {key: {seed: {name: value for name, value in run.items() if name != "seconds"} for seed, run in runs.items()}
         for key, runs in record["results"].items()}
        for record in records
    ]  # fmt: skip
    assert figures[0] == figures[1]
    pytest.importorskip("optuna", reason="needs the extra [sweep]")
    data = "digits?train=128&held_out=0.05&valid=0.05"
    over, settings = ["lr=1e-3..1:log"], {"epochs": 2, "encoder": "conv-s", "evaluate_every": 1, "batch_size": 64}
    swept = [
        tuning.sweep("simclr", data, over, trials=2, given=settings, sampler="random", pruner="none", jobs=jobs,
                     keep=True, out=tmp_path / f"sweep-{name}", cluster=where)
        for name, where, jobs in places
    ]  # fmt: skip
    for one, other in zip(swept[0]["trials"], swept[1]["trials"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    runs = [tmp_path / f"sweep-{name}" / "trials" / "0000" for name in ("local", "ray")]
    assert (runs[0] / "metrics.csv").read_text() == (runs[1] / "metrics.csv").read_text()
    search.embed(runs[0], tmp_path / "one.parquet")
    search.embed(runs[0], tmp_path / "shards", shard_rows=100, jobs=None, cluster=Cluster())
    one, shards = search.read_embeddings(tmp_path / "one.parquet"), search.read_embeddings(tmp_path / "shards")
    assert len(search.stored.shards_of(tmp_path / "shards")) > 2
    assert one.stamp("image") == shards.stamp("image")


@pytest.mark.slow
def test_a_claim_verified_on_ray_has_the_figures_of_this_machine(ray: Any, tmp_path: Path) -> None:
    part = replace(
        of_system("macil-sd"),
        tuning=None,
        variants={},
        quick={"epochs": 1},
        quick_data_options={"train": 32, "test": 16},
    )
    records = [
        verify("macil-sd", seeds=1, quick=True, jobs=jobs, out=tmp_path / name, protocol=part, cluster=where)
        for name, where, jobs in (("local", None, 1), ("ray", Cluster(), None))
    ]
    assert records[0]["results"].keys() == part.arms.keys()
    assert records[0]["results"] == records[1]["results"]
