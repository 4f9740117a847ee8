"""Define losses that contrast two or more modalities."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_within, need_word
from counterpoint.core.operands import scaled
from counterpoint.core.world import Group, over
from counterpoint.losses.base import BOUNDS, Loss, ScaledLoss, Views, unit_rows


class CLIP(ScaledLoss):
    """CLIP: contrast each image with all texts of the batch, and each text with all images.

    Args:
        temperature: Initial temperature, in 0.01..1.
        learnable: Learn the temperature, within these bounds. False: keep it fixed.
        ring: With a group, pass keys from process to process instead of gathering them: less memory, more time.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image | [n, dim] | embeddings of one modality |
        | text | [n, dim] | embeddings of the other, in the same order |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: NTXent also contrasts within each side. SigLIP classifies every pair independently. Symile takes more than two
    modalities.

    Source: Radford et al., arXiv 2103.00020, Figure 3.

    >>> round(CLIP(temperature=1.0)(torch.eye(3), torch.eye(3)).item(), 3)
    0.551
    """

    calls = "clip:clip"

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = True,
        ring: bool = False,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group, BOUNDS)
        self.ring, self.normalize = ring, normalize

    def forward(self, image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the mean of both directions."""
        rows = (unit_rows(x, normalize=self.normalize) for x in (image, text))
        with over(self.group):
            return self.function(*rows, self.scale(), ring=self.ring)


class SigLIP(ScaledLoss):
    """SigLIP: classify every pair of an image and a text by a sigmoid with a learnt temperature and bias.

    Args:
        temperature: Initial temperature, > 0.
        bias: Initial bias: about -log of the batch size.
        learnable: Learn both. False: keep them fixed.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image | [n, dim] | embeddings of one modality |
        | text | [n, dim] | embeddings of the other, in the same order |

    State: `log_scale` = log(1 / temperature) and `bias`, parameters for the optimiser (buffers if not learnable).

    Relations: CLIP has a softmax over the batch in place of sigmoids.

    Source: Zhai et al., arXiv 2303.15343, Eq. 1.

    >>> round(SigLIP(temperature=1.0, bias=0.0)(torch.eye(2), torch.eye(2)).item(), 3)
    1.006
    """

    calls = "siglip:siglip"
    bias: Float[Tensor, ""]

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        *,
        learnable: bool = True,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group)
        self.normalize = normalize
        value = torch.tensor(float(bias))
        if learnable:
            self.bias = nn.Parameter(value)
        else:
            self.register_buffer("bias", value)

    def forward(self, image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the sum over all pairs, divided by n."""
        rows = (unit_rows(x, normalize=self.normalize) for x in (image, text))
        with over(self.group):
            return self.function(*rows, self.scale(), self.bias)

    def extra_repr(self) -> str:
        """Return the settings by name, with the current temperature and bias."""
        return super().extra_repr().replace(", learnable", f", bias={float(self.bias.detach()):.4g}, learnable")


class CWCL(ScaledLoss):
    """CWCL: a new tower learns from a frozen tower. The similarity of the frozen features weights each pair.

    Args:
        temperature: Initial temperature, at least 0.01.
        sharpness: Exponent of the weights, at most 100; the paper uses 1.
        learnable: Learn the temperature, with a minimum of 0.01. False: keep it fixed.
        normalize: Divide each row of `query` and `key` by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | query | [n, dim] | embeddings of the tower that is trained |
        | key | [n, dim] | embeddings of the frozen tower, in the same order |
        | frozen | [n, frozen dim] | features of the frozen tower, for the weights; no gradient |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: CLIP with soft targets in one direction. MultiSClip has them in both.

    Source: Srinivasa et al., arXiv 2309.14580.

    >>> x = torch.eye(2)
    >>> round(CWCL(temperature=1.0)(x, x, torch.tensor([[1.0], [-1.0]])).item(), 3)
    0.627
    """

    calls = "cwcl:cwcl"

    def __init__(
        self,
        temperature: float = 0.07,
        sharpness: float = 1.0,
        *,
        learnable: bool = True,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group, (BOUNDS[0], math.inf))
        need_positive(sharpness=sharpness)
        self.sharpness, self.normalize = sharpness, normalize

    def forward(
        self, query: Float[Tensor, "n dim"], key: Float[Tensor, "n dim"], frozen: Float[Tensor, "n frozen_dim"]
    ) -> Float[Tensor, ""]:
        """Return the sum of both directions."""
        rows = (unit_rows(x, normalize=self.normalize) for x in (query, key))
        with over(self.group):
            return self.function(*rows, frozen, self.scale(), sharpness=self.sharpness)


class Symile(ScaledLoss):
    """Symile: contrast tuples of any number of modalities by the sum of products of their coordinates.

    Args:
        temperature: Initial temperature, > 0.
        negatives: "n" is one shuffled tuple for each row of the batch, "n_squared" is all combinations.
        learnable: Learn the temperature, without bounds. False: keep it fixed.
        normalize: Divide each row by its norm. False: use the rows unchanged, for encoders that end in a LayerNorm.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | embeddings | a list of [n, dim] | two modalities or more, in the same order |
        | generator | | a torch.Generator for the shuffles of "n"; None: torch's default one |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: with two modalities and "n_squared" it is CLIP. PairwiseCLIP compares only pairs.

    Source: Saporta et al., arXiv 2411.01053.

    >>> Symile(temperature=1.0)([torch.eye(4)] * 3, torch.Generator().manual_seed(0)).shape
    torch.Size([])
    """

    calls = "symile:symile"

    def __init__(
        self,
        temperature: float = 0.07,
        negatives: Literal["n", "n_squared"] = "n",
        *,
        learnable: bool = True,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group)
        need_word(("n", "n_squared"), negatives=negatives)
        self.negatives: Literal["n", "n_squared"] = negatives
        self.normalize = normalize

    def forward(self, embeddings: Views, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """Return the mean over the choices of an anchor."""
        rows = [unit_rows(x, normalize=self.normalize) for x in embeddings]
        with over(self.group):
            return self.function(rows, self.scale().exp(), self.negatives, generator=generator)


class PairwiseCLIP(ScaledLoss):
    """CLIP's loss summed over all pairs of modalities: the baseline of Symile.

    Args:
        temperature: Initial temperature, > 0.
        learnable: Learn the temperature, without bounds. False: keep it fixed.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | embeddings | a list of [n, dim] | two modalities or more, in the same order |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: with two modalities it is CLIP. Symile also learns dependences that no pair of modalities shows.

    Source: Saporta et al., arXiv 2411.01053 (the baseline).

    >>> PairwiseCLIP(temperature=1.0)([torch.eye(3)] * 3).shape
    torch.Size([])
    """

    calls = "symile:clip_pairwise_loss"

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learnable: bool = True,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group)
        self.normalize = normalize

    def forward(self, embeddings: Views) -> Float[Tensor, ""]:
        """Return the sum over pairs of modalities."""
        rows = [unit_rows(x, normalize=self.normalize) for x in embeddings]
        with over(self.group):
            return self.function(rows, self.scale().exp())


class MILNCE(Loss):
    """MIL-NCE: contrast a video and its candidate texts, any of which may be correct, with all other texts and videos.

    Args:
        temperature: Divisor of the similarities, > 0. With 1 and normalize=False it is the loss of Miech et al.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | video | [n, dim] | one row for each example |
        | text | [n * L, dim] | L consecutive candidates for each example |
        | mask | [n] of bool or None | False where an example has no text |

    Relations: with L = 1 it has both directions of CLIP in one denominator.

    Source: Miech et al., arXiv 1912.06430, Eq. 2; the system is gradient harmonization, arXiv 2211.02077.

    >>> round(MILNCE()(torch.eye(1), torch.eye(1)).item(), 3)
    0.693
    """

    calls = "gradient-harmonization:mil_nce"

    def __init__(self, temperature: float = 0.07, *, normalize: bool = True, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.normalize = temperature, normalize

    def forward(
        self,
        video: Float[Tensor, "n dim"],
        text: Float[Tensor, "texts dim"],
        mask: Bool[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over examples that have a text."""
        query = scaled(unit_rows(video, normalize=self.normalize), self.temperature)
        with over(self.group):
            return self.function(query, unit_rows(text, normalize=self.normalize).to(query.dtype), mask)


class BatchHinge(Loss):
    """Ranking hinge over a batch: each row's own key is nearer, by a margin, than every other key.

    Args:
        margin: Minimum difference of similarities; any finite number.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | query | [n, dim], n >= 2 | embeddings of one modality, which rank the keys |
        | key | [n, dim] | embeddings of the other, row by row, which are ranked |

    Relations: CLIP has a softmax instead of hinges, and both directions. Triplet uses only the hardest row.

    Source: Carvalho, Washuettl and Widmer, arXiv 2309.12134.

    >>> BatchHinge(margin=0.5)(torch.eye(2), torch.eye(2).flip(0))
    tensor(1.5000)
    """

    calls = "audio-sheet-retrieval:batch_hinge"

    def __init__(self, margin: float = 0.7, *, normalize: bool = True, group: Group = None) -> None:
        super().__init__(group)
        self.margin, self.normalize = margin, normalize

    def forward(self, query: Float[Tensor, "n dim"], key: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the mean over all pairs of a query and another row's key."""
        rows = (unit_rows(x, normalize=self.normalize) for x in (query, key))
        with over(self.group):
            return self.function(*rows, self.margin)


class TemporalNCE(ScaledLoss):
    """TNCE: contrast sounds of two events with their texts, against both with the events swapped or at the same time.

    Args:
        temperature: Initial temperature, in 0.01..1.
        alpha_same: Weight of a pair's own swapped or overlapped version among its negatives, at least 0.
        alpha_cross: Weight of other pairs' versions, at least 0.
        beta: Weight of the swapped versions as anchors, at least 0.
        gamma: Weight of the overlapped versions as anchors, at least 0.
        learnable: Learn the temperature, within its bounds. False: keep it fixed.
        normalize: Divide each row by its norm. False: use the rows unchanged, as TACT does.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | audio_fwd, audio_rev | [n, dim] | embeddings of two sounds in a row, and in the other order |
        | text_fwd, text_rev | [n, dim] | those of their texts |
        | audio_over, text_over | [n, dim] | those of both sounds at once, and of the text; None: no third block |
        | meaning | [blocks, n] int | equal where rows describe the same events in the same order; None: all differ |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: with alpha_same=alpha_cross=1 it is twice CLIP of all blocks in one batch. With both 0 the blocks do not meet.

    Source: arXiv 2408.09269; its form is that of TACT (Bagad et al., CVPR 2023).

    >>> x, y = torch.eye(2), -torch.eye(2)
    >>> TemporalNCE(temperature=1.0)(x, y, x, y).detach()
    tensor(1.2530)
    """

    calls = "teminal:temporal_nce"

    def __init__(
        self,
        temperature: float = 0.07,
        alpha_same: float = 1.0,
        alpha_cross: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        *,
        learnable: bool = True,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group, BOUNDS)
        need_within(0, math.inf, alpha_same=alpha_same, alpha_cross=alpha_cross, beta=beta, gamma=gamma)
        self.alpha_same, self.alpha_cross, self.beta, self.gamma = alpha_same, alpha_cross, beta, gamma
        self.normalize = normalize

    def forward(
        self,
        audio_fwd: Float[Tensor, "n dim"],
        audio_rev: Float[Tensor, "n dim"],
        text_fwd: Float[Tensor, "n dim"],
        text_rev: Float[Tensor, "n dim"],
        audio_over: Float[Tensor, "n dim"] | None = None,
        text_over: Float[Tensor, "n dim"] | None = None,
        meaning: Int[Tensor, "blocks n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the sum of both directions."""
        rows = [unit_rows(x, normalize=self.normalize) for x in (audio_fwd, audio_rev, text_fwd, text_rev)]
        third = [None if x is None else unit_rows(x, normalize=self.normalize) for x in (audio_over, text_over)]
        settings = self.alpha_same, self.alpha_cross, self.scale().exp()
        with over(self.group):
            loss: Tensor = self.function(*rows, *settings, *third, self.beta, self.gamma, meaning).loss
        return loss


class CaptionContrast(ScaledLoss):
    """Contrast pictures with their captions, of which some may be equal: CLIP with equal captions as positives of each other.

    Args:
        temperature: Initial temperature, in 0.01..1. The paper's is exp(-0.2).
        learnable: Learn the temperature, within its bounds. False: keep it fixed.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | vision, text | [n, dim] | embeddings of pictures and of their captions, of any norm, in the same order |
        | captions | [n] int | equal where two captions are equal; None: all differ |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: without captions it is CLIP.

    Source: COSMO (arXiv 2401.00849), whose code leaves the loss out of batches with equal captions.

    >>> round(CaptionContrast(temperature=1.0)(torch.eye(2), torch.eye(2), torch.tensor([7, 7])).item(), 4)
    0.8133
    """

    calls = "cosmo:interleaved_contrast"

    def __init__(self, temperature: float = 0.07, *, learnable: bool = True, group: Group = None) -> None:
        super().__init__(temperature, learnable, group, BOUNDS)

    def forward(
        self, vision: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"], captions: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, ""]:
        """Return the mean of both directions."""
        with over(self.group):
            loss: Tensor = self.function(vision, text, self.scale().exp(), captions)
        return loss
