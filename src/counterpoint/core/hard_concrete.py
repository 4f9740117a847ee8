"""Learn which units of a network to keep: hard-concrete masks, the size that they leave, and the pressure on that size.

Louizos, Welling, Kingma: "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, arXiv 1712.01312. Masks for the
widths of a transformer follow CoFi (Xia et al., ACL 2022, arXiv 2204.00408), as TinyCLIP uses them.

    symbol      here             meaning
    log alpha   log_alpha        logit of a unit's mask; large: keep the unit
    x           uniform          random number of the unit in this step, in (0, 1)
    z           -                the drawn mask, in 0..1, often exactly 0 or 1
    b           TEMPERATURE      smoothness of the draw
    l, r        LOW, HIGH        ends to which the draw is stretched before it is cut to 0..1

A tower has three kinds of units: channels of the residual stream (`hidden`, shared by all blocks), heads and neurons of each block.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_positive, need_within, shapes
from counterpoint.core.precision import scalar

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
EPS = 1e-6  # probabilities stay this far from 0 and 1
MAGIC = 0.8  # sharpness of the mask that is not drawn
BOUNDS = math.log(0.01), math.log(100)  # of log alpha, after each step


def hard_concrete_sample(
    log_alpha: Float[Tensor, "*units"], uniform: Float[Tensor, "*units"]
) -> Float[Tensor, "*units"]:
    """Compute z = clip(sigmoid((ln x - ln(1 - x) + log alpha) / b) (r - l) + l, 0, 1).

    Args:
        log_alpha: logits of the masks.
        uniform: numbers in (0, 1), 0 and 1 not included.

    Raises ValueError for shapes that differ.

    >>> import torch
    >>> hard_concrete_sample(torch.tensor([4.0, 0.0, -4.0]), torch.full((3,), 0.5))
    tensor([1.0000, 0.5000, 0.0000])
    """
    if log_alpha.shape != uniform.shape:
        raise ValueError(
            f"log_alpha and uniform must have equal shapes, got {shapes(log_alpha=log_alpha, uniform=uniform)}"
        )
    drawn = torch.sigmoid((uniform.log() - (-uniform).log1p() + log_alpha) / TEMPERATURE)
    return (drawn * (HIGH - LOW) + LOW).clamp(0, 1)


def probability_kept(log_alpha: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """Compute P(z > 0) = 1 - clip(sigmoid(b ln(-l / r) - log alpha), eps, 1 - eps)."""
    return 1 - torch.sigmoid(TEMPERATURE * math.log(-LOW / HIGH) - log_alpha).clamp(EPS, 1 - EPS)


def hard_concrete_eval_mask(log_alpha: Float[Tensor, "*layers units"]) -> Float[Tensor, "*layers units"]:
    """Compute the mask without a draw: sigmoid(0.8 log alpha / b), of which the smallest are 0.

    A row of n units gets round(n - sum P(z > 0)) zeros. The other entries keep their values between 0 and 1.

    >>> hard_concrete_eval_mask(torch.tensor([4.0, 3.0, -4.0]))
    tensor([0.9918, 0.9734, 0.0000])
    """
    soft = torch.sigmoid(MAGIC * log_alpha / TEMPERATURE)
    count = log_alpha.shape[-1]
    zeros = (count - probability_kept(log_alpha).sum(-1, keepdim=True)).round()
    rank = soft.argsort(dim=-1, stable=True).argsort(dim=-1)
    return soft * (rank >= zeros)


def _head_size(width: int, heads: int) -> float:
    return (4 * width * width + 4 * width) / heads


def prunable_size(width: int, neurons: int, heads: int, layers: int) -> float:
    """Compute the number of parameters of a tower's blocks: layers (4 C^2 + 4 C + 2 C I + C + I).

    Args:
        width: channels C, at least 1.
        neurons: neurons I of a block.
        heads: heads of a block, at least 1.
        layers: number of blocks.

    >>> prunable_size(8, 32, 2, 3)
    2520.0
    """
    need_positive(width=float(width), heads=float(heads))
    return layers * (heads * _head_size(width, heads) + 2 * width * neurons + width + neurons)


def size_of(
    hidden: Float[Tensor, ""], heads: Float[Tensor, ""], neurons: Float[Tensor, ""], width: int, count: int
) -> Float[Tensor, ""]:
    """Compute the size of a tower from numbers of units: hidden heads p_head / C + 2 hidden neurons.

    Args:
        hidden: number of channels, or its expectation.
        heads: number of heads over all blocks.
        neurons: number of neurons over all blocks.
        width: channels of the whole tower, C.
        count: heads of a block of the whole tower.
    """
    return hidden * heads * _head_size(width, count) / width + 2 * hidden * neurons


def expected_model_size(
    hidden: Float[Tensor, " width"],
    heads: Float[Tensor, "layers heads"],
    intermediate: Float[Tensor, "layers neurons"],
    C: int,
    I: int,  # noqa: E741
    H: int,
    layers: int,
) -> Float[Tensor, ""]:
    """Compute the expected number of parameters that the masks of a tower leave in its blocks, without biases of neurons.

    Args:
        hidden, heads, intermediate: logits log alpha of channels, heads and neurons.
        C, I, H: channels, neurons of a block, heads of a block.
        layers: number of blocks.

    Raises ValueError for logits of other shapes.

    >>> on = [torch.full(shape, 20.0) for shape in ((8,), (3, 2), (3, 32))]
    >>> round(expected_model_size(*on, 8, 32, 2, 3).item())
    2400
    """
    if hidden.shape != (C,) or heads.shape != (layers, H) or intermediate.shape != (layers, I):
        raise ValueError(
            f"hidden, heads and intermediate must be [{C}], [{layers}, {H}] and [{layers}, {I}], got "
            f"{shapes(hidden=hidden, heads=heads, intermediate=intermediate)}"
        )
    counts = [probability_kept(one).sum() for one in (hidden, heads, intermediate)]
    return size_of(counts[0], counts[1], counts[2], C, H)


def scheduled_sparsity(start: float, end: float, step: float, warmup: float) -> float:
    """Compute the target q = start + (end - start) min(1, step / warmup).

    Args:
        start, end: shares of the parameters to remove, 0 to 1.
        step: steps done, at least 0.
        warmup: steps to the full target, at least 0; 0: the full target from the first step.

    >>> scheduled_sparsity(0.25, 0.5, 400, 1000)
    0.35
    """
    need_within(0, 1, start=start, end=end)
    return start + (end - start) * (min(1.0, step / warmup) if warmup else 1.0)


def sparsity_lagrangian(
    expected_sparsity: float | Float[Tensor, ""],
    target_sparsity: float | Float[Tensor, ""],
    lambda_1: float | Float[Tensor, ""],
    lambda_2: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Compute lambda_1 d + lambda_2 d^2 with d = max(target - expected, 0), the pressure of a network that is too large.

    Args:
        expected_sparsity: e, 1 - expected size / prunable size.
        target_sparsity: q, the share of the parameters to remove.
        lambda_1, lambda_2: multipliers, trained by gradient ascent. So they never shrink.

    >>> import torch
    >>> sparsity_lagrangian(torch.tensor(0.25), 0.5, torch.tensor(10.0), torch.tensor(10.0))
    tensor(3.1250)
    """
    numbers = lambda_1, lambda_2, expected_sparsity, target_sparsity
    like = next((one for one in numbers if isinstance(one, Tensor)), torch.empty(()))
    missing = scalar(target_sparsity - expected_sparsity, like).clamp(min=0)
    return lambda_1 * missing + lambda_2 * missing.square()
