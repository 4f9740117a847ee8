"""Define losses by which a student learns from a teacher. The teacher gets no gradient."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_within, need_word
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss, function_of


class KD(Loss):
    """Knowledge distillation: the student's softened outputs follow the teacher's.

    Args:
        temperature: Divisor of the logits, > 0. The loss is multiplied by its square.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, classes] | logits |
        | teacher | [n, classes] | logits; no gradient |

    Relations: MeanTeacher(kind="kl") is this loss with temperature 1.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531.

    >>> KD(temperature=1.0)(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    tensor(0.6031)
    """

    calls = "kd:kd"

    def __init__(self, temperature: float = 4.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
        """Return the mean over rows."""
        with over(self.group):
            return self.function(student, teacher, self.temperature)


class TokenKL(Loss):
    """Distillation of a language model: at chosen tokens, the student's distribution follows the teacher's (MEND).

    Args:
        temperature: Divisor of the logits, > 0. The loss is not multiplied by its square.
        group: Processes whose tokens are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, tokens, vocabulary] | logits |
        | teacher | [n, other tokens, vocabulary] | logits; no gradient |
        | mask | bool [n, tokens] | True at the student's tokens that are compared |
        | teacher_mask | bool [n, other tokens] | True at as many tokens of the teacher in each row. Default: `mask` |

    Relations: with temperature 1 it is KD with temperature 1 on the chosen tokens as rows.

    Source: Li et al., arXiv 2403.06914.

    >>> TokenKL()(torch.zeros(1, 1, 2), torch.tensor([[[0.0, 4.0]]]), torch.tensor([[True]]))
    tensor(0.6031)
    """

    calls = "mend:masked_token_kl"

    def __init__(self, temperature: float = 1.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        student: Float[Tensor, "n tokens vocabulary"],
        teacher: Float[Tensor, "n other vocabulary"],
        mask: Bool[Tensor, "n tokens"],
        teacher_mask: Bool[Tensor, "n other"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over the chosen tokens; 0 without any."""
        with over(self.group):
            return self.function(student, teacher, mask, self.temperature, teacher_mask=teacher_mask)


class AffinityMimicking(Loss):
    """TinyCLIP's affinity mimicking: the softmaxes over a batch's pairings follow the teacher's, in both directions.

    Args:
        temperature: Divisor of the student's cosines, > 0. The paper's code has a scale of 50, a temperature of 0.02.
        teacher_temperature: Divisor of the teacher's cosines, > 0. Default: the student's.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_image | [n, dim] | the student's unit rows of pictures |
        | student_text | [n, dim] | the student's unit rows of texts |
        | teacher_image | [n, teacher_dim] | the teacher's unit rows of pictures; no gradient |
        | teacher_text | [n, teacher_dim] | the teacher's unit rows of texts; no gradient |

    Relations: CLIP is this loss with the identity instead of the teacher's softmaxes.

    Source: Wu et al., arXiv 2309.12314.

    >>> same = torch.eye(2)
    >>> AffinityMimicking(1.0)(same, same, same, same)
    tensor(0.5822)
    """

    calls = "tinyclip:affinity_mimicking_loss"

    def __init__(
        self, temperature: float = 0.02, teacher_temperature: float | None = None, *, group: Group = None
    ) -> None:
        super().__init__(group)
        teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        need_positive(temperature=temperature, teacher_temperature=teacher_temperature)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(
        self,
        student_image: Float[Tensor, "n dim"],
        student_text: Float[Tensor, "n dim"],
        teacher_image: Float[Tensor, "n teacher_dim"],
        teacher_text: Float[Tensor, "n teacher_dim"],
    ) -> Float[Tensor, ""]:
        """Return the mean of both directions."""
        scales = 1 / self.temperature, 1 / self.teacher_temperature
        with over(self.group):
            loss: Tensor = self.function(
                student_image, student_text, scales[0], teacher_image, teacher_text, scales[1]
            ).loss
        return loss


class FitNets(Loss):
    """FitNets' hint: a layer of the student, mapped by this module's regressor, learns to equal a layer of the teacher.

    Args:
        student: Shape of the student's layer without the batch: (channels, height, width) of maps, (dim,) of vectors.
        teacher: Shape of the teacher's layer, likewise.
        kernel: Size of the convolution between maps of equal size, 1 or 3.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all). The regressor's batch
            normalisation stays local.

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, *student] | the guided layer |
        | teacher | [n, *teacher] | the hint layer; no gradient |

    State: `regressor`, whose parameters must be in the optimiser.

    Relations: AttentionTransfer compares the positions where maps are large, not the values of maps.

    Source: Romero et al., arXiv 1412.6550, Eq. 3 without its factor 1/2.

    >>> FitNets((16, 8, 8), (32, 4, 4))(torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 4, 4)).shape
    torch.Size([])
    """

    calls = "fitnets:feature_mse"

    def __init__(
        self, student: tuple[int, ...], teacher: tuple[int, ...], *, kernel: int = 3, group: Group = None
    ) -> None:
        super().__init__(group)
        self.student, self.teacher, self.kernel = tuple(student), tuple(teacher), kernel
        self.regressor = function_of("fitnets:hint_regressor")(self.student, self.teacher, kernel=kernel)

    def forward(self, student: Float[Tensor, "n ..."], teacher: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
        """Return the mean over all entries."""
        with over(self.group):
            return self.function(self.regressor(student), teacher)


class RKD(Loss):
    """Relational distillation: distances and angles between the student's rows follow those between the teacher's.

    Args:
        distance_weight: Weight of the distances, >= 0.
        angle_weight: Weight of the angles, >= 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, dim] | embeddings |
        | teacher | [n, teacher_dim] | embeddings of the same examples, of any width; no gradient |

    Relations: `functional.rkd_distance` and `functional.rkd_angle` are its two terms.

    Source: Park et al., arXiv 1904.05068, Eqs. 5 to 8.

    >>> RKD()(torch.eye(3), 2 * torch.eye(3)).item() < 1e-6
    True
    """

    calls = "rkd:rkd"

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, *, group: Group = None) -> None:
        super().__init__(group)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def forward(self, student: Float[Tensor, "n dim"], teacher: Float[Tensor, "n teacher_dim"]) -> Float[Tensor, ""]:
        """Return the weighted sum of both terms."""
        with over(self.group):
            loss: Tensor = self.function(student, teacher, self.distance_weight, self.angle_weight).loss
        return loss


class CRD(Loss):
    """Contrastive representation distillation: contrast student and teacher of one example with other examples.

    Args:
        student_dim, teacher_dim: Widths of the features.
        examples: Number of training examples.
        dim: Width of the two learnt embeddings.
        negatives: Number of other examples that each example is contrasted with.
        temperature: Divisor of the similarities, > 0.
        momentum: Share of a bank's row that remains when its example is in the batch, in 0..1.
        labels: Class of every training example. Negatives are then drawn from other classes only. None: from all examples.
        seed: Seed of the banks' initial noise; the same on every process.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, student_dim] | features |
        | teacher | [n, teacher_dim] | features of the same examples; no gradient |
        | index | [n] | positions of the examples in the training set |
        | contrast_index | [n, negatives + 1] or None | index, then the negatives' positions; None: drawn here |
        | generator | | a torch.Generator for the draw; None: torch's default one |

    State: `bank`, with both embeddings (parameters for the optimiser), both banks of unit rows and the normalising constants.
    A forward pass in training mode updates the banks.

    Relations: CRD contrasts two networks by NCE. CLIP contrasts two modalities by a softmax over the batch.

    Source: Tian, Krishnan and Isola, arXiv 1910.10699, Eqs. 10 to 19.

    >>> loss = CRD(student_dim=8, teacher_dim=16, examples=100, negatives=10)
    >>> loss(torch.randn(2, 8), torch.randn(2, 16), torch.tensor([3, 5])).shape
    torch.Size([])
    """

    calls = "crd:CRDLoss"

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        examples: int,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        *,
        labels: Int[Tensor, " examples"] | None = None,
        seed: int = 0,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        self.student_dim, self.teacher_dim, self.examples, self.dim = student_dim, teacher_dim, examples, dim
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.bank = self.function(
            student_dim,
            teacher_dim,
            examples,
            dim=dim,
            K=negatives,
            temperature=temperature,
            momentum=momentum,
            labels=labels,
            seed=seed,
        )

    def forward(
        self,
        student: Float[Tensor, "n student_dim"],
        teacher: Float[Tensor, "n teacher_dim"],
        index: Int[Tensor, " n"],
        contrast_index: Int[Tensor, "n listed"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of both sides, then write the banks."""
        if contrast_index is None:
            contrast_index = self.bank.draw(index, torch.default_generator if generator is None else generator)
        with over(self.group):
            loss: Tensor = self.bank(student, teacher, index, contrast_index)
        return loss


class AttentionTransfer(Loss):
    """Attention transfer of one pair of layers: the student's maps learn to be large where the teacher's are.

    Args:
        power: Exponent of the maps' absolute values, > 0.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, channels, height, width] | feature maps |
        | teacher | [n, teacher channels, height, width] | of any size and number of channels; no gradient |

    Relations: FitNets compares the values of maps.

    Source: Zagoruyko and Komodakis, arXiv 1612.03928, Eq. 2.

    >>> AttentionTransfer()(torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2))
    tensor(0.)
    """

    calls = "attention-transfer:attention_transfer"

    def __init__(self, power: float = 2.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(power=power)
        self.power = power

    def forward(
        self,
        student: Float[Tensor, "n channels height width"],
        teacher: Float[Tensor, "n teacher_channels teacher_height teacher_width"],
    ) -> Float[Tensor, ""]:
        """Return the mean over rows and positions."""
        with over(self.group):
            return self.function(student, teacher, self.power)


class MeanTeacher(Loss):
    """Mean teacher's consistency: a student learns to agree with the teacher on the class of an example.

    Args:
        kind: "mse" is the mean squared difference of the probabilities, "kl" is KL(teacher || student).
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, classes] | logits |
        | teacher | [n, classes] | logits of the moving average on another view; no gradient |

    `counterpoint.core.teacher.sigmoid_ramp` computes the weight, which rises in the first epochs.

    Relations: with kind="kl" it is KD with temperature 1.

    Source: Tarvainen and Valpola, arXiv 1703.01780.

    >>> MeanTeacher()(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    tensor(0.)
    """

    calls = "mean-teacher:mean_teacher"

    def __init__(self, kind: Literal["mse", "kl"] = "mse", *, group: Group = None) -> None:
        super().__init__(group)
        need_word(("mse", "kl"), kind=kind)
        self.kind = kind

    def forward(self, student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
        """Return the mean over rows."""
        with over(self.group):
            both = self.function(student, teacher)
        loss: Tensor = both.mse if self.kind == "mse" else both.kl
        return loss


class InterModal(Loss):
    """Any2Seg's relations between modalities: their relative agreement with the scene follows a teacher's.

    Args:
        temperature: Divisor of the correlations, > 0.
        distance: "kl" of the softmax over modalities, or "mse" of the correlations.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_row | [n, modalities] | correlation of each modality's maps with the fused map |
        | teacher_row | [n, modalities] | cosine of each modality's embedding with the sentence's; no gradient |
        | present | [n, modalities] | whether a sample has a modality; None: all |

    Relations: with distance="kl" it is KD without the factor temperature^2, over modalities instead of classes.

    Source: Zheng, Lyu and Wang, arXiv 2407.11351, Eq. 2; the distance is a choice of this library.

    >>> InterModal()(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    tensor(0.1109)
    """

    calls = "any2seg:inter_modal_loss"

    def __init__(self, temperature: float = 1.0, distance: Literal["kl", "mse"] = "kl", *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.distance = temperature, distance

    def forward(
        self,
        student_row: Float[Tensor, "n modalities"],
        teacher_row: Float[Tensor, "n modalities"],
        present: Bool[Tensor, "n modalities"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean over samples."""
        with over(self.group):
            return self.function(student_row, teacher_row, self.temperature, present, self.distance)


class IntraModal(Loss):
    """Any2Seg's relations between classes: cosines of their features follow cosines of their names' embeddings.

    Args:
        temperature: Divisor of the cosines, > 0.
        distance: "kl" of the softmax over a row's classes, or "mse" of the cosines off the diagonal.
        group: Processes whose images are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_prototypes | [n, classes, dim] | mean feature of each class in each image |
        | class_text | [classes, text] | embeddings of the names; no gradient |
        | present | [n, classes] | whether an image shows a class |

    Relations: RKD compares distances and angles of the examples of a batch; this loss compares cosines of classes.

    Source: Zheng, Lyu and Wang, arXiv 2407.11351, Eq. 5; the distance is a choice of this library.

    >>> IntraModal()(torch.eye(2)[None], torch.ones(2, 3), torch.tensor([[True, True]]))
    tensor(0.1201)
    """

    calls = "any2seg:intra_modal_loss"

    def __init__(self, temperature: float = 1.0, distance: Literal["kl", "mse"] = "kl", *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.distance = temperature, distance

    def forward(
        self,
        student_prototypes: Float[Tensor, "n classes dim"],
        class_text: Float[Tensor, "classes text"],
        present: Bool[Tensor, "n classes"],
    ) -> Float[Tensor, ""]:
        """Return the mean over a class's row, then over images."""
        with over(self.group):
            return self.function(student_prototypes, class_text, present, self.temperature, self.distance)


class WeightedFeature(Loss):
    """KD3's alignment: the student's maps equal the teacher's, pictures on which both networks disagree count more.

    Args:
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | feat_student | [n, channels, height, width] | the student's maps, projected to the teacher's channels |
        | feat_teacher | [n, channels, height, width] | the teacher's maps; no gradient |
        | logit_student | [n, classes] | the student's logits; no gradient |
        | logit_teacher | [n, classes] | the teacher's logits; no gradient |

    Relations: FitNets weighs all examples equally. With equal logits this loss is half of FitNets' without a regressor.

    Source: Tang et al., arXiv 2307.11469.

    >>> maps, logits = torch.ones(1, 2, 2, 2), torch.zeros(1, 3)
    >>> WeightedFeature()(maps, 0 * maps, logits, logits)
    tensor(0.5000)
    """

    calls = "kd3:weighted_feature_loss"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(
        self,
        feat_student: Float[Tensor, "n channels height width"],
        feat_teacher: Float[Tensor, "n channels height width"],
        logit_student: Float[Tensor, "n classes"],
        logit_teacher: Float[Tensor, "n classes"],
    ) -> Float[Tensor, ""]:
        """Return the mean over all entries of the maps."""
        with over(self.group):
            return self.function(feat_student, feat_teacher, logit_student, logit_teacher)


class DynamicScores(Loss):
    """DCD: a student imitates a teacher's scores of a picture and its captions, weighted by the teacher's uncertainty.

    Args:
        alpha: Share of the imitation, 0 to 1; the rest is the cross-entropy of each pair.
        imitation_weighting: "per_sample" (pictures that the teacher is certain of count more) or "uniform".
        task_weighting: "entropy" (pictures that the teacher is uncertain of count more) or "uniform".
        centre: Subtract each row's mean from both scores in the imitation.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_scores | [n, captions] | the student's scores; column 0 is the picture's own caption |
        | teacher_scores | [n, captions] | the teacher's scores of the same captions; no gradient |

    Relations: KD compares softened distributions, this loss the scores themselves. Choose the captions by
    `counterpoint.functional.select_hard_negatives`.

    Source: Rao et al., arXiv 2207.01426.

    >>> import torch
    >>> DynamicScores(alpha=1.0)(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(1.)
    """

    calls = "dcd:dynamic_distillation_loss"

    def __init__(
        self,
        alpha: float = 0.2,
        imitation_weighting: Literal["per_sample", "uniform"] = "per_sample",
        task_weighting: Literal["entropy", "uniform"] = "entropy",
        centre: bool = False,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_within(0, 1, alpha=alpha)
        self.alpha, self.centre = alpha, centre
        self.imitation_weighting, self.task_weighting = imitation_weighting, task_weighting

    def forward(
        self, student_scores: Float[Tensor, "n captions"], teacher_scores: Float[Tensor, "n captions"]
    ) -> Float[Tensor, ""]:
        """Return the weighted sum of both terms."""
        with over(self.group):
            loss: Tensor = self.function(
                student_scores,
                teacher_scores,
                1.0,
                self.alpha,
                self.imitation_weighting,
                self.task_weighting,
                self.centre,
            )[0]
        return loss
