"""Losses between the crops of pictures and between their regions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_positive, need_within, shapes
from counterpoint.core.prototypes import moved_center
from counterpoint.core.world import Group, over
from counterpoint.losses.base import Loss


class CMD(Loss):
    """Cross-level distillation: a student's crops and their regions predict a teacher's, and each level the other.

    Args:
        outcomes: Width of the heads' outputs.
        student_temperature: Temperature of the student, > 0.
        teacher_temperature: Temperature of the teacher, > 0. Set the attribute to raise it in the first epochs.
        center_momentum: Share of both centres that remains at each step, in 0..1.
        inter: Inter-level term: "within" a network, "across" (the other network's level), "literal" (the released code, NaN
            where a bag's logits have a negative sum), or "none" (EsViT).
        inter_weight: Weight of the inter-level term, at least 0.
        pooling: Weights of the regions of a bag: "mean", or "attention" by their cosine with the mean region.
        region_weight: Share of the region level in EsViT's loss, in 0..1.
        attention_temperature: Temperature of the attention, > 0.
        group: Processes whose batches together form the batch: None (this process), a ProcessGroup, or "world" (all).

    Inputs:
        | argument | shape | holds |
        |---|---|---|
        | student | [crops, n, outcomes] | image outputs of all crops, the two global ones first |
        | student_regions | list of [crops of a size, n, regions, outcomes] | region outputs: global crops, then local ones |
        | student_features | list of [crops of a size, n, regions, dim] | the encoder's features of these regions |
        | teacher | [2, n, outcomes] | the moving average's image outputs of the global crops; no gradient |
        | teacher_regions | [2, n, regions, outcomes] | its region outputs; no gradient |
        | teacher_features | [2, n, regions, dim] | its features of these regions; no gradient |

    State: `center` and `center_grid`, which a forward pass in training mode updates after the loss is computed.

    Relations: with inter="none" and region_weight=0 it is DINO.

    Source: Bi et al., arXiv 2401.08860; Li et al. (EsViT), arXiv 2106.09785.

    >>> x = torch.zeros(2, 1, 4)
    >>> CMD(outcomes=4)(x, [x[:, :, None]], [x[:, :, None]], x, x[:, :, None], x[:, :, None])
    tensor(1.3863)
    """

    calls = "cmd:cmd_loss"
    center: Float[Tensor, " outcomes"]
    center_grid: Float[Tensor, " outcomes"]

    def __init__(
        self,
        outcomes: int,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        inter: str = "within",
        inter_weight: float = 1.0,
        pooling: str = "mean",
        region_weight: float = 0.5,
        attention_temperature: float = 0.1,
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
        self.inter, self.inter_weight, self.pooling = inter, inter_weight, pooling
        self.region_weight, self.attention_temperature = region_weight, attention_temperature
        self.register_buffer("center", torch.zeros(outcomes))
        self.register_buffer("center_grid", torch.zeros(outcomes))

    def forward(
        self,
        student: Float[Tensor, "crops n outcomes"],
        student_regions: Sequence[Float[Tensor, "_ n _ outcomes"]],
        student_features: Sequence[Float[Tensor, "_ n _ dim"]],
        teacher: Float[Tensor, "2 n outcomes"],
        teacher_regions: Float[Tensor, "2 n regions outcomes"],
        teacher_features: Float[Tensor, "2 n regions dim"],
    ) -> Float[Tensor, ""]:
        """Return the loss of all pictures, then update the centres."""
        if student.ndim != 3 or any(x.ndim != 4 for x in (*student_regions, *student_features, teacher_regions)):
            named = {f"student_regions {number}": x for number, x in enumerate(student_regions)}
            raise ValueError(
                "student must be [crops, n, outcomes] and regions [crops, n, regions, width], got "
                + shapes(student=student, **named, teacher_regions=teacher_regions)
            )
        outputs, features = (
            torch.cat([x.flatten(0, 2) for x in parts]) for parts in (student_regions, student_features)
        )
        with over(self.group):
            found = self.function(
                *(student.flatten(0, 1), outputs, features),
                *(teacher.flatten(0, 1), teacher_regions.flatten(0, 2), teacher_features.flatten(0, 2)),
                *([x.shape[2] for x in student_regions], len(student), self.center, self.center_grid),
                *(self.student_temperature, self.teacher_temperature),
                inter=self.inter,
                inter_weight=self.inter_weight,
                pooling=self.pooling,
                region_weight=self.region_weight,
                attention_temperature=self.attention_temperature,
            )
            if self.training:
                self.center.copy_(moved_center(self.center, teacher.flatten(0, 1), self.center_momentum))
                grid = moved_center(self.center_grid, teacher_regions.flatten(0, 2), self.center_momentum)
                self.center_grid.copy_(grid)
        loss: Tensor = found.loss
        return loss
