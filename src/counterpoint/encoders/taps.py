"""Read the outputs of named layers inside a network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.errors import CounterpointError, unknown

BLOCKS = ("blocks", "resblocks", "layers", "layer", "stages")  # names of libraries' lists of blocks
STAGE = re.compile(r"stem|layer\d+")


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


def block_names(encoder: nn.Module) -> list[str]:
    """Return the names of an image encoder's blocks, first to last.

    They are the longest list of modules called blocks, resblocks, layers, layer or stages; else the children stem, layer1, layer2
    and so on. Raises CounterpointError for an encoder with neither.

    >>> from counterpoint.encoders.images import build_image_encoder
    >>> block_names(build_image_encoder("conv-s", 16))
    ['stem', 'layer1', 'layer2']
    """
    lists: dict[str, list[str]] = {}
    for name, _ in encoder.named_modules():
        place, _, number = name.rpartition(".")
        if number.isdigit() and place.rpartition(".")[2] in BLOCKS:
            lists.setdefault(place, []).append(name)
    if lists:
        return max(lists.values(), key=len)
    found = [name for name, _ in encoder.named_modules() if STAGE.fullmatch(name.rpartition(".")[2])]
    if not found:
        raise CounterpointError(
            f"{type(encoder).__name__} has no blocks whose tokens could be read; name a transformer"
        )
    top = min(name.count(".") for name in found)
    return [name for name in found if name.count(".") == top]


def token_rows(output: Any, module: nn.Module) -> Float[Tensor, "n tokens width"]:
    """Return a block's output as tokens: the places of a feature map, or a vector as one token.

    Args:
        output: a tensor, or a tuple whose first item it is.
        module: the block; one that has the tokens before the batch is transposed.
    """
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    if found.ndim == 4:
        return found.flatten(2).transpose(1, 2)
    if found.ndim == 2:
        return found[:, None]
    return found.transpose(0, 1) if tokens_first(module) else found


def tokens_first(block: nn.Module) -> bool:
    """Return whether a block has the tokens before the batch, as open_clip's and those of `towers` have."""
    attention = getattr(block, "attn", None)
    return getattr(block, "tokens_first", False) or getattr(attention, "batch_first", True) is False
