"""CreamFL: a server of two modalities and private parties exchange representations of a public set, never weights.

Yu, Liu, Wang, Xu, Liu: "Multimodal Federated Learning via Contrastive Representation Ensemble", ICLR 2023, arXiv 2302.08888;
code FLAIR-THU/CreamFL.

    P            N public items in two modalities, image and text; item k has row k everywhere
    G            [N, d] unit representations of P by the server, for each modality
    R_c          [N, d] those by party c, for each modality that it has
    z, o         [b, d] unit embeddings of a batch by a party, now and at the beginning of its round
    S, X         G of the party's own modality, and of the other one
    a, b         learned negative scale and shift of the soft contrastive loss

A round, in the order of this file's functions:

    A   the server learns P with the soft contrastive loss, and broadcasts G
    B   each chosen party repeats: one pass over its own items, and one over P with `cream_uni` or `cream_multi`
    C   the party returns R_c; the server fuses them by `contrastive_ensemble`
    D   the server learns P once more, towards the fused representations

- Of the code: two passes with steps of their own, which the paper writes as one sum (`--together` is that sum). The temperature
  of the weights is 1. Fused rows are not normalised. The weight of the distillation is 0.3 for each modality.
- Mended: G is computed in evaluation mode. A round without a party of one modality has no distillation of it.
- Chosen: optimisers of the parties persist between rounds. The last, smaller batch of a pass is dropped.

Not built: the pooling of words by PIE attention, and fine-tuning for visual questions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_positive, need_rows, shapes
from counterpoint.core.contrast import pair_logsumexp
from counterpoint.core.distributed import gather_rows, global_mean, mean_of_total, place
from counterpoint.core.operands import positive_similarity, scaled, unit
from counterpoint.core.precision import full_precision, scalar, wide
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group


class Cream(NamedTuple):
    loss: Float[Tensor, ""]
    intra: Float[Tensor, ""]
    inter: Float[Tensor, ""]


# ------------------------------------------------------------------------------------------------------------ the equations


@over_group
@full_precision
def soft_contrastive(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    negative_scale: float | Float[Tensor, ""] = 15.0,
    shift: float | Float[Tensor, ""] = 15.0,
) -> Float[Tensor, ""]:
    r"""Sum the binary cross-entropies of all n^2 pairs, in both directions (PCME's loss without variances).

    With l_ij = -a sqrt(||v_i - t_j||^2 + 1e-6) + b, a pair matches with probability sigmoid(2 l_ij). Only the pairs i = j match.

    Args:
        image_emb, text_emb: embeddings of n pairs, of any norm; normalised here.
        negative_scale, shift: a and b, learnable scalars or numbers; by default 15.

    The result is a sum, not a mean. Memory is [n, n]. Across processes, all pairs of all processes count. Raises ValueError for
    shapes that differ and for an empty batch.

    >>> soft_contrastive(torch.eye(2), torch.eye(2), 15.0, 15.0)
    tensor(1.6045e-05)
    """
    need_alike("n dim", image_emb=image_emb, text_emb=text_emb)
    v, t = unit(wide(image_emb)), unit(wide(text_emb))
    a, b = scalar(negative_scale, v), scalar(shift, v)
    every = gather_rows(t)
    square = (v.square().sum(1)[:, None] + every.square().sum(1) - 2 * (v @ every.T)).clamp(min=0)
    logits = 2 * (b - a * (square + 1e-6).sqrt())
    at = place(len(v), v.device).offset + torch.arange(len(v), device=v.device)
    own = at[:, None] == torch.arange(len(every), device=v.device)
    return mean_of_total(2 * F.softplus(torch.where(own, -logits, logits)).sum(), 1)


@over_group
@full_precision
def cream_uni(
    emb: Float[Tensor, "n dim"],
    emb_old: Float[Tensor, "n dim"],
    global_same: Float[Tensor, "public dim"],
    global_cross: Float[Tensor, "public dim"],
    public_index: Int[Tensor, " n"],
    weight: float = 0.5,
    temperature: float = 0.5,
    loss_scale: bool = False,
) -> Cream:
    """Compute the contrast of a party of one modality with the server's representations, and w (intra + inter).

    inter is the cross-entropy of z_i against all rows of X, with the row of the same item as its target. intra prefers the row of
    the same item in S to the party's own old embedding.

    Args:
        emb: embeddings of a batch of public items, of any norm; normalised here.
        emb_old: unit embeddings of the same items at the beginning of the round; no gradient.
        global_same, global_cross: unit representations of all public items, S and X; no gradient.
        public_index: rows of the batch's items in S and X.
        weight: w, by default 0.5.
        temperature: of both terms, > 0, by default 0.5.
        loss_scale: divide inter by its ratio to intra, without gradient; default: no.

    Raises ValueError for shapes that do not fit, an empty batch, and a row outside S.

    >>> z = torch.tensor([[0.0, 0.0, 1.0]])
    >>> cream_uni(z, torch.eye(3)[:1], torch.eye(3)[:2], torch.eye(3)[:2], torch.tensor([0])).inter
    tensor(0.6931)
    """
    z = _checked(emb, emb_old, global_same, global_cross, public_index, temperature)
    intra = global_mean(_intra(z, emb_old, global_same, public_index, temperature))
    inter = global_mean(_inter(z, global_cross, public_index, temperature))
    return _together(intra, inter, weight, loss_scale)


@over_group
@full_precision
def cream_multi(
    image_emb: Float[Tensor, "n dim"],
    text_emb: Float[Tensor, "n dim"],
    image_emb_old: Float[Tensor, "n dim"],
    text_emb_old: Float[Tensor, "n dim"],
    global_image: Float[Tensor, "public dim"],
    global_text: Float[Tensor, "public dim"],
    public_index: Int[Tensor, " n"],
    weight: float = 0.5,
    temperature: float = 0.5,
    loss_scale: bool = False,
) -> Cream:
    """Compute the contrast of a party of both modalities: the sum of both inter terms, the mean of both intra terms.

    Args: as of `cream_uni`, for each modality.

    Raises ValueError as `cream_uni` does.

    >>> x = torch.eye(2)
    >>> cream_multi(x, x, x, x, x, x, torch.arange(2)).intra
    tensor(0.6931)
    """
    v = _checked(image_emb, image_emb_old, global_image, global_text, public_index, temperature)
    t = _checked(text_emb, text_emb_old, global_text, global_image, public_index, temperature)
    intra = [
        global_mean(_intra(z, old, same, public_index, temperature))
        for z, old, same in ((v, image_emb_old, global_image), (t, text_emb_old, global_text))
    ]
    inter = [global_mean(_inter(z, cross, public_index, temperature)) for z, cross in ((v, global_text), (t, global_image))]
    return _together((intra[0] + intra[1]) / 2, inter[0] + inter[1], weight, loss_scale)


def _checked(
    emb: Tensor, old: Tensor, same: Tensor, cross: Tensor, index: Tensor, temperature: float
) -> Float[Tensor, "n dim"]:
    """Return the unit rows of `emb`, where all shapes fit."""
    need_alike("n dim", emb=emb, emb_old=old)
    need_alike("public dim", global_same=same, global_cross=cross)
    need_positive(temperature=temperature)
    if emb.shape[1] != same.shape[1] or index.shape != (len(emb),):
        raise ValueError(
            "emb must be [n, dim], global_same [public, dim] and public_index [n], got "
            + shapes(emb=emb, global_same=same, public_index=index)
        )
    if holds(((index < 0) | (index >= len(same))).any()):
        raise ValueError(f"public_index must lie in 0..{len(same) - 1}, the rows of global_same")
    return unit(wide(emb))


def _intra(z: Tensor, old: Tensor, same: Tensor, index: Tensor, temperature: float) -> Float[Tensor, " n"]:
    """Return -log of the share of the server's row against the party's own old row."""
    gap = (z * (wide(old) - wide(same)[index]).detach()).sum(1)
    return F.softplus(gap / temperature)


def _inter(z: Tensor, cross: Tensor, index: Tensor, temperature: float) -> Float[Tensor, " n"]:
    """Return the cross-entropies against all public rows of the other modality, without the matrix."""
    query, key = scaled(z, temperature), wide(cross.detach())
    return pair_logsumexp(query, key).rows - positive_similarity(query, key[index])


def _together(intra: Tensor, inter: Tensor, weight: float, loss_scale: bool) -> Cream:
    scale = (inter / intra).detach() if loss_scale else 1.0
    return Cream(weight * (intra + inter / scale), intra, inter)


@full_precision
@torch.no_grad()
def contrastive_ensemble(
    client: Float[Tensor, "clients public dim"], global_other: Float[Tensor, "public dim"]
) -> Float[Tensor, "public dim"]:
    """Fuse the parties' representations, each item's by a softmax over parties of its log-probability of the right partner.

    Args:
        client: unit representations of one modality by each party, for all public items.
        global_other: the server's unit representations of the other modality.

    The rows are not normalised. No gradient. Raises ValueError for shapes that do not fit, and without a party or an item.

    >>> contrastive_ensemble(torch.eye(2).expand(3, 2, 2), torch.eye(2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    return (ensemble_weights(client, global_other)[:, :, None] * wide(client)).sum(0)


@full_precision
@torch.no_grad()
def ensemble_weights(
    client: Float[Tensor, "clients public dim"], global_other: Float[Tensor, "public dim"]
) -> Float[Tensor, "clients public"]:
    """Return the share of each party in each item of `contrastive_ensemble`; the shares of an item sum to 1.

    Args: as of `contrastive_ensemble`. Memory is a few blocks, never [public, public].

    >>> ensemble_weights(torch.eye(2).expand(2, 2, 2), torch.eye(2))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    if client.ndim != 3 or client.shape[1:] != global_other.shape:
        raise ValueError(
            "client must be [clients, public, dim] and global_other [public, dim], got "
            + shapes(client=client, global_other=global_other)
        )
    need_rows(client=client, global_other=global_other)
    key = wide(global_other)
    scores = [positive_similarity(rows, key) - pair_logsumexp(rows, key).rows for rows in wide(client)]
    return torch.stack(scores).softmax(0)
