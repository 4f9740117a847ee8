"""Define losses that align two or more modalities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_within
from counterpoint.core.memory import Queue
from counterpoint.core.operands import scaled
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss, ScaledLoss, unit_rows

Views = Sequence[Float[Tensor, "n dim"]]
# Bounds of a learnt temperature in CLIP's code: log_scale in 0..log 100.
BOUNDS = (0.01, 1.0)


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
        if negatives not in ("n", "n_squared"):
            raise ValueError(f"negatives must be 'n' or 'n_squared', got {negatives!r}")
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


class Uniformity(Loss):
    """Uniformity: the log of the mean over pairs of exp(-sharpness d^2). It is low where rows are spread over the sphere.

    Args:
        sharpness: Factor of the squared distances, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | x | [n, dim] | embeddings, of any norm |

    Relations: ContrastiveGap adds it to CLIP. CrossUniformity is the same between two modalities.

    Source: Wang and Isola, arXiv 2005.10242.

    >>> Uniformity()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor(-4.)
    """

    calls = "contrastive-gap:uniformity"

    def __init__(self, sharpness: float = 2.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(sharpness=sharpness)
        self.sharpness = sharpness

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the loss, from -4 times the sharpness to 0 (all rows equal)."""
        with over(self.group):
            return self.function(x, self.sharpness)


class CrossUniformity(Loss):
    """Uniformity across modalities: low where rows of different items lie far apart.

    Args:
        sharpness: Factor of the squared distances, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | x | [n, dim] | embeddings of one modality, of any norm |
        | y | [n, dim] | embeddings of the other, in the same order |

    Relations: Uniformity is the same within one modality.

    Source: Fahim, Murphy and Fyshe, arXiv 2405.18570.

    >>> CrossUniformity()(torch.eye(2), torch.eye(2))
    tensor(-4.)
    """

    calls = "contrastive-gap:cross_uniformity"

    def __init__(self, sharpness: float = 2.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(sharpness=sharpness)
        self.sharpness = sharpness

    def forward(self, x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the loss, from -4 times the sharpness to 0."""
        with over(self.group):
            return self.function(x, y, self.sharpness)


class ContrastiveGap(Loss):
    """CLIP's loss plus uniformity and alignment, so that two modalities share one region of the sphere.

    Args:
        temperature: Fixed temperature, > 0.
        uniformity, alignment, cross_uniformity, contrastive: Weight of each term. True: 1. False: without the term.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | x | [n, dim] | embeddings of one modality, of any norm |
        | y | [n, dim] | embeddings of the other, in the same order |

    Relations: CLIP with a fixed temperature, plus Uniformity of each side, plus the mean squared distance of pairs.

    Source: Fahim, Murphy and Fyshe, arXiv 2405.18570.

    >>> ContrastiveGap(temperature=1.0)(torch.eye(2), torch.eye(2)).shape
    torch.Size([])
    """

    calls = "contrastive-gap:contrastive_gap_loss"

    def __init__(
        self,
        temperature: float = 0.01,
        *,
        uniformity: bool | float = True,
        alignment: bool | float = True,
        cross_uniformity: bool | float = False,
        contrastive: bool | float = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.uniformity, self.alignment = temperature, uniformity, alignment
        self.cross_uniformity, self.contrastive = cross_uniformity, contrastive

    def forward(self, x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the sum of the terms that count."""
        with over(self.group):
            loss: Tensor = self.function(
                x,
                y,
                self.temperature,
                self.uniformity,
                self.alignment,
                self.cross_uniformity,
                self.contrastive,
            ).loss
        return loss


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


class CLIPRocket(ScaledLoss):
    """CLIP-rocket: CLIP of weak views, and of every pair of strong views in a separate space with label smoothing.

    Args:
        temperature: Initial temperature of the weak views, in 0.01..1.
        local_temperature: Initial temperature of the strong views, in 0.01..1.
        label_smoothing: Label smoothing of the strong views' targets, in 0..1.
        reduction: Reduction over the two directions, "mean" or "sum".
        learnable: Learn both temperatures, within these bounds. False: keep them fixed.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image, text | [n, dim] | projections of the weak views, of any norm, in the same order |
        | images, texts | lists of [n, dim] | projections of the strong views of each, as many of both; () for none |

    State: `log_scale` and `local_log_scale`, log(1 / temperature) of each: parameters (buffers if not learnable).

    Relations: without strong views it is CLIP. BarLIP, SiamLIP and SwALIP are the paper's losses to add.

    Source: Fini et al., arXiv 2305.08675.

    >>> round(CLIPRocket(temperature=1.0)(torch.eye(2), torch.eye(2)).item(), 3)
    0.313
    """

    calls = "improved-vlp-baselines:cl2l_loss"
    local_log_scale: Float[Tensor, ""]

    def __init__(
        self,
        temperature: float = 0.07,
        local_temperature: float = 0.1,
        label_smoothing: float = 0.1,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        learnable: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group, BOUNDS)
        need_within(*BOUNDS, local_temperature=local_temperature)
        self.label_smoothing, self.reduction = label_smoothing, reduction
        value = torch.tensor(-math.log(local_temperature))
        if learnable:
            self.local_log_scale = nn.Parameter(value)
        else:
            self.register_buffer("local_log_scale", value)

    @property
    def local_temperature(self) -> float:
        """The current temperature of the strong views."""
        return math.exp(-float(self.local_log_scale.detach()))

    def forward(
        self,
        image: Float[Tensor, "n dim"],
        text: Float[Tensor, "n dim"],
        images: Views = (),
        texts: Views = (),
    ) -> Float[Tensor, ""]:
        """Return the weighted mean of global and local contrast."""
        if self.training and self.learnable:
            self.local_log_scale.data.clamp_(*self._bounds)
        scales = self.scale().exp(), self.local_log_scale.exp()
        with over(self.group):
            return self.function(image, text, images, texts, *scales, self.label_smoothing, self.reduction)


class BarLIP(Loss):
    """BarLIP: Barlow Twins' loss between image and text, the mean over the weak pair and all strong pairs.

    Args:
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image, text | [n, dim] | projections of the weak views, from a projector that ends in batch normalisation |
        | images, texts | lists of [n, dim] | projections of the strong views of each; () for none |

    Relations: BarlowTwins standardises here; `functional.barlow_cross` is the term of one pair.

    Source: Fini et al., arXiv 2305.08675.

    >>> BarLIP()(torch.eye(2) * 2**0.5, torch.eye(2) * 2**0.5).item() < 1e-12
    True
    """

    calls = "improved-vlp-baselines:barlip_loss"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(
        self,
        image: Float[Tensor, "n dim"],
        text: Float[Tensor, "n dim"],
        images: Views = (),
        texts: Views = (),
    ) -> Float[Tensor, ""]:
        """Return the mean over pairs of views."""
        with over(self.group):
            return self.function(image, text, images, texts)


class SiamLIP(Loss):
    """SiamLIP: image predicts text and text predicts image, without negatives; with a momentum copy it is BYOLIP.

    Args:
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image_prediction, text_prediction | [n, dim] | predictions from the weak views |
        | image, text | [n, dim] | projections of the weak views (BYOLIP: of the momentum copy); no gradient |
        | image_predictions, text_predictions | lists of [n, dim] | predictions from the strong views |
        | images, texts | lists of [n, dim] | projections of the strong views; no gradient |

    Relations: SimSiam and BYOL between modalities; `functional.byol_cross` is the term of one pair.

    Source: Fini et al., arXiv 2305.08675.

    >>> SiamLIP()(*[torch.eye(2)] * 4)
    tensor(0.)
    """

    calls = "improved-vlp-baselines:siamlip_loss"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(
        self,
        image_prediction: Float[Tensor, "n dim"],
        text_prediction: Float[Tensor, "n dim"],
        image: Float[Tensor, "n dim"],
        text: Float[Tensor, "n dim"],
        image_predictions: Views = (),
        text_predictions: Views = (),
        images: Views = (),
        texts: Views = (),
    ) -> Float[Tensor, ""]:
        """Return the mean over pairs of views and both directions."""
        with over(self.group):
            return self.function(
                image_prediction,
                text_prediction,
                image,
                text,
                image_predictions,
                text_predictions,
                images,
                texts,
            )


class SwALIP(ScaledLoss):
    """SwALIP: each pair of views predicts the other pair's assignment to the other modality's batch.

    Args:
        temperature: Initial temperature, in 0.01..1.
        epsilon: Softness of the assignments, > 0.
        iterations: Number of iterations of Sinkhorn's algorithm, >= 1.
        learnable: Learn the temperature, within its bounds. False: keep it fixed.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | images | a list of two [n, dim] | projections of two strong views of the images, of any norm |
        | texts | a list of two [n, dim] | projections of two strong views of the texts |

    State: `log_scale` = log(1 / temperature), a parameter for the optimiser (a buffer if not learnable).

    Relations: SwAV assigns to prototypes instead of the other modality's batch.

    Source: Fini et al., arXiv 2305.08675.

    >>> SwALIP()([torch.eye(3)] * 2, [torch.eye(3)] * 2).shape
    torch.Size([])
    """

    calls = "improved-vlp-baselines:swalip_loss"

    def __init__(
        self,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        *,
        learnable: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, learnable, group, BOUNDS)
        need_positive(epsilon=epsilon, iterations=iterations)
        self.epsilon, self.iterations = epsilon, iterations

    def forward(self, images: Views, texts: Views) -> Float[Tensor, ""]:
        """Return the mean over pairs of views and both directions."""
        with over(self.group):
            return self.function(images, texts, self.scale().exp(), self.epsilon, self.iterations)


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


class ALBEF(Loss):
    """ALBEF's image-text contrast: CLIP against queues of a momentum copy's keys, with the copy's soft targets.

    Args:
        dim: Width of the embeddings.
        queue: Number of older keys to keep of each modality.
        temperature: Initial temperature, in 0.001..0.5.
        alpha: Share of the soft targets, in 0..1. 0: the copy only makes keys. The paper raises it in the first epoch; to do so,
            set the attribute.
        learnable: Learn the temperature, within its bounds. False: keep it fixed.
        seed: Seed of the queues' initial noise; the same on every process.
        group: Processes whose batches together form the batch and enter the queues: None (this process), a ProcessGroup, or
            "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image, text | [n, dim] | the student's embeddings, of any norm, in the same order |
        | teacher_image, teacher_text | [n, dim] | the momentum copy's; no gradient |

    State: `temperature` (a divisor, not a logarithm; a parameter, or a buffer if not learnable) and two queues of unit rows,
    `image_queue` and `text_queue`. In training mode the copy's rows enter them after the loss is computed.

    Relations: with alpha=0 it is CLIP with keys of a momentum copy and a queue, like MoCo. MLMDistill is ALBEF's loss of
    masked words.

    Source: Li et al., arXiv 2107.07651, Eq. 6.

    >>> ALBEF(dim=4, queue=8)(*[torch.eye(4)] * 4).shape
    torch.Size([])
    """

    calls = "albef:momentum_contrast_soft"
    temperature: Float[Tensor, ""]

    def __init__(
        self,
        dim: int,
        queue: int = 65536,
        temperature: float = 0.07,
        alpha: float = 0.4,
        *,
        learnable: bool = True,
        seed: int = 0,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_within(0.001, 0.5, temperature=temperature)
        need_within(0, 1, alpha=alpha)
        self.dim, self.queue, self.alpha, self.learnable = dim, queue, alpha, learnable
        value = torch.tensor(float(temperature))
        if learnable:
            self.temperature = nn.Parameter(value)
        else:
            self.register_buffer("temperature", value)
        self.image_queue, self.text_queue = Queue(queue, dim, seed=seed), Queue(queue, dim, seed=seed + 1)

    def forward(
        self,
        image: Float[Tensor, "n dim"],
        text: Float[Tensor, "n dim"],
        teacher_image: Float[Tensor, "n dim"],
        teacher_text: Float[Tensor, "n dim"],
    ) -> Float[Tensor, ""]:
        """Return the mean of both directions, then write the queues."""
        if self.training and self.learnable:
            # .data: this write, often without effect, must not invalidate an earlier forward pass before its backward pass.
            self.temperature.data.clamp_(0.001, 0.5)
        queues = self.image_queue.rows.T, self.text_queue.rows.T
        with over(self.group):
            loss: Tensor = self.function(
                image, text, teacher_image, teacher_text, *queues, self.temperature, self.alpha
            )
            if self.training:
                self.image_queue.write(teacher_image)
                self.text_queue.write(teacher_text)
        return loss

    def extra_repr(self) -> str:
        """Return the settings by name, with the current temperature."""
        return f"temperature={float(self.temperature.detach()):.4g}, " + super().extra_repr()


class MLMDistill(Loss):
    """Masked language modelling with the masked words and a momentum copy's soft targets (ALBEF).

    Args:
        alpha: Share of the soft targets, in 0..1.
        group: Processes whose masked places are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [..., vocabulary] | logits |
        | teacher | [..., vocabulary] | the momentum copy's logits on the same masked text; no gradient |
        | labels | [...] | number of the masked token, -100 at positions without prediction |

    Relations: with alpha=0 it is the cross-entropy of masked words; with alpha=1 KD with temperature 1, plus a constant.

    Source: Li et al., arXiv 2107.07651, Eq. 7.

    >>> MLMDistill()(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
    tensor(1.3863)
    """

    calls = "albef:mlm_distill"

    def __init__(self, alpha: float = 0.4, *, group: Group = None) -> None:
        super().__init__(group)
        need_within(0, 1, alpha=alpha)
        self.alpha = alpha

    def forward(
        self,
        student: Float[Tensor, "*places vocabulary"],
        teacher: Float[Tensor, "*places vocabulary"],
        labels: Int[Tensor, "*places"],
    ) -> Float[Tensor, ""]:
        """Return the mean over masked positions; 0 without any."""
        with over(self.group):
            return self.function(student, teacher, labels, self.alpha)
