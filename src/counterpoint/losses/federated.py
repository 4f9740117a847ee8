"""Define losses of a server and its parties, which share representations of a public set."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class SoftContrastive(Loss):
    """Sum of the binary cross-entropies of all n^2 pairs, by a learned scale and shift of their distance.

    Args:
        negative_scale: Initial scale a, > 0.
        shift: Initial shift b, > 0. A pair at the distance b / a matches with probability 1/2.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image, text | [n, dim] | embeddings of any norm, in the same order |

    State: `a` and `b`, parameters for the optimiser.

    Relations: SigLIP is a binary loss of cosines, and a mean over pairs.

    Source: Yu et al., arXiv 2302.08888, after PCME (arXiv 2101.05068).

    >>> float(SoftContrastive()(torch.eye(2), torch.eye(2))) < 1e-4
    True
    """

    calls = "creamfl:soft_contrastive"

    def __init__(self, negative_scale: float = 15.0, shift: float = 15.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(negative_scale=negative_scale, shift=shift)
        self.negative_scale, self.shift = negative_scale, shift
        self.a, self.b = nn.Parameter(torch.tensor(negative_scale)), nn.Parameter(torch.tensor(shift))

    def forward(self, image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the sum over pairs and both directions."""
        with over(self.group):
            loss: Tensor = self.function(image, text, self.a, self.b)
        return loss


class PublicContrast(Loss):
    """CreamFL's contrast of a party of one modality with the representations of public items by the server.

    Args:
        weight: Factor of the sum of both terms.
        temperature: Of both terms, > 0.
        loss_scale: Divide the inter-modal term by its ratio to the other one, without gradient.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | emb | [n, dim] | embeddings of any norm of public items |
        | emb_old | [n, dim] | unit rows of the same items by the party's network before the round; no gradient |
        | global_same, global_cross | [public, dim] | the server's unit rows of all items, in this modality and the other |
        | public_index | [n] | rows of the batch's items in these |

    Relations: the inter-modal term is InfoNCE with all public items as keys.

    Source: Yu et al., arXiv 2302.08888.

    >>> x = torch.eye(2)
    >>> PublicContrast(weight=1.0)(x, x, x, x, torch.arange(2))
    tensor(0.8201)
    """

    calls = "creamfl:cream_uni"

    def __init__(
        self, weight: float = 0.5, temperature: float = 0.5, loss_scale: bool = False, *, group: Group = None
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.weight, self.temperature, self.loss_scale = weight, temperature, loss_scale

    def forward(
        self,
        emb: Float[Tensor, "n dim"],
        emb_old: Float[Tensor, "n dim"],
        global_same: Float[Tensor, "public dim"],
        global_cross: Float[Tensor, "public dim"],
        public_index: Int[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return weight (intra + inter)."""
        rows = (emb, emb_old, global_same, global_cross, public_index)
        with over(self.group):
            loss: Tensor = self.function(*rows, self.weight, self.temperature, self.loss_scale).loss
        return loss
