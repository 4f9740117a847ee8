"""Define losses of predicted masks."""

from __future__ import annotations

from jaxtyping import Float, Int
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
        self, logits: Float[Tensor, "n classes height width"], masks: Int[Tensor, "n height width"]
    ) -> Float[Tensor, ""]:
        """Return the loss, from 0 to 1."""
        with over(self.group):
            return self.function(logits, masks, self.foreground)
