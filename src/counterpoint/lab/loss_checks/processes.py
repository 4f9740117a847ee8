"""Check a loss over several processes against the same loss over the whole batch in one.

The processes are real ones. They talk over loopback with gloo, as a job of DistributedDataParallel on CPUs does. A process
that raises, ends or waits for ever is a result, too: `Crew` ends the others and starts new ones for the next question.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # its functions keep the process group that exists when it is imported as their default
from torch import Tensor

from counterpoint.core.world import leave
from counterpoint.lab.loss_checks.given import Given, Outcome
from counterpoint.lab.loss_checks.inputs import Item, distance, joined, share
from counterpoint.lab.loss_checks.report import ERROR, FAILS, HOLDS, Check, Verdict
from counterpoint.lab.loss_checks.single import SMALLEST, TOLERANCES, Subject, said

START_SECONDS = 300.0  # for a process to import torch and the loss
ANSWER_SECONDS = 30.0  # for a collective; one that takes longer waits for a process that never calls it
GRACE_SECONDS = 3.0  # for the other processes after one has failed


class Failed(Exception):
    """A process raised an exception, ended or gave no answer. The message names the process and the cause."""


@dataclass(frozen=True)
class Question:
    """The loss and the batch of one comparison, as sent to every process."""

    given: Given
    items: Sequence[Item]
    batch: Sequence[Tensor]
    counts: Sequence[int]
    """Items of each process."""
    dtype: torch.dtype
    store: str
    """Path of the file by which the processes find each other."""


def _serve(rank: int, pipe: Connection, errors: str) -> None:
    """Answer questions until the pipe closes. Messages of libraries in C++ go to the file `errors`."""
    out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides at Ctrl-C
    torch.set_num_threads(1)
    pipe.send("started")
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        try:
            question.given.found()
            pipe.send("ready")
            answer: Any = _answer(rank, question)
        except Exception as error:  # a loss may raise any exception; it is the answer
            answer = said(error)
        pipe.send(answer)
        # A process that leaves early would close connections that others still wait for.
        try:
            pipe.recv()
        except EOFError:
            return
        leave()


def _answer(rank: int, question: Question) -> Outcome:
    """Join the processes of a question and evaluate the loss on this process's part of the batch."""
    world = len(question.counts)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{question.store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=ANSWER_SECONDS),
    )
    own = share(question.items, question.batch, question.counts, rank)
    return question.given.evaluate(question.items, own, question.dtype, rank=rank, world=world)


class Crew:
    """Processes that answer questions about losses; a context manager, which ends them.

    They start with the first question and serve many, because to import torch takes seconds. Where the system has fork, they
    are copies of one process that has imported torch. So new ones start fast, too.

    Args:
        size: Largest number of processes of a question, at least 2.
        preload: Names of modules that this one process imports, too.
    """

    def __init__(self, size: int = 3, preload: Sequence[str] = ()) -> None:
        self.size = size
        self._preload = [__name__, *preload]
        self._members: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="counterpoint-check-loss-")
        self._asked = 0

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._folder.cleanup()

    def ask(
        self, given: Given, items: Sequence[Item], batch: Sequence[Tensor], counts: Sequence[int], dtype: torch.dtype
    ) -> list[Outcome]:
        """Evaluate a loss in `len(counts)` processes, each on its part of a batch, and return the outcomes by rank.

        Raises Failed where a process raises, ends, or gives no answer within 30 seconds.
        """
        if not self._members:
            self._start()
        self._asked += 1
        members = self._members[: len(counts)]
        store = str(Path(self._folder.name) / f"store-{self._asked}")
        for _, pipe in members:
            pipe.send(Question(given, items, batch, counts, dtype, store))
        self._collect(members, START_SECONDS, only="ready")
        answers = self._collect(members, ANSWER_SECONDS + GRACE_SECONDS)
        for _, pipe in members:
            pipe.send("leave")
        return [answers[rank] for rank in range(len(counts))]

    def _start(self) -> None:
        fork = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
        if fork:
            context.set_forkserver_preload(self._preload)  # without effect where such a process runs already
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self._errors(rank)), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        try:
            self._collect(self._members, START_SECONDS, only="started")
        except Failed as error:
            words = (
                f"the processes did not start ({error}); a script calls check_loss below `if __name__ == '__main__':`"
            )
            raise Failed(words) from error

    def _errors(self, rank: int) -> str:
        return str(Path(self._folder.name) / f"errors-{rank}")

    def _collect(
        self, members: Sequence[tuple[multiprocessing.process.BaseProcess, Connection]], seconds: float, only: str = ""
    ) -> dict[int, Any]:
        """Receive one message of each process: the word `only`, or an outcome. Raise Failed for any other end."""
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(members)}
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + seconds
        while len(answers) + len(failures) < len(members):
            open_pipes = [pipe for pipe, rank in ranks.items() if rank not in answers and rank not in failures]
            ready = wait(open_pipes, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = ranks[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionError):
                    failures[rank] = self._ending(rank)
                else:
                    if message == only or (not only and isinstance(message, Outcome)):
                        answers[rank] = message
                    else:
                        failures[rank] = str(message)
                if rank in failures:
                    end = min(end, time.monotonic() + GRACE_SECONDS)
        if len(answers) < len(members):
            self._end()
            raise Failed(
                _first_cause(failures) or f"no answer within {seconds:.0f} s: the processes wait for each other"
            )
        return answers

    def _ending(self, rank: int) -> str:
        """Describe the end of a process by its signal and the last message on its standard error."""
        process = self._members[rank][0]
        process.join(GRACE_SECONDS)
        code = process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        text = Path(self._errors(rank)).read_text(errors="replace") if Path(self._errors(rank)).is_file() else ""
        told = [line.partition("what():")[2] for line in text.splitlines() if "what():" in line]
        why = re.sub(r"^\s*\[enforce fail at [^\]]*\]\s*", "", told[-1])[:200] if told else ""
        return f"ended by {how}{': ' if why else ''}{why}"

    def _end(self) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.kill()
        for process, _ in self._members:
            process.join()
        self._members = []


def _first_cause(failures: dict[int, str]) -> str | None:
    """Choose the failure that explains the others: a lost connection is the effect of another process's end."""
    if not failures:
        return None
    rank = min(failures, key=lambda rank: ("onnection" in failures[rank], rank))
    return f"process {rank}: {failures[rank]}"


# --- W processes against one ------------------------------------------------------------------------------------------


def counts_of(world: int, size: int, *, uneven: bool) -> list[int]:
    """Return the items of each process: `size` each, in an uneven batch about half as many in the last process."""
    return [size] * (world - 1) + [max(1, size // 2 - 1) if uneven else size]


VALUE_MEANING = "The loss that is shown or used to choose a checkpoint changes with the number of processes."
GRADIENT_MEANING = (
    "DistributedDataParallel averages gradients over processes; training with more processes follows another gradient."
)


def check(subject: Subject, crew: Crew, world: int, *, uneven: bool) -> list[Check]:
    """Compare `world` processes with one, in the loss and in its gradients.

    Args:
        subject: The loss and its inputs.
        crew: The processes.
        world: Number of processes, at least 2.
        uneven: The last process has fewer items.
    """
    kind = f"{world} processes{', uneven' if uneven else ''}"
    counts = counts_of(world, subject.size, uneven=uneven)
    batch = subject.batch(sum(counts))
    dtype = subject.reference
    try:
        whole = subject.evaluate(batch, dtype)
        alone = [subject.evaluate(share(subject.items, batch, counts, rank), dtype) for rank in range(world)]
        found = crew.ask(subject.given, subject.items, batch, counts, dtype)
    except Exception as error:  # a loss may raise any exception; it is the result of the check
        words = str(error) if isinstance(error, Failed) else said(error)
        return [
            Check(f"{kind}: {part}", ERROR, None, words, meaning)
            for part, meaning in (("value", VALUE_MEANING), ("gradient", GRADIENT_MEANING))
        ]
    tolerance = TOLERANCES[dtype]
    value = value_of(found, whole, alone, counts, tolerance)
    gradient = gradient_of(subject.items, found, whole, alone, counts, tolerance)
    return [
        Check(f"{kind}: value", value.verdict, value.error, value.found, VALUE_MEANING, value.convention),
        Check(
            f"{kind}: gradient", gradient.verdict, gradient.error, gradient.found, GRADIENT_MEANING, gradient.convention
        ),
    ]


@dataclass(frozen=True)
class Compared:
    """A comparison of several processes with one."""

    verdict: Verdict
    error: float
    found: str
    convention: str


OWN = "own batch"
OWN_FOUND = "each process computes the loss of its own batch alone"


def value_of(
    found: Sequence[Outcome], whole: Outcome, alone: Sequence[Outcome], counts: Sequence[int], tolerance: float
) -> Compared:
    """Name the convention that the values of several processes follow.

    - "whole batch": each process returns the loss of the whole batch;
    - "mean": the mean over the processes is the loss of the whole batch;
    - "weighted mean": their mean weighted by items is;
    - "sum": their sum is;
    - "W times": each returns the loss of the whole batch, times the number of processes;
    - "own batch": each returns the loss of its own batch, as one process would;
    - "neither".
    """
    values = torch.stack([outcome.value for outcome in found]).double()
    one = whole.value.double()
    floor = SMALLEST * float(one.abs())
    world = len(found)

    def same(ours: Tensor, theirs: Tensor) -> bool:
        return distance(ours, theirs, floor) <= tolerance

    error = distance(values.mean(), one, floor)
    own = torch.stack([outcome.value for outcome in alone]).double()
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    if all(same(value, one) for value in values):
        return Compared(HOLDS, error, "each process returns the loss of the whole batch", "whole batch")
    if same(values.mean(), one):
        return Compared(HOLDS, error, "the mean over the processes is the loss of the whole batch", "mean")
    if same(values, own):
        return Compared(FAILS, error, OWN_FOUND, OWN)
    if all(same(value, one * world) for value in values):
        return Compared(FAILS, error, f"each process returns {world} times the loss of the whole batch", "W times")
    if same(values.sum(), one):
        return Compared(FAILS, error, "the sum over the processes is the loss of the whole batch", "sum")
    if same((values * shares).sum(), one):
        words = "the mean over the processes, weighted by their items, is the loss of the whole batch"
        return Compared(FAILS, error, words, "weighted mean")
    return Compared(FAILS, error, "neither mean nor sum over the processes is the loss of the whole batch", "neither")


def gradient_of(
    items: Sequence[Item],
    found: Sequence[Outcome],
    whole: Outcome,
    alone: Sequence[Outcome],
    counts: Sequence[int],
    tolerance: float,
) -> Compared:
    """Name the convention that the gradients of several processes follow.

    A process's gradient of its own rows reaches the weights through its own network. DistributedDataParallel takes the mean
    over processes. Each process's gradient of its rows must therefore be W times its part of one process's gradient
    ("mean"). Where it is the part itself ("sum"), the mean is W times too small.
    """
    world = len(found)
    pairs: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # name: (sum over processes, one process, sum of each alone)
    for number, (item, one) in enumerate(zip(items, whole.rows, strict=True)):
        if one is not None:
            ours, own = (joined(item, [_part(o, number) for o in outcomes], counts) for outcomes in (found, alone))
            pairs[f"input {number + 1}"] = (ours, one, own)
    for name, one in whole.learnt.items():
        ours, own = (torch.stack([o.learnt[name] for o in outcomes]).sum(0) for outcomes in (found, alone))
        pairs[name] = (ours, one, own)
    floors = {name: SMALLEST * float(one.norm()) for name, (_, one, _) in pairs.items()}
    errors = {name: distance(ours / world, one, floors[name]) for name, (ours, one, _) in pairs.items()}
    error = max(errors.values())
    if error <= tolerance:
        return Compared(HOLDS, error, "the mean over the processes is the gradient of one process", "mean")
    if all(distance(ours, own, floors[name]) <= tolerance for name, (ours, _, own) in pairs.items()):
        return Compared(FAILS, error, OWN_FOUND, OWN)
    said_of = {name: _convention(*pairs[name][:2], floors[name], world, tolerance) for name in pairs}
    names = set(said_of.values())
    if names == {"sum"}:
        words = f"the sum over the processes is the gradient of one process: the mean is {world} times too small"
        return Compared(FAILS, error, words, "sum")
    by_words: dict[str, list[str]] = {}
    for name, convention in said_of.items():
        by_words.setdefault(_words(*pairs[name][:2], convention, world), []).append(name)
    words = "; ".join(f"{', '.join(of)}: {words}" for words, of in by_words.items())
    return Compared(
        FAILS, error, words, "neither" if names == {"neither"} else "mixed" if len(names) > 1 else names.pop()
    )


def _part(outcome: Outcome, number: int) -> Tensor:
    gradient = outcome.rows[number]
    assert gradient is not None
    return gradient


def _convention(ours: Tensor, one: Tensor, floor: float, world: int, tolerance: float) -> str:
    """Name the convention of one tensor's gradient: mean, sum, the sum times a factor, or neither."""
    if distance(ours / world, one, floor) <= tolerance:
        return "mean"
    if distance(ours, one, floor) <= tolerance:
        return "sum"
    factor = _factor(ours, one, world)
    if factor and math.isfinite(factor) and distance(ours / world, one * factor, floor) <= tolerance:
        return "scaled"
    return "neither"


def _factor(ours: Tensor, one: Tensor, world: int) -> float:
    """Return the factor of one process's gradient that is nearest to the mean over processes."""
    square = float((one * one).sum())
    return float((ours / world * one).sum()) / square if square else 0.0


def _words(ours: Tensor, one: Tensor, convention: str, world: int) -> str:
    if convention == "mean":
        return "the mean is right"
    if convention == "sum":
        return f"the mean is {world} times too small"
    factor = _factor(ours, one, world)
    if convention == "scaled":
        return f"the mean is {factor:.3g} times the gradient of one process"
    rest = distance(ours / world, one * factor, 0.0) * abs(factor)
    return (
        f"the mean is {factor:.2f} times the gradient of one process and a part of size {rest:.2f} in another direction"
    )
