"""Score rows against learned prototypes, keep a running centre of the scores (DINO), and move prototypes by their rows.

`moved_prototypes` and `moved_tag_prototypes`: each row moves the prototype of its class, one row after another. Sources: MoPro (Li,
Xiong, Hoi, ICLR 2021, arXiv 2009.07995) and CAPro (Qin et al., NeurIPS 2023, arXiv 2310.09761). `prototypes_towards_means` moves
them by the means of a batch, and `prototype_alignment` contrasts them with texts (MulKI).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_rows, need_scale, need_within, shapes
from counterpoint.core.distributed import gather_rows
from counterpoint.core.operands import EPS, unit
from counterpoint.core.precision import full_precision, scalar, wide


class DINOHead(nn.Module):
    """A head of three layers with GELU between them, a normalisation, and a linear layer of unit rows.

    The third layer is a bottleneck. Unit rows equal the authors' weight normalisation with its gain fixed to 1.

    Args:
        dim: width of the features.
        hidden: width of the two hidden layers.
        bottleneck: width of the third layer.
        outcomes: number of prototypes, the width of the output.
        norm: batch normalisation in the hidden layers; False (default): none.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, outcomes: int, *, norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (dim, hidden):
            layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(bottleneck, outcomes, bias=False)

    def forward(self, features: Float[Tensor, "n dim"]) -> Float[Tensor, "n outcomes"]:
        return F.linear(unit(self.mlp(features)), unit(self.last.weight))


@torch.no_grad()
def moved_center(
    center: Float[Tensor, "*one outcomes"], rows: Float[Tensor, "rows outcomes"], momentum: float = 0.9
) -> Float[Tensor, "*one outcomes"]:
    """Compute m center + (1 - m) mean of all processes' rows (DINO, arXiv 2104.14294, Eq. 4).

    Args:
        center: the centre so far; its type is kept.
        rows: the teacher's raw outputs.
        momentum: m, 0 to 1, by default 0.9.

    >>> moved_center(torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0.5)
    tensor([1.0000, 1.5000])
    """
    count = gather_rows(torch.tensor([len(rows)], device=rows.device)).sum()
    mean = gather_rows(wide(rows).sum(0, keepdim=True)).sum(0) / count
    return center.detach().lerp(mean.to(center.dtype), 1 - momentum)


@torch.no_grad()
def moved_prototypes(
    prototypes: Float[Tensor, "classes dim"],
    rows: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    momentum: float,
    order: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, "classes dim"]:
    """Move prototypes by the rows of their classes, one after another, then normalise them.

    Args:
        prototypes: unit rows.
        rows, labels: rows in order, of all processes in rank order, and their classes; -1 for none.
        momentum: share of the prototype that stays at each row, 0 to 1.
        order: the gathered rows in the order to take. None (default): rank order.

    >>> moved_prototypes(torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.5)
    tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]])
    """
    rows, labels = _ordered(order, rows.detach().to(prototypes.dtype), labels)
    at = labels.argsort(stable=True)[int((labels < 0).sum()) :]  # by class, each in order
    labels, counts = labels[at], labels[at].bincount(minlength=len(prototypes))
    later = counts.cumsum(0)[labels] - 1 - torch.arange(len(at), device=at.device)  # rows of this class that follow
    share = (1 - momentum) * momentum ** later.to(rows.dtype)
    stays = momentum ** counts.to(rows.dtype)
    return unit((stays[:, None] * prototypes).index_add_(0, labels, share[:, None] * rows[at]))


@torch.no_grad()
def moved_tag_prototypes(
    prototypes: Float[Tensor, "classes 2 dim"],
    rows: Float[Tensor, "n classes dim"],
    tags: Int[Tensor, "n classes"],
    momentum: float,
    order: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, "classes 2 dim"]:
    """Move the two prototypes of each class, for its absence and its presence, by rows whose tag is known.

    Args:
        prototypes: unit rows, of absence and of presence.
        rows: an embedding of each row for each class, of all processes in rank order.
        tags: 1 where the class is present, 0 where absent, -1 where the tag is not known.
        momentum: share of the prototype that stays at each row, 0 to 1.
        order: the gathered rows in the order to take. None (default): rank order.

    >>> moved_tag_prototypes(torch.eye(2)[None], torch.tensor([[[0.0, 1.0]]]), torch.tensor([[0]]), 0.5)
    tensor([[[0.7071, 0.7071],
             [0.0000, 1.0000]]])
    """
    rows, tags = _ordered(order, rows.detach().to(prototypes.dtype), tags)
    own = tags[:, :, None] == torch.arange(2, device=tags.device)
    later = own.flip(0).cumsum(0).flip(0) - 1  # rows of this tag that follow
    share = torch.where(own, (1 - momentum) * momentum ** later.clamp(min=0).to(rows.dtype), 0)
    stays = momentum ** own.sum(0).to(rows.dtype)
    return unit(stays[..., None] * prototypes + torch.einsum("nkt,nkd->ktd", share, rows))


def _ordered(order: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Gather the rows of all processes, and put them in order."""
    gathered = [gather_rows(tensor) for tensor in tensors]
    return gathered if order is None else [tensor[order] for tensor in gathered]


@full_precision
def prototype_alignment(
    text: Float[Tensor, "classes dim"], prototypes: Float[Tensor, "classes dim"], logit_scale: float | Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute L_proto: the symmetric contrast of class texts and prototypes, in the mean over classes (step 1).

    Args:
        text, prototypes: unit rows of the same classes.
        logit_scale: s, 1 / temperature of the logits, at least 0.

    Raises ValueError for different shapes and for no class.

    >>> prototype_alignment(torch.eye(2), torch.eye(2), 1.0)
    tensor(0.3133)
    """
    if text.ndim != 2 or text.shape != prototypes.shape:
        raise ValueError(
            f"text and prototypes must be [classes, dim] alike, got {shapes(text=text, prototypes=prototypes)}"
        )
    need_rows(text=text)
    need_scale(logit_scale=logit_scale)
    logits = scalar(logit_scale, wide(text)) * (wide(text) @ wide(prototypes).T)
    return ((logits.logsumexp(0) + logits.logsumexp(1)) / 2 - logits.diagonal()).mean()


@torch.no_grad()
def prototypes_towards_means(
    prototypes: Float[Tensor, "classes dim"],
    rows: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    momentum: float = 0.9,
) -> Float[Tensor, "classes dim"]:
    """Compute norm(m P + (1 - m) mean of all processes' rows of the class); a class without rows keeps its prototype.

    Args:
        prototypes: P, unit rows.
        rows: unit rows of images.
        labels: class numbers.
        momentum: m, 0 to 1, by default 0.9.

    >>> prototypes_towards_means(torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.5)
    tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]])
    """
    need_within(0, 1, momentum=momentum)
    every, numbers = gather_rows(rows.to(prototypes.dtype)), gather_rows(labels)
    sums = torch.zeros_like(prototypes).index_add_(0, numbers, every)
    count = numbers.bincount(minlength=len(prototypes))[:, None]
    moved = F.normalize(prototypes.lerp(sums / count.clamp(min=1), 1 - momentum), dim=1, eps=EPS)
    return torch.where(count > 0, moved, prototypes)
