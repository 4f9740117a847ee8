"""Define losses that keep what a network knew before it learns from new data."""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_within, need_word
from counterpoint.core.world import Group, over
from counterpoint.losses.base import BOUNDS, Loss, ScaledLoss


class CoconutNSPT(Loss):
    """COCONUT: rehearsed items are pulled to the old network's rows of their class, and pushed off the new network's rows.

    Args:
        temperature: Temperature, > 0.
        roles: "nspt" (default); "ntpt": negatives of the old network, too; "scl": neither, which is SupCon of the whole batch.
        own_positive: Count an item's own old row among its positives (default).
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, dim] | embeddings of any norm by the network that is trained |
        | teacher | [n, dim] | those of the same items by the network before; no gradient |
        | labels | [n] int | class of each item |
        | rehearsal | [n] bool | True for items from the memory, which are the anchors |

    State: none.

    Relations: with roles="scl" it is SupConSingleView whose anchors without a positive count as 0.

    Source: Cappellazzo et al., arXiv 2310.02699.

    >>> import torch
    >>> x = torch.eye(2)
    >>> CoconutNSPT(temperature=0.5)(x, x, torch.tensor([0, 1]), torch.tensor([True, True]))
    tensor(-2.)
    """

    calls = "coconut:coconut_nspt"

    def __init__(
        self,
        temperature: float = 0.1,
        roles: Literal["nspt", "ntpt", "scl"] = "nspt",
        *,
        own_positive: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        need_word(("nspt", "ntpt", "scl"), roles=roles)
        self.temperature, self.roles, self.own_positive = temperature, roles, own_positive

    def forward(
        self,
        student: Float[Tensor, "n dim"],
        teacher: Float[Tensor, "n dim"],
        labels: Int[Tensor, " n"],
        rehearsal: Bool[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return the mean over rehearsed items."""
        settings = self.temperature, self.roles, self.own_positive
        with over(self.group):
            loss: Tensor = self.function(student, teacher, labels, rehearsal, *settings)
        return loss


class CoconutMM(Loss):
    """COCONUT: CLIP of sounds and transcripts, in which pairs of one class are positives of each other.

    Args:
        temperature: Temperature, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | audio, text | [n, dim] | embeddings of any norm, in the same order |
        | labels | [n] int | class of each pair; None: its own pair is the only positive |

    State: none.

    Relations: without labels it is CLIP at a fixed temperature.

    Source: Cappellazzo et al., arXiv 2310.02699.

    >>> import torch
    >>> x = torch.eye(2)
    >>> CoconutMM(temperature=1.0)(x, x)
    tensor(0.3133)
    """

    calls = "coconut:coconut_mm"

    def __init__(self, temperature: float = 0.1, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self, audio: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"], labels: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, ""]:
        """Return the mean over both directions."""
        with over(self.group):
            loss: Tensor = self.function(audio, text, labels, self.temperature)
        return loss


class ModX(ScaledLoss):
    """Mod-X: CLIP of new pairs, and the divergence of their similarities from those by the network before.

    Args:
        temperature: Initial temperature of the contrast, in 0.01..1.
        alpha: Weight of the divergence, at least 0.
        reduction: "sum" of the divergence over trusted rows (the authors'), or "mean" over all rows.
        learnable: Learn the temperature, within its bounds. False: keep it fixed.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image, text | [n, dim] | embeddings of any norm, in the same order |
        | image_old, text_old | [n, old_dim] | those of the same pairs by the network before; no gradient |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: with alpha=0 it is CLIP. AffinityMimicking follows all rows of a teacher, at temperatures of its own.

    Source: Ni et al., arXiv 2305.07437.

    >>> x = torch.eye(2)
    >>> ModX(temperature=1.0)(x, x, x, x).detach()
    tensor(0.3133)
    """

    calls = "mod-x:mod_x"

    def __init__(
        self,
        temperature: float = 0.07,
        alpha: float = 20.0,
        reduction: Literal["sum", "mean"] = "sum",
        *,
        learnable: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group, BOUNDS)
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
        self.alpha, self.reduction = alpha, reduction

    def forward(
        self,
        image: Float[Tensor, "n dim"],
        text: Float[Tensor, "n dim"],
        image_old: Float[Tensor, "n old_dim"],
        text_old: Float[Tensor, "n old_dim"],
    ) -> Float[Tensor, ""]:
        """Return contrast + alpha divergence."""
        with over(self.group):
            found = self.function(image, text, image_old, text_old, self.scale(), self.alpha, self.reduction)
        loss: Tensor = found.loss
        return loss


class MulKI(Loss):
    """MulKI: cross-entropy by class texts, their contrast with prototypes, and relations as several teachers see them.

    Args:
        logit_scale: Factor of cosines, > 0.
        l1, l2: Weights of the contrast and of the teachers, at least 0.
        feature_weight: Weight of the squared distance of embeddings within the teachers' part, at least 0.
        temperature: Divisor of scaled cosines in the relations, > 0.
        weights: "adaptive" for each image, by the teachers' probability of its class, or "equal".
        label_smoothing: Of the cross-entropy, 0 to 1.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image | [n, dim] | embeddings of any norm |
        | text | [classes, dim] | embeddings of the task's class texts |
        | labels | [n] | class numbers, positions in text |
        | teacher_images | [teachers, n, dim] | the teachers' embeddings; no gradient |
        | teacher_texts | [teachers, classes, dim] | the teachers' class texts; no gradient |
        | prototypes | [classes, dim] | class means; only the contrast gives them a gradient |

    Relations: the form is this library's choice, as the paper's equations could not be read. PromptKD follows one teacher's logits.

    Source: Zhang et al., arXiv 2411.06764, for the parts.

    >>> import torch
    >>> x = torch.eye(2)
    >>> MulKI(logit_scale=1.0)(x, x, torch.tensor([0, 1]), x[None], x[None], x)
    tensor(0.3446)
    """

    calls = "mulki:mulki_loss"

    def __init__(
        self,
        logit_scale: float = 100.0,
        l1: float = 0.1,
        l2: float = 1.0,
        feature_weight: float = 1.0,
        temperature: float = 2.0,
        weights: Literal["adaptive", "equal"] = "adaptive",
        label_smoothing: float = 0.0,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(logit_scale=logit_scale, temperature=temperature)
        need_within(0, math.inf, l1=l1, l2=l2, feature_weight=feature_weight)
        need_within(0, 1, label_smoothing=label_smoothing)
        self.logit_scale, self.l1, self.l2, self.feature_weight = logit_scale, l1, l2, feature_weight
        self.temperature, self.weights, self.label_smoothing = temperature, weights, label_smoothing

    def forward(
        self,
        image: Float[Tensor, "n dim"],
        text: Float[Tensor, "classes dim"],
        labels: Int[Tensor, " n"],
        teacher_images: Float[Tensor, "teachers n dim"],
        teacher_texts: Float[Tensor, "teachers classes dim"],
        prototypes: Float[Tensor, "classes dim"],
    ) -> Float[Tensor, ""]:
        """Return the weighted sum."""
        with over(self.group):
            loss: Tensor = self.function(
                *(image, text, labels, teacher_images, teacher_texts, prototypes, self.logit_scale, self.l1, self.l2),
                feature_weight=self.feature_weight,
                temperature=self.temperature,
                weights=self.weights,
                label_smoothing=self.label_smoothing,
            ).loss
        return loss
