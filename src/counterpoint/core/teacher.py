"""Teachers that are moving averages of networks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def cosine_momentum(step: int, total: int, base: float) -> float:
    """Momentum that rises from `base` at step 0 to 1 at step `total` on half a cosine.

    m = 1 + (base - 1) (1 + cos(pi step / total)) / 2   (BYOL, arXiv 2006.07733, Sec. 3.3)
    """
    if total < 1 or not 0 <= step <= total:
        raise ValueError(f"step must lie in 0..total and total be positive, got step {step} of {total}")
    return 1.0 + 0.5 * (base - 1.0) * (1.0 + math.cos(math.pi * step / total))


@torch.no_grad()
def blend(target: Mapping[str, Tensor], source: Mapping[str, Tensor], momentum: float) -> None:
    """target[name] <- momentum * target[name] + (1 - momentum) * source[name], in place, for every name in both.

    Raises ValueError when the shapes under a name differ, or when no name is shared.
    """
    shared = [name for name in target if name in source]
    if not shared:
        raise ValueError("the two networks share no parameter name")
    for name in shared:
        if target[name].shape != source[name].shape:
            raise ValueError(
                f"'{name}' is {tuple(target[name].shape)} in one and {tuple(source[name].shape)} in the other"
            )
        target[name].lerp_(source[name].to(target[name].dtype), 1.0 - momentum)
