"""Route tokens to two experts each: gates, capacity, and the loss of load balance.

Source: the gate of GShard (Lepikhin et al., arXiv 2006.16668) in the form of DeepSpeed 0.9.5, which LLaVA-MoD trains with.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, need_within, shapes
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group


class Routes(NamedTuple):
    """The two experts of each token.

    Attributes:
        experts: [tokens, 2] numbers of the first and of the second expert.
        weights: [tokens, 2] their weights. They sum to 1; a dropped choice has 0.
        slots: [tokens, 2] place in the expert's buffer, in order of arrival, all first choices before all second ones.
        capacity: tokens that an expert takes; None for any number.
        balance: loss of load balance; 1 where first choices and gates are even.
    """

    experts: Int[Tensor, "tokens two"]
    weights: Float[Tensor, "tokens two"]
    slots: Int[Tensor, "tokens two"] | None
    capacity: int | None
    balance: Float[Tensor, ""]


class Gate(NamedTuple):
    """Dense form of `Routes`.

    Attributes:
        combine: [tokens, experts, capacity] weight of each place of each expert's buffer.
        balance: loss of load balance.
    """

    combine: Float[Tensor, "tokens experts capacity"]
    balance: Float[Tensor, ""]


def capacity_of(tokens: int, experts: int, factor: float, least: int) -> int:
    """Return the number of tokens that an expert takes: 2 factor tokens / experts, rounded up, and at least `least`."""
    return max(math.ceil(tokens / experts * 2 * factor), least)


@over_group
@full_precision
def top2_routes(
    logits: Float[Tensor, "tokens experts"],
    noise: Float[Tensor, "tokens experts"] | None = None,
    capacity_factor: float | None = None,
    min_capacity: int = 0,
) -> Routes:
    """Choose two experts for each token: the most probable one, and the largest of the other logits plus noise.

    Args:
        logits: of the router.
        noise: Gumbel noise of the second choice. Default: none.
        capacity_factor: an expert takes at most 2 factor tokens / experts of the tokens, in order. Default: any number.
        min_capacity: least capacity.

    A token whose one choice is dropped has weight 1 at the other; without both it has none. The loss of balance is
    experts sum_e f_e P_e. Here f_e is the share of tokens whose first choice is e, without gradient. P_e is the mean gate.
    Raises ValueError for fewer than two experts, shapes that differ, and numbers out of range.

    >>> top2_routes(torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])).experts
    tensor([[0, 1],
            [1, 0]])
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError("logits must be [tokens, experts] with at least two experts, got " + shapes(logits=logits))
    if noise is not None and noise.shape != logits.shape:
        raise ValueError("noise must have the shape of logits, got " + shapes(logits=logits, noise=noise))
    need_rows(logits=logits)
    many, experts = logits.shape
    gates = logits.softmax(1)
    first = gates.argmax(1)
    others = logits if noise is None else logits + noise
    second = others.detach().scatter(1, first[:, None], -torch.inf).argmax(1)
    chosen = torch.stack([first, second], 1)
    marks = (chosen.T.reshape(-1, 1) == torch.arange(experts, device=logits.device)).long()
    shares = [global_mean(marks[:many, n].to(gates.dtype)) * global_mean(gates[:, n]) for n in range(experts)]
    balance = experts * torch.stack(shares).sum()
    weights = gates.gather(1, chosen)
    slots, capacity = None, None
    if capacity_factor is not None:
        need_within(0, math.inf, capacity_factor=capacity_factor, min_capacity=min_capacity)
        capacity = capacity_of(many, experts, capacity_factor, min_capacity)
        slots = ((marks.cumsum(0) - 1) * marks).sum(1).view(2, many).T
        weights = weights * (slots < capacity)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    return Routes(chosen, weights, slots, capacity, balance)


@over_group
@full_precision
def top2_gate(
    logits: Float[Tensor, "tokens experts"],
    noise: Float[Tensor, "tokens experts"] | None = None,
    capacity_factor: float = 1.5,
    min_capacity: int = 0,
) -> Gate:
    """Compute `top2_routes` with a capacity, as weights of each place of each expert's buffer.

    Args:
        logits, noise, capacity_factor, min_capacity: as in `top2_routes`.

    >>> top2_gate(torch.tensor([[0.0, 0.0]]), capacity_factor=1.0).combine
    tensor([[[0.5000],
             [0.5000]]])
    """
    routes = top2_routes(logits, noise, capacity_factor, min_capacity)
    assert routes.slots is not None
    assert routes.capacity is not None
    tokens, experts = logits.shape
    # Dropped choices have weight 0; their places are cut to the buffer.
    at = routes.experts * routes.capacity + routes.slots.clamp(max=max(0, routes.capacity - 1))
    flat = routes.weights.new_zeros(tokens, experts * routes.capacity)
    if routes.capacity:
        flat = flat.scatter_add(1, at, routes.weights)
    return Gate(flat.view(tokens, experts, routes.capacity), routes.balance)
