"""Define losses by which a vision transformer learns from the tokens of others. Teachers get no gradient."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_positive
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class TokenRelation(Loss):
    """Token relations of a layer: the student's attention, and its relations of values, follow the teacher's.

    Args:
        group: Processes whose pictures are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_qkv | three of [n, heads, tokens, d] | queries, keys and values |
        | teacher_qkv | three of [n, heads, tokens, dt] | those of as many heads and tokens; no gradient |

    Relations: KD compares classes of a picture; this loss compares, for each token, all tokens of the picture.

    Source: TinyMIM (Ren et al., CVPR 2023, arXiv 2301.01296), as in Hybrid Distill, arXiv 2306.15876.

    >>> qkv = list(torch.eye(3).expand(3, 1, 1, 3, 3))
    >>> TokenRelation()(qkv, qkv)
    tensor(0.)
    """

    calls = "hybrid-distill:relation_distillation_loss"

    def forward(
        self,
        student_qkv: Sequence[Float[Tensor, "n heads tokens d"]],
        teacher_qkv: Sequence[Float[Tensor, "n heads tokens dt"]],
    ) -> Float[Tensor, ""]:
        """Return the mean over pictures, heads and rows of the two divergences' sum."""
        with over(self.group):
            return self.function(student_qkv, teacher_qkv)


class TokenFeature(Loss):
    """Token features: the student's tokens, mapped by this module's projector, follow the teacher's normalised tokens.

    Args:
        student: Width of the student's tokens.
        teacher: Width of the teacher's tokens.
        transition: Error at which the loss changes from squared to absolute, > 0.
        group: Processes whose pictures are averaged: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student_tokens | [n, tokens, student] | the student's last tokens |
        | teacher_tokens | [n, tokens, teacher] | the teacher's at the same places; no gradient |

    State: `projector`, whose parameters must be in the optimiser.

    Relations: FitNets compares maps by squared error, without the teacher's normalisation.

    Source: feature distillation (Wei et al., arXiv 2205.14141), as in Hybrid Distill, arXiv 2306.15876.

    >>> TokenFeature(8, 4)(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4)).shape
    torch.Size([])
    """

    calls = "hybrid-distill:feature_distillation_loss"

    def __init__(self, student: int, teacher: int, *, transition: float = 2.0, group: Group = None) -> None:
        super().__init__(group)
        need_positive(student=student, teacher=teacher, transition=transition)
        self.student, self.teacher, self.transition = student, teacher, transition
        self.projector = nn.Linear(student, teacher)

    def forward(
        self, student_tokens: Float[Tensor, "n tokens student"], teacher_tokens: Float[Tensor, "n tokens teacher"]
    ) -> Float[Tensor, ""]:
        """Return the mean over pictures, tokens and channels."""
        with over(self.group):
            return self.function(student_tokens, teacher_tokens, self.projector, self.transition)
