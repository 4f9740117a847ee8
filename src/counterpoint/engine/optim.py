"""Optimisers by name (timm's factory) with the schedule nearly every paper uses: linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from counterpoint.errors import CounterpointError


@dataclass
class OptimConfig:
    """How a network is optimised."""

    optimizer: str = "sgd"
    """An optimiser timm knows: sgd, adamw, lars, lamb, ..."""
    lr: float = 0.03
    """Learning rate at a batch of 256; it is scaled with batch_size / 256."""
    weight_decay: float = 1e-4
    """Weight decay; biases and normalisation layers have none."""
    momentum: float = 0.9
    """Momentum (beta 1 for the adam family keeps its own default)."""
    warmup_epochs: int = 0
    """Epochs over which the learning rate rises to its full value; then it falls to 0 on half a cosine."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise CounterpointError(f"lr must be > 0, got {self.lr}")
        if self.weight_decay < 0 or self.warmup_epochs < 0:
            raise CounterpointError("weight_decay and warmup_epochs must not be negative")


def factor(epoch: int, epochs: int, warmup: int) -> float:
    """What the learning rate is multiplied with in an epoch; 0 when the last one is over."""
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / max(1, epochs - warmup))))


def optimisers(
    config: OptimConfig,
    modules: Sequence[nn.Module],
    epochs: int,
    batch_size: int,
    constant: Iterable[nn.Parameter] = (),
    *,
    start: int = 0,
) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """One optimiser over the modules' trainable parameters and its schedule, as `configure_optimizers` returns them.

    Parameters in `constant` keep the full learning rate throughout (SimSiam's predictor). The schedule begins in epoch
    `start` of the fit and takes `epochs` of them; before, it stands at its beginning.
    """
    from timm.optim import create_optimizer_v2

    fixed = {id(p) for p in constant}
    named = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = []
    for flat in (False, True):
        for still in (False, True):
            chosen = [p for p in named.values() if (p.ndim < 2) == flat and (id(p) in fixed) == still]
            if chosen:
                decay = 0.0 if flat else config.weight_decay
                groups.append({"params": chosen, "weight_decay": decay, "still": still})
    lr = config.lr * batch_size / 256
    try:
        optimizer = create_optimizer_v2(
            groups, opt=config.optimizer, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    except (ValueError, AssertionError, KeyError) as error:
        from timm.optim import list_optimizers

        from counterpoint.errors import unknown

        raise unknown("optimizer", config.optimizer, [str(name) for name in list_optimizers()]) from error
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        [
            (lambda _: 1.0) if group.get("still") else (lambda e: factor(max(0, e - start), epochs, config.warmup_epochs))
            for group in optimizer.param_groups
        ],
    )
    return [optimizer], [schedule]
