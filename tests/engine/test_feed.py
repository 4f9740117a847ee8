"""Batches brought ahead, the time that a device waits for them, and numbers that are read later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from counterpoint.core.world import leave
from counterpoint.engine import feed
from counterpoint.engine.feed import Agreement, Feed, Later
from launch import free_port

CPU = torch.device("cpu")


class Now:
    """A clock that stands still until somebody lets time pass."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds

    def until(self, then: float) -> None:
        self.seconds = max(self.seconds, then)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    clock = Now()
    monkeypatch.setattr(feed, "time", clock)
    return clock


def loader(count: int = 5, now: Now | None = None, pause: float = 0.0) -> Iterator[dict[str, Tensor]]:
    for number in range(count):
        if now:
            now.seconds += pause
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


def test_the_time_spent_waiting_is_that_of_the_loader(now: Now) -> None:
    given = Feed(CPU)
    for _ in given.batches(loader(5, now, pause=0.05)):
        now.seconds += 0.1  # the step
    assert given.totals["waiting"] == pytest.approx(0.25)
    assert given.totals["seconds"] == pytest.approx(0.75)
    assert given.figures()["waiting_share"] == pytest.approx(1 / 3)


def test_a_step_has_the_next_batches_read_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(feed.AHEAD, "cpu", 2)
    read = [threading.Event() for _ in range(5)]

    def watched() -> Iterator[dict[str, Tensor]]:
        for event, batch in zip(read, loader(), strict=True):
            event.set()
            yield batch

    for number, _ in enumerate(Feed(CPU).batches(watched())):
        assert all(event.wait(20) for event in read[: number + 3])
        assert not any(event.is_set() for event in read[number + 3 :])


def test_times_are_there_before_the_epoch_ends(now: Now) -> None:
    """A checkpoint within an epoch keeps them."""
    given = Feed(CPU)
    batches = given.batches(loader())
    next(batches)
    now.seconds += 0.05
    next(batches)
    assert given.totals["steps"] == 2
    assert given.totals["seconds"] == pytest.approx(0.05)


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


class Queue:
    """Stands in for a GPU: the time at which its queue is empty."""

    def __init__(self, now: Now) -> None:
        self.now, self.empty = now, 0.0

    def add(self, seconds: float) -> None:
        self.empty = max(self.now.seconds, self.empty) + seconds

    def synchronize(self) -> None:
        self.now.until(self.empty)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    """Stands in for an event of a GPU's queue, with the time at which the queue passes it."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.at = queue, 0.0

    def record(self, stream: Any) -> None:
        self.at = max(self.queue.now.seconds, self.queue.empty)

    def synchronize(self) -> None:
        self.queue.now.until(self.at)

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


@pytest.mark.parametrize(("pause", "waiting"), [(0.0, 0.0), (0.03, 0.0), (0.08, 0.03)])
def test_a_gpu_waits_only_where_its_queue_is_empty(
    pause: float, waiting: float, now: Now, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 50 ms goes into the queue at once. A loader of 30 ms is not waited for."""
    queue = Queue(now)
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queue)
    monkeypatch.setattr(feed, "moved", lambda batch, device: batch)
    monkeypatch.setitem(feed.AHEAD, "cuda", 0)
    given = Feed(torch.device("cuda"))
    for _ in given.batches(loader(6, now, pause)):
        queue.add(0.05)
    assert given.totals["waiting"] == pytest.approx(pause + 5 * waiting)
    assert given.totals["seconds"] == pytest.approx(pause + 6 * 0.05 + 5 * waiting)


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
    leave()


def test_all_processes_learn_of_a_yes_at_the_next_step() -> None:
    mp.start_processes(agree, (free_port(),), nprocs=2, start_method="forkserver")
