"""Losses with one planted fault each, for the tests of check_loss. The tests' processes import this file by its path."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from counterpoint.core.distributed import gather_rows, over


def info_nce(query, key, first=0):
    """Contrast each query with all keys; the positive of query i is key `first` + i."""
    logits = normalize(query, dim=1, eps=1e-3) @ normalize(key, dim=1, eps=1e-3).T / 0.2
    return cross_entropy(logits, first + torch.arange(len(query)))


def without_gradient(rows):
    """Gather rows of equal number without a gradient."""
    if not dist.is_initialized():
        return [rows.detach()]
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach())
    return parts


def place():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# --- over processes ---------------------------------------------------------------------------------------------------


def right(query, key):
    """Compute the loss of the whole batch on every process; the gathers' gradient is the sum over processes."""
    with over("world"):
        return info_nce(gather_rows(query), gather_rows(key))


def cut(query, key):
    """Gather keys without a gradient, the classic fault: keys learn from the queries of their own process alone."""
    parts = without_gradient(key)
    rank, _ = place()
    parts[rank] = key
    return info_nce(query, torch.cat(parts), rank * len(query))


def summed(query, key, factor=1):
    """Give the whole loss a gradient for this process's rows only: W times too small after DDP's mean."""
    rank, world = place()
    rows = []
    for own in (query, key):
        parts = without_gradient(own)
        parts[rank] = own
        rows.append(torch.cat(parts))
    return info_nce(*rows) * (world if factor == "world" else factor)


def own_batch(query, key):
    """Contrast this process's batch alone."""
    return info_nce(query, key)


def mean_of_rows(query, key):
    """Take a mean over rows, which needs no gather; only uneven batches change it."""
    return (query - key).square().mean()


def waits_for_ever(query, key):
    """Call a collective on the first process only."""
    if place() == (0, 2):
        dist.barrier()
    return info_nce(query, key)


class Placed(nn.Module):
    """A module that takes rank and number of processes, and has a learnt scale."""

    def __init__(self, rank, world, scale=1.0):
        super().__init__()
        self.place = (rank, world)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, query, key):
        assert self.place == place()
        return self.scale * mean_of_rows(query, key)


# --- in one process ---------------------------------------------------------------------------------------------------


def inverse_distance(rows):
    """Divide by the distance of items, which is zero for duplicates."""
    pairs = torch.triu_indices(len(rows), len(rows), 1)
    return (1 / (rows[pairs[0]] - rows[pairs[1]]).square().sum(1)).mean()


def overflows_in_half(query, key):
    """Take exponentials without a reference, up to e^12 = 162,755; 65,504 is the largest number in float16."""
    e = (normalize(query, dim=1) @ normalize(key, dim=1).T * 12).exp()
    return (e.sum(1) / e.diagonal()).log().mean()


class KeepsGraphs(nn.Module):
    """Sum losses with their graphs."""

    def __init__(self):
        super().__init__()
        self.total = 0.0

    def forward(self, query, key):
        loss = info_nce(query, key)
        self.total = self.total + loss
        return loss


class KeepsRows(nn.Module):
    """Append to a list without a limit."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, query, key):
        self.seen.append(query.detach().clone())
        return info_nce(query, key)


class Queue(nn.Module):
    """A queue of fixed size, which is no leak."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, query, key):
        self.seen = [*self.seen, key.detach().clone()][-3:]
        return info_nce(query, torch.cat([key, *self.seen]))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise NotImplementedError("the cube has no second derivative")
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


class _SilentCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3 * ctx.x**2


def refuses_second_derivatives(rows):
    return _Cube.apply(rows).mean()


def silent_second_derivative(rows):
    return _SilentCube.apply(rows).mean()


def refuses_one_item(query, key):
    if len(query) < 2:
        raise ValueError("two items at least")
    return info_nce(query, key)


def root_of_variance(query, key):
    """Divide by a deviation, which is zero where all rows are equal."""
    return (query.std(0).log() ** 2).mean() + mean_of_rows(query, key)


# --- what a call returns, and takes -----------------------------------------------------------------------------------


def mapping(query, key):
    return {"logits": query @ key.T, "loss": info_nce(query, key), "other": query.sum()}


def pair(query, key):
    return query.sum(1), info_nce(query, key)


def per_row(query, key):
    return (query - key).square().sum(1)


def supervised(rows, *, labels, scale):
    same = labels[:, None] == labels[None]
    assert rows.ndim == 2
    assert labels.dtype == torch.int64
    return scale * ((rows[:, None] - rows[None]).square().mean(-1) * same).mean()


def whole_numbers(rows):
    """Multiply with a float32 matrix; no other type works."""
    return (rows @ torch.ones(rows.shape[1], 2)).square().mean()
