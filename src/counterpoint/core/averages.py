"""Moving averages of numbers kept between steps, also of numbers whose exponential would overflow, and blends of networks."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


def averaged(old: Float[Tensor, " n"], new: Float[Tensor, " n"], share: float, *, fresh: bool) -> Float[Tensor, " n"]:
    """Compute the moving average (1 - share) old + share new.

    Args:
        old: averages so far; 0 where there is none yet.
        new: values that arrive.
        share: share of the new value, 0 to 1.
        fresh: start an average from its first value. False: start it from 0.

    >>> averaged(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0]), 0.5, fresh=True)
    tensor([2.0000, 1.5000])
    """
    moved = (1 - share) * old + share * new
    return torch.where(old == 0, new, moved) if fresh else moved


def averaged_log(
    old: Float[Tensor, " n"], log_new: Float[Tensor, " n"], share: float, *, fresh: bool
) -> Float[Tensor, " n"]:
    """Compute the logarithm of `averaged(old, exp(log_new), share)`, also where exp(log_new) overflows.

    Arguments are those of `averaged`; averages are not negative.

    >>> averaged_log(torch.tensor([1.0]), torch.tensor([1000.0]), 0.25, fresh=False)
    tensor([998.6137])
    """
    if share == 1:
        return log_new
    log_old = old.log()
    moved = torch.logaddexp(log_old + math.log1p(-share), log_new + math.log(share)) if share else log_old
    return torch.where(old == 0, log_new, moved) if fresh else moved


def bounded_exp(log: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Compute exp(log), at most the largest number of the type."""
    return log.exp().clamp(max=torch.finfo(log.dtype).max)


@torch.no_grad()
def blended(into: nn.Module, one: nn.Module, other: nn.Module, share: float) -> None:
    """Write (1 - share) one + share other into a network, number by number; whole numbers are the other's.

    Args:
        into, one, other: networks of the same form; two of them may be one.
        share: share of the other network, 0 to 1.
    """
    first, second = one.state_dict(), other.state_dict()
    for name, value in into.state_dict().items():
        value.copy_(first[name].lerp(second[name], share) if value.is_floating_point() else second[name])
