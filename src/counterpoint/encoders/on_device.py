"""Move a backbone's network to a device, and its inputs to where the network is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def move(backbone: Any, device: torch.device) -> None:
    """Move the network of a backbone to a device. One without a network computes on the CPU."""
    network = backbone if isinstance(backbone, nn.Module) else getattr(backbone, "model", None)
    if network is not None:
        network.to(device)


def beside(network: nn.Module, values: NDArray[Any]) -> Tensor:
    """Return an array as a tensor on the device of a network."""
    found = torch.from_numpy(np.ascontiguousarray(values))
    first = next(network.parameters(), None)
    return found if first is None else found.to(first.device)
