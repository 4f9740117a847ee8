"""Draw batches for a loss from a short description of its inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from counterpoint.errors import CounterpointError

Kind = Literal["rows", "fixed", "labels", "scalar"]
# What is done to the rows of a batch; see `draw`.
Change = Literal["none", "duplicates", "equal views", "collapsed", "zero row", "zero rows", "huge"]
HUGE = 1e4
SYNTAX = (
    'inputs are separated by commas: "n d" (rows), "2n d" (two views in one batch), "n d:fixed" (rows without gradient), '
    '"n:int" (labels), "10.0" (a learnt number); NAME= before one passes it by name'
)


@dataclass(frozen=True)
class Item:
    """One input of a loss."""

    name: str | None
    """Name of the keyword argument. None: passed by position."""
    kind: Kind
    views: int = 1
    """Views of the items in one tensor, one after the other: 2 for "2n d"."""
    shape: tuple[int, ...] = ()
    """Shape of an item's part."""
    value: float = 0.0
    """Value of a learnt number."""


def parse(text: str, dim: int) -> list[Item]:
    """Read a description of inputs, such as "n d, n d" or "2n d, labels=2n:int".

    Args:
        text: Inputs, separated by commas. `SYNTAX` describes one.
        dim: Width that the letter d stands for, at least 1.

    Raises CounterpointError that names the input that cannot be read.

    >>> [item.kind for item in parse("n d, n:int, scale=10.0", 16)]
    ['rows', 'labels', 'scalar']
    """
    items = [_item(part.strip(), dim) for part in text.split(",")]
    if not any(item.kind == "rows" for item in items):
        raise CounterpointError(f"inputs '{text}' have no rows with a gradient; {SYNTAX}")
    return items


def _item(text: str, dim: int) -> Item:
    match = re.fullmatch(r"(?:(\w+)\s*=\s*)?(.+)", text)
    if match is None:
        raise CounterpointError(f"an input is empty; {SYNTAX}")
    name, rest = match[1], match[2].strip()
    try:
        return Item(name, "scalar", value=float(rest))
    except ValueError:
        pass
    shape, colon, word = rest.partition(":")
    kinds: dict[str, Kind] = {"": "rows", "float": "rows", "fixed": "fixed", "int": "labels"}
    first, *others = shape.split() or [""]
    views = re.fullmatch(r"(\d*)n", first)
    if views is None or word.strip() not in kinds or (colon and not word) or views[1] == "0":
        raise CounterpointError(f"cannot read the input '{text}'; {SYNTAX}")
    sizes = {"d": dim} | {digits: int(digits) for digits in others if digits.isdigit() and int(digits)}
    unknown = [other for other in others if other not in sizes]
    if unknown:
        raise CounterpointError(
            f"cannot read '{unknown[0]}' in the input '{text}'; sizes are d and numbers from 1; {SYNTAX}"
        )
    return Item(name, kinds[word.strip()], int(views[1] or 1), tuple(sizes[other] for other in others))


def draw(
    items: Sequence[Item], count: int, *, classes: int, normalize: bool, change: Change = "none", seed: int = 0
) -> list[Tensor]:
    """Draw a batch of `count` items, always the same one for a seed.

    A row is the item's own vector plus noise of the same size. So the views of an item are alike, not equal.

    Args:
        items: Inputs, as `parse` returns them.
        count: Number of items, at least 1.
        classes: Number of different labels, at least 1. Item i has label i modulo `classes`.
        normalize: Divide each row by its norm.
        change: Hard rows instead of ordinary ones. "duplicates": items 0 and 1 are equal. "equal views": no noise.
            "collapsed": all rows are equal. "zero row": item 0 is zero. "zero rows": all items are. "huge": rows times 10,000.
        seed: Seed of the rows.

    Returns float64 rows [views * count, ...], int64 labels [views * count] and float64 numbers [], in the order of `items`.
    """
    generator = torch.Generator().manual_seed(seed)
    own: dict[tuple[int, ...], Tensor] = {}
    batch = []
    for item in items:
        if item.kind == "scalar":
            batch.append(torch.tensor(item.value, dtype=torch.float64))
            continue
        if item.kind == "labels":
            labels = (torch.arange(count) % classes).repeat(item.views)
            batch.append(labels.reshape(-1, *(1 for _ in item.shape)).expand(-1, *item.shape).contiguous())
            continue
        if item.shape not in own:
            own[item.shape] = torch.randn(count, *item.shape, generator=generator, dtype=torch.float64)
        noise = torch.randn(item.views, count, *item.shape, generator=generator, dtype=torch.float64)
        rows = own[item.shape] + (0.0 if change in ("equal views", "collapsed") else 1.0) * noise
        if change == "duplicates" and count > 1:
            rows[:, 1] = rows[:, 0]
        elif change == "collapsed":
            rows = rows[:, :1].expand_as(rows).clone()
        elif change == "zero row":
            rows[:, 0] = 0
        elif change == "zero rows":
            rows = torch.zeros_like(rows)
        elif change == "huge":
            rows = rows * HUGE
        if normalize and item.shape:
            rows = rows / rows.norm(dim=-1, keepdim=True)
        batch.append(rows.flatten(0, 1))
    return batch


def share(items: Sequence[Item], batch: Sequence[Tensor], counts: Sequence[int], rank: int) -> list[Tensor]:
    """Return the part of a batch that one process has: the same items of every view.

    Args:
        items: Inputs of the batch.
        batch: The tensors of all processes' items.
        counts: Items of each process. Their sum is the number of items in the batch.
        rank: The process, from 0.
    """
    first = sum(counts[:rank])
    own = []
    for item, tensor in zip(items, batch, strict=True):
        if item.kind != "scalar":
            views = tensor.unflatten(0, (item.views, sum(counts)))
            tensor = views[:, first : first + counts[rank]].flatten(0, 1)
        own.append(tensor)
    return own


def joined(item: Item, shares: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Put the processes' parts of a tensor together again, in the order of the whole batch."""
    parts = [part.unflatten(0, (item.views, count)) for part, count in zip(shares, counts, strict=True)]
    return torch.cat(parts, 1).flatten(0, 1)


def views(items: Sequence[Item]) -> int:
    """Return how many rows an item has in all inputs together."""
    return sum(item.views for item in items if item.kind in ("rows", "fixed"))


def distance(found: Tensor, expected: Tensor, floor: float) -> float:
    """Return the norm of the difference over the norm of `expected`, or over `floor` where that is larger.

    The result is inf where `found` has an entry that is not finite.
    """
    if not bool(torch.isfinite(found).all()):
        return math.inf
    gap = (found.double() - expected.double()).norm()
    return float(gap / max(float(expected.double().norm()), floor, torch.finfo(torch.float64).tiny))
