"""Masking of words for prediction (Devlin et al.: "BERT", arXiv 1810.04805)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from counterpoint.core.checks import need_positive, need_within, shapes

IGNORED = -100  # the label of a token that is not predicted


class MaskedTokens(NamedTuple):
    ids: Int[Tensor, "n tokens"]
    labels: Int[Tensor, "n tokens"]


def mask_tokens(
    ids: Int[Tensor, "n tokens"],
    maskable: Bool[Tensor, "n tokens"],
    mask_token: int,
    vocabulary: int,
    probability: float = 0.15,
    *,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Mask tokens as BERT does: of the chosen tokens 80 % become the mask token, 10 % a random one, 10 % stay.

    Args:
        ids: token numbers; not changed.
        maskable: True for tokens that may be chosen. ALBEF takes all but padding and the first token.
        mask_token: number of the mask token.
        vocabulary: random tokens are drawn from 0..vocabulary - 1.
        probability: probability of each token to be chosen, 0..1.
        generator: generator of the draws, on the CPU. Default: torch's own.

    Returns new numbers and labels: the old number where a token was chosen, -100 elsewhere. Raises ValueError for shapes
    that differ and a probability outside 0..1.

    >>> mask_tokens(torch.tensor([[7, 8]]), torch.tensor([[False, False]]), 3, 10, 1.0).labels
    tensor([[-100, -100]])
    """
    if ids.shape != maskable.shape or maskable.dtype != torch.bool:
        raise ValueError(f"maskable must be bool of ids' shape, got {shapes(ids=ids, maskable=maskable)}")
    need_within(0, 1, probability=probability)
    need_positive(vocabulary=vocabulary)

    def uniform() -> Tensor:
        return torch.rand(ids.shape, generator=generator).to(ids.device)

    chosen = (uniform() < probability) & maskable
    what = uniform()
    random = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.device)
    new = torch.where(chosen & (what < 0.8), mask_token, ids)
    new = torch.where(chosen & (what >= 0.9), random, new)
    return MaskedTokens(new, torch.where(chosen, ids, IGNORED))
