"""Make pairs of a small and a large picture for restoration: bicubic scaling, and patches cut from both at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.views.images.colours import Images, zero_to_one


def eight_bit(images: Tensor) -> Tensor:
    """Clamp images to 0..1 and round them to the 256 levels of 8 bits; the result is floating point."""
    return (images.clamp(0, 1) * 255).round_().div_(255)


def cropped(images: Tensor, multiple: int) -> Tensor:
    """Cut rows and columns at the end, so that height and width are multiples of this number."""
    height, width = (side // multiple * multiple for side in images.shape[-2:])
    return images[..., :height, :width]


def downscaled(images: Images, scale: int) -> Images:
    """Scale pictures down by a whole number with an antialiased bicubic filter, and round them to 8 bits.

    The filter (a = -0.5, widened by the scale) is that of Pillow and of MATLAB's imresize.

    Args:
        images: floating point in 0..1; height and width are multiples of `scale`.
        scale: at least 1.
    """
    size = [side // scale for side in images.shape[-2:]]
    return eight_bit(F.interpolate(images, size=size, mode="bicubic", antialias=True))


def upscaled(images: Images, scale: int) -> Images:
    """Scale pictures up by a whole number with the same bicubic filter; the result may lie outside 0..1."""
    size = [side * scale for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def enlarged(images: Images, size: Sequence[int]) -> Images:
    """Scale pictures to [height, width] between their corners' centres, bicubically (a = -0.75), and clamp them to 0..1."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bicubic", align_corners=True).clamp_(0, 1)


@dataclass
class PairParameters:
    """The random parameters of one pair of patches of each of B pictures."""

    corners: Int[Tensor, "batch 2"]  # top and left, in pixels of the small picture
    turned: Bool[
        Tensor, "batch 3"
    ]  # whether to flip left and right, to flip top and bottom, to exchange rows and columns

    def take(self, rows: slice | Tensor) -> PairParameters:
        """Select the parameters of some pictures."""
        return PairParameters(self.corners[rows], self.turned[rows])


@dataclass(frozen=True)
class PatchPairs:
    """Cut a patch of each picture and the same patch of its small copy, flipped and turned at random.

    Args:
        scale: ratio of the pictures' sides, at least 1.
        patch: height and width of the large patch in pixels, a multiple of `scale`.
    """

    scale: int
    patch: int

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> PairParameters:
        """Draw the parameters of large pictures of this shape, [B, 3, H, W], in all eight orientations alike."""
        room = [side // self.scale - self.patch // self.scale + 1 for side in shape[-2:]]
        corners = torch.stack([(torch.rand(shape[0], generator=generator) * free).long() for free in room], 1)
        return PairParameters(corners, torch.rand(shape[0], 3, generator=generator) < 0.5)

    def apply(
        self, images: Tensor, drawn: PairParameters
    ) -> tuple[Float[Tensor, "batch 3 small small"], Float[Tensor, "batch 3 patch patch"]]:
        """Return the small and the large patches of whole pictures, uint8 or in 0..1. The whole picture is scaled down."""
        whole = cropped(zero_to_one(images), self.scale)
        small = downscaled(whole, self.scale)
        pairs = []
        for picture, unit in ((small, 1), (whole, self.scale)):
            side = self.patch * unit // self.scale
            within = torch.arange(side, device=picture.device)
            top, left = (drawn.corners.to(picture.device)[:, axis, None] * unit + within for axis in (0, 1))
            rows = torch.arange(len(picture), device=picture.device)[:, None, None]
            cut = picture.movedim(1, 3)[rows, top[:, :, None], left[:, None, :]].movedim(3, 1)
            for number, change in enumerate((lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3))):
                chosen = drawn.turned[:, number].to(cut.device)[:, None, None, None]
                cut = torch.where(chosen, change(cut), cut)
            pairs.append(cut)
        return pairs[0], pairs[1]
