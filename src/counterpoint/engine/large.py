"""Train on large batches in little memory, with the loss of the whole batch: the method of GradCache.

Gao, Zhang, Han, Callan: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021,
arXiv 2101.06983.

1. The networks run without gradient, part by part.
2. The loss is computed once, over all embeddings, and its backward pass gives their gradients.
3. The networks run again, part by part, and propagate those gradients to the weights.

The sum over the parts is the gradient of the whole batch, for any loss. Memory holds the activations of one part, and all
embeddings.

Each call of a network is one node of autograd's graph. A loss may therefore call networks in any order, feed one with
another's output, and compute gradients itself (`torch.autograd.grad`). Second derivatives through a network raise an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from counterpoint.errors import CounterpointError

Networks = Sequence[tuple[nn.Module, str]]
ALIKE = 1e-2  # tolerated difference between the two runs of a part, relative to the largest absolute value


def check_row_wise(name: str, networks: Networks) -> None:
    """Raise CounterpointError, with the reason, where a batch cannot be split into parts.

    Args:
        name: Name of the learner's class, for the message.
        networks: The (module, method) pairs that `Learner.row_wise` returned.
    """
    if not networks:
        raise CounterpointError(
            f"--accumulate: {name} cannot split its batches, because it uses layers inside its networks or the batch as a "
            "whole; leave out --accumulate, or use a smaller --batch-size"
        )
    for network, _ in networks:
        for at, layer in network.named_modules():
            if _mixes_rows(layer):
                raise CounterpointError(
                    f"--accumulate: the network has batch statistics ({type(layer).__name__} {at or 'itself'}), which the parts "
                    "of a batch would change; use an encoder without batch normalisation (vit-s, timm:vit_..., a ConvNeXt), or "
                    "a smaller --batch-size"
                )


def _mixes_rows(layer: nn.Module) -> bool:
    """Return whether a layer's output for a row, or its state, depends on the other rows of the batch."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return layer.training or layer.running_mean is None
    return isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.training and layer.track_running_stats


@contextlib.contextmanager
def running(
    networks: Networks, parts: int = 1, compiled: Mapping[tuple[int, str], Callable[..., Any]] | None = None
) -> Iterator[None]:
    """Run the networks part by part within the block, compiled where a compiled form is given.

    The backward pass must be within the block, too.

    Args:
        networks: (module, method) of networks that treat each row independently.
        parts: Number of parts of a batch, at least 1. Default: the whole batch at once.
        compiled: Compiled methods by (id of the module, method). Default: none.
    """
    patches = _Patches()
    for module, method in networks:
        run = (compiled or {}).get((id(module), method), getattr(module, method))
        patches.add(module, method, _cut(module, run, parts, patches) if parts > 1 else run)
    with patches:
        yield


class _Patches:
    """Methods that replace modules' own methods, and can be removed temporarily."""

    def __init__(self) -> None:
        self.methods: list[tuple[nn.Module, str, Callable[..., Any]]] = []

    def add(self, module: nn.Module, method: str, run: Callable[..., Any]) -> None:
        self.methods.append((module, method, run))

    def __enter__(self) -> None:
        for module, method, run in self.methods:
            object.__setattr__(module, method, run)

    def __exit__(self, *_: object) -> None:
        for module, method, _run in self.methods:
            module.__dict__.pop(method, None)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Restore the modules' own methods within the block, so that the run of a part calls other networks directly."""
        there = [module for module, method, _ in self.methods if method in module.__dict__]
        self.__exit__()
        try:
            yield
        finally:
            if there:
                self.__enter__()


def _cut(module: nn.Module, run: Callable[..., Any], parts: int, patches: _Patches) -> Callable[..., Any]:
    """Return a method that runs the method `run` part by part."""

    def cut(*arguments: Any, **named: Any) -> Any:
        inputs, layout = tree_flatten((arguments, named))
        rows = next((len(value) for value in inputs if isinstance(value, Tensor) and value.ndim), 0)
        length = -(-rows // parts)
        if length >= rows:
            with patches.away():
                return run(*arguments, **named)
        call = _Call(run, patches, inputs, layout, rows, length)
        weights = [p for p in module.parameters() if p.requires_grad]
        out = _InParts.apply(call, *[value for value in inputs if isinstance(value, Tensor)], *weights)
        return call.result(out)

    return cut


class _Call:
    """One call of a network: its arguments, and the state to run any part of it again."""

    def __init__(
        self, run: Callable[..., Any], patches: _Patches, inputs: list[Any], layout: TreeSpec, rows: int, length: int
    ) -> None:
        self.run, self.patches, self.layout, self.rows = run, patches, layout, rows
        self.pieces = [slice(start, min(start + length, rows)) for start in range(0, rows, length)]
        self.at = [number for number, value in enumerate(inputs) if isinstance(value, Tensor)]  # places of the tensors
        self.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        self.states: list[Any] = []
        self.kind = next(value.device.type for value in inputs if isinstance(value, Tensor))
        self.half = torch.get_autocast_dtype(self.kind) if torch.is_autocast_enabled(self.kind) else None
        self.out: TreeSpec | None = None
        self.rest: list[Any] = []  # the output, without its tensors

    def part(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Run one part, and return its output as a flat list."""
        inputs = list(self.inputs)
        for number, value in zip(self.at, tensors, strict=True):
            inputs[number] = value
        arguments, named = tree_unflatten(inputs, self.layout)
        with self.patches.away(), self._autocast():
            found, self.out = tree_flatten(self.run(*arguments, **named))
        return found

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Restore the autocast of the call, without autocast's cache, which would hold weights without their gradient."""
        if self.half is None:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, self.half, cache_enabled=False)

    def piece(self, value: Tensor, piece: slice) -> Tensor:
        """Return a part's rows of an argument; return the whole argument where its first axis is not the rows."""
        return value[piece] if self.by_rows(value) else value

    def by_rows(self, value: Tensor) -> bool:
        return value.ndim > 0 and len(value) == self.rows

    def joined(self, found: Sequence[Sequence[Any]]) -> tuple[Tensor, ...]:
        """Concatenate the parts' outputs. CounterpointError when an output does not have one row for each input row."""
        self.rest = [None if isinstance(value, Tensor) else value for value in found[0]]
        whole = []
        for values in zip(*found, strict=True):
            if not isinstance(values[0], Tensor):
                continue
            if any(
                v.ndim == 0 or len(v) != piece.stop - piece.start for v, piece in zip(values, self.pieces, strict=True)
            ):
                raise CounterpointError(
                    "--accumulate: a network does not give one output row for each input row; leave out --accumulate"
                )
            whole.append(torch.cat(values))
        return tuple(whole)

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """Return the output in the network's own structure of tuples, lists and dicts."""
        left = iter(tensors)
        assert self.out is not None
        return tree_unflatten([next(left) if value is None else value for value in self.rest], self.out)


class _InParts(torch.autograd.Function):
    """Run a network part by part, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.count = call, len(call.at)
        inputs, found = tensors[: ctx.count], []
        for piece in call.pieces:
            call.states.append(_random_state(call.kind))
            found.append(call.part([call.piece(value, piece) for value in inputs]))
        out = call.joined(found)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[value for value in out if not value.is_floating_point()])
        ctx.save_for_backward(*tensors, *out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        needed = ctx.needs_input_grad[1:]
        tensors, out = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        inputs, weights = tensors[: ctx.count], tensors[ctx.count :]
        parts: list[list[Tensor]] = [[] for _ in inputs]
        sums: list[Tensor | None] = [None] * len(weights)
        for piece, state in zip(call.pieces, call.states, strict=True):
            leaves = [
                call.piece(value, piece).detach().requires_grad_(need)
                for value, need in zip(inputs, needed[: ctx.count], strict=True)
            ]
            with torch.enable_grad(), _random_state_of(state):
                again = [value for value in call.part(leaves) if isinstance(value, Tensor)]
            _check_alike(again, [value[piece] for value in out])
            pairs = [
                (value, gradient[piece])
                for value, gradient in zip(again, gradients, strict=True)
                if gradient is not None and value.requires_grad
            ]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            if not pairs or not [*wanted, *weights]:
                continue
            found = torch.autograd.grad(
                [value for value, _ in pairs], [*wanted, *weights], [g for _, g in pairs], allow_unused=True
            )
            arrived = iter(found)
            for number, leaf in enumerate(leaves):
                if leaf.requires_grad:
                    gradient = next(arrived)
                    parts[number].append(torch.zeros_like(leaf) if gradient is None else gradient)
            for number, gradient in enumerate(arrived):
                held = sums[number]
                if gradient is not None:
                    sums[number] = gradient if held is None else held + gradient
        of_inputs = [
            None if not found else torch.cat(found) if call.by_rows(value) else torch.stack(found).sum(0)
            for value, found in zip(inputs, parts, strict=True)
        ]
        return None, *of_inputs, *sums


def _check_alike(again: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Raise CounterpointError where a network's second output differs from its first: its gradient would be wrong."""
    for one, other in zip(again, before, strict=True):
        if one.is_floating_point() and one.numel():
            apart, size = (one.detach() - other).abs().max(), other.abs().max()
            if bool(apart > ALIKE * size):  # NaN counts as alike: the check of the loss reports it
                raise CounterpointError(
                    "--accumulate: a network's second run on the same rows gives another output; the network keeps a state or "
                    "is changed between the runs; leave out --accumulate"
                )


def _random_state(kind: str) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if kind == "cuda" else None


@contextlib.contextmanager
def _random_state_of(state: Any) -> Iterator[None]:
    """Set the random state within the block, to draw the same dropout again; restore the current state afterwards."""
    here = torch.get_rng_state(), None if state[1] is None else torch.cuda.get_rng_state()
    try:
        _set_random_state(state)
        yield
    finally:
        _set_random_state(here)


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
