"""Rules for transforms of a function: second derivatives, torch.func, vmap and torch.compile.

A blockwise function has one hand-written gradient. `once` refuses to differentiate that gradient again. `traced` tells whether a
transform records the operations; then the function uses PyTorch's own operations. `holds` reads a condition only where its
value is at hand: under vmap, under torch.compile and on a GPU it is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def traced() -> bool:
    """Return whether torch.compile or a transform of torch.func records the operations."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def hidden(tensor: Tensor) -> bool:
    """Return whether the values of this tensor cannot be read: torch.compile has none yet, vmap has many."""
    return torch.compiler.is_compiling() or mapped(tensor)


def mapped(tensor: Tensor) -> bool:
    """Return whether vmap holds many values in place of this tensor."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def holds(condition: Tensor | bool) -> bool:
    """Read a condition for a check of arguments. Where its value is hidden: False, nothing is reported.

    vmap and torch.compile hide values. So does a GPU: reading one makes the processor wait for all work in progress.
    """
    if not isinstance(condition, Tensor):
        return condition
    return not (condition.is_cuda or hidden(condition)) and bool(condition)


def need_fixed(function: str, **tensors: Tensor) -> None:
    """Raise RuntimeError for a tensor under vmap whose values decide the shapes of what is computed."""
    for name, tensor in tensors.items():
        if mapped(tensor):
            raise RuntimeError(
                f"{function} cannot be mapped over {name} by vmap: its values decide shapes; use in_dims=None for it"
            )


class _Refuse(torch.autograd.Function):
    """Identity whose double backward raises a clear error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, operand: Tensor, what: str) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.what = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"{ctx.what} has no second derivative: its gradient must not be differentiated again")


def refuse_second(gradient: Tensor, operand: Tensor, what: str) -> Tensor:
    """Return the gradient; in a backward pass with create_graph=True, one that cannot be differentiated with the operand."""
    return _Refuse.apply(gradient, operand, what) if torch.is_grad_enabled() else gradient


class _Once(torch.autograd.Function):
    """Identity whose gradient depends on the operand, so that its double backward raises a clear error."""

    @staticmethod
    def forward(ctx: Any, operand: Tensor, what: str) -> Tensor:
        ctx.save_for_backward(operand)
        ctx.what = what
        return operand.view_as(operand)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (operand,) = ctx.saved_tensors
        return refuse_second(gradients[0], operand, ctx.what), None


class _OnceTransformed(torch.autograd.Function):
    """`_Once` in the form that torch.func asks for, which takes longer to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operand: Tensor, what: str) -> Tensor:
        return operand.view_as(operand)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.what = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (operand,) = ctx.saved_tensors
        return refuse_second(gradients[0], operand, ctx.what), None


def once(operand: Tensor, what: str) -> Tensor:
    """Return the operand, whose gradient cannot be differentiated a second time: that raises RuntimeError.

    Args:
        operand: any tensor.
        what: name of the function for the message.

    `torch.autograd.function.once_differentiable` raises only if the gradient that arrives needs a gradient itself. For a
    plain loss it does not, and a second derivative would silently lack a part.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and operand.requires_grad):
        return operand
    return (_OnceTransformed if torch._C._are_functorch_transforms_active() else _Once).apply(operand, what)


def refuse_graph(what: str) -> None:
    """Raise RuntimeError in a backward pass with create_graph=True; torch.func always has one and goes by `once`."""
    if torch.is_grad_enabled() and not traced():
        raise RuntimeError(f"{what} has no second derivative: call backward without create_graph")
