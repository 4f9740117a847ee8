"""SwAV: predict one view's cluster assignment from another view.

Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020, arXiv 2006.09882.

The loss with multi-crop (Eqs. 2 and 6) and the assignments by Sinkhorn's algorithm (Eqs. 3 to 5), over the batch of all
processes and, optionally, a queue of earlier scores. Scores are the dot products of normalised projections and prototypes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from counterpoint.core.alignment import swapped_entropy
from counterpoint.core.checks import need_positive, need_rows, shapes
from counterpoint.core.contrast import wide
from counterpoint.core.distributed import gather_rows, place


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "*crops n prototypes"], epsilon: float = 0.05, iterations: int = 3
) -> Float[Tensor, "*crops n prototypes"]:
    r"""Codes: a row of exp(scores / epsilon) for each sample, scaled so that the prototypes share the samples evenly (Eq. 5).

    Prototypes, then samples, are brought to equal sums, `iterations` times; so rows sum to 1 and columns nearly to
    n / prototypes. No gradient.

    Args:
        scores: similarity of each sample with each prototype; each crop on its own.
        epsilon: > 0, the smaller the closer to a hard assignment.
        iterations: >= 1.

    Nothing overflows, whatever the scores: where their spread over epsilon exceeds what the exponential can hold, the
    scaling is done on logarithms. Raises ValueError for empty scores, an epsilon or a number of iterations out of range.

    >>> sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    need_positive(epsilon=epsilon, iterations=iterations)
    if scores.ndim < 2 or not scores.numel():
        raise ValueError(f"scores must be [..., n, prototypes] and not empty, got {list(scores.shape)}")
    # The prototypes are scaled first: whatever factor one of them had on all its scores is gone after that.
    logs = wide(scores).contiguous() / epsilon
    logs = logs - logs.amax(-2, keepdim=True)
    if bool(logs.amin() > 0.7 * math.log(torch.finfo(logs.dtype).tiny)):
        for q in logs.exp_().view(-1, *logs.shape[-2:]):
            per_sample = q.new_ones(len(q))
            for _ in range(iterations):  # only the two scalings change: products with vectors, q stays as it is
                per_prototype = q.T.mv(per_sample).reciprocal_()
                per_sample = q.mv(per_prototype).reciprocal_()
            q.mul_(per_prototype).mul_(per_sample[:, None])
        return logs
    for _ in range(iterations):
        logs = logs - logs.logsumexp(-2, keepdim=True)
        logs = logs - logs.logsumexp(-1, keepdim=True)
    return logs.exp_()


class SwAVOutput(NamedTuple):
    loss: Float[Tensor, ""]
    codes_first_crop: Float[Tensor, "n prototypes"]


def swav(
    high: Float[Tensor, "full n prototypes"],
    low: Float[Tensor, "small n prototypes"] | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    *,
    queue: Float[Tensor, "full stored prototypes"] | None = None,
) -> SwAVOutput:
    r"""Swapped prediction (Eqs. 2 and 6): the mean over full-size crops i and all other crops v of
    -sum_k q_i,k log softmax_k(scores_v / temperature).

    Args:
        high: scores of the full-size crops, which all get codes q.
        low: scores of the small crops, which only predict.
        temperature: > 0.
        epsilon, iterations: of `sinkhorn`, which makes the codes.
        queue: scores of earlier samples with the present prototypes. They take part in the assignment and no more.

    Returns the loss and the codes of the first crop. A batch of one has the codes 1 / prototypes. Raises ValueError for
    shapes that do not fit and for a single crop.

    >>> swav(torch.eye(2).expand(2, 2, 2)).loss.item() < swav(torch.zeros(2, 2, 2)).loss.item()
    True
    """
    small = high[:0] if low is None else low
    stored = high[:, :0] if queue is None else queue
    if high.ndim != 3 or small.ndim != 3 or small.shape[1:] != high.shape[1:]:
        raise ValueError(f"high and low must be [crops, n, prototypes] alike, got {shapes(high=high, low=small)}")
    if stored.ndim != 3 or (len(stored), stored.shape[2]) != (len(high), high.shape[2]):
        raise ValueError(f"queue must be [full, stored, prototypes], got {shapes(queue=stored, high=high)}")
    if len(high) + len(small) < 2:
        raise ValueError(
            f"high holds {len(high)} crops and low {len(small)}: there must be two to predict one from another"
        )
    need_rows(high=high[0] if len(high) else high)
    need_positive(temperature=temperature)
    here = place(high.shape[1], high.device)
    everybody = gather_rows(high.detach().transpose(0, 1)).transpose(0, 1)
    codes = sinkhorn(torch.cat([everybody, stored.detach()], 1), epsilon, iterations)
    codes = codes[:, here.offset : here.offset + here.rows]
    loss = swapped_entropy(codes, *(wide(crops) / temperature for crops in (high, small)))
    return SwAVOutput(loss, codes[0])
