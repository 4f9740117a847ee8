"""AugMix: mix three chains of changes with the image itself, with separate parameters for every image.

Hendrycks, Mu, Cubuk, Zoph, Gilmer, Lakshminarayanan: "AugMix: A Simple Data Processing Method to Improve Robustness and
Uncertainty", ICLR 2020, arXiv 1912.02781.

    mixer = AugMix()
    drawn = mixer.draw(len(images), torch.Generator().manual_seed(0))
    mixed = mixer.apply(images, drawn)          # floating point in 0..1

The changes work on 8 bits, as Pillow's. Rotations, shears and translations take the nearest pixel; outside is black.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from counterpoint.errors import CounterpointError
from counterpoint.views.images.colours import Images, zero_to_one

CHANGES = (
    "autocontrast",
    "equalize",
    "posterize",
    "rotate",
    "solarize",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
)
LONGEST = 3  # changes of a chain at most


@dataclass
class AugMixParameters:
    """The random parameters of one mixture of each of B images."""

    change: Int[Tensor, "batch chains 3"]  # number in CHANGES; -1: the chain is shorter
    level: Float[Tensor, "batch chains 3"]  # strength of the change, 0 to 10
    sign: Float[Tensor, "batch chains 3"]  # direction of a rotation, shear or translation, -1 or 1
    weights: Float[Tensor, "batch chains"]  # share of each chain, sum 1
    clean: Float[Tensor, " batch"]  # share of the image itself

    def take(self, rows: slice | Tensor) -> AugMixParameters:
        """Select the parameters of some images."""
        return AugMixParameters(
            self.change[rows], self.level[rows], self.sign[rows], self.weights[rows], self.clean[rows]
        )


@dataclass(frozen=True)
class AugMix:
    """Mixtures of chains of changes.

    Args:
        severity: greatest strength of a change, above 0.1 to 10; the least is 0.1. By default 1.
        chains: number of chains, at least 1. By default 3.
    """

    severity: float = 1.0
    chains: int = 3

    def __post_init__(self) -> None:
        if not 0.1 < self.severity <= 10 or self.chains < 1:
            raise CounterpointError(
                f"AugMix needs a severity above 0.1 to 10 and at least one chain, got {self.severity} and {self.chains}"
            )

    def draw(self, batch: int, generator: torch.Generator) -> AugMixParameters:
        """Draw the parameters: chains of 1 to 3 changes, shares of a Dirichlet(1), the image's own share uniform."""
        shape = batch, self.chains, LONGEST
        length = torch.randint(1, LONGEST + 1, shape[:2], generator=generator)
        change = torch.randint(len(CHANGES), shape, generator=generator)
        level = 0.1 + (self.severity - 0.1) * torch.rand(shape, generator=generator)
        sign = torch.randint(2, shape, generator=generator) * 2.0 - 1
        parts = -torch.log1p(-torch.rand(shape[:2], generator=generator))  # exponential; its shares are Dirichlet(1)
        weights = parts / parts.sum(1, keepdim=True)
        beyond = torch.arange(LONGEST) >= length[..., None]
        return AugMixParameters(
            change.masked_fill(beyond, -1), level, sign, weights, torch.rand(batch, generator=generator)
        )

    def apply(self, images: UInt8[Tensor, "batch 3 height width"] | Images, drawn: AugMixParameters) -> Images:
        """Mix images, uint8 or in 0..1: clean x + (1 - clean) sum_c weight_c chain_c(x)."""
        x = zero_to_one(images)
        mixed = torch.zeros_like(x)
        for chain in range(drawn.change.shape[1]):
            found = (x * 255).round().clamp(0, 255).to(torch.uint8)
            for place in range(LONGEST):
                change = drawn.change[:, chain, place]
                for number in range(len(CHANGES)):
                    rows = (change == number).nonzero()[:, 0]
                    if len(rows):
                        level, sign = (part[rows, chain, place] for part in (drawn.level, drawn.sign))
                        at = rows.to(x.device)
                        found = found.index_copy(0, at, changed(found[at], CHANGES[number], level, sign))
            share = drawn.weights[:, chain].to(x.device, x.dtype)
            mixed = mixed + share[:, None, None, None] * zero_to_one(found).to(x.dtype)
        clean = drawn.clean.to(x.device, x.dtype)[:, None, None, None]
        return clean * x + (1 - clean) * mixed


def autocontrast(images: UInt8[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch 3 height width"]:
    """Scale each channel to 0..255. A channel of one value stays."""
    x = images.float()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = ((x - low) * (255 / (high - low).clamp(min=1))).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def equalize(images: UInt8[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch 3 height width"]:
    """Make each channel's histogram flat, as Pillow does. A channel whose step would be 0 stays."""
    x = images.flatten(2).long()
    counts = x.new_zeros(*x.shape[:2], 256).scatter_add_(2, x, torch.ones_like(x))
    highest = counts.gather(2, x.amax(2, keepdim=True))
    step = (x.shape[2] - highest) // 255
    table = (counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)
    found = torch.where(step > 0, table.clamp(0, 255).gather(2, x), x)
    return found.view(images.shape).to(torch.uint8)


def changed(
    images: UInt8[Tensor, "batch 3 height width"],
    change: str,
    level: Float[Tensor, " batch"],
    sign: Float[Tensor, " batch"],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Apply one change to images.

    Args:
        images: 0..255.
        change: name of CHANGES.
        level: strength, 0 to 10: at 10, posterize keeps no bit, solarize inverts all, and the others turn by 30 degrees, shear by
            0.3 and move by a third of the side.
        sign: direction, -1 or 1.
    """
    if change == "autocontrast":
        return autocontrast(images)
    if change == "equalize":
        return equalize(images)
    if change == "posterize":
        bits = 4 - (level * 4 / 10).long()
        step = (2 ** (8 - bits)).to(images.device)[:, None, None, None]
        return (images.long() // step * step).to(torch.uint8)
    if change == "solarize":
        threshold = (256 - (level * 256 / 10).long()).to(images.device)[:, None, None, None]
        return torch.where(images >= threshold, 255 - images, images)
    height, width = images.shape[2:]
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    rows = [one, zero, zero, zero, one, zero]
    if change == "rotate":
        angle = sign * (level * 3).long() * math.pi / 180
        rows = [
            angle.cos(),
            -angle.sin() * height / width,
            zero,
            angle.sin() * width / height,
            angle.cos(),
            zero,
        ]
    elif change.startswith("shear"):
        amount = sign * level * 0.03
        ratio = height / width
        rows[1 if change == "shear-x" else 3] = amount * (ratio if change == "shear-x" else 1 / ratio)
    else:
        side = width if change == "translate-x" else height
        rows[2 if change == "translate-x" else 5] = sign * (level * side / 30).long() * 2 / side
    theta = torch.stack([part.float() for part in rows], 1).view(-1, 2, 3).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)
