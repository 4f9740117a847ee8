"""Define the base classes of losses: their function, their group of processes, their repr, a learnable temperature."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint import catalog
from counterpoint.core.checks import need_positive
from counterpoint.core.operands import unit
from counterpoint.core.world import Group

Views = Sequence[Float[Tensor, "n dim"]]
# Bounds of a learnt temperature in CLIP's code: log_scale in 0..log 100.
BOUNDS = (0.01, 1.0)


@functools.cache
def function_of(name: str) -> Callable[..., Any]:
    """Import the function of a system: "simclr:nt_xent" is the function `nt_xent` of the catalogue's entry "simclr"."""
    slug, _, name = name.partition(":")
    entry = catalog.get(slug)
    modules = {place.partition(":")[2]: place.partition(":")[0] for place in entry.functions}
    module = modules.get(name, entry.module.partition(":")[0])
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def unit_rows(rows: Tensor, *, normalize: bool) -> Tensor:
    """Divide each row by its norm if `normalize`, else return the rows unchanged."""
    return unit(rows) if normalize else rows


class Loss(nn.Module):
    """The base class of losses. Subclasses name the function that they call in `calls`, and define `forward`."""

    calls: ClassVar[str]  # "slug:function"

    def __init__(self, group: Group = None) -> None:
        super().__init__()
        self.group = group
        self.function  # so that a failing import raises here, not in the first step  # noqa: B018

    @property
    def function(self) -> Callable[..., Any]:
        """The function that the system trains with."""
        return function_of(self.calls)

    def extra_repr(self) -> str:
        """Return the settings by name, as the constructor takes them, with the current value of a learnt temperature."""
        parts = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value = getattr(self, name, None)
            if name == "group" and value is None:
                continue
            if isinstance(value, float):
                parts.append(f"{name}={value:.4g}")
            elif isinstance(value, str):
                parts.append(f"{name}={value!r}")
            elif isinstance(value, bool | int | tuple) or (value is None and parameter.default is None):
                parts.append(f"{name}={value}")
            elif name == "group":
                parts.append("group=ProcessGroup")
        return ", ".join(parts)


class ScaledLoss(Loss):
    """A loss with a learnt temperature, stored as the logarithm of its inverse: `log_scale` = log(1 / temperature).

    `log_scale` is a parameter, or a buffer if not `learnable`. A forward pass in training mode first clamps it to the bounds.
    """

    log_scale: Float[Tensor, ""]

    def __init__(
        self,
        temperature: float,
        learnable: bool,
        group: Group,
        bounds: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        low, high = bounds
        if not low <= temperature <= high:
            raise ValueError(f"temperature must lie in {low}..{high}, got {temperature}")
        self.learnable = learnable
        # Rounded outwards, so that a temperature at its bound does not change.
        self._bounds = (-math.log(high) if high < math.inf else None, -math.log(low) if low > 0 else None)
        value = torch.tensor(-math.log(temperature))
        if learnable:
            self.log_scale = nn.Parameter(value)
        else:
            self.register_buffer("log_scale", value)

    @property
    def temperature(self) -> float:
        """The current temperature."""
        return math.exp(-float(self.log_scale.detach()))

    def scale(self) -> Float[Tensor, ""]:
        """Return `log_scale`. In training mode clamp it to its bounds first."""
        low, high = self._bounds
        if self.training and self.learnable and not (low is None and high is None):
            # .data: this write, often without effect, must not invalidate an earlier forward pass before its backward pass.
            self.log_scale.data.clamp_(low, high)
        return self.log_scale
