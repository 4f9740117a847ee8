"""Large batches in little memory, with the loss of the whole batch: the method of GradCache.

Gao, Zhang, Han, Callan: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021,
arXiv 2101.06983. The networks first run without gradient, part by part; the loss is taken once, of all embeddings, and gives
their gradients; then the networks run once more, part by part, and carry those gradients to the weights. The sum over the
parts is the gradient of the whole batch, for any loss. What is held at once is one part's activations and all embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from counterpoint.errors import CounterpointError


def check_row_wise(name: str, networks: Sequence[tuple[nn.Module, str]]) -> None:
    """Raise CounterpointError, with the reason, where a batch cannot be cut into parts.

    Args:
        name: of the system, for the message.
        networks: what `Learner.row_wise` returned.
    """
    if not networks:
        raise CounterpointError(
            f"{name} cannot cut its batches: its networks see the batch as a whole; leave --accumulate out"
        )
    for network, _ in networks:
        for at, layer in network.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.track_running_stats or layer.training):
                raise CounterpointError(
                    f"--accumulate: the network has batch statistics ({type(layer).__name__} {at or 'itself'}), which the parts "
                    "of a batch would change; use an encoder without batch normalisation (vit-s, timm:vit_..., a ConvNeXt), or "
                    "a smaller --batch-size"
                )


class _Call:
    """One call of a network: what went in, what came out as leaves, and how to run it again."""

    def __init__(self, run: Callable[..., Any], arguments: Any, pieces: list[slice]) -> None:
        self.run, self.pieces = run, pieces
        self.inputs, self.layout = tree_flatten(arguments)
        self.states: list[Any] = []
        self.outputs: list[Tensor] = []

    def part(self, piece: slice, rows: int, *, leaves: bool) -> tuple[Any, list[tuple[int, Tensor]]]:
        """Arguments of a part, and those of them that need a gradient, as leaves, with their places."""
        taken, wanted = [], []
        for number, value in enumerate(self.inputs):
            if isinstance(value, Tensor) and value.ndim and len(value) == rows:
                cut = value[piece]
                if leaves and value.requires_grad:
                    cut = cut.detach().requires_grad_()
                    wanted.append((number, cut))
                taken.append(cut)
            else:
                taken.append(value)
        return tree_unflatten(taken, self.layout), wanted


def _rows(inputs: Sequence[Any]) -> int:
    return next((len(value) for value in inputs if isinstance(value, Tensor) and value.ndim), 0)


@contextlib.contextmanager
def in_parts(networks: Sequence[tuple[nn.Module, str]], parts: int) -> Iterator[Callable[[], None]]:
    """Run the networks part by part inside; yields what must be called after the loss's backward pass, still inside.

    Args:
        networks: (module, method) of networks that see each row by itself.
        parts: into how many parts a batch is cut.
    """
    calls: list[_Call] = []
    inside = [False]  # whether a part is running: what it calls runs as it is
    undo: list[Callable[[], None]] = []

    def wrap(module: nn.Module, method: str) -> None:
        compiled = getattr(module, "_compiled_call_impl", None) if method == "forward" else None
        run: Callable[..., Any] = compiled or getattr(module, method)

        def cut(*arguments: Any, **named: Any) -> Any:
            inputs, _ = tree_flatten((arguments, named))
            rows = _rows(inputs)
            length = -(-rows // parts)
            if inside[0] or length >= rows:
                return run(*arguments, **named)
            pieces = [slice(s, min(s + length, rows)) for s in range(0, rows, length)]
            call = _Call(run, (arguments, named), pieces)
            recording = torch.is_grad_enabled()
            found: list[list[Any]] = []
            layout: Any = None
            with torch.no_grad(), _set(inside):
                for piece in pieces:
                    (some, more), _ = call.part(piece, rows, leaves=False)
                    if recording:
                        call.states.append(_random_state())
                    out, layout = tree_flatten(run(*some, **more))
                    found.append(out)
            whole = [
                torch.cat(values) if isinstance(values[0], Tensor) else values[0] for values in zip(*found, strict=True)
            ]
            if recording:
                call.outputs = [v.requires_grad_() for v in whole if isinstance(v, Tensor) and v.is_floating_point()]
                calls.append(call)
            return tree_unflatten(whole, layout)

        if compiled is not None:
            object.__setattr__(module, "_compiled_call_impl", cut)
            undo.append(lambda: object.__setattr__(module, "_compiled_call_impl", compiled))
        else:
            object.__setattr__(module, method, cut)
            undo.append(lambda: object.__delattr__(module, method))

    def finish() -> None:
        with _set(inside):
            while calls:
                _again(calls.pop())

    try:
        for module, method in networks:
            wrap(module, method)
        yield finish
    finally:
        for back in undo:
            back()


@contextlib.contextmanager
def _set(flag: list[bool]) -> Iterator[None]:
    flag[0] = True
    try:
        yield
    finally:
        flag[0] = False


def _again(call: _Call) -> None:
    """Run a call once more, part by part, with gradients, and send them on."""
    gradients = [out.grad for out in call.outputs]
    if all(g is None for g in gradients):
        return
    rows = _rows(call.inputs)
    onward: dict[int, list[Tensor]] = {}
    for piece, state in zip(call.pieces, call.states, strict=True):
        (some, more), wanted = call.part(piece, rows, leaves=True)
        with _random_state_of(state):
            out, _ = tree_flatten(call.run(*some, **more))
        floats = [v for v in out if isinstance(v, Tensor) and v.is_floating_point()]
        pairs = [(v, g[piece]) for v, g in zip(floats, gradients, strict=True) if g is not None and v.requires_grad]
        torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])
        for number, leaf in wanted:
            onward.setdefault(number, []).append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    for number, cut in onward.items():
        torch.autograd.backward(call.inputs[number], torch.cat(cut))


def _random_state() -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


@contextlib.contextmanager
def _random_state_of(state: Any) -> Iterator[None]:
    """Draw inside what was drawn from this state on: the same dropout."""
    here = _random_state()
    try:
        _set_random_state(state)
        yield
    finally:
        _set_random_state(here)


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
