"""What a student learns from a teacher: outputs, features, relations, attention, instance discrimination, consistency.

The teacher never gets a gradient, except in CRD, where its side has an embedding that is learnt too. Every loss is that of
the whole batch across processes.

  kd                    Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531
  feature_mse           Romero et al.: "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550
  rkd                   Park, Kim, Lu, Cho: "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068
  attention_transfer    Zagoruyko, Komodakis: "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928
  crd                   Tian, Krishnan, Isola: "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699
  mean_teacher          Tarvainen, Valpola: "Mean teachers are better role models", NeurIPS 2017, arXiv 1703.01780
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_rows, need_within, shapes
from counterpoint.core.contrast import EPS, softplus, unit
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.memory import Bank, latest, moved, need_positions
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.teacher import sigmoid_ramp
from counterpoint.core.transforms import holds, once, traced

# Numbers that a block of an intermediate result may hold: it stays in the cache between the steps made of it.
BLOCK = 2**20


# ------------------------------------------------------------------------------------------------- outputs and features


@full_precision
def kd(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float = 4.0
) -> Float[Tensor, ""]:
    """temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature)), the mean over the batch (Sec. 2).

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


@full_precision
def feature_mse(student: Float[Tensor, "n ..."], teacher: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Mean over all entries of (student - teacher)^2: the hint of FitNets (Eq. 3, without its factor 1/2).

    Args:
        student: the guided layer, already regressed to the teacher's shape (see `hint_regressor`).
        teacher: the hint layer; no gradient.

    Raises ValueError for shapes that differ and for an empty batch.

    >>> feature_mse(torch.zeros(2, 3), torch.ones(2, 3))
    tensor(1.)
    """
    need_alike("n " + "rest " * (student.ndim - 1), student=student, teacher=teacher)
    return global_mean((wide(student) - wide(teacher.detach())).square().flatten(1).mean(1))


def hint_regressor(student: tuple[int, ...], teacher: tuple[int, ...], *, kernel: int = 3) -> nn.Module:
    """A layer that brings the student's features to the shape of the teacher's.

    Args:
        student, teacher: shapes without the batch: (channels, height, width) of maps, (dim,) of vectors.
        kernel: of the convolution between maps of equal size, 1 or 3.

    Maps: a convolution of stride 2 where the student's is twice the size, a transposed one where it is half, otherwise one
    without padding that is as large as the difference (the paper's, Sec. 2.2); batch normalisation and ReLU follow, as the
    teacher's maps are rectified. Vectors: a linear map. Raises ValueError for shapes that nothing of this connects.

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
        raise ValueError(f"no regressor makes maps of {to_high} x {to_wide} of the student's {high} x {wide_}")
    return nn.Sequential(layer, nn.BatchNorm2d(teacher[0]), nn.ReLU())


@full_precision
def attention_transfer(
    student: Float[Tensor, "n channels height width"],
    teacher: Float[Tensor, "n teacher_channels teacher_height teacher_width"],
    power: float = 2,
) -> Float[Tensor, ""]:
    """Mean over batch and places of (Q_s - Q_t)^2, Q the normalised map of mean over channels of |F|^power (Sec. 3.1).

    Args:
        student, teacher: feature maps of one layer each; the teacher's get no gradient. The larger is average-pooled to
            the smaller size first; channels may differ.
        power: > 0.

    A map of zeros has no attention anywhere: Q = 0. Raises ValueError for shapes that do not fit.

    >>> attention_transfer(torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2))
    tensor(0.)
    """
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must be [n, c, h, w] of one n, got {shapes(student=student, teacher=teacher)}"
        )
    need_rows(student=student)
    need_positive(power=power)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return global_mean((_attention(student, size, power) - _attention(teacher.detach(), size, power)).square().mean(1))


def _attention(maps: Tensor, size: tuple[int, int], power: float) -> Tensor:
    maps = wide(maps)
    if maps.shape[2:] != size:
        maps = F.adaptive_avg_pool2d(maps, size)
    maps = maps if power % 2 == 0 else maps.abs()
    return unit(maps.pow(power).mean(1).flatten(1))


# --------------------------------------------------------------------------------------------------------------- relations


@full_precision
def rkd_distance(student: Float[Tensor, "n dim"], teacher: Float[Tensor, "n teacher_dim"]) -> Float[Tensor, ""]:
    """Mean over the n^2 pairs of Huber(d^s - d^t), d the Euclidean distance over the mean distance (Sec. 3.2.1).

    As in published code, squared distances are at least 1e-12: where all points of one side are equal, all its distances
    are. They are computed from centred points, so a common offset costs no precision. One point has no pairs: 0.
    Raises ValueError for shapes that do not fit.

    >>> rkd_distance(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0, 0.0], [0.0, 5.0], [0.0, 10.0]])).item() < 1e-9
    True
    """
    x, y = _gathered(student, teacher)
    if len(x) < 2:
        return x.sum() * 0
    return F.smooth_l1_loss(_relative_distances(x), _relative_distances(y))


def _gathered(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must be [n, dim] and [n, teacher_dim], got {shapes(student=student, teacher=teacher)}"
        )
    need_rows(student=student)
    return gather_rows(wide(student)), gather_rows(wide(teacher.detach()))


def _relative_distances(x: Tensor) -> Tensor:
    n = len(x)
    x = x - x.mean(0)
    square = x.square().sum(1)
    distance = torch.addmm(square[:, None] + square, x, x.T, alpha=-2).clamp(min=1e-12).sqrt()
    distance = distance.masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0.0)
    return distance * (n * (n - 1) / distance.sum())


class _AngleLoss(torch.autograd.Function):
    """The angle-wise loss and, while a block of anchors is at hand, its gradient: nothing of size n^3 is ever kept."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        step = max(1, BLOCK // (n * max(n, student.shape[1], teacher.shape[1])))
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student)
        total = student.new_zeros(())
        for start in range(0, n, step):
            anchors = slice(start, start + step)
            towards, length = _directions(student, anchors)
            difference = torch.bmm(towards, towards.mT)
            other = _directions(teacher, anchors)[0].to(student.dtype)
            difference.baddbmm_(other, other.mT, alpha=-1)
            slope = difference.clamp(-1, 1)
            # Huber(x) = c (x - c/2) with c = clamp(x, -1, 1), which is its derivative too.
            total += (slope * (difference - slope / 2)).sum()
            if wanted:
                # Each angle holds a direction twice and the slope is symmetric; then through the normalisation.
                pull = torch.bmm(slope, towards)
                pull = (pull - (pull * towards).sum(2, keepdim=True) * towards).mul_(2 / length)
                gradient += pull.sum(0)
                gradient[anchors] -= pull.sum(1)
        ctx.save_for_backward(gradient / n**3)
        return total / n**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def _directions(x: Tensor, anchors: slice) -> tuple[Tensor, Tensor]:
    """Unit vectors from the anchors to all points [anchors, n, dim], 0 to themselves, and the lengths they had."""
    towards = x - x[anchors, None]
    length = torch.linalg.vector_norm(towards, dim=2, keepdim=True).clamp_(min=EPS)
    return towards.div_(length), length


@full_precision
def rkd_angle(student: Float[Tensor, "n dim"], teacher: Float[Tensor, "n teacher_dim"]) -> Float[Tensor, ""]:
    """Mean over the n^3 triplets of Huber(A^s - A^t), A_ijk = cos of the angle at i between j and k (Sec. 3.2.2).

    A is 0 where j or k is i or lies on it. Blocks of anchors and a gradient made in the same pass keep the memory at a few
    blocks of [anchors, n, n] (no second derivative: RuntimeError). Inside torch.func and
    torch.compile all n^3 angles are held. Raises ValueError for shapes that do not fit.

    >>> rkd_angle(torch.eye(3), 2 * torch.eye(3)).item() < 1e-9
    True
    """
    x, y = _gathered(student, teacher)
    if traced():
        return _composed_angle_loss(x, y)
    return _AngleLoss.apply(once(x, "rkd_angle"), y)


def _composed_angle_loss(x: Tensor, y: Tensor) -> Tensor:
    """The angle-wise loss of PyTorch's own operations, in memory n^3."""
    angles = []
    for points in (x, y):
        towards = unit(points - points[:, None])
        angles.append(towards @ towards.mT)
    return F.smooth_l1_loss(angles[0], angles[1])


class RKDOutput(NamedTuple):
    loss: Float[Tensor, ""]
    distance: Float[Tensor, ""]
    angle: Float[Tensor, ""]


@full_precision
def rkd(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n teacher_dim"],
    w_distance: float = 25.0,
    w_angle: float = 50.0,
) -> RKDOutput:
    """w_distance rkd_distance + w_angle rkd_angle, and the two; the widths of student and teacher may differ.

    >>> rkd(torch.eye(3), 2 * torch.eye(3)).loss.item() < 1e-6
    True
    """
    distance, angle = rkd_distance(student, teacher), rkd_angle(student, teacher)
    return RKDOutput(w_distance * distance + w_angle * angle, distance, angle)


# ------------------------------------------------------------------------------------------ contrastive representation (CRD)


def _listed(memory: Tensor, index: Tensor) -> bool:
    """Whether to fetch the listed rows of each sample rather than multiply with the whole memory, whose rows come in order."""
    return len(memory) > 16 * index.shape[1]


def _blocks(v: Tensor, index: Tensor) -> list[slice]:
    step = max(1, BLOCK // (index.shape[1] * v.shape[1]))
    return [slice(start, start + step) for start in range(0, len(v), step)]


def _dots(v: Tensor, memory: Tensor, index: Tensor) -> Tensor:
    """v_b . memory[index_bk], [n, K + 1]."""
    if not _listed(memory, index):
        return (v @ memory.T).gather(1, index)
    return torch.cat(
        [torch.bmm(memory[index[part]], v[part, :, None]).squeeze(2) for part in _blocks(v, index)]
        or [v.new_empty(index.shape)]
    )


class _CRDRows(torch.autograd.Function):
    """One side's loss of each sample and, in the same pass, its gradient: the bank may be written before backward runs.

    With h = exp(v . m / t) / Z and c = K/N + 1e-7, log h/(h + c) = -softplus(-a) and log c/(h + c) = -softplus(a),
    a = v . m / t - log Z - log c: no exponential that could overflow.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, memory: Tensor, index: Tensor, temperature: float, shift: Tensor) -> Tensor:
        a = _dots(v, memory, index) / temperature - shift
        rows = softplus(-a[:, 0]) + softplus(a[:, 1:]).sum(1)
        slope = torch.sigmoid(a)
        slope[:, 0] -= 1
        if not ctx.needs_input_grad[0]:
            gradient = torch.zeros_like(v)
        elif _listed(memory, index):
            gradient = F.embedding_bag(index, memory, mode="sum", per_sample_weights=slope)
        else:
            gradient = v.new_zeros(len(v), len(memory)).scatter_add_(1, index, slope) @ memory
        ctx.save_for_backward(gradient / temperature)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0][:, None] * ctx.saved_tensors[0], None, None, None, None


@torch.no_grad()
def _log_z(v: Tensor, memory: Tensor, index: Tensor, temperature: float) -> Tensor:
    """log of N times the mean of exp(v . m / t) over the batch of all processes."""
    logs = _dots(v, memory, index) / temperature
    total = gather_rows(logs.flatten().logsumexp(0)[None]).logsumexp(0)
    count = gather_rows(torch.tensor([logs.numel()], device=v.device)).sum().to(v.dtype)
    return total - count.log() + math.log(len(memory))


@full_precision(keep=("memory", "z"))
def _crd_side(v: Tensor, memory: Tensor, index: Tensor, temperature: float, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss of one side and its Z, which is taken from this batch if there is none yet."""
    memory = memory.detach().to(v.dtype)
    v = once(v, "crd")
    log_z = _log_z(v.detach(), memory, index, temperature) if z is None else z.detach().to(v.dtype).log()
    negatives = index.shape[1] - 1
    noise = negatives / len(memory)
    shift = log_z + math.log(noise + 1e-7)
    if traced():
        a = _dots(v, memory, index) / temperature - shift
        rows = softplus(-a[:, 0]) + softplus(a[:, 1:]).sum(1)
    else:
        rows = _CRDRows.apply(v, memory, index, temperature, shift)
    # What is left of sum_k log (K/N)/(h + c) when c = K/N + 1e-7 has been put in the numerator's place.
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
    r"""Each side's embedding is to find the other side's memory of the same sample among K others (the paper's NCE form, Sec. 3).

    With h_s = exp(v_s . M_t / temperature) / Z_s (and h_t with M_s), c = K/N + 1e-7, each side loses
    -(1/n) sum_b [ log h_0/(h_0 + c) + sum_k log (K/N)/(h_k + c) ].

    Args:
        student, teacher: embeddings, unit rows (not normalised here); both get gradients, as both embeddings are learnt.
        memory_student, memory_teacher: one unit row per training sample; no gradient, and left as they are.
        index: position of each sample in the data set.
        contrast_index: [index, K others] in each row.
        temperature: > 0.
        momentum: how much of a memory's row stays.
        n_data, K: what the shapes say already; checked if given.
        Z_student, Z_teacher: normalising constants; None (the first batch) takes N times the mean of exp over this batch.

    Returns the loss, its two parts, the constants to give next time, and the memories afterwards (new tensors, with
    rows[index] <- unit(momentum rows + (1 - momentum) v); of a sample that comes twice the last counts). `CRD` keeps all
    that, and writes in place. No second derivative. Raises ValueError for shapes that do not fit and positions outside.

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


class CRD(nn.Module):
    """`crd` with what it keeps: both embeddings (learnt), both memories, the constants, and a way to draw the others.

    Args:
        student_dim, teacher_dim: widths of the features given.
        n_data: number of training samples.
        dim: width of the embeddings.
        K: how many others each sample is contrasted with.
        temperature, momentum: see `crd`.
        labels: class of every training sample; then others are drawn from other classes only, as the authors' CIFAR
            scripts do. None: from all samples.
        seed: of the memories' noise, a number or a generator; the same on every process.

    Memories start as normalised Gaussian rows (the authors' are uniform, of nearly unit length). Writing them is part of
    the forward pass in training mode.

    >>> crd = CRD(8, 16, n_data=100, K=10)
    >>> index = torch.tensor([3, 5])
    >>> others = crd.draw(index, torch.Generator().manual_seed(0))
    >>> crd(torch.randn(2, 8), torch.randn(2, 16), index, others).shape
    torch.Size([])
    """

    z: Float[Tensor, " 2"]
    by_class: Int[Tensor, " samples"]
    first: Int[Tensor, " samples"]
    count: Int[Tensor, " samples"]

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
        self.register_buffer("z", torch.zeros(2))  # of student and teacher; 0 until the first batch has set them
        self.by_other_class = False
        if labels is not None:
            self.draw_by_class(labels)

    def draw_by_class(self, labels: Int[Tensor, " samples"]) -> None:
        """From now on draw the others of a sample from other classes only; `labels` is the class of every training sample.

        Not part of the state dict. Raises ValueError for labels of another length, or of one class.
        """
        n_data = len(self.memory_student.rows)
        if labels.shape != (n_data,):
            raise ValueError(f"labels must be [{n_data}], got {list(labels.shape)}")
        # Samples in the order of their classes, and for each sample where its class begins in it and how long it is.
        inverse, counts = labels.unique(return_inverse=True, return_counts=True)[1:]
        if len(counts) < 2:
            raise ValueError("labels holds one class: there are no samples of another to draw")
        self.by_other_class = True
        self.register_buffer("by_class", inverse.argsort(stable=True), persistent=False)
        self.register_buffer("first", (counts.cumsum(0) - counts)[inverse], persistent=False)
        self.register_buffer("count", counts[inverse], persistent=False)

    def draw(self, index: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, "n listed"]:
        """[index, K samples drawn uniformly, with replacement] in each row; costs n K, whatever the size of the data set.

        Without labels a sample may be among its own others, as in the authors' draws from all samples.
        """
        n_data = len(self.memory_student.rows)
        need_positions(index, n_data)
        shape = (len(index), self.K)
        if not self.by_other_class:
            others = torch.randint(n_data, shape, generator=generator, device=generator.device).to(index.device)
            return torch.cat([index[:, None], others], 1)
        # Positions in the order of classes with the own class cut out, the later ones moved up over the gap.
        free = n_data - self.count[index][:, None]
        uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device)
        places = (uniform.to(index.device) * free).long().clamp_(max=free - 1)
        places += (places >= self.first[index][:, None]) * self.count[index][:, None]
        return torch.cat([index[:, None], self.by_class[places]], 1)

    def forward(
        self,
        student: Float[Tensor, "n student_dim"],
        teacher: Float[Tensor, "n teacher_dim"],
        index: Int[Tensor, " n"],
        contrast_index: Int[Tensor, "n listed"],
    ) -> Float[Tensor, ""]:
        """The loss of a batch of features (no gradient to the teacher's), whose embeddings then enter the memories."""
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


# -------------------------------------------------------------------------------------------------------------- consistency


class MeanTeacherOutput(NamedTuple):
    mse: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    ramp: Float[Tensor, " epochs"]


@full_precision
def mean_teacher(
    student: Float[Tensor, "n classes"],
    teacher: Float[Tensor, "n classes"],
    rampup_length: float = 5.0,
    *,
    epochs: int = 8,
) -> MeanTeacherOutput:
    """Consistency of two sets of logits, either as mean squared difference of the softmaxes or as KL(teacher || student).

    Args:
        student, teacher: logits; the teacher's get no gradient.
        rampup_length: epochs until the consistency counts fully.
        epochs: how many weights of `ramp` to give.

    Returns mse (mean over batch and classes), kl (mean over the batch) and ramp, the weight of the consistency in each of
    the first `epochs` epochs (see `core.teacher.sigmoid_ramp`). Raises ValueError for shapes that differ.

    >>> mean_teacher(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]), epochs=1)
    MeanTeacherOutput(mse=tensor(0.), kl=tensor(0.), ramp=tensor([0.0067]))
    """
    need_alike("n classes", student=student, teacher=teacher)
    own, target = F.log_softmax(wide(student), dim=1), F.softmax(wide(teacher.detach()), dim=1)
    return MeanTeacherOutput(
        global_mean((own.exp() - target).square().mean(1)),
        global_mean(F.kl_div(own, target, reduction="none").sum(1)),
        own.new_tensor([sigmoid_ramp(epoch, rampup_length) for epoch in range(epochs)]),
    )
