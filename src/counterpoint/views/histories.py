"""Change histories of items at random: crop, mask, reorder. Two different changes make the two views of CL4SRec.

Source: Xie et al., "Contrastive Learning for Sequential Recommendation", ICDE 2022, arXiv 2010.14395. `changed_sets` changes sets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

WAYS = ("crop", "mask", "reorder")


class Histories(NamedTuple):
    """Item numbers [n, length], 0 for padding and masked items, and numbers of items [n]."""

    ids: Int[Tensor, "n length"]
    lengths: Int[Tensor, " n"]


def crop(given: Histories, share: float, draws: Float[Tensor, " n"]) -> Histories:
    """Keep consecutive items: floor(share x length) of each history, at least one.

    Args:
        given: the histories.
        share: between 0 and 1.
        draws: [n] uniform numbers in 0..1, which choose the first item kept.

    >>> crop(Histories(torch.tensor([[4, 5, 6, 7]]), torch.tensor([4])), 0.5, torch.tensor([0.4])).ids
    tensor([[5, 6, 0, 0]])
    """
    ids, lengths = given
    kept = (lengths.double() * share).floor().long().clamp(min=1).minimum(lengths)
    first = (draws * (lengths - kept + 1)).long().minimum(lengths - kept)
    places = torch.arange(ids.shape[1], device=ids.device)
    moved = ids.gather(1, (first[:, None] + places).clamp(max=ids.shape[1] - 1))
    return Histories(torch.where(places < kept[:, None], moved, 0), kept)


def mask(given: Histories, share: float, draws: Float[Tensor, "n length"]) -> Histories:
    """Replace floor(share x length) items of each history by 0, at random places. The length stays.

    Args:
        given: the histories.
        share: between 0 and 1.
        draws: [n, length] uniform numbers; the items with the smallest are masked.

    >>> mask(Histories(torch.tensor([[4, 5]]), torch.tensor([2])), 0.5, torch.tensor([[0.9, 0.1]])).ids
    tensor([[4, 0]])
    """
    ids, lengths = given
    here = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    rank = draws.masked_fill(~here, torch.inf).argsort(1).argsort(1)
    hidden = rank < (lengths.double() * share).floor()[:, None]
    return Histories(ids.masked_fill(hidden, 0), lengths)


def reorder(given: Histories, share: float, draws: Float[Tensor, " n"], order: Float[Tensor, "n length"]) -> Histories:
    """Shuffle floor(share x length) consecutive items of each history.

    Args:
        given: the histories.
        share: between 0 and 1.
        draws: [n] uniform numbers, which choose the first item of the window.
        order: [n, length] uniform numbers, which order the window.

    >>> reorder(Histories(torch.tensor([[4, 5, 6]]), torch.tensor([3])), 0.7, torch.tensor([0.9]), torch.rand(1, 3)).ids[0, 0]
    tensor(4)
    """
    ids, lengths = given
    width = (lengths.double() * share).floor().long()
    first = (draws * (lengths - width + 1)).long().minimum(lengths - width)
    places = torch.arange(ids.shape[1], device=ids.device)
    inside = (places >= first[:, None]) & (places < (first + width)[:, None])
    # Places outside the window keep their number as a key; those inside get keys between first and first + width.
    keys = torch.where(inside, first[:, None] + width[:, None] * order.clamp(max=0.999), places.to(order))
    keys = torch.where(inside, keys - 0.5, keys)
    return Histories(ids.gather(1, keys.argsort(dim=1, stable=True)), lengths)


class Draws(NamedTuple):
    """Random numbers of two views of n histories: the changes [n, 3] in random order, and uniform numbers for each view."""

    ways: Int[Tensor, "n 3"]
    one: Float[Tensor, "n 2"]
    several: Float[Tensor, "n 2 length"]

    def part(self, rows: slice, length: int) -> Draws:
        """Return those of some histories, for a smaller length."""
        return Draws(self.ways[rows], self.one[rows], self.several[rows, :, :length])


def draws(n: int, length: int, generator: torch.Generator) -> Draws:
    """Draw the random numbers for two views of n histories of up to `length` items."""
    order = torch.rand(n, len(WAYS), generator=generator).argsort(1)
    one, several = torch.rand(n, 2, generator=generator), torch.rand(n, 2, length, generator=generator)
    return Draws(order, one, several)


def changed(
    given: Histories, drawn: Draws, *, crop_share: float, mask_share: float, reorder_share: float
) -> tuple[Histories, Histories]:
    """Make two views of each history by two different changes. A history of one item stays as it is.

    Args:
        given: the histories.
        drawn: random numbers of as many histories, and of the same length.
        crop_share, mask_share, reorder_share: share of a history that is kept, masked or shuffled, 0 to 1.
    """
    ids, lengths = given
    views, at = [], torch.arange(len(ids), device=ids.device)
    for view in range(2):
        one, several = drawn.one[:, view], drawn.several[:, view]
        made = (
            crop(given, crop_share, one),
            mask(given, mask_share, several),
            reorder(given, reorder_share, one, several),
            given,
        )
        choice = torch.where(lengths > 1, drawn.ways[:, view], len(WAYS))
        rows, sizes = (torch.stack([found[part] for found in made]) for part in range(2))
        views.append(Histories(rows[choice, at], sizes[choice, at]))
    return views[0], views[1]


def changed_sets(
    given: Histories,
    share: float,
    items: int,
    keys: Float[Tensor, "n length"],
    numbers: Float[Tensor, "n wide"],
    *,
    replace: bool,
) -> Int[Tensor, "n wide"]:
    """Return sets that keep some of their items, in random order, as ids with 0 for padding.

    round(share x length + 0.5) items stay: at least one, and below a share of 1 not all of several.

    Args:
        given: the sets.
        share: above 0. Above 1 all items stay, and wide - length random items are added.
        items: number of all items.
        keys: uniform numbers in 0..1, which order the items of a set.
        numbers: uniform numbers in 0..1, which choose other items.
        replace: put random items in the places of those that do not stay.

    >>> sets, keys = Histories(torch.tensor([[4, 5, 6]]), torch.tensor([3])), torch.tensor([[0.3, 0.1, 0.2]])
    >>> changed_sets(sets, 0.5, 9, keys, torch.zeros(1, 3), replace=True)
    tensor([[5, 6, 1]])
    """
    (ids, lengths), extra = given, numbers.shape[1] - given.ids.shape[1]
    places = torch.arange(numbers.shape[1], device=ids.device)
    order = keys.masked_fill(places[: ids.shape[1]] >= lengths[:, None], 2.0).argsort(1)
    shuffled = F.pad(ids.gather(1, order), (0, extra))
    kept = (share * lengths.double() + 0.5).round().long().minimum(lengths - int(share < 1)).clamp(min=1)
    other = 1 + (numbers * items).long().clamp(max=items - 1)
    until = lengths + extra if extra or replace else kept
    view = torch.where(places < kept[:, None], shuffled, other)
    return view.masked_fill(places >= until[:, None], 0)
