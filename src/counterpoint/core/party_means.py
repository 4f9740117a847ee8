"""One network of several parties' networks: weighted means of what is an average, votes for the rest.

Plain weighted sums, as federations usually take them, turn counters and masks into fractions of type float64. They make NaN of one
party's NaN even at weight 0, and divide by 0 where no party has examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class PartyMean(NamedTuple):
    """The mean, or None where no party counts; and for each party that does not count the reason."""

    mean: dict[str, Tensor] | None
    left_out: dict[str, str]


def mean_of_parties(
    states: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float], like: Mapping[str, Tensor]
) -> PartyMean:
    """Compute one state of several parties' states, tensor by tensor.

    - Floating point: the weighted mean, summed in float64, in the tensor's own type.
    - Booleans and integers: the value with the largest weight, entry by entry. Where several have it, the server's value if it is
      among them, else the smallest.

    A party does not count with NaN or infinite values, or with other names, shapes or types than `like`. Its weight must be
    positive and finite.

    Args:
        states: party -> name -> tensor.
        weights: party -> weight, usually its number of examples.
        like: the server's state, which the parties began with.

    Raises ValueError for tensors of complex numbers, which have no mean here.

    >>> states = {"a": {"w": torch.tensor([1.0])}, "b": {"w": torch.tensor([4.0])}}
    >>> mean_of_parties(states, {"a": 2, "b": 1}, {"w": torch.zeros(1)}).mean
    {'w': tensor([2.])}
    """
    for name, value in like.items():
        if value.is_complex():
            raise ValueError(f"like: {name} has complex numbers, which are neither averaged nor voted on")
    left_out = {party: why for party, state in states.items() if (why := _reason(state, weights[party], like))}
    used = [party for party in states if party not in left_out]
    if not used:
        return PartyMean(None, left_out)
    share = torch.tensor([float(weights[party]) for party in used], dtype=torch.float64)
    share = share / share.sum()
    found = {}
    for name, own in like.items():
        values = [states[party][name] for party in used]
        found[name] = _mean(values, share) if own.is_floating_point() else _vote(values, share, own)
    return PartyMean(found, left_out)


def _reason(state: Mapping[str, Tensor], weight: float, like: Mapping[str, Tensor]) -> str:
    """Return why a party does not count; "" if it does."""
    if not math.isfinite(weight) or weight < 0:
        return f"its weight is {weight}, not a number of examples"
    if weight == 0:
        return "it has no examples"
    if missing := sorted(set(like) ^ set(state)):
        return f"it has other tensors: {missing[0]} is in one of both states alone"
    for name, own in like.items():
        value = state[name]
        if value.shape != own.shape or value.dtype != own.dtype:
            return (
                f"its {name} is {list(value.shape)} of {_type(value)}, the server's {list(own.shape)} of {_type(own)}"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            return f"its {name} holds NaN or infinite values"
    return ""


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _mean(values: list[Tensor], share: Tensor) -> Tensor:
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, part in zip(values, share.tolist(), strict=True):
        total.add_(value.double(), alpha=part)
    return total.to(values[0].dtype)


def _vote(values: list[Tensor], share: Tensor, own: Tensor) -> Tensor:
    """Return the value of each entry with the largest share."""
    best, score = own.clone(), torch.full(own.shape, -1.0, dtype=torch.float64)
    for candidate in [own, *values]:
        votes = torch.zeros_like(score)
        for value, part in zip(values, share.tolist(), strict=True):
            votes += part * (value == candidate)
        tied = (votes - score).abs() < 1e-9
        better = (votes > score) & ~tied | tied & (best != own) & (candidate < best)
        best, score = torch.where(better, candidate, best), torch.where(better, votes, score)
    return best
