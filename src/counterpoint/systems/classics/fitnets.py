"""FitNets: a layer of the student, followed by a small regressor, learns the output of a layer of the teacher.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio: "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550.

The hint loss (Eq. 3) is `feature_mse`, the regressor `hint_regressor`. Hint and cross-entropy are minimised together, as in
later comparisons. The paper's two stages are not built: first the hint alone for the student's lower layers, then KD.
`--kd-weight` adds the paper's second stage to the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from counterpoint.core.checks import need_alike
from counterpoint.core.distributed import global_mean
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.world import over_group
from counterpoint.errors import CounterpointError
from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, Seen, TaughtConfig, TaughtLearner


@over_group
@full_precision
def feature_mse(student: Float[Tensor, "n ..."], teacher: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Compute the mean over all entries of (student - teacher)^2: the hint of FitNets (Eq. 3, without its factor 1/2).

    Args:
        student: output of the guided layer, already regressed to the teacher's shape (see `hint_regressor`).
        teacher: output of the hint layer; no gradient.

    Raises ValueError for different shapes and for an empty batch.

    >>> feature_mse(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(1.)
    """
    need_alike("n " + "rest " * (student.ndim - 1), student=student, teacher=teacher)
    return global_mean((wide(student) - wide(teacher.detach())).square().flatten(1).mean(1))


def hint_regressor(student: tuple[int, ...], teacher: tuple[int, ...], *, kernel: int = 3) -> nn.Module:
    """Build a layer that maps the student's features to the shape of the teacher's.

    Args:
        student, teacher: shapes without the batch: (channels, height, width) of maps, (dim,) of vectors.
        kernel: size of the convolution between maps of equal size, 1 or 3 (default).

    Vectors need a linear map, maps need a convolution:

    - The student's map is twice as large: a convolution of stride 2.
    - It is half as large: a transposed convolution.
    - Otherwise: a convolution without padding that is as large as the difference (the paper's, Sec. 2.2).

    Batch normalisation and ReLU follow, because the teacher's maps are rectified. Raises ValueError for shapes that no such
    layer connects.

    >>> hint_regressor((16, 8, 8), (32, 4, 4))(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 32, 4, 4])
    """
    if len(student) == len(teacher) == 1:
        return nn.Linear(student[0], teacher[0])
    if not len(student) == len(teacher) == 3 or kernel not in (1, 3):
        raise ValueError(
            f"student {student} and teacher {teacher} must both be (channels, height, width) or (dim,), kernel 1 or 3"
        )
    channels, (high, wide_), (to_high, to_wide) = (student[0], teacher[0]), student[1:], teacher[1:]
    layer: nn.Module
    if (high, wide_) == (to_high, to_wide):
        layer = nn.Conv2d(*channels, kernel, padding=kernel // 2)
    elif (high, wide_) == (2 * to_high, 2 * to_wide):
        layer = nn.Conv2d(*channels, 3, stride=2, padding=1)
    elif (2 * high, 2 * wide_) == (to_high, to_wide):
        layer = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    elif high >= to_high and wide_ >= to_wide:
        layer = nn.Conv2d(*channels, (1 + high - to_high, 1 + wide_ - to_wide))
    else:
        raise ValueError(
            f"no regressor maps the student's {high} x {wide_} to {to_high} x {to_wide}; choose layers of closer sizes"
        )
    return nn.Sequential(layer, nn.BatchNorm2d(teacher[0]), nn.ReLU())


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class FitNetsConfig(TaughtConfig):
    """Settings of FitNets. Defaults are those of CRD's comparison on CIFAR-100."""

    weight: float = 100.0
    """Weight of the hint, at least 0."""
    guided: str = "layer2"
    """The student's layer that learns the hint; in a wrapped library model, the library's name."""
    hint: str = "layer2"
    """The teacher's layer whose output is the hint."""

    weights: ClassVar[tuple[str, ...]] = (*TaughtConfig.weights, "weight")


class FitNets(TaughtLearner):
    """Cross-entropy and one hint."""

    def __init__(self, config: FitNetsConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        (student,), (teacher,) = self.shapes()
        try:
            self.regressor = hint_regressor(student, teacher)
        except ValueError as error:
            raise CounterpointError(
                f"the student's {config.guided} cannot be guided by the teacher's {config.hint}: {error}"
            ) from error

    def layers(self) -> tuple[list[str], list[str]]:
        return [self.config.guided], [self.config.hint]

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"hint": self.config.weight * feature_mse(self.regressor(student.maps[0]), teacher.maps[0])}


SYSTEM = System(
    slug="fitnets",
    task="labelled",
    config=FitNetsConfig,
    learner=FitNets,
    data="cifar10",
    recipe=LAPTOP | {"guided": "layer1", "hint": "layer2"},
)
