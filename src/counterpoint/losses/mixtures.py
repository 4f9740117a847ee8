"""Define losses of mixtures of examples, and of the soft targets that follow them in training."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class M3Co(Loss):
    """M3Co: contrast mixtures of two examples with another modality. The targets are the shares of the mixture.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        bidirectional: Contrast columns as well as rows.
        accumulate_targets: Where an example is mixed with itself, add both shares. False: the second replaces the first.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | mixed | [n, dim] | row i is the mixture of examples i and permutation(i) of one modality |
        | fixed | [n, dim] | the examples in another modality, unmixed |
        | permutation | [n] | the partner of each example, counted over the whole batch of a group |
        | share | [n] | share of example i in row i, in 0..1 |

    `counterpoint.functional.draw_mix` draws permutation and share; `functional.mix` mixes.

    Relations: with share 1 and accumulate_targets it is CLIP with a fixed temperature. MultiSClip replaces it later in training.

    Source: Kumar et al., arXiv 2409.17777.

    >>> M3Co(temperature=1.0)(torch.eye(2), torch.eye(2), torch.tensor([1, 0]), torch.ones(2))
    tensor(0.3133)
    """

    calls = "m3col:m3co_loss"

    def __init__(
        self,
        temperature: float = 0.1,
        bidirectional: bool = True,
        *,
        accumulate_targets: bool = False,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.bidirectional, self.accumulate_targets = temperature, bidirectional, accumulate_targets

    def forward(
        self,
        mixed: Float[Tensor, "n dim"],
        fixed: Float[Tensor, "n dim"],
        permutation: Int[Tensor, " n"],
        share: Float[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return the mean over rows, and over columns if bidirectional."""
        with over(self.group):
            return self.function(
                mixed,
                fixed,
                permutation,
                share,
                self.temperature,
                self.bidirectional,
                accumulate_targets=self.accumulate_targets,
            )


class MultiSClip(Loss):
    """MultiSClip: CLIP's contrast with soft targets, the softmax of the targets' own similarities.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | prediction | [n, dim] | embeddings of one modality |
        | target | [n, dim] | embeddings of the other, row by row; they make the targets and get a gradient too |

    Relations: CLIP has the diagonal as targets. M3Co is the contrast of mixtures that precedes it in training.

    Source: Kumar et al., arXiv 2409.17777.

    >>> MultiSClip(temperature=1.0)(torch.eye(2), torch.eye(2))
    tensor(0.5822)
    """

    calls = "m3col:multisclip_loss"

    def __init__(self, temperature: float = 0.125, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, prediction: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the mean of both directions."""
        with over(self.group):
            return self.function(prediction, target, self.temperature)
