"""Multiple-instance learning: pooling and mining over bags of unequal length, without a loop over the bags."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from counterpoint.core.checks import need_rows
from counterpoint.core.precision import full_precision
from counterpoint.core.transforms import need_fixed


def topk_count(seq_len: Int[Tensor, " bags"], divisor: int = 16) -> Int[Tensor, " bags"]:
    """Return the number of top snippets of each bag: floor(n / divisor) + 1."""
    return seq_len // divisor + 1


def extreme_snippets(
    score: Float[Tensor, "bags time"],
    seq_len: Int[Tensor, " bags"],
    count: Int[Tensor, " bags"],
    *,
    largest: bool,
) -> tuple[Int[Tensor, "bags most"], Bool[Tensor, "bags most"]]:
    """Select each bag's `count` largest (or smallest) scores among its first `seq_len` snippets.

    Returns the indices [bags, max(count)] and a mask of the same shape. The mask is False in slots beyond a bag's count.
    Selection uses only values; gather with the indices to let gradients flow.

    Raises ValueError for a bag without snippets or one whose count exceeds its length.
    """
    time = torch.arange(score.shape[1], device=score.device)
    valid = time < seq_len[:, None]
    need_fixed("extreme_snippets", seq_len=seq_len, count=count)
    if bool((seq_len < 1).any()) or bool((seq_len > score.shape[1]).any()):
        raise ValueError(f"seq_len must lie in 1..{score.shape[1]}, got {seq_len.min().item()}..{seq_len.max().item()}")
    if bool((count > seq_len).any()):
        raise ValueError("count exceeds seq_len: a bag has fewer snippets than its count")
    hidden = -torch.inf if largest else torch.inf
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
    index, keep = extreme_snippets(logits, seq_len, count, largest=True)
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
