"""What a contrastive step compares, told so that another method can take it up: mix it, cut it, weigh it, add to it.

A base method (SimCLR, MoCo, SimSiam, CLIP) says with a `Compared` which rows it contrasts; `directions` puts its negatives
into one form, whatever they are: a query, its positive, a bank of rows and the rule that says which of them it does not see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.contrast import (
    Diagonal,
    Rule,
    Views,
    Where,
    pair_logsumexp,
    positive_similarity,
    scaled,
    unit,
)
from counterpoint.core.distributed import gather_rows, place
from counterpoint.core.precision import exact

WHOLE = 2**22  # similarities of a direction that are held at once, with their gradient: 16 MiB in float32

Form = Literal["views", "queue", "pairs", "predicted"]


@dataclass(frozen=True)
class Compared:
    """The rows of a contrastive step, not yet normalised.

    form        negatives of a row                                               base methods
    views       all other rows of both sides                                     SimCLR
    queue       the keys in the queue; only the query is an anchor               MoCo
    pairs       the other side's other rows; both sides are anchors              CLIP
    predicted   none: each side is predicted from the other                      SimSiam
    """

    form: Form
    query: Float[Tensor, "n dim"]
    key: Float[Tensor, "n dim"]  # of a queue: without gradient
    temperature: float | Float[Tensor, ""] = 1.0
    index: Int[Tensor, " n"] | None = None  # positions in the training set
    queue: Float[Tensor, "keys dim"] | None = None  # unit rows
    queue_index: Int[Tensor, " keys"] | None = None  # whose keys they are, -1 where nobody's
    query_target: Float[Tensor, "n dim"] | None = None  # of "predicted": what stands for the query as a target
    key_target: Float[Tensor, "n dim"] | None = None

    @property
    def symmetric(self) -> bool:
        """Whether both sides are anchors."""
        return self.form != "queue"


@dataclass(frozen=True)
class Direction:
    """Anchors with one positive each and a bank of rows to be told from. All are unit rows, not divided by a temperature."""

    query: Float[Tensor, "m dim"]
    positive: Float[Tensor, "m dim"]
    bank: Float[Tensor, "keys dim"]  # of all processes
    exclude: tuple[Rule, ...]  # rules of [m, keys] with this process's anchors from 0
    index: Int[Tensor, " m"] | None

    def parts(self, rows: int = 512) -> Iterator[tuple[slice, Float[Tensor, "part keys"]]]:
        """Cosines with the bank, -inf where excluded, some anchors at a time; without gradient."""
        with torch.no_grad():
            for start in range(0, len(self.query), rows):
                part = slice(start, min(start + rows, len(self.query)))
                with exact(self.query.device.type):
                    s = self.query[part] @ self.bank.T
                for rule in self.exclude:
                    rule.exclude(s, part, slice(0, len(self.bank)))
                yield part, s

    def whole(self, temperature: float | Tensor) -> Float[Tensor, "m keys"] | None:
        """All similarities with the bank with their gradient, -inf where excluded; None where they are too many to be held."""
        if len(self.query) * len(self.bank) > WHOLE:
            return None
        with exact(self.query.device.type):
            s = scaled(self.query, temperature) @ self.bank.T
        for rule in self.exclude:
            rule.exclude(s, slice(0, len(self.query)), slice(0, len(self.bank)))
        return s

    def positives(self, temperature: float | Tensor) -> Float[Tensor, " m"]:
        """Similarity with the positive."""
        return positive_similarity(scaled(self.query, temperature), self.positive)

    def negatives(self, temperature: float | Tensor, *more: Rule) -> Float[Tensor, " m"]:
        """log of the summed exponentials of the similarities with the bank; `more` excludes more of it."""
        rules = (*self.exclude, *more)
        number = not isinstance(temperature, Tensor) or temperature.ndim == 0
        if self.bank is self.query and number and all(rule.symmetric for rule in rules):
            return pair_logsumexp(scaled(self.query, temperature**0.5), exclude=rules).rows
        return pair_logsumexp(scaled(self.query, temperature), self.bank, exclude=rules).rows


def directions(compared: Compared) -> list[Direction]:
    """The comparisons of a step as anchors against a bank: one direction, or two for the form "pairs".

    Every process has its own anchors and everybody's rows as the bank; a loss of them closes with `global_mean`.
    Raises ValueError for the form "predicted", which has no negatives.
    """
    query, key, index = unit(compared.query), unit(compared.key), compared.index
    n = len(query)
    if compared.form == "views":
        rows = torch.cat([query, key])
        bank = gather_rows(rows)
        rule = Views(n, place(2 * n, rows.device).offset)
        both = None if index is None else torch.cat([index, index])
        return [Direction(rows, torch.cat([key, query]), bank, (rule,), both)]
    if compared.form == "queue":
        if compared.queue is None or not len(compared.queue):
            raise ValueError("queue must hold at least one key")
        rules: tuple[Rule, ...] = ()
        if index is not None and compared.queue_index is not None:
            theirs = compared.queue_index
            rules = (Where(lambda rows, columns: index[rows][:, None] == theirs[columns]),)
        return [Direction(query, key.detach(), compared.queue.detach().to(query.dtype), rules, index)]
    if compared.form == "pairs":
        apart = Diagonal((place(n, query.device).offset,))
        return [
            Direction(query, key, gather_rows(key), (apart,), index),
            Direction(key, query, gather_rows(query), (apart,), index),
        ]
    raise ValueError("the form 'predicted' has no negatives")
