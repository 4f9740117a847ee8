"""Make outputs for a batch without rows.

A process has such a batch where the last one of an epoch has fewer rows than there are processes. Networks of transformers
refuse it. The process still takes part in the step, so its losses need a gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def no_rows(network: nn.Module, *shape: int) -> Float[Tensor, "rows ..."]:
    """Return an output without rows, whose gradient is zero for each parameter of the network that learns.

    Args:
        network: the network.
        shape: shape of a row of its output.

    >>> no_rows(nn.Linear(2, 3), 3).shape
    torch.Size([0, 3])
    """
    parameters = list(network.parameters())
    learned = [p.sum() for p in parameters if p.requires_grad]
    zero = 0 * torch.stack(learned).sum() if learned else torch.zeros((), device=parameters[0].device)
    return zero.expand(0, *shape)
