"""Build the networks of two search spaces, and describe the spaces: members, neighbours, costs.

    resnet-cifar:A-B-C           a ResNet for CIFAR with A, B and C basic blocks in three stages (He et al. 2015); 9-9-9 is
                                 ResNet-56, 3-3-3 ResNet-20
    nas-201:E-E-E-E-E-E          a network of NAS-Bench-201 (Dong and Yang 2020): each number is the operator of an edge of its
                                 cell, in the order of edges 0>1, 0>2, 1>2, 0>3, 1>3, 2>3

    operator of an edge          0 none, 1 skip, 2 convolution of 1 x 1, 3 convolution of 3 x 3, 4 average of 3 x 3

Options follow a question mark. `width=16` is the number of channels of the first stage, which double at each further stage.
`cells=5` is the number of cells in a stage of nas-201. The last map has 4 * width channels. The submodules are `stem`, `layer1`,
`layer2`, `layer3`, and `last` in nas-201.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any
from urllib.parse import parse_qsl

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.encoders.channels_last import ChannelsLast, conv
from counterpoint.encoders.small_images import BasicBlock
from counterpoint.errors import CounterpointError, unknown

Member = tuple[int, ...]
OPERATORS = ("none", "skip", "conv 1x1", "conv 3x3", "average 3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # of a cell with four nodes: from, to
CHOICES = {"resnet-cifar": (1, 3, 5, 7), "nas-201": (0, 1, 2, 3, 4)}
FORMS = {  # of a member's name, and the range of its numbers
    "resnet-cifar": ("A-B-C, blocks in three stages", range(1, 1001)),
    "nas-201": ("six operators 0 to 4, such as 3-3-1-0-2-3", range(len(OPERATORS))),
}
LENGTHS = {"resnet-cifar": 3, "nas-201": len(EDGES)}


# --- networks ---------------------------------------------------------------------------------------------------------


class CifarResNet(ChannelsLast):
    """A stem, and three stages of basic blocks, of which the second and the third halve the picture."""

    def __init__(self, depths: Sequence[int], channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.dim = 4 * width
        self.stem = conv(channels, width, 1)
        inputs = width
        for stage, depth in enumerate(depths):
            blocks = []
            for number in range(depth):
                blocks.append(BasicBlock(inputs, width << stage, 2 if stage and not number else 1, identity=True))
                inputs = width << stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self._finish()

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim h w"]:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        return x


def _operator(number: int, width: int) -> nn.Module | None:
    """Build the operator of an edge; None for the one that gives zeros."""
    if number in (2, 3):
        kernel = 1 if number == 2 else 3
        return nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, kernel, 1, kernel // 2, bias=False), nn.BatchNorm2d(width)
        )
    return (None, nn.Identity(), None, None, nn.AvgPool2d(3, 1, 1, count_include_pad=False))[number]


class _Cell(nn.Module):
    """Four nodes; a node is the sum of its incoming edges, each an operator on an earlier node."""

    def __init__(self, operators: Member, width: int) -> None:
        super().__init__()
        made = {
            f"{a}>{b}": op
            for (a, b), n in zip(EDGES, operators, strict=True)
            if (op := _operator(n, width)) is not None
        }
        self.edges = nn.ModuleDict(made)

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for node in (1, 2, 3):
            found = [
                self.edges[f"{before}>{node}"](nodes[before])
                for before in range(node)
                if f"{before}>{node}" in self.edges
            ]
            nodes.append(torch.stack(found).sum(0) if found else torch.zeros_like(x))
        return nodes[3]


class _Reduction(nn.Module):
    """A residual block that halves the picture and doubles the channels; odd sides are rounded up."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(inputs, outputs, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class Nas201(ChannelsLast):
    """A stem, three stages of equal cells with a halving block before the second and the third, normalisation and ReLU."""

    def __init__(self, operators: Member, channels: int = 3, width: int = 16, cells: int = 5) -> None:
        super().__init__()
        self.dim = 4 * width
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        for stage in range(3):
            wide = width << stage
            before = [_Reduction(wide // 2, wide)] if stage else []
            made = nn.Sequential(*before, *(_Cell(operators, wide) for _ in range(cells)))
            self.add_module(f"layer{stage + 1}", made)
        self.last = nn.Sequential(nn.BatchNorm2d(self.dim), nn.ReLU())
        self._finish()

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim h w"]:
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for stage in ("layer1", "layer2", "layer3", "last"):
            x = getattr(self, stage)(x)
        return x


def parsed(name: str) -> tuple[Space, Member]:
    """Return the space and the member that a name means. CounterpointError names what is wrong."""
    kind, _, rest = name.partition(":")
    numbers, _, query = rest.partition("?")
    if kind not in CHOICES:
        raise unknown("search space", kind, CHOICES)
    form, within = FORMS[kind]
    try:
        member = tuple(map(int, numbers.split("-")))
        options = {
            key: int(value) for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        }
    except ValueError as error:
        raise CounterpointError(f"{kind} takes {form}, and options as ?width=16; got '{name}'") from error
    known = ("width", "cells") if kind == "nas-201" else ("width",)
    for option in options:
        if option not in known:
            raise unknown(f"option of {kind}", option, known)
    if len(member) != LENGTHS[kind] or not all(number in within for number in member):
        raise CounterpointError(f"{kind} takes {form}; got '{name}'")
    if min(options.values(), default=1) < 1:
        raise CounterpointError(f"the options of {kind} must be at least 1; got '{name}'")
    return Space(kind, (), options.get("width", 16), options.get("cells", 5)), member


def build_member(name: str, channels: int = 3) -> Any:
    """Build the network of a member by its name, as the module's docstring explains."""
    space, member = parsed(name)
    if space.kind == "resnet-cifar":
        return CifarResNet(member, channels, space.width)
    return Nas201(member, channels, space.width, space.cells)


# --- spaces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """A search space: all tuples of choices, one for each stage or edge.

    Args:
        kind: "resnet-cifar" or "nas-201".
        choices: Choices at each place: numbers of blocks, or of operators. Default: those of the published space.
        width: Channels of the first stage, at least 1.
        cells: Cells in a stage of nas-201, at least 1.

    Raises CounterpointError for unknown kinds and choices.
    """

    kind: str
    choices: Member = ()
    width: int = 16
    cells: int = 5

    def __post_init__(self) -> None:
        if self.kind not in CHOICES:
            raise unknown("search space", self.kind, CHOICES)
        object.__setattr__(self, "choices", tuple(dict.fromkeys(self.choices or CHOICES[self.kind])))
        within = FORMS[self.kind][1]
        if not all(choice in within for choice in self.choices):
            raise CounterpointError(
                f"the choices of {self.kind} must lie in {within[0]}..{within[-1]}, got {', '.join(map(str, self.choices))}"
            )
        if self.width < 1 or self.cells < 1:
            raise CounterpointError(f"width and cells must be at least 1, got {self.width} and {self.cells}")

    def name(self, member: Member) -> str:
        """Return the name of a member, which `encoders.build_image_encoder` takes."""
        options = [f"width={self.width}"] if self.width != 16 else []
        options += [f"cells={self.cells}"] if self.cells != 5 and self.kind == "nas-201" else []
        return f"{self.kind}:{'-'.join(map(str, member))}" + ("?" + "&".join(options) if options else "")

    def members(self) -> list[Member]:
        """List all members, in the order of their choices."""
        return list(product(self.choices, repeat=LENGTHS[self.kind]))

    def neighbours(self, member: Member) -> list[Member]:
        """List the members that differ at one place."""
        return [
            (*member[:at], choice, *member[at + 1 :])
            for at in range(len(member))
            for choice in self.choices
            if choice != member[at]
        ]

    def costs(self, size: int, channels: int = 3) -> dict[Member, tuple[int, int]]:
        """Compute multiply-adds for a picture, and parameters, of every member's encoder. Both are sums over the places.

        Args:
            size: height and width of the picture in pixels.
            channels: channels of the picture.
        """
        members = self.members()
        base, (own, weights) = members[0], cost(self.name(members[0]), size, channels)
        more: list[dict[int, tuple[int, int]]] = []
        for at in range(len(base)):
            each = {c: cost(self.name((*base[:at], c, *base[at + 1 :])), size, channels) for c in self.choices}
            more.append({c: (a - own, b - weights) for c, (a, b) in each.items()})
        found = {}
        for member in members:
            parts = [place[choice] for place, choice in zip(more, member, strict=True)]
            found[member] = (own + sum(a for a, _ in parts), weights + sum(b for _, b in parts))
        return found


@cache
def cost(name: str, size: int, channels: int = 3) -> tuple[int, int]:
    """Return the multiply-adds of an encoder's convolutions and products for one picture, and its parameters.

    Args:
        name: name of a member.
        size: height and width of the picture in pixels.
        channels: channels of the picture.

    Nothing is computed: the network is built without memory.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        network = build_member(name, channels).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, channels, size, size))
    return counter.get_total_flops() // 2, sum(p.numel() for p in network.parameters())


def gaussian(network: nn.Module) -> nn.Module:
    """Draw weights of convolutions and linear layers from N(0, 1), in place; biases are 0, normalisation is the identity."""
    for module in network.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight)
        elif isinstance(weight, nn.Parameter):
            nn.init.ones_(weight)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
    return network
