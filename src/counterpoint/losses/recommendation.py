"""Define losses of recommendation: the next item, and contrast with learned views of histories."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class NextItem(Loss):
    """Cross-entropy of the products of states and all items with the next items: the full softmax of SASRec's successors.

    Args:
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | state | [n, dim] | states of histories, of any norm |
        | items | [items, dim] | embeddings of all items |
        | target | [n] | numbers of the next items |

    Relations: InfoNCE with all items as the bank, without normalisation.

    Source: Qin et al., arXiv 2304.07763, Eq. 4.

    >>> import torch
    >>> NextItem()(torch.zeros(1, 2), torch.eye(2), torch.tensor([1]))
    tensor(0.6931)
    """

    calls = "mclrec:next_item_loss"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(
        self, state: Float[Tensor, "n dim"], items: Float[Tensor, "items dim"], target: Int[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """Return the mean over the states."""
        with over(self.group):
            return self.function(state, items, target)


class ScoreSpread(Loss):
    """MCLRec's regulariser: penalise positives above the hardest negative, and negatives below the largest product.

    Args:
        temperature: Divisor of the products, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | a | [n, dim] | rows of any norm |
        | b | [n, dim] | their partners, in the same order |

    Relations: it opposes NTXent, whose products spread without limit.

    Source: Qin et al., arXiv 2304.07763, Sec. 3.4, as in the authors' code.

    >>> import torch
    >>> ScoreSpread()(torch.eye(3), torch.eye(3))
    tensor(2.)
    """

    calls = "mclrec:score_spread_regulariser"

    def __init__(self, temperature: float = 1.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, a: Float[Tensor, "n dim"], b: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the regulariser, a mean over all 2n rows."""
        with over(self.group):
            return self.function(a, b, self.temperature)


class LearnedViews(Loss):
    """MCLRec's contrast of two states with two views that small networks make of them.

    Args:
        dim: Width of the states, at least 4.
        temperature: Divisor of the regulariser's products, > 0.
        regulariser: Weight of the regulariser (`ScoreSpread`), at least 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | h1 | [n, dim] | states of the first views, of any norm |
        | h2 | [n, dim] | states of the second views, in the same order |

    State: the networks `augmenters`. Train them in a turn of their own, with an optimiser of their own and states without gradient;
    leave their parameters out of the encoder's optimiser.

    Relations: a sum of three NTXent with the dot product, and ScoreSpread of the same pairs.

    Source: Qin et al., arXiv 2304.07763, Eq. 8 to 12.

    >>> import torch
    >>> bool(LearnedViews(4)(torch.eye(4), torch.eye(4)) > 0)
    True
    """

    calls = "mclrec:mclrec_contrast"

    def __init__(self, dim: int, temperature: float = 1.0, regulariser: float = 0.1, *, group: Group = None) -> None:
        from counterpoint.encoders.histories import Augmenter

        super().__init__(group)
        need_positive(temperature=temperature)
        if dim < 4 or not regulariser >= 0:
            raise ValueError(f"dim must be at least 4 and regulariser at least 0, got {dim} and {regulariser}")
        self.dim, self.temperature, self.regulariser = dim, temperature, regulariser
        self.augmenters = nn.ModuleList(Augmenter(dim) for _ in range(2))

    def forward(self, h1: Float[Tensor, "n dim"], h2: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the contrasts and the weighted regularisers, summed."""
        with over(self.group):
            return self.function(
                h1, h2, *self.augmenters, self.temperature, self.regulariser > 0, reg_weight_inside=self.regulariser
            )
