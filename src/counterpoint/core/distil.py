"""Distillation that every taught learner shares: the divergence between the softened outputs of two classifiers."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group


@over_group
@full_precision
def kd(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float = 4.0
) -> Float[Tensor, ""]:
    """Compute temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature)), the batch's mean (Sec. 2).

    Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        student, teacher: logits; the teacher's get no gradient.
        temperature: > 0; its square keeps the size of the gradients.

    Raises ValueError for shapes that differ and for an empty batch.

    >>> kd(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]]), temperature=1.0)
    tensor(0.6031)
    """
    need_alike("n classes", student=student, teacher=teacher)
    need_positive(temperature=temperature)
    own = F.log_softmax(wide(student) / temperature, dim=1)
    target = F.softmax(wide(teacher.detach()) / temperature, dim=1)
    return temperature**2 * global_mean(F.kl_div(own, target, reduction="none").sum(1))
