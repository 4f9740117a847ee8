"""Match pictures and captions as wholes, and regions of pictures with words of captions: the DAMSM loss.

    symbol          meaning
    r_k, e_t        vectors of the n regions of a picture and of the T words of a caption
    a_kt            softmax over words t of <r_k, e_t>
    b_tk            softmax over regions k of gamma1 a_kt: where a picture shows a word
    c_t             sum_k b_tk r_k, what the picture shows of the word
    R               log sum_t exp( gamma2 cos(c_t, e_t) ), the match of a picture and a caption by words

Source: Xu et al., "AttnGAN: Fine-Grained Text to Image Generation with Attentional Generative Adversarial Networks", CVPR 2018,
arXiv 1711.10485, and its released code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterpoint.core.checks import need_alike, need_rows, need_scale, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_max, global_mean, place
from counterpoint.core.operands import positive_similarity, unit
from counterpoint.core.precision import full_precision
from counterpoint.core.rules import Labels
from counterpoint.core.transforms import holds
from counterpoint.core.world import over_group, world

LEAST = 1e-8  # the floor of a product of norms


class Matching(NamedTuple):
    """The cross-entropies of both directions."""

    image_to_text: Float[Tensor, ""]
    text_to_image: Float[Tensor, ""]


def _known(class_ids: Tensor | None, rows: Tensor, name: str) -> Tensor | None:
    """Return the classes of the whole batch. Items without a class (below 0) have one of their own each."""
    if class_ids is None:
        return None
    if class_ids.shape != rows.shape[:1]:
        raise ValueError(f"class_ids must be [{len(rows)}], one for each row of {name}, got {list(class_ids.shape)}")
    whole = gather_rows(class_ids.to(torch.int64))
    return torch.where(whole < 0, -1 - torch.arange(len(whole), device=whole.device), whole)


@over_group
@full_precision
def damsm_sentence(
    image: Float[Tensor, "n dim"],
    sentence: Float[Tensor, "n dim"],
    gamma3: float,
    class_ids: Int[Tensor, " n"] | None = None,
) -> Matching:
    r"""Compute both cross-entropies of S_ij = gamma3 cos(image i, sentence j) with the diagonal as targets.

    Args:
        image, sentence: codes of pictures and of their captions, in the same order; this function normalises them.
        gamma3: scale of cosines, at least 0.
        class_ids: class of each pair; other pairs of its class are no negatives. Numbers below 0 are pairs without a class. None
            (default): all other pairs are negatives.

    Returns the mean over pictures and the mean over captions. A pair without a negative has loss 0.

    Raises ValueError for shapes that do not fit and an empty batch. Source: AttnGAN's code, sent_loss.

    >>> damsm_sentence(torch.eye(2), torch.eye(2), 1.0).image_to_text
    tensor(0.3133)
    """
    need_alike("n dim", image=image, sentence=sentence)
    need_scale(gamma3=gamma3)
    known = _known(class_ids, image, "image")
    x, y = unit(image) * gamma3, unit(sentence)
    own = positive_similarity(x, y)
    found = batch_logsumexp(x, y, exclude=() if known is None else Labels(known), columns=True)
    rows, columns = found.rows, found.columns
    assert columns is not None
    if known is not None:  # the rule excludes the pair itself, too
        rows, columns = torch.logaddexp(rows, own), torch.logaddexp(columns, own)
    return Matching(global_mean(rows - own), global_mean(columns - own))


class WordScores(NamedTuple):
    """The match of every picture with every caption, and where a picture shows a word."""

    scores: Float[Tensor, "pictures captions"]
    attention: Float[Tensor, "pictures captions words regions"]


def word_scores(
    regions: Float[Tensor, "pictures dim regions"],
    words: Float[Tensor, "captions dim words"],
    lengths: Int[Tensor, " captions"],
    gamma1: float,
    gamma2: float,
) -> WordScores:
    """Compute R and b of every picture with every caption, without the contexts c.

    |c_t|^2 = b_t^T G b_t with G = <r_k, r_l>, and <c_t, e_t> = sum_k b_tk <r_k, e_t>. So memory is
    pictures x captions x words x regions, and does not depend on the width.

    Args:
        regions: r of pictures.
        words: e of captions; words from `lengths` on are padding.
        lengths: numbers of words of captions, at least 1.
        gamma1, gamma2: sharpness of the attention and of the sum over words.
    """
    there = torch.arange(words.shape[2], device=words.device) < lengths[:, None]  # [captions, words]
    raw = torch.einsum("pdk,cdt->pctk", regions, words)
    a = raw.masked_fill(~there[:, :, None], -math.inf).softmax(2)
    b = (gamma1 * a).softmax(3)
    gram = regions.transpose(1, 2) @ regions
    squares = ((b.flatten(1, 2) @ gram).view_as(b) * b).sum(3)
    norms = squares.clamp(min=LEAST**2).sqrt() * words.norm(dim=1)
    cosine = (b * raw).sum(3) / norms.clamp(min=LEAST)
    scores = (gamma2 * cosine).masked_fill(~there, -math.inf).logsumexp(2)
    return WordScores(scores, b)


@over_group
@full_precision
def damsm_words(
    regions: Float[Tensor, "n dim *grid"],
    words: Float[Tensor, "n dim words"],
    lengths: Int[Tensor, " n"],
    gammas: tuple[float, float, float] = (4.0, 5.0, 10.0),
    class_ids: Int[Tensor, " n"] | None = None,
) -> Matching:
    r"""Compute both cross-entropies of gamma3 R_ij, the match of picture i and caption j by words; targets are the diagonal.

    Args:
        regions: features of the regions of pictures, on a grid or in a row.
        words: features of the words of their captions, in the same order. Words from `lengths` on are padding.
        lengths: number of words of each caption, 1 to `words`.
        gammas: gamma1, gamma2 (see the module) and gamma3, the scale of R; each at least 0. Default: 4, 5, 10, as published.
        class_ids: class of each pair, as of `damsm_sentence`.

    Returns the mean over pictures and the mean over captions. Memory is n x n x words x regions.

    Raises ValueError for shapes that do not fit, an empty batch and a caption without words. Source: AttnGAN's code, words_loss.

    >>> x = torch.eye(2)[:, :, None]
    >>> damsm_words(x, x, torch.tensor([1, 1]), (1.0, 1.0, 1.0)).image_to_text
    tensor(0.3133)
    """
    if regions.ndim < 3 or words.ndim != 3 or regions.shape[:2] != words.shape[:2] or lengths.shape != words.shape[:1]:
        raise ValueError(
            f"regions must be [n, dim, regions], words [n, dim, words] and lengths [n], got "
            f"{shapes(regions=regions, words=words, lengths=lengths)}"
        )
    need_rows(regions=regions)
    if len(gammas) != 3:
        raise ValueError(f"gammas must be gamma1, gamma2 and gamma3, got {len(gammas)} numbers")
    need_scale(**{f"gamma{n}": gamma for n, gamma in enumerate(gammas, 1)})
    if holds(((lengths < 1) | (lengths > words.shape[2])).any()):
        raise ValueError(f"lengths must be 1 to {words.shape[2]} words, got {lengths.tolist()}")
    known = _known(class_ids, regions, "regions")
    r = regions.flatten(2)
    here = place(len(r), r.device)
    if world()[1] == 1:
        scores = word_scores(r, words, lengths, *gammas[:2]).scores
        both = scores, scores.T
    else:
        words = F.pad(words, (0, global_max(words.shape[2], words.device) - words.shape[2]))
        everyone = gather_rows(words), gather_rows(lengths)
        both = (
            word_scores(r, *everyone, *gammas[:2]).scores,
            word_scores(gather_rows(r), words, lengths, *gammas[:2]).scores.T,
        )
    at = here.offset + torch.arange(len(r), device=r.device)
    return Matching(*(_cross_entropy(gammas[2] * scores, at, known) for scores in both))


def _cross_entropy(logits: Tensor, at: Tensor, known: Tensor | None) -> Tensor:
    """Compute the mean of log Z - the logit at each row's own column; others of its class are left out of Z."""
    own = logits.gather(1, at[:, None])[:, 0]
    if known is not None:
        same = known[at][:, None] == known
        logits = logits.masked_fill(same.scatter(1, at[:, None], False), -math.inf)
    return global_mean(logits.logsumexp(1) - own)
