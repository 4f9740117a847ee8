"""Define losses of feature maps: cells of two crops that show the same place of a picture."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss

Maps = Float[Tensor, "n channels rows columns"]
Coords = Float[Tensor, "n 4"]


class PixPro(Loss):
    """Consistency of propagated cells with a teacher's cells at the same place of the picture.

    Args:
        channels: Channels of the maps.
        value_layers: Layers of the transform of propagated values: 1 or 0 (none).
        p: Exponent of the similarity, > 0.
        clamp: Lower bound of the similarity.
        pos_ratio: Largest distance of two cells that agree, in cell diagonals, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | proj_1, proj_2 | [n, channels, rows, columns] | the student's projections of two crops |
        | key_1, key_2 | as proj_1 | the teacher's projections, no gradient |
        | coord_1, coord_2 | [n, 4] | left, top, right, bottom of the crops in the picture; a flip exchanges left and right |

    Relations: PixelRegression is the same for cells that another module predicts. PixContrast has negatives.

    Source: Xie and others, arXiv 2011.10043.

    >>> maps, whole = torch.eye(2).view(1, 2, 1, 2), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> PixPro(2, value_layers=0, pos_ratio=0.2)(maps, maps, maps, maps, whole, whole)
    tensor(-4.0000)
    """

    calls = "pixpro:pixpro_loss"

    def __init__(
        self,
        channels: int,
        value_layers: int = 1,
        p: float = 2.0,
        clamp: float = 0.0,
        pos_ratio: float = 0.7,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        if value_layers not in (0, 1):
            raise ValueError(f"value_layers must be 0 or 1, got {value_layers}")
        need_positive(p=p, pos_ratio=pos_ratio)
        self.channels, self.value_layers, self.p, self.clamp, self.pos_ratio = (
            channels,
            value_layers,
            p,
            clamp,
            pos_ratio,
        )
        self.value = nn.Conv2d(channels, channels, 1) if value_layers else None

    def forward(
        self, proj_1: Maps, proj_2: Maps, key_1: Maps, key_2: Maps, coord_1: Coords, coord_2: Coords
    ) -> Float[Tensor, ""]:
        """Return the loss, from -4 to 4."""
        with over(self.group):
            return self.function(
                proj_1, proj_2, key_1, key_2, coord_1, coord_2, self.value, self.p, self.clamp, self.pos_ratio
            )


class PixelRegression(Loss):
    """Consistency of predicted cells with a teacher's cells at the same place of the picture.

    Args:
        pos_ratio: Largest distance of two cells that agree, in cell diagonals, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | prediction_1, prediction_2 | [n, channels, rows, columns] | the student's predictions for two crops |
        | key_1, key_2 | as prediction_1 | the teacher's projections, no gradient |
        | coord_1, coord_2 | [n, 4] | left, top, right, bottom of the crops in the picture; a flip exchanges left and right |

    Relations: PixPro with another predictor in the place of the propagation.

    Source: Xie and others, arXiv 2011.10043.

    >>> maps, whole = torch.eye(2).view(1, 2, 1, 2), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> PixelRegression(0.2)(maps, maps, maps, maps, whole, whole)
    tensor(-4.0000)
    """

    calls = "pixpro:pixel_regression"

    def __init__(self, pos_ratio: float = 0.7, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(pos_ratio=pos_ratio)
        self.pos_ratio = pos_ratio

    def forward(
        self, prediction_1: Maps, prediction_2: Maps, key_1: Maps, key_2: Maps, coord_1: Coords, coord_2: Coords
    ) -> Float[Tensor, ""]:
        """Return the loss, from -4 to 4."""
        with over(self.group):
            return self.function(prediction_1, prediction_2, key_1, key_2, coord_1, coord_2, self.pos_ratio)


class PixContrast(Loss):
    """InfoNCE over the cells of two crops: cells at the same place are positives, all cells of the other crop are candidates.

    Args:
        temperature: Divisor of the cosines, > 0.
        pos_ratio: Largest distance of positive cells, in cell diagonals, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | proj_1, proj_2 | [n, channels, rows, columns] | the student's projections of two crops |
        | key_1, key_2 | as proj_1 | the teacher's projections, no gradient |
        | coord_1, coord_2 | [n, 4] | left, top, right, bottom of the crops in the picture; a flip exchanges left and right |

    Relations: PixPro has no negatives, and propagates the student's cells.

    Source: Xie and others, arXiv 2011.10043.

    >>> maps, whole = torch.eye(2).view(1, 2, 1, 2), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> PixContrast(1.0, 0.2)(maps, maps, maps, maps, whole, whole)  # log(1 + 1/e)
    tensor(0.3133)
    """

    calls = "pixpro:pix_contrast"

    def __init__(self, temperature: float = 0.3, pos_ratio: float = 0.7, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, pos_ratio=pos_ratio)
        self.temperature, self.pos_ratio = temperature, pos_ratio

    def forward(
        self, proj_1: Maps, proj_2: Maps, key_1: Maps, key_2: Maps, coord_1: Coords, coord_2: Coords
    ) -> Float[Tensor, ""]:
        """Return the loss, at least 0."""
        with over(self.group):
            return self.function(proj_1, proj_2, key_1, key_2, coord_1, coord_2, self.temperature, self.pos_ratio)
