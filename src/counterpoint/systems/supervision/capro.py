r"""CAPro: learn classes from web pictures, whose labels are often wrong, with prototypes that texts choose.

Qin, Chen, Chen, Shen et al.: "CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes", NeurIPS 2023, arXiv
2310.09761. Code: github.com/yuleiqin/capro (no licence).

    q, z, z'       features of the encoder; unit rows of projector P; unit rows of the momentum encoder and P, of another view
    A, A', R       classifier of q; classifier of z; reconstruction of q from z
    Q, c_k         queue of keys z'; unit prototype of class k; T: temperature

    L_cls   = CE(A(q), y)                      L_inst = -log softmax([z . z', z . Q] / T)_0, with Q before this batch enters
    L_low   = (1 - beta) CE(A'(z), y) - beta sum_k b_k log softmax(A'(z))_k
    b       = mean over u in Q, this batch included, of a softmax(A'(u)) + (1 - a) softmax(u . c / T), weighted by max(z . u, 0)
    L_proto = CE(z . c / T, y)                 L_rec  = mean (R(z) - q)^2
    s       = a softmax(A(q)) + (1 - a) softmax(z . c / T): keeps, corrects or removes y (`core.noisy_labels.judged_labels`)
    c_y    <- m c_y + (1 - m) z for each kept row in order; then unit rows

Rows that are removed count in L_inst alone. Texts enter once, before the main stage: each picture's text is averaged over its
visual neighbours (`core.neighbours`). The pictures whose text is nearest to their class's definition start the prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_within, shapes
from counterpoint.core.distributed import gather_rows, global_mean
from counterpoint.core.noisy_labels import bootstrap_target, judged_labels, mean_where
from counterpoint.core.operands import unit
from counterpoint.core.precision import full_precision
from counterpoint.core.world import over_group

# ------------------------------------------------------------------------------------------------------------ the equations


@over_group
@full_precision(keep=("queue", "prototypes"))
def capro_step(
    logits: Float[Tensor, "n classes"],
    z: Float[Tensor, "n low"],
    z_key: Float[Tensor, "n low"],
    logits_low: Float[Tensor, "n classes"],
    feature: Float[Tensor, "n dim"],
    reconstructed: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    trusted: Bool[Tensor, " n"] | Int[Tensor, " n"],
    queue: Float[Tensor, "low keys"],
    prototypes: Float[Tensor, "classes low"] | None,
    classifier_low: Float[Tensor, "classes low"],
    alpha: float = 0.5,
    threshold: float = 0.6,
    beta: float = 0.1,
    temperature: float = 0.1,
    proto_momentum: float = 0.999,
    clean: bool = True,
    keep_trusted: bool = True,
) -> dict[str, Any]:
    r"""Compute the losses of a step, judge its labels, and move queue and prototypes, by the module's equations.

    Args:
        logits: A(q).
        z, z_key: unit rows of the two views, the second without gradient.
        logits_low: A'(z).
        feature, reconstructed: q, which gets no gradient here, and R(z).
        labels: web labels, 0 to classes - 1.
        trusted: True or 1 where the text chose the row for its class.
        queue: older keys as unit columns, the oldest first.
        prototypes: unit rows; a class without a prototype is a row of zeros. None: warm-up, without L_proto and soft labels.
        classifier_low: weights of A', for the queue's soft labels; no gradient.
        alpha: share a of the classifier beside the prototypes, 0 to 1, by default 0.5.
        threshold: smallest score that corrects a label, 0 to 1, by default 0.6.
        beta: share of the soft labels in L_low, 0 to 1, by default 0.1.
        temperature: T > 0, by default 0.1.
        proto_momentum: m, 0 to 1, by default 0.999.
        clean: whether labels are judged (default); False: all rows are kept.
        keep_trusted: whether trusted rows always keep their label (default).

    Returns the losses `loss_cls`, `loss_inst`, `loss_lowdim`, `loss_reconstruct`, `loss_proto` and `loss`, their sum; `kept`
    [n] and `new_label` [n], -1 where removed; `proto_logits_kept` and `bootstrap_target_kept`, of kept rows; `inst_logits`
    [n, 1 + keys]; `prototypes_after` and `queue_after`. In warm-up the prototypes' entries are None, and L_proto is 0.

    Means run over the kept rows of all processes; a mean of no row is 0. Prototypes move by all processes' rows in rank order.
    Raises ValueError for shapes that do not fit, an empty batch and numbers out of range.
    """
    need_alike("n low", z=z, z_key=z_key)
    need_alike("n classes", logits=logits, logits_low=logits_low)
    need_alike("n dim", feature=feature, reconstructed=reconstructed)
    need_positive(temperature=temperature)
    need_within(0, 1, alpha=alpha, threshold=threshold, beta=beta, proto_momentum=proto_momentum)
    n, classes = logits.shape
    if any(len(rows) != n for rows in (z, feature, labels, trusted)) or labels.ndim != 1 or trusted.ndim != 1:
        given = {"logits": logits, "z": z, "feature": feature, "labels": labels, "trusted": trusted}
        raise ValueError(f"every row needs z, feature, label and trusted, got {shapes(**given)}")
    low = (classes, z.shape[1])
    if queue.ndim != 2 or len(queue) != low[1] or any(x is not None and x.shape != low for x in (prototypes, classifier_low)):
        held = {"queue": queue, "classifier_low": classifier_low} | ({} if prototypes is None else {"prototypes": prototypes})
        raise ValueError(f"queue must be [{low[1]}, keys], prototypes and classifier_low {list(low)}, got {shapes(**held)}")

    # Instance contrast, with the queue before this batch enters.
    z_key, older = z_key.detach(), queue.detach().to(z.dtype)
    inst_logits = torch.cat([(z * z_key).sum(1, keepdim=True), z @ older], 1) / temperature
    loss_inst = global_mean(inst_logits.logsumexp(1) - inst_logits[:, 0])
    new = gather_rows(z_key)[-queue.shape[1] :]
    newer = torch.cat([new.T, older[:, len(new) :]], 1)

    # Labels.
    label, kept = labels, torch.ones_like(labels, dtype=torch.bool)
    g = None if prototypes is None else z @ prototypes.detach().to(z.dtype).T / temperature
    if clean and g is not None:
        score = alpha * logits.detach().softmax(1) + (1 - alpha) * g.detach().softmax(1)
        kept, label = judged_labels(score, labels, threshold, trusted.bool() if keep_trusted else None)

    # Terms of kept rows, with their corrected labels.
    cross = F.cross_entropy(logits_low, label, ignore_index=-1, reduction="none")
    target = None
    if prototypes is not None:
        keys, weight = newer.T, classifier_low.detach().to(z.dtype)
        of_prototypes = (keys @ prototypes.detach().to(z.dtype).T / temperature).softmax(1)
        soft = alpha * (keys @ weight.T).softmax(1) + (1 - alpha) * of_prototypes
        target = bootstrap_target(z.detach(), keys, soft)
        cross = (1 - beta) * cross - beta * (target * logits_low.log_softmax(1)).sum(1)
    losses = {
        "loss_cls": mean_where(F.cross_entropy(logits, label, ignore_index=-1, reduction="none"), kept),
        "loss_inst": loss_inst,
        "loss_lowdim": mean_where(cross, kept),
        "loss_reconstruct": mean_where(((reconstructed - feature.detach()) ** 2).mean(1), kept),
        "loss_proto": logits.new_zeros(()),
    }
    if g is not None:
        losses["loss_proto"] = mean_where(F.cross_entropy(g, label, ignore_index=-1, reduction="none"), kept)
    return losses | {
        "loss": torch.stack(list(losses.values())).sum(),
        "kept": kept,
        "new_label": label,
        "proto_logits_kept": None if g is None else g[kept],
        "bootstrap_target_kept": None if target is None else target[kept],
        "inst_logits": inst_logits,
        "prototypes_after": None if prototypes is None else moved_prototypes(prototypes, z, label, proto_momentum),
        "queue_after": newer.detach().to(queue.dtype),
    }


@torch.no_grad()
def moved_prototypes(
    prototypes: Float[Tensor, "classes low"], rows: Float[Tensor, "n low"], labels: Int[Tensor, " n"], momentum: float
) -> Float[Tensor, "classes low"]:
    """Move prototypes by the rows of their classes, one after another, then normalise them.

    Args:
        prototypes: unit rows.
        rows, labels: rows in order, of all processes in rank order, and their classes; -1 for none.
        momentum: share of the prototype that stays at each row, 0 to 1.

    >>> moved_prototypes(torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.5)
    tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]])
    """
    rows, labels = gather_rows(rows.detach().to(prototypes.dtype)), gather_rows(labels)
    own = labels[:, None] == torch.arange(len(prototypes), device=labels.device)
    later = own.flip(0).cumsum(0).flip(0) - 1  # rows of this class that follow
    share = torch.where(own, (1 - momentum) * momentum ** later.clamp(min=0).to(rows.dtype), 0)
    stays = momentum ** own.sum(0).to(rows.dtype)
    return unit(stays[:, None] * prototypes + share.T @ rows)
