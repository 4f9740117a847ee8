"""Multiple-instance learning: pooling and mining over bags of unequal length, and the contrast MIL-NCE.

No function loops over the bags.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows, shapes
from counterpoint.core.distributed import batch_logsumexp, gather_rows, global_mean
from counterpoint.core.precision import full_precision, wide
from counterpoint.core.rules import Where
from counterpoint.core.transforms import holds, need_fixed
from counterpoint.core.world import over_group


def topk_count(seq_len: Int[Tensor, " bags"], divisor: int = 16) -> Int[Tensor, " bags"]:
    """Return the number of top snippets of each bag: floor(n / divisor) + 1."""
    return seq_len // divisor + 1


def extreme_snippets(
    score: Float[Tensor, "bags time"],
    seq_len: Int[Tensor, " bags"],
    count: Int[Tensor, " bags"],
    *,
    largest: bool,
    most: int | None = None,
) -> tuple[Int[Tensor, "bags most"], Bool[Tensor, "bags most"]]:
    """Select each bag's `count` largest (or smallest) scores among its first `seq_len` snippets.

    Returns the indices [bags, most] and a mask of the same shape. The mask is False in slots beyond a bag's count.
    Selection uses only values; gather with the indices to let gradients flow.

    Args:
        score: [bags, time].
        seq_len: number of valid snippets of each bag, at least 1.
        count: how many to select of each bag.
        largest: whether to select the largest.
        most: number of slots, no less than any count. Default: the largest count, for which a GPU waits.

    Raises ValueError for a bag without snippets or one whose count exceeds its length.
    """
    time = torch.arange(score.shape[1], device=score.device)
    valid = time < seq_len[:, None]
    need_fixed("extreme_snippets", seq_len=seq_len, count=count)
    if holds((seq_len < 1).any()) or holds((seq_len > score.shape[1]).any()):
        raise ValueError(f"seq_len must lie in 1..{score.shape[1]}, got {seq_len.min().item()}..{seq_len.max().item()}")
    if holds((count > seq_len).any()):
        raise ValueError("count exceeds seq_len: a bag has fewer snippets than its count")
    hidden = -torch.inf if largest else torch.inf
    if most is None:
        most = int(count.max()) if len(count) else 0
    index = score.detach().masked_fill(~valid, hidden).topk(most, dim=1, largest=largest).indices
    return index, torch.arange(most, device=score.device) < count[:, None]


@full_precision
def topk_mil_pool(
    logits: Float[Tensor, "bags time"], seq_len: Int[Tensor, " bags"], *, divisor: int = 16
) -> Float[Tensor, " bags"]:
    """Compute bag probabilities: sigmoid of the mean of the k = floor(n / divisor) + 1 largest logits among the first n.

    Args:
        logits: one per snippet; those beyond `seq_len` are padding and ignored.
        seq_len: n of each bag, at least 1.

    Returns: probabilities [bags].
    Raises ValueError for a bag without snippets.
    Source: MACIL-SD (arXiv 2207.05500), Sec. 3.2, after Sultani et al. 2018 and Wu et al. 2020.
    """
    need_rows(logits=logits)
    count = topk_count(seq_len, divisor)
    most = min(logits.shape[1], logits.shape[1] // divisor + 1)
    index, keep = extreme_snippets(logits, seq_len, count, largest=True, most=most)
    top = logits.gather(1, index).masked_fill(~keep, 0.0)
    return torch.sigmoid(top.sum(1) / count)


@full_precision
def bag_cross_entropy(prob: Float[Tensor, " bags"], labels: Float[Tensor, " bags"]) -> Float[Tensor, ""]:
    """Compute the mean binary cross-entropy of bag probabilities, in float32 because autocast on a GPU refuses it.

    Args:
        prob: probability of each bag, in 0..1.
        labels: 1 where the bag holds a positive instance, else 0.

    >>> bag_cross_entropy(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
    tensor(0.6931)
    """
    return F.binary_cross_entropy(prob, labels)


def sequence_lengths(features: Float[Tensor, "bags time dim"]) -> Int[Tensor, " bags"]:
    """Compute the length of zero-padded sequences: the number of rows with any entry other than zero.

    An all-zero row inside a sequence shortens it by one, as in the published code.
    """
    return (features.abs().amax(dim=2) > 0).sum(dim=1)


@over_group
@full_precision
def mil_nce(
    video: Float[Tensor, "n dim"],
    text: Float[Tensor, "texts dim"],
    mask: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    r"""Compute MIL-NCE, the mean over samples i of log[ sum_{j,l} exp s_ij,l + sum_{j,l} exp s_ji,l ] - log sum_l exp s_ii,l.

    Args:
        video: one row for each sample.
        text: L candidates for each sample, one after another: [n L, dim].
        mask: False where a sample has no text. Its candidates are masked, its loss does not count, and the mean is over the
            other samples. Default: every sample has a text.

    s_ij,l is the plain dot product of video i with candidate l of sample j: neither normalised nor divided by a temperature.
    (VATT does both before, with 0.07.) One denominator holds both directions. So with L = 1 it holds each positive twice;
    the smallest loss is log 2, also for a batch of one. Without any text the loss is 0. Source: Miech et al., CVPR 2020,
    arXiv 1912.06430, Eq. 2, with rows and columns as in VATT's code. Raises ValueError for shapes that do not fit.

    >>> mil_nce(torch.eye(1), torch.eye(1))
    tensor(0.6931)
    """
    candidates = len(text) // len(video) if len(video) else 1
    fits = video.ndim == text.ndim == 2 and video.shape[1] == text.shape[1] and candidates * len(video) == len(text)
    if not fits or (len(video) and not candidates):
        raise ValueError(f"video must be [n, dim] and text [n L, dim], got {shapes(video=video, text=text)}")
    need_rows(video=video)
    if mask is not None:
        need_fixed("mil_nce", mask=mask)
        if mask.shape != video.shape[:1] or bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(
                f"mask must be True or False (1 or 0) for each sample, got {shapes(mask=mask, video=video)} of {mask.dtype}"
            )
        mask = mask.bool()
    video, text = wide(video), wide(text)
    if mask is not None:  # values of missing texts, also NaN, must have no effect
        text = text.masked_fill(~mask.repeat_interleave(candidates)[:, None], 0.0)
    positive = (video[:, None] * text.view(len(video), candidates, text.shape[1])).sum(2).logsumexp(1)
    if mask is None:
        out = batch_logsumexp(video, text, columns=True)
        assert out.columns is not None
        both = torch.logaddexp(out.rows, out.columns.view(len(video), candidates).logsumexp(1))
        return global_mean(both - positive)
    there = gather_rows(mask.repeat_interleave(candidates))
    if not bool(there.any()):
        return (video.sum() + text.sum()) * 0
    hidden = ~there
    out = batch_logsumexp(video, text, columns=True, exclude=Where(lambda _, columns: hidden[columns]))
    assert out.columns is not None
    # Columns of masked texts are empty; the zeros in their place do not count.
    columns = out.columns.view(len(video), candidates).masked_fill(~mask[:, None], 0.0).logsumexp(1)
    return global_mean((torch.logaddexp(out.rows, columns) - positive)[mask])
