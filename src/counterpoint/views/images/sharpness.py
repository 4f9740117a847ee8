"""Make sharper and softer copies of pictures: the positives and negatives of contrastive restoration (PCL-SR)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.errors import CounterpointError
from counterpoint.views.images.colours import Images
from counterpoint.views.images.degraded import eight_bit, enlarged
from counterpoint.views.images.resampling import blur_across

KERNELS = (3, 5, 7, 9, 11)  # sizes of a blur's window, in pixels
NOISE = 2 / 255  # standard deviation of the noisy positive


def sharpen(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Move each image away from its smoothed copy: clamp(S + factor (x - S)) to 0..1.

    S is the mean of 3 x 3 pixels in which the middle has weight 5 of 13. At the border S is x.

    Args:
        images: floating point in 0..1.
        factor: for each image; below 1 blurs, 1 changes nothing, above 1 sharpens.

    Source: torchvision.transforms.v2.functional.adjust_sharpness, with a factor for each image.
    """
    kernel = images.new_ones(3, 3)
    kernel[1, 1] = 5
    channels = images.shape[1]
    weight = (kernel / 13).expand(channels, 1, 3, 3)
    smooth = images.clone()
    if min(images.shape[2:]) > 2:
        smooth[..., 1:-1, 1:-1] = F.conv2d(images, weight, groups=channels)
    return smooth.lerp(images, factor.to(images)[:, None, None, None]).clamp_(0, 1)


@dataclass
class SampleParameters:
    """The random parameters of the samples of B pictures. Blurs are the same for all pictures."""

    factors: Float[Tensor, "batch copies"]
    blurs: list[tuple[int, int, float, float]]  # taps down and across, sigmas down and across
    noise: Float[Tensor, "batch 3 height width"] | None

    def take(self, rows: slice | Tensor) -> SampleParameters:
        """Select the parameters of some pictures."""
        return SampleParameters(self.factors[rows], self.blurs, None if self.noise is None else self.noise[rows])


def need_rising(low: float, **ranges: tuple[float, float]) -> None:
    """Raise CounterpointError for the first of these ranges that is not two rising, finite numbers of at least `low`."""
    for name, (least, most) in ranges.items():
        if not low <= least <= most < math.inf:
            raise CounterpointError(f"{name} must be two rising numbers of at least {low:g}, got {(least, most)}")


@dataclass(frozen=True)
class Samples:
    """Draw and make positives and negatives of the same scene.

    Args:
        copies: number K of sharpened positives, and of blurred negatives, at least 0.
        sharpness: least and greatest factor of a sharpened positive.
        sigma: least and greatest deviation of a blur, in pixels, above 0.
        kernels: window sizes of a blur, odd.
        noisy: whether a copy with Gaussian noise of 2 grey levels is a positive, too.
    """

    copies: int = 3
    sharpness: tuple[float, float] = (0.5, 3.0)
    sigma: tuple[float, float] = (0.1, 2.0)
    kernels: Sequence[int] = KERNELS
    noisy: bool = False

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> SampleParameters:
        """Draw the parameters of pictures of this shape, [B, 3, H, W]."""
        least, most = self.sharpness
        factors = least + (most - least) * torch.rand(shape[0], self.copies, generator=generator)
        taps = torch.randint(len(self.kernels), (self.copies, 2), generator=generator).tolist()
        low, high = self.sigma
        sigmas = (low + (high - low) * torch.rand(self.copies, 2, generator=generator)).tolist()
        blurs = [(self.kernels[a], self.kernels[b], *s) for (a, b), s in zip(taps, sigmas, strict=True)]
        noise = NOISE * torch.randn(*shape, generator=generator) if self.noisy else None
        return SampleParameters(factors, blurs, noise)

    @torch.no_grad()
    def apply(self, high: Images, low: Images, drawn: SampleParameters) -> tuple[list[Tensor], list[Tensor]]:
        """Return positives and negatives, each a list of pictures like `high`.

        Positives are `high` and its sharpened copies. Negatives are `low`, enlarged, and blurred copies of `high`. Copies are
        rounded to 8 bits.

        Args:
            high: pictures in 0..1.
            low: the same pictures in any size, in 0..1.
            drawn: the parameters of these pictures.

        Raises CounterpointError for pictures that are too small for a blur's window.
        """
        taps = max([n for a, b, *_ in drawn.blurs for n in (a, b)], default=1)
        if taps // 2 >= min(high.shape[2:]):
            raise CounterpointError(f"a blur of {taps} taps needs pictures larger than {list(high.shape[2:])}")
        positives, negatives = [high], [enlarged(low, high.shape[2:])]
        for number, (down, across, *sigmas) in enumerate(drawn.blurs):
            positives.append(eight_bit(sharpen(high, drawn.factors[:, number])))
            negatives.append(eight_bit(blur_across(high, (down, across), (sigmas[0], sigmas[1]))))
        if drawn.noise is not None:
            positives.append(eight_bit(high + drawn.noise.to(high)))
        return positives, negatives
