"""Define losses that spread rows over the sphere, within a modality or across two."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class Uniformity(Loss):
    """Uniformity: the log of the mean over pairs of exp(-sharpness d^2). It is low where rows are spread over the sphere.

    Args:
        sharpness: Factor of the squared distances, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | x | [n, dim] | embeddings, of any norm |

    Relations: ContrastiveGap adds it to CLIP. CrossUniformity is the same between two modalities.

    Source: Wang and Isola, arXiv 2005.10242.

    >>> Uniformity()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor(-4.)
    """

    calls = "contrastive-gap:uniformity"

    def __init__(self, sharpness: float = 2.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(sharpness=sharpness)
        self.sharpness = sharpness

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the loss, from -4 times the sharpness to 0 (all rows equal)."""
        with over(self.group):
            return self.function(x, self.sharpness)


class CrossUniformity(Loss):
    """Uniformity across modalities: low where rows of different items lie far apart.

    Args:
        sharpness: Factor of the squared distances, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | x | [n, dim] | embeddings of one modality, of any norm |
        | y | [n, dim] | embeddings of the other, in the same order |

    Relations: Uniformity is the same within one modality.

    Source: Fahim, Murphy and Fyshe, arXiv 2405.18570.

    >>> CrossUniformity()(torch.eye(2), torch.eye(2))
    tensor(-4.)
    """

    calls = "contrastive-gap:cross_uniformity"

    def __init__(self, sharpness: float = 2.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(sharpness=sharpness)
        self.sharpness = sharpness

    def forward(self, x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the loss, from -4 times the sharpness to 0."""
        with over(self.group):
            return self.function(x, y, self.sharpness)


class ContrastiveGap(Loss):
    """CLIP's loss plus uniformity and alignment, so that two modalities share one region of the sphere.

    Args:
        temperature: Fixed temperature, > 0.
        uniformity, alignment, cross_uniformity, contrastive: Weight of each term. True: 1. False: without the term.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | x | [n, dim] | embeddings of one modality, of any norm |
        | y | [n, dim] | embeddings of the other, in the same order |

    Relations: CLIP with a fixed temperature, plus Uniformity of each side, plus the mean squared distance of pairs.

    Source: Fahim, Murphy and Fyshe, arXiv 2405.18570.

    >>> ContrastiveGap(temperature=1.0)(torch.eye(2), torch.eye(2)).shape
    torch.Size([])
    """

    calls = "contrastive-gap:contrastive_gap_loss"

    def __init__(
        self,
        temperature: float = 0.01,
        *,
        uniformity: bool | float = True,
        alignment: bool | float = True,
        cross_uniformity: bool | float = False,
        contrastive: bool | float = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.uniformity, self.alignment = temperature, uniformity, alignment
        self.cross_uniformity, self.contrastive = cross_uniformity, contrastive

    def forward(self, x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the sum of the terms that count."""
        with over(self.group):
            loss: Tensor = self.function(
                x,
                y,
                self.temperature,
                self.uniformity,
                self.alignment,
                self.cross_uniformity,
                self.contrastive,
            ).loss
        return loss
