"""Batches brought ahead, the time that a device waits for them, and numbers that are read later."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from counterpoint.engine import feed
from counterpoint.engine.feed import Agreement, Feed, Later
from launch import free_port

CPU = torch.device("cpu")


def loader(count: int = 5, pause: float = 0.0) -> Iterator[dict[str, Tensor]]:
    for number in range(count):
        time.sleep(pause)
        yield {"modality": torch.ones(2), "index": torch.full((3,), number)}


@pytest.fixture(params=[0, 2], ids=["read in turn", "read ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(feed.AHEAD, "cpu", request.param)
    return int(request.param)


@pytest.mark.usefixtures("ahead")
def test_batches_come_in_their_order_and_are_counted() -> None:
    given = Feed(CPU)
    for _ in range(2):
        assert [int(batch["index"][0]) for batch in given.batches(loader())] == [0, 1, 2, 3, 4]
    assert (given.totals["steps"], given.totals["items"]) == (10, 30)
    assert given.figures()["items_per_second"] == pytest.approx(30 / given.totals["seconds"])


def test_the_time_spent_waiting_is_that_of_a_slow_loader(ahead: int) -> None:
    given = Feed(CPU)
    for _ in given.batches(loader(pause=0.05)):
        time.sleep(0.1)  # the step: a batch that is read ahead is ready by then
    wait = 0.05 if ahead else 0.25
    assert wait - 0.02 < given.totals["waiting"] < wait + 0.1
    assert given.totals["seconds"] == pytest.approx(0.5 + wait, abs=0.15)


def test_times_are_there_before_the_epoch_ends() -> None:
    """A checkpoint within an epoch keeps them."""
    given = Feed(CPU)
    batches = given.batches(loader())
    next(batches)
    time.sleep(0.05)
    next(batches)
    assert given.totals["steps"] == 2
    assert given.totals["seconds"] >= 0.05


@pytest.mark.usefixtures("ahead")
def test_an_error_of_the_loader_arrives_at_the_step_that_would_take_the_batch() -> None:
    def broken() -> Iterator[dict[str, Tensor]]:
        yield from loader(2)
        raise OSError("the disk is gone")

    batches = Feed(CPU).batches(broken())
    assert int(next(batches)["index"][0]) == 0
    assert int(next(batches)["index"][0]) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


@pytest.mark.usefixtures("ahead")
def test_no_thread_is_left_where_an_epoch_is_broken_off() -> None:
    batches = Feed(CPU).batches(loader(100))
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.usefixtures("ahead")
def test_a_loader_sees_the_contexts_of_its_fit() -> None:
    context: ContextVar[str] = ContextVar("context", default="none")

    def seen() -> Iterator[Any]:
        yield context.get()

    context.set("the fit's")
    assert list(Feed(CPU).batches(seen())) == ["the fit's"]


class Event:
    """Stands in for an event of a GPU's queue: the time at which the queue, which lags behind, reaches it."""

    queue = 0.0  # seconds of the clock at which the queue is empty

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any) -> None:
        self.at = max(time.perf_counter(), Event.queue)

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


class Stream:
    def synchronize(self) -> None:
        time.sleep(max(0.0, Event.queue - time.perf_counter()))


@pytest.mark.parametrize(("pause", "step", "waiting"), [(0.0, 0.05, 0.0), (0.03, 0.05, 0.0), (0.08, 0.05, 0.03)])
def test_a_gpu_waits_only_where_its_queue_is_empty(
    pause: float, step: float, waiting: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 50 ms goes into the queue at once. A loader of 30 ms is not waited for."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(feed, "moved", lambda batch, device: batch)
    monkeypatch.setitem(feed.AHEAD, "cuda", 0)
    Event.queue = 0.0
    given = Feed(torch.device("cuda"))
    for _ in given.batches(loader(6, pause)):
        Event.queue = max(time.perf_counter(), Event.queue) + step
    assert given.totals["waiting"] == pytest.approx(pause + 5 * waiting, abs=0.03)
    assert given.totals["seconds"] == pytest.approx(pause + 6 * step + 5 * waiting, abs=0.06)


def test_a_number_is_read_later() -> None:
    assert Later(torch.tensor(True)).read() == 1
    assert Later(torch.tensor(2.5, requires_grad=True)).read() == 2.5


def test_a_single_process_knows_its_own_answer() -> None:
    alone = Agreement(CPU)
    assert [alone.say(yes) for yes in (False, True, False)] == [False, True, False]


def agree(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    both = Agreement(CPU)
    # The second process says yes at the third step; both know it at the fourth.
    assert [both.say(rank == 1 and step == 2) for step in range(5)] == [False, False, False, True, False]
    both.say(rank == 0)
    both.forget()
    assert both.say(False) is False
    dist.destroy_process_group()


def test_all_processes_learn_of_a_yes_at_the_next_step() -> None:
    mp.start_processes(agree, (free_port(),), nprocs=2, start_method="forkserver")
