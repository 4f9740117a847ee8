"""Define losses of predicted masks."""

from __future__ import annotations

from jaxtyping import Float, Integer
from torch import Tensor

from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class SoftDice(Loss):
    """Soft Dice: 1 minus the mean over pictures and classes of the Dice coefficient of softmax outputs.

    Args:
        foreground: Leave out class 0, the background.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | logits | [n, classes, height, width] | one number per class and pixel |
        | masks | [n, height, width] | class numbers, 255 where unknown |

    Relations: torch.nn.CrossEntropyLoss weighs pixels alike; Dice weighs classes alike.

    Source: Milletari and others, arXiv 1606.04797, in the form of Chaitanya and others, arXiv 2006.10511.

    >>> SoftDice()(torch.tensor([[[[50.0, -50.0]], [[-50.0, 50.0]]]]), torch.tensor([[[0, 1]]]))
    tensor(0.)
    """

    calls = "global-local-seg:soft_dice_loss"

    def __init__(self, foreground: bool = False, *, group: Group = None) -> None:
        super().__init__(group)
        self.foreground = foreground

    def forward(
        self, logits: Float[Tensor, "n classes height width"], masks: Integer[Tensor, "n height width"]
    ) -> Float[Tensor, ""]:
        """Return the loss, from 0 to 1."""
        with over(self.group):
            return self.function(logits, masks, self.foreground)


class BinaryMask(Loss):
    """Weighted sum of binary cross-entropy and of 1 minus the Dice coefficient, the mean over pictures.

    Args:
        bce_weight: Weight of the cross-entropy, at least 0; default 0.8.
        dice_weight: Weight of the Dice term, at least 0; default 0.2.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | logits | [n, height, width] | one number per pixel |
        | masks | [n, height, width] | class numbers: 0 background, 255 unknown, others foreground |

    Relations: torch.nn.BCEWithLogitsLoss is this loss with dice_weight=0, where every pixel is known.

    Source: Milletari and others, arXiv 1606.04797, with the weights of ESP-MedSAM, arXiv 2407.14153.

    >>> BinaryMask()(torch.full((1, 2, 2), -50.0), torch.zeros(1, 2, 2).long())
    tensor(0.)
    """

    calls = "esp-medsam:binary_mask_loss"

    def __init__(self, bce_weight: float = 0.8, dice_weight: float = 0.2, *, group: Group = None) -> None:
        super().__init__(group)
        self.bce_weight, self.dice_weight = bce_weight, dice_weight

    def forward(
        self, logits: Float[Tensor, "n height width"], masks: Integer[Tensor, "n height width"]
    ) -> Float[Tensor, ""]:
        """Return the loss, at least 0."""
        with over(self.group):
            return self.function(logits, masks, self.bce_weight, self.dice_weight)
