"""The contract of demonstrations: the form that every source for the task `demonstrations` returns (numpy only, no torch).

A task is a set of examples, each an input with its output. A query is an example that is answered. Demonstrations are other
examples of the same task, which come before the query. The splits have different tasks.

`Members` draws demonstrations for items of any kind: it knows only the group of each item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from counterpoint.data.images import Indices
from counterpoint.errors import DataError
from counterpoint.words import counted

ROLES = ("", "demonstration", "query")


@dataclass(frozen=True)
class Example:
    """An example of a task.

    Raises DataError without a task, an input or an output. Where there are options, they must have text and differ, and the output
    must be one of them.
    """

    task: str
    input: str
    output: str
    options: tuple[str, ...] = ()  # possible outputs; () where they are not known
    role: str = ""  # "demonstration" or "query" where an example serves as one of them only

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"has the role '{self.role}'; the roles are demonstration and query, or none")
        for name in ("task", "input", "output"):
            if not getattr(self, name).strip():
                raise DataError(f"has no {name}, or an empty one")
        if not self.options:
            return
        if any(not option.strip() for option in self.options):
            raise DataError("has an option without text, which cannot be scored")
        if len(set(self.options)) < len(self.options):
            raise DataError("has equal options")
        if self.output not in self.options:
            raise DataError(
                f"has the output '{self.output}', which is none of its {counted(len(self.options), 'option')}"
            )


class Members:
    """The items of each group, from which demonstrations of a query are drawn.

    Args:
        groups: [items] number of each item's group, such as its task or its class.
        pool: [items] whether an item may be drawn. Default: every item may.
    """

    def __init__(self, groups: Indices, pool: NDArray[np.bool_] | None = None) -> None:
        chosen = np.arange(len(groups)) if pool is None else np.flatnonzero(pool)
        order = chosen[np.argsort(groups[chosen], kind="stable")]
        numbers, first = np.unique(groups[order], return_index=True)
        self.numbers = numbers
        last = [*first[1:].tolist(), len(order)]
        self._of = {n: order[a:b] for n, a, b in zip(numbers.tolist(), first.tolist(), last[: len(first)], strict=True)}

    def of(self, group: int, *, without: int = -1) -> Indices:
        """Return the positions of a group's items, in order, without the item at the position `without`."""
        found: Indices = self._of.get(int(group), np.empty(0, np.int64))
        return found[found != without]

    def draw(
        self, group: int, count: int, generator: np.random.Generator, *, without: int = -1, replace: bool = False
    ) -> Indices:
        """Draw items of a group in random order, all different unless `replace`.

        Args:
            group: number of the group.
            count: number of items; a group with fewer gives all it has, unless `replace`.
            generator: generator of the draws.
            without: position of an item that is not drawn: the query.
            replace: draw with replacement.
        """
        among = self.of(group, without=without)
        if not len(among):
            return among
        return generator.choice(among, count if replace else min(count, len(among)), replace=replace)

    def other(self, group: int, generator: np.random.Generator) -> int:
        """Draw another group than this one; the same where there is no other."""
        others = self.numbers[self.numbers != group]
        return int(generator.choice(others)) if len(others) else int(group)


@dataclass(frozen=True)
class DemonstrationSplit:
    """Examples of some tasks. Positions count the queries, and are the same in every process and run."""

    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.queries)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of their first examples."""
        return tuple(dict.fromkeys(example.task for example in self.examples))

    @cached_property
    def groups(self) -> Indices:
        """[examples] number of each example's task."""
        number = {name: n for n, name in enumerate(self.tasks)}
        return np.array([number[example.task] for example in self.examples], np.int64)

    @cached_property
    def queries(self) -> Indices:
        """Positions of the examples that are queries."""
        return np.array([n for n, one in enumerate(self.examples) if one.role != "demonstration"], np.int64)

    @cached_property
    def members(self) -> Members:
        """The examples of each task that serve as demonstrations."""
        return Members(self.groups, np.array([one.role != "query" for one in self.examples], bool))

    @cached_property
    def outputs(self) -> dict[str, tuple[str, ...]]:
        """The outputs of each task, in order of their first examples: the options of its examples that name none."""
        found: dict[str, dict[str, None]] = {}
        for example in self.examples:
            found.setdefault(example.task, {})[example.output] = None
        return {task: tuple(of) for task, of in found.items()}

    def options(self, example: Example) -> tuple[str, ...]:
        """Return the possible outputs of an example."""
        return example.options or self.outputs[example.task]

    def without_pool(self) -> list[str]:
        """Return the tasks of which some query has no other example as its demonstration."""
        found = {
            self.examples[n].task: None
            for n in self.queries.tolist()
            if not len(self.members.of(int(self.groups[n]), without=n))
        }
        return list(found)


@dataclass(frozen=True)
class DemonstrationData:
    """A source's splits, and the facts needed to read them."""

    name: str
    train: DemonstrationSplit
    valid: DemonstrationSplit  # other tasks, to monitor training and to choose settings
    test: DemonstrationSplit  # other tasks again, evaluated once, at the end
    texts: Sequence[str] = ()  # plain texts, for training alone
    # Remarks for the user on this data: rows left out, splits made.
    notes: list[str] = field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        """The facts that a learner is built from, ready for JSON."""
        return {"examples": len(self.train), "plain_texts": len(self.texts)}
