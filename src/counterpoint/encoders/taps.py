"""Read the outputs of named layers inside a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from counterpoint.errors import unknown


def layer(encoder: nn.Module, name: str) -> nn.Module:
    """Return the layer of this name in an encoder, or in the library's model that it wraps.

    Raises CounterpointError for an unknown name.
    """
    modules = dict(encoder.named_modules())
    found = modules.get(name) or modules.get(f"model.{name}")
    if found is None or not name:
        raise unknown("layer", name, [known for known in modules if known and "." not in known.removeprefix("model.")])
    return found


@contextmanager
def recorded(encoder: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the named layers in the forward passes inside the context, by name.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with recorded(network, ["0"]) as seen:
    ...     _ = network(torch.ones(1, 2))
    >>> seen["0"].shape
    torch.Size([1, 3])
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    handles = [layer(encoder, name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
