"""Check a loss in one process: precision, hard rows, a batch of one, second derivatives, memory."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.errors import CounterpointError
from counterpoint.lab.loss_checks.given import Given, NoScalar, Outcome, leaves_of
from counterpoint.lab.loss_checks.inputs import HUGE, Change, Item, distance, draw, views
from counterpoint.lab.loss_checks.report import ERROR, FAILS, HOLDS, NOT_APPLICABLE, Check, Verdict

# Largest relative error that holds, by number type.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
SMALLEST = 0.1  # of the ordinary loss or gradient: differences below TOLERANCE times this are rounding
EXPLODED = 1e6  # times the ordinary gradient: one step of this size destroys the weights
STEPS = (4, 12, 20)  # steps of the check of memory after which live tensors are counted

Finding = tuple[Verdict, float | None, str]


@dataclass(frozen=True)
class Subject:
    """A loss and its inputs, for all checks."""

    given: Given
    items: Sequence[Item]
    size: int
    """Items of a process's batch, at least 2."""
    normalize: bool

    def batch(self, count: int, change: Change = "none", seed: int = 0) -> list[Tensor]:
        """Draw a batch of `count` items, with four items of each label."""
        return draw(
            self.items, count, classes=max(1, self.size // 4), normalize=self.normalize, change=change, seed=seed
        )

    def evaluate(self, batch: Sequence[Tensor], dtype: torch.dtype, **options: Any) -> Outcome:
        """Return the loss of a batch and its gradients; see `Given.evaluate`."""
        return self.given.evaluate(self.items, batch, dtype, **options)

    @cached_property
    def ordinary(self) -> Outcome:
        """Loss and gradients of an ordinary batch in float32.

        Raises CounterpointError where the loss cannot be called on such inputs.
        """
        try:
            return self.evaluate(self.batch(self.size), torch.float32)
        except CounterpointError:
            raise
        except NoScalar as error:
            raise CounterpointError(str(error)) from error
        except Exception as error:
            raise CounterpointError(
                f"the loss cannot be called on these inputs ({said(error)}); describe its inputs with --inputs, its settings "
                "with --set"
            ) from error

    @cached_property
    def reference(self) -> torch.dtype:
        """The widest number type that the loss supports: float64, else float32."""
        self.ordinary  # raises where nothing works  # noqa: B018
        try:
            outcome = self.evaluate(self.batch(self.size), torch.float64)
        except Exception:  # a loss may raise any exception for a number type that it does not know
            return torch.float32
        return torch.float64 if outcome.value.dtype == torch.float64 else torch.float32

    def floors(self, scale: float = 1.0) -> dict[str, float]:
        """Return, for the loss and each gradient, the norm below which differences are rounding."""
        return {name: SMALLEST * scale * float(t.double().norm()) for name, t in self.ordinary.tensors().items()}


def said(error: BaseException) -> str:
    """Return the type and the first line of an exception's message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def compared(found: Outcome, expected: Outcome, floors: dict[str, float]) -> tuple[float, str]:
    """Return the largest relative error over the loss and its gradients, and the name of that tensor."""
    ours, theirs = found.tensors(), expected.tensors()
    errors = {name: distance(ours[name], theirs[name], floors.get(name, 0.0)) for name in ours}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def infinite(outcome: Outcome) -> str | None:
    """Describe the first tensor with an entry that is not finite. Return None where all are finite."""
    for name, tensor in outcome.tensors().items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad and tensor.ndim == 0:
            return f"{name} is {float(tensor)}"
        if bad:
            return f"{name} is not finite in {bad} of {tensor.numel()} entries"
    return None


def judged(found: Outcome, expected: Outcome | None, floors: dict[str, float], tolerance: float) -> Finding:
    """Judge an outcome against that in the reference's number type."""
    bad = infinite(found)
    if bad is not None:
        return FAILS, math.inf, bad
    if expected is None:
        return HOLDS, None, ""
    bad = infinite(expected)
    if bad is not None:
        return FAILS, math.inf, f"in {str(expected.value.dtype).removeprefix('torch.')} {bad}"
    error, worst = compared(found, expected, floors)
    if error > tolerance:
        return FAILS, error, f"{worst} differs by more than {tolerance:g}"
    return HOLDS, error, ""


# --- the checks -------------------------------------------------------------------------------------------------------


def precision(subject: Subject, dtype: torch.dtype, *, autocast: bool) -> Finding:
    """Compare the loss in a number type, or under autocast to it, with the reference on the same numbers."""
    batch = subject.batch(subject.size)
    if not autocast:
        batch = [tensor.to(dtype).double() if tensor.is_floating_point() else tensor for tensor in batch]
    if dtype == subject.reference:
        return NOT_APPLICABLE, None, f"the loss does not support a wider type than {str(dtype).removeprefix('torch.')}"
    expected = subject.evaluate(batch, subject.reference)
    if autocast:
        found = subject.evaluate(batch, torch.float32, autocast=dtype)
    else:
        found = subject.evaluate(batch, dtype)
    verdict, error, words = judged(found, expected, subject.floors(), TOLERANCES[dtype])
    if verdict == HOLDS and all(float(gradient.abs().max()) == 0 for gradient in found.rows if gradient is not None):
        return FAILS, 1.0, "no gradient reaches the inputs"
    return verdict, error, words


def hard(subject: Subject, change: Change) -> Finding:
    """Compare the loss of hard rows in float32 with the reference on the same numbers."""
    if subject.normalize and change in ("zero row", "zero rows", "huge"):
        return NOT_APPLICABLE, None, "rows have length 1"
    if change == "equal views" and views(subject.items) < 2:
        return NOT_APPLICABLE, None, "an item has one row"
    batch = [t.float().double() if t.is_floating_point() else t for t in subject.batch(subject.size, change)]
    found = subject.evaluate(batch, torch.float32)
    expected = subject.evaluate(batch, subject.reference) if subject.reference == torch.float64 else None
    scale = 1 / HUGE if change == "huge" else 1.0
    verdict, error, words = judged(found, expected, subject.floors(scale), TOLERANCES[torch.float32])
    if verdict == FAILS or change == "huge":
        return verdict, error, words
    for name, gradient in found.tensors().items():
        growth = float(gradient.double().norm()) / max(subject.floors()[name] / SMALLEST, 1e-300)
        if name != "the loss" and growth > EXPLODED:
            return FAILS, error, f"{name} is {growth:.0e} times as large as for ordinary rows"
    return verdict, error, words


def one(subject: Subject) -> Finding:
    """Evaluate a batch of one item."""
    batch = [t.float().double() if t.is_floating_point() else t for t in subject.batch(1)]
    found = subject.evaluate(batch, torch.float32)
    expected = subject.evaluate(batch, subject.reference) if subject.reference == torch.float64 else None
    return judged(found, expected, subject.floors(), TOLERANCES[torch.float32])


def double_backward(subject: Subject) -> Finding:
    """Compare the second derivative in a random direction with differences of the gradient."""
    dtype, step, tolerance = (
        (torch.float64, 1e-5, 1e-3) if subject.reference == torch.float64 else (torch.float32, 1e-2, 0.1)
    )
    batch = subject.batch(subject.size)
    generator = torch.Generator().manual_seed(2)
    ways = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64) if item.kind == "rows" else None
        for item, t in zip(subject.items, batch, strict=True)
    ]

    made = subject.given.make()
    if isinstance(made, nn.Module):
        made = made.to(dtype)
    leaves = leaves_of(subject.items, batch, dtype)
    rows = [leaf for leaf, way in zip(leaves, ways, strict=True) if way is not None]
    value = subject.given.call(made, subject.items, leaves)
    first = torch.autograd.grad(value, rows, create_graph=True, allow_unused=True)
    along = [
        (g * way.to(dtype)).sum()
        for g, way in zip(first, [way for way in ways if way is not None], strict=True)
        if g is not None and g.requires_grad
    ]
    second: Sequence[Tensor | None] = [None] * len(rows)
    if along:
        second = torch.autograd.grad(torch.stack(along).sum(), rows, allow_unused=True)
    found = torch.cat(
        [(torch.zeros_like(row) if s is None else s.detach()).flatten() for row, s in zip(rows, second, strict=True)]
    )

    def gradient(sign: float) -> Tensor:
        moved = [t if way is None else t + sign * step * way for t, way in zip(batch, ways, strict=True)]
        return torch.cat([g.flatten() for g in subject.evaluate(moved, dtype).rows if g is not None])

    expected = (gradient(1.0) - gradient(-1.0)) / (2 * step)
    floor = SMALLEST * max(float(g.double().norm()) for g in subject.ordinary.rows if g is not None)
    error = distance(found, expected, floor)
    if error <= tolerance:
        return HOLDS, error, ""
    if not along:
        return FAILS, error, "the gradient carries no second derivative, without an error"
    return FAILS, error, "the second derivative differs from differences of the gradient"


def memory(subject: Subject) -> Finding:
    """Count live tensors and autograd nodes after some steps of the same loss."""
    made = subject.given.make()
    counts = []
    for step in range(1, STEPS[-1] + 1):
        leaves = leaves_of(subject.items, subject.batch(subject.size, seed=step), torch.float32)
        subject.given.call(made, subject.items, leaves).backward()
        del leaves
        if isinstance(made, nn.Module):
            made.zero_grad(set_to_none=True)
        if step in STEPS:
            counts.append(alive())
    span = STEPS[-1] - STEPS[0]
    for words, unit, number in (("tensors", "bytes", 0), ("the autograd graph", "nodes", 1)):
        first, middle, last = (count[number] for count in counts)
        if first < middle < last:
            return FAILS, None, f"{words} that stay alive grow by {(last - first) // span:,} {unit} a step"
    return HOLDS, None, ""


def alive() -> tuple[int, int]:
    """Return the bytes of all tensors that Python can reach, and the autograd nodes that these tensors keep."""
    gc.collect()
    storages: dict[int, int] = {}
    nodes: set[Any] = set()
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            if found.layout == torch.strided and found.device.type != "meta":
                storage = found.untyped_storage()
                # Fake tensors, which compilers leave behind, have no memory.
                with contextlib.suppress(RuntimeError):
                    storages[storage.data_ptr()] = storage.nbytes()
            if found.grad_fn is not None:
                nodes.add(found.grad_fn)
    waiting = list(nodes)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in nodes:
                nodes.add(node)
                waiting.append(node)
    return sum(storages.values()), len(nodes)


CHECKS: dict[str, tuple[Callable[[Subject], Finding], str]] = {
    "float32": (
        partial(precision, dtype=torch.float32, autocast=False),
        "Ordinary training in float32 follows a gradient that rounding has changed.",
    ),
    "float16": (
        partial(precision, dtype=torch.float16, autocast=False),
        "Rows in float16 overflow or lose the gradient; convert them to float32 before the loss.",
    ),
    "bfloat16": (
        partial(precision, dtype=torch.bfloat16, autocast=False),
        "Rows in bfloat16 lose the gradient in rounding; convert them to float32 before the loss.",
    ),
    "autocast float16": (
        partial(precision, dtype=torch.float16, autocast=True),
        "Mixed precision with float16 changes the loss; call the loss outside of autocast.",
    ),
    "autocast bfloat16": (
        partial(precision, dtype=torch.bfloat16, autocast=True),
        "Mixed precision with bfloat16 changes the loss; call the loss outside of autocast.",
    ),
    "duplicates": (partial(hard, change="duplicates"), "Two equal items in a batch stop the run or distort its step."),
    "equal views": (
        partial(hard, change="equal views"),
        "Two views that agree exactly, as after a copy or late in training, stop the run or distort its step.",
    ),
    "collapsed rows": (
        partial(hard, change="collapsed"),
        "Where all embeddings coincide, the run stops or takes a wrong step instead of showing the collapse.",
    ),
    "zero row": (
        partial(hard, change="zero row"),
        "One empty row, as from a dead layer or padding, ruins the weights.",
    ),
    "zero logits": (
        partial(hard, change="zero rows"),
        "A network whose last layer starts at zero cannot begin to train.",
    ),
    "huge logits": (partial(hard, change="huge"), "Rows of large norm, as early in training, overflow the loss."),
    "batch of one": (one, "The last batch of an epoch may have one item; it stops the run."),
    "double backward": (
        double_backward,
        "Gradient penalties and meta-learning get a wrong second derivative, or none.",
    ),
    "memory": (memory, "Memory grows with every step until the run ends."),
}


def check(subject: Subject, name: str) -> Check:
    """Make one check of a loss in this process."""
    run, meaning = CHECKS[name]
    try:
        verdict, error, words = run(subject)
    except Exception as raised:  # a loss may raise any exception; it is the result of the check
        verdict, error, words = ERROR, None, said(raised)
    return Check(name, verdict, error, words, meaning)
