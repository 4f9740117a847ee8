"""Cut a network into the blocks that partial fine-tuning counts: residual blocks, transformer blocks, stages of convolutions.

>>> from counterpoint.encoders.images import build_image_encoder
>>> len(blocks(build_image_encoder("resnet-s", 32)))  # the stem and three residual blocks
4
"""

from __future__ import annotations

from torch import nn


def blocks(network: nn.Module) -> list[list[nn.Module]]:
    """Return the modules of each block of a network, from the input to the output.

    A block is a child of the network that holds a matrix or a convolution. A list of composite children counts as these
    children. A module without matrices, such as a normalisation, belongs to the block before it.
    """
    found: list[list[nn.Module]] = []
    for module in _children(_inner(network)):
        heavy = any(p.ndim > 1 for p in module.parameters())
        if heavy or not found:
            found.append([module])
        else:
            found[-1].append(module)
    return found or [[network]]


def _inner(network: nn.Module) -> nn.Module:
    """Return the module inside that has several children with parameters, or no such child."""
    inside = [child for child in network.children() if any(True for _ in child.parameters())]
    own = any(True for _ in network.parameters(recurse=False))
    return _inner(inside[0]) if len(inside) == 1 and not own and list(inside[0].children()) else network


def _children(network: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in network.children():
        inside = list(child.children())
        listed = isinstance(child, nn.Sequential | nn.ModuleList) and all(list(each.children()) for each in inside)
        found += _children(child) if listed and inside else [child]
    return found
