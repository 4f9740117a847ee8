"""Make optimisers by name (timm's factory), with the schedule of nearly every paper: linear warm-up, then half a cosine."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from counterpoint.core.divided import clip_norm, is_sharded
from counterpoint.engine.settings import CheckedSettings
from counterpoint.engine.stages import Turn
from counterpoint.errors import CounterpointError, unknown

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def light(kind: type[Kind]) -> type[Kind]:
    """Return the same optimiser of PyTorch without its import of torch's compiler, which takes 1.4 seconds.

    PyTorch wraps an optimiser's methods so that the compiler does not trace them. The wrapper imports the compiler at the
    first call. Optimisers never run inside a compiled function here, so the plain methods suffice.
    """
    wrapped = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in wrapped}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


@dataclass
class OptimConfig(CheckedSettings):
    """Settings of the optimiser and of its schedule."""

    optimizer: str = "sgd"
    """sgd (with momentum, not Nesterov's), nesterov, adamw, lars, lamb, or the name of another optimiser of timm."""
    lr: float = 0.03
    """Learning rate at a batch of 256; it is scaled with batch_size / 256."""
    weight_decay: float = 1e-4
    """Weight decay, at least 0; biases and normalisation layers have none."""
    momentum: float = 0.9
    """Momentum, at least 0. The adam family ignores it: beta 1 keeps its own default."""
    warmup_epochs: int = 0
    """Epochs over which the learning rate rises to its full value; then it falls to 0 on half a cosine."""
    bias_lr: float | None = None
    """Learning rate of biases and normalisation layers at a batch of 256; None: the same as `lr`."""
    final_weight_decay: float | None = None
    """Weight decay after the last epoch, approached on half a cosine, epoch by epoch; None: constant weight decay."""
    beta2: float | None = None
    """Beta 2, for optimisers that have one, below 1; None: the optimiser's own default."""
    clip_norm: float | None = None
    """Maximum norm of the gradients, over all parameters together; larger ones are scaled down. None: no limit."""
    schedule: Literal["epoch", "step"] = "epoch"
    """Change the learning rate after each epoch, or after each step."""

    def __post_init__(self) -> None:
        self.need_sound_values()
        self.need_positive("lr")
        self.need_weight("weight_decay", "warmup_epochs", "momentum")
        if self.final_weight_decay is not None:
            self.need_weight("final_weight_decay")
        for name in ("bias_lr", "clip_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise CounterpointError(f"{name} must be > 0 or left out, got {getattr(self, name)}")
        if self.beta2 is not None and not 0 <= self.beta2 < 1:
            raise CounterpointError(f"beta2 must lie in 0..1, 1 not included, got {self.beta2}")


def factor(epoch: float, epochs: int, warmup: int) -> float:
    """Return the factor of the learning rate in an epoch; 0 after the last epoch."""
    if epoch < warmup:
        return (epoch + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / max(1, epochs - warmup))))


def constant_rate(epoch: float) -> float:
    """Return the factor 1 of the learning rate, in every epoch. A `curve` of `optimisers`."""
    return 1.0


def restarts(epochs: int, cycles: int, weight: float = 1.0, floor: float = 0.0) -> Callable[[float], float]:
    """Return the factor of the learning rate by epoch: halves of a cosine, one after another. A `curve` of `optimisers`.

    Args:
        epochs: Number of epochs, at least 1.
        cycles: Number of cycles, all of the same length; at least 1.
        weight: Factor of all cycles after the first, at least 0. Default: 1.
        floor: Factor that a cycle ends with, at least 0. Default: 0.

    Source: SGDR (Loshchilov and Hutter, arXiv 1608.03983).
    """

    def curve(epoch: float) -> float:
        at = min(epoch / epochs, 1.0) * cycles
        cycle = min(int(at), cycles - 1)
        share = 0.5 * (1 + math.cos(math.pi * (at - cycle)))
        return floor + (weight if cycle else 1.0) * (1 - floor) * share

    return curve


def held_then_cosine(epochs: int, first: int, share: float) -> Callable[[float], float]:
    """Return the factor of the learning rate: constant in the first epochs, then half a cosine. A `curve` of `optimisers`.

    Args:
        epochs: Number of epochs, at least 1.
        first: Number of first epochs, at least 0. Without further epochs there are no first ones.
        share: Factor in the first epochs, at least 0.
    """
    first = first if first < epochs else 0
    return lambda epoch: share if epoch < first else factor(epoch, epochs, first)


def rise_and_fall(epochs: int, steps: int, warmup: float, *, cosine: bool = False) -> Callable[[float], float]:
    """Return the factor of the learning rate, which rises on a line and falls to 0 on another. A `curve` of `optimisers`.

    Args:
        epochs: Number of epochs, at least 1.
        steps: Number of steps in an epoch, at least 1.
        warmup: Share of all steps over which the factor rises, at least 0 and below 1.
        cosine: Fall on half a cosine instead.
    """

    def curve(epoch: float) -> float:
        share = min(epoch / epochs, 1.0)
        rising = (share + 1 / (epochs * steps)) / warmup if warmup else 1.0
        falling = (1 - share) / (1 - warmup)
        if cosine:
            falling = 0.5 * (1 - math.cos(math.pi * min(1.0, falling)))
        return min(1.0, rising, falling)

    return curve


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """A schedule of the learning rate's factors, and of a weight decay from `first` to `last` on half a cosine.

    The weight decay changes only in parameter groups that have one. `state_dict` holds plain numbers.

    Args:
        optimizer: The optimiser whose groups change.
        factors: A function for each parameter group, from the epoch to the factor. Where the schedule changes after each
            step, the epoch is a fraction.
        first: Weight decay at the beginning.
        last: Weight decay after `epochs` epochs.
        epochs: Number of epochs of the schedule.
        steps: Number of steps in an epoch, to change after each step. None: change after each epoch.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factors: Sequence[Callable[[float], float]],
        first: float,
        last: float,
        epochs: int,
        steps: int | None = None,
    ) -> None:
        self.first, self.last, self.epochs, self.steps = first, last, epochs, steps
        self.per_step = steps is not None
        unit = steps or 1

        def by_count(curve: Callable[[float], float]) -> Callable[[int], float]:
            return lambda count: curve(count / unit)

        super().__init__(optimizer, [by_count(curve) for curve in factors])

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        share = factor(self.last_epoch / (self.steps or 1), self.epochs, 0)
        for group in self.optimizer.param_groups:
            if not group["flat"]:
                group["weight_decay"] = self.last + (self.first - self.last) * share


def optimisers(
    config: OptimConfig,
    modules: Sequence[nn.Module],
    epochs: int,
    batch_size: int,
    constant: Iterable[nn.Parameter] = (),
    *,
    steps_per_epoch: int = 1,
    rate: float = 1.0,
    curve: Callable[[float], float] | None = None,
) -> Turn:
    """Return a turn of one optimiser over the modules' trainable parameters, with its schedule.

    Args:
        config: Settings of the optimiser.
        modules: The modules to train.
        epochs: Number of epochs of the schedule.
        batch_size: Examples in a batch. Learning rates are multiplied by batch_size / 256.
        constant: Parameters that keep the full learning rate throughout (SimSiam's predictor). Default: none.
        steps_per_epoch: Number of steps in an epoch, for schedules that change after each step.
        rate: Factor of all learning rates, by default 1.
        curve: Function from the epoch to the factor of the learning rate after the warm-up. Default: half a cosine.

    Raises CounterpointError when no parameter of the modules requires a gradient, and for an unknown optimiser.
    """
    scale = batch_size / 256
    fixed = {id(p) for p in constant}
    named = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = []
    for flat in (False, True):
        for still in (False, True):
            chosen = [p for p in named.values() if (p.ndim < 2) == flat and (id(p) in fixed) == still]
            if chosen:
                decay = 0.0 if flat else config.weight_decay
                own = config.bias_lr if flat and config.bias_lr is not None else config.lr
                groups.append(
                    {"params": chosen, "lr": own * scale, "weight_decay": decay, "flat": flat, "still": still}
                )
    if not groups:
        raise CounterpointError("an optimiser has nothing to train: none of its parameters learns in this stage")
    optimizer = _of_torch(config, groups, config.lr * scale) or _of_timm(config, groups, config.lr * scale)
    clip([optimizer], config.clip_norm)
    last = config.weight_decay if config.final_weight_decay is None else config.final_weight_decay
    steps = steps_per_epoch if config.schedule == "step" else None
    early = 1 - 1 / (steps or 1)  # `factor` warms up to the end of the current epoch; by steps, to the end of the step

    def moving(epoch: float) -> float:
        warm = epoch < config.warmup_epochs
        if curve is not None:
            return rate * curve(epoch) * (factor(epoch - early, epochs, config.warmup_epochs) if warm else 1.0)
        return rate * factor(epoch - early if warm else epoch, epochs, config.warmup_epochs)

    factors = [(lambda _: rate) if group["still"] else moving for group in optimizer.param_groups]
    return Turn([optimizer], [Schedule(optimizer, factors, config.weight_decay, last, epochs, steps)])


def on_lines(config: Any, modules: Sequence[nn.Module], epochs: int, steps: int, *, rate: float = 1.0) -> Turn:
    """Return a turn of `optimisers` whose rate rises and falls on lines.

    Args:
        config: Settings of the optimiser, with `batch_size`, and `warmup` as in `rise_and_fall`.
        modules: The modules to train.
        epochs, steps: Numbers of epochs, and of steps in an epoch.
        rate: Factor of all learning rates, by default 1.
    """
    curve = rise_and_fall(epochs, steps, config.warmup)
    return optimisers(config, modules, epochs, config.batch_size, steps_per_epoch=steps, rate=rate, curve=curve)


def _of_torch(config: OptimConfig, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer | None:
    """Make an optimiser that timm, too, takes from PyTorch; return None for others. Importing timm takes 2 seconds."""
    name, decay = config.optimizer.lower(), config.weight_decay
    # Steps over several parameters at once take no mixture of divided and whole ones.
    divided = any(is_sharded(p) for group in groups for p in group["params"])
    plain: dict[str, Any] = {"foreach": False} if divided else {}
    if name in ("sgd", "momentum", "nesterov"):
        # Not fused: PyTorch 2.14's fused step fails where a parameter gets its first gradient later than another.
        return light(torch.optim.SGD)(
            groups, lr=lr, momentum=config.momentum, weight_decay=decay, nesterov=name == "nesterov", **plain
        )
    betas = (0.9, 0.999 if config.beta2 is None else config.beta2)
    how = plain or {"fused": True}
    if name == "adamw":
        return light(torch.optim.AdamW)(groups, lr=lr, betas=betas, weight_decay=decay, **how)
    if name == "adam":
        return light(torch.optim.Adam)(groups, lr=lr, betas=betas, weight_decay=decay, **how)
    return None


def _of_timm(config: OptimConfig, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Make an optimiser by its name in timm. CounterpointError for a name that timm does not know."""
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    options: dict[str, Any] = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    try:
        if config.beta2 is not None and get_optimizer_info(config.optimizer).has_betas:
            options["betas"] = (0.9, config.beta2)
        return create_optimizer_v2(groups, opt=config.optimizer, lr=lr, **options)
    except (ValueError, AssertionError, KeyError) as error:
        raise unknown("optimizer", config.optimizer, [str(name) for name in list_optimizers()]) from error


def clip_values(optimizers: Iterable[torch.optim.Optimizer], most: float) -> None:
    """Make each optimiser limit the absolute value of each entry of its gradients before each step; 0: do nothing."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.grad is not None:
                parameter.grad.clamp_(-most, most)

    if most:
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(hook)


def clip(optimizers: Iterable[torch.optim.Optimizer], norm: float | None) -> None:
    """Make each optimiser clip the norm of its gradients, over all its parameters, before each step; None: do nothing."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert norm is not None
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if any(map(is_sharded, held)):
            clip_norm(held, norm)
        else:
            nn.utils.clip_grad_norm_(held, norm)

    if norm is not None:
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(hook)
