"""Compare the gradients of two losses on shared weights, and resolve conflicts between them.

Two gradients conflict if their cosine is negative. PCGrad (Yu et al., NeurIPS 2020, arXiv 2001.06782) then removes from each
its component along the other. The rows of a pair of tensors may be the gradients of many *units*, such as examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from counterpoint.core.checks import need_word, shapes
from counterpoint.core.precision import wide
from counterpoint.core.world import process_group, world


class Products(NamedTuple):
    """Inner products of the gradients of two losses, one pair for each unit, in float64."""

    dot: Float[Tensor, "*units"]
    first: Float[Tensor, "*units"]  # squared lengths
    second: Float[Tensor, "*units"]

    @staticmethod
    def of(g1: Float[Tensor, "*units size"], g2: Float[Tensor, "*units size"]) -> Products:
        """Compute the products of flat gradients."""
        a, b = g1.double(), g2.double()
        return Products((a * b).sum(-1), a.square().sum(-1), b.square().sum(-1))

    @property
    def cosine(self) -> Float[Tensor, "*units"]:
        """0 where a gradient is zero."""
        length = self.first.sqrt() * self.second.sqrt()  # the product of the squares could overflow
        zero = length == 0
        return torch.where(zero, 0.0, self.dot / torch.where(zero, 1.0, length))

    @property
    def nonzero(self) -> Bool[Tensor, "*units"]:
        """Whether both gradients of a unit differ from zero."""
        return (self.first > 0) & (self.second > 0)

    @property
    def factors(self) -> tuple[Float[Tensor, "*units"], Float[Tensor, "*units"]]:
        """Factors of the two gradients, with which their sum equals that of the `realigned` gradients.

        h1 + h2 = (1 - d / |g1|^2) g1 + (1 - d / |g2|^2) g2 with d = <g1, g2> < 0. Without a conflict both are 1.
        """
        conflict = (self.dot < 0) & self.nonzero

        def factor(square: Tensor) -> Tensor:
            return torch.where(conflict, 1 - self.dot / torch.where(conflict, square, 1.0), 1.0)

        return factor(self.first), factor(self.second)


def gradient_cosine(g1: Float[Tensor, "*units size"], g2: Float[Tensor, "*units size"]) -> Float[Tensor, " *units"]:
    """Return the cosine of the two gradients of each unit, in float32 at least; 0 where one of them is zero.

    Sums are computed in float64.

    Args:
        g1, g2: flat gradients of the two losses; leading dimensions number units.

    Raises ValueError for shapes or types that differ.

    >>> gradient_cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]))
    tensor(-1.)
    """
    _need_gradients(g1, g2)
    return Products.of(g1, g2).cosine.to(wide(g1).dtype)


def realigned(
    g1: Float[Tensor, "*units size"], g2: Float[Tensor, "*units size"]
) -> tuple[Float[Tensor, "*units size"], Float[Tensor, "*units size"]]:
    """Remove from each of two conflicting gradients its component along the other; leave gradients without conflict unchanged.

    If <g1, g2> < 0, the results are

        h1 = g1 - <g1, g2> / |g2|^2 g2
        h2 = g2 - <g1, g2> / |g1|^2 g1

    A zero gradient conflicts with nothing.

    Args:
        g1, g2: flat gradients of the two losses; leading dimensions number units.

    Raises ValueError for shapes or types that differ.

    >>> realigned(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
    (tensor([0.5000, 0.5000]), tensor([0., 1.]))
    """
    _need_gradients(g1, g2)
    dot, first, second = Products.of(g1, g2)
    conflict = ~(dot >= 0) & (first != 0) & (second != 0)  # NaN counts as a conflict, so that it is not lost

    def along(square: Tensor) -> Tensor:
        return torch.where(conflict, dot / torch.where(conflict, square, 1.0), 0.0)[..., None].to(own1.dtype)

    own1, own2 = wide(g1), wide(g2)  # computed in float32 at least, returned in the type of the gradients
    return (own1 - along(second) * own2).to(g1.dtype), (own2 - along(first) * own1).to(g2.dtype)


def realign(
    g1: Float[Tensor, "*units size"],
    g2: Float[Tensor, "*units size"],
    reduction: Literal["mean", "sum"] = "mean",
    *,
    shared: Bool[Tensor, " size"] | None = None,
) -> Float[Tensor, "*units size"]:
    """Combine the gradients of two losses to one update: the mean, or the sum, of the `realigned` gradients.

    Args:
        g1, g2: flat gradients of the two losses. Leading dimensions number units; each pair is realigned separately.
        reduction: "mean" matches a loss that averages the two, as VATT's does.
        shared: True for entries that both losses have. In other entries the loss that lacks them has zeros. They are summed
            whatever the reduction, and count in the lengths, as in the reference code of PCGrad. Default: all are shared.

    Without a conflict the result is the plain mean or sum; for opposite gradients it is zero. Raises ValueError for shapes
    that differ.

    >>> realign(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
    tensor([0.2500, 0.7500])
    """
    need_word(("mean", "sum"), reduction=reduction)
    h1, h2 = realigned(g1, g2)
    merged = h1 + h2
    if reduction == "sum":
        return merged
    return merged / 2 if shared is None else torch.where(shared, merged / 2, merged)


def _need_gradients(g1: Tensor, g2: Tensor) -> None:
    if g1.ndim < 1 or g1.shape != g2.shape or not g1.is_floating_point() or g1.dtype != g2.dtype:
        raise ValueError(
            f"g1 and g2 must be flat gradients of one shape and one floating type, got {shapes(g1=g1, g2=g2)} of {g1.dtype} "
            f"and {g2.dtype}"
        )


def with_gradient(
    loss: Float[Tensor, ""], weights: Sequence[Float[Tensor, ...]], gradient: Float[Tensor, " size"]
) -> Float[Tensor, ""]:
    """Return the loss, up to rounding, with `gradient` added to its gradient on the weights.

    One backward pass gives both, also across processes.

    Args:
        loss: a scalar.
        weights: parameters.
        gradient: flat, of all weights in order, without a gradient.

    >>> weight = torch.tensor([2.0, 3.0], requires_grad=True)
    >>> torch.autograd.grad(with_gradient(weight.sum(), [weight], torch.tensor([0.0, 5.0])), weight)
    (tensor([1., 6.]),)
    """
    flat = torch.cat([weight.flatten() for weight in weights])
    extra = (flat * gradient.to(flat.dtype)).sum()
    return loss + extra - extra.detach()


def weight_gradients(
    outputs: Sequence[Float[Tensor, "rows dim"]],
    pulled: Sequence[Float[Tensor, "units rows dim"]],
    weights: Sequence[Float[Tensor, ...]],
) -> Float[Tensor, "units size"]:
    """Continue the gradients of several units from a network's outputs to its weights, flat, in one batched pass.

    The graph of the outputs is kept. Across processes each process gives its own rows, and the result is the sum over all.

    Args:
        outputs: outputs of the network.
        pulled: the gradient of each unit on each output.
        weights: parameters that every output depends on.
    """
    arriving = [part.to(output.dtype) for part, output in zip(pulled, outputs, strict=True)]
    parts = torch.autograd.grad(outputs, weights, arriving, is_grads_batched=True, retain_graph=True)
    flat = torch.cat([part.flatten(1) for part in parts], 1)
    if world()[1] > 1:
        dist.all_reduce(flat, group=process_group())
    return flat


def gradient_discrepancy(
    loss_a: Float[Tensor, ""], loss_b: Float[Tensor, ""], params: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """Compute the mean over parameters of 1 - cos(dloss_a/dtheta, dloss_b/dtheta).

    Args:
        loss_a: loss whose gradients are constants.
        loss_b: loss through whose gradients the result is differentiated.
        params: parameters; the cosines of a matrix are those of its rows (axis 1), averaged.

    Raises ValueError without parameters.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> round(float(gradient_discrepancy(w[0] * 3, w.sum() ** 2, [w])), 4)
    0.2929
    """
    if not len(params):
        raise ValueError("params is empty; the gradients of at least one parameter are compared")
    constant = torch.autograd.grad(loss_a, params, retain_graph=True)
    moving = torch.autograd.grad(loss_b, params, create_graph=True)
    cosines = [
        F.cosine_similarity(b, a.detach(), dim=min(1, a.ndim - 1)).mean() for a, b in zip(constant, moving, strict=True)
    ]
    return (1 - torch.stack(cosines)).mean()
