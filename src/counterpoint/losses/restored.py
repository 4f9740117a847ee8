"""Define losses of restored pictures: feature maps contrasted with those of sharper and softer copies, and a critic's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss

Maps = Float[Tensor, "n channels height width"]
Copies = Float[Tensor, "copies n channels height width"] | Sequence[Maps]


class PatchNCE(Loss):
    """Contrast feature maps with positives and negatives of the same picture, each positive with all negatives.

    Args:
        include_positive_in_denominator: False: LMCL, the positive is left out of the denominator.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | anchor | [n, channels, height, width] | maps of restored pictures |
        | positives | [copies, n, channels, height, width], or a list | maps of originals and sharper copies; no gradient |
        | negatives | [copies, n, channels, height, width], or a list | maps of softer copies; no gradient |

    Relations: InfoNCE takes its negatives from other examples of the batch.

    Source: Wu, Jiang and Liu, arXiv 2111.13924.

    >>> import torch
    >>> a = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    >>> PatchNCE()(a, [a], [-a])
    tensor(0.1269)
    """

    calls = "pcl-sr:patch_nce"

    def __init__(self, include_positive_in_denominator: bool = True, *, group: Group = None) -> None:
        super().__init__(group)
        self.include_positive_in_denominator = include_positive_in_denominator

    def forward(self, anchor: Maps, positives: Copies, negatives: Copies) -> Float[Tensor, ""]:
        """Return the mean over pictures and positives."""
        with over(self.group):
            return self.function(anchor, positives, negatives, self.include_positive_in_denominator)


class FeatureRatio(Loss):
    """Compare the nearness of feature maps to positives with that to negatives, over several layers.

    Args:
        kind: "cosine": the difference of cosines; "l2": the ratio of 1 - cosine; "l1": the ratio of absolute differences.
        layer_weight: Weight layer number j by 1 / 2^j.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | anchors | list of [n, channels, height, width] | maps of restored pictures, one for each layer |
        | positives | list of [copies, n, channels, height, width], or of lists | for each layer; no gradient |
        | negatives | list of [copies, n, channels, height, width], or of lists | for each layer; no gradient |

    Relations: with kind="l1", one positive and one negative it is the ratio of earlier contrastive restoration.

    Source: Wu, Jiang and Liu, arXiv 2111.13924, the authors' code.

    >>> import torch
    >>> a = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    >>> FeatureRatio()([a], [[a]], [[a.flip(1)]])
    tensor(-1.)
    """

    calls = "pcl-sr:feature_ratio"

    def __init__(
        self, kind: Literal["cosine", "l1", "l2"] = "cosine", layer_weight: bool = False, *, group: Group = None
    ) -> None:
        super().__init__(group)
        if kind not in ("cosine", "l1", "l2"):
            raise ValueError(f"kind must be cosine, l1 or l2, got {kind!r}")
        self.kind, self.layer_weight = kind, layer_weight

    def forward(
        self, anchors: Sequence[Maps], positives: Sequence[Copies], negatives: Sequence[Copies]
    ) -> Float[Tensor, ""]:
        """Return the difference or ratio of the means over pictures."""
        with over(self.group):
            found: Any = self.function(anchors, positives, negatives, self.kind, self.layer_weight)
        loss: Tensor = found.loss
        return loss


class DualContrast(Loss):
    """Train a critic: each logit of real pictures against all of fake ones, and each fake one against all real ones.

    Args:
        group: Processes whose logits together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | real | any | logits of real pictures |
        | fake | any | logits of fake pictures |

    Relations: with one logit each it is twice the logistic loss of their difference.

    Source: Wu, Jiang and Liu, arXiv 2111.13924; the dual contrastive loss of Yu et al., arXiv 2103.16748.

    >>> import torch
    >>> DualContrast()(torch.zeros(1), torch.zeros(1))
    tensor(1.3863)
    """

    calls = "pcl-sr:contrastive_discriminator"

    def forward(self, real: Float[Tensor, ...], fake: Float[Tensor, ...]) -> Float[Tensor, ""]:
        """Return the sum of both directions, each a mean over logits."""
        with over(self.group):
            return self.function(real, fake)
