"""Losses on the similarity of a student's feature maps, and of its classifier's gradient, to a teacher's (DisWOT)."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_word
from counterpoint.core.distributed import gather_rows
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss, function_of


class RelationDistance(Loss):
    """DisWOT's D_rel: the student's images are as similar to one another as the teacher's (similarity-preserving loss).

    Args:
        group: Processes whose rows together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | feat_teacher | [n, ...] | features or maps of any shape; no gradient |
        | feat_student | [n, ...] | features or maps of any shape, of the same images |

    Relations: RKD compares distances and angles; this loss compares inner products, with each row of length 1.

    Source: Dong, Li and Wei, arXiv 2303.15678, Sec. 3.2; Tung and Mori, arXiv 1907.09682.

    >>> import torch
    >>> RelationDistance()(torch.eye(2), torch.ones(2, 3))
    tensor(0.2929)
    """

    calls = "diswot:relation_distance"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(self, feat_teacher: Float[Tensor, "n ..."], feat_student: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
        """Return the mean over pairs of images."""
        with over(self.group):
            loss: Tensor = self.function(feat_teacher, feat_student)
        return loss


class ChannelCorrelation(Loss):
    """The form of DisWOT's D_sem for maps: the student's channels correlate as the teacher's, picture by picture (ICKD).

    Args:
        group: Processes whose images are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | feat_s | [n, channels, height, width] | the student's maps |
        | feat_t | [n, channels, height, width] | the teacher's maps; height and width may differ; no gradient |

    Relations: SemanticDistance compares the channels of the classifiers' gradients.

    Source: Liu et al., ICKD, ICCV 2021; Dong, Li and Wei, arXiv 2303.15678.

    >>> import torch
    >>> ChannelCorrelation()(torch.eye(2)[None, :, :, None], torch.ones(1, 2, 1, 1))
    tensor(0.5858)
    """

    calls = "diswot:channel_correlation"

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(
        self,
        feat_s: Float[Tensor, "n channels height width"],
        feat_t: Float[Tensor, "n channels teacher_height teacher_width"],
    ) -> Float[Tensor, ""]:
        """Return the mean over images."""
        with over(self.group):
            loss: Tensor = self.function(feat_s, feat_t)
        return loss


class SemanticDistance(Loss):
    """DisWOT's D_sem: the classifier's gradient has, class by class, the channels of the teacher's.

    The gradients are those of the mean cross-entropy of the whole batch with respect to the classifiers' weights.

    Args:
        compare: "channels", for equal widths, or "classes", for any widths.
        group: Processes whose rows together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | feature_teacher | [n, channels] | input of the teacher's classifier; no gradient |
        | logits_teacher | [n, classes] | its output; no gradient |
        | feature_student | [n, student channels] | input of the student's classifier |
        | logits_student | [n, classes] | its output |
        | labels | [n] | classes |

    Relations: ChannelCorrelation compares the channels of maps.

    Source: Dong, Li and Wei, arXiv 2303.15678, Sec. 3.1; "classes" is a choice of this library.

    >>> import torch
    >>> x, y = torch.ones(2, 3), torch.zeros(2, 2)
    >>> SemanticDistance()(x, y, x, y, torch.tensor([0, 0]))
    tensor(0.)
    """

    calls = "diswot:semantic_distance"

    def __init__(self, compare: Literal["channels", "classes"] = "channels", *, group: Group = None) -> None:
        super().__init__(group)
        need_word(("channels", "classes"), compare=compare)
        self.compare = compare

    def forward(
        self,
        feature_teacher: Float[Tensor, "n channels"],
        logits_teacher: Float[Tensor, "n classes"],
        feature_student: Float[Tensor, "n student_channels"],
        logits_student: Float[Tensor, "n classes"],
        labels: Int[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return the mean over classes and channels."""
        gradient = function_of("diswot:classifier_gradient")
        with over(self.group):
            rows = [gather_rows(x) for x in (feature_teacher, logits_teacher, feature_student, logits_student, labels)]
            loss: Tensor = self.function(
                gradient(rows[0], rows[1], rows[4]), gradient(rows[2], rows[3], rows[4]), self.compare
            )
        return loss
