"""Choose the examples of each step as a function of (seed, stage, epoch, step), for exact resumption and many processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


@dataclass
class Position:
    """The position of a fit: `batch` batches of epoch `epoch` of stage `stage` are done.

    `epoch` and `step` count from the beginning of the stage, `earlier_epochs` and `earlier_steps` the stages before it.
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    earlier_epochs: int = 0
    earlier_steps: int = 0

    @property
    def all_epochs(self) -> int:
        """Number of epochs done since the fit began."""
        return self.earlier_epochs + self.epoch

    @property
    def all_steps(self) -> int:
        """Number of steps done since the fit began."""
        return self.earlier_steps + self.step

    def next_stage(self) -> None:
        """Move to the beginning of the next stage."""
        self.earlier_epochs, self.earlier_steps = self.all_epochs, self.all_steps
        self.stage, self.epoch, self.batch, self.step = self.stage + 1, 0, 0, 0

    def state(self) -> dict[str, int]:
        """Return the fields as plain numbers."""
        return asdict(self)


class Batches(Sampler[list[int]]):
    """The batches of an epoch, as lists of positions. By default: all examples, shuffled, the last partial batch kept.

    Subclasses write `order` (one array that is split into batches) or `epoch` (batch after batch). Both draw from a generator
    whose state depends on seed and epoch alone. `bind` sets the position of the fit; batches before it are skipped.
    W processes see disjoint shares of the batches of one process: `batch_size` counts the whole batch.

    Args:
        examples: Number of examples to choose from.
        batch_size: Number of examples in a batch, over all processes together.
        drop_last: Leave out the last, smaller batch.
        items: Number of examples in an epoch, drawn again for each epoch. Default: all.
    """

    def __init__(self, examples: int, batch_size: int, *, drop_last: bool = False, items: int | None = None) -> None:
        self.examples = examples
        self.batch_size = batch_size
        items = examples if items is None else min(items, examples)
        self.counted = items // batch_size * batch_size if drop_last else items
        self.bind(0, Position(), 0, 1)

    def bind(self, seed: int, position: Position, rank: int, size: int) -> Batches:
        """Set the fit's seed and position, this process's rank and the number of processes. Return the same object."""
        self.seed, self.position, self.rank, self.size = seed, position, rank, size
        return self

    def __len__(self) -> int:
        return -(-self.counted // self.batch_size)

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return the positions of an epoch's examples, in the order of its batches."""
        return generator.permutation(self.examples)

    def epoch(self, generator: np.random.Generator) -> Iterator[NDArray[np.int64] | list[int]]:
        """Yield the batches of an epoch, each as the positions of its examples over all processes."""
        order = self.order(generator)
        for start in range(0, self.counted, self.batch_size):
            yield order[start : min(start + self.batch_size, self.counted)]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's share of each batch that is not done."""
        generator = np.random.default_rng([self.seed, self.position.all_epochs])
        done = self.position.batch
        for number, batch in enumerate(self.epoch(generator)):
            if number >= done:
                yield [int(row) for row in batch[self.rank :: self.size]]


class Steps(Batches):
    """Steps without examples, for a stage that draws its own batches in `prepare`.

    Args:
        steps: Number of steps in an epoch.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps, 1)

    def epoch(self, generator: np.random.Generator) -> Iterator[NDArray[np.int64] | list[int]]:
        for _ in range(self.examples):
            yield []


class RowBatches(Batches):
    """Batches of some examples, all of them in an epoch.

    Args:
        rows: Their positions.
        batch_size: Number of examples in a batch, over all processes together.
    """

    def __init__(self, rows: NDArray[np.int64], batch_size: int) -> None:
        super().__init__(len(rows), batch_size)
        self.rows = rows

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        return generator.permutation(self.rows)


class ChosenBatches(Batches):
    """Batches of some examples, for a number of steps, in a new order each time all were seen.

    Args:
        rows: Their positions.
        batch_size: Number of examples in a batch.
        steps: Number of batches in an epoch.
    """

    def __init__(self, rows: NDArray[np.int64], batch_size: int, steps: int) -> None:
        super().__init__(steps * batch_size, batch_size)
        self.rows = rows

    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        turns = -(-self.examples // len(self.rows))
        return np.concatenate([generator.permutation(self.rows) for _ in range(turns)])[: self.examples]


class RenewedBatches(Batches):
    """Batches of a selection of examples that is renewed at the beginning of each epoch.

    Args:
        examples: Number of examples to select from.
        batch_size: Number of examples in a batch.
        renew: Called when an epoch begins, on every process. Returns the positions of the selected examples, at least one.
        current: Returns the positions of the current selection, where a resumed fit continues within an epoch.
        fill: Take as many batches as all examples give, in a new order each time the selection was seen. False: one pass over
            the selection without its last, smaller batch; a selection below `batch_size` is one batch.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        renew: Callable[[], NDArray[np.int64]],
        current: Callable[[], NDArray[np.int64]],
        *,
        fill: bool,
    ) -> None:
        super().__init__(examples, batch_size, drop_last=True)
        self.renew, self.current, self.fill = renew, current, fill

    def epoch(self, generator: np.random.Generator) -> Iterator[NDArray[np.int64] | list[int]]:
        rows = self.current() if self.position.batch else self.renew()
        if self.fill:
            return ChosenBatches(rows, self.batch_size, len(self)).epoch(generator)
        order = generator.permutation(rows)
        size = min(self.batch_size, len(rows))
        return iter(order[: len(rows) // size * size].reshape(-1, size))
