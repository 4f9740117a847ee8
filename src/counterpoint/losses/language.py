"""Define losses of language models, alone or with images."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_within
from counterpoint.core.memory import Queue
from counterpoint.core.world import Group, over
from counterpoint.losses.base import BOUNDS, Loss, ScaledLoss, Views


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


class TokenMimic(Loss):
    """Mimic distillation of a language model: cross-entropy under a teacher's probabilities of the answers' tokens (LLaVA-MoD).

    Args:
        all_tokens: Learn every position, also prompt and padding.
        shift: Learn the positions whose next token is an answer's. False: those at an answer's tokens, as the authors' code does.
        group: Processes whose positions are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, tokens, vocabulary] | logits of the next token |
        | teacher | [n, tokens, vocabulary] | the teacher's logits of the same text and vocabulary; no gradient |
        | labels | [n, tokens] | the answers' tokens, -100 elsewhere |

    Relations: with shift=True, KD with temperature 1 over the answers' tokens, plus the teacher's entropy, a constant.
    `functional.preference_loss` has the losses of preferences that follow.

    Source: Shu et al., arXiv 2408.15881.

    >>> TokenMimic()(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]))
    tensor(1.3863)
    """

    calls = "llava-mod:mimic_loss"

    def __init__(self, *, all_tokens: bool = False, shift: bool = True, group: Group = None) -> None:
        super().__init__(group)
        self.all_tokens, self.shift = all_tokens, shift

    def forward(
        self,
        student: Float[Tensor, "n tokens vocabulary"],
        teacher: Float[Tensor, "n tokens vocabulary"],
        labels: Int[Tensor, "n tokens"],
    ) -> Float[Tensor, ""]:
        """Return the mean over the learned positions; 0 without any."""
        with over(self.group):
            return self.function(student, teacher, labels, self.all_tokens, self.shift)
