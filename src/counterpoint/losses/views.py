"""Define losses of views without negatives: agreement, redundancy, assignments, momentum teachers, reconstruction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_within
from counterpoint.core.distributed import place
from counterpoint.core.memory import Queue
from counterpoint.core.operands import unit
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class NegativeCosine(Loss):
    """Minus the mean cosine of predictions with targets, which get no gradient.

    Args:
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | prediction | [n, dim] | predictions from one view |
        | target | [n, dim] | projections of the other view; no gradient |

    Relations: SimSiam is half the sum of this loss in both directions, BYOL is 4 plus twice that sum.

    Source: Chen and He, arXiv 2011.10566, Eq. 1.

    >>> NegativeCosine()(torch.eye(2), torch.eye(2))
    tensor(-1.)
    """

    calls = "simsiam:negative_cosine"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(self, prediction: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the loss, from -1 (equal directions) to 1."""
        with over(self.group):
            return self.function(prediction, target)


class SimSiam(Loss):
    """SimSiam's symmetric loss: each view's prediction of the other view's projection.

    Args:
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | p1, p2 | [n, dim] | predictions from the first and from the second views |
        | z1, z2 | [n, dim] | projections of the first and of the second views; no gradient |

    Relations: BYOL takes z1 and z2 from a momentum network, and is 4 + 4 times this loss.

    Source: Chen and He, arXiv 2011.10566, Eq. 4.

    >>> SimSiam()(*[torch.eye(2)] * 4)
    tensor(-1.)
    """

    calls = "simsiam:negative_cosine"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(
        self,
        p1: Float[Tensor, "n dim"],
        p2: Float[Tensor, "n dim"],
        z1: Float[Tensor, "n dim"],
        z2: Float[Tensor, "n dim"],
    ) -> Float[Tensor, ""]:
        """Return the loss, from -1 (equal directions) to 1."""
        with over(self.group):
            loss: Tensor = self.function(p1, z2) / 2 + self.function(p2, z1) / 2
        return loss


class BYOL(Loss):
    """BYOL's symmetric loss: squared distances of unit vectors, predictions to a momentum network's projections.

    Args:
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | p1, p2 | [n, dim] | the online network's predictions from the first and from the second views |
        | z1, z2 | [n, dim] | the momentum network's projections of the first and of the second views; no gradient |

    The caller provides the momentum network: `counterpoint.core.teacher.EMATeacher`.

    Relations: 4 + 4 times SimSiam's loss.

    Source: Grill et al., arXiv 2006.07733, Eq. 2.

    >>> BYOL()(*[torch.eye(2)] * 4)
    tensor(0.)
    """

    calls = "byol:negative_cosine"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(
        self,
        p1: Float[Tensor, "n dim"],
        p2: Float[Tensor, "n dim"],
        z1: Float[Tensor, "n dim"],
        z2: Float[Tensor, "n dim"],
    ) -> Float[Tensor, ""]:
        """Return the loss, from 0 (equal directions) to 8."""
        with over(self.group):
            loss: Tensor = 4 + 2 * self.function(p1, z2) + 2 * self.function(p2, z1)
        return loss


class BarlowTwins(Loss):
    """Barlow Twins: the cross-correlation of two views' embeddings approaches the identity matrix.

    Args:
        redundancy: Lambda, the weight of the entries off the diagonal, >= 0.
        eps: Constant added to the variance inside the root, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | z1 | [n, dim] | embeddings of the first views; this module standardises them over the batch |
        | z2 | [n, dim] | embeddings of the second views, in the same order |

    Relations: BarLIP is this loss of two modalities, without the standardisation. VICReg bounds variances instead.

    Source: Zbontar et al., arXiv 2103.03230, Eq. 1.

    >>> BarlowTwins()(torch.ones(4, 3), torch.ones(4, 3))
    tensor(3.)
    """

    calls = "barlow-twins:barlow"

    def __init__(self, redundancy: float = 0.0051, eps: float = 1e-5, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(eps=eps)
        self.redundancy, self.eps = redundancy, eps

    def forward(self, z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the loss."""
        with over(self.group):
            return self.function(z1, z2, self.redundancy, self.eps)


class VICReg(Loss):
    """VICReg: views agree (invariance), every dimension varies (variance), no two dimensions correlate (covariance).

    Args:
        invariance, variance, covariance: Weights of the three terms, >= 0.
        eps: Constant added to the variance inside the root, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | z1 | [n, dim], n >= 2 | embeddings of the first views; not normalised |
        | z2 | [n, dim] | embeddings of the second views, in the same order |

    Relations: BarlowTwins decorrelates dimensions across two views, VICReg within each view.

    Source: Bardes, Ponce and LeCun, arXiv 2105.04906, Eq. 6.

    >>> VICReg()(torch.ones(4, 3), torch.ones(4, 3))
    tensor(24.7500)
    """

    calls = "vicreg:vicreg"

    def __init__(
        self,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        eps: float = 1e-4,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(eps=eps)
        self.invariance, self.variance, self.covariance, self.eps = invariance, variance, covariance, eps

    def forward(self, z1: Float[Tensor, "n dim"], z2: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the weighted sum of the three terms."""
        with over(self.group):
            return self.function(z1, z2, self.invariance, self.variance, self.covariance, self.eps)


class MSN(Loss):
    """MSN: predict from masked crops which prototypes a whole crop belongs to. The prototypes are this module's parameter.

    Args:
        dim: Width of the projections.
        prototypes: Number of prototypes.
        temperature: Temperature of the predictions, > 0.
        sharpening: Exponent 1 / sharpening of the targets, > 0.
        weight: Weight of the entropy of the mean prediction, >= 0.
        iterations: Iterations of Sinkhorn's algorithm on the targets; 0: none.
        by_view: Take the mean prediction of each view alone (BSS), not of all views.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | anchors | [views, n, dim] | projections of the masked and the small crops, of any norm |
        | target | [n, dim] | projections of whole crops by a moving average of the network; no gradient |

    State: `prototypes`, a parameter for the optimiser. The caller provides the moving average
    (`counterpoint.core.teacher.EMATeacher`).

    Relations: SwAV assigns every full-size crop, and has no term of its own that spreads the predictions.

    Source: Assran et al., arXiv 2204.07141, Eqs. 1 and 2.

    >>> MSN(dim=4, prototypes=8)(torch.randn(2, 6, 4), torch.randn(6, 4)).shape
    torch.Size([])
    """

    calls = "msn:msn"

    def __init__(
        self,
        dim: int,
        prototypes: int = 1024,
        temperature: float = 0.1,
        sharpening: float = 0.25,
        weight: float = 1.0,
        *,
        iterations: int = 3,
        by_view: bool = False,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(dim=dim, prototypes=prototypes, temperature=temperature, sharpening=sharpening)
        self.dim = dim
        self.prototypes = nn.Parameter(torch.randn(prototypes, dim))
        self.temperature, self.sharpening, self.weight = temperature, sharpening, weight
        self.iterations, self.by_view = iterations, by_view

    def forward(self, anchors: Float[Tensor, "views n dim"], target: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Return the cross-entropy, plus the weighted distance of the mean prediction's entropy from its largest value."""
        with over(self.group):
            loss: Tensor = self.function(
                anchors,
                target,
                self.prototypes,
                self.temperature,
                self.sharpening,
                self.weight,
                self.iterations,
                self.by_view,
            ).loss
        return loss


class SwAV(Loss):
    """SwAV: predict one crop's assignment to prototypes from another crop. The prototypes are this module's parameter.

    Args:
        dim: Width of the projections.
        prototypes: Number of clusters.
        temperature: Temperature of the prediction, > 0.
        epsilon: Softness of the assignments, > 0.
        iterations: Number of iterations of Sinkhorn's algorithm, >= 1.
        queue: Number of earlier projections of each full-size crop that are included in the assignment, as soon as the queue
            is full. 0: none.
        crops: Number of full-size crops, each with its queue.
        seed: Seed of the queues' initial noise; the same on every process.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | high | [crops, n, dim] | projections of the full-size crops, of any norm |
        | low | [small crops, n, dim] or None | projections of the small crops, which only predict |

    State: `prototypes.weight`, a parameter for the optimiser; a forward pass in training mode first divides its rows by their
    norms. `queues` and `written` (the number of rows that have entered them) are buffers, updated in training mode. The paper
    keeps the prototypes fixed in the first epoch: set `prototypes.weight.grad = None` before the optimiser's step.

    Relations: SwALIP has the other modality's batch instead of prototypes.

    Source: Caron et al., arXiv 2006.09882, Eqs. 2 and 6.

    >>> SwAV(dim=4, prototypes=8)(torch.randn(2, 6, 4)).shape
    torch.Size([])
    """

    calls = "swav:swav"
    written: Tensor

    def __init__(
        self,
        dim: int,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        *,
        queue: int = 0,
        crops: int = 2,
        seed: int = 0,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature, epsilon=epsilon, iterations=iterations)
        self.dim, self.temperature, self.epsilon, self.iterations = dim, temperature, epsilon, iterations
        self.queue, self.crops = queue, crops
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.queues = nn.ModuleList(Queue(queue, dim, seed=seed + n) for n in range(crops if queue else 0))
        self.register_buffer("written", torch.tensor(0))
        self._to_unit()

    @torch.no_grad()
    def _to_unit(self) -> None:
        # .data: this write, often without effect, must not invalidate an earlier forward pass before its backward pass.
        self.prototypes.weight.data.copy_(unit(self.prototypes.weight))

    @torch.no_grad()
    def _stored(self) -> Tensor | None:
        """Return scores of earlier projections with the prototypes, [crops, queue, prototypes]; None until the queue is full."""
        if not self.queues or int(self.written) < self.queue:
            return None
        return torch.stack([self.prototypes(queue.rows) for queue in self.queues])

    def forward(
        self, high: Float[Tensor, "crops n dim"], low: Float[Tensor, "small n dim"] | None = None
    ) -> Float[Tensor, ""]:
        """Return the mean over full-size crops and all other crops, then write the queues."""
        if self.queue and len(high) != self.crops:
            raise ValueError(f"high must hold {self.crops} crops, one for each queue, got {len(high)}")
        if self.training:
            self._to_unit()
        z = unit(high)
        scores = self.prototypes(z)
        small = None if low is None else self.prototypes(unit(low))
        with over(self.group):
            loss: Tensor = self.function(
                scores, small, self.temperature, self.epsilon, self.iterations, queue=self._stored()
            ).loss
            if self.training and self.queue:
                for queue, crop in zip(self.queues, z, strict=True):
                    assert isinstance(queue, Queue)
                    queue.write(crop)
                self.written.add_(place(z.shape[1], z.device).total).clamp_(max=self.queue)
        return loss

    def extra_repr(self) -> str:
        """Return the settings by name, without the prototypes, which are shown as a layer."""
        return f"dim={self.dim}, temperature={self.temperature:.4g}, epsilon={self.epsilon:.4g}, " + (
            f"iterations={self.iterations}, queue={self.queue}, crops={self.crops}"
        )


class DINO(Loss):
    """DINO: a student's crops predict the centred, sharpened outputs of a teacher. The centre is this module's buffer.

    Args:
        outcomes: Width of the heads' outputs.
        student_temperature: Temperature of the student, > 0.
        teacher_temperature: Temperature of the teacher, > 0. The paper raises it in the first epochs; to do so, set the
            attribute.
        center_momentum: Share of the centre that remains at each step, in 0..1.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [crops, n, outcomes] | head outputs of all crops, the global ones first |
        | teacher | [global crops, n, outcomes] | the moving average's head outputs of the global crops; no gradient |

    State: `center`, a buffer that a forward pass in training mode updates after the loss is computed.

    Relations: KD with a momentum teacher, a centre, and crops instead of one view.

    Source: Caron et al., arXiv 2104.14294, Eqs. 3 and 4.

    >>> DINO(outcomes=4)(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
    tensor(1.3863)
    """

    calls = "dino:dino"
    center: Float[Tensor, " outcomes"]

    def __init__(
        self,
        outcomes: int,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(
            outcomes=outcomes, student_temperature=student_temperature, teacher_temperature=teacher_temperature
        )
        need_within(0, 1, center_momentum=center_momentum)
        self.outcomes, self.center_momentum = outcomes, center_momentum
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.register_buffer("center", torch.zeros(outcomes))

    def forward(
        self, student: Float[Tensor, "crops n outcomes"], teacher: Float[Tensor, "global_crops n outcomes"]
    ) -> Float[Tensor, ""]:
        """Return the mean over global crops and all other crops, then update the centre."""
        with over(self.group):
            found = self.function(
                student,
                teacher,
                self.center,
                self.student_temperature,
                self.teacher_temperature,
                self.center_momentum,
            )
        if self.training:
            with torch.no_grad():
                self.center.copy_(found.center_after)
        loss: Tensor = found.loss
        return loss


class MAE(Loss):
    """MAE's reconstruction: the mean squared error of the pixels of the removed patches.

    Args:
        patch: Side of a patch, in pixels.
        norm_pix: Standardise each patch's target by its own mean and variance.
        group: Processes whose images are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | images | [n, channels, height, width] | the whole images; no gradient |
        | prediction | [n, patches, patch^2 * channels] | pixels of every patch, in the order of `functional.patchify` |
        | mask | [n, patches] | 1 where a patch was removed, else 0 |

    `counterpoint.functional.random_masking` draws a mask.

    Relations: unlike the other losses here, it compares pixels, not embeddings.

    Source: He et al., arXiv 2111.06377, Sec. 3.

    >>> MAE(patch=1, norm_pix=False)(torch.ones(1, 1, 2, 2), torch.zeros(1, 4, 1), torch.ones(1, 4))
    tensor(1.)
    """

    calls = "mae:reconstruction"

    def __init__(self, patch: int = 16, norm_pix: bool = True, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(patch=patch)
        self.patch, self.norm_pix = patch, norm_pix

    def forward(
        self,
        images: Float[Tensor, "n channels height width"],
        prediction: Float[Tensor, "n patches values"],
        mask: Float[Tensor, "n patches"],
    ) -> Float[Tensor, ""]:
        """Return the mean over images and removed patches."""
        with over(self.group):
            return self.function(images, prediction, mask, self.patch, self.norm_pix)
