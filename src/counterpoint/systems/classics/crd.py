"""CRD: discriminate pairs of student and teacher embeddings of the same image from pairs of different images.

Tian, Krishnan, Isola: "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.

The loss (Eqs. 10 to 19) is `crd`. `CRDLoss` adds both embeddings, which learn with the student, and two memories with one row
per training image. Not built: drawing the one positive from the whole class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.contrast import softplus
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.exponentials import softplus_sum
from counterpoint.core.listed import OtherClasses, listed_products, listed_sums
from counterpoint.core.memory import Bank, latest, moved, need_positions
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.transforms import holds, once, traced
from counterpoint.core.world import over_group
from counterpoint.engine.survey import Survey
from counterpoint.systems.base import System
from counterpoint.tasks.taught import LAPTOP, Seen, TaughtConfig, TaughtLearner

# --------------------------------------------------------------------------------------------------------------- the loss


class _CRDRows(torch.autograd.Function):
    """One side's loss of each sample, with the gradient from the same pass.

    The bank may therefore change before backward. Let h = exp(v . m / t) / Z, c = K/N + 1e-7 and
    a = v . m / t - log Z - log c. Then no exponential can overflow:

        log h/(h + c) = -softplus(-a)
        log c/(h + c) = -softplus(a)
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, memory: Tensor, index: Tensor, temperature: float, shift: Tensor) -> Tensor:
        a = listed_products(v, memory, index) / temperature - shift
        rows = softplus(-a[:, 0]) + softplus_sum(a[:, 1:])
        slope = torch.sigmoid(a)
        slope[:, 0] -= 1
        gradient = listed_sums(slope, memory, index) if ctx.needs_input_grad[0] else torch.zeros_like(v)
        ctx.save_for_backward(gradient / temperature)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0][:, None] * ctx.saved_tensors[0], None, None, None, None


@torch.no_grad()
def _log_z(v: Tensor, memory: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Compute the logarithm of N times the mean of exp(v . m / t) over the batch of all processes."""
    logs = listed_products(v, memory, index) / temperature
    total = gather_rows(logs.flatten().logsumexp(0)[None]).logsumexp(0)
    count = gather_rows(torch.tensor([logs.numel()], device=v.device)).sum().to(v.dtype)
    return total - count.log() + math.log(len(memory))


@full_precision(keep=("memory", "z"))
def _crd_side(v: Tensor, memory: Tensor, index: Tensor, temperature: float, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the loss of one side and its Z. If `z` is None, take Z from this batch."""
    memory = memory.detach().to(v.dtype)
    v = once(v, "crd")
    log_z = _log_z(v.detach(), memory, index, temperature) if z is None else z.detach().to(v.dtype).log()
    negatives = index.shape[1] - 1
    noise = negatives / len(memory)
    shift = log_z + math.log(noise + 1e-7)
    if traced():
        a = listed_products(v, memory, index) / temperature - shift
        rows = softplus(-a[:, 0]) + softplus(a[:, 1:]).sum(1)
    else:
        rows = _CRDRows.apply(v, memory, index, temperature, shift)
    # The rest of sum_k log (K/N)/(h + c) after replacing the numerator by c = K/N + 1e-7.
    return global_mean(rows) + negatives * (math.log(noise + 1e-7) - math.log(noise)), log_z.exp()


def _need_crd_shapes(student: Tensor, teacher: Tensor, index: Tensor, contrast_index: Tensor) -> None:
    need_alike("n dim", student=student, teacher=teacher)
    if index.shape != student.shape[:1]:
        raise ValueError(f"index must be [n], got {shapes(index=index, student=student)}")
    if contrast_index.ndim != 2 or len(contrast_index) != len(index) or contrast_index.shape[1] < 2:
        raise ValueError(f"contrast_index must be [n, K + 1] with K >= 1, got {shapes(contrast_index=contrast_index)}")
    if holds((contrast_index[:, 0] != index).any()):
        raise ValueError("contrast_index must start with the sample itself: its first column is not index")


class CRDOutput(NamedTuple):
    loss: Float[Tensor, ""]
    loss_student: Float[Tensor, ""]
    loss_teacher: Float[Tensor, ""]
    Z_student: Float[Tensor, ""]
    Z_teacher: Float[Tensor, ""]
    memory_student: Float[Tensor, "samples dim"]
    memory_teacher: Float[Tensor, "samples dim"]


@over_group
@full_precision(keep=("memory_student", "memory_teacher", "Z_student", "Z_teacher"))
def crd(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    memory_student: Float[Tensor, "samples dim"],
    memory_teacher: Float[Tensor, "samples dim"],
    index: Int[Tensor, " n"],
    contrast_index: Int[Tensor, "n listed"],
    temperature: float = 0.07,
    momentum: float = 0.5,
    n_data: int | None = None,
    K: int | None = None,
    *,
    Z_student: Float[Tensor, ""] | None = None,
    Z_teacher: Float[Tensor, ""] | None = None,
) -> CRDOutput:
    r"""Contrast each side's embedding with the other side's memories of its own sample and K others (NCE, Sec. 3).

    Let h_s = exp(v_s . M_t / temperature) / Z_s, likewise h_t with M_s, and c = K/N + 1e-7. The loss of each side is

        -(1/n) sum_b [ log h_0/(h_0 + c) + sum_k log (K/N)/(h_k + c) ]

    Args:
        student, teacher: embeddings, unit rows, which this function does not normalise. Both get gradients, because both
            embeddings learn.
        memory_student, memory_teacher: one unit row per training sample; no gradient. They stay unchanged.
        index: position of each sample in the data set.
        contrast_index: [index, K others] in each row.
        temperature: > 0, by default 0.07.
        momentum: share of a memory's row that an update keeps, 0 to 1; by default 0.5.
        n_data, K: number of training samples and of others; None: taken from the shapes. Other values raise ValueError.
        Z_student, Z_teacher: normalising constants; None (the first batch): N times the mean of exp over this batch.

    Returns the loss, its two parts, the constants for the next call, and the updated memories. These are new tensors, with
    rows[index] <- unit(momentum rows + (1 - momentum) v). If a sample occurs twice, its last row counts. `CRDLoss` keeps
    memories and constants, and writes in place. There is no second derivative. Raises ValueError for shapes that do not fit
    and for positions outside the memories.

    >>> x, memory = torch.eye(2), torch.eye(4, 2)
    >>> out = crd(x, x, memory, memory, torch.tensor([0, 1]), torch.tensor([[0, 1, 2], [1, 0, 3]]))
    >>> torch.equal(out.loss, out.loss_student + out.loss_teacher)
    True
    """
    need_alike("samples dim", memory_student=memory_student, memory_teacher=memory_teacher)
    _need_crd_shapes(student, teacher, index, contrast_index)
    if memory_student.shape[1] != student.shape[1]:
        raise ValueError(f"dim differs: {shapes(student=student, memory_student=memory_student)}")
    need_positions(contrast_index.flatten(), len(memory_student))
    need_positive(temperature=temperature)
    need_within(0, 1, momentum=momentum)
    if n_data not in (None, len(memory_student)) or K not in (None, contrast_index.shape[1] - 1):
        raise ValueError(
            f"n_data {n_data} and K {K} contradict {shapes(memory_student=memory_student, contrast_index=contrast_index)}"
        )
    v_student, v_teacher = wide(student), wide(teacher)
    loss_student, z_student = _crd_side(v_student, memory_teacher, contrast_index, temperature, Z_student)
    loss_teacher, z_teacher = _crd_side(v_teacher, memory_student, contrast_index, temperature, Z_teacher)
    whole = gather_rows(index)
    last = latest(whole)
    after = []
    for memory, v in ((memory_student, student), (memory_teacher, teacher)):
        rows = moved(memory.detach()[whole[last]], gather_rows(v.detach())[last], momentum)
        after.append(memory.detach().index_copy(0, whole[last], rows))
    return CRDOutput(loss_student + loss_teacher, loss_student, loss_teacher, z_student, z_teacher, *after)


class CRDLoss(nn.Module):
    """Keep the state of `crd` between steps: two learnt embeddings, two memories, the constants.

    Args:
        student_dim, teacher_dim: widths of the features.
        n_data: number of training samples.
        dim: width of the embeddings, by default 128.
        K: number of others that each sample is contrasted with, by default 16,384.
        temperature, momentum: as for `crd`.
        labels: class of every training sample, to draw others from other classes only, as in the authors' CIFAR scripts.
            None: draw from all samples.
        seed: seed or generator of the memories' initial noise; the same on every process.

    Memories start as normalised Gaussian rows. The authors' rows are uniform and of nearly unit length. In training mode the
    forward pass updates the memories.

    >>> crd = CRDLoss(8, 16, n_data=100, K=10)
    >>> index = torch.tensor([3, 5])
    >>> others = crd.draw(index, torch.Generator().manual_seed(0))
    >>> crd(torch.randn(2, 8), torch.randn(2, 16), index, others).shape
    torch.Size([])
    """

    z: Float[Tensor, " 2"]

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        n_data: int,
        *,
        dim: int = 128,
        K: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        labels: Int[Tensor, " samples"] | None = None,
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__()
        need_positive(K=K, temperature=temperature)
        self.K, self.temperature = K, temperature
        self.embed_student = nn.Linear(student_dim, dim)
        self.embed_teacher = nn.Linear(teacher_dim, dim)
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        self.memory_student = Bank(n_data, dim, momentum=momentum, seed=generator)
        self.memory_teacher = Bank(n_data, dim, momentum=momentum, seed=generator)
        self.register_buffer("z", torch.zeros(2))  # constants of student and teacher; 0 before the first batch
        self.classes: OtherClasses | None = None
        if labels is not None:
            self.draw_by_class(labels)

    def draw_by_class(self, labels: Int[Tensor, " samples"]) -> None:
        """Draw the others of a sample from other classes only, from now on.

        Args:
            labels: class of every training sample. The state dict does not contain it.

        Raises ValueError for labels of another length, or of one class.
        """
        n_data = len(self.memory_student.rows)
        if labels.shape != (n_data,):
            raise ValueError(f"labels must be [{n_data}], got {list(labels.shape)}")
        self.classes = OtherClasses(labels)

    def draw(self, index: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, "n listed"]:
        """Draw [index, K samples] for each row, uniformly and with replacement.

        The cost is n K, independent of the size of the data set. Without labels a sample may be among its own others, as in
        the authors' draws from all samples.
        """
        n_data = len(self.memory_student.rows)
        need_positions(index, n_data)
        if self.classes is not None:
            others = self.classes.draw(index, self.K, generator)
        else:
            shape = (len(index), self.K)
            others = torch.randint(n_data, shape, generator=generator, device=generator.device).to(index.device)
        return torch.cat([index[:, None], others], 1)

    def forward(
        self,
        student: Float[Tensor, "n student_dim"],
        teacher: Float[Tensor, "n teacher_dim"],
        index: Int[Tensor, " n"],
        contrast_index: Int[Tensor, "n listed"],
    ) -> Float[Tensor, ""]:
        """Compute the loss of a batch of features; in training mode, write their embeddings into the memories.

        The teacher's features get no gradient. `index` and `contrast_index` are as for `crd`.
        """
        v_student = unit(self.embed_student(student))
        v_teacher = unit(self.embed_teacher(teacher.detach()))
        _need_crd_shapes(v_student, v_teacher, index, contrast_index)
        need_positions(contrast_index.flatten(), len(self.memory_student.rows))
        z_student, z_teacher = (None, None) if bool(self.z[0] == 0) else self.z
        sides = (
            _crd_side(v_student, self.memory_teacher.rows, contrast_index, self.temperature, z_student),
            _crd_side(v_teacher, self.memory_student.rows, contrast_index, self.temperature, z_teacher),
        )
        if self.training:
            if z_student is None:
                self.z.copy_(torch.stack([z for _, z in sides]))
            self.memory_student.update(index, v_student)
            self.memory_teacher.update(index, v_teacher)
        return sides[0][0] + sides[1][0]


# ------------------------------------------------------------------------------------------------------------ the learner


@dataclass
class CRDConfig(TaughtConfig):
    """Settings of CRD. Defaults are the paper's for CIFAR-100 in its best form, CRD with KD."""

    kd_weight: float = 1.0
    weight: float = 0.8
    """Weight of the contrast, at least 0."""
    temperature: float = 0.07
    """Temperature of the contrast, > 0."""
    negatives: int = 16384
    """Number of negatives for each image (the paper's N), at least 1."""
    dim: int = 128
    """Width of the embeddings, at least 1."""
    memory_momentum: float = 0.5
    """Share of a memory's row that an update with its image keeps, 0 to 1."""
    other_classes: bool = True
    """Draw negatives from other classes only, as in the authors' scripts; False: from all images."""

    weights: ClassVar[tuple[str, ...]] = (*TaughtConfig.weights, "weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_count("negatives", "dim")
        self.need_positive("temperature")
        self.need_share("memory_momentum")


class CRD(TaughtLearner):
    """Cross-entropy, KD and the contrast of embeddings."""

    def __init__(self, config: CRDConfig, data: Any, seed: int = 0) -> None:
        super().__init__(config, data, seed)
        self.contrast = CRDLoss(
            self.encoder.dim,
            cast(Any, self.instructing).encoder.dim,
            data.examples,
            dim=config.dim,
            K=config.negatives,
            temperature=config.temperature,
            momentum=config.memory_momentum,
            seed=seed,
        )

    def begin(self, survey: Survey) -> None:
        super().begin(survey)
        if self.config.other_classes:
            assert survey.labels is not None
            self.contrast.draw_by_class(survey.labels)

    def prepare(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        batch = super().prepare(batch, generator)
        if self.at_teacher:
            return batch
        # Draw for the whole batch and cut, as for the views.
        _, mine = self.share(len(batch["index"]))
        return batch | {"contrast": self.contrast.draw(self.whole(batch["index"]), generator)[mine]}

    def lesson(self, student: Seen, teacher: Seen, batch: dict[str, Any]) -> dict[str, Tensor]:
        loss = self.contrast(student.feature, teacher.feature, batch["index"], batch["contrast"])
        return {"contrast": self.config.weight * loss}


SYSTEM = System(
    slug="crd",
    task="labelled",
    config=CRDConfig,
    learner=CRD,
    data="cifar10",
    recipe=LAPTOP | {"negatives": 1024},
)
