"""Define the losses of bags of instances with one label for each bag."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.distributed import gather_rows, global_max
from counterpoint.core.mil import bag_cross_entropy
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class MIL(Loss):
    """Multiple-instance learning: binary cross-entropy of a bag's probability, the sigmoid of its mean top-k logit.

    Args:
        divisor: The k = floor(length / divisor) + 1 largest logits of a bag count; > 0.
        group: Processes whose bags are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | logits | [bags, time] | one for each instance; those beyond a bag's length are ignored |
        | seq_len | [bags] | number of instances of each bag, at least 1 |
        | labels | [bags] | 1 where the bag holds a positive instance, else 0 |

    Relations: MACILSD is the contrast that is added to this loss.

    Source: MACIL-SD, arXiv 2207.05500, Sec. 3.2.

    >>> MIL()(torch.zeros(2, 20), torch.tensor([20, 5]), torch.tensor([1.0, 0.0]))
    tensor(0.6931)
    """

    calls = "macil-sd:topk_mil_pool"

    def __init__(self, divisor: int = 16, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(divisor=divisor)
        self.divisor = divisor

    def forward(
        self, logits: Float[Tensor, "bags time"], seq_len: Int[Tensor, " bags"], labels: Float[Tensor, " bags"]
    ) -> Float[Tensor, ""]:
        """Return the mean over bags."""
        probability = self.function(logits, seq_len, divisor=self.divisor)
        with over(self.group):
            return bag_cross_entropy(gather_rows(probability), gather_rows(labels.to(probability.dtype)))


class MACILSD(Loss):
    """MACIL-SD's contrast of semi-bags: one modality's violent mean against the other's background and normal rows.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        group: Processes whose bags together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | bag_prob | [bags] | the network's probability of each bag |
        | audio_prob, visual_prob | [bags, time] | each modality's probability of each instance |
        | seq_len | [bags] | number of instances of each bag, at least 1 |
        | audio_rep, visual_rep | [bags, time, hidden] | features of each instance; the probabilities choose the instances |

    Relations: four InfoNCE losses, added: audio to visual against background and normal rows, and visual to audio.

    Source: Yu et al., arXiv 2207.05500, Eqs. 5 to 8.

    >>> p, rep = torch.rand(4, 20), torch.randn(4, 20, 8)
    >>> MACILSD()(torch.tensor([0.9, 0.1, 0.8, 0.2]), p, p, torch.full((4,), 20), rep, rep).shape
    torch.Size([])
    """

    calls = "macil-sd:semi_bag_contrast"

    def __init__(self, temperature: float = 0.1, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        bag_prob: Float[Tensor, " bags"],
        audio_prob: Float[Tensor, "bags time"],
        visual_prob: Float[Tensor, "bags time"],
        seq_len: Int[Tensor, " bags"],
        audio_rep: Float[Tensor, "bags time hidden"],
        visual_rep: Float[Tensor, "bags time hidden"],
    ) -> Float[Tensor, ""]:
        """Return the sum of the four terms; 0 where no bag is predicted positive, or none negative."""
        with over(self.group):
            longest = global_max(audio_prob.shape[1], audio_prob.device)

            def whole(x: Tensor) -> Tensor:
                missing = longest - x.shape[1] if x.ndim > 1 else 0
                return gather_rows(F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x)

            terms = self.function(
                *(whole(x) for x in (bag_prob, audio_prob, visual_prob, seq_len, audio_rep, visual_rep)),
                self.temperature,
            )
        loss = torch.stack(terms).sum()
        if not loss.requires_grad:  # no pair to contrast: return 0 as a loss that can be differentiated
            loss = loss + 0 * (audio_rep.sum() + visual_rep.sum())
        return loss
