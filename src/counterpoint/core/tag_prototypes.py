"""Compute a step of prototypes and labels where a picture may have several labels: the second form of CAPro.

Qin et al.: "CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes", NeurIPS 2023, arXiv 2310.09761. The form for
one label, and the symbols, are in `systems.supervision.capro`.

    z_k = P_k(z); c_k0, c_k1: unit prototypes of absence and presence of class k; w_k = sqrt(absent / present)

    L_cls   = BCE(A(q), y; w)                  L_low = (1 - beta) BCE(A'(z_k), y; w) - beta sum_k b_k log sigmoid(A'(z_k))
    b       = mean over u in Q of a sigmoid(A'(u_k)) + (1 - a) softmax(u_k . [c_k0, c_k1] / T)_1, weighted by max(z . u, 0)
    L_proto = CE(z_k . [c_k0, c_k1] / T, y), times mean w where y = 1
    s       = a sigmoid(A(q)) + (1 - a) softmax(z_k . [c_k0, c_k1] / T)_1: keeps, flips or ignores y (`judged_tags`)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.distributed import gather_rows, global_mean, mean_where
from counterpoint.core.noisy_labels import bootstrap_target, judged_tags
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.prototypes import moved_tag_prototypes
from counterpoint.core.world import over_group


def queue_contrast(
    z: Float[Tensor, "n low"], z_key: Float[Tensor, "n low"], queue: Float[Tensor, "low keys"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "n columns"], Float[Tensor, "low keys"]]:
    """Return L_inst, its logits with the queue before this batch enters, and the queue with it, the newest columns first."""
    z_key, older = z_key.detach(), queue.detach().to(z.dtype)
    scaled = z / temperature
    logits = torch.cat([(scaled * z_key).sum(1, keepdim=True), scaled @ older], 1)
    new = gather_rows(z_key)[-queue.shape[1] :]
    loss = global_mean(F.cross_entropy(logits, logits.new_zeros(len(z), dtype=torch.long), reduction="none"))
    return loss, logits, torch.cat([new.T, older[:, len(new) :]], 1).detach()


def tag_scores(
    logits: Float[Tensor, "n classes"], near: Float[Tensor, "n classes 2"], alpha: float
) -> Float[Tensor, "n classes"]:
    """Compute a sigmoid(logits) + (1 - a) softmax(near)_1: the score of the presence of each class.

    Args:
        logits: of the classifier.
        near: similarities with the prototypes of absence and presence, over their temperature.
        alpha: a, the classifier's share, 0 to 1.
    """
    return alpha * logits.sigmoid() + (1 - alpha) * near.softmax(2)[..., 1]


def tag_losses(
    logits: Float[Tensor, "n classes"], tags: Int[Tensor, "n classes"], weight: Float[Tensor, " classes"]
) -> Float[Tensor, "n classes"]:
    """Compute the binary cross-entropy of each tag, where 1 is present and any other number absent.

    Args:
        logits: of the presence of each class.
        tags: the labels.
        weight: factor of the loss where the class is present.
    """
    present = (tags == 1).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, present, pos_weight=weight, reduction="none")


class TagHeads(nn.Module):
    """P_k and A'_k: for each class a linear map of z with normalised rows, and a linear score of it.

    Args:
        low: width of z and of its maps.
        classes: number of classes.
    """

    def __init__(self, low: int, classes: int) -> None:
        super().__init__()
        bound = (6 / low) ** 0.5
        self.weight = nn.Parameter(torch.empty(classes, low, low).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.full((classes, low), 0.01))
        self.score = nn.Parameter(torch.empty(classes, low).uniform_(-bound, bound))

    def project(self, z: Float[Tensor, "n low"]) -> Float[Tensor, "n classes low"]:
        """Return P_k(z) for each class."""
        return unit(torch.einsum("nl,kml->nkm", z, self.weight) + self.bias)

    def forward(self, near: Float[Tensor, "n classes low"]) -> Float[Tensor, "n classes"]:
        """Return A'_k(P_k(z)) of the rows of `project`."""
        return (near * self.score).sum(2)


@torch.no_grad()
def tag_sums(
    heads: TagHeads, keys: Float[Tensor, "n low"], chosen: Bool[Tensor, "n classes"], tags: Int[Tensor, "n classes"]
) -> Float[Tensor, "classes 2 low"]:
    """Sum P_k(z) over the rows that start the prototypes of absence and presence of each class.

    Args:
        heads: the projectors.
        keys: z of all rows, on the CPU.
        chosen: the rows that texts choose for each class. Absence starts with those that are chosen for other classes.
        tags: 1 where a class is present, 0 where absent.
    """
    near = torch.cat([heads.project(part.to(heads.weight.device)).cpu() for part in keys.split(1024)])
    absent = chosen.any(1, keepdim=True) & (tags == 0)
    sides = torch.stack([absent, chosen & (tags == 1)], 2).to(near.dtype)
    return torch.einsum("nkt,nkl->ktl", sides, near)


@over_group
@full_precision(keep=("queue", "prototypes"))
def capro_tags_step(
    logits: Float[Tensor, "n classes"],
    z: Float[Tensor, "n low"],
    z_key: Float[Tensor, "n low"],
    feature: Float[Tensor, "n dim"],
    reconstructed: Float[Tensor, "n dim"],
    tags: Int[Tensor, "n classes"],
    trusted: Bool[Tensor, "n classes"],
    queue: Float[Tensor, "low keys"],
    prototypes: Float[Tensor, "classes 2 low"] | None,
    heads: TagHeads,
    present_weight: Float[Tensor, " classes"],
    alpha: float = 0.5,
    threshold: float = 0.9,
    beta: float = 0.1,
    temperature: float = 0.1,
    proto_momentum: float = 0.999,
    clean: bool = True,
    order: Int[Tensor, " rows"] | None = None,
) -> dict[str, Any]:
    r"""Compute the losses of a step where rows may have several labels; see `capro_step` for the arguments of the same name.

    Args:
        tags: 1 where a class is present, 0 where absent, -1 where unknown.
        trusted: True where the text chose the row for the class; such a label is kept.
        prototypes: unit rows, of absence and presence of each class. None: warm-up.
        heads: projectors and classifiers of the classes.
        present_weight: weight of present labels, sqrt(absent / present).
        threshold: smallest score that flips a label, 0 to 1, by default 0.9.

    Returns the entries of `capro_step`, except those of kept rows. `new_label` [n, classes] is -1 where a label is ignored, and
    `kept` [n] is False where all are. An ignored label adds 0 to the means over labels. Soft labels have no absent part, as in
    the authors' code. Raises ValueError for shapes that do not fit, an empty batch and numbers out of range.
    """
    need_alike("n low", z=z, z_key=z_key)
    need_alike("n classes", logits=logits, tags=tags, trusted=trusted)
    need_alike("n dim", feature=feature, reconstructed=reconstructed)
    need_positive(temperature=temperature)
    need_within(0, 1, alpha=alpha, threshold=threshold, beta=beta, proto_momentum=proto_momentum)
    low = (logits.shape[1], 2, z.shape[1])
    if len(z) != len(logits) or len(feature) != len(logits) or len(queue) != low[2]:
        given = {"logits": logits, "z": z, "feature": feature, "queue": queue}
        raise ValueError(f"every row needs logits, z and feature, and queue is [{low[2]}, keys], got {shapes(**given)}")
    if (prototypes is not None and prototypes.shape != low) or present_weight.shape != low[:1]:
        held = {"present_weight": present_weight} | ({} if prototypes is None else {"prototypes": prototypes})
        raise ValueError(f"prototypes must be {list(low)} and present_weight [{low[0]}], got {shapes(**held)}")
    loss_inst, inst_logits, newer = queue_contrast(z, z_key, queue, temperature)
    near, weight = heads.project(z), present_weight.to(z.dtype)
    logits_low = heads(near)
    label, g, after = tags, None, None
    if prototypes is not None:
        pair = prototypes.detach().to(z.dtype)
        g = torch.einsum("nkl,ktl->nkt", near, pair) / temperature
        if clean:
            score = tag_scores(logits.detach(), g.detach(), alpha)
            label = judged_tags(score, tags, threshold, trusted)
    known = label >= 0
    kept = known.any(1)

    def mean(values: Tensor) -> Tensor:
        return mean_where(torch.where(known, values, 0).mean(1), kept)

    cross, proto = tag_losses(logits_low, label, weight), torch.zeros_like(logits_low)
    if prototypes is not None and g is not None:
        with torch.no_grad():
            keys = heads.project(newer.T.to(z.dtype))
            soft = tag_scores(heads(keys), torch.einsum("nkl,ktl->nkt", keys, pair) / temperature, alpha)
            target = bootstrap_target(z, newer.T, soft, several=True)
        cross = (1 - beta) * cross - beta * target * F.logsigmoid(logits_low)
        chosen = g.log_softmax(2).gather(2, label.clamp(min=0)[..., None])[..., 0]
        proto = -chosen * torch.where(label == 1, weight.mean(), 1)
        after = moved_tag_prototypes(prototypes, near, label, proto_momentum, order)
    losses = {
        "loss_cls": mean(tag_losses(logits, label, weight)),
        "loss_inst": loss_inst,
        "loss_lowdim": mean(cross),
        "loss_reconstruct": mean_where(((reconstructed - feature.detach()) ** 2).mean(1), kept),
        "loss_proto": mean(proto),
    }
    return losses | {
        "loss": torch.stack(list(losses.values())).sum(),
        "kept": kept,
        "new_label": label,
        "inst_logits": inst_logits,
        "prototypes_after": after,
        "queue_after": newer.to(queue.dtype),
    }
