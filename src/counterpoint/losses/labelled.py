"""Define losses that use the class of each example."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_within
from counterpoint.core.distributed import row_counts
from counterpoint.core.label_mixtures import BetaShares
from counterpoint.core.memory import Queue
from counterpoint.core.operands import unit
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss, unit_rows


class SupCon(Loss):
    """Supervised contrastive loss: all views of all examples of the same class are positives.

    Args:
        temperature: Divisor of the dot products, > 0.
        base_temperature: The loss is multiplied by temperature / base_temperature; > 0.
        all_views: Use all views as anchors. False: only the first.
        ring: With a group, pass keys from process to process instead of gathering them: less memory, more time.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | features | [n, views, dim] | embeddings of all views |
        | labels | [n] | class of each example |

    Relations: with all labels different and base_temperature = temperature it is NTXent. SupConSingleView takes one vector
    for each example.

    Source: Khosla et al., arXiv 2004.11362, Eq. 2.

    >>> import torch
    >>> loss = SupCon(temperature=1.0, base_temperature=1.0)
    >>> loss(torch.eye(2)[:, None].expand(2, 2, 2), torch.tensor([0, 1]))
    tensor(0.5514)
    """

    calls = "supcon:supcon"

    def __init__(
        self,
        temperature: float = 0.07,
        base_temperature: float = 0.07,
        all_views: bool = True,
        *,
        ring: bool = False,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, base_temperature=base_temperature)
        self.temperature, self.base_temperature, self.all_views = temperature, base_temperature, all_views
        self.ring, self.normalize = ring, normalize

    def forward(self, features: Float[Tensor, "n views dim"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean loss of all anchors. The loss of an anchor without positive is 0."""
        if self.normalize and features.ndim == 3:
            features = unit_rows(features, normalize=True)
        with over(self.group):
            return self.function(
                features, labels, self.temperature, self.base_temperature, self.all_views, ring=self.ring
            )


class SupConSingleView(Loss):
    """SupCon of one vector for each example, as in metric-learning libraries.

    Args:
        temperature: Divisor of the cosine similarities, > 0.
        ring: With a group, pass keys from process to process instead of gathering them: less memory, more time.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | embeddings | [n, dim] | one vector for each example, of any norm |
        | labels | [n] | class of each example |

    Relations: SupCon with one view, the mean over anchors whose loss is not 0.

    Source: Khosla et al., arXiv 2004.11362, in the form of pytorch-metric-learning.

    >>> import torch
    >>> SupConSingleView()(torch.eye(2), torch.tensor([0, 1]))
    tensor(0.)
    """

    calls = "supcon:supcon_single_view"

    def __init__(self, temperature: float = 0.1, *, ring: bool = False, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.ring = temperature, ring

    def forward(self, embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean loss of the anchors that have one."""
        with over(self.group):
            return self.function(embeddings, labels, self.temperature, ring=self.ring)


class SupReMix(Loss):
    """Supervised contrast for real-valued targets, with mixtures as hard negatives and hard positives.

    Args:
        temperature: Divisor of the dot products, > 0.
        window: Mix-pos mixes rows nearer to the anchor's target than this, in units of the targets; at least 0.
        weight_power: Weights of |distance| + 1 (1), distance squared + 1 (2), or none (0).
        mix_neg, mix_pos: Whether there are mixtures of that kind.
        alpha, beta: Beta distribution of the anchor's share in Mix-neg, > 0.
        separate_max: Rescale the mixtures' terms as the authors' code does. False: the exact loss.
        normalize: Divide each row by its norm. False: use the rows unchanged.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | features | [n, views, dim] | embeddings of all views |
        | labels | [n] | finite target of each example; equal ones are positives |
        | alpha_neg | [views n, views n] | shares of anchors in Mix-neg, of the whole batch; default: drawn |
        | generator | | draws the shares; with a group in the same state everywhere; default: torch's own |

    Relations: without mixtures and weights it is SupCon with base_temperature = temperature.

    Source: Wu et al., arXiv 2309.16633.

    >>> import torch
    >>> loss = SupReMix(temperature=1.0, mix_neg=False)
    >>> loss(torch.eye(2)[:, None].expand(2, 2, 2), torch.tensor([20.0, 23.0]))
    tensor(1.3720)
    """

    calls = "supremix:supremix_loss"

    def __init__(
        self,
        temperature: float = 0.3,
        window: float = 5.0,
        weight_power: int = 1,
        mix_neg: bool = True,
        mix_pos: bool = True,
        alpha: float = 2.0,
        beta: float = 8.0,
        separate_max: bool = False,
        *,
        normalize: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, alpha=alpha, beta=beta)
        self.temperature, self.window, self.weight_power = temperature, window, weight_power
        self.mix_neg, self.mix_pos, self.alpha, self.beta = mix_neg, mix_pos, alpha, beta
        self.separate_max, self.normalize = separate_max, normalize

    def forward(
        self,
        features: Float[Tensor, "n views dim"],
        labels: Float[Tensor, " n"],
        alpha_neg: Float[Tensor, "rows rows"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean loss of the anchors that have a positive."""
        if features.ndim == 3:
            features = unit_rows(features, normalize=self.normalize)
        with over(self.group):
            shares: Any = alpha_neg if self.mix_neg else None
            if self.mix_neg and alpha_neg is None:
                rows = sum(row_counts(len(features), features.device)) * features.shape[1]
                shares = BetaShares(int(torch.randint(2**62, (), generator=generator)), self.alpha, self.beta, rows)
            return self.function(
                features,
                labels,
                self.temperature,
                self.window,
                shares,
                self.weight_power,
                self.separate_max,
                mix_pos=self.mix_pos,
            )


class Triplet(Loss):
    """Triplet loss on the hardest examples of a batch: the furthest of the same class and the nearest of another class.

    Args:
        margin: Minimum difference between a negative's and a positive's distance, > 0. The paper's soft margin is not built.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | embeddings | [n, dim] | of any norm; distances are those of unit vectors |
        | labels | [n] | class of each example; use batches of P classes x K examples |

    Relations: BatchHinge ranks all other rows of the batch, not only the hardest.

    Source: Hermans, Beyer and Leibe, arXiv 1703.07737, Eq. 5.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> Triplet(margin=0.5)(x, torch.tensor([0, 0, 1]))
    tensor(1.2071)
    """

    calls = "triplet:triplet_hard"

    def __init__(self, margin: float = 0.2, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(margin=margin)
        self.margin = margin

    def forward(self, embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return the mean over triplets that violate the margin; 0 without any."""
        with over(self.group):
            loss: Tensor = self.function(embeddings, labels, self.margin).loss
        return loss


class SLA(Loss):
    """Self-supervised label augmentation: one label for class and transformation, with self-distillation of the vote.

    Args:
        num_transforms: M, number of transformations, at least 1; see `counterpoint.functional.expand`.
        temperature: Temperature of the self-distillation, > 0.
        sum_over_transforms: Sum the loss over the copies. False: their mean.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | joint_logits | [n M, classes M] | of all copies of a picture together; columns by class, then transformation |
        | labels | [n] | class of each picture |
        | single_logits | [n M, classes] | of the second head; default none: no self-distillation |

    Relations: with one transformation it is the cross-entropy.

    Source: Lee, Hwang and Shin, arXiv 1910.05872, Eqs. 3 and 5.

    >>> import torch
    >>> SLA(2)(torch.zeros(4, 6), torch.tensor([0, 2]))
    tensor(1.7918)
    """

    calls = "sla:sla_loss"

    def __init__(
        self,
        num_transforms: int = 4,
        temperature: float = 1.0,
        sum_over_transforms: bool = False,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(num_transforms=num_transforms, temperature=temperature)
        self.num_transforms, self.temperature = num_transforms, temperature
        self.sum_over_transforms = sum_over_transforms

    def forward(
        self,
        joint_logits: Float[Tensor, "nm cm"],
        labels: Int[Tensor, " n"],
        single_logits: Float[Tensor, "nm c"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch."""
        options = self.num_transforms, single_logits, self.temperature, self.sum_over_transforms
        with over(self.group):
            return self.function(joint_logits, labels, *options)


class Hydra(Loss):
    """InfoNCE with positives of any partner class, compared in the subspace of a gate.

    Args:
        temperature: Divisor of the similarities, > 0.
        renormalise: Cosine of the gated rows (form A). False: gated product of unit rows (form B).
        row_mean: Average over anchors, each with the mean of its positives. False: over all positive pairs.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | anchors, keys | [n, dim] | projections of two views, of any norm |
        | labels, partners | [n] | class of each picture, and its partner class |
        | gate | [n, dim] | in 0..1, such as the output of `systems.images.hydra.FeatureFilter`; default ones |

    Relations: with partners equal to labels and no gate, each positive of SupCon competes alone with the negatives.

    Source: Wu et al., arXiv 2410.18200; the first author's code.

    >>> import torch
    >>> z, y = torch.eye(3), torch.tensor([0, 1, 2])
    >>> Hydra(temperature=1.0)(z, z, y, y)
    tensor(0.5514)
    """

    calls = "hydra:gated_pair_infonce"

    def __init__(
        self, temperature: float = 0.1, renormalise: bool = True, row_mean: bool = False, *, group: Group = None
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.renormalise, self.row_mean = temperature, renormalise, row_mean

    def forward(
        self,
        anchors: Float[Tensor, "n dim"],
        keys: Float[Tensor, "n dim"],
        labels: Int[Tensor, " n"],
        partners: Int[Tensor, " n"],
        gate: Float[Tensor, "n dim"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch; 0 without positives."""
        gate = torch.ones_like(anchors) if gate is None else gate
        options = self.temperature, self.renormalise, self.row_mean
        with over(self.group):
            return self.function(anchors, keys, labels, partners, gate, *options)


class SepCLR(Loss):
    """Two spaces of backgrounds and targets: what both sets share, and what only targets have.

    Args:
        salient_weight, background_weight, jem_weight: Weights of the salient term, of the pull of backgrounds to 0, and of the
            joint entropy; at least 0.
        bandwidth: Bandwidth of all Gaussian kernels, a variance, > 0.
        uniform_weight: Weight of uniformity against alignment, at least 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | common1, common2 | [n, dim] | heads of the common encoder for two views, of any norm |
        | salient1, salient2 | [n, width] | heads of the salient encoder, used as given |
        | is_target | [n] | 1 for a target picture, 0 for a background |

    Relations: the common term is alignment plus Uniformity with sharpness 1 / (2 bandwidth).

    Source: Louiset et al., arXiv 2402.11928; the authors' code.

    >>> import torch
    >>> rows = torch.eye(2)
    >>> SepCLR()(rows, rows, rows, rows, torch.tensor([0, 1])).shape
    torch.Size([])
    """

    calls = "sepclr:sepclr_loss"

    def __init__(
        self,
        salient_weight: float = 1.0,
        background_weight: float = 100.0,
        jem_weight: float = 10.0,
        bandwidth: float = 0.5,
        uniform_weight: float = 2.0,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(bandwidth=bandwidth)
        self.salient_weight, self.background_weight, self.jem_weight = salient_weight, background_weight, jem_weight
        self.bandwidth, self.uniform_weight = bandwidth, uniform_weight

    def forward(
        self,
        common1: Float[Tensor, "n dim"],
        common2: Float[Tensor, "n dim"],
        salient1: Float[Tensor, "n width"],
        salient2: Float[Tensor, "n width"],
        is_target: Bool[Tensor, " n"] | Int[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch."""
        weights = self.salient_weight, self.background_weight, self.jem_weight, self.bandwidth
        with over(self.group):
            loss: Tensor = self.function(
                common1, common2, salient1, salient2, is_target, *weights, uniform_weight=self.uniform_weight
            )["loss"]
        return loss


class CAPro(Loss):
    """All terms of CAPro: classification, contrast with a queue and with prototypes, reconstruction; wrong labels are judged.

    Args:
        classes: Number of classes.
        dim: Width of z.
        queue: Number of older keys to keep.
        alpha: Share of the classifier beside the prototypes, 0 to 1.
        threshold: Smallest score that corrects a label, 0 to 1.
        beta: Share of the soft labels in the loss of the classifier of z, 0 to 1.
        temperature: Divisor of the cosine similarities, > 0.
        momentum: Share of a prototype that stays at each row of its class, 0 to 1.
        seed: Seed of the queue's initial noise; the same on every process.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | logits | [n, classes] | of a classifier of the features |
        | z, z_key | [n, dim] | embeddings of two views, of any norm; the second of the momentum network, without gradient |
        | feature, reconstructed | [n, width] | features, without gradient, and their reconstruction from z |
        | labels | [n] | classes, which may be wrong |
        | trusted | [n] | True where a label is certain; None: nowhere |

    State: `memory` (a queue of unit rows), `prototypes` [classes, dim] and `classifier_low`, a linear classifier of z that learns.
    In training mode a forward pass moves queue and prototypes. `start` sets the prototypes; the loss before is that of the warm-up.
    While `clean` is False, labels are not judged.

    Relations: without prototypes, MoCo beside two classifiers.

    Source: Qin et al., arXiv 2310.09761; the authors' code.

    >>> import torch
    >>> loss = CAPro(classes=2, dim=2, queue=4)
    >>> loss.start(torch.eye(2), torch.tensor([0, 1]))
    >>> loss(torch.eye(2), torch.eye(2), torch.eye(2), torch.eye(2), torch.eye(2), torch.tensor([0, 1])).shape
    torch.Size([])
    """

    calls = "capro:capro_step"
    prototypes: Float[Tensor, "classes dim"]

    def __init__(
        self,
        classes: int,
        dim: int,
        queue: int = 8192,
        alpha: float = 0.5,
        threshold: float = 0.6,
        beta: float = 0.1,
        temperature: float = 0.1,
        momentum: float = 0.999,
        *,
        seed: int = 0,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, classes=classes)
        need_within(0, 1, alpha=alpha, threshold=threshold, beta=beta, momentum=momentum)
        self.classes, self.dim, self.queue, self.alpha, self.threshold = classes, dim, queue, alpha, threshold
        self.beta, self.temperature, self.momentum, self.clean = beta, temperature, momentum, True
        self.memory = Queue(queue, dim, seed=seed)
        self.classifier_low = nn.Linear(dim, classes, bias=False)
        nn.init.kaiming_uniform_(self.classifier_low.weight)
        self.register_buffer("prototypes", torch.zeros(classes, dim))

    @torch.no_grad()
    def start(self, keys: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> None:
        """Set each prototype to the mean direction of the keys of its class, such as those of trusted rows."""
        total = torch.zeros_like(self.prototypes).index_add_(0, labels, unit(keys).to(self.prototypes.dtype))
        self.prototypes.copy_(unit(total))

    def forward(
        self,
        logits: Float[Tensor, "n classes"],
        z: Float[Tensor, "n dim"],
        z_key: Float[Tensor, "n dim"],
        feature: Float[Tensor, "n width"],
        reconstructed: Float[Tensor, "n width"],
        labels: Int[Tensor, " n"],
        trusted: Bool[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch, then move queue and prototypes."""
        z, z_key = unit(z), unit(z_key)
        certain = torch.zeros_like(labels, dtype=torch.bool) if trusted is None else trusted
        started = bool(self.prototypes.any())
        with over(self.group):
            step = self.function(
                logits, z, z_key, self.classifier_low(z), feature, reconstructed, labels, certain,
                self.memory.rows.roll(-int(self.memory.pointer), 0).T, self.prototypes.clone() if started else None,
                self.classifier_low.weight, self.alpha, self.threshold, self.beta, self.temperature, self.momentum,
                self.clean and started,
            )  # fmt: skip
            if self.training:
                self.memory.write(z_key)
                if started:
                    self.prototypes.copy_(step["prototypes_after"])
        loss: Tensor = step["loss"]
        return loss
