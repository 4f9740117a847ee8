"""Define losses by which a student of pictures learns from a teacher's pictures and class texts. The teacher gets no gradient."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_positive, need_within
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class VL2V(Loss):
    """VL2V-ADiP: features, projected by this module, approach the teacher's picture and the text of the class.

    Args:
        student_dim, teacher_dim: Widths of the features and of the teacher's space.
        lmd: Share of the picture, 0 to 1; the text has the rest.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | features | [n, student_dim] | the backbone's features |
        | labels | [n] | class numbers |
        | teacher_image | [n, teacher_dim] | the teacher's embeddings of the pictures |
        | class_text | [classes, teacher_dim] | embeddings of the classes' texts |

    State: `projector`. First train it alone, then freeze it and train the backbone.

    Relations: NegativeCosine is its term of pictures, without the projector.

    Source: Addepalli et al., arXiv 2310.08255, Eqs. 2 and 3.

    >>> import torch
    >>> VL2V(8, 4)(torch.randn(2, 8), torch.tensor([0, 1]), torch.randn(2, 4), torch.randn(3, 4)).shape
    torch.Size([])
    """

    calls = "vl2v-adip:vl2v_loss"

    def __init__(self, student_dim: int, teacher_dim: int, lmd: float = 0.5, *, group: Group = None) -> None:
        super().__init__(group)
        need_within(0, 1, lmd=lmd)
        self.student_dim, self.teacher_dim, self.lmd = student_dim, teacher_dim, lmd
        self.projector = nn.Linear(student_dim, teacher_dim)

    def forward(
        self,
        features: Float[Tensor, "n student_dim"],
        labels: Int[Tensor, " n"],
        teacher_image: Float[Tensor, "n teacher_dim"],
        class_text: Float[Tensor, "classes teacher_dim"],
    ) -> Float[Tensor, ""]:
        """Return the mean over rows."""
        weights = self.projector.weight, self.projector.bias
        with over(self.group):
            return self.function(features, labels, teacher_image, class_text, *weights, self.lmd)


class VLMOOD(Loss):
    """VLM-OOD distillation: cross-entropy with label texts, alignment with them, and imitation of the teacher's features.

    Args:
        temperature: Divisor of the cosines, > 0.
        topk: Texts nearest to the teacher's picture that the alignment compares; -1: without the alignment.
        filter_misaligned: Leave pictures that the teacher gets wrong out of the alignment.
        cls: Whether to use the cross-entropy; without it also no alignment.
        mse: Whether to use the squared distance of unit features.
        contrast: Whether to use the contrast of the student's features with the teacher's.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [n, dim] | features |
        | teacher | [n, dim] | the teacher's features; no gradient |
        | text | [classes, dim] | embeddings of the classes' texts; no gradient |
        | labels | [n] | class numbers |

    Relations: CLIP is its contrast, with the teacher's features as the other modality.

    Source: Li et al., arXiv 2307.03135.

    >>> import torch
    >>> same = torch.eye(2)
    >>> VLMOOD(cls=False, contrast=False)(same, same, same, torch.tensor([0, 1]))
    tensor(0.)
    """

    calls = "vlm-ood-distill:vlm_ood_distillation_loss"

    def __init__(
        self,
        temperature: float = 0.07,
        topk: int = 256,
        filter_misaligned: bool = True,
        cls: bool = True,
        mse: bool = True,
        contrast: bool = True,
        *,
        group: Group = None,
    ) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.topk, self.filter_misaligned = temperature, topk, filter_misaligned
        self.cls, self.mse, self.contrast = cls, mse, contrast

    def forward(
        self,
        student: Float[Tensor, "n dim"],
        teacher: Float[Tensor, "n dim"],
        text: Float[Tensor, "classes dim"],
        labels: Int[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return the sum of the chosen losses."""
        with over(self.group):
            loss: Tensor = self.function(
                student,
                teacher,
                text.detach(),
                labels,
                temperature=self.temperature,
                topk=self.topk,
                filter_misaligned=self.filter_misaligned,
                use_cls=self.cls,
                use_mse=self.mse,
                use_contrastive=self.contrast,
            )[0]
        return loss


class PromptKD(Loss):
    """PromptKD: divergence of a student's logits over class texts from a teacher's, divided by the number of classes.

    Args:
        temperature: Divisor of the logits of both, > 0.
        kd_weight: Weight, at least 0; a plain mean divergence has the weight kd_weight / classes.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_logits | [n, classes] | the student's scaled cosines with the class texts |
        | teacher_logits | [n, classes] | the teacher's; no gradient |

    Relations: KD is it times classes / kd_weight.

    Source: Li et al., arXiv 2403.02781.

    >>> import torch
    >>> PromptKD()(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """

    calls = "promptkd:prompt_distillation_loss"

    def __init__(self, temperature: float = 1.0, kd_weight: float = 1000.0, *, group: Group = None) -> None:
        super().__init__(group)
        need_positive(temperature=temperature)
        self.temperature, self.kd_weight = temperature, kd_weight

    def forward(
        self, student_logits: Float[Tensor, "n classes"], teacher_logits: Float[Tensor, "n classes"]
    ) -> Float[Tensor, ""]:
        """Return the mean over rows."""
        with over(self.group):
            loss: Tensor = self.function(student_logits, teacher_logits, self.temperature, self.kd_weight)
        return loss


class PromptTuning(Loss):
    """PromptSRC: few labels tune prompts, whose texts, pictures and logits stay close to those without prompts.

    Args:
        logit_scale: Factor of cosines, > 0.
        text_weight, image_weight: Weights of the mean absolute differences of texts and of pictures, at least 0.
        group: Processes whose rows are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | image | [n, dim] | embeddings of pictures with prompts |
        | text | [classes, dim] | embeddings of class texts with prompts |
        | frozen_image | [n, dim] | those without prompts; no gradient |
        | frozen_text | [classes, dim] | those without prompts; no gradient |
        | labels | [n] | class numbers |

    Relations: PromptKD is its divergence of logits, with temperature and weight 1.

    Source: Khattak et al., arXiv 2307.06948, as stage 1 of Li et al., arXiv 2403.02781.

    >>> import torch
    >>> same = torch.eye(2)
    >>> PromptTuning()(same, same, same, same, torch.tensor([0, 1]))
    tensor(0.)
    """

    calls = "promptkd:prompt_tuning_loss"

    def __init__(
        self, logit_scale: float = 100.0, text_weight: float = 25.0, image_weight: float = 10.0, *, group: Group = None
    ) -> None:
        super().__init__(group)
        need_positive(logit_scale=logit_scale)
        self.logit_scale, self.text_weight, self.image_weight = logit_scale, text_weight, image_weight

    def forward(
        self,
        image: Float[Tensor, "n dim"],
        text: Float[Tensor, "classes dim"],
        frozen_image: Float[Tensor, "n dim"],
        frozen_text: Float[Tensor, "classes dim"],
        labels: Int[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return the sum of the four terms."""
        weights = self.logit_scale, self.text_weight, self.image_weight
        with over(self.group):
            loss: Tensor = self.function(image, text, frozen_image, frozen_text, labels, *weights)
        return loss
