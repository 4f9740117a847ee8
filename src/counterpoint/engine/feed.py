"""Keep the device busy: bring batches ahead, measure how long it waits for them, and read its numbers later."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from counterpoint.core.world import processes
from counterpoint.engine.survey import mapped, moved

# Number of batches that a thread has ready, by type of device. A CPU has none: the step needs its cores.
AHEAD = {"cuda": 2}

END = object()  # after a loader's last batch


class Feed:
    """The batches of a fit on their device, and the time that the device waits for them.

    For a GPU a thread reads the next batches into page-locked memory. The processor goes on while they are copied from there. The
    batches and their order are the loader's.

    Args:
        device: The device of the fit.

    Attributes:
        totals: Sums over the fit, by name: `steps`, `items` over all processes, `seconds` of all steps, and `waiting`, the
            seconds of these in which the device had no work because the next batch was not there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.totals = {"steps": 0, "items": 0, "seconds": 0.0, "waiting": 0.0}

    def batches(self, loader: Any) -> Generator[Any]:
        """Yield an epoch's batches, each with its tensors on the device."""
        clock = _DeviceClock(self.device) if self.device.type == "cuda" else _Clock()
        with contextlib.closing(_read(loader, AHEAD.get(self.device.type, 0))) as source:
            clock.rest()
            try:
                for batch in source:
                    self._count(clock.work(), batch)
                    yield moved(batch, self.device)
                    clock.rest()
            finally:
                self._count(clock.end())

    def _count(self, times: tuple[float, float], batch: Any = None) -> None:
        seconds, waiting = times
        self.totals["seconds"] += seconds
        self.totals["waiting"] += waiting
        if batch is not None:
            self.totals["steps"] += 1
            self.totals["items"] += _items(batch) * processes()[1]

    def figures(self) -> dict[str, float]:
        """Return the totals, the items a second, and the share of the time that was spent waiting; {} before the first step."""
        if not self.totals["steps"]:
            return {}
        seconds = max(self.totals["seconds"], 1e-9)
        return {
            **self.totals,
            "items_per_second": self.totals["items"] / seconds,
            "waiting_share": self.totals["waiting"] / seconds,
        }


def _read(loader: Any, ahead: int) -> Generator[Any]:
    """Yield the loader's batches. Where `ahead` is not 0, a thread has the next so many of them in page-locked memory."""
    if not ahead:
        yield from loader
        return
    context = contextvars.copy_context()  # a loss's processes, for instance, are known by thread
    iterator = iter(loader)

    def following() -> Any:
        batch = next(iterator, END)
        return batch if batch is END else mapped(batch, _pinned)

    with ThreadPoolExecutor(1, "batches") as thread:
        coming = deque(thread.submit(context.run, following) for _ in range(ahead))
        while (batch := coming.popleft().result()) is not END:
            coming.append(thread.submit(context.run, following))
            yield batch


def _pinned(x: Tensor) -> Tensor:
    """Return a tensor of the CPU in page-locked memory, where there is a GPU that copies from it."""
    plain = x.layout == torch.strided and x.device.type == "cpu"
    return x.pin_memory() if plain and torch.cuda.is_available() else x


def _items(batch: Any) -> int:
    """Return the number of items in a batch: the length of its first list of numbers."""
    parts = [batch.get("index"), *batch.values()] if isinstance(batch, Mapping) else [batch]
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), 0)


class _Clock:
    """Measures the time from `rest`, when a CPU has no more work, to `work`, when it gets some."""

    def __init__(self) -> None:
        self.begun = self.rested = time.perf_counter()

    def rest(self) -> None:
        self.rested = time.perf_counter()

    def work(self) -> tuple[float, float]:
        """Return the seconds since the last call, and how many of them were waiting."""
        now = time.perf_counter()
        begun, self.begun = self.begun, now
        return now - begun, now - self.rested

    def end(self) -> tuple[float, float]:
        """Return the same where no more work comes: the wait for the end of the loader does not count."""
        return time.perf_counter() - self.begun, 0.0


class _DeviceClock(_Clock):
    """The same of a GPU. It still works when the processor has given it all, so events in its queue note the times."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.stream = torch.cuda.current_stream(device)
        self.pair: tuple[Any, Any] | None = None
        self.mark = self._event()

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def rest(self) -> None:
        self.mark = self._event()

    def work(self) -> tuple[float, float]:
        waited = self._waited()
        self.pair = self.mark, self._event()
        return super().work()[0], waited

    def _waited(self) -> float:
        """Return the seconds between the events of the step before, which the GPU has passed."""
        if not self.pair:
            return 0.0
        rested, worked = self.pair
        self.pair = None
        worked.synchronize()
        return float(rested.elapsed_time(worked)) / 1000

    def end(self) -> tuple[float, float]:
        waited = self._waited()
        self.stream.synchronize()  # the last step belongs to the time that is measured
        return super().end()[0], waited


class Later:
    """A number of the device, on its way to the processor. `read` does not wait for work that was queued after it.

    Args:
        value: A tensor with one number.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()
        self.event: Any = None
        if value.is_cuda:
            self.value = self.value.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """Wait for the number, and return it."""
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


class Agreement:
    """Ask all processes at each step, and learn one step later whether one of them has said yes.

    So no process waits for the step that is on its way. A single process learns it at once.

    Args:
        device: The device of the fit.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.asked: Later | None = None

    def say(self, yes: bool) -> bool:
        """Say yes or no, and return whether some process said yes at the step before. All processes must call it."""
        if processes()[1] == 1:
            return yes
        before = self.asked is not None and bool(self.asked.read())
        answer = torch.full((), int(yes), device=self.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        self.asked = Later(answer)
        return before

    def forget(self) -> None:
        """Drop the last question, because what was agreed on is done; all processes must do so."""
        self.asked = None
